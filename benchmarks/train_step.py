"""The training step (forward, backward, clipping, AdamW) with the harmonic head, the softmax head and a plain GPT-2.

    python -m benchmarks.train_step                                          the quickstart's model on the CPU
    python -m benchmarks.train_step --layers 12 --heads 12 --dim 768 --seq-len 1024 --vocab 50257 --micro-batch 32 \\
        --exponent "2*sqrt_dim" --device cuda --precision bf16 --compile     GPT-2 small on a GPU

"plain" is a GPT-2 with a softmax head in PyTorch alone, as nanoGPT trains it: dense logits and F.cross_entropy,
scaled_dot_product_attention, fused AdamW, and with --compile the whole model compiled.

In each round every model takes one step, so that other programs on the machine slow down all models. The output is
tokens per second (median and quartiles), model FLOPs utilisation if the device's peak is known, and the medians of the
ratios within a round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.head_loss import synchronize
from hgpt import cli
from hgpt.hardware import device_name, peak_flops
from hgpt.model.configuration_hgpt import HEADS, HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import OptimConfig
from hgpt.run.engines import compile_blocks
from hgpt.run.optim import build_optimizer
from hgpt.run.report import flops_per_token

# The order of each round. No model runs twice in succession (its weights would still be in the cache), and each follows
# each other model equally often.
ORDERS = [order.split() for order in (
    "harmonic softmax plain", "harmonic plain softmax", "plain softmax harmonic",
    "softmax harmonic plain", "softmax plain harmonic", "plain harmonic softmax",
)]  # fmt: skip


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.wide, self.narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class PlainGPT(nn.Module):
    """The baseline: GPT-2 with tied embeddings and dense logits, in PyTorch alone."""

    def __init__(self, config: HGPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(config.n_embd, config.n_head) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def our_model(config: HGPTConfig, options: argparse.Namespace) -> tuple[torch.optim.Optimizer, Callable, nn.Module]:
    model = HGPTForCausalLM(config).to(options.device).train()
    if options.compile:
        compile_blocks(model, together=True)  # as train.py does in one process
    return (
        build_optimizer(model, OptimConfig()),
        lambda inputs, targets: model(inputs, shift_labels=targets, use_cache=False).loss,
        model,
    )


def plain_model(config: HGPTConfig, options: argparse.Namespace) -> tuple[torch.optim.Optimizer, Callable, nn.Module]:
    model = PlainGPT(config).to(options.device).train()
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return optimizer, torch.compile(model) if options.compile else model, model


def training_step(name: str, config: HGPTConfig, options: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one optimiser step on random tokens and returns its seconds."""
    torch.manual_seed(0)
    optimizer, loss_of, model = (plain_model if name == "plain" else our_model)(config, options)
    tokens = torch.randint(config.vocab_size, (options.micro_batch, options.seq_len + 1), device=options.device)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        return time.perf_counter() - start

    return step


def configs_of(options: argparse.Namespace) -> dict[str, HGPTConfig]:
    """The model of each name; "plain" is built from the softmax twin's."""
    shape = {"n_layer": options.layers, "n_head": options.heads, "n_embd": options.dim, "exponent": options.exponent}
    configs = {
        head: HGPTConfig(vocab_size=options.vocab, n_positions=options.seq_len, head=head, **shape) for head in HEADS
    }
    return configs | {"plain": configs["softmax"]}


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step in each round, by the model's name."""
    steps = {name: training_step(name, config, options) for name, config in configs_of(options).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 3):
        for name in ORDERS[number % len(ORDERS)]:
            seconds = steps[name]()
            if number >= 3:  # the first steps compile and allocate
                times[name].append(seconds)
    return times


def mfu(config: HGPTConfig, tokens_per_second: float, options: argparse.Namespace) -> float | None:
    """Model FLOPs utilisation; None in fp32 and on a device whose peak is not known."""
    peak = peak_flops(device_name(torch.device(options.device))) if options.precision == "bf16" else None
    return None if peak is None else tokens_per_second * flops_per_token(config, options.seq_len) / peak


def ratio(times: dict[str, list[float]], name: str) -> float:
    """Tokens/s of harmonic relative to `name`: the median over rounds."""
    return statistics.median(b / a for a, b in zip(times["harmonic"], times[name], strict=True))


def parser() -> cli.Parser:
    parser = cli.Parser("python -m benchmarks.train_step", __doc__)
    for name, default in (("layers", 4), ("heads", 4), ("dim", 128), ("seq-len", 128), ("micro-batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--exponent", default="34", help="n of the harmonic head, as in model.head.exponent")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block; of plain the whole model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    rounds = cli.checked(int, "be at least 2, for quartiles", lambda number: number >= 2)
    parser.add_argument("--rounds", type=rounds, default=20)
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    times, configs, tokens = measure(options), configs_of(options), options.micro_batch * options.seq_len

    print(
        f"{device_name(torch.device(options.device))}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.precision}, compile {options.compile}\n{options.layers} blocks, width {options.dim}, vocabulary "
        f"{options.vocab}, n = {configs['harmonic'].exponent:.4g}, {tokens} tokens per step\n"
    )
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        line = f"{name:<9} {tokens / middle:9,.0f} tokens/s ({tokens / high:,.0f} to {tokens / low:,.0f})"
        if (share := mfu(configs[name], tokens / middle, options)) is not None:
            line += f"  MFU {share:.1%}"
        print(line)
    for name in ("softmax", "plain"):
        print(f"harmonic / {name}, tokens/s: {ratio(times, name):.3f}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
