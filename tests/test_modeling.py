"""The language model: against transformers' GPT-2, against itself without its shortcuts, and as a checkpoint."""

import inspect
import itertools
import math
import sys
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
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.utils.generic import TransformersKwargs

from hgpt import HarmonicHead, HGPTConfig, HGPTForCausalLM, HGPTModel, SoftmaxHead
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


def disturbed(model: HGPTForCausalLM) -> HGPTForCausalLM:
    """With log-weights, which start at 0, that make a difference."""
    if model.lm_head.log_weight is not None:
        nn.init.normal_(model.lm_head.log_weight, std=2)
    return model


HEADS = pytest.mark.parametrize("head", ["harmonic", "softmax"])
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


# Against GPT-2


@pytest.mark.parametrize("scale_by_layer", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_gpt2(scale_by_layer: bool, attention: str) -> None:
    both = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
    both |= {"scale_attn_by_inverse_layer_idx": scale_by_layer, "attn_implementation": attention}
    gpt2 = GPT2LMHeadModel(GPT2Config(**both, initializer_range=0.3)).eval()
    for name, parameter in gpt2.named_parameters():
        if name.endswith("bias") or "ln" in name:  # GPT-2 starts them at 0 and 1
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    ours = {"head": "softmax", "bias": True, "activation_function": "gelu_pytorch_tanh", "pad_vocab_to_multiple_of": 1}
    model = HGPTForCausalLM(HGPTConfig(**both, **ours)).eval()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed
    state = {name: t.T if name.endswith(conv1d) else t for name, t in gpt2.state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert model.config._attn_implementation == attention
    ids = tokens(3)
    torch.testing.assert_close(model(ids).logits, gpt2(ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, labels=ids).loss, gpt2(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


# Loss and labels


@HEADS
@TIED
def test_the_loss_is_the_cross_entropy_of_the_shifted_labels(head: str, tied: bool) -> None:
    """With its gradients, and with logits or without."""
    model, ids = tiny_model(head=head, tie_word_embeddings=tied).double(), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters)
    for training, options in ((False, {}), (False, {"loss_only": True}), (True, {}), (True, {"loss_only": False})):
        out = model.train(training)(ids, labels=labels, **options)
        without = options.get("loss_only", training)
        assert out.logits is None if without else torch.equal(out.logits, logits)
        assert not training or out.past_key_values is None
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(out.loss, parameters), gradients)
    torch.testing.assert_close(model(ids).logits, logits)  # without labels, logits are what was asked for
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    counted = (shifted != -100).sum()
    divided = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(divided, expected * counted / 50)


@HEADS
def test_padding_changes_no_loss_no_logits_and_no_sample(head: str) -> None:
    padded, plain = (disturbed(tiny_model(head=head, radius="learned", pad_vocab_to_multiple_of=k)) for k in (64, 1))
    state = padded.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.log_weight"):
        assert state[name].shape[0] == ROWS
        state[name] = state[name][:V]
    plain.load_state_dict(state)
    ids = tokens()
    ours, theirs = padded(ids, labels=ids), plain(ids, labels=ids)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    samples = []
    for model in (padded, plain):
        torch.manual_seed(3)
        samples.append(model.generate(ids, max_new_tokens=15, do_sample=True, temperature=3.0))
    assert torch.equal(*samples) and samples[0].max() < V


@pytest.mark.parametrize("radius", ["none", "learned"])
def test_logits_are_log_harmax_of_the_final_hidden_states(radius: str) -> None:
    model = disturbed(tiny_model(exponent="4*sqrt_dim", radius=radius))
    hidden, logits = model.transformer(tokens()).last_hidden_state, model(tokens()).logits
    d = torch.cdist(hidden, model.transformer.wte.weight[:V].expand(2, V, 32)) / model.lm_head.radii
    assert (model.lm_head.radii.std() > 0.01) == (radius == "learned")
    p = d ** -(4 * 32**0.5)
    torch.testing.assert_close(logits.softmax(-1), p / p.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)


@HEADS
def test_no_final_norm(head: str) -> None:
    """x is the last block's output times a gain, under the name of the norm's weight."""
    model, blocks = tiny_model(head=head, final_norm="none", bias=True), []
    model.transformer.h[-1].register_forward_hook(lambda *call: blocks.append(call[2][0]))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(torch.rand(32))
    hidden = model.transformer(tokens()).last_hidden_state
    assert [name for name in model.state_dict() if "ln_f" in name] == ["transformer.ln_f.weight"]
    torch.testing.assert_close(hidden, blocks[0] * model.transformer.ln_f.weight)
    assert hidden.norm(dim=-1).std() > 0.01 * hidden.norm(dim=-1).mean()
    model(tokens(), labels=tokens()).loss.backward()
    assert model.transformer.ln_f.weight.grad.abs().min() > 0


# Attention, cache, padding on the left


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


def test_every_keyword_that_transformers_passes_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyword that `forward` swallowed made every cached token wrong with transformers 5.24."""
    named = {name for module in (HGPTModel, HGPTForCausalLM) for name in inspect.signature(module.forward).parameters}
    known = named | FOR_ATTENTION | WITHOUT_EFFECT
    # What transformers documents as passed to a decoder's `forward`, beside what only mixtures of experts get.
    documented = set(TransformersKwargs.__annotations__) - {"output_router_logits"}
    assert documented | set(PagedAttentionArgs.__annotations__) <= known
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
    assert {"input_ids", CACHE, "use_cache"} <= seen <= known


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
        *({"distance": "mahalanobis", "distance_options": o} for o in ({}, {"metric": "low_rank", "rank": 4})),
    ],
    ids=str,
)
def test_generation_makes_of_the_centres_once_what_no_token_changes(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(**options), tokens()
    for parameter in model.lm_head.metric.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype)
    rows: list[int] = []  # of the centres, or of x, in each call that transforms them or computes norms

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*operands: Any) -> Any:
            rows.append(len(operands[-1]))
            return original(*operands)

        monkeypatch.setattr(owner, name, counted)

    watch(heads, "squared_norms")
    watch(sys.modules["hgpt.model.harmax"], "squared_norms")
    if model.lm_head.metric.transforms:
        watch(type(model.lm_head.metric), "forward")
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


@HEADS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch_equals_one_by_one(head: str, attention: str) -> None:
    model = tiny_model(head=head, attn_implementation=attention, pad_token_id=V - 1)
    prompts = [tokens(1, length)[0] for length in (3, 9, 6)]
    rows = [F.pad(prompt, (9 - len(prompt), 0), value=V - 1) for prompt in prompts]
    mask = torch.arange(9) >= torch.tensor([[9 - len(prompt)] for prompt in prompts])
    batch = {"input_ids": torch.stack(rows), "attention_mask": mask.long()}
    alone = [model(prompt[None]).logits[0] for prompt in prompts]
    for row, expected in zip(model(**batch).logits, alone, strict=True):
        torch.testing.assert_close(row[-len(expected) :], expected, rtol=1e-5, atol=1e-4)
    losses = [F.cross_entropy(a[:-1], p[1:], reduction="none") for a, p in zip(alone, prompts, strict=True)]
    # Nothing precedes a prompt's first token, which a position of padding would score.
    labels = batch["input_ids"].where(mask & mask.roll(1, dims=1), -100)
    torch.testing.assert_close(model(**batch, labels=labels).loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)

    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": V - 1}
    free = [model.generate(prompt[None], **settings)[0, len(prompt) :] for prompt in prompts]
    eos = free[0][4].item()  # so that one stops early and is padded
    generated = model.generate(**batch, eos_token_id=eos, **settings)[:, 9:]
    for row, prompt in zip(generated, prompts, strict=True):
        expected = model.generate(prompt[None], eos_token_id=eos, **settings)[0, len(prompt) :]
        assert torch.equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == V - 1).all()


def test_too_long_a_sequence() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"32 positions \(n_positions\), and the sequence has 33 tokens: shorten"):
        model(tokens(1, 33))
    past = model(tokens(1, 30), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sequence has 33 tokens"):
        model(tokens(1, 3), past_key_values=past)


def test_other_inputs_give_the_same_logits() -> None:
    model, ids = tiny_model(), tokens()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_packed_rows_may_be_longer_than_the_model() -> None:
    """Padding-free batches: one row, positions that start again, and in all more tokens than n_positions or fewer."""
    model = tiny_model()
    for lengths in ((5, 7), (7, 32, 5)):
        texts, positions = [tokens(1, n) for n in lengths], torch.cat([torch.arange(n) for n in lengths])[None]
        packed = model(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, torch.cat([model(text).logits for text in texts], 1), rtol=1e-5, atol=1e-4)
    for wrong in (None, torch.arange(44)[None]):
        with pytest.raises(ValueError, match="n_positions"):
            model(torch.cat(texts, 1), position_ids=wrong)


@HEADS
def test_drafting_with_the_first_blocks_changes_no_text(head: str) -> None:
    model = disturbed(tiny_model(head=head))
    plain = model.generate(tokens()[:1], max_new_tokens=8, do_sample=False)
    blocks = []
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda module, inputs, output, index=index: blocks.append(index))
    assert torch.equal(model.generate(tokens()[:1], max_new_tokens=8, do_sample=False, assistant_early_exit=1), plain)
    assert blocks.count(0) > blocks.count(1) > 0  # the draft runs block 0 alone


def test_what_takes_the_head_for_a_linear_layer_fails() -> None:
    """hidden @ lm_head.weight.T + lm_head.bias, as TRL's fused head computes, is no logit of these heads."""
    for head in (HarmonicHead(4, 3), SoftmaxHead(4, 3, rows=8), SoftmaxHead(4, 3, radius=True)):
        assert getattr(head, "bias", None) is None and not hasattr(head, "bias")
        with pytest.raises(AttributeError, match=r"no bias: its logits are not x @ weight\.T"):
            _ = head.bias
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            _ = head.other
    model = tiny_model()
    with pytest.raises(TypeError, match="HarmonicHead or a SoftmaxHead, not Linear"):
        model.set_output_embeddings(torch.nn.Linear(32, V))
    assert isinstance(model.lm_head, HarmonicHead)


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
    loss, logits, *_ = model(tokens(), labels=tokens(), return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, T, V)
    assert isinstance(model.transformer(tokens(), return_dict=False), tuple)


# Checkpoints


@HEADS
@TIED
def test_save_and_load_give_the_same_weights_and_logits(tmp_path: Path, head: str, tied: bool) -> None:
    """Also that loading randomises nothing that was loaded (transformers #46620)."""
    free = {"radius": "learned", "final_norm": "none"} if tied else {}
    model = tiny_model(head=head, tie_word_embeddings=tied, bias=True, dropout=0.1, eos_token_id=7, **free)
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
    places = {"auto_map", "_name_or_path"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in places} for c in (model.config, config))
    assert ours == theirs and config.final_norm_gain == LIVELY["final_norm_gain"]
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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(V - 1)} | {"<end>": V - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_remote_code_where_hgpt_cannot_be_imported(tmp_path: Path) -> None:
    folders = []
    free, special = {"radius": "learned", "final_norm": "none"}, {"pad_token_id": V - 1, "eos_token_id": V - 1}
    for head, settings in (("harmonic", {}), ("harmonic", free), ("softmax", free)):
        model = disturbed(tiny_model(head=head, tie_word_embeddings=head == "harmonic", **settings, **special))
        folder = tmp_path / f"modèle {len(folders)}"
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        write_expected(model, folder, tokens())
        folders.append(folder)
    assert_same_without_hgpt(folders, tmp_path)


@HEADS
@TIED
def test_resize_token_embeddings(head: str, tied: bool, tmp_path: Path) -> None:
    for new in (V + 2, 100, 40):
        learnt = {"distance": "mahalanobis", "learn_exponent": True} if head == "harmonic" else {}
        model = disturbed(tiny_model(head=head, tie_word_embeddings=tied, radius="learned", **learnt))
        if learnt:
            nn.init.normal_(model.lm_head.metric.log_scale, std=0.3)
            nn.init.constant_(model.lm_head.log_exponent, 1.5)
        a = model.lm_head.log_weight[:V].tolist()
        with torch.no_grad():  # a live graph would hold on to the old shapes
            before = model(tokens() % 40).logits
        model.lm_head.label_smoothing = 0.2
        model.resize_token_embeddings(new)
        model.post_init()  # draws no new weights
        assert model.lm_head.label_smoothing == 0.2
        assert model.config.vocab_size == model.lm_head.num_classes == new
        assert model.lm_head.weight.shape[0] == model.config.padded_vocab_size == -(-new // 64) * 64
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        after = model(tokens() % 40, labels=tokens() % 40)
        assert after.logits.shape[-1] == new
        kept = min(new, V)
        torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
        rows = model.lm_head.weight.shape[0]
        assert model.lm_head.log_weight.tolist() == a[:kept] + [min(a)] * (rows - kept)  # new tokens are rare
        after.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.save_pretrained(tmp_path / str(new))
        loaded = HGPTForCausalLM.from_pretrained(tmp_path / str(new)).eval()
        assert torch.equal(loaded(tokens() % 40).logits, after.logits)


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_new_centres_are_spread_as_the_old_ones(mean_resizing: bool) -> None:
    """Near the mean they would be near every hidden state."""
    torch.manual_seed(0)
    model = tiny_model(n_embd=32, vocab_size=1000, pad_vocab_to_multiple_of=1)
    with torch.no_grad():
        model.lm_head.weight.normal_().mul_(torch.linspace(0.1, 2, 32)).add_(3)
    old = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(9000, mean_resizing=mean_resizing)
    new = model.lm_head.weight.detach()
    assert torch.equal(new[:1000], old)
    torch.testing.assert_close(new[1000:].mean(0), old.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(new[1000:].T.cov(), old.T.cov(), rtol=0, atol=0.25)


# Training machinery


@HEADS
def test_gradient_checkpointing_changes_nothing(head: str) -> None:
    model, results = tiny_model(head=head, dropout=0.1), []
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.train()
    assert not torch.allclose(model(tokens()).logits, model(tokens()).logits)  # dropout
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model(tokens(), labels=tokens(), use_cache=True).loss  # recomputation must not find its own keys
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert model.transformer.h[0].gradient_checkpointing
    torch.testing.assert_close(*results)


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


def test_initial_weights() -> None:
    sizes = {"n_embd": 64, "n_layer": 3, "vocab_size": 1000, "initializer_range": 0.02, "bias": True}
    scales = {"final_norm_gain": 0.05, "centre_init_std": 0.07}
    for head, tied in itertools.product(("harmonic", "softmax"), (True, False)):
        free = {"radius": "learned", "final_norm": "none" if tied else "layer_norm"}
        model = HGPTForCausalLM(tiny_config(**sizes | scales | free, head=head, tie_word_embeddings=tied))
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
    trunk = HGPTModel(tiny_config(**sizes | scales))
    assert (trunk.ln_f.weight == 0.05).all()
    assert trunk.wte.weight.std().item() == pytest.approx(0.07, rel=0.05)


def test_a_module_without_an_initialisation_is_an_error() -> None:
    with pytest.raises(TypeError, match="no initialisation is defined for the parameters of PReLU"):
        tiny_model()._init_weights(nn.PReLU())


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = HGPTForCausalLM(HGPTConfig())
    # 124,439,808 parameters of GPT-2 small (nanoGPT's count), less its biases, and 47 rows of padding.
    biases = 12 * (3 + 1 + 4 + 1 + 2) * 768 + 768
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808 - biases + 47 * 768


@pytest.mark.parametrize(("head", "tied"), [("harmonic", True), ("softmax", False)])
def test_compiles(head: str, tied: bool) -> None:
    """The trunk and the logits as one graph; the loss is a break in it."""
    model = tiny_model(head=head, tie_word_embeddings=tied).train()
    batch = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}

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


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["the model", "each block", "the blocks together"])
def test_inductor_compiles(compiled: str) -> None:
    model = tiny_model().train()
    names = list(model.state_dict())
    expected = model(tokens(), labels=tokens()).loss
    torch.compiler.reset()
    blocks = model.transformer.h
    for module in {"the model": [model], "each block": blocks, "the blocks together": [blocks]}[compiled]:
        module.compile()
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert list(model.state_dict()) == names


# Configuration


def test_config_defaults() -> None:
    config = HGPTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (768, 12, 1024)
    assert config.padded_vocab_size == 50304 and config.exponent == pytest.approx(2 * 768**0.5)
    gains = {"harmonic": 0.05, "softmax": 1.0}
    assert {head: HGPTConfig(head=head).final_norm_gain for head in gains} == gains
    assert HGPTConfig(final_norm="none").final_norm_gain == 0.4
    assert HGPTConfig(radius="learned").head_in_words.endswith(", learned radii")
    assert HGPTConfig(vocab_size=128, pad_vocab_to_multiple_of=64).padded_vocab_size == 128


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        *(
            ({name: 0}, f"{name} must be at least 1; got 0")
            for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "pad_vocab_to_multiple_of")
        ),
        *(
            ({name: 0.0}, f"{name} must be positive; got 0.0")
            for name in ("layer_norm_epsilon", "initializer_range", "final_norm_gain", "centre_init_std")
        ),
        *(({"dropout": value}, rf"dropout must lie in \[0, 1\); got {value}") for value in (1.0, -0.1)),
        ({"n_head": 5}, "n_embd must be divisible by n_head = 5; got 32"),
        ({"head": "linear"}, "head must be one of harmonic, softmax; got 'linear'"),
        ({"radius": "unigram"}, "radius must be one of none, learned; got 'unigram'"),
        ({"final_norm": "rms"}, "final_norm must be one of layer_norm, none; got 'rms'"),
        ({"distance": "cosinus"}, "distance must be one of euclidean, cosine, .*; got 'cosinus'"),
        ({"exponent": 0}, "must be a positive number"),
        ({"exponent": "root"}, "got 'root'"),
        ({"activation_function": "gelo"}, "activation_function must be one that transformers knows"),
    ],
)
def test_config_errors(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**setting)
