"""Compare configurations: train matched runs of each, then write a table and a report.

    python -m hgpt.compare --config A.toml B.toml --seeds 3 --sweep optim.lr=1e-3,3e-3,6e-3 --out comparisons/heads
    python -m hgpt.compare --config A.toml --vary model.head.exponent=16,32,64 --set train.steps=200 --out comparisons/n

An arm is a configuration; with --vary, a configuration with one of the values. Each arm is trained with the first seed
at all points of its sweeps (with --search coordinate at fewer). The point with the lowest validation loss is then
trained with the other seeds. The data, their order, the number of steps and the seeds must be the same in all arms.
Every run is checked before the first one trains: its settings, exponent, distance, files and data. After an
interruption the same command resumes; finished runs are kept. A diverging run is a result, "failed"; a run that stops
for another reason is named at the end of its stage, and the same command tries it again.
"""

import argparse
import csv
import functools
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hgpt.interpret  # isort: skip  (first: it names the extra that brings a missing package)
import torch
from scipy import stats
from tqdm import tqdm

from hgpt.cli import Parser, at_least_1, markdown, shown
from hgpt.cli import run as run_command
from hgpt.data.batches import accumulation_steps
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.errors import UserError
from hgpt.history import DIVERGED, number_in, records
from hgpt.interpret.drawing import measure_against_loss, save_figure
from hgpt.interpret.report import READABILITY, analyse, readability, restricted, write_report
from hgpt.interpret.statistics import holm
from hgpt.interpret.subject import AnalysisSettings
from hgpt.model.harmonized import model_class
from hgpt.run.checkpoint import checkpoint_step, checkpoints
from hgpt.run.config import RunConfig
from hgpt.run.energy import check_country
from hgpt.run.evaluation import evaluation_windows
from hgpt.run.settings import CONFIG_FILE, load_run_config, settings, write_toml
from hgpt.source import check_teacher, check_tokenizer, shape_of

TRAIN = Path(hgpt.__file__).parent.parent / "train.py"
RESULT_FILE = "comparison.json"
CONFIDENCE = 0.95

# Runs are waited for in threads. One thread at a time reads a configuration, which may execute its distance_file.
_PARSING = threading.Lock()

# Settings that must be the same in all runs, or they could cause a difference between two arms.
MATCHED = ("data.", "train.steps", "train.global_batch", "train.seed")
# Settings in which a finished run may differ, because no result depends on them.
FREE = ("name", "runs_dir", "resume", "data.verify", "log.", "checkpoint.", "train.micro_batch")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`[ARM:]KEY=V1,V2`: a setting and its values, for every arm or for those of the configuration ARM."""

    arm: str | None
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A configuration file, settings that override some of its own, and the points of the sweeps."""

    name: str
    file: str
    fixed: dict[str, str]
    points: tuple[dict[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An ended run: its last evaluation, or None and the message if it diverged."""

    folder: Path
    evaluation: dict[str, float] | None
    message: str = ""

    @property
    def loss(self) -> float:
        """Validation loss in nats per token; infinite for a run that diverged, which is never the best."""
        return float("inf") if self.evaluation is None else self.evaluation["loss"]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Train the missing runs, write the table and the report, and return the content of comparison.json."""
    out = Path(options.out).resolve()  # absolute, so that train.py and the report find the runs from any folder
    arms = build_arms(options.config, options.vary, options.sweep, options.set)
    check_matched({run_name(arm, point, 0): run_config(arm, point, 0, out) for arm in arms for point in arm.points})
    for arm, seed in itertools.product(arms, range(options.seeds)):
        for config in (run_config(arm, point, seed, out) for point in arm.points):
            outcome_of(config)  # UserError if the folder holds another run
            if seed == 0:
                check_run(config)
    if not TRAIN.is_file():
        raise UserError(
            f"there is no {TRAIN}: hgpt.compare trains with the train.py of the checkout; install hgpt from one with "
            "pip install -e ."
        )

    slots = run_slots(options.gpus, options.jobs)
    tuned = tune(arms, options.search, slots, out)
    best = {arm.name: best_point(arm, tuned) for arm in arms}
    alive = [arm for arm in arms if tuned[run_name(arm, best[arm.name], 0)].evaluation is not None]
    if not alive:
        raise UserError(f"every run diverged; see {out / 'logs'}. Lower the learning rates of the sweep.")
    again = [run_config(arm, best[arm.name], seed, out) for arm in alive for seed in range(1, options.seeds)]
    outcomes = tuned | train_all(again, slots, out, "seeds")

    table = [row(arm, best[arm.name], outcomes, options.seeds) for arm in arms]
    add_differences(table)
    runs = {name: asdict(outcome) | {"folder": str(outcome.folder)} for name, outcome in sorted(outcomes.items())}
    result = {"command": ["python", "-m", "hgpt.compare", *options.argv], "arms": table, "runs": runs}
    write_tables(out, result)
    print((out / "table.md").read_text(encoding="utf-8"))
    if not options.no_report:
        report(out, table, outcomes, options.relations)
    return result


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m hgpt.compare", __doc__)
    add = parser.add_argument_group("what is compared").add_argument
    axes: dict[str, Any] = {"action": "append", "default": [], "metavar": "[ARM:]KEY=V1,V2"}
    add("--config", nargs="+", required=True, metavar="FILE", help="TOML files; each is an arm")
    add("--vary", **axes, help="one arm per value; ARM, a file's name without .toml, limits it to one file")
    add(
        "--sweep",
        **axes,
        help="each arm takes the best of these values; several sweeps make a grid. A sweep of optim.lr keeps the "
        "configuration's ratio of optim.min_lr to optim.lr",
    )
    add(
        "--search",
        choices=("grid", "coordinate"),
        default="grid",
        help="grid: every combination of the sweeps. coordinate: one sweep after the other, in the order given, "
        "starting at the middle values: fewer runs, but misses values that are good only together (default: "
        "%(default)s)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every arm")
    add = parser.add_argument_group("how it is trained, and what is written").add_argument
    add("--seeds", type=at_least_1, default=3, metavar="N", help="runs of each arm's best point (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="folder for the runs, the table and the report")
    add("--gpus", nargs="+", metavar="ID", help="one run at a time on each of these GPUs (default: one run at a time)")
    add("--jobs", type=at_least_1, metavar="N", help="N runs at a time, which share the CPU's cores; for small models")
    add("--relations", metavar="DIR", help="folder of relation sets for the report (default: those of hgpt)")
    add("--no-report", action="store_true", help="only train, and print the table")
    options = parser.parse_args(argv)
    options.argv = list(argv)
    if options.jobs is not None and options.gpus:
        raise UserError("--jobs is for the CPU and --gpus for GPUs; leave one out")
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
    """The `Axis` of [ARM:]KEY=V1,V2. Raises UserError that names the `option` of the command line."""
    match = re.fullmatch(r"(?:(?P<arm>[\w.-]+):)?(?P<key>[\w.]+)=(?P<values>.+)", text)
    if match is None:
        raise UserError(f"{option} takes [ARM:]KEY=V1,V2, for example optim.lr=1e-3,3e-3; got {text!r}")
    values = tuple(value.strip() for value in match["values"].split(","))
    if not all(values) or len(set(values)) < len(values):
        raise UserError(f"{option} {text!r}: the values must be different and not empty")
    if match["key"] in ("name", "runs_dir", "resume"):
        raise UserError(f"{option} {text!r}: hgpt.compare names the runs itself; leave {match['key']} out")
    if match["key"] == "train.seed" and option != "--set":
        raise UserError(f"{option} {text!r}: every arm gets the same seeds; say how many with --seeds")
    return Axis(arm=match["arm"], key=match["key"], values=values)


# ------------------------------------------------------------------------------------------------------------
# The grid


def build_arms(files: Sequence[str], vary: Sequence[Axis], sweep: Sequence[Axis], fixed: Sequence[Axis]) -> list[Arm]:
    """One arm for each configuration and each combination of its --vary values. Raises UserError."""
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
    """Every combination of the values of the axes."""
    lines = [[(axis.key, value) for value in axis.values] for axis in axes]
    return [dict(point) for point in itertools.product(*lines)]


def short(key: str, value: str) -> str:
    """A setting as part of a folder name: `exponent2xsqrt_dim` for model.head.exponent = 2*sqrt_dim."""
    return key.rsplit(".", 1)[-1] + re.sub(r"[^\w.+-]", "", value.replace("*", "x"))


def run_name(arm: Arm, point: dict[str, str], seed: int) -> str:
    """The name of a run and its folder: ARM-SETTINGS-seedN, where N counts seeds from 0."""
    return "-".join([arm.name, *(short(key, value) for key, value in point.items()), f"seed{seed}"])


def run_config(arm: Arm, point: dict[str, str], seed: int, out: Path) -> RunConfig:
    """The configuration of one run; `seed` is added to the configuration's train.seed."""
    chosen, base = arm.fixed | point, configured(arm.file, **arm.fixed)
    if "optim.lr" in point and "optim.min_lr" not in chosen:
        chosen["optim.min_lr"] = repr(float(point["optim.lr"]) * base.optim.min_lr / base.optim.lr)
    chosen |= {"train.seed": str(base.train.seed + seed), "name": run_name(arm, point, seed)}
    return configured(arm.file, **chosen, runs_dir=str(out / "runs"), resume="auto")


@functools.cache  # parsing takes a tenth of a second, and a grid has many runs
def configured(file: str, **chosen: str) -> RunConfig:
    """A configuration file with some settings replaced."""
    return load_run_config(["--config", file, *(f"--{key}={value}" for key, value in chosen.items())], shape_of)


def check_matched(configs: dict[str, RunConfig]) -> None:
    """Raise UserError, naming the setting, unless the settings in `MATCHED` are the same in all runs."""
    found = {name: settings(config) for name, config in configs.items()}
    keys = sorted({key for values in found.values() for key in values if key.startswith(MATCHED)})
    for key in keys:
        first = {json.dumps(values.get(key)): name for name, values in reversed(found.items())}  # value → first run
        if len(first) > 1:
            listed = ", ".join(f"{value} in {name}" for value, name in reversed(first.items()))
            raise UserError(
                f"the runs must be trained on the same tokens in the same order, but {key} is {listed}: give all of "
                f"them one value with --set {key}=VALUE"
            )


# ------------------------------------------------------------------------------------------------------------
# Training


def run_slots(gpus: Sequence[str] | None, jobs: int | None) -> list[dict[str, str]]:
    """One entry for each run that can train at the same time: the variables to add to its environment."""
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    if jobs is None:
        return [{}]
    threads = max(1, torch.get_num_threads() // jobs)
    return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}] * jobs


def tune(arms: Sequence[Arm], search: str, slots: Sequence[dict[str, str]], out: Path) -> dict[str, Outcome]:
    """Train the points of each arm with the first seed, by --search; returns the outcomes by run name."""
    tuned: dict[str, Outcome] = {}

    def train_points(points: Mapping[str, Sequence[dict[str, str]]], stage: str) -> None:
        configs = [run_config(arm, point, 0, out) for arm in arms for point in points[arm.name]]
        tuned.update(train_all([config for config in configs if config.name not in tuned], slots, out, stage))

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
    """The values of each swept setting, in the order of the command line."""
    return {key: list(dict.fromkeys(point[key] for point in arm.points)) for key in arm.points[0]}


def check_run(config: RunConfig) -> None:
    """Raise UserError, naming the run, where train.py would before its first step: data, batches, head, init_from."""
    data, train = config.data, config.train
    try:
        check_country(config.log.energy_country)
        splits = [TokenShards.open(data.path, split, data.vocab_size) for split in SPLITS]
        evaluation_windows(splits[1], data.seq_len)
        accumulation_steps(train.global_batch, train.micro_batch, world_size=1)
        vocab_size, end_of_text = splits[0].vocab_size, splits[0].end_of_text
        model = config.model.to_hf(vocab_size=vocab_size, seq_len=data.seq_len, end_of_text=end_of_text)
        with torch.device("meta"):
            model_class(model)(model)
        if config.model.init_from is not None:
            check_tokenizer(config.model.init_from, splits[0])
        if train.distill_from is not None:
            check_teacher(train.distill_from, splits[0], data.seq_len)
    except UserError as error:
        raise UserError(f"{config.name}: {error}") from error


def train_all(
    configs: Sequence[RunConfig], slots: Sequence[dict[str, str]], out: Path, stage: str
) -> dict[str, Outcome]:
    """Train every run that has not finished, one at a time in each slot; returns the outcomes by run name.

    Raises UserError at the end that names each run that stopped for another reason than a non-finite loss.
    """
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    outcomes: dict[str, Outcome] = {}
    failed: list[str] = []  # a line for each run to be tried again
    diverged: list[str] = []

    def train_one(config: RunConfig) -> None:
        slot = free.get()
        try:
            outcomes[config.name] = train(config, slot, out)
            if outcomes[config.name].evaluation is None:
                diverged.append(config.name)
        except UserError as error:
            failed.append(str(error))
        finally:
            free.put(slot)
            if failed or diverged:
                bar.set_postfix(failed=len(failed) + len(diverged))
            bar.update()

    with (
        tqdm(total=len(configs), desc=stage, unit="run", disable=not configs) as bar,
        ThreadPoolExecutor(len(slots)) as pool,
    ):
        try:
            list(pool.map(train_one, configs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        end = f"{len(failed)} of {len(configs)} runs failed; the same command tries them again"
        raise UserError("\n".join([*failed, end]))
    return outcomes


def train(config: RunConfig, slot: dict[str, str], out: Path) -> Outcome:
    """Train one run with train.py, unless it has finished or diverged before.

    A non-finite loss is a result. Raises UserError for any other failure: the same command tries the run again.
    """
    if outcome := outcome_of(config):
        return outcome
    for name in ("configs", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    file, log = out / "configs" / f"{config.name}.toml", out / "logs" / f"{config.name}.log"
    write_toml(config, file)
    # Runs of the same shape share compiled code (train.compile), also after a restart elsewhere.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out / "compiled")} | slot
    with log.open("a", encoding="utf-8") as stream:
        command = [sys.executable, str(TRAIN), "--config", str(file)]
        status = subprocess.run(command, env=environment, stdout=stream, stderr=stream).returncode
    if status == 130:
        raise KeyboardInterrupt
    if outcome := outcome_of(config):
        return outcome
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    raise UserError(f"the run {config.name} stopped with status {status}: {message} (the whole output: {log})")


def outcome_of(config: RunConfig) -> Outcome | None:
    """The outcome of a run that diverged or evaluated its last step; None for any other run.

    Raises UserError if the folder holds such a run with other settings.
    """
    folder = config.run_folder
    end = next((record for record in reversed(records(folder)) if record["kind"] in ("eval", DIVERGED)), None)
    if end is None:
        return None
    if end["kind"] == DIVERGED:
        outcome = Outcome(folder=folder, evaluation=None, message=str(end.get("message", "")))
    else:
        numbers = {key: number_in(end, key) for key in end if key not in ("step", "time")}
        evaluation = {key: value for key, value in numbers.items() if value is not None}
        saved = max(map(checkpoint_step, checkpoints(folder)), default=-1)
        if min(end["step"], saved) < config.train.steps or "loss" not in evaluation:
            return None
        outcome = Outcome(folder=folder, evaluation=evaluation)
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
    return outcome


# ------------------------------------------------------------------------------------------------------------
# The table


def row(arm: Arm, best: dict[str, str], outcomes: dict[str, Outcome], seeds: int) -> dict[str, Any]:
    """The results of one arm: its best point, the losses of its seeds, their mean and spread, and other means."""
    names = [run_name(arm, best, seed) for seed in range(seeds)]
    runs = [outcomes.get(name) for name in names]  # of an arm that failed, only the points with the first seed
    evaluations = [run.evaluation for run in runs if run is not None and run.evaluation is not None]
    losses = [evaluation["loss"] for evaluation in evaluations]
    folders = [run.folder for run in runs if run is not None]
    tried = [(point, outcomes.get(run_name(arm, point, 0))) for point in arm.points]
    measured = set.intersection(*map(set, evaluations)) - {"loss"} if evaluations else set()
    return {
        "arm": arm.name,
        "config": arm.file,
        "settings": arm.fixed,
        "best": best,
        "at_the_edge": [k for k, values in swept_values(arm).items() if losses and at_the_edge(values, best[k])],
        "tried": [{"point": point, "loss": finite(run.loss)} for point, run in tried if run is not None],
        "runs": [name for name in names if name in outcomes],
        "losses": [None if run is None else finite(run.loss) for run in runs],
        "mean": mean_or_none(losses),
        "sd": statistics.stdev(losses) if len(losses) > 1 else None,
        "interval": t_interval(losses),
        "gradient_norm_spread": mean_or_none(map(gradient_norm_spread, folders)),
        "tokens_per_second": median_tokens_per_second(folders),
        "joules_per_token": mean_or_none(map(joules_per_token, folders)),
        "diagnostics": {key: statistics.mean(found[key] for found in evaluations) for key in sorted(measured)},
    }


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def gradient_norm_spread(folder: Path) -> float | None:
    """sd / mean of the logged gradient norms, before clipping, in the second half of training.

    Leaves out the warm-up and the initial drop of the loss. None for fewer than two values.
    """
    norms = [(r["step"], norm) for r in records(folder, "train") if (norm := number_in(r, "grad_norm")) is not None]
    late = [norm for step, norm in norms if 2 * step > norms[-1][0]]
    return statistics.stdev(late) / statistics.mean(late) if len(late) > 1 else None


def median_tokens_per_second(folders: Sequence[Path]) -> float | None:
    """Median of all logged values without each run's first, which contains the start-up.

    Logged values exclude evaluations and checkpoints.
    """
    logged = [[number_in(line, "tokens_per_second") for line in records(f, "train")] for f in folders]
    rates = [rate for values in logged for rate in values[1:] if rate is not None]
    return statistics.median(rates) if rates else None


def joules_per_token(folder: Path) -> float | None:
    """Energy per training token in J; None if it was not measured (log.energy_country)."""
    measured = [value for r in records(folder, "energy") if (value := number_in(r, "tokens_per_joule"))]
    return 1 / measured[-1] if measured else None


def best_point(arm: Arm, tuned: dict[str, Outcome]) -> dict[str, str]:
    """The tried point with the lowest validation loss with the first seed."""
    tried = [point for point in arm.points if run_name(arm, point, 0) in tuned]
    return min(tried, key=lambda point: tuned[run_name(arm, point, 0)].loss)


def finite(value: float) -> float | None:
    """`value`, or None for infinity, which JSON does not have."""
    return None if value == float("inf") else value


def at_the_edge(values: Sequence[str], best: str) -> bool:
    """Whether the best of several numbers is the smallest or largest: a better one may lie beyond."""
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
    """Add to each row but the first its loss minus that of the first arm, Student's interval, and Holm's p.

    Losses are paired by seed: both runs of a pair see the data in the same order, so the noise of the order cancels.
    """
    p_values = []
    for entry in table[1:]:
        pairs = zip(entry["losses"], table[0]["losses"], strict=True)
        differences = [own - first for own, first in pairs if own is not None and first is not None]
        entry["difference"] = mean_or_none(differences)
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
            shown(entry["mean"], ".4f", "failed"),
            "" if entry["interval"] is None else "{:.4f} to {:.4f}".format(*entry["interval"]),
            shown(entry["sd"], ".4f", ""),
            ", ".join(shown(loss, ".4f", "failed") for loss in entry["losses"]),
            difference_text(entry.get("difference"), entry.get("difference_interval")),
            shown(entry.get("difference_p_holm"), ".3f", ""),
        ]
        for entry in table
    ]
    notes = NOTES
    if failed := [name for name, run in result["runs"].items() if run["evaluation"] is None]:
        notes += f" Failed, because the loss was not finite: {', '.join(failed)}."
    for name, title, form, note in MEASURED:
        if any(entry[name] is not None for entry in table):
            notes += note
            header.append(title)
            for cells, entry in zip(rows, table, strict=True):
                cells.append(shown(entry[name], form, ""))
    (out / "table.md").write_text(f"{markdown([header, *rows])}\n\n{notes}\n", encoding="utf-8")
    write_csv(out / "table.csv", [header, *rows])


NOTES = (
    "Losses in nats per token over the validation set. Intervals: Student's, over seeds; differences are paired by "
    "seed. The best point was chosen with the first seed and on the same validation set, so the loss of every arm is a "
    "little too low. (edge): the best value is the smallest or largest one tried; a better one may lie beyond."
)
# Optional columns, for values that only some runs log: key, title, format, and text for the notes.
MEASURED = (
    ("gradient_norm_spread", "gradient norm, sd / mean", ".2f", ""),
    (
        "tokens_per_second",
        "tokens/s",
        ",.0f",
        " Gradient norms: second half of the training, before clipping. tokens/s: median, without evaluation.",
    ),
    (
        "joules_per_token",
        "J per token",
        ".3g",
        " J per token: energy of the whole machine, evaluations included, over training tokens; each of two runs at "
        "the same time counts the whole machine. metrics.jsonl says whether energy was measured or estimated.",
    ),
)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """A table as CSV. Cells that a spreadsheet would run as formulas get an apostrophe; negative numbers stay."""
    safe = [[re.sub(r"^(?=[=@\t\r]|[+-](?!\d))", "'", cell) if isinstance(cell, str) else cell for cell in row]
            for row in rows]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(safe)


def difference_text(mean: float | None, interval: tuple[float, float] | None) -> str:
    return shown(mean, "+.4f", "") + ("" if interval is None else " ({:+.4f} to {:+.4f})".format(*interval))


# ------------------------------------------------------------------------------------------------------------
# The report


def report(out: Path, table: Sequence[dict[str, Any]], outcomes: dict[str, Outcome], relations: str | None) -> None:
    """Analyse the runs at the best points; write the report page, the figure and the tables of readability."""
    runs = [(entry, name) for entry in table for name in entry["runs"] if outcomes[name].evaluation is not None]
    # The first seed of each arm comes first: the page shows these runs, the figure and the tables show all runs.
    runs.sort(key=lambda run: run[0]["runs"].index(run[1]))
    shown = len({entry["arm"] for entry, _ in runs})
    analysis = analyse(
        [str(outcomes[name].folder) for _, name in runs], AnalysisSettings(relations=relations), checkpoints=False
    )
    rows = []
    for (entry, name), model in zip(runs, analysis.models, strict=True):
        about = {"arm": entry["arm"], "run": name, "exponent": model.exponent, "seed": entry["runs"].index(name)}
        rows.append({**about, "loss": outcomes[name].loss, **readability(model)})
    source = (
        f"{len(rows)} runs, {len(table)} arms, each at its own best point. Validation loss at the last step; other "
        f"measures on {analysis.evaluated_tokens:,} validation tokens of: {analysis.data_source}. One point a run."
    )
    save_figure(measure_against_loss(rows, READABILITY, source), out, "readability")
    write_csv(out / "readability.csv", [list(rows[0]), *(list(row.values()) for row in rows)])
    (out / "readability.md").write_text(readability_table(rows), encoding="utf-8")
    page = write_report(restricted(analysis, shown), out / "report")
    print(f"{page}\n{out / 'readability.png'}")


def readability_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds of each arm, then the differences from the first arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    runs = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    first = {row["seed"]: row for row in runs[arms[0]]}

    def mean_and_spread(arm: str, key: str) -> str:
        values = [row[key] for row in runs[arm] if row[key] is not None]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}" if values else ""

    def difference(arm: str, key: str) -> str:
        pairs = [(row[key], first.get(row["seed"], {}).get(key)) for row in runs[arm]]
        differences = [own - other for own, other in pairs if None not in (own, other)]
        return difference_text(mean_or_none(differences), t_interval(differences))

    names = {"loss": "validation loss", **{key: " ".join(label.split()) for key, label in READABILITY.items()}}
    means = [[label, *(mean_and_spread(arm, key) for arm in arms)] for key, label in names.items()]
    text = f"{markdown([['measure', *arms], *means])}\n\nMean ± standard deviation over seeds.\n"
    if len(arms) > 1:
        differences = [[label, *(difference(arm, key) for arm in arms[1:])] for key, label in names.items()]
        text += "\n" + markdown([[f"minus {arms[0]}", *arms[1:]], *differences])
        text += "\n\nPaired by seed, Student's 95 % interval; not corrected for the number of measures and arms.\n"
    return text


def main(argv: Sequence[str]) -> None:
    """Run the command line. Raises UserError."""
    compare(parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="interrupted; the same command resumes"))
