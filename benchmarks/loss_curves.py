"""Loss curves of runs in one figure.

python -m benchmarks.loss_curves runs/quickstart runs/quickstart_softmax --out loss_curves.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from hgpt.history import records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="a .png or .svg file")
    parser.add_argument("--unigram", type=float, help="loss of a unigram model, drawn as a line")
    arguments = parser.parse_args()

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for number, run in enumerate(arguments.runs):
        colour = f"C{number}"
        for kind, style in (("train", {"alpha": 0.35}), ("eval", {"marker": "o", "linestyle": ""})):
            curve = [(record["step"], record["loss"]) for record in records(run, kind)]
            last = f", {curve[-1][1]:.3f}" if kind == "eval" else ""
            name = "validation" if kind == "eval" else "training batch"
            axes.plot(*zip(*curve, strict=True), color=colour, label=f"{run.name}: {name}{last}", **style)
    if arguments.unigram is not None:
        axes.axhline(arguments.unigram, color="0.5", linestyle="--", label=f"unigram model, {arguments.unigram:.3f}")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
