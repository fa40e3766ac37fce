"""Harmonic against softmax on the quickstart corpus, each at its own best initial gain and learning rate.

    python -m benchmarks.quickstart_sweep [--jobs 2] [--runs-dir runs/sweep]
    python -m benchmarks.quickstart_sweep --report           # only the table of the runs that have finished

Trains configs/quickstart.toml and configs/quickstart_softmax.toml with one seed at every point below, then with the
other seeds at the best point of each head with the embeddings of the shipped configuration, tied or not, and for the
harmonic head with distances that are used. Finished runs are kept and not repeated. One run takes one core for about
four minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hgpt.history import records

CONFIGS = {"harmonic": "configs/quickstart.toml", "softmax": "configs/quickstart_softmax.toml"}
SEEDS = (1337, 1338, 1339)
LARGEST_RATIO = 0.8  # of the distance to the target to the median distance; above it distances hardly differ

Point = tuple[bool, str, float, float]  # tied, exponent (empty for softmax), initial gain, learning rate
# A cross: gains at one learning rate, learning rates at one gain, other exponents and untied embeddings.
POINTS: dict[str, list[Point]] = {
    "harmonic": [
        (True, "34", 0.2, 1e-2),
        (True, "34", 0.1, 1e-2),
        (True, "34", 0.4, 1e-2),
        (True, "34", 0.2, 7e-3),
        (True, "34", 0.2, 1.5e-2),
        (True, "2*sqrt_dim", 0.2, 1e-2),
        (True, "4*sqrt_dim", 0.2, 1e-2),
        (False, "34", 0.2, 1e-2),
    ],
    "softmax": [
        (True, "", 1.0, 1e-2),
        (True, "", 0.5, 1e-2),
        (True, "", 1.8, 1e-2),
        (True, "", 3.0, 1e-2),
        (True, "", 1.0, 7e-3),
        (True, "", 1.0, 1.5e-2),
        (False, "", 1.0, 1e-2),
    ],
}


def run(head: str, point: Point, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one point; returns its last evaluation."""
    tied, exponent, gain, lr = point
    number = exponent.replace("*sqrt_dim", "")
    folder = arguments.runs_dir / f"{head}{number}-{'tied' if tied else 'untied'}-gain{gain:g}-lr{lr:g}-seed{seed}"
    finished = folder / "finished"
    if not finished.exists():
        settings = {
            "name": folder.name,
            "runs_dir": arguments.runs_dir,
            "resume": "auto",
            "data.path": arguments.data,
            "model.tie_word_embeddings": str(tied).lower(),
            "model.head.final_norm_gain": gain,
            "train.seed": seed,
            "optim.lr": lr,
            "optim.min_lr": lr / 10,
            "eval.every": 100_000,
            "eval.unigram_baseline": "false",
            "checkpoint.every": 100_000,
        } | ({"model.head.exponent": exponent} if exponent else {})
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
    result = last_evaluation(folder)
    print(f"{folder.name}: {result['loss']:.4f}", file=sys.stderr, flush=True)
    return result


def last_evaluation(folder: Path) -> dict[str, float]:
    return records(folder, "eval")[-1]


def report(runs_dir: Path) -> None:
    """One row for each point that was run, the best first, the mean over its seeds."""
    rows: dict[tuple, list[tuple[int, dict]]] = defaultdict(list)
    for finished in runs_dir.glob("*/finished"):
        config = tomllib.loads((finished.parent / "config.toml").read_text())
        head, model = config["model"]["head"], config["model"]
        tied = "tied" if model["tie_word_embeddings"] else "untied"
        point = (head["type"], tied, head.get("exponent", ""), head["final_norm_gain"], config["optim"]["lr"])
        rows[point].append((config["train"]["seed"], last_evaluation(finished.parent)))
    print("| head | embeddings | exponent n | initial gain | learning rate | validation loss | seeds | d ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for point, results in sorted(rows.items(), key=lambda row: (row[0][:2], _mean(row[1], "loss"))):
        ratio = f"{_mean(results, 'target_over_median_distance'):.3f}" if point[0] == "harmonic" else ""
        each = ", ".join(f"{result['loss']:.4f}" for _, result in sorted(results, key=lambda seed: seed[0]))
        print(f"| {' | '.join(map(str, point))} | {_mean(results, 'loss'):.4f} | {each} | {ratio} |")


def _mean(results: list[tuple[int, dict]], name: str) -> float:
    return statistics.mean(result[name] for _, result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--data", default="data/python_docs")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        arguments.runs_dir.mkdir(parents=True, exist_ok=True)
        jobs = [(head, point) for head, points in POINTS.items() for point in points]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(lambda job: run(*job, SEEDS[0], arguments), jobs))
            best = [_best(head, jobs, results) for head in POINTS]
            list(pool.map(lambda job: run(*job, arguments), [(*job, seed) for seed in SEEDS for job in best]))
    report(arguments.runs_dir)


def _best(head: str, jobs: list[tuple[str, Point]], results: list[dict]) -> tuple[str, Point]:
    """The job of `head` with the lowest loss among those with the shipped embeddings whose distances are used."""
    shipped = tomllib.loads(Path(CONFIGS[head]).read_text())["model"].get("tie_word_embeddings", True)
    candidates = [
        (result["loss"], job)
        for job, result in zip(jobs, results, strict=True)
        if job[0] == head and job[1][0] == shipped
        if result.get("target_over_median_distance", 0.0) < LARGEST_RATIO
    ]
    return min(candidates)[1]


if __name__ == "__main__":
    main()
