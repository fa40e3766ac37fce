"""hgpt/source.py: models by name, and weights, shape and tokenizer of the model that a run starts from."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_models import TEXT, bare, byte_pairs, encode, export, prepare
from small_run import make_config
from small_texts import Trap, refused
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from data_prep import documents
from hgpt import source
from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import load_tokenizer
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.settings import load_run_config, write_toml
from hgpt.source import check_tokenizer, find_source, initialize_from, initialize_radii, shape_of

D, V, T = 32, 101, 16
SHAPE = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": 4}
GPT2 = {"bias": True, "head": "softmax", "activation_function": "gelu_pytorch_tanh"}
IDS = torch.arange(24).reshape(2, 12) * 37 % V


def model_like(**settings) -> HGPTForCausalLM:
    return HGPTForCausalLM(HGPTConfig(**(SHAPE | settings))).eval()


def start(model: HGPTForCausalLM, source: object) -> list[str]:
    """What is said besides whose weights they are."""
    whose, *notes = initialize_from(model, str(source))
    assert whose.startswith("weights of ")
    return notes


def refusal(model: HGPTForCausalLM, source: object) -> str:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    message = refused((), initialize_from, model, str(source))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert message.startswith(f"model.init_from = {source}")
    return message


def save_run(folder: Path, step: int = 5, **settings) -> HGPTForCausalLM:
    """A model as train.py leaves it behind: folder/checkpoints/step_0000005/model, and a link `latest`."""
    model = model_like(**settings)
    checkpoint = folder / "checkpoints" / f"step_{step:07d}"
    model.save_pretrained(checkpoint / "model")
    (checkpoint / "state.json").write_text(f'{{"step": {step}, "tokens": {step * 128}}}')
    (folder / "latest").unlink(missing_ok=True)
    (folder / "latest").symlink_to(checkpoint.relative_to(folder))
    return model


# ------------------------------------------------------------------------------------------------ a model by name


def test_a_run_a_checkpoint_and_an_export(tmp_path):
    run = tmp_path / "first"
    save_run(run, step=3)
    save_run(run, step=5)
    old, new = run / "checkpoints" / "step_0000003", run / "checkpoints" / "step_0000005"
    shutil.copytree(new / "model", tmp_path / "exported")
    for name, label, step in (
        (run, "first", 5),
        (run / "latest", "first", 5),
        (new, "first", 5),
        (old, "first step 3", 3),
        (old / "model", "first step 3", 3),
        (tmp_path / "exported", "exported", None),
    ):
        found = find_source(str(name))
        assert (found.label, found.step, found.run) == (label, step, None if step is None else run)
        assert found.tokens_seen == (None if step is None else 128 * step)
        assert found.load_config().n_embd == D


def test_names_on_the_hub_and_paths_without_a_model(tmp_path):
    for name in ("gpt2", "owner/name", "ckpt.pt"):
        assert find_source(name).folder == name
    # tests/ is a folder here, so that tests/none is a path; runs/ is where a mistyped run would be.
    for name in ("runs/first", "./gpt2", "/gpt2", "tests/none", "a/b/c"):
        refused("there is no such folder", find_source, name)
    refused(f"{tmp_path} is no model", find_source, str(tmp_path))
    (tmp_path / "config.toml").touch()
    refused("no checkpoint yet", find_source, str(tmp_path))


# --------------------------------------------------------------------------------- weights of transformers' GPT-2


def save_gpt2(folder: Path, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**(SHAPE | settings))).eval()
    with torch.no_grad():  # its biases start at 0 and its norms at 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("of_source", "of_run"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": True}),
        ({}, {"activation_function": "gelu_new"}),
        ({}, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
        ({}, {"n_positions": 12}),  # a shorter context
    ],
    ids=str,
)
def test_gpt2_gives_the_same_logits(tmp_path, of_source, of_run):
    reference, model = save_gpt2(tmp_path, **of_source), model_like(**GPT2 | of_run)
    assert start(model, tmp_path) == []
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    tied = model.lm_head.weight is model.transformer.wte.weight
    assert tied == of_run.get("tie_word_embeddings", True)


def test_every_difference_is_named(tmp_path):
    save_gpt2(tmp_path, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
    *differences, head, biases = start(model_like(bias=False, head="harmonic", activation_function="gelu"), tmp_path)
    assert differences == [
        "model.bias is False, the checkpoint was trained with True",
        "model.head is 'harmonic', the checkpoint was trained with 'softmax'",
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_new'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
    ]
    assert head.startswith("not used from the checkpoint: lm_head.weight")
    assert biases.startswith("not used from the checkpoint: ") and biases.count(".bias") == 2 * 6 + 1


@pytest.mark.parametrize(
    ("of_source", "of_run", "message"),
    [
        ({}, {"n_layer": 3}, "set model.n_layer = 2 (it is 3)"),
        ({}, {"n_head": 2}, "set model.n_head = 4 (it is 2)"),
        ({}, {"n_embd": 64, "n_layer": 1}, "set model.n_layer = 2 (it is 1), model.n_embd = 32 (it is 64)"),
        ({}, {"n_positions": 17}, "transformer.wpe.weight: (16, 32) in the checkpoint, (17, 32) in the model"),
        ({}, {"vocab_size": 102}, "transformer.wte.weight: (101, 32) in the checkpoint, (128, 32) in the model"),
        ({"vocab_size": V + 128}, {}, "transformer.wte.weight: (229, 32) in the checkpoint, (128, 32) in the model"),
        ({"n_inner": 8 * D}, {}, "mlp.c_proj.weight: (32, 256)"),
    ],
)
def test_another_shape_is_refused(tmp_path, of_source, of_run, message):
    save_gpt2(tmp_path, **of_source)
    assert message in refusal(model_like(**GPT2 | of_run), tmp_path)


# --------------------------------------------------------------------------------------------- weights of nanoGPT


def nanogpt(rows: int = 128, bias: bool = False, **settings) -> tuple[GPT2LMHeadModel, dict[str, Tensor]]:
    """A GPT-2 of transformers, and its weights as nanoGPT stores them, masks of its first version included.

    nanoGPT's linear layers hold the transposed weight, and a bias that it leaves out is 0.
    """
    reference = GPT2LMHeadModel(GPT2Config(**SHAPE | {"vocab_size": rows}, **settings)).eval()
    weights = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, T, T).tril() for block in range(2)}
    for name, parameter in reference.named_parameters():
        left_out = name.endswith(".bias") and not bias
        parameter.data = torch.zeros_like(parameter) if left_out else 0.1 * torch.randn(parameter.shape)
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights |= {} if left_out else {name: parameter.data.mT.contiguous() if linear else parameter.data}
    return reference, weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def save_nanogpt(path: Path, weights: dict[str, Tensor], **arguments) -> Path:
    """ckpt.pt as nanoGPT's train.py writes it."""
    model_args = {"n_layer": 2, "n_head": 4, "n_embd": D, "block_size": T, "bias": False, "vocab_size": 128}
    content = {
        "model": weights,
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict(),
        "model_args": model_args | {"dropout": 0.0} | arguments,
        "iter_num": 600_000,
        "best_val_loss": torch.tensor(2.85),
        "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4},
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("prefix", "bias", "multiple"), [("", False, 64), ("_orig_mod.", True, 64), ("module._orig_mod.", False, 1)]
)
def test_nanogpt_checkpoint(tmp_path, prefix, bias, multiple):
    # As with GPT-2's 50257 tokens in 50304 rows, there is padding: 101 tokens in 128 rows, in the model 128 or 101.
    reference, weights = nanogpt(128, bias, activation_function="gelu")
    path = save_nanogpt(tmp_path / "ckpt.pt", {prefix + name: value for name, value in weights.items()}, bias=bias)
    model = model_like(head="softmax", bias=bias, pad_vocab_to_multiple_of=multiple)
    assert initialize_from(model, str(path)) == [f"weights of {path} (nanoGPT, iteration 600,000)"]
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits[..., :V], atol=1e-5, rtol=1e-5)


def test_released_harmonic_checkpoint(tmp_path):
    """The first paper's code: GPT-2's GELU, attention by inverse layer, and p ∝ (d²)^(−D), so n = 2 D: 1536 at 768."""
    as_released = {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"}
    reference, weights = nanogpt(V, **as_released)
    path = save_nanogpt(tmp_path / "ckpt.pt", weights, scale_attn_by_inverse_layer_idx=True)
    model = model_like(exponent="2*dim", **as_released)
    assert model.config.exponent == 2 * D
    assert start(model, path) == []

    x = reference.double().transformer(IDS).last_hidden_state
    d_sq = torch.cdist(x, reference.lm_head.weight.expand(2, -1, -1)).square()
    p = (d_sq / d_sq.amin(-1, keepdim=True)) ** -D  # as they write it; in float64 it does not underflow here
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(model(IDS).logits.softmax(-1).double(), p, atol=1e-5, rtol=1e-4)

    assert start(model_like(exponent="2*dim"), path) == [
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_pytorch_tanh'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
    ]


def test_names_that_do_not_fit(tmp_path):
    _, weights = nanogpt()
    weights["transformer.h.0.attn.rope"] = torch.ones(3)
    del weights["transformer.h.1.ln_2.weight"]
    path = save_nanogpt(tmp_path / "ckpt.pt", weights)
    model = model_like(head="softmax")
    kept = model.transformer.h[1].ln_2.weight.detach().clone()
    missing, unused = start(model, path)
    assert missing.startswith("not in the checkpoint") and missing.endswith(": transformer.h.1.ln_2.weight")
    assert unused.startswith("not used from the checkpoint") and unused.endswith(": transformer.h.0.attn.rope")
    assert torch.equal(model.transformer.h[1].ln_2.weight, kept)
    difference, missing, _ = start(model_like(head="softmax", bias=True), path)
    assert difference == "model.bias is True, the checkpoint was trained with False"
    assert "transformer.h.0.attn.c_attn.bias" in missing


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    sprung = tmp_path / "sprung"
    content = {"model": {}, "model_args": {}, "config": Trap(sprung)}
    torch.save(content, tmp_path / "ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("ckpt.pt", "plain.pt"):
        assert "(weights_only=True)" in refusal(model_like(), tmp_path / name)
    assert not sprung.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # the trap is one
    assert sprung.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is no checkpoint of tensors"),
        (b"", "is no checkpoint of tensors"),
        ({"state_dict": {}, 1: 2}, "this holds ['1', 'state_dict']"),
        (torch.ones(3), "this holds Tensor"),
        ({"model": {}, "model_args": [1]}, "its model_args lack n_embd, n_head, n_layer"),
        ({"model": {}, "model_args": {"n_layer": 2}}, "its model_args lack n_embd, n_head"),
        ({"model": {}, "model_args": SHAPE | {"n_layer": "2"}}, "lack n_layer"),
        ({"model": {}, "model_args": SHAPE | {"n_layer": True}}, "lack n_layer"),
        *(({"model": model, "model_args": SHAPE}, "a table of names and tensors of real numbers")
          for model in ([1], {3: torch.ones(2)}, {"x": "y"}, {"x": torch.ones(2, dtype=torch.long)},
                        {"x": torch.ones(3, 2).to_sparse()})),
        ({"model": {"transformer.wte.weight": torch.tensor(1.0)}, "model_args": SHAPE},
         "transformer.wte.weight: () in the checkpoint"),
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert message in refusal(model_like(), path)


# -------------------------------------------------------------------------------------------------- other sources


def test_hgpt_model_into_a_harmonic_run(tmp_path):
    run = tmp_path / "run"
    source = save_run(run, exponent=14.0)
    checkpoint = run / "checkpoints" / "step_0000005"
    for path, folder in ((run, run / "latest"), (checkpoint, checkpoint), (checkpoint / "model", checkpoint)):
        model = model_like(exponent=14.0)
        whose = f"weights of {folder / 'model'} (hgpt, harmonic head, step 5)"
        assert initialize_from(model, str(path)) == [whose]
        assert torch.equal(model(IDS).logits, source(IDS).logits)
    (note,) = start(model_like(exponent=28.0), run)
    assert note == "model.head.exponent is 28.0, the checkpoint was trained with 14.0"


def test_radii_come_from_the_source_or_from_the_frequencies(tmp_path):
    unigram = torch.arange(V).double().log_softmax(0).numpy()
    padded = [*unigram, *[unigram.min()] * (128 - V)]
    source = save_run(tmp_path, radius="learned")
    torch.nn.init.normal_(source.lm_head.log_weight)
    source.save_pretrained(tmp_path / "latest" / "model")
    for init_from, radius_init, expected in (
        (None, None, padded),
        (None, "zero", [0.0] * 128),
        (tmp_path, None, source.lm_head.log_weight.tolist()),
        (tmp_path, "unigram", padded),
    ):
        model = model_like(radius="learned")
        assert init_from is None or start(model, init_from) == []
        initialize_radii(model, radius_init, unigram)
        assert model.lm_head.log_weight.tolist() == pytest.approx(expected)
    initialize_radii(model_like(), None, None)  # a model without radii
    differences = start(model_like(final_norm="none"), tmp_path)
    assert differences[0] == "model.head.radius is 'none', the checkpoint was trained with 'learned'"
    assert differences[1] == "model.final_norm is 'none', the checkpoint was trained with 'layer_norm'"
    assert differences[2:] == ["not used from the checkpoint: lm_head.log_weight"]


def test_weights_that_the_configuration_does_not_know_are_refused(tmp_path):
    """Radii without which the model would predict otherwise, or without which it cannot."""
    for weights, configuration, fault in (("learned", "none", "hold"), ("none", "learned", "are incomplete, without")):
        model_like(radius=weights).save_pretrained(tmp_path)
        model_like(radius=configuration).config.save_pretrained(tmp_path)
        refused(f"{fault} lm_head.log_weight", find_source(str(tmp_path)).load_model)


def test_models_of_another_kind_or_out_of_reach_are_refused(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "llama")
    assert "is a llama model; it must be a gpt2 or an hgpt" in refusal(model_like(), tmp_path / "llama")
    for name in ("nobody/such-a-model", "gpt2", "ckpt.pt", "/no/such/folder", "no such folder!"):  # without a network
        assert refusal(model_like(), name).endswith("an id on the Hugging Face hub, or nanoGPT's ckpt.pt)")


# --------------------------------------------------------------- the tokenizer of the source and that of the data


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models, `one` and `two`, whose tokenizers have the same size and other merges; data of both."""
    folder = tmp_path_factory.mktemp("tokenizers")
    other = load_tokenizer("bpe:300", lambda: ["centre distance harmonic score of a hidden state " * 20 + TEXT[::-1]])
    for name, backend in (("one", byte_pairs(300)), ("two", other._backend)):
        export(folder / name, backend, "harmonic", rows=300)
        prepare(folder / f"data_{name}", backend)
    return folder


@pytest.fixture(scope="module")
def data_one(models) -> TokenShards:
    return TokenShards.open(models / "data_one", "train")


def test_the_same_tokenizer_in_whatever_form(models, data_one, tmp_path):
    assert check_tokenizer(str(models / "one"), data_one).endswith("the same tokenizer")
    # In the form of GPT-2's first release: other files, added tokens beyond those of the data.
    shutil.copytree(models / "one", tmp_path / "model")
    tokenizer = find_source(str(models / "one")).load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert check_tokenizer(str(tmp_path / "model"), data_one).endswith("the same tokenizer")


def test_another_tokenizer_of_the_same_size_is_refused_and_the_command_in_the_message_helps(models, tmp_path):
    source = str(models / "one")
    message = refused(models / "data_two", check_tokenizer, source, TokenShards.open(models / "data_two", "train"))
    assert message.startswith(f"model.init_from = {source}: ")
    python, option, module, *arguments = message.splitlines()[-1].split()
    assert [python, option, module] == ["python", "-m", "data_prep.documents"]
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} {TEXT}")
    places = {"DIR": str(tmp_path / "data"), "FILES": str(tmp_path / "texts")}
    documents.main([*(places.get(argument, argument) for argument in arguments), "--val-fraction", "0.5"])
    assert check_tokenizer(source, TokenShards.open(tmp_path / "data", "train")).endswith("the same tokenizer")


def test_one_vocabulary_with_another_pre_tokenizer_is_refused(models, data_one, tmp_path):
    """Equal ids are not enough: the same text becomes other tokens."""
    shutil.copytree(models / "one", tmp_path / "model")
    backend = byte_pairs(300)
    backend.pre_tokenizer = type(backend.pre_tokenizer)(add_prefix_space=True)
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    refused("encode the same text differently", check_tokenizer, str(tmp_path / "model"), data_one)


def test_what_cannot_be_compared_is_said(models, data_one, tmp_path, monkeypatch):
    def out_of_reach(name: str) -> None:
        raise UserError(name)

    assert "ckpt.pt holds no tokenizer" in check_tokenizer(str(save_nanogpt(tmp_path / "ckpt.pt", {})), data_one)
    save_gpt2(tmp_path / "without")
    assert f"{tmp_path / 'without'} has no tokenizer" in check_tokenizer(str(tmp_path / "without"), data_one)
    nameless = TokenShards.open(bare(tmp_path / "bare", encode(byte_pairs(300), TEXT)), "train", 300)
    assert f"{tmp_path / 'bare'} has no tokenizer" in check_tokenizer(str(models / "one"), nameless)
    nameless.vocab_size = source.GPT2_TOKENS  # GPT-2's, whose files are out of reach
    monkeypatch.setattr(source, "load_tokenizer", out_of_reach)
    assert f"{tmp_path / 'bare'} has no tokenizer" in check_tokenizer(str(models / "one"), nameless)
    refused("init_from = nobody/such-a-model", check_tokenizer, "nobody/such-a-model", data_one)


@pytest.mark.slow
def test_a_bare_folder_of_the_size_of_gpt2_is_gpt2s(models, tmp_path):
    gpt2 = load_tokenizer("gpt2")
    data = TokenShards.open(bare(tmp_path / "bare", gpt2.encode_batch([TEXT])[0]), "train", gpt2.vocab_size)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    gpt2.save(tmp_path / "gpt2")
    assert check_tokenizer(str(tmp_path / "gpt2"), data).endswith("the same tokenizer")
    refused("--tokenizer", check_tokenizer, str(models / "one"), data)


# ---------------------------------------------------------------------------------------- the shape of the source


def test_the_shape_of_a_source(tmp_path):
    """tests/test_settings.py has which settings come from it."""
    save_gpt2(tmp_path / "gpt2")
    expected = {"n_layer": 2, "n_head": 4, "n_embd": D}
    assert shape_of(str(tmp_path / "gpt2")) == expected
    assert shape_of(str(save_nanogpt(tmp_path / "ckpt.pt", {}, n_layer=7))) == expected | {"n_layer": 7}
    refused("model.init_from = nobody/such-a-model: ", shape_of, "nobody/such-a-model")
    # A run that resumes has that of its checkpoint, and one with a shape of its own asks nobody.
    save_run(tmp_path / "run")
    assert shape_of("/gone", "auto", tmp_path / "run") == shape_of("/gone", str(tmp_path / "run")) == expected
    write_toml(make_config(tmp_path, tmp_path, model={"init_from": "/gone"}), tmp_path / "config.toml")
    assert load_run_config(["--config", str(tmp_path / "config.toml")], shape_of).model.init_from == "/gone"
