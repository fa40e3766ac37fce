"""hgpt/source.py: models by name, and weights, shape and tokenizer of the model that a run starts from."""

import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from small_models import TEXT, bare, byte_pairs, encode, export, prepare
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from data_prep import documents
from hgpt import source
from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import load_tokenizer
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.settings import load_run_config, settings, write_toml
from hgpt.source import check_tokenizer, find_source, initialize_from, shape_of

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
    with pytest.raises(UserError) as error:
        initialize_from(model, str(source))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert str(error.value).startswith(f"model.init_from = {source}")
    return str(error.value)


def save_run(folder: Path, step: int = 5, **settings) -> HGPTForCausalLM:
    """A model as train.py leaves it behind: folder/checkpoints/step_0000005/model, and a link `latest`."""
    model = model_like(**settings)
    checkpoint = folder / "checkpoints" / f"step_{step:07d}"
    model.save_pretrained(checkpoint / "model")
    (checkpoint / "state.json").write_text(f'{{"step": {step}, "tokens": {step * 128}}}')
    (folder / "latest").unlink(missing_ok=True)
    (folder / "latest").symlink_to(checkpoint.relative_to(folder))
    return model


# ---------------------------------------------------------------------------------------------------------------
# A model by name


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


@pytest.mark.parametrize(
    ("name", "hub"),
    [(name, True) for name in ("gpt2", "owner/name", "ckpt.pt")]
    + [(name, False) for name in ("runs/first", "./gpt2", "/gpt2", "tests/none", "a/b/c")],
)
def test_what_is_looked_up_on_the_hub(name, hub):
    # tests/ is a folder here, so that tests/none is a path; runs/ is where a mistyped run would be.
    if hub:
        assert find_source(name).folder == name
    else:
        with pytest.raises(UserError, match="there is no such folder"):
            find_source(name)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is no model"):
        find_source(str(tmp_path))
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        find_source(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "unknown"}', '{"model_type": "hgpt", "n_layer": "x"}']
)
def test_a_configuration_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"no model can be loaded from {tmp_path}: "):
        find_source(str(tmp_path)).load_model()


# ---------------------------------------------------------------------------------------------------------------
# Weights of transformers' GPT-2


def save_gpt2(folder: Path, **settings) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**(SHAPE | settings))).eval()
    with torch.no_grad():  # its biases start at 0 and its norms at 1
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("of_source", "of_run", "notes"),
    [
        ({}, {}, []),
        ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_by_inverse_layer_idx": True}, []),
        ({}, {"activation_function": "gelu_new"}, []),
        ({}, {"tie_word_embeddings": False}, []),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}, []),
        ({}, {"n_positions": 12}, []),  # a shorter context
    ],
    ids=str,
)
def test_gpt2_gives_the_same_logits(tmp_path, of_source, of_run, notes):
    reference, model = save_gpt2(tmp_path, **of_source), model_like(**GPT2 | of_run)
    assert start(model, tmp_path) == notes
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-5, rtol=1e-5)
    tied = model.lm_head.weight is model.transformer.wte.weight
    assert tied == of_run.get("tie_word_embeddings", True)


def test_every_difference_is_named(tmp_path):
    save_gpt2(tmp_path, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
    notes = initialize_from(model_like(bias=False, head="harmonic", activation_function="gelu"), str(tmp_path))
    biases = [
        f"transformer.h.{block}.{name}.bias"
        for block in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    ]
    assert notes == [
        f"weights of {tmp_path} (gpt2, softmax head)",
        "model.bias is False, the checkpoint was trained with True",
        "model.head is 'harmonic', the checkpoint was trained with 'softmax'",
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_new'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
        "not used from the checkpoint: lm_head.weight (its embeddings are not tied, the run's are)",
        "not used from the checkpoint: " + ", ".join([*biases, "transformer.ln_f.bias"]),
    ]


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


# ---------------------------------------------------------------------------------------------------------------
# Weights of nanoGPT


def nanogpt_weights(rows: int, bias: bool) -> dict[str, Tensor]:
    """A state dict in nanoGPT's names and order, masks of its first version included."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    def layer(name: str, *shape: int) -> dict[str, Tensor]:
        weights = {f"{name}.weight": draw(*shape)}
        return weights | {f"{name}.bias": draw(shape[0])} if bias else weights

    weights = {"transformer.wte.weight": draw(rows, D), "transformer.wpe.weight": draw(T, D)}
    for i in range(2):
        h = f"transformer.h.{i}"
        weights |= layer(f"{h}.ln_1", D) | layer(f"{h}.attn.c_attn", 3 * D, D)
        weights |= {f"{h}.attn.bias": torch.tril(torch.ones(1, 1, T, T))}
        weights |= layer(f"{h}.attn.c_proj", D, D) | layer(f"{h}.ln_2", D)
        weights |= layer(f"{h}.mlp.c_fc", 4 * D, D) | layer(f"{h}.mlp.c_proj", D, 4 * D)
    return weights | layer("transformer.ln_f", D) | {"lm_head.weight": weights["transformer.wte.weight"]}


def save_nanogpt(path: Path, weights: dict[str, Tensor], **arguments) -> Path:
    """ckpt.pt as nanoGPT's train.py writes it."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    model_args = {"n_layer": 2, "n_head": 4, "n_embd": D, "block_size": T, "bias": False, "vocab_size": 128}
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": model_args | {"dropout": 0.0} | arguments,
            "iter_num": 600_000,
            "best_val_loss": torch.tensor(2.85),
            "config": {"out_dir": "out", "compile": True, "learning_rate": 6e-4},
        },
        path,
    )
    return path


def reference_hidden(weights: dict[str, Tensor], ids: Tensor, gelu, inverse_layer: bool) -> Tensor:
    """nanoGPT's forward, written out, (B, T) → (B, T, D)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    T = ids.shape[1]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    for i in range(2):
        h = f"transformer.h.{i}"
        parts = linear(f"{h}.attn.c_attn", norm(f"{h}.ln_1", x)).split(D, dim=2)
        q, k, v = (part.unflatten(2, (4, D // 4)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / math.sqrt(D // 4) / (i + 1 if inverse_layer else 1)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(f"{h}.attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{h}.mlp.c_proj", gelu(linear(f"{h}.mlp.c_fc", norm(f"{h}.ln_2", x))))
    return norm("transformer.ln_f", x)


@pytest.mark.parametrize(
    ("prefix", "bias", "multiple"), [("", False, 64), ("_orig_mod.", True, 64), ("module._orig_mod.", False, 1)]
)
def test_nanogpt_checkpoint(tmp_path, prefix, bias, multiple):
    # As with GPT-2's 50257 tokens in 50304 rows, there is padding: 101 tokens in 128 rows, in the model 128 or 101.
    weights = nanogpt_weights(128, bias)
    path = save_nanogpt(tmp_path / "ckpt.pt", {prefix + name: value for name, value in weights.items()}, bias=bias)
    model = model_like(head="softmax", bias=bias, pad_vocab_to_multiple_of=multiple)
    assert initialize_from(model, str(path)) == [f"weights of {path} (nanoGPT, iteration 600,000)"]
    found = dict(model.named_parameters())
    masks = {f"transformer.h.{i}.attn.bias" for i in range(2)}
    assert found.keys() == weights.keys() - masks - {"lm_head.weight"}
    for name, parameter in found.items():
        assert torch.equal(parameter, weights[name][: len(parameter)]), name
    expected = reference_hidden(weights, IDS, F.gelu, inverse_layer=False) @ weights["lm_head.weight"][:V].T
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_released_harmonic_checkpoint(tmp_path):
    """The first paper's code: GPT-2's GELU, attention by inverse layer, and p ∝ (d²)^(−D), so n = 2 D: 1536 at 768."""
    weights = {name: value.double() for name, value in nanogpt_weights(V, bias=False).items()}
    floats = {name: value.float() for name, value in weights.items()}
    path = save_nanogpt(tmp_path / "ckpt.pt", floats, scale_attn_by_inverse_layer_idx=True)
    model = model_like(exponent="2*dim", scale_attn_by_inverse_layer_idx=True, activation_function="gelu_pytorch_tanh")
    assert model.config.exponent == 2 * D
    assert start(model, path) == []

    x = reference_hidden(weights, IDS, lambda v: F.gelu(v, approximate="tanh"), inverse_layer=True)
    d_sq = torch.cdist(x, weights["lm_head.weight"].expand(2, -1, -1)).square()
    p = (d_sq / d_sq.amin(-1, keepdim=True)) ** -D  # as they write it; in float64 it does not underflow here
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(model(IDS).logits.softmax(-1).double(), p, atol=1e-5, rtol=1e-4)

    assert start(model_like(exponent="2*dim"), path) == [
        "model.activation_function is 'gelu', the checkpoint was trained with 'gelu_pytorch_tanh'",
        "model.scale_attn_by_inverse_layer_idx is False, the checkpoint was trained with True",
    ]


def test_names_that_do_not_fit(tmp_path):
    weights = nanogpt_weights(128, bias=False)
    weights["transformer.h.0.attn.rope"] = torch.ones(3)
    del weights["transformer.h.1.ln_2.weight"]
    path = save_nanogpt(tmp_path / "ckpt.pt", weights)
    model = model_like(head="softmax")
    kept = model.transformer.h[1].ln_2.weight.detach().clone()
    assert start(model, path) == [
        "not in the checkpoint, kept as initialised: transformer.h.1.ln_2.weight",
        "not used from the checkpoint: transformer.h.0.attn.rope",
    ]
    assert torch.equal(model.transformer.h[1].ln_2.weight, kept)
    difference, missing, _ = start(model_like(head="softmax", bias=True), path)
    assert difference == "model.bias is True, the checkpoint was trained with False"
    assert missing.startswith("not in the checkpoint, kept as initialised: transformer.h.0.attn.c_attn.bias, ")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    for content in (b"hello", b""):
        path.write_bytes(content)
        assert "is no checkpoint of tensors" in refusal(model_like(), path)
    for content, message in (
        ({"state_dict": {}}, "holds 'model' and 'model_args'; this holds ['state_dict']"),
        (torch.ones(3), "this holds Tensor"),
        ({"model": {}, "model_args": {"n_layer": 2}}, "its model_args lack n_embd, n_head"),
    ):
        torch.save(content, path)
        assert refusal(model_like(), path).endswith(message)


# ---------------------------------------------------------------------------------------------------------------
# Other sources


def test_hgpt_model_into_a_harmonic_run(tmp_path):
    source, run = save_run(tmp_path / "run", exponent=14.0), tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_0000005"
    for path, folder in ((run, run / "latest"), (checkpoint, checkpoint), (checkpoint / "model", checkpoint)):
        model = model_like(exponent=14.0)
        whose = f"weights of {folder / 'model'} (hgpt, harmonic head, step 5)"
        assert initialize_from(model, str(path)) == [whose]
        assert torch.equal(model(IDS).logits, source(IDS).logits)
    assert start(model_like(exponent=28.0), run) == [
        "model.head.exponent is 28.0, the checkpoint was trained with 14.0"
    ]


def test_other_and_damaged_models_are_refused(tmp_path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "llama")
    assert "is a llama model; it must be a gpt2 or an hgpt" in refusal(model_like(), tmp_path / "llama")
    save_gpt2(tmp_path / "gpt2")
    weights = tmp_path / "gpt2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "no model can be loaded from" in refusal(model_like(**GPT2), tmp_path / "gpt2")


@pytest.mark.parametrize("source", ["nobody/such-a-model", "gpt2", "ckpt.pt", "/no/such/folder", "no such folder!"])
def test_a_source_that_cannot_be_reached(source):
    # conftest.py turns the network off.
    message = refusal(model_like(), source)
    assert "no model can be loaded from" in message or "there is no such folder" in message
    assert message.endswith("an id on the Hugging Face hub, or nanoGPT's ckpt.pt)")


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer of the source and that of the data


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models, `one` and `two`, whose tokenizers have the same size and other merges; data of both."""
    folder = tmp_path_factory.mktemp("tokenizers")
    other = load_tokenizer("bpe:300", lambda: ["centre distance harmonic score of a hidden state " * 20 + TEXT[::-1]])
    for name, backend in (("one", byte_pairs(300)), ("two", other._backend)):
        export(folder / name, backend, "harmonic", rows=300)
        prepare(folder / f"data_{name}", backend)
    return folder


def test_the_same_tokenizer_in_whatever_form(models, tmp_path):
    data = TokenShards.open(models / "data_one", "train")
    assert check_tokenizer(str(models / "one"), data) == "the model and the data have the same tokenizer"
    # In the form of GPT-2's first release: other files, added tokens beyond those of the data.
    shutil.copytree(models / "one", tmp_path / "model")
    tokenizer = find_source(str(models / "one")).load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert check_tokenizer(str(tmp_path / "model"), data) == "the model and the data have the same tokenizer"


def test_another_tokenizer_of_the_same_size_is_refused_and_the_command_in_the_message_helps(models, tmp_path):
    source = str(models / "one")
    with pytest.raises(UserError) as error:
        check_tokenizer(source, TokenShards.open(models / "data_two", "train"))
    message = str(error.value)
    assert message.startswith(
        f"model.init_from = {source}: its tokenizer is not the tokenizer of {models / 'data_two'}: "
    )
    command = message.splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "data_prep.documents"]
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(f"{name} {TEXT}")
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    words = [str(tmp_path / "data") if word == "DIR" else word for word in command[3:] if word != "FILES"]
    documents.main([*words, *files, "--val-fraction", "0.5"])
    assert check_tokenizer(source, TokenShards.open(tmp_path / "data", "train")).endswith("the same tokenizer")


def test_one_vocabulary_with_other_merges_is_refused(models, tmp_path):
    """Equal ids are not enough: without its merges a text of the same vocabulary is other tokens."""
    folder = tmp_path / "model"
    shutil.copytree(models / "one", folder)
    file = folder / "tokenizer.json"
    backend = byte_pairs(300)
    backend.pre_tokenizer = type(backend.pre_tokenizer)(add_prefix_space=True)
    backend.save(str(file))
    with pytest.raises(UserError, match="encode the same text differently"):
        check_tokenizer(str(folder), TokenShards.open(models / "data_one", "train"))


def test_what_cannot_be_compared_is_said(models, tmp_path, monkeypatch):
    def out_of_reach(name: str) -> None:
        raise UserError(name)

    data = TokenShards.open(models / "data_one", "train")
    assert "ckpt.pt holds no tokenizer" in check_tokenizer(str(save_nanogpt(tmp_path / "ckpt.pt", {})), data)
    save_gpt2(tmp_path / "without")
    assert f"{tmp_path / 'without'} has no tokenizer" in check_tokenizer(str(tmp_path / "without"), data)
    nameless = TokenShards.open(bare(tmp_path / "bare", encode(byte_pairs(300), TEXT)), "train", 300)
    assert f"{tmp_path / 'bare'} has no tokenizer" in check_tokenizer(str(models / "one"), nameless)
    nameless.vocab_size = source.GPT2_TOKENS  # GPT-2's, whose files are out of reach
    monkeypatch.setattr(source, "load_tokenizer", out_of_reach)
    assert f"{tmp_path / 'bare'} has no tokenizer" in check_tokenizer(str(models / "one"), nameless)
    with pytest.raises(UserError, match="init_from = nobody/such-a-model"):
        check_tokenizer("nobody/such-a-model", data)


@pytest.mark.slow
def test_a_bare_folder_of_the_size_of_gpt2_is_gpt2s(models, tmp_path):
    gpt2 = load_tokenizer("gpt2")
    data = TokenShards.open(bare(tmp_path / "bare", gpt2.encode_batch([TEXT])[0]), "train", gpt2.vocab_size)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    gpt2.save(tmp_path / "gpt2")
    assert check_tokenizer(str(tmp_path / "gpt2"), data).endswith("the same tokenizer")
    with pytest.raises(UserError, match="--tokenizer"):
        check_tokenizer(str(models / "one"), data)


# ---------------------------------------------------------------------------------------------------------------
# The shape of the source


def test_the_shape_comes_from_the_source_where_it_is_not_given(tmp_path):
    save_gpt2(tmp_path / "gpt2")
    ckpt = save_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(V, bias=False), n_layer=7)
    assert shape_of(str(tmp_path / "gpt2")) == {"n_layer": 2, "n_head": 4, "n_embd": D}
    assert shape_of(str(ckpt))["n_layer"] == 7
    with pytest.raises(UserError, match=r"model\.init_from = nobody/such-a-model: "):
        shape_of("nobody/such-a-model")

    base = ["--name=x", f"--runs_dir={tmp_path}", "--data.path=x", "--model.head.type=softmax", "--train.steps=1",
            "--train.global_batch=1", "--train.micro_batch=1"]  # fmt: skip
    arguments = [*base, f"--model.init_from={tmp_path / 'gpt2'}"]
    config = load_run_config(arguments, shape_of)
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (2, 4, D)
    given = load_run_config([*arguments, "--model.n_layer", "3"], shape_of)
    assert (given.model.n_layer, given.model.n_head, given.model.n_embd) == (3, 4, D)
    assert load_run_config(base, shape_of).model.n_layer == load_run_config(base).model.n_layer == 12

    # Resolved, it is written like any other setting, and read without the source.
    write_toml(config, tmp_path / "config.toml")
    shutil.rmtree(tmp_path / "gpt2")
    assert settings(load_run_config(["--config", str(tmp_path / "config.toml")], shape_of)) == settings(config)
    # The same command, resumed, finds it in the checkpoint.
    save_run(tmp_path / "x")
    assert load_run_config([*arguments, "--resume", "auto"], shape_of).model.n_layer == 2
