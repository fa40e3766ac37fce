"""hgpt/decoding.py against transformers' own generate.

On a machine with a GPU a step is recorded as a CUDA graph; elsewhere each call runs it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hgpt import decoding
from hgpt.decoding import generate_captured, warpers
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NEW = 40


@pytest.fixture(autouse=True)
def _without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(decoding, "record", lambda step: step)


def make_model(**settings: Any) -> HGPTForCausalLM:
    shape = {"vocab_size": 61, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = HGPTForCausalLM(HGPTConfig(**shape, eos_token_id=None, **settings)).to(DEVICE).eval()
    for parameter in model.transformer.h.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # texts that do not repeat one token
    return model


def by_transformers(model: HGPTForCausalLM, prompt: Tensor, config: GenerationConfig, **options: Any) -> Any:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, **options)


@pytest.mark.parametrize("settings", [{}, {"radius": "learned"}, {"distance": "cosine"}, {"head": "softmax"}], ids=str)
def test_greedy_tokens_are_those_of_transformers(settings):
    """For a batch whose texts end at different places, and for one that never ends."""
    model, prompt = make_model(**settings), torch.randint(61, (3, 7), device=DEVICE)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=60)
    whole = by_transformers(model, prompt, config)
    assert torch.equal(generate_captured(model, prompt, config), whole)
    new = whole[:, 7:]
    assert len(set(new.flatten().tolist())) > 5
    config.eos_token_id = [int(new[0, 4]), int(new[1, 11])]
    assert torch.equal(generate_captured(model, prompt, config), by_transformers(model, prompt, config))
    config.eos_token_id = sorted(set(new[:, 2].tolist()))  # long before the first look at the tokens
    assert torch.equal(generate_captured(model, prompt, config), by_transformers(model, prompt, config))


@pytest.mark.parametrize(
    "limits",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2},
     {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1}],
    ids=str,
)  # fmt: skip
def test_logits_are_changed_as_by_transformers(limits):
    config = GenerationConfig(max_new_tokens=5, do_sample=True, pad_token_id=0, **({"top_k": 0} | limits))
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    prompt = torch.randint(61, (2, 7), device=DEVICE)
    found = by_transformers(make_model(), prompt, config, **options)
    for logits, scores in zip(found.logits, found.scores, strict=True):
        torch.testing.assert_close(warpers(config)(prompt, logits.clone()), scores)


def test_samples():
    """As many as asked for, different, repeatable by their seed, and out of the tokens that the limits leave."""
    model, prompt = make_model(), torch.randint(61, (1, 7), device=DEVICE)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=4, num_return_sequences=5, pad_token_id=0)
    torch.manual_seed(3)
    first = generate_captured(model, prompt, config)
    torch.manual_seed(3)
    assert torch.equal(generate_captured(model, prompt, config), first)
    assert first.shape == (5, 7 + NEW) and len({tuple(row) for row in first.tolist()}) == 5
    with torch.no_grad():
        likely = model(first).logits.topk(4).indices[:, 6:-1]
    assert (likely == first[:, 7:, None]).any(-1).all()
    config.top_k, config.num_return_sequences = 1, 1
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(generate_captured(model, prompt, config), by_transformers(model, prompt, greedy))


class Pieces(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_a_streamer_gets_what_transformers_gives_it():
    model, prompt = make_model(), torch.randint(61, (2, 7), device=DEVICE)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=60)
    new = by_transformers(model, prompt, config)[:, 7:]
    config.eos_token_id = [next(token for token in new[0, 5:].tolist() if token not in new[1, :20])]
    ours, theirs = Pieces(), Pieces()
    generate_captured(model, prompt, config, ours)
    by_transformers(model, prompt, config, streamer=theirs)
    assert ours.seen == theirs.seen
    assert ours.seen[-2][0] == 60  # the first text ended before the second one


def test_other_models_and_devices_generate_as_transformers(monkeypatch):
    model, prompt = make_model().cpu(), torch.randint(61, (1, 7))
    monkeypatch.setattr(decoding, "generate_captured", lambda *_: pytest.fail("captured on a CPU"))
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=60)
    assert torch.equal(decoding.generate(model, prompt, config), by_transformers(model, prompt, config))
