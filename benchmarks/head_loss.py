"""Time, memory and errors of a head's loss and gradients: the harmonic losses and known softmax losses.

    python -m benchmarks.head_loss                                     GPT-2 small's head, 2048 positions, float32
    python -m benchmarks.head_loss --shape 2048x1600x50304             GPT-2 xl's
    python -m benchmarks.head_loss --device cuda --dtype bfloat16 --shape 32768x768x50304
    python -m benchmarks.head_loss --distances cosine mahalanobis:metric=low_rank,rank=16 --only "fused harmonic"
    python -m benchmarks.head_loss --distances manhattan minkowski:p=3 --shape 64x768x50304 --rounds 1   minutes

Prints a table. Every variant runs once in each round, so that other programs on the machine slow down all variants.
`time` is the median and the quartiles of forward + backward over the rounds; a ratio is the median over rounds of the
ratio within a round. `memory` is the peak extra memory of one forward + backward, gradients included: on a GPU the
allocator's peak, on a CPU the growth of the peak resident set, each loss in its own process (Linux). `errors` are those
of the loss and of the gradients by x and by w (2-norms), relative to float64 on the same rounded operands: on a GPU of
all positions, on a CPU of the first 128.
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgpt import cli
from hgpt.hardware import device_name
from hgpt.model.harmax import harmonic_loss, resolve_exponent
from hgpt.model.heads import HarmonicHead
from hgpt.model.loss import LossParams, chunk_positions, head_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (N, D), w (V, D), targets (N,)
Operands = tuple[Tensor, Tensor, Tensor]
REFERENCES = ("F.cross_entropy(x @ W.T)", "F.linear_cross_entropy", "F.linear_cross_entropy, our chunk")


@dataclass(frozen=True)
class Settings:
    positions: int
    dim: int
    rows: int
    dtype: torch.dtype
    device: str
    threads: int
    chunk: int | None = None
    exponent: str = "2*sqrt_dim"
    distances: tuple[str, ...] = ()

    @property
    def n(self) -> float:
        return resolve_exponent(self.exponent, self.dim)

    @property
    def accuracy_positions(self) -> int:
        """Positions whose loss is also computed in float64."""
        return min(self.positions, 128) if self.device == "cpu" else self.positions


def dense_softmax(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ w.T).float() if x.dtype != torch.float64 else x @ w.T, targets)


def torch_chunked(x: Tensor, w: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    return F.linear_cross_entropy(x, w, targets, options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk))


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: loss(w, x, y)


def apple_cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, y: chunked_linear_cross_entropy(x, w, y, tuned=False)


LIBRARIES = {"Liger": liger, "Apple CCE": apple_cce, "quack": quack}  # softmax losses for GPUs


class DistanceLoss:
    """The loss of a harmonic head with this distance, such as "minkowski:p=3", with the weight as an argument.

    `parameters`: the learned parameters of the distance. Their gradients are computed with the loss.
    """

    def __init__(self, text: str, settings: Settings) -> None:
        self.head = HarmonicHead(settings.dim, 1, settings.n, **distance_and_options(text))
        self.head.metric.to(settings.device)
        self.parameters = tuple(self.head.metric.parameters())

    def __call__(self, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return self._called(w, x, targets)

    def dense(self, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._called(w, x), targets)

    def _called(self, w: Tensor, *operands: Tensor) -> Tensor:
        self.head.num_classes = len(w)  # fewer rows than in the settings during the warm-up
        return torch.func.functional_call(self.head, {"weight": w}, operands)


def distance_and_options(text: str) -> dict[str, object]:
    """{"distance": "minkowski", "p": 3} of "minkowski:p=3"."""
    name, _, rest = text.partition(":")
    options: dict[str, object] = {"distance": name}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        try:
            options[option] = json.loads(value)
        except json.JSONDecodeError:
            options[option] = value
    return options


def variants(settings: Settings) -> dict[str, Loss]:
    """Name → loss, for losses that run here."""
    return {name: loss for name, loss in all_variants(settings).items() if not isinstance(loss, str)}


def all_variants(settings: Settings) -> dict[str, Loss | str]:
    """Name → loss, or why it does not run here."""
    n, chunk = settings.n, settings.chunk

    def fused(n: float | None, **options: bool) -> Loss:
        params = LossParams(n=n, chunk=chunk, **options)  # type: ignore[arg-type]
        return lambda x, w, y: head_loss(x, w, y, params)

    found: dict[str, Loss | str] = {
        "dense harmonic": lambda x, w, y: harmonic_loss(x, w, y, n),
        "fused harmonic": fused(n),
        "fused harmonic, recompute": fused(n, recompute=True),
        "F.cross_entropy(x @ W.T)": dense_softmax,
        "F.cross_entropy(x @ W.T), compiled": torch.compile(dense_softmax, dynamic=False),
        "F.linear_cross_entropy": torch_chunked,
        "F.linear_cross_entropy, our chunk": lambda x, w, y: torch_chunked(
            x, w, y, chunk or chunk_positions(len(w), x.dtype, x.device.type)
        ),
        "fused softmax": fused(None),
    }
    found |= {f"harmonic, {text}": DistanceLoss(text, settings) for text in settings.distances}
    for name in found if not hasattr(F, "linear_cross_entropy") else ():
        if name.startswith("F.linear_cross_entropy"):
            found[name] = f"torch {torch.__version__} does not have it"
    for name, load in LIBRARIES.items():
        try:
            found[name] = load() if settings.device != "cpu" else "it needs a GPU"
        except Exception as error:  # not installed, or not with this torch
            found[name] = f"{type(error).__name__}: {error}"
    return found


def is_harmonic(name: str) -> bool:
    return "harmonic" in name


def problem(settings: Settings, harmonic: bool) -> Operands:
    """x, w and targets with the scales of a new model: normed x times the initial gain, w ~ N(0, 0.02²)."""
    torch.manual_seed(0)
    x = torch.randn(settings.positions, settings.dim) * (0.05 if harmonic else 1.0)
    w = torch.randn(settings.rows, settings.dim) * 0.02
    targets = torch.randint(settings.rows, (settings.positions,))
    x, w = (tensor.to(settings.device, settings.dtype).requires_grad_() for tensor in (x, w))
    return x, w, targets.to(settings.device)


def differentiate(loss: Loss, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(*operands)
    grads = torch.autograd.grad(value, (*operands[:2], *getattr(loss, "parameters", ())))
    return value.detach(), *grads[:2]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(function: Callable[[], object], device: str) -> float:
    """The time of a call: on a GPU between events in its queue, after all earlier work."""
    synchronize(device)
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.get_device_module(device).Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure_times(
    losses: dict[str, Loss], operands: dict[bool, Operands], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each round; a first round is not counted. `operands`: harmonic or not → `problem`."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name, loss in losses.items():
            taken = seconds(partial(differentiate, loss, operands[is_harmonic(name)]), device)
            if number > 0:
                times[name].append(taken)
    return times


def truth(dense: Loss, settings: Settings, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over the first `accuracy_positions` and its gradients in float64, 1024 positions at a time."""
    x, w, targets = (tensor.detach() for tensor in operands)
    w, count = w.double().requires_grad_(), settings.accuracy_positions
    value, grad_w, grad_x = w.new_zeros(()), torch.zeros_like(w), []
    for start in range(0, count, 1024):
        rows = slice(start, min(start + 1024, count))
        share = (rows.stop - start) / count
        own, dx, dw = differentiate(dense, (x[rows].double().requires_grad_(), w, targets[rows]))
        value += share * own
        grad_w += share * dw
        grad_x.append(share * dx)
    return value, torch.cat(grad_x), grad_w


def dense_of(loss: Loss, settings: Settings, harmonic: bool) -> Loss:
    """The float64 reference of `loss`."""
    if isinstance(loss, DistanceLoss):
        return loss.dense
    return (lambda x, w, y: harmonic_loss(x, w, y, settings.n)) if harmonic else dense_softmax


def measure_errors(
    loss: Loss, settings: Settings, operands: Operands, exact: tuple[Tensor, Tensor, Tensor]
) -> list[float]:
    """Relative errors of the loss, dx and dw; `exact` is their `truth`."""
    x, w, targets = operands
    few = x[: settings.accuracy_positions].detach().requires_grad_(), w, targets[: settings.accuracy_positions]
    return [float((v.double() - t).norm() / t.norm()) for v, t in zip(differentiate(loss, few), exact, strict=True)]


def peak_memory(loss: Loss, operands: Operands) -> int:
    """Peak extra bytes of a forward + backward on a GPU, gradients included."""
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    differentiate(loss, operands)
    return torch.accelerator.max_memory_allocated() - before


def status_bytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise SystemExit("memory on the CPU is read from /proc/self/status, which only Linux has: use --skip memory")
    return int(match[1]) * 1024


def measure_alone(name: str, settings: Settings, passes: int) -> tuple[list[float], int]:
    """Seconds of each pass, and the bytes of the first. Call once, in a process that does nothing else."""
    torch.set_num_threads(settings.threads)
    loss = variants(settings)[name]
    x, w, targets = problem(settings, is_harmonic(name))
    small = (x[:8].detach().requires_grad_(), w[:64].detach().requires_grad_(), targets[:8] % 64)
    differentiate(loss, small)  # libraries load, and threads start
    if settings.device != "cpu":
        extra = peak_memory(loss, (x, w, targets))
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident set
        before = status_bytes("VmRSS")
    times = []
    for number in range(passes):
        times.append(seconds(partial(differentiate, loss, (x, w, targets)), settings.device))
        if number == 0 and settings.device == "cpu":
            extra = status_bytes("VmHWM") - before
    return times, extra


def in_own_process(name: str, settings: Settings, passes: int = 1) -> tuple[list[float], int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_alone, name, settings, passes).result()


def machine_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device != "cpu":
        return device_name(torch.device(device))
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1] if match else platform.processor()


def print_table(header: list[str], table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    for cells in (header, ["-" * width for width in widths], *table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"three sizes, positions x dim x rows, such as 2048x768x50304; got {text}")
    positions, dim, rows = map(int, parts)
    return positions, dim, rows


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("python -m benchmarks.head_loss", __doc__)
    parser.add_argument("--shape", type=parse_shape, default=(2048, 768, 50304), help="positions x dim x rows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--chunk", type=int, help="positions per chunk of the fused losses (default: their own choice)")
    parser.add_argument("--exponent", default="2*sqrt_dim", help="exponent n of the distance d")
    parser.add_argument(
        "--distances", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]", help="also measure these distances"
    )
    parser.add_argument("--rounds", type=cli.at_least_1, default=5)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants by name; default all")
    parser.add_argument("--skip", nargs="+", choices=("time", "memory", "errors"), default=[])
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    positions, dim, rows = options.shape
    where = getattr(torch, options.dtype), options.device, options.threads
    settings = Settings(*options.shape, *where, options.chunk, options.exponent, tuple(options.distances))
    try:
        losses = variants(settings)
    except ValueError as error:
        parser.error(f"--distances: {error}")
    if options.only:
        if unknown := set(options.only) - set(losses):
            parser.error(f"--only: no variant {sorted(unknown)} here; there are {sorted(losses)}")
        losses = {name: loss for name, loss in losses.items() if name in options.only or isinstance(loss, DistanceLoss)}
    threads = f", {options.threads} threads" if options.device == "cpu" else ""
    print(f"{machine_name(options.device)}{threads}, torch {torch.__version__}, {options.dtype}")
    print(f"{positions} positions x {dim} x {rows} rows, n = {settings.n:.4g}, {options.rounds} rounds\n")
    columns = measure(losses, settings, options.rounds, options.skip)
    print_table(["loss", *columns], [[name, *(column[name] for column in columns.values())] for name in losses])


def measure(losses: dict[str, Loss], settings: Settings, rounds: int, skip: list[str]) -> dict[str, dict[str, str]]:
    """Title of a column → loss → cell."""
    columns: dict[str, dict[str, str]] = {}
    operands = {harmonic: problem(settings, harmonic) for harmonic in {is_harmonic(name) for name in losses}}
    if "time" not in skip:
        times = measure_times(losses, operands, rounds, settings.device)
        references = [*REFERENCES, *(["fused harmonic"] if settings.distances else [])]
        columns["time, s (quartiles)"] = {name: median_and_quartiles(own) for name, own in times.items()}
        for reference in filter(times.get, references):
            ratios = {name: map(truediv, own, times[reference]) for name, own in times.items()}
            columns[f"/ {reference}"] = {name: f"{statistics.median(every):.3f}" for name, every in ratios.items()}
    if "memory" not in skip:
        if settings.device == "cpu":
            memory = {name: in_own_process(name, settings)[1] for name in losses}
        else:
            memory = {name: peak_memory(loss, operands[is_harmonic(name)]) for name, loss in losses.items()}
        columns["memory, MiB"] = {name: f"{extra / 2**20:.0f}" for name, extra in memory.items()}
        if dense := memory.get("dense harmonic"):
            columns["/ dense harmonic"] = {name: f"{extra / dense:.3f}" for name, extra in memory.items()}
    if "errors" not in skip:
        columns["errors: loss, dx, dw"] = {}
        for name, loss in losses.items():
            harmonic = is_harmonic(name)
            exact = truth(dense_of(loss, settings, harmonic), settings, operands[harmonic])
            errors = measure_errors(loss, settings, operands[harmonic], exact)
            columns["errors: loss, dx, dw"][name] = ", ".join(f"{error:.1e}" for error in errors)
    return columns


def median_and_quartiles(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(cli.run(main))
