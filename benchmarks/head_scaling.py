"""A figure of the time and memory of the heads' losses over the number of positions and the number of classes.

    python -m benchmarks.head_scaling --out head_scaling.png
    python -m benchmarks.head_scaling --device cuda --dtype bfloat16 --rounds 5 --out head_scaling.png

The positions double up to --max-positions with --rows classes, and the classes up to --max-rows with --positions. Each
point is measured in its own process: the median time of --rounds passes, and the memory of the first pass. A loss's
curve ends before its estimated scores take more than --limit GiB, or a point takes longer than --patience seconds, if
it takes twice the time of the previous one.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.head_loss import Settings, in_own_process, machine_name
from hgpt import cli

LOSSES = ("dense harmonic", "fused harmonic", "F.cross_entropy(x @ W.T)", "F.linear_cross_entropy")
DENSE_MATRICES = {"dense harmonic": 8, "F.cross_entropy(x @ W.T)": 3}  # (positions, rows) tensors alive at the peak


def doublings(first: int, last: int) -> list[int]:
    """first, 2 · first, 4 · first, … below last, then last."""
    sizes = [first]
    while sizes[-1] * 2 < last:
        sizes.append(sizes[-1] * 2)
    return [*sizes, last] if last > first else sizes


Point = tuple[int, float, float]  # the size, seconds, MiB


def measure(
    base: Settings, field: str, sizes: list[int], rounds: int, limit: float, patience: float
) -> dict[str, list[Point]]:
    """Loss → its points, as far as memory and time allow. Prints each point when it is measured."""
    curves: dict[str, list[Point]] = {name: [] for name in LOSSES}
    for number, size in enumerate(sizes):
        settings = replace(base, **{field: size})
        gib = 4 * settings.positions * settings.rows / 2**30
        for name, curve in curves.items():
            left_off = len(curve) < number or (curve and 2 * rounds * curve[-1][1] > patience)
            if left_off or DENSE_MATRICES.get(name, 0) * gib > limit:
                continue
            times, memory = in_own_process(name, settings, rounds)
            curve.append((size, statistics.median(times), memory / 2**20))
            print("{} {:>7}  {:<25} {:9.4f} s {:9.0f} MiB".format(field, size, name, *curve[-1][1:]), flush=True)
    return curves


def main(arguments: Sequence[str]) -> str:
    parser = cli.Parser("python -m benchmarks.head_scaling", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rows", type=int, default=50304, help="classes while the positions vary")
    parser.add_argument("--positions", type=int, default=2048, help="positions while the classes vary")
    parser.add_argument("--max-positions", type=int, default=65_536)
    parser.add_argument("--max-rows", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=1024, help="smallest number of positions and of classes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8, help="most GiB of a dense loss")
    parser.add_argument("--patience", type=float, default=300, help="most seconds of a point, as estimated")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    base = Settings(
        positions=options.positions,
        dim=options.dim,
        rows=options.rows,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        threads=options.threads,
    )
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), dpi=120, layout="constrained", sharey="row")
    for column, (field, last) in enumerate((("positions", options.max_positions), ("rows", options.max_rows))):
        sizes = doublings(options.first, last)
        curves = measure(base, field, sizes, options.rounds, options.limit, options.patience)
        for number, (name, curve) in enumerate(curves.items()):
            if curve:
                x, seconds, mib = zip(*curve, strict=True)
                axes[0][column].plot(x, seconds, "o-", color=f"C{number}", label=name)
                axes[1][column].plot(x, mib, "o-", color=f"C{number}", label=name)
        for row, label in enumerate(("forward + backward (s)", "peak extra memory (MiB)")):
            axes[row][column].set(xscale="log", yscale="log", xlabel=f"{field}", ylabel=label)
            axes[row][column].spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{machine_name(options.device)}, {options.dtype}, width {options.dim}")
    figure.savefig(options.out)
    return str(options.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
