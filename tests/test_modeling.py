"""The language model against itself without its shortcuts, and as a checkpoint; test_source: against GPT-2."""

import inspect
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_code import assert_same_without_hgpt, write_expected
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils.generic import TransformersKwargs

from hgpt import HarmonicHead, HGPTConfig, HGPTForCausalLM, HGPTModel, SoftmaxHead
from hgpt.model import harmax, heads
from hgpt.model.modeling_hgpt import CACHE, FOR_ATTENTION, WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parent.parent

V, ROWS, T = 61, 64, 12
SIZES = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
LIVELY = {"initializer_range": 0.3, "centre_init_std": 0.3, "final_norm_gain": 0.5}
FREE = {"radius": "learned", "final_norm": "none"}
GREEDY = {"max_new_tokens": 10, "do_sample": False}
HEADS = pytest.mark.parametrize("head", ["harmonic", "softmax"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tiny_model(**settings: Any) -> HGPTForCausalLM:
    """Weights large enough that logits differ clearly from token to token and from position to position."""
    torch.manual_seed(0)
    model = HGPTForCausalLM(HGPTConfig(**(SIZES | LIVELY | settings))).eval()
    if model.lm_head.log_weight is not None:
        nn.init.normal_(model.lm_head.log_weight, std=2)
    return model


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


IDS = tokens()


def assert_near(found: Any, expected: Any) -> None:
    """The same but for the order of sums over positions."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


# Loss and labels


@HEADS
@TIED
def test_the_loss_is_the_cross_entropy_of_the_shifted_labels(head, tied):
    """With its gradients, and with logits or without."""
    model, labels = tiny_model(head=head, tie_word_embeddings=tied, radius="learned").double(), IDS.clone()
    labels[0, :4] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits, parameters = model(IDS).logits, list(model.parameters())
    expected = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
    gradients = torch.autograd.grad(expected, parameters)
    for training, options in ((False, {}), (False, {"loss_only": True}), (True, {}), (True, {"loss_only": False})):
        out = model.train(training)(IDS, labels=labels, **options)
        without = options.get("loss_only", training)
        assert out.logits is None if without else torch.equal(out.logits, logits)
        assert not training or out.past_key_values is None
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(out.loss, parameters), gradients)
    torch.testing.assert_close(model(IDS).logits, logits)  # without labels, logits are what was asked for
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, expected)
    divided = model(IDS, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(divided, expected * (shifted != -100).sum() / 50)


def test_no_final_norm():
    """x is the last block's output times a gain, under the name of the norm's weight."""
    model, blocks = tiny_model(final_norm="none", bias=True), []
    gain = model.transformer.ln_f.weight
    assert [name for name in model.state_dict() if "ln_f" in name] == ["transformer.ln_f.weight"]
    nn.init.uniform_(gain)
    model.transformer.h[-1].register_forward_hook(lambda *call: blocks.append(call[2][0]))
    hidden = model.transformer(IDS).last_hidden_state
    torch.testing.assert_close(hidden, blocks[0] * gain)
    assert hidden.norm(dim=-1).std() > 0.01 * hidden.norm(dim=-1).mean()
    model(IDS, labels=IDS).loss.backward()
    assert gain.grad.abs().min() > 0


# Attention, cache, padding on the left


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cache_equals_no_cache(name):
    """By both names of the cache: transformers 5.24 says `cache`, earlier versions `past_key_values`."""
    model = tiny_model()
    for module, output in ((model, "logits"), (model.transformer, "last_hidden_state")):
        past, found = None, []
        for piece in IDS.split([5, 1, 1, 3, 2], dim=1):
            out = module(piece, use_cache=True, **{name: past})
            past, found = out[CACHE], [*found, out[output]]
        assert_near(torch.cat(found, 1), module(IDS)[output])
    with pytest.raises(ValueError, match="pass one of them"):
        model(IDS, past_key_values=past, cache=past)
    assert model(IDS, use_cache=False).get(CACHE) is None


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}], ids=str
)
def test_generation_with_a_cache_is_that_without(options):
    model = tiny_model()
    expected = model.generate(IDS, use_cache=False, num_beams=options.get("num_beams", 1), **GREEDY)
    assert torch.equal(model.generate(IDS, **options, **GREEDY), expected)


def test_every_keyword_that_transformers_passes_is_known():
    """A keyword that `forward` swallowed made every cached token wrong with transformers 5.24."""
    named = {name for module in (HGPTModel, HGPTForCausalLM) for name in inspect.signature(module.forward).parameters}
    known = named | FOR_ATTENTION | WITHOUT_EFFECT
    # What transformers documents as passed to a decoder's `forward`, beside what only mixtures of experts get.
    documented = set(TransformersKwargs.__annotations__) - {"output_router_logits"}
    assert documented | set(PagedAttentionArgs.__annotations__) <= known
    model, seen = tiny_model(), set()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    for options in ({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
        model.generate(IDS[:1], max_new_tokens=4, **options)
    assert {"input_ids", CACHE, "use_cache"} <= seen <= known


def test_a_keyword_that_would_change_the_result_is_refused():
    model = tiny_model()
    for module in (model, model.transformer):
        for keyword in ("token_type_ids", "encoder_hidden_states", "head_mask", "cache_params", "labelz"):
            with pytest.raises(TypeError, match=keyword):
                module(IDS, **{keyword: IDS})
            module(IDS, **{keyword: None})  # that is: not given
    with pytest.raises(ValueError, match="is_causal"):
        model(IDS, is_causal=False)
    torch.testing.assert_close(model(IDS, is_causal=True, cache_position=torch.arange(T)).logits, model(IDS).logits)


@pytest.mark.slow
def test_continuous_batching_equals_one_by_one():
    model = tiny_model(eos_token_id=V - 1)
    prompts = [tokens(1, length)[0].tolist() for length in (5, 9, 3)]
    alone = [model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist() for ids in prompts]
    config = GenerationConfig(**GREEDY, eos_token_id=V - 1, pad_token_id=0)
    together = model.generate_batch(prompts, generation_config=config)
    assert [request.generated_tokens for request in together.values()] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "cosine"},
        *({"distance": "mahalanobis", "distance_options": o} for o in ({}, {"metric": "low_rank", "rank": 4})),
    ],
    ids=str,
)
def test_generation_makes_of_the_centres_once_what_no_token_changes(options, dtype, monkeypatch):
    model, rows = tiny_model(**options), []  # rows of the operand in each call that transforms it or computes norms
    for parameter in model.lm_head.metric.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *operands: rows.append(len(operands[-1])) or original(*operands))

    watch(heads, "squared_norms")
    watch(harmax, "squared_norms")
    if model.lm_head.metric.transforms:
        watch(type(model.lm_head.metric), "forward")
    for _ in range(2):
        expected = IDS
        with torch.no_grad():
            for _ in range(8):  # a token at a time, everything made again for each
                logits = model(expected).logits[:, -1]
                expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
        rows.clear()
        found = model.generate(IDS, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences, expected)
        assert rows.count(ROWS) == (2 if options else 1)
        torch.testing.assert_close(found.logits[-1], logits, rtol=0, atol=0.05)
        model.lm_head.weight.data.mul_(torch.linspace(0.5, 1.5, ROWS)[:, None].to(dtype))  # seen by no version counter


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_equals_one_by_one(attention):
    model = tiny_model(attn_implementation=attention, pad_token_id=V - 1)
    prompts = [tokens(1, length)[0] for length in (3, 9, 6)]
    ids = torch.stack([F.pad(prompt, (9 - len(prompt), 0), value=V - 1) for prompt in prompts])
    mask = torch.arange(9) >= torch.tensor([[9 - len(prompt)] for prompt in prompts])
    for row, prompt in zip(model(ids, attention_mask=mask.long()).logits, prompts, strict=True):
        assert_near(row[-len(prompt) :], model(prompt[None]).logits[0])


def test_other_inputs_give_the_same_logits():
    model = tiny_model()
    logits, embeds = model(IDS).logits, model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_only_packed_rows_may_be_longer_than_the_model():
    """Padding-free batches: one row, positions that start again, and in all more tokens than n_positions or fewer."""
    model = tiny_model()
    for lengths in ((5, 7), (7, 32, 5)):
        texts, positions = [tokens(1, n) for n in lengths], torch.cat([torch.arange(n) for n in lengths])[None]
        packed = model(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
        assert_near(packed, torch.cat([model(text).logits for text in texts], 1))
    past = model(tokens(1, 30), use_cache=True).past_key_values
    wrong = ((44, {"position_ids": torch.arange(44)[None]}, 44), (33, {}, 33), (3, {"past_key_values": past}, 33))
    for length, options, counted in wrong:
        with pytest.raises(ValueError, match=rf"32 positions \(n_positions\), and the sequence has {counted} tokens"):
            model(tokens(1, length), **options)


def test_drafting_with_the_first_blocks_changes_no_text():
    model, blocks = tiny_model(), []
    plain = model.generate(IDS[:1], **GREEDY)
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda module, inputs, output, index=index: blocks.append(index))
    assert torch.equal(model.generate(IDS[:1], assistant_early_exit=1, **GREEDY), plain)
    assert blocks.count(0) > blocks.count(1) > 0  # the draft runs block 0 alone


def test_what_takes_the_head_for_a_linear_layer_fails():
    """hidden @ lm_head.weight.T + lm_head.bias, as TRL's fused head computes, is no logit of these heads."""
    for head in (HarmonicHead(4, 3), SoftmaxHead(4, 3, rows=8), SoftmaxHead(4, 3, radius=True)):
        assert not hasattr(head, "bias")
        with pytest.raises(AttributeError, match=r"no bias: its logits are not x @ weight\.T"):
            _ = head.bias
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            _ = head.other
    model = tiny_model()
    with pytest.raises(TypeError, match="HarmonicHead or a SoftmaxHead, not Linear"):
        model.set_output_embeddings(torch.nn.Linear(32, V))
    assert isinstance(model.lm_head, HarmonicHead)


def test_optional_outputs():
    model = tiny_model(attn_implementation="eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert_near(out.logits, tiny_model(attn_implementation="sdpa")(IDS).logits)
    assert [h.shape for h in out.hidden_states] == 3 * [(2, T, 32)]
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    embedded = model.transformer.wte(IDS) + model.transformer.wpe.weight[:T]
    torch.testing.assert_close(out.hidden_states[0], embedded)
    assert len(out.attentions) == 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T))
        assert (weights.triu(1) == 0).all()
    out = model(IDS)
    assert out.hidden_states is None and out.attentions is None
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, T, V)
    assert isinstance(model.transformer(IDS, return_dict=False), tuple)


# Checkpoints


@HEADS
@TIED
def test_save_and_load_give_the_same_weights_and_logits(tmp_path, head, tied):
    """Also that loading randomises nothing that was loaded (transformers #46620)."""
    free = FREE if tied else {}
    model = tiny_model(head=head, tie_word_embeddings=tied, bias=True, dropout=0.1, eos_token_id=7, **free)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, trunk = (kind.from_pretrained(tmp_path).eval() for kind in (AutoModelForCausalLM, AutoModel))
    assert (type(loaded), type(trunk)) == (HGPTForCausalLM, HGPTModel)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert torch.equal(trunk(IDS).last_hidden_state, model.transformer(IDS).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HGPTConfig
    places = {"auto_map", "_name_or_path"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in places} for c in (model.config, config))
    assert ours == theirs and config.final_norm_gain == LIVELY["final_norm_gain"]
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"transformers{config.transformers_tested}" in requirements


def test_only_missing_weights_are_initialised(tmp_path):
    model = tiny_model(bias=True)
    state = model.state_dict()
    missing = {
        "transformer.ln_f.weight",
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_fc.bias",  # the weight of the same module was loaded, and has to stay
        "transformer.h.0.ln_1.bias",
    }
    for name in missing:
        del state[name]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = HGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    assert (loaded.transformer.ln_f.weight == LIVELY["final_norm_gain"]).all()
    std = loaded.transformer.h[1].mlp.c_proj.weight.std().item()
    assert std == pytest.approx(LIVELY["initializer_range"] / 2, rel=0.05)
    found = loaded.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(V - 1)} | {"<end>": V - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_remote_code_where_hgpt_cannot_be_imported(tmp_path):
    folders, metric = [], {"distance": "mahalanobis", "distance_options": {"metric": "low_rank", "rank": 4}}
    for head, settings in (("harmonic", {}), ("harmonic", FREE | metric), ("softmax", FREE)):
        settings = settings | {"pad_token_id": V - 1, "eos_token_id": V - 1}
        model = tiny_model(head=head, tie_word_embeddings=head == "harmonic", **settings)
        folders.append(tmp_path / f"modèle {len(folders)}")
        model.save_pretrained(folders[-1])
        tiny_tokenizer().save_pretrained(folders[-1])
        write_expected(model, folders[-1], IDS)
    assert_same_without_hgpt(folders, tmp_path)


@HEADS
@TIED
@pytest.mark.parametrize("new", [V + 2, 100, 40])
def test_resize_token_embeddings(head, tied, new, tmp_path):
    learnt = {"distance": "mahalanobis", "learn_exponent": True} if head == "harmonic" else {}
    model, ids, kept = (
        tiny_model(head=head, tie_word_embeddings=tied, radius="learned", **learnt),
        IDS % 40,
        min(new, V),
    )
    if learnt:
        nn.init.normal_(model.lm_head.metric.log_scale, std=0.3)
        nn.init.constant_(model.lm_head.log_exponent, 1.5)
    a = model.lm_head.log_weight[:V].tolist()
    with torch.no_grad():  # a live graph would hold on to the old shapes
        before = model(ids).logits
    model.lm_head.label_smoothing = 0.2
    model.resize_token_embeddings(new)
    model.post_init()  # draws no new weights
    rows = -(-new // 64) * 64
    assert model.config.vocab_size == model.lm_head.num_classes == new
    assert len(model.lm_head.weight) == model.config.padded_vocab_size == rows
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert model.lm_head.label_smoothing == 0.2
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == new
    torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
    assert model.lm_head.log_weight.tolist() == a[:kept] + [min(a)] * (rows - kept)  # new tokens are rare
    after.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(HGPTForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, after.logits)


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_new_centres_are_spread_as_the_old_ones(mean_resizing):
    """Near the mean they would be near every hidden state."""
    model = tiny_model(vocab_size=1000, pad_vocab_to_multiple_of=1)
    with torch.no_grad():
        model.lm_head.weight.normal_().mul_(torch.linspace(0.1, 2, 32)).add_(3)
    old = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(9000, mean_resizing=mean_resizing)
    new = model.lm_head.weight.detach()
    assert torch.equal(new[:1000], old)
    torch.testing.assert_close(new[1000:].mean(0), old.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(new[1000:].T.cov(), old.T.cov(), rtol=0, atol=0.25)


# Training machinery


def test_gradient_checkpointing_changes_nothing():
    model, results = tiny_model(dropout=0.1), []
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.allclose(model(IDS).logits, model(IDS).logits)  # dropout
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(IDS, labels=IDS, use_cache=True).loss  # recomputation must not find its own keys
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert model.transformer.h[0].gradient_checkpointing
    torch.testing.assert_close(*results)


def test_transformers_trainer_trains_and_evaluates(tmp_path):
    model = tiny_model()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    before = model(tokens(8), labels=tokens(8)).loss.item()
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 20}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings, **batch)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


@HEADS
@TIED
def test_initial_weights(head, tied):
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000, "bias": True}
    settings = {"final_norm_gain": 0.05, "centre_init_std": 0.07, "radius": "learned"}
    final_norm = "none" if tied else "layer_norm"
    config = HGPTConfig(**sizes, **settings, head=head, tie_word_embeddings=tied, final_norm=final_norm)
    for model in (HGPTForCausalLM(config), HGPTModel(config)):
        for name, parameter in model.named_parameters():
            zero = name.endswith((".bias", ".log_weight"))
            constant = 0 if zero else 0.05 if "ln_f" in name else 1 if "ln_" in name else None
            if constant is not None:
                assert (parameter == constant).all(), name
                continue
            centres = "lm_head" in name or (tied and "wte" in name)
            std = 0.07 if centres else 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std, name


def test_a_module_without_an_initialisation_is_an_error():
    with pytest.raises(TypeError, match="no initialisation is defined for the parameters of PReLU"):
        tiny_model()._init_weights(nn.PReLU())


def test_compiles():
    """The trunk and the logits as one graph; the loss is a break in it."""
    model = tiny_model(n_layer=1).train()
    batch = {"input_ids": IDS, "labels": IDS, "use_cache": False}

    def step(forward: Any) -> tuple[Tensor, ...]:
        loss = forward(**batch).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = step(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(step(compiled), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch, loss_only=True).loss, expected[0].detach())


# Configuration


def test_config_defaults():
    config = HGPTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (768, 12, 1024)
    assert config.padded_vocab_size == 50304 and config.exponent == pytest.approx(2 * 768**0.5)
    gains = {"harmonic": 0.05, "softmax": 1.0}
    assert {head: HGPTConfig(head=head).final_norm_gain for head in gains} == gains
    assert HGPTConfig(final_norm="none").final_norm_gain == 0.4
    assert HGPTConfig(radius="learned").head_in_words.endswith(", learned radii")
    assert HGPTConfig(vocab_size=128, pad_vocab_to_multiple_of=64).padded_vocab_size == 128


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        *((name, 0, "must be at least 1; got 0") for name in ("vocab_size", "n_positions", "pad_vocab_to_multiple_of")),
        *((name, 0.0, "must be positive; got 0.0") for name in ("layer_norm_epsilon", "initializer_range")),
        ("head", "linear", "must be one of harmonic, softmax; got 'linear'"),
        ("radius", "unigram", "must be one of none, learned; got 'unigram'"),
        ("final_norm", "rms", "must be one of layer_norm, none; got 'rms'"),
    ],
)
def test_config_errors(setting, value, message):
    """Those that a run's settings do not reach; test_settings has the others."""
    with pytest.raises(ValueError, match=f"{setting} {message}"):
        HGPTConfig(**(SIZES | {setting: value}))


@pytest.mark.parametrize(("setting", "value"), [("distance", "cosine"), ("learn_exponent", True)])
def test_settings_of_the_harmonic_head_are_refused_with_softmax(setting, value):
    with pytest.raises(ValueError, match=f"{setting} has no effect with head"):
        HGPTConfig(head="softmax", **{setting: value})
