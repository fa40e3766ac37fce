"""The language model: against transformers' GPT-2, against itself without its shortcuts, and as a checkpoint."""

import inspect
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_code import WITHOUT_HGPT
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
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils.generic import TransformersKwargs

from hgpt import HGPTConfig, HGPTForCausalLM, HGPTModel
from hgpt.model import heads
from hgpt.model.modeling_hgpt import CACHE, FOR_ATTENTION, WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parent.parent

V, ROWS, T = 61, 64, 12
LIVELY = {"initializer_range": 0.3, "centre_init_std": 0.3, "final_norm_gain": 0.5}


def tiny_config(**kwargs: Any) -> HGPTConfig:
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return HGPTConfig(**(sizes | LIVELY | kwargs))


def tiny_model(**kwargs: Any) -> HGPTForCausalLM:
    """Weights large enough that logits differ clearly from token to token and from position to position."""
    torch.manual_seed(0)
    return HGPTForCausalLM(tiny_config(**kwargs)).eval()


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


HEADS = pytest.mark.parametrize("head", ["harmonic", "softmax"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


# Against GPT-2 and nanoGPT


@pytest.mark.parametrize("scale_by_layer", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_gpt2(scale_by_layer: bool, attention: str) -> None:
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            **sizes,
            initializer_range=0.3,
            scale_attn_by_inverse_layer_idx=scale_by_layer,
            attn_implementation=attention,
        )
    ).eval()
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias") or "ln" in name:  # GPT-2 starts them at 0 and 1
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    model = HGPTForCausalLM(
        HGPTConfig(
            **sizes,
            head="softmax",
            bias=True,
            activation_function="gelu_pytorch_tanh",
            pad_vocab_to_multiple_of=1,
            scale_attn_by_inverse_layer_idx=scale_by_layer,
            attn_implementation=attention,
        )
    ).eval()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed
    state = {name: t.T if name.endswith(conv1d) else t for name, t in gpt2.state_dict().items()}
    model.load_state_dict(state, strict=True)
    ids = tokens(3)
    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, labels=ids).loss, gpt2(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_state_dict_loads(bias: bool) -> None:
    """Names and shapes as in nanoGPT's model.py."""
    D = 32
    linears = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (ROWS, D), "transformer.wpe.weight": (32, D)}
    for layer in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes[f"transformer.h.{layer}.{norm}.weight"] = (D,)
        for name, shape in linears.items():
            shapes[f"transformer.h.{layer}.{name}.weight"] = shape
    shapes["transformer.ln_f.weight"] = (D,)
    if bias:
        shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items() if ".h." in name}
        shapes["transformer.ln_f.bias"] = (D,)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    model = tiny_model(bias=bias)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


# Loss and labels


@HEADS
@TIED
def test_labels_are_shifted_inside(head: str, tied: bool) -> None:
    model = tiny_model(head=head, tie_word_embeddings=tied)
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    assert out.logits.shape == (2, T, V) and out.logits.dtype == torch.float32
    expected = F.cross_entropy(out.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    counted = (shifted != -100).sum()
    torch.testing.assert_close(
        model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, expected * counted / 50
    )


@HEADS
def test_training_computes_no_logits_and_the_same_loss(head: str) -> None:
    model = tiny_model(head=head)
    ids = tokens()
    evaluated = model(ids, labels=ids)
    assert evaluated.logits is not None
    only = model(ids, labels=ids, loss_only=True)
    assert only.logits is None and torch.equal(only.loss, evaluated.loss)
    model.train()
    trained = model(ids, labels=ids)
    assert trained.logits is None and trained.past_key_values is None
    torch.testing.assert_close(trained.loss, evaluated.loss)
    assert model(ids, labels=ids, loss_only=False).logits is not None
    assert model(ids).logits is not None  # without labels, logits are what was asked for


@HEADS
def test_gradients_are_those_of_cross_entropy_on_the_logits(head: str) -> None:
    model = tiny_model(head=head).double()
    ids = tokens()
    model(ids, labels=ids, loss_only=True).loss.backward()
    fused = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(ids).logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, msg=name)


@HEADS
def test_padding_changes_no_loss_no_logits_and_no_sample(head: str) -> None:
    padded, plain = tiny_model(head=head), tiny_model(head=head, pad_vocab_to_multiple_of=1)
    state = padded.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert state[name].shape[0] == ROWS
        state[name] = state[name][:V]
    plain.load_state_dict(state)
    ids = tokens()
    for batch in ({"input_ids": ids}, {"input_ids": ids, "labels": ids}):
        ours, theirs = padded(**batch), plain(**batch)
        torch.testing.assert_close(ours.logits, theirs.logits)
        if "labels" in batch:
            torch.testing.assert_close(ours.loss, theirs.loss)
    samples = []
    for model in (padded, plain):
        torch.manual_seed(3)
        samples.append(model.generate(ids, max_new_tokens=15, do_sample=True, temperature=3.0))
    assert torch.equal(*samples) and samples[0].max() < V


def test_logits_are_log_harmax_of_the_final_hidden_states() -> None:
    model = tiny_model(exponent="4*sqrt_dim")
    hidden = model.transformer(tokens()).last_hidden_state
    d = torch.cdist(hidden, model.transformer.wte.weight[:V].expand(2, V, 32))
    p = d ** -(4 * 32**0.5)
    torch.testing.assert_close(model(tokens()).logits.softmax(-1), p / p.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)


def test_temperature_is_the_exponent_over_t() -> None:
    model, cooler = tiny_model(exponent=12.0), tiny_model(exponent=8.0)
    torch.testing.assert_close((model(tokens()).logits / 1.5).softmax(-1), cooler(tokens()).logits.softmax(-1))


def test_logits_to_keep() -> None:
    model = tiny_model()
    logits = model(tokens()).logits
    torch.testing.assert_close(model(tokens(), logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(tokens(), logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


# Attention, cache, padding on the left


@pytest.mark.parametrize("scale_by_layer", [False, True])
def test_sdpa_equals_eager(scale_by_layer: bool) -> None:
    results = []
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :5] = 0
    for attention in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=attention, scale_attn_by_inverse_layer_idx=scale_by_layer)
        assert model.config._attn_implementation == attention
        results.append((model(tokens()).logits, model(tokens(), attention_mask=mask).logits[mask.bool()]))
    for sdpa, eager in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, eager, rtol=1e-5, atol=1e-4)


def test_a_token_sees_no_later_token() -> None:
    model, ids = tiny_model(), tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cache_equals_no_cache(name: str) -> None:
    """By both names of the cache: transformers 5.24 says `cache`, earlier versions `past_key_values`."""
    model, ids = tiny_model(), tokens()
    whole = model(ids).logits
    hidden = model.transformer(ids).last_hidden_state
    past, trunk_past, steps, trunk_steps = None, None, [], []
    for piece in ids.split([5, 1, 1, 3, 2], dim=1):
        out = model(piece, use_cache=True, **{name: past})
        past, steps = out[CACHE], [*steps, out.logits]
        trunk = model.transformer(piece, use_cache=True, **{name: trunk_past})
        trunk_past, trunk_steps = trunk[CACHE], [*trunk_steps, trunk.last_hidden_state]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.cat(trunk_steps, 1), hidden, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="pass one of them"):
        model(ids, past_key_values=past, cache=past)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, expected)
    beams = model.generate(ids, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **settings))
    assert model(ids, use_cache=False).get(CACHE) is None


# What transformers documents as passed to a decoder's `forward`, beside what a model of text never gets.
PASSED = set(TransformersKwargs.__annotations__) - {"output_router_logits"}  # mixtures of experts only


def known_keywords() -> set[str]:
    return set(inspect.signature(HGPTForCausalLM.forward).parameters) | FOR_ATTENTION | WITHOUT_EFFECT


def test_every_keyword_that_transformers_passes_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyword that `forward` swallowed made every cached token wrong with transformers 5.24."""
    named = set(inspect.signature(HGPTModel.forward).parameters)
    assert set(PASSED) | set(PagedAttentionArgs.__annotations__) <= known_keywords() | named
    seen: set[str] = set()
    forward = HGPTForCausalLM.forward

    def watched(self: HGPTForCausalLM, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return forward(self, *args, **kwargs)

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # which `generate` reads
    monkeypatch.setattr(HGPTForCausalLM, "forward", watched)
    model, ids = tiny_model(), tokens()
    for options in ({}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}):
        one = ids[:1] if "prompt_lookup_num_tokens" in options else ids
        model.generate(one, max_new_tokens=4, **options)
    assert {"input_ids", CACHE, "use_cache"} <= seen
    assert seen <= known_keywords() | named


@pytest.mark.parametrize("keyword", ["token_type_ids", "encoder_hidden_states", "head_mask", "cache_params", "labelz"])
def test_a_keyword_that_would_change_the_result_is_refused(keyword: str) -> None:
    model, ids = tiny_model(), tokens()
    for module in (model, model.transformer):
        with pytest.raises(TypeError, match=keyword):
            module(ids, **{keyword: ids})
        module(ids, **{keyword: None})  # that is: not given
    with pytest.raises(ValueError, match="is_causal"):
        model(ids, is_causal=False)
    torch.testing.assert_close(model(ids, is_causal=True, cache_position=torch.arange(T)).logits, model(ids).logits)


@pytest.mark.slow
def test_continuous_batching_equals_one_by_one() -> None:
    model = tiny_model(eos_token_id=V - 1)
    prompts = [tokens(1, length)[0].tolist() for length in (5, 9, 3)]
    settings = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in prompts]
    config = GenerationConfig(**settings, eos_token_id=V - 1, pad_token_id=0)
    together = model.generate_batch(prompts, generation_config=config)
    assert [request.generated_tokens for request in together.values()] == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "cosine"},
        {"distance": "mahalanobis"},
        {"distance": "mahalanobis", "distance_options": {"metric": "low_rank", "rank": 4}},
        {"distance": "mahalanobis", "distance_options": {"metric": "full"}},
    ],
    ids=["euclidean", "cosine", "diagonal", "low_rank", "full"],
)
def test_generation_makes_of_the_centres_once_what_no_token_changes(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(**options), tokens()
    for parameter in model.lm_head.metric.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype)
    rows: list[int] = []  # of w in each call that makes something of them
    norms, forward = heads.squared_norms, type(model.lm_head.metric).forward

    def counted_norms(w: Tensor) -> Tensor:
        rows.append(len(w))
        return norms(w)

    def counted_forward(metric: nn.Module, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(w))
        return forward(metric, x, w)

    monkeypatch.setattr(heads, "squared_norms", counted_norms)
    monkeypatch.setattr(sys.modules["hgpt.model.harmax"], "squared_norms", counted_norms)
    if model.lm_head.metric.transforms:
        monkeypatch.setattr(type(model.lm_head.metric), "forward", counted_forward)
    for _ in range(2):
        expected = ids
        with torch.no_grad():
            for _ in range(8):  # a token at a time, everything made again for each
                expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
        rows.clear()
        found = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences, expected)
        assert rows.count(ROWS) == (2 if options else 1)
        with torch.no_grad():
            torch.testing.assert_close(found.logits[-1], model(expected[:, :-1]).logits[:, -1], rtol=0, atol=0.05)
        model.lm_head.weight.data.mul_(torch.linspace(0.5, 1.5, ROWS)[:, None].to(dtype))  # seen by no version counter


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.stack([F.pad(prompt, (length - len(prompt), 0), value=V - 1) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@HEADS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_equals_one_by_one(head: str, attention: str) -> None:
    model = tiny_model(head=head, attn_implementation=attention, pad_token_id=V - 1)
    prompts = [tokens(1, length)[0] for length in (3, 9, 6)]
    batch = left_padded(prompts)
    logits = model(**batch).logits
    alone = [model(prompt[None]).logits[0] for prompt in prompts]
    for row, expected in zip(logits, alone, strict=True):
        torch.testing.assert_close(row[-len(expected) :], expected, rtol=1e-5, atol=1e-4)
    labels = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    expected_loss = torch.cat(
        [F.cross_entropy(a[:-1], p[1:], reduction="none") for a, p in zip(alone, prompts, strict=True)]
    ).mean()
    # Each prompt's first token is scored from a padding position: drop it, as nothing precedes it.
    labels[torch.arange(3), [len(row) - len(p) for row, p in zip(labels, prompts, strict=True)]] = -100
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected_loss, rtol=1e-5, atol=1e-5)

    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": V - 1}
    free = [model.generate(prompt[None], **settings)[0, len(prompt) :] for prompt in prompts]
    eos = free[0][4].item()  # so that one stops early and is padded
    generated = model.generate(**batch, eos_token_id=eos, **settings)[:, 9:]
    for row, prompt in zip(generated, prompts, strict=True):
        expected = model.generate(prompt[None], eos_token_id=eos, **settings)[0, len(prompt) :]
        assert torch.equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == V - 1).all()


def test_packed_sequences_by_position_ids() -> None:
    """Positions that start again without a mask separate documents, as elsewhere in transformers."""
    model, ids = tiny_model(), tokens(1)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    parts = [model(ids[:, :5]).logits, model(ids[:, 5:]).logits]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-5, atol=1e-4)


def test_too_long_a_sequence() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"32 positions \(n_positions\), and the sequence has 33 tokens: shorten"):
        model(tokens(1, 33))
    past = model(tokens(1, 30), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sequence has 33 tokens"):
        model(tokens(1, 3), past_key_values=past)


def test_inputs_embeds_and_their_errors() -> None:
    model, ids = tiny_model(), tokens()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_optional_outputs() -> None:
    model = tiny_model(attn_implementation="eager")
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and all(h.shape == (2, T, 32) for h in out.hidden_states)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    embedded = model.transformer.wte(tokens()) + model.transformer.wpe.weight[:T]
    torch.testing.assert_close(out.hidden_states[0], embedded)
    assert len(out.attentions) == 2
    for weights in out.attentions:
        assert weights.shape == (2, 4, T, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T))
        assert (weights.triu(1) == 0).all()
    out = model(tokens())
    assert out.hidden_states is None and out.attentions is None
    as_tuple = model(tokens(), labels=tokens(), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0 and as_tuple[1].shape == (2, T, V)
    assert isinstance(model.transformer(tokens(), return_dict=False), tuple)


# Generation


@HEADS
def test_beam_search_finds_the_best_of_all_continuations(head: str) -> None:
    model, ids = tiny_model(head=head), tokens(1, 5)
    beams = model.generate(ids, num_beams=V, max_new_tokens=2, do_sample=False, length_penalty=0.0)
    first = model(ids).logits[0, -1].log_softmax(-1)  # (V,)
    every = torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], dim=1)
    total = first[:, None] + model(every).logits[:, -1].log_softmax(-1)  # (V, V)
    best = total.flatten().argmax().item()
    assert beams[0, 5:].tolist() == [best // V, best % V]


def test_filters_keep_what_they_say() -> None:
    model, ids = tiny_model(), tokens(1, 5).expand(200, -1)
    probs = model(ids[:1]).logits[0, -1].softmax(-1)
    ranked, order = probs.sort(descending=True)
    nucleus = (ranked.cumsum(0) - ranked < 0.7).sum().item()
    kept = {"top_k": (5, 5), "top_p": (0.7, nucleus), "min_p": (0.3, (ranked >= 0.3 * ranked[0]).sum().item())}
    for name, (value, count) in kept.items():
        assert 1 < count < V
        settings = {"top_k": 0, "top_p": 1.0} | {name: value}
        drawn = model.generate(ids, max_new_tokens=1, do_sample=True, **settings)[:, -1]
        assert set(drawn.tolist()) <= set(order[:count].tolist()), name
        assert len(set(drawn.tolist())) > 1, name


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(V - 1)} | {"<end>": V - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_text_generation_pipeline() -> None:
    model = tiny_model(pad_token_id=V - 1, eos_token_id=V - 1)
    generator = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8"]
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False} | options
        batched = generator(prompts, batch_size=2, **settings)
        alone = [generator(prompt, **settings) for prompt in prompts]
        assert batched == alone
        assert len(alone[0][0]["generated_text"].split()) <= 5


# Checkpoints


@HEADS
@TIED
def test_save_and_load_give_the_same_weights_and_logits(tmp_path: Path, head: str, tied: bool) -> None:
    """Also that loading randomises nothing that was loaded (transformers #46620)."""
    model = tiny_model(head=head, tie_word_embeddings=tied, bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    expected = model(tokens()).logits
    for load in (HGPTForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path).eval()
        assert type(loaded) is HGPTForCausalLM
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(loaded(tokens()).logits, expected)
    trunk = AutoModel.from_pretrained(tmp_path).eval()
    assert type(trunk) is HGPTModel
    hidden = model.transformer(tokens()).last_hidden_state
    assert torch.equal(trunk(tokens()).last_hidden_state, hidden)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HGPTConfig
    assert config.exponent == model.config.exponent and config.final_norm_gain == LIVELY["final_norm_gain"]
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"transformers{config.transformers_tested}" in requirements


def test_only_missing_weights_are_initialised(tmp_path: Path) -> None:
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
    for name, value in state.items():
        assert torch.equal(loaded.state_dict()[name], value), name


REMOTE = (
    WITHOUT_HGPT
    + """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

for folder in sys.argv[1:]:
    expected = torch.load(f"{folder}/expected.pt", weights_only=True)
    trusted = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trusted)
    assert type(config).__module__.startswith("transformers_modules.")
    model = AutoModelForCausalLM.from_pretrained(folder, **trusted).eval()
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    assert torch.equal(model(expected["ids"], labels=expected["ids"]).loss, expected["loss"])
    trunk = AutoModel.from_pretrained(folder, **trusted).eval()
    assert torch.equal(trunk(expected["ids"]).last_hidden_state, expected["hidden"])
    for use_cache in (True, False):
        generated = model.generate(expected["ids"], max_new_tokens=8, do_sample=False, use_cache=use_cache)
        assert torch.equal(generated, expected["generated"])
    beams = model.generate(expected["ids"], max_new_tokens=8, do_sample=False, num_beams=3)
    assert torch.equal(beams, expected["beams"])
    model.save_pretrained(f"{folder}/again")  # and on from there
    again = AutoModelForCausalLM.from_pretrained(f"{folder}/again", **trusted).eval()
    assert torch.equal(again(expected["ids"]).logits, expected["logits"])
    AutoModel.from_pretrained(f"{folder}/again", **trusted)
    generator = pipeline("text-generation", model=folder, device="cpu", **trusted)
    assert generator("w1 w2", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("w1 w2")
assert not any(name.split(".")[0] == "hgpt" for name in sys.modules)
print("loaded without hgpt")
"""
)


def test_remote_code_where_hgpt_cannot_be_imported(tmp_path: Path) -> None:
    folders = []
    for head, tied in (("harmonic", True), ("softmax", False)):
        model = tiny_model(head=head, tie_word_embeddings=tied, pad_token_id=V - 1, eos_token_id=V - 1)
        folder = tmp_path / f"{head}_model"
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        ids = tokens()
        greedy = {"max_new_tokens": 8, "do_sample": False}
        expected = {
            "ids": ids,
            "logits": model(ids).logits.detach(),
            "loss": model(ids, labels=ids).loss.detach(),
            "hidden": model.transformer(ids).last_hidden_state.detach(),
            "generated": model.generate(ids, **greedy),
            "beams": model.generate(ids, num_beams=3, **greedy),
        }
        torch.save(expected, folder / "expected.pt")
        folders.append(str(folder))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hub")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, *folders],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "loaded without hgpt" in done.stdout


@HEADS
@TIED
def test_resize_token_embeddings(head: str, tied: bool, tmp_path: Path) -> None:
    for new in (V + 2, 100, 40):
        model = tiny_model(head=head, tie_word_embeddings=tied)
        with torch.no_grad():  # a live graph would hold on to the old shapes
            before = model(tokens() % 40).logits
        model.resize_token_embeddings(new)
        assert model.config.vocab_size == model.lm_head.num_classes == new
        assert model.lm_head.weight.shape[0] == model.config.padded_vocab_size == -(-new // 64) * 64
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        after = model(tokens() % 40, labels=tokens() % 40)
        assert after.logits.shape[-1] == new
        kept = min(new, V)
        torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
        after.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.save_pretrained(tmp_path / str(new))
        loaded = HGPTForCausalLM.from_pretrained(tmp_path / str(new)).eval()
        assert torch.equal(loaded(tokens() % 40).logits, after.logits)


# Training machinery


@HEADS
def test_gradient_checkpointing_changes_nothing(head: str) -> None:
    model = tiny_model(head=head, dropout=0.1).train()
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(tokens(), labels=tokens(), use_cache=True).loss  # recomputation must not find its own keys
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert model.transformer.h[0].gradient_checkpointing
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@HEADS
def test_transformers_trainer_trains_and_evaluates(head: str, tmp_path: Path) -> None:
    model = tiny_model(head=head)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    before = model(tokens(8), labels=tokens(8)).loss.item()
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 20}
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings, **batch)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_dropout_is_on_in_training_only() -> None:
    model = tiny_model(dropout=0.5)
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.train()
    assert not torch.allclose(model(tokens()).logits, model(tokens()).logits)


def test_bfloat16_autocast() -> None:
    model, ids = tiny_model(**LIVELY | {"initializer_range": 0.05}), tokens()
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=2e-2, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initial_weights() -> None:
    sizes = {"n_embd": 64, "n_layer": 3, "vocab_size": 1000, "initializer_range": 0.02, "bias": True}
    scales = {"final_norm_gain": 0.05, "centre_init_std": 0.07}
    for tied in (True, False):
        for head in ("harmonic", "softmax"):
            model = HGPTForCausalLM(tiny_config(**sizes | scales, head=head, tie_word_embeddings=tied))
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    assert (parameter == 0).all(), name
                elif "ln_f" in name:
                    assert (parameter == 0.05).all(), name
                elif "ln_" in name:
                    assert (parameter == 1).all(), name
                else:
                    if "lm_head" in name or (tied and "wte" in name):
                        std = 0.07
                    else:
                        std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
                    assert parameter.std().item() == pytest.approx(std, rel=0.05), name
                    assert abs(parameter.mean().item()) < 0.1 * std, name
    trunk = HGPTModel(tiny_config(**sizes | scales))
    assert (trunk.ln_f.weight == 0.05).all()
    assert trunk.wte.weight.std().item() == pytest.approx(0.07, rel=0.05)


def test_a_module_without_an_initialisation_is_an_error() -> None:
    with pytest.raises(TypeError, match="no initialisation is defined for the parameters of PReLU"):
        tiny_model()._init_weights(nn.PReLU())


def test_same_seed_same_weights() -> None:
    for one, other in zip(tiny_model().parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(one, other)


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = HGPTForCausalLM(HGPTConfig())
    # 124,439,808 parameters of GPT-2 small (nanoGPT's count), less its biases, and 47 rows of padding.
    biases = 12 * (3 + 1 + 4 + 1 + 2) * 768 + 768
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808 - biases + 47 * 768


@HEADS
@TIED
def test_compiles(head: str, tied: bool) -> None:
    """The trunk and the logits as one graph; the loss is a break in it."""
    model = tiny_model(head=head, tie_word_embeddings=tied).train()
    expected = model(tokens(), labels=tokens()).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens(), labels=tokens(), loss_only=True, use_cache=False).loss, expected.detach()
        )


@pytest.mark.slow
def test_inductor_compiles_the_whole_model() -> None:
    model = tiny_model().train()
    expected = model(tokens(), labels=tokens()).loss
    torch.compiler.reset()
    loss = torch.compile(model)(tokens(), labels=tokens(), use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()


@HEADS
def test_label_smoothing_never_touches_evaluation(head: str) -> None:
    model = tiny_model(head=head)
    plain = model(tokens(), labels=tokens())
    model.lm_head.label_smoothing = 0.2
    smoothed = model.train()(tokens(), labels=tokens()).loss
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(smoothed, expected)
    again = model.eval()(tokens(), labels=tokens())
    assert torch.equal(again.loss, plain.loss) and torch.equal(again.logits, plain.logits)
    model.resize_token_embeddings(V + 3)
    assert model.lm_head.label_smoothing == 0.2


@pytest.mark.slow
def test_compiling_blocks_in_place_keeps_the_names() -> None:
    model = tiny_model().train()
    names = list(model.state_dict())
    expected = model(tokens(), labels=tokens()).loss
    for block in model.transformer.h:
        block.compile()
    loss = model(tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert list(model.state_dict()) == names and not any("_orig_mod" in name for name in names)


# Configuration


def test_config_round_trip(tmp_path: Path) -> None:
    config = tiny_config(exponent="2*sqrt_dim", bias=True, dropout=0.1, tie_word_embeddings=False, eos_token_id=7)
    assert config.exponent == pytest.approx(2 * 32**0.5)
    config.save_pretrained(tmp_path)
    loaded = HGPTConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in ours.items() if k != "auto_map"} == {k: v for k, v in theirs.items() if k != "auto_map"}
    assert loaded.hidden_size == 32 and loaded.num_hidden_layers == 2 and loaded.max_position_embeddings == 32


def test_config_defaults() -> None:
    config = HGPTConfig()
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (12, 12, 768, 1024)
    assert config.padded_vocab_size == 50304 and config.exponent == pytest.approx(2 * 768**0.5)
    assert config.final_norm_gain == 0.05 and config.tie_word_embeddings
    assert HGPTConfig(head="softmax").final_norm_gain == 1.0
    assert HGPTConfig(vocab_size=128, pad_vocab_to_multiple_of=64).padded_vocab_size == 128


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1; got 0"),
        ({"n_positions": 0}, "n_positions must be at least 1; got 0"),
        ({"n_embd": 0}, "n_embd must be at least 1; got 0"),
        ({"n_layer": -1}, "n_layer must be at least 1; got -1"),
        ({"n_head": 0}, "n_head must be at least 1; got 0"),
        ({"pad_vocab_to_multiple_of": 0}, "pad_vocab_to_multiple_of must be at least 1; got 0"),
        ({"n_head": 5}, "n_embd must be divisible by n_head = 5; got 32"),
        ({"head": "linear"}, "head must be one of harmonic, softmax; got 'linear'"),
        ({"distance": "cosinus"}, "distance must be one of euclidean, cosine, .*; got 'cosinus'"),
        ({"exponent": 0}, "must be a positive number"),
        ({"exponent": "root"}, "got 'root'"),
        ({"activation_function": "gelo"}, "activation_function must be one that transformers knows"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\); got -0.1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be positive; got 0.0"),
        ({"initializer_range": -1.0}, "initializer_range must be positive; got -1.0"),
        ({"final_norm_gain": 0.0}, "final_norm_gain must be positive; got 0.0"),
        ({"centre_init_std": 0.0}, "centre_init_std must be positive; got 0.0"),
    ],
)
def test_config_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**setting)
