"""Tokens per second of generation, with the key-value cache and without, and the head's share of the time.

    python -m benchmarks.sampling                                   GPT-2 small, random weights, on the CPU
    python -m benchmarks.sampling --device cuda --dtype bfloat16
    python -m benchmarks.sampling --layers 4 --heads 4 --dim 128 --vocab 2048      the quickstart's model

Both ways sample the same number of tokens from the whole distribution. "with cache", as in `sample.py`: transformers'
`generate`, on a GPU `hgpt.decoding`. "without" runs the model on the whole text for each token, as nanoGPT's `generate`
does. Heads and ways take turns, so that other programs on the machine slow down all of them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.head_loss import synchronize
from hgpt import cli, decoding
from hgpt.hardware import device_name
from hgpt.model.configuration_hgpt import HEADS, HGPTConfig
from hgpt.model.heads import HarmonicHead
from hgpt.model.modeling_hgpt import HGPTForCausalLM

Generate = Callable[[HGPTForCausalLM, Tensor, int], Tensor]


@torch.no_grad()
def with_cache(model: HGPTForCausalLM, prompt: Tensor, count: int) -> Tensor:
    # Without a top_k transformers takes 50; the models have no end of text.
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=count, pad_token_id=0)
    return decoding.generate(model, prompt, config)


@torch.no_grad()
def without_cache(model: HGPTForCausalLM, prompt: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
        prompt = torch.cat((prompt, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return prompt


def now(device: torch.device) -> float:
    synchronize(device.type)
    return time.perf_counter()


def seconds(generate: Generate, model: HGPTForCausalLM, prompt: Tensor, count: int) -> float:
    start = now(prompt.device)
    text = generate(model, prompt, count)
    assert text.shape == (len(prompt), prompt.shape[1] + count)
    return now(prompt.device) - start


def share_of_head(model: HGPTForCausalLM, prompt: Tensor, count: int) -> float:
    """The head's share of the time with the cache."""
    if decoding.captures(model):
        return seconds_of_head(model, len(prompt)) * count / seconds(with_cache, model, prompt, count)
    times: list[float] = []
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda *_: times.append(-now(prompt.device))),
        model.lm_head.register_forward_hook(lambda *_: times.append(now(prompt.device))),
    ]
    whole = seconds(with_cache, model, prompt, count)
    for hook in hooks:
        hook.remove()
    return sum(times) / whole


@torch.inference_mode()
def seconds_of_head(model: HGPTForCausalLM, batch: int, calls: int = 200) -> float:
    """One call of the head for a token of each text, in a CUDA graph as in `generate_captured`."""
    hidden = torch.randn(batch, 1, model.config.n_embd, device=model.device, dtype=model.dtype)
    with model.lm_head.unchanged_centres() if isinstance(model.lm_head, HarmonicHead) else nullcontext():
        model.lm_head(hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                model.lm_head(hidden)
        graph.replay()
        start = now(model.device)
        graph.replay()
        return (now(model.device) - start) / calls


class Row(NamedTuple):
    """Medians of a head and a batch size; `uncached` and `ratio` (cached to uncached) are None if not measured."""

    head: str
    batch: int
    cached: float  # tokens/s
    uncached: float | None
    ratio: float | None
    share: float  # of the head, with the cache


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """One row for each head and batch size."""
    torch.manual_seed(0)
    device, new = torch.device(options.device), options.new_tokens
    models = {}
    for head in HEADS:
        config = HGPTConfig(
            vocab_size=options.vocab, n_positions=options.prompt + new, n_layer=options.layers, n_head=options.heads,
            n_embd=options.dim, head=head, eos_token_id=None,
        )  # fmt: skip
        models[head] = HGPTForCausalLM(config).to(device, getattr(torch, options.dtype)).eval()
    for batch in options.batch:
        prompt = torch.randint(options.vocab, (batch, options.prompt), device=device)
        # Warm-up: libraries load, and the C library allocates and keeps the memory of a whole text.
        for model, count in zip(models.values(), (new, 2), strict=True):
            seconds(with_cache, model, prompt, count)
        rounds: dict[str, list[tuple[float, float, float]]] = {head: [] for head in models}
        for number in range(options.rounds):
            for head, model in list(models.items())[:: -1 if number % 2 else 1]:
                cached = seconds(with_cache, model, prompt, new)
                uncached = seconds(without_cache, model, prompt, new) if batch in options.uncached_batch else 0
                rounds[head].append((cached, uncached, share_of_head(model, prompt, new)))
        for head, measured in rounds.items():
            cached, uncached, share = (statistics.median(values) for values in zip(*measured, strict=True))
            tokens, without, ratio = batch * new, None, None
            if uncached:
                without = tokens / uncached
                ratio = statistics.median(slow / fast for fast, slow, _ in measured)
            yield Row(head, batch, tokens / cached, without, ratio, share)


def parser() -> cli.Parser:
    parser = cli.Parser("python -m benchmarks.sampling", __doc__)
    for name, default in (("layers", 12), ("heads", 12), ("dim", 768), ("vocab", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--uncached-batch", type=int, nargs="*", default=[1], help="batch sizes without the cache")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu, mps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    name = device_name(torch.device(options.device))
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, {options.dtype}")
    print(f"{options.prompt} + {options.new_tokens} tokens, median of {options.rounds} rounds\n")
    print("| head | batch | with cache, tokens/s | without, tokens/s | ratio | head's share with cache |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in measure(options):
        without = ["", ""] if row.uncached is None else [f"{row.uncached:,.1f}", f"{row.ratio:.2f}"]
        cells = [row.head, str(row.batch), f"{row.cached:,.1f}", *without, f"{row.share:.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
