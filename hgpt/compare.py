"""A comparison as an experiment: a matched grid of training runs, one table, one report.

    python -m hgpt.compare --config A.toml B.toml --seeds 3 --sweep optim.lr=1e-3,3e-3,6e-3 --out comparisons/heads

Every arm (a configuration, or with --vary one for each value) is trained at every point of its sweep with the first
seed, or with --search coordinate at fewer; the point with the lowest validation loss is then trained with the other
seeds. Data, order of the data, number of steps and seeds are the same in each arm, or nothing is trained. What has
finished is kept: the same command goes on where it stopped.
"""

import argparse
import csv
import itertools
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tqdm import tqdm

import hgpt
from hgpt.cli import Parser
from hgpt.cli import run as run_command
from hgpt.errors import UserError
from hgpt.history import records
from hgpt.interpret.drawing import measure_against_loss, save_figure
from hgpt.interpret.report import READABILITY, analyse, readability, restricted, write_report
from hgpt.interpret.statistics import holm
from hgpt.interpret.subject import AnalysisSettings
from hgpt.run.checkpoint import LATEST, MODEL
from hgpt.run.config import RunConfig
from hgpt.run.settings import CONFIG_FILE, load_run_config, settings, write_toml

TRAIN = Path(hgpt.__file__).parent.parent / "train.py"
RESULT_FILE = "comparison.json"
CONFIDENCE = 0.95

# Runs on several GPUs are watched from threads, and jsonargparse's parsers share state.
_PARSING = threading.Lock()

# What has to be the same for a difference between two arms to be the arms'.
MATCHED = ("data.", "train.steps", "train.global_batch", "train.seed")
# What may differ between a finished run and the one that is wanted, since nothing that it measures depends on it.
FREE = ("name", "runs_dir", "resume", "data.verify", "log.", "checkpoint.", "train.micro_batch")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`[ARM:]KEY=V1,V2`: a setting and the values it takes, in every arm or in those whose configuration is ARM."""

    arm: str | None
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of the comparison: a configuration, settings on top of it, and the points at which it is tuned."""

    name: str
    file: str
    fixed: dict[str, str]
    points: tuple[dict[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that is over: its last evaluation, or the message with which it stopped."""

    folder: Path
    evaluation: dict[str, float] | None
    message: str = ""

    @property
    def loss(self) -> float:
        """Validation loss in nats per token; infinite where the run failed, so that it is never the best."""
        return float("inf") if self.evaluation is None else self.evaluation["loss"]


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    compare(parse_arguments(argv))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, write the table and the report; returns what comparison.json holds."""
    out = Path(options.out).resolve()  # jsonargparse changes the working directory for a moment, in other threads too
    arms = build_arms(options.config, options.vary, options.sweep, options.set)
    check_matched({run_name(arm, point, 0): run_config(arm, point, 0, out) for arm in arms for point in arm.points})
    if not TRAIN.is_file():
        raise UserError(
            f"there is no {TRAIN}: hgpt.compare trains with the train.py of the checkout; install hgpt from one with "
            "pip install -e ."
        )

    places = run_places(options.gpus, options.jobs)
    # Tuned with the first seed, then the best point of each arm with the others.
    tuned = tune(arms, options.search, places, out)
    best = {arm.name: best_point(arm, tuned) for arm in arms}
    for arm in arms:
        if tuned[run_name(arm, best[arm.name], 0)].evaluation is None:
            raise UserError(
                f"every run of the arm {arm.name} failed; see {out / 'logs'}. Lower the learning rates of the sweep."
            )
    again = [run_config(arm, best[arm.name], seed, out) for arm in arms for seed in range(1, options.seeds)]
    outcomes = tuned | train_all(again, places, out, "seeds")

    table = [row(arm, best[arm.name], outcomes, options.seeds) for arm in arms]
    add_differences(table)
    result = {
        "command": ["python", "-m", "hgpt.compare", *options.argv],
        "arms": table,
        "runs": {
            name: {"folder": str(outcome.folder), "evaluation": outcome.evaluation, "message": outcome.message}
            for name, outcome in sorted(outcomes.items())
        },
    }
    write_tables(out, result)
    print((out / "table.md").read_text(encoding="utf-8"))
    if not options.no_report:
        report(out, table, outcomes, options.relations)
    return result


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m hgpt.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="TOML files; each is an arm")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="[ARM:]KEY=V1,V2",
        help="one arm for each value, reported on its own; ARM limits it to the configuration of that file name",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="[ARM:]KEY=V1,V2",
        help="values among which each arm takes its best; several sweeps make a grid. Sweeping optim.lr moves "
        "optim.min_lr along, in the proportion of the configuration",
    )
    parser.add_argument(
        "--search",
        choices=("grid", "coordinate"),
        default="grid",
        help="grid: every combination of the sweeps. coordinate: one sweep after the other in the order given, at the "
        "best values so far, at first the middle ones; fewer runs, and blind to values that are good together only "
        "(default: %(default)s)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every arm")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm's best point (default: 3)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs, the table and the report")
    parser.add_argument(
        "--gpus", nargs="+", metavar="ID", help="one run at a time on each of these GPUs (default: one run at a time)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time on the CPU, each with its share of the processors: small models train faster side by side",
    )
    parser.add_argument("--relations", metavar="DIR", help="relation sets of the report (default: those that ship)")
    parser.add_argument("--no-report", action="store_true", help="only train, and print the table")
    options = parser.parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1; got {options.seeds}")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1; got {options.jobs}")
    if options.jobs is not None and options.gpus:
        raise UserError("--jobs is for the CPU and --gpus says where runs go otherwise; leave one out")
    if options.relations is not None and options.no_report:
        raise UserError("--relations has no effect with --no-report; leave one out")
    options.vary = [parse_axis(text, "--vary") for text in options.vary]
    options.sweep = [parse_axis(text, "--sweep") for text in options.sweep]
    options.set = [parse_axis(text, "--set") for text in options.set]
    for axis in options.set:
        if axis.arm is not None or len(axis.values) > 1:
            raise UserError(f"--set takes one KEY=VALUE for every arm; got {axis}: use --vary or --sweep")
    return options


def parse_axis(text: str, option: str) -> Axis:
    match = re.fullmatch(r"(?:(?P<arm>[\w.-]+):)?(?P<key>[\w.]+)=(?P<values>.+)", text)
    if match is None:
        raise UserError(f"{option} takes [ARM:]KEY=V1,V2, for example optim.lr=1e-3,3e-3; got {text!r}")
    values = tuple(value.strip() for value in match["values"].split(","))
    if not all(values) or len(set(values)) < len(values):
        raise UserError(f"{option} {text!r}: the values must be different and none of them empty")
    if match["key"] in ("name", "runs_dir", "resume"):
        raise UserError(f"{option} {text!r}: hgpt.compare names the runs itself; leave {match['key']} out")
    if match["key"] == "train.seed" and option != "--set":
        raise UserError(f"{option} {text!r}: every arm gets the same seeds; say how many with --seeds")
    return Axis(arm=match["arm"], key=match["key"], values=values)


# ------------------------------------------------------------------------------------------------------------
# The grid


def build_arms(files: Sequence[str], vary: Sequence[Axis], sweep: Sequence[Axis], fixed: Sequence[Axis]) -> list[Arm]:
    """Every configuration at every combination of the values it varies over."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) < len(stems):
        raise UserError(f"--config: the arms take the names of their files, which must differ; got {', '.join(stems)}")
    for axis in (*vary, *sweep):
        if axis.arm is not None and axis.arm not in stems:
            raise UserError(f"{axis.arm}:{axis.key}: there is no arm {axis.arm}; the arms are {', '.join(stems)}")
    keys = [axis.key for axis in vary]
    for axis in sweep:
        if axis.key in keys and any(axis.arm in (None, other.arm) or other.arm is None for other in vary):
            raise UserError(f"{axis.key} is varied and swept: take it out of --vary or out of --sweep")
    arms = []
    for file, stem in zip(files, stems, strict=True):
        shared = {axis.key: axis.values[0] for axis in fixed}
        points = tuple(combinations(axis for axis in sweep if axis.arm in (None, stem)))
        for varied in combinations(axis for axis in vary if axis.arm in (None, stem)):
            name = "-".join([stem, *(short(key, value) for key, value in varied.items())])
            arms.append(Arm(name=name, file=file, fixed=shared | varied, points=points))
    return arms


def combinations(axes: Iterable[Axis]) -> list[dict[str, str]]:
    axes = list(axes)
    return [
        dict(zip((axis.key for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def short(key: str, value: str) -> str:
    """`exponent2xsqrt_dim` of model.head.exponent = 2*sqrt_dim: for the name of a folder."""
    return key.rsplit(".", 1)[-1] + re.sub(r"[^\w.+-]", "", value.replace("*", "x"))


def run_name(arm: Arm, point: dict[str, str], seed: int) -> str:
    return "-".join([arm.name, *(short(key, value) for key, value in point.items()), f"seed{seed}"])


def run_config(arm: Arm, point: dict[str, str], seed: int, out: Path) -> RunConfig:
    """The configuration of one run; seed counts from 0 above the configuration's own train.seed."""
    chosen = arm.fixed | point
    base = load_run_config(["--config", arm.file, *(f"--{key}={value}" for key, value in arm.fixed.items())])
    if "optim.lr" in point and "optim.min_lr" not in chosen:
        chosen["optim.min_lr"] = repr(float(point["optim.lr"]) * base.optim.min_lr / base.optim.lr)
    chosen |= {
        "train.seed": str(base.train.seed + seed),
        "name": run_name(arm, point, seed),
        "runs_dir": str(out / "runs"),
        "resume": "auto",
    }
    return load_run_config(["--config", arm.file, *(f"--{key}={value}" for key, value in chosen.items())])


def check_matched(configs: dict[str, RunConfig]) -> None:
    """Raises UserError naming the settings that would make a difference between runs meaningless."""
    found = {name: settings(config) for name, config in configs.items()}
    keys = sorted({key for values in found.values() for key in values if key.startswith(MATCHED)})
    for key in keys:
        first = {json.dumps(values.get(key)): name for name, values in reversed(found.items())}  # where each is found
        if len(first) > 1:
            listed = ", ".join(f"{value} in {name}" for value, name in reversed(first.items()))
            raise UserError(
                f"the runs must be trained on the same tokens in the same order, but {key} is {listed}: give all of "
                f"them one value with --set {key}=VALUE"
            )


# ------------------------------------------------------------------------------------------------------------
# Training


def run_places(gpus: Sequence[str] | None, jobs: int | None) -> list[dict[str, str]]:
    """What the environment of a run has besides, for each of the runs that go on at the same time."""
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    if jobs is None:
        return [{}]
    threads = max(1, torch.get_num_threads() // jobs)
    return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}] * jobs


def tune(arms: Sequence[Arm], search: str, places: Sequence[dict[str, str]], out: Path) -> dict[str, Outcome]:
    """The runs with the first seed among which each arm has its best, by name."""
    tuned: dict[str, Outcome] = {}

    def train_points(points: Mapping[str, Sequence[dict[str, str]]], stage: str) -> None:
        configs = [run_config(arm, point, 0, out) for arm in arms for point in points[arm.name]]
        tuned.update(train_all([config for config in configs if config.name not in tuned], places, out, stage))

    if search == "grid":
        train_points({arm.name: arm.points for arm in arms}, "tuning")
        return tuned
    sweeps = {arm.name: list(swept_values(arm).items()) for arm in arms}
    middle = {name: {key: values[(len(values) - 1) // 2] for key, values in sweep} for name, sweep in sweeps.items()}
    train_points({name: [point] for name, point in middle.items()}, "middle points")
    for number in range(max(map(len, sweeps.values()))):
        best = {arm.name: best_point(arm, tuned) for arm in arms}
        line = {
            name: [best[name] | {key: value} for key, values in sweep[number : number + 1] for value in values]
            for name, sweep in sweeps.items()
        }
        train_points(line, f"sweep {number + 1}")
    return tuned


def swept_values(arm: Arm) -> dict[str, list[str]]:
    """The values of each setting that is swept, in the order given."""
    return {key: list(dict.fromkeys(point[key] for point in arm.points)) for key in arm.points[0]}


def train_all(
    configs: Sequence[RunConfig], places: Sequence[dict[str, str]], out: Path, stage: str
) -> dict[str, Outcome]:
    """Train every run that has not finished, one at a time at each place."""
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for place in places:
        free.put(place)

    def train_one(config: RunConfig) -> Outcome:
        place = free.get()
        try:
            return train(config, place, out)
        finally:
            free.put(place)
            bar.update()

    with tqdm(total=len(configs), desc=stage, unit="run") as bar, ThreadPoolExecutor(len(places)) as pool:
        try:
            outcomes = list(pool.map(train_one, configs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {config.name: outcome for config, outcome in zip(configs, outcomes, strict=True)}


def train(config: RunConfig, place: dict[str, str], out: Path) -> Outcome:
    """One run of train.py, unless it has finished or failed before."""
    folder = config.run_folder
    failure = out / "logs" / f"{config.name}.failed"
    if failure.exists():
        return Outcome(folder=folder, evaluation=None, message=failure.read_text(encoding="utf-8"))
    if evaluation := finished(config):
        return Outcome(folder=folder, evaluation=evaluation)
    for name in ("configs", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    file, log = out / "configs" / f"{config.name}.toml", out / "logs" / f"{config.name}.log"
    write_toml(config, file)
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(
            [sys.executable, str(TRAIN), "--config", str(file)], env=os.environ | place, stdout=stream, stderr=stream
        ).returncode
    if status == 130:
        raise KeyboardInterrupt
    evaluation = finished(config)
    if evaluation is not None:
        return Outcome(folder=folder, evaluation=evaluation)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    # A run that has trained and then stopped with an error has diverged, and its point is simply not the best one.
    if status == 2 and any(record["kind"] == "train" for record in records(folder)):
        failure.write_text(message, encoding="utf-8")
        return Outcome(folder=folder, evaluation=None, message=message)
    raise UserError(f"the run {config.name} stopped with status {status}: {message} (all of it is in {log})")


def finished(config: RunConfig) -> dict[str, float] | None:
    """The evaluation after the last step, None if the run is not there yet.

    Raises UserError when the folder holds a finished run with other settings.
    """
    folder = config.run_folder
    evaluations = [record for record in records(folder) if record["kind"] == "eval"]
    over = evaluations and evaluations[-1]["step"] == config.train.steps
    if not over or not (folder / LATEST / MODEL / "config.json").is_file():
        return None
    with _PARSING:
        there = settings(load_run_config(["--config", str(folder / CONFIG_FILE)]))
    wanted = settings(config)
    different = [
        f"{key}: {there.get(key)} there, {wanted.get(key)} wanted"
        for key in sorted(there.keys() | wanted.keys())
        if there.get(key) != wanted.get(key) and not key.startswith(FREE)
    ]
    if different:
        raise UserError(
            f"{folder} holds a finished run with other settings ({'; '.join(different)}): choose another --out, or "
            "delete that run"
        )
    return {key: value for key, value in evaluations[-1].items() if key not in ("kind", "step", "time")}


# ------------------------------------------------------------------------------------------------------------
# The table


def row(arm: Arm, best: dict[str, str], outcomes: dict[str, Outcome], seeds: int) -> dict[str, Any]:
    """What one arm came to: its best point, the losses of its seeds, their mean and spread."""
    runs = [outcomes[run_name(arm, best, seed)] for seed in range(seeds)]
    losses = [run.loss for run in runs if run.evaluation is not None]
    return {
        "arm": arm.name,
        "config": arm.file,
        "settings": arm.fixed,
        "best": best,
        "at_the_edge": [key for key, values in swept_values(arm).items() if at_the_edge(values, best[key])],
        "tried": [
            {"point": point, "loss": finite(outcomes[run_name(arm, point, 0)].loss)}
            for point in arm.points
            if run_name(arm, point, 0) in outcomes
        ],
        "runs": [run_name(arm, best, seed) for seed in range(seeds)],
        "losses": [finite(run.loss) for run in runs],
        "mean": statistics.mean(losses),
        "sd": statistics.stdev(losses) if len(losses) > 1 else None,
        "interval": t_interval(losses),
        "gradient_norm_spread": mean_gradient_norm_spread([run.folder for run in runs]),
        "tokens_per_second": median_tokens_per_second([run.folder for run in runs]),
        "joules_per_token": mean_joules_per_token([run.folder for run in runs]),
        "diagnostics": {
            name: statistics.mean(run.evaluation[name] for run in runs if run.evaluation is not None)
            for name in (runs[0].evaluation or {})
            if name != "loss"
        },
    }


def mean_gradient_norm_spread(folders: Sequence[Path]) -> float | None:
    """Mean over runs of sd / mean of the gradient norms that were logged in the second half of the training.

    Before clipping, and past the warm-up and the first fall of the loss; None for fewer than two such lines.
    """
    spreads = []
    for folder in folders:
        norms = [(record["step"], record["grad_norm"]) for record in records(folder) if "grad_norm" in record]
        late = [norm for step, norm in norms if 2 * step > norms[-1][0]]
        if len(late) > 1:
            spreads.append(statistics.stdev(late) / statistics.mean(late))
    return statistics.mean(spreads) if spreads else None


def median_tokens_per_second(folders: Sequence[Path]) -> float | None:
    """Over all that was logged after the first line, with its start-up; evaluation and checkpoints do not count."""
    rates = [
        record["tokens_per_second"]
        for folder in folders
        for record in [record for record in records(folder) if "tokens_per_second" in record][1:]
    ]
    return statistics.median(rates) if rates else None


def mean_joules_per_token(folders: Sequence[Path]) -> float | None:
    """Mean over runs of energy over training tokens, in J; None where it was not measured (log.energy)."""
    lines = [[record for record in records(folder) if record["kind"] == "energy"] for folder in folders]
    rates = [spent[-1]["tokens_per_joule"] for spent in lines if spent]
    return statistics.mean(1 / rate for rate in rates) if rates and all(rates) else None


def best_point(arm: Arm, tuned: dict[str, Outcome]) -> dict[str, str]:
    """The point, of those that were tried, with the lowest validation loss of the first seed."""
    tried = [point for point in arm.points if run_name(arm, point, 0) in tuned]
    return min(tried, key=lambda point: tuned[run_name(arm, point, 0)].loss)


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return None if value == float("inf") else value


def at_the_edge(values: Sequence[str], best: str) -> bool:
    """Whether the best of several numbers is the largest or the smallest: then a better one may lie beyond."""
    try:
        numbers = sorted(float(value) for value in values)
    except ValueError:
        return False
    return len(numbers) > 1 and float(best) in (numbers[0], numbers[-1])


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean, x̄ ± t_{0.975, m−1} s/√m; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return float(mean - half), float(mean + half)


def add_differences(table: list[dict[str, Any]]) -> None:
    """To each row but the first: its loss minus the first arm's, paired by seed, Student's interval, Holm's p.

    A pair shares its seed and therefore the order of its data, whose share of the noise cancels.
    """
    p_values = []
    for entry in table[1:]:
        pairs = [
            (own, first)
            for own, first in zip(entry["losses"], table[0]["losses"], strict=True)
            if own is not None and first is not None
        ]
        differences = [own - first for own, first in pairs]
        entry["difference"] = statistics.mean(differences) if differences else None
        entry["difference_interval"] = t_interval(differences)
        if len(differences) > 1 and statistics.stdev(differences) > 0:
            p_values.append((entry, float(stats.ttest_1samp(differences, 0.0).pvalue)))
    for (entry, _), adjusted in zip(p_values, holm([p for _, p in p_values]), strict=True):
        entry["difference_p_holm"] = float(adjusted)


def write_tables(out: Path, result: dict[str, Any]) -> None:
    """comparison.json, table.md and table.csv."""
    (out / RESULT_FILE).write_text(json.dumps(result, indent=1), encoding="utf-8")
    table, first = result["arms"], result["arms"][0]["arm"]
    header = ["arm", "best point", "validation loss", "95 % interval", "sd", "seeds", f"minus {first}", "p (Holm)"]
    rows = [
        [
            entry["arm"],
            ", ".join(
                f"{key.rsplit('.', 1)[-1]} {value}{' (edge)' if key in entry['at_the_edge'] else ''}"
                for key, value in entry["best"].items()
            ),
            f"{entry['mean']:.4f}",
            interval_text(entry["interval"]),
            "" if entry["sd"] is None else f"{entry['sd']:.4f}",
            ", ".join("failed" if loss is None else f"{loss:.4f}" for loss in entry["losses"]),
            difference_text(entry),
            f"{entry['difference_p_holm']:.3f}" if "difference_p_holm" in entry else "",
        ]
        for entry in table
    ]
    measured = any(entry["joules_per_token"] is not None for entry in table)
    for name, title, form in (
        ("gradient_norm_spread", "gradient norm, sd / mean", ".2f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("joules_per_token", "J per token", ".3g"),
    ):
        if any(entry[name] is not None for entry in table):
            header.append(title)
            for cells, entry in zip(rows, table, strict=True):
                cells.append("" if entry[name] is None else f"{entry[name]:{form}}")
    lines = [header, ["---"] * len(header), *rows]
    notes = (
        "Losses in nats per token over the validation set. Intervals: Student's, over seeds; differences are paired by "
        "seed. The best point was chosen on the first seed and the same validation set, which flatters every arm a "
        "little. (edge): the best value is the smallest or the largest that was tried, so a better one may lie beyond."
    )
    if "tokens/s" in header:
        notes += " Gradient norms: second half of the training, before clipping. tokens/s: median, without evaluation."
    if measured:
        notes += (
            " J per token: energy of the whole machine, evaluations included, over training tokens. The metrics.jsonl "
            "of each run says whether it was measured or estimated; of two runs at a time each counts the whole."
        )
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (out / "table.md").write_text(f"{markdown}\n\n{notes}\n", encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def difference_text(entry: dict[str, Any]) -> str:
    if entry.get("difference") is None:
        return ""
    interval = entry["difference_interval"]
    return f"{entry['difference']:+.4f}" + ("" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})")


# ------------------------------------------------------------------------------------------------------------
# The report


def report(out: Path, table: Sequence[dict[str, Any]], outcomes: dict[str, Outcome], relations: str | None) -> None:
    """The report of the first seed of each arm, and every run's readability against its loss."""
    runs = [(entry, name) for entry in table for name in entry["runs"] if outcomes[name].evaluation is not None]
    # The first run of each arm comes first: these are on the page, the others in the figure and the table only.
    runs.sort(key=lambda run: run[0]["runs"].index(run[1]))
    shown = len({entry["arm"] for entry, _ in runs})
    analysis = analyse(
        [str(outcomes[name].folder) for _, name in runs], AnalysisSettings(relations=relations), checkpoints=False
    )
    rows = [
        {
            "arm": entry["arm"],
            "run": name,
            "exponent": model.exponent,
            "seed": entry["runs"].index(name),
            "loss": outcomes[name].loss,
        }
        | readability(model)
        for (entry, name), model in zip(runs, analysis.models, strict=True)
    ]
    source = (
        f"{len(rows)} runs, {len(table)} arms, each at its own best point. Validation loss at the last step; the other "
        f"measures on {analysis.evaluated_tokens:,} validation tokens of: {analysis.data_source}. One point a run."
    )
    save_figure(measure_against_loss(rows, READABILITY, source), out, "readability")
    with (out / "readability.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "readability.md").write_text(readability_table(rows), encoding="utf-8")
    page = write_report(restricted(analysis, shown), out / "report")
    print(f"{page}\n{out / 'readability.png'}")


def readability_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over the runs of each arm, and the differences from the first arm, as Markdown."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    names = {"loss": "validation loss", **{key: " ".join(label.split()) for key, label in READABILITY.items()}}
    lines = ["| measure | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
    for key, label in names.items():
        cells = []
        for arm in arms:
            values = [row[key] for row in rows if row["arm"] == arm and row[key] is not None]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n\nMean ± standard deviation over seeds.\n"
    first = {row["seed"]: row for row in rows if row["arm"] == arms[0]}
    lines = [f"| minus {arms[0]} | " + " | ".join(arms[1:]) + " |", "| --- |" + " --- |" * len(arms[1:])]
    for key, label in names.items():
        cells = []
        for arm in arms[1:]:
            pairs = [(row[key], first.get(row["seed"], {}).get(key)) for row in rows if row["arm"] == arm]
            differences = [own - other for own, other in pairs if None not in (own, other)]
            mean = statistics.mean(differences) if differences else None
            cells.append(difference_text({"difference": mean, "difference_interval": t_interval(differences)}))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if len(arms) > 1:
        text += "\n" + "\n".join(lines)
        text += "\n\nPaired by seed, Student's 95 % interval; not corrected for the number of measures and arms.\n"
    return text


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="interrupted; the same command goes on where it stopped"))
