"""List the runs in a folder, with progress, losses, speed and state, and plot their losses.

    python -m hgpt.runs runs/ --sort validation
    python -m hgpt.runs runs/quickstart runs/quickstart_softmax --plot losses.png --terminal

Everything comes from a run's files: metrics.jsonl, config.toml and checkpoints/. A folder with none of these is
searched for runs. The table reads only the end of metrics.jsonl, a plot all of it.

The first of these states that applies is shown:

    finished        the newest checkpoint is that of the last step
    preempted       SIGTERM, SIGUSR1 or SIGHUP stopped the run, and there is a checkpoint to resume from
    running         a process holds the run folder's lock. Without locks in the file system: the last record of
                    metrics.jsonl is younger than two minutes or, if that is longer, than three times the longest pause
                    between the last records, but at most half an hour
    damaged         a file of the newest checkpoint is missing, or its size is not that in the manifest
    stopped         there is a checkpoint: --resume auto resumes the run
    no checkpoint   --resume auto starts the run again

saved: the step of the newest checkpoint. val: the loss of the last evaluation, and its step. bits/B: the same in bits
per byte of text, which compares runs with different tokenizers.
"""

import json
import os
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hgpt.cli import Parser, aligned, shown
from hgpt.cli import run as run_command
from hgpt.durable import is_locked
from hgpt.errors import UserError
from hgpt.history import METRICS_FILE, newest_first, number_in, records
from hgpt.run.checkpoint import CHECKPOINTS, LOCK, MANIFEST, PREEMPTED, checkpoint_step, checkpoints
from hgpt.run.settings import CONFIG_FILE

LINE_WIDTH = 120

_RECENT_LINES = 8
_DEPTH = 3  # levels of folders that are searched for runs
_POINTS = 2000  # training losses per curve; a plot has fewer pixels

# Okabe and Ito's colours, which colour-blind people can distinguish, without yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.", ":")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


# --------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of the table; None: unknown.

    `saved`: the step of the newest checkpoint. `evaluated`: that of the last evaluation. `age`: seconds since the last
    record.
    """

    name: str
    folder: Path
    step: int | None
    steps: int | None
    saved: int | None
    training_loss: float | None
    validation_loss: float | None
    evaluated: int | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    tokens: int | None
    energy_kwh: float | None = None
    age: float | None
    state: str


def find_runs(root: Path) -> list[tuple[str, Path]]:
    """(name, folder) of the runs in `root`, or of `root` if it is a run. Raises UserError if `root` is no folder."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give a run folder or a folder of runs, such as runs/")
    if _is_run(root):
        return [(root.resolve().name, root)]
    found = []
    for path, below, _ in os.walk(root):
        folder = Path(path)
        name = folder.relative_to(root)
        below[:] = sorted(entry for entry in below if not entry.startswith("."))
        if _is_run(folder):
            found.append((name.as_posix(), folder))
        if _is_run(folder) or len(name.parts) == _DEPTH:
            below.clear()
    return found


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / CONFIG_FILE).is_file() or (folder / CHECKPOINTS).is_dir()


def read_run(name: str, folder: Path, now: float) -> Run:
    """The run in `folder` at the time `now` (seconds since 1970). Values that cannot be read are None."""
    recent, last = _last_records(folder)
    found = checkpoints(folder)
    train, evaluation = last.get("train", {}), last.get("eval", {})
    steps = _integer(_settings(folder).get("train"), "steps")
    times = [value for record in recent if (value := number_in(record, "time")) is not None]
    if not times:
        times = [path.stat().st_mtime for path in (folder / METRICS_FILE, folder / CONFIG_FILE) if path.is_file()][:1]
    age = max(0.0, now - max(times)) if times else None
    return Run(
        name=name,
        folder=folder,
        step=max((record["step"] for record in (train, evaluation) if record), default=None),
        steps=steps,
        saved=checkpoint_step(found[-1]) if found else None,
        training_loss=number_in(train, "loss"),
        validation_loss=number_in(evaluation, "loss"),
        evaluated=_integer(evaluation, "step"),
        bits_per_byte=number_in(evaluation, "bits_per_byte"),
        tokens_per_second=number_in(train, "tokens_per_second"),
        tokens=_integer(train, "tokens"),
        energy_kwh=number_in(last.get("energy"), "energy_kwh"),
        age=age,
        state=_state(folder, found, steps, age, times),
    )


def _state(folder: Path, found: list[Path], steps: float | None, age: float | None, times: list[float]) -> str:
    fault = bool(found) and _is_damaged(found[-1])
    if found and not fault and steps is not None and checkpoint_step(found[-1]) >= steps:
        return "finished"
    if (folder / PREEMPTED).exists() and found and not fault:
        return "preempted"
    alive = is_locked(folder / LOCK)
    if alive is None:
        pauses = [later - earlier for earlier, later in pairwise(times)]
        # A crash and a later restart also make a long pause, hence the upper bound.
        alive = age is not None and age <= min(max(120.0, 3 * max(pauses, default=0.0)), 1800.0)
    if alive:
        return "running"
    if fault:
        return "damaged"
    return "stopped" if found else "no checkpoint"


def _is_damaged(checkpoint: Path) -> bool:
    """Whether a file is missing or differs in size from the manifest. Checksums would take too long here."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return any((checkpoint / name).stat().st_size != entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return True


def _settings(folder: Path) -> dict[str, Any]:
    """The tables of the run's config.toml, empty if the file cannot be read."""
    try:
        settings = tomllib.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: table for name, table in settings.items() if isinstance(table, dict)}


def _last_records(folder: Path) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The last few records, the oldest first, and the last record of each kind.

    Reads metrics.jsonl from the end until a training step and an evaluation are found; an energy record follows its
    evaluation.
    """
    recent: list[dict[str, Any]] = []
    last: dict[str, dict[str, Any]] = {}
    for record in newest_first(folder):
        if len(recent) < _RECENT_LINES:
            recent.append(record)
        elif {"train", "eval"} <= last.keys():
            break
        last.setdefault(record["kind"], record)
    return recent[::-1], last


def _integer(record: Any, name: str) -> int | None:
    value = number_in(record, name)
    return None if value is None else int(value)


# --------------------------------------------------------------------------------------------------------------
# The table


def sort_runs(runs: Sequence[Run], by: str) -> list[Run]:
    """By "name", "age" (youngest first) or "validation" loss (lowest first); runs without the value come last."""
    keys = {
        "name": lambda run: (False, 0.0),
        "age": lambda run: (run.age is None, run.age or 0.0),
        "validation": lambda run: (run.validation_loss is None, run.validation_loss or 0.0),
    }
    return sorted(runs, key=lambda run: (*keys[by](run), run.name))


def table(runs: Sequence[Run]) -> str:
    """One line per run, at most `LINE_WIDTH` columns wide; long names are shortened in the middle."""
    titles = ["run", "step", "saved", "train", "val", "bits/B", "tok/s", "tokens", "kWh", "age", "state"]
    rows = [titles, *map(_cells, runs)]
    for title, name in (("kWh", "energy_kwh"), ("bits/B", "bits_per_byte")):
        if all(getattr(run, name) is None for run in runs):
            place = titles.index(title)
            rows = [row[:place] + row[place + 1 :] for row in rows]
    others = [2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:]]
    room = max(12, LINE_WIDTH - sum(others))
    lines = aligned([[_shortened(row[0], room), *row[1:-1]] for row in rows])
    return "\n".join(f"{line}  {row[-1]}" for line, row in zip(lines, rows, strict=True))


def _cells(run: Run) -> list[str]:
    return [
        run.name,
        f"{'-' if run.step is None else run.step}/{'?' if run.steps is None else run.steps}",
        shown(run.saved, "d"),
        shown(run.training_loss, ".4f"),
        "-" if run.validation_loss is None else f"{run.validation_loss:.4f} @{run.evaluated}",
        shown(run.bits_per_byte, ".3f"),
        "-" if run.tokens_per_second is None else _short(run.tokens_per_second),
        "-" if run.tokens is None else _short(run.tokens),
        shown(run.energy_kwh, ".3g"),
        "-" if run.age is None else _age(run.age),
        run.state,
    ]


def _short(number: float) -> str:
    """983, 6.58k, 2.05M, 295G: three digits."""
    for unit, value in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * value:
            return f"{number / value:.3g}{unit}"
    return f"{number:.3g}"


def _age(seconds: float) -> str:
    for unit, value in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * value:
            return f"{seconds / value:.0f}{unit}"
    return f"{seconds:.0f}s"


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


# --------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Points (x, loss) of a run by rising x."""

    name: str
    training: list[tuple[float, float]]
    validation: list[tuple[float, float]]


def read_curves(run: Run, axis: str) -> Curves:
    """The losses of a run over "tokens" or "steps"; in a long run every k-th training loss, about 2000 in all."""
    found = records(run.folder)
    every = max(1, len(found) // _POINTS)
    chosen = [record for number, record in enumerate(found) if number % every == 0 or record["kind"] == "eval"]
    per_step = _tokens_per_step(run, chosen) if axis == "tokens" else 1
    points: dict[str, dict[float, float]] = {"train": {}, "eval": {}}
    for record in chosen:
        loss = number_in(record, "loss")
        if record["kind"] in points and loss is not None and per_step is not None:
            points[record["kind"]][record["step"] * per_step] = loss
    return Curves(name=run.name, training=sorted(points["train"].items()), validation=sorted(points["eval"].items()))


def _tokens_per_step(run: Run, found: list[dict[str, Any]]) -> float | None:
    """Tokens per step: from a training record, otherwise from config.toml. Evaluation records have no tokens."""
    for record in reversed(found):
        if (tokens := number_in(record, "tokens")) and record["step"] > 0:
            return tokens / record["step"]
    settings = _settings(run.folder)
    batch = number_in(settings.get("train"), "global_batch")
    length = number_in(settings.get("data"), "seq_len")
    return None if batch is None or length is None else batch * length


def _ranges(curves: Sequence[Curves]) -> tuple[float, tuple[float, float]]:
    """The largest x, and the range of losses after the first twentieth of the axis, where losses are much larger."""
    points = [point for curve in curves for point in (*curve.training, *curve.validation)]
    last = max(x for x, _ in points)
    losses = [loss for x, loss in points if x >= last / 20]
    margin = 0.03 * (max(losses) - min(losses)) or 0.5
    return last, (min(losses) - margin, max(losses) + margin)


def plot(curves: Sequence[Curves], axis: str, target: Path) -> None:
    """Draw smoothed training losses as lines and validation losses as points, with one colour per run.

    Raises UserError when matplotlib is not installed or `target` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            '--plot needs matplotlib, which is not installed: pip install "hgpt[interpret]", or use --terminal'
        ) from error
    many = len(curves) > 6  # a legend inside the axes would cover the curves
    height = max(4.5, 0.21 * len(curves) + 0.8)
    figure = Figure(figsize=(11.5 if many else 8, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        line = _LINES[number // len(_COLOURS) % len(_LINES)]
        last = f", validation {curve.validation[-1][1]:.3f}" if curve.validation else ""
        # Hollow markers, so that overlapping points of two runs can be distinguished.
        points: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axes.plot([], [], linestyle=line, label=curve.name + last, **points)
        if curve.training:
            steps, losses = zip(*curve.training, strict=True)
            if not many:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smoothed(losses), color=colour, linestyle=line, linewidth=1.6)
        if curve.validation:
            axes.plot(*zip(*curve.validation, strict=True), linestyle="", **points)
    axes.set(xlabel="training tokens" if axis == "tokens" else "optimiser steps", ylabel="loss (nats per token)")
    axes.set_ylim(*_ranges(curves)[1])
    axes.set_title("line: training loss, smoothed; points: validation loss", fontsize=9, loc="left")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if axis == "tokens":
        axes.xaxis.set_major_formatter(lambda value, position: _short(value))
    outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}
    axes.legend(frameon=False, fontsize=7.5 if many else 9, **outside)
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(f"--plot {target} cannot be written: {error}; give a file such as losses.png") from error


def _smoothed(losses: Sequence[float]) -> np.ndarray:
    """Moving average over about √n of n losses: centred, shorter near the start, one-sided near the end."""
    place = np.arange(len(losses))
    before = np.minimum(round(len(losses) ** 0.5 / 2), place)
    after = np.minimum(before, place[::-1])
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return (sums[place + after + 1] - sums[place - before]) / (before + after + 1)


def terminal_plot(curves: Sequence[Curves], axis: str, width: int = 100, height: int = 22) -> str:
    """The curves as text: a small letter for a run's training loss, a capital for its validation loss."""
    last, (low, high) = _ranges(curves)
    columns = width - 8
    canvas = [[" "] * columns for _ in range(height)]

    def draw(points: Iterable[tuple[float, float]], letter: str) -> None:
        for x, loss in points:
            row = round((high - loss) / (high - low) * (height - 1))
            if 0 <= row < height:
                canvas[row][round(x / (last or 1) * (columns - 1))] = letter

    lettered = list(zip(_LETTERS, curves, strict=False))
    for letter, curve in lettered:
        if curve.training:  # interpolated: one point per column
            steps, losses = zip(*curve.training, strict=True)
            grid = np.linspace(0, last, columns)
            grid = grid[(grid >= steps[0]) & (grid <= steps[-1])]
            draw([*curve.training, *zip(grid, np.interp(grid, steps, losses), strict=True)], letter)
    for letter, curve in lettered:
        draw(curve.validation, letter.upper())
    lines = []
    for number, letters in enumerate(canvas):
        label = f"{high - number / (height - 1) * (high - low):6.3f}" if number % 3 == 0 else ""
        lines.append(f"{label:>6} |{''.join(letters)}".rstrip())
    lines.append(f"{'':>6} +{'-' * columns}")
    lines.append(f"{'':>8}0{f'{_short(last)} {axis}':>{columns - 1}}")
    lines += [f"{letter}, {letter.upper()}: {curve.name}" for letter, curve in lettered]
    lines.append("small letters: training loss, capitals: validation loss, in nats per token")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> str:
    """The table and plots that the command line asks for. Raises UserError."""
    parser = Parser("python -m hgpt.runs", "\n\n".join(str(__doc__).split("\n\n")[:2]))
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument(
        "--sort",
        choices=("name", "age", "validation"),
        default="name",
        help="order of the table: by name, youngest first, or lowest validation loss first (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the loss curves as .png, .svg or .pdf")
    parser.add_argument("--terminal", action="store_true", help="print the loss curves as text")
    parser.add_argument("--x", choices=("tokens", "steps"), default="tokens", help="x axis (default: %(default)s)")
    known = parser.parse_args(arguments)
    found = dict.fromkeys(entry for folder in known.folders for entry in find_runs(folder))
    if not found:
        raise UserError(
            f"{', '.join(map(str, known.folders))}: no runs were found; a run is a folder with "
            f"{METRICS_FILE}, {CONFIG_FILE} or {CHECKPOINTS}/"
        )
    now = time.time()
    runs = sort_runs([read_run(name, folder, now) for name, folder in found], known.sort)
    parts = [table(runs)]
    if known.plot is not None or known.terminal:
        curves = [curve for run in runs if (curve := read_curves(run, known.x)).training or curve.validation]
        if not curves:
            raise UserError("none of these runs has logged a loss yet: there is nothing to plot")
        if known.terminal:
            if len(curves) > len(_LETTERS):
                raise UserError(
                    f"--terminal shows at most {len(_LETTERS)} runs; got {len(curves)}: name fewer folders, "
                    "or use --plot"
                )
            parts.append(terminal_plot(curves, known.x))
        if known.plot is not None:
            plot(curves, known.x, known.plot)
            parts.append(f"plotted {len(curves)} runs in {known.plot}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(run_command(main))
