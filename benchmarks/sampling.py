"""Tokens per second of generation, with the key-value cache and without, and the head's share of the time.

    python -m benchmarks.sampling                                   GPT-2 small, random weights, on the CPU
    python -m benchmarks.sampling --device cuda --dtype bfloat16
    python -m benchmarks.sampling --layers 4 --heads 4 --dim 128 --vocab 2048      the quickstart's model

Both draw the same number of tokens from the whole distribution. "with cache" is transformers' `generate`, which
`sample.py` uses; "without" runs the model on the whole text again for each token, as nanoGPT's `generate` does. They
take turns, so that what else the machine does meets both.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hgpt.hardware import device_name
from hgpt.model.configuration_hgpt import HEADS, HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM


@torch.no_grad()
def with_cache(model: HGPTForCausalLM, prompt: Tensor, count: int) -> Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


@torch.no_grad()
def without_cache(model: HGPTForCausalLM, prompt: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model(prompt, use_cache=False, logits_to_keep=1).logits[:, -1]
        prompt = torch.cat((prompt, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return prompt


class Stopwatch:
    """Seconds spent inside a module, the device waited for before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._start = 0.0

    def _now(self, *_: object) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        def enter(*_: object) -> None:
            self._start = self._now()

        def leave(*_: object) -> None:
            self.seconds += self._now() - self._start

        hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield
        for hook in hooks:
            hook.remove()


def seconds(generate, model: HGPTForCausalLM, prompt: Tensor, count: int) -> float:
    if prompt.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    text = generate(model, prompt, count)
    assert text.shape == (len(prompt), prompt.shape[1] + count)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("heads", 12), ("dim", 768), ("vocab", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--uncached-batch", type=int, nargs="+", default=[1], help="batches also run without the cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    models = {}
    for head in HEADS:
        config = HGPTConfig(
            vocab_size=options.vocab,
            n_positions=options.prompt + options.new_tokens,
            n_layer=options.layers,
            n_head=options.heads,
            n_embd=options.dim,
            head=head,
            eos_token_id=None,
        )
        models[head] = HGPTForCausalLM(config).to(device, getattr(torch, options.dtype)).eval()

    name = device_name(device)
    print(f"{name}, {options.threads} threads, torch {torch.__version__}, {options.dtype}")
    print(f"{options.prompt} + {options.new_tokens} tokens, median of {options.rounds} rounds\n")
    print("| head | batch | with cache, tokens/s | without, tokens/s | ratio | head's share with cache |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in options.batch:
        prompt = torch.randint(options.vocab, (batch, options.prompt), device=device)
        cached: dict[str, list[float]] = {head: [] for head in models}
        uncached: dict[str, list[float]] = {head: [] for head in models}
        shares: dict[str, list[float]] = {head: [] for head in models}
        # Libraries load, and the C library keeps the memory of a whole text: who came first would have to wait for it.
        for model, count in zip(models.values(), (options.new_tokens, 2), strict=True):
            seconds(with_cache, model, prompt, count)
        for number in range(options.rounds):
            for head, model in list(models.items())[:: -1 if number % 2 else 1]:
                cached[head].append(seconds(with_cache, model, prompt, options.new_tokens))
                if batch in options.uncached_batch:
                    uncached[head].append(seconds(without_cache, model, prompt, options.new_tokens))
                watch = Stopwatch(device)
                with watch.inside(model.lm_head):
                    whole = seconds(with_cache, model, prompt, options.new_tokens)
                shares[head].append(watch.seconds / whole)
        for head in models:
            tokens = batch * options.new_tokens
            cells = [head, str(batch), f"{tokens / statistics.median(cached[head]):,.1f}"]
            if uncached[head]:
                ratio = statistics.median(b / a for a, b in zip(cached[head], uncached[head], strict=True))
                cells += [f"{tokens / statistics.median(uncached[head]):,.1f}", f"{ratio:.2f}"]
            else:
                cells += ["", ""]
            print(f"| {' | '.join(cells)} | {statistics.median(shares[head]):.1%} |", flush=True)


if __name__ == "__main__":
    main()
