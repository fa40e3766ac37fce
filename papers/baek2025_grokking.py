"""Does a harmonic head need less data, and grok less? The synthetic tasks with equal arms and tuned learning rates.

    python -m papers.baek2025_grokking --fractions 0.4 0.8 --epochs 1000

No bias, ε = 0, and tests on examples that are not in training, as in papers.baek2025_toys without --faithful. For each
task, fraction and head the learning rate of --lrs is taken whose mean test accuracy over all epochs and the --tuning
seeds 1000, 1001, … is highest. Then both heads train on the same data for the seeds 0, 1, …

    fit, generalise   first of 20 epochs in a row with an accuracy above 0.9, in training and in the test; --epochs if
                      there is none
    delay             generalise − fit, 0 at least; where a run does not get there it would be longer
    last accuracy     of the test

Differences: harmonic − standard, with Student's 95 % interval over the seeds, and p of a paired permutation test with
Holm's correction for all rows of the table.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.interpret.statistics import holm, sign_flip_test
from papers import baek2025_toys as toys

FIRST_TUNING_SEED = 1000


def tuned(task: str, model: str, settings: toys.Settings, options: argparse.Namespace) -> toys.Settings:
    """`settings` with the learning rate of the highest mean test accuracy on the tuning seeds."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning)
    points = [replace(settings, learning_rate=lr) for lr in options.lrs]
    means = [float(toys.trained(task, model, seeds, point, options.out)["clean"].mean()) for point in points]
    shown = ", ".join(f"{lr:g}: {mean:.3f}" for lr, mean in zip(options.lrs, means, strict=True))
    print(f"{task}, {settings.fraction:g}, {model}: mean test accuracy by learning rate {shown}", flush=True)
    return points[int(np.argmax(means))]


def measures(result: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name → (seeds,)."""
    epochs = result["train"].shape[1]
    fit, generalise = (np.nan_to_num(toys.sustained(result[name]), nan=epochs) for name in ("train", "clean"))
    delay = np.maximum(generalise - fit, 0)
    return {"fit": fit, "generalise": generalise, "delay": delay, "last accuracy": result["clean"][:, -1]}


def compare(harmonic: np.ndarray, standard: np.ndarray) -> tuple[list[str], float]:
    """Cells of the means and their difference, and the p-value before correction; (seeds,) each."""
    difference = harmonic.astype(np.float64) - standard
    half = stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1)
    numbers = harmonic.mean(), standard.mean(), difference.mean()
    return [*(f"{number:.4g}" for number in numbers), f"± {half:.3g}"], sign_flip_test(difference)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m papers.baek2025_grokking", __doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=toys.TASKS, default=["circle"], metavar="TASK", help=", ".join(toys.TASKS))
    add("--body", choices=("mlp", "transformer"), default="mlp", help="default: %(default)s")
    add("--fractions", type=float, nargs="+", default=[0.4, 0.8], metavar="X", help="share of the training examples")
    add("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], metavar="LR", help="the grid of both heads")
    add("--seeds", type=int, default=20, help="default: %(default)s")
    add("--tuning", type=int, default=4, help="seeds of the tuning (default: %(default)s)")
    add("--epochs", type=int, default=1000, help="default: %(default)s")
    add("--compile", action="store_true", help="as in papers.baek2025_toys")
    add("--out", type=Path, default=Path("runs/baek2025_toys"), help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    for name, holds, rule in (
        ("seeds", options.seeds >= 2, "at least 2"),
        ("tuning", options.tuning >= 1, "at least 1"),
        ("epochs", options.epochs >= toys.SUSTAINED, f"at least {toys.SUSTAINED}"),
        ("fractions", all(0.05 <= x <= 0.95 for x in options.fractions), "between 0.05 and 0.95"),
        ("lrs", all(0 < lr < math.inf for lr in options.lrs), "positive numbers"),
    ):
        if not holds:
            raise UserError(f"--{name} must be {rule}; got {getattr(options, name)}")
    return options


def main(argv: Sequence[str]) -> str:
    options = parse_arguments(argv)
    rows, p_values = [], []
    for task in options.tasks:
        for fraction in options.fractions:
            equal = toys.Settings(fraction=fraction, epochs=options.epochs, compiled=options.compile)
            found = []
            for model in (f"harmonic-{options.body}", f"standard-{options.body}"):
                best = tuned(task, model, equal, options)
                found.append(measures(toys.trained(task, model, range(options.seeds), best, options.out)))
                reached = [int((found[-1][name] < options.epochs).sum()) for name in ("fit", "generalise")]
                print(f"{task}, {fraction:g}, {model}: {reached[0]} seeds fit, {reached[1]} generalise", flush=True)
            for name in found[0]:
                cells, p = compare(found[0][name], found[1][name])
                rows.append([task, f"{fraction:g}", name, *cells])
                p_values.append(p)
    lines = ["| task | fraction | | harmonic | standard | difference | 95 % | p (Holm) |", "| --- " * 8 + "|"]
    for row, p in zip(rows, holm(p_values), strict=True):
        lines.append(f"| {' | '.join(row)} | {p:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
