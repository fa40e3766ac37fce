"""Harmonic against softmax on the quickstart corpus, each at its own best learning rate and initial gain.

    python -m benchmarks.quickstart_sweep [--jobs 2] [--runs-dir runs/sweep]

Trains configs/quickstart.toml and configs/quickstart_softmax.toml once for every point of each head's grid, then the
best points of each with further seeds, and prints the tables of RESULTS.md. Finished runs are kept and not repeated. One
run takes one core for a few minutes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = {"harmonic": "configs/quickstart.toml", "softmax": "configs/quickstart_softmax.toml"}
LEARNING_RATES = (3e-3, 6e-3)
GRIDS = {
    "harmonic": [
        {"model.head.exponent": n, "model.head.final_norm_gain": gain, "optim.lr": lr}
        for n, gain, lr in itertools.product(("4*sqrt_dim", "2*sqrt_dim"), (0.05, 0.1), LEARNING_RATES)
    ],
    "softmax": [
        {"model.head.final_norm_gain": gain, "optim.lr": lr}
        for gain, lr in itertools.product((1.0, 3.0, 6.0), LEARNING_RATES)
    ],
}
SEEDS = (1337, 1338, 1339)


def run(head: str, point: dict, seed: int, arguments: argparse.Namespace) -> dict:
    """Train one point; returns its last evaluation."""
    label = "-".join(f"{name.rsplit('.', 1)[-1]}_{value}" for name, value in point.items()).replace("*", "x")
    name = f"{head}-{label}-{seed}"
    metrics = arguments.runs_dir / name / "metrics.jsonl"
    done = metrics.with_name("finished")
    if not done.exists():
        settings = point | {
            "name": name,
            "runs_dir": str(arguments.runs_dir),
            "resume": "auto",
            "data.path": arguments.data,
            "train.seed": seed,
            "optim.min_lr": point["optim.lr"] / 10,
            "eval.every": 100_000,
            "eval.unigram_baseline": False,
            "checkpoint.every": 100_000,
        }
        command = [sys.executable, "train.py", "--config", CONFIGS[head]]
        command += [
            f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()
        ]
        # Two runs of one thread each do more than one of two; spinning threads of a busy machine do far less.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done.touch()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    result = [record for record in records if record["kind"] == "eval"][-1]
    print(f"{name}: {result['loss']:.4f}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--finalists", type=int, default=2, help="points of each grid that get the further seeds")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--data", default="data/python_docs")
    arguments = parser.parse_args()
    arguments.runs_dir.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        grid = [(head, point) for pair in itertools.zip_longest(*_as_pairs()) for head, point in filter(None, pair)]
        first = list(pool.map(lambda job: run(*job, SEEDS[0], arguments), grid))
        best = []
        for head in GRIDS:
            ranked = sorted((r["loss"], i) for i, r in enumerate(first) if grid[i][0] == head)
            best += [grid[i] for _, i in ranked[: arguments.finalists]]
        jobs = [(head, point, seed) for head, point in best for seed in SEEDS]
        final = list(pool.map(lambda job: run(*job, arguments), jobs))

    print("| head | exponent n | initial gain | learning rate | validation loss | d target / d median |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (head, point), result in sorted(zip(grid, first, strict=True), key=lambda row: (row[0][0], row[1]["loss"])):
        print(_row(head, point, f"{result['loss']:.4f}", [result]))
    print("\n| head | exponent n | initial gain | learning rate | mean of three seeds (each) | d target / d median |")
    print("| --- | --- | --- | --- | --- | --- |")
    for i, (head, point) in enumerate(best):
        results = final[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        losses = [result["loss"] for result in results]
        shown = f"**{statistics.mean(losses):.4f}** ({', '.join(f'{loss:.4f}' for loss in losses)})"
        print(_row(head, point, shown, results))


def _as_pairs() -> list[list[tuple[str, dict]]]:
    return [[(head, point) for point in points] for head, points in GRIDS.items()]


def _row(head: str, point: dict, loss: str, results: list[dict]) -> str:
    ratios = [r["target_over_median_distance"] for r in results if "target_over_median_distance" in r]
    ratio = f"{statistics.mean(ratios):.3f}" if ratios else ""
    exponent = point.get("model.head.exponent", "")
    return f"| {head} | {exponent} | {point['model.head.final_norm_gain']} | {point['optim.lr']} | {loss} | {ratio} |"


if __name__ == "__main__":
    main()
