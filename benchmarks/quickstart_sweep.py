"""Harmonic against softmax on the quickstart corpus, each at its own best initial gain and learning rate.

    python -m benchmarks.quickstart_sweep [--jobs 2] [--runs-dir runs/sweep]

For each head, from configs/quickstart.toml and configs/quickstart_softmax.toml: first every exponent and initial gain
at the first learning rate, then the other learning rates at the best of them, then further seeds of the best point.
Prints the tables of RESULTS.md. Finished runs are kept and not repeated. One run takes one core for about five minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = {"harmonic": "configs/quickstart.toml", "softmax": "configs/quickstart_softmax.toml"}
GEOMETRIES = {
    "harmonic": [
        {"model.head.exponent": exponent, "model.head.final_norm_gain": gain}
        for exponent, gain in (("3*sqrt_dim", 0.05), ("3*sqrt_dim", 0.025), ("2*sqrt_dim", 0.05), ("4*sqrt_dim", 0.05))
    ],
    "softmax": [{"model.head.final_norm_gain": gain} for gain in (1.0, 3.0, 6.0, 12.0)],
}
LEARNING_RATES = (3e-3, 6e-3, 1.5e-3)
LARGEST_RATIO = 0.8  # of the mean distance to the target to the median distance
SEEDS = (1337, 1338, 1339)

Point = dict[str, str | float]


def run(head: str, point: Point, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one point; returns its last evaluation."""
    label = "-".join(f"{name.rsplit('.', 1)[-1]}_{value}" for name, value in point.items()).replace("*", "x")
    folder = arguments.runs_dir / f"{head}-{label}-{seed}"
    finished = folder / "finished"
    if not finished.exists():
        settings = point | {
            "name": folder.name,
            "runs_dir": arguments.runs_dir,
            "resume": "auto",
            "data.path": arguments.data,
            "train.seed": seed,
            "optim.min_lr": float(point["optim.lr"]) / 10,
            "eval.every": 100_000,
            "eval.unigram_baseline": "false",
            "checkpoint.every": 100_000,
        }
        command = [sys.executable, "train.py", "--config", CONFIGS[head]]
        # Two runs of one thread each do more than one of two.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            command + [f"--{name}={value}" for name, value in settings.items()],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        finished.touch()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = [record for record in records if record["kind"] == "eval"][-1]
    print(f"{folder.name}: {result['loss']:.4f}", file=sys.stderr, flush=True)
    return result


def search(head: str, arguments: argparse.Namespace) -> tuple[list[tuple[Point, dict]], list[dict]]:
    """All points of one seed with their results, best first, and the results of all seeds of the best one."""
    tried = [
        (point, run(head, point, SEEDS[0], arguments))
        for point in [geometry | {"optim.lr": LEARNING_RATES[0]} for geometry in GEOMETRIES[head]]
    ]
    best, _ = min(tried, key=_loss)
    tried += [(point, run(head, point, SEEDS[0], arguments)) for point in _other_rates(best)]
    tried.sort(key=_loss)
    return tried, [run(head, tried[0][0], seed, arguments) for seed in SEEDS]


def _other_rates(point: Point) -> list[Point]:
    return [point | {"optim.lr": lr} for lr in LEARNING_RATES[1:]]


def _loss(row: tuple[Point, dict]) -> tuple[bool, float]:
    """Ordered by loss, after the harmonic points whose distances hardly differ: those are softmax by another name."""
    result = row[1]
    return result.get("target_over_median_distance", 0.0) > LARGEST_RATIO, result["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2), help="heads at a time, one core each")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--data", default="data/python_docs")
    arguments = parser.parse_args()
    arguments.runs_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(CONFIGS, pool.map(lambda head: search(head, arguments), CONFIGS), strict=True))

    print("| head | exponent n | initial gain | learning rate | validation loss | d target / d median |")
    print("| --- | --- | --- | --- | --- | --- |")
    for head, (tried, _) in results.items():
        for point, result in tried:
            print(_row(head, point, f"{result['loss']:.4f}", [result]))
    print("\n| head | exponent n | initial gain | learning rate | mean of three seeds (each) | d target / d median |")
    print("| --- | --- | --- | --- | --- | --- |")
    for head, (tried, seeds) in results.items():
        losses = [result["loss"] for result in seeds]
        shown = f"**{statistics.mean(losses):.4f}** ({', '.join(f'{loss:.4f}' for loss in losses)})"
        print(_row(head, tried[0][0], shown, seeds))


def _row(head: str, point: Point, loss: str, results: list[dict]) -> str:
    ratios = [r["target_over_median_distance"] for r in results if "target_over_median_distance" in r]
    ratio = f"{statistics.mean(ratios):.3f}" if ratios else ""
    exponent = point.get("model.head.exponent", "")
    return f"| {head} | {exponent} | {point['model.head.final_norm_gain']} | {point['optim.lr']} | {loss} | {ratio} |"


if __name__ == "__main__":
    main()
