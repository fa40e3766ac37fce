"""The whole training step, forward, backward, clipping and AdamW, with the harmonic head and with its softmax twin.

    python -m benchmarks.train_step                                          the quickstart's model on the CPU
    python -m benchmarks.train_step --layers 12 --heads 12 --dim 768 --seq-len 1024 --vocab 50257 \\
        --micro-batch 32 --device cuda --precision bf16 --compile            GPT-2 small on a GPU

The two take their steps in turn, so that what else the machine does meets both. Prints tokens per second (median step,
with quartiles), model FLOPs utilisation where the device's peak is known, and the median of the ratios within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from hgpt.configuration_hgpt import HEADS, HGPTConfig
from hgpt.metrics import device_name, flops_per_token, peak_flops
from hgpt.modeling_hgpt import HGPTForCausalLM
from hgpt.optim import OptimConfig, build_optimizer


def training_step(config: HGPTConfig, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one optimiser step on random tokens and returns its seconds."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = HGPTForCausalLM(config).to(device).train()
    if options.compile:
        for block in model.transformer.h:
            block.compile()
    optimizer = build_optimizer(model, OptimConfig())
    tokens = torch.randint(config.vocab_size, (options.micro_batch, options.seq_len + 1), device=device)

    def step() -> float:
        start = time.perf_counter()
        autocast = torch.autocast(device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()
        with autocast:
            loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("heads", 4), ("dim", 128), ("seq-len", 128), ("micro-batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    shape = {"n_layer": options.layers, "n_head": options.heads, "n_embd": options.dim}
    configs = {
        head: HGPTConfig(vocab_size=options.vocab, n_positions=options.seq_len, head=head, **shape) for head in HEADS
    }
    steps = {head: training_step(config, options) for head, config in configs.items()}
    times: dict[str, list[float]] = {head: [] for head in HEADS}
    for number in range(options.rounds + 3):
        for head, step in steps.items():
            seconds = step()
            if number >= 3:  # the first compile, and allocate
                times[head].append(seconds)

    name = device_name(torch.device(options.device))
    tokens = options.micro_batch * options.seq_len
    print(
        f"{name}, {options.threads} threads, torch {torch.__version__}, {options.precision}, compile {options.compile}"
    )
    print(f"{options.layers} blocks, width {options.dim}, vocabulary {options.vocab}, {tokens} tokens per step\n")
    peak = peak_flops(name) if options.precision == "bf16" else None
    for head, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        line = f"{head:<9} {tokens / middle:9,.0f} tokens/s ({tokens / high:,.0f} to {tokens / low:,.0f})"
        if peak is not None:
            line += f"  MFU {tokens / middle * flops_per_token(configs[head], options.seq_len) / peak:.1%}"
        print(line)
    ratio = statistics.median(b / a for a, b in zip(times["harmonic"], times["softmax"], strict=True))
    print(f"harmonic / softmax, tokens/s: {ratio:.3f}")


if __name__ == "__main__":
    main()
