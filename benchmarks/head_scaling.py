"""Time and memory of the heads' losses over the number of positions and of classes, as a figure.

    python -m benchmarks.head_scaling --out head_scaling.png
    python -m benchmarks.head_scaling --device cuda --dtype bfloat16 --max-positions 65536 --out head_scaling.png

The positions double up to --max-positions at GPT-2's vocabulary, and the classes up to --max-rows at --positions. Each
point is measured as in benchmarks.head_loss; a loss whose estimated scores would not fit into --limit GiB is left out.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.head_loss import Settings, device_name, in_a_process_of_its_own, measure_times, variants

LOSSES = ("dense harmonic", "fused harmonic", "F.cross_entropy(x @ W.T)", "F.linear_cross_entropy")
DENSE_MATRICES = {"dense harmonic": 8, "F.cross_entropy(x @ W.T)": 3}  # (positions, rows) tensors alive at the peak


def doublings(first: int, last: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * 2 <= last:
        sizes.append(sizes[-1] * 2)
    return sizes


def measure(settings: Settings, rounds: int, limit: float) -> dict[str, tuple[float, float]]:
    """Loss → (median seconds, MiB)."""
    gib = 4 * settings.positions * settings.rows / 2**30
    fitting = {
        name: loss
        for name, loss in variants(settings).items()
        if name in LOSSES and DENSE_MATRICES.get(name, 0) * gib <= limit
    }
    times = measure_times(fitting, settings, rounds)
    return {name: (statistics.median(times[name]), in_a_process_of_its_own(name, settings) / 2**20) for name in fitting}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rows", type=int, default=50304, help="classes while the positions vary")
    parser.add_argument("--positions", type=int, default=2048, help="positions while the classes vary")
    parser.add_argument("--max-positions", type=int, default=8192)
    parser.add_argument("--max-rows", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=1024, help="the smallest of both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8, help="GiB of the dense losses")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    base = Settings(
        positions=options.positions,
        dim=options.dim,
        rows=options.rows,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        threads=options.threads,
        chunk=None,
        exponent="2*sqrt_dim",
    )
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), dpi=120, layout="constrained", sharey="row")
    for column, (field, last) in enumerate((("positions", options.max_positions), ("rows", options.max_rows))):
        sizes = doublings(options.first, last)
        points = [measure(replace(base, **{field: size}), options.rounds, options.limit) for size in sizes]
        for number, name in enumerate(LOSSES):
            curve = [(size, *point[name]) for size, point in zip(sizes, points, strict=True) if name in point]
            for size, seconds, mib in curve:
                print(f"{field} {size:>7}  {name:<25} {seconds:9.4f} s {mib:9.0f} MiB")
            if curve:
                x, seconds, mib = zip(*curve, strict=True)
                axes[0][column].plot(x, seconds, "o-", color=f"C{number}", label=name)
                axes[1][column].plot(x, mib, "o-", color=f"C{number}", label=name)
        for row, label in enumerate(("forward + backward (s)", "peak extra memory (MiB)")):
            axes[row][column].set(xscale="log", yscale="log", xlabel=f"{field}", ylabel=label)
            axes[row][column].spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{device_name(options.device)}, {options.dtype}, width {options.dim}")
    figure.savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
