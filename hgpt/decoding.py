"""Generation on a GPU with one CUDA graph a token.

A small model's step is hundreds of short kernels; launching them one by one, as transformers' `generate` does, takes
several times as long as running them. `generate_captured` records the step from one token to the next, and replays it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from hgpt.model.heads import HarmonicHead
from hgpt.model.modeling_hgpt import HGPTForCausalLM

EAGER_STEPS = 3  # before recording: libraries choose kernels and allocate on their first calls
CHECK_EVERY = 16  # steps between two checks whether every text has ended: a check is a sync


def generate(
    model: PreTrainedModel, prompt: Tensor, config: GenerationConfig, streamer: BaseStreamer | None = None
) -> Tensor:
    """Prompts (B, T) without padding, and new tokens: by `generate_captured` if possible, else `model.generate`."""
    if captures(model) and config.max_new_tokens > 2 * EAGER_STEPS:
        return generate_captured(model, prompt, config, streamer)
    plain: Any = model
    mask = torch.ones_like(prompt)
    return plain.generate(prompt, attention_mask=mask, generation_config=config, streamer=streamer)


def captures(model: PreTrainedModel) -> TypeGuard[HGPTForCausalLM]:
    """Whether `generate_captured` works for this model on its device."""
    return type(model) is HGPTForCausalLM and model.device.type == "cuda"


def warpers(config: GenerationConfig) -> LogitsProcessorList:
    """The processors that change the logits before sampling, in the order of transformers' `generate`."""
    found = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p))
    return found


@torch.inference_mode()
def generate_captured(
    model: HGPTForCausalLM, prompt: Tensor, config: GenerationConfig, streamer: BaseStreamer | None = None
) -> Tensor:
    """As `model.generate(prompt, generation_config=config, streamer=streamer)`, for prompts (B, T) without padding.

    Args:
        config: max_new_tokens and pad_token_id are required; temperature, top_k, top_p, min_p, do_sample,
            num_return_sequences and eos_token_id have an effect, other fields have none.

    Returns:
        (B · num_return_sequences, T + new), new ≤ max_new_tokens, filled with pad_token_id after an end of text. Greedy
        tokens are those of `generate`; sampled ones differ, because a graph draws other random numbers.
    """
    prompt, new = prompt.repeat_interleave(config.num_return_sequences or 1, dim=0), config.max_new_tokens
    ends = torch.tensor(config.eos_token_id or model.generation_config.eos_token_id or [], dtype=torch.int64)
    ends = ends.to(prompt.device)
    step = _Step(model, prompt, new, config)
    if streamer is not None:
        streamer.put(prompt.cpu())
    head = model.lm_head
    with head.unchanged_centres() if isinstance(head, HarmonicHead) else nullcontext():
        for count in range(1, new + 1):
            step()
            if streamer is not None or count % CHECK_EVERY == 0 or count == new:
                found, ended = _padded(step.tokens[:, :count], ends, config.pad_token_id)
                if streamer is not None:
                    streamer.put(found[:, -1].cpu())
                if bool(ended.all()):
                    break
    if streamer is not None:
        streamer.end()
    if bool(ended.all()):
        found = found[:, : 1 + int(torch.isin(step.tokens[:, :count], ends).int().argmax(1).max())]
    return torch.cat((prompt, found), dim=1)


def _padded(tokens: Tensor, ends: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """`tokens` (B, T) with `pad` after the first end of each text, and whether each text has ended, (B,)."""
    is_end = torch.isin(tokens, ends)
    after = is_end.long().cumsum(1) > is_end.long()
    return tokens.masked_fill(after, pad), is_end.any(1)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record `step` as a CUDA graph, without running it; returns a function that replays the graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Step:
    """One step of generation for a batch: the first call reads the prompt, and each call appends to `tokens` (B, new).

    The first calls launch their kernels; then the step is recorded, and later calls replay it.
    """

    def __init__(self, model: HGPTForCausalLM, prompt: Tensor, new: int, config: GenerationConfig) -> None:
        self.model, self.prompt, self.config, self.warpers = model, prompt, config, warpers(config)
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new)
        self.tokens = prompt.new_zeros(len(prompt), new)
        self.token = prompt.new_zeros(len(prompt), 1)
        self.position = prompt.new_zeros(1)  # of the next token in `tokens`
        self.calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.calls == 0:
            self._append(self.prompt)
        elif self.calls < EAGER_STEPS:
            self._append(self.token)
        else:
            if self.replay is None:
                self.replay = record(lambda: self._append(self.token))
            self.replay()
        self.calls += 1

    def _append(self, inputs: Tensor) -> None:
        """Read `inputs`, (B, T), and write the next token."""
        output = self.model(inputs, self.cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1]
        if self.config.do_sample:
            ids: Any = inputs
            probabilities = self.warpers(ids, logits).softmax(-1)
            token = torch.multinomial(probabilities, 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        self.token.copy_(token)
        self.tokens.index_copy_(1, self.position, token)
        self.position += 1
