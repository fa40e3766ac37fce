"""What checkpoints cost: the share of a run's time that it waits for them, written in the background or not.

    python -m benchmarks.checkpoints [--every 50] [--steps 200] [--rounds 2] [--config FILE] [--section.key value ...]

Trains the configuration in turn without checkpoints, with checkpoints that a thread writes while training goes on
(`checkpoint.background`, the default), and with checkpoints that training waits for. Settings that this script does not
know go on to train.py. "waiting" is the share of the time in which the loop saves or waits for the writing of the
checkpoint before (`seconds_save` of metrics.jsonl); what writing takes from the same processors shows in the steps, so
the whole time is compared too. The time runs from the first step to the last: the checkpoint after it is left out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hgpt.history import records

WAYS = {"none": (False, True), "background": (True, True), "at once": (True, False)}  # (saves, background)


def run(way: str, number: int, folder: Path, options: argparse.Namespace, settings: list[str]) -> tuple[float, float]:
    """Seconds of the loop, and of these in saving."""
    saves, background = WAYS[way]
    name = f"{way.replace(' ', '_')}_{number}"
    own = {
        "name": name,
        "runs_dir": folder,
        "train.steps": options.steps,
        "checkpoint.every": options.every if saves else options.steps,
        "checkpoint.background": str(background).lower(),
        "eval.every": options.steps,
        "eval.unigram_baseline": "false",
    }
    command = [sys.executable, "train.py", "--config", options.config, *settings]
    command += [f"--{setting}={value}" for setting, value in own.items()]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr[-2000:]}")
    steps = records(folder / name, "train")
    return steps[-1]["time"] - steps[0]["time"], sum(record.get("seconds_save", 0.0) for record in steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.toml")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    options, settings = parser.parse_known_args()
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(options.rounds):
            for way, measured in results.items():
                measured.append(run(way, number, Path(temporary), options, settings))
    print(
        f"{options.config}: {options.steps} steps, checkpoints every {options.every}; {options.rounds} rounds in turn"
    )
    print("| checkpoints | seconds | seconds between two | waiting | time / none |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, measured in results.items():
        seconds = statistics.median(total for total, _ in measured)
        waiting = statistics.median(saving / total for total, saving in measured)
        ratio = statistics.median(total / none for (total, _), (none, _) in zip(measured, results["none"], strict=True))
        between = seconds / options.steps * options.every
        print(f"| {way} | {seconds:.1f} | {between:.1f} | {waiting:.2%} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
