"""Generation on a GPU with one CUDA graph a token.

A small model's step is hundreds of short kernels, and launching them one by one takes several times as long as running
them. `generate` of transformers launches them; `generate_captured` records one step, from the last token to the next
one, and replays it.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache
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

EAGER_STEPS = 3  # before the step is recorded: libraries choose kernels and allocate on their first calls
CHECK_EVERY = 16  # steps between two looks at whether every text has ended: a look is a sync


def can_capture(model: torch.nn.Module, new_tokens: int) -> bool:
    """Whether `generate_captured` serves the model, on its device, and saves time."""
    return isinstance(model, HGPTForCausalLM) and model.device.type == "cuda" and new_tokens > 2 * EAGER_STEPS


def warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What changes the logits before sampling, in the order of transformers' `generate`."""
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

    Returns:
        (B · num_return_sequences, T + new), new ≤ max_new_tokens, filled with pad_token_id after an end of text. The
        tokens are those of `generate` if it is greedy; sampled ones differ, because a graph draws other random numbers.
    """
    prompt, new = prompt.repeat_interleave(config.num_return_sequences or 1, dim=0), config.max_new_tokens
    ends = torch.tensor(config.eos_token_id or model.generation_config.eos_token_id or [], device=prompt.device)
    step = _Step(model, prompt, new, config)
    if streamer is not None:
        streamer.put(prompt.cpu())
    head = model.lm_head
    with head.unchanged_centres() if isinstance(head, HarmonicHead) else nullcontext():
        for count in range(1, new + 1):
            step()
            if streamer is not None:
                streamer.put(step.token[:, 0].cpu())
            if (streamer is not None or count % CHECK_EVERY == 0) and bool(
                torch.isin(step.tokens[:, :count], ends).any(1).all()
            ):
                break
    if streamer is not None:
        streamer.end()
    found = step.tokens[:, :count]
    is_end = torch.isin(found, ends).long()
    after = is_end.cumsum(1) > is_end  # behind the first end of text
    length = int((~after).sum(1).max())
    return torch.cat((prompt, found.masked_fill(after, config.pad_token_id)[:, :length]), dim=1)


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
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.calls == 0:
            self._append(self.prompt)
        elif self.calls < EAGER_STEPS:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._append(self.token)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # records the step without running it
                    self._append(self.token)
            self.graph.replay()
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
