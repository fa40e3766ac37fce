"""hgpt/runs.py: states, figures from the end of metrics.jsonl, damaged input, plots."""

import json
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from hgpt import history, runs
from hgpt.durable import folder_lock, remove_folder
from hgpt.errors import UserError
from hgpt.run import checkpoint as ckpt
from hgpt.runs import Run, find_runs, main, read_curves, read_run, sort_runs, table

NOW = 1_800_000_000.0


def line(kind: str, step: int, when: float, **values) -> str:
    return json.dumps({"kind": kind, "step": step, "time": when, **values}) + "\n"


def write_metrics(folder: Path, *, steps: int, every: int = 10, evaluate: int = 50, seconds: float = 1.0, age=10.0):
    """As train.py writes it: training losses every `every` steps, one per `seconds`; the last line `age` before NOW."""
    lines = []
    for step in range(0, steps + 1, every):
        when = NOW - age - (steps - step) / every * seconds
        if step:
            values = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0 + step, "tokens": step * 2048}
            lines.append(line("train", step, when, loss=8 - 5 * step / (steps + 100), **values))
        if step % evaluate == 0 or step == steps:
            values = {"loss": 8 - 4.5 * step / (steps + 100), "bits_per_byte": 2.5}
            lines.append(line("eval", step, when, **values))
    (folder / "metrics.jsonl").write_text("".join(lines))


def make_run(folder: Path, *, steps: int = 100, of: int = 100, checkpoint: int | None = None, **metrics) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'name = "{folder.name}"\n[train]\nsteps = {of}\nglobal_batch = 16\n[data]\nseq_len = 128\n'
    )
    write_metrics(folder, steps=steps, **metrics)
    if checkpoint is not None:
        saved = folder / "checkpoints" / f"step_{checkpoint:07d}"
        (saved / "model").mkdir(parents=True)
        (saved / "model" / "model.safetensors").write_bytes(b"1234")
        (saved / "state.json").write_text("{}")
        ckpt.write_manifest(saved)
    return folder


def read(folder: Path) -> Run:
    return read_run(folder.name, folder, NOW)


def unknown(name: str, **values) -> Run:
    """A run of which only `values` are known."""
    given = {"name": name, "folder": Path(name), "state": "stopped", **values}
    return Run(**dict.fromkeys(field.name for field in fields(Run)) | given)


# -------------------------------------------------------------------------------------------------------- One run


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({"steps": 100, "checkpoint": 100, "age": 1.0}, "finished"),  # at once, not when it has cooled down
        ({"steps": 100, "checkpoint": 100, "age": 1e6}, "finished"),
        ({"steps": 100, "of": 200, "checkpoint": 100, "age": 1e6}, "stopped"),
        ({"steps": 60, "checkpoint": 50, "age": 60.0}, "running"),
        ({"steps": 60, "age": 60.0}, "running"),  # before its first checkpoint
        ({"steps": 60, "checkpoint": 50, "age": 200.0}, "stopped"),
        ({"steps": 60, "checkpoint": 50, "age": 500.0, "seconds": 200.0}, "running"),  # it takes its time
        ({"steps": 60, "checkpoint": 50, "age": 700.0, "seconds": 200.0}, "stopped"),
        ({"steps": 60, "checkpoint": 50, "age": 3000.0, "seconds": 2000.0}, "stopped"),  # half an hour is the limit
        ({"steps": 60, "age": 1e4}, "no checkpoint"),
    ],
)
def test_state(tmp_path, settings, state):
    assert read(make_run(tmp_path / "x", **settings)).state == state


def test_the_lock_decides_whether_a_run_is_alive(tmp_path):
    """Whatever the age of its records: a run may take its time, and a killed one has just written."""
    slow, killed = make_run(tmp_path / "slow", steps=60, age=1e5), make_run(tmp_path / "killed", steps=60, age=1.0)
    (killed / ckpt.LOCK).touch()
    with folder_lock(slow / ckpt.LOCK, "busy"):
        assert (read(slow).state, read(killed).state) == ("running", "no checkpoint")
    assert read(slow).state == "no checkpoint"


def test_preempted(tmp_path):
    folder = make_run(tmp_path / "x", steps=60, checkpoint=60, age=5.0)
    (folder / "preempted").touch()
    assert read(folder).state == "preempted"
    remove_folder(folder / "checkpoints" / "step_0000060")  # then there is nothing to go on with
    assert read(folder).state == "running"


@pytest.mark.parametrize("content", [None, b"123", b'{"files": ["a"]}'])
@pytest.mark.parametrize("file", ["model/model.safetensors", "manifest.json"])
def test_damaged(tmp_path, file, content):
    path = make_run(tmp_path / "x", checkpoint=100, age=1e4) / "checkpoints" / "step_0000100" / file
    path.unlink() if content is None else path.write_bytes(content)
    assert read(tmp_path / "x").state == "damaged"


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    folder = make_run(tmp_path / "x", checkpoint=100)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line("train", 110, NOW, loss=None, tokens=5) + line("eval", 110, NOW, loss=float("nan")))
    run = read(folder)
    assert (run.step, run.training_loss, run.validation_loss, run.tokens) == (110, None, None, 5)
    assert read_curves(run, "steps").validation[-1][0] == 100


def test_nothing_but_a_folder(tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    run = read(tmp_path / "a")
    assert run == unknown("a", folder=tmp_path / "a", state="no checkpoint") and "-/?" in table([run])


@pytest.mark.parametrize("config", ["", "no toml [", "train = 3", '[train]\nsteps = "many"', "\xff"])
def test_configurations_that_cannot_be_used(tmp_path, config):
    folder = make_run(tmp_path / "x", checkpoint=100, age=1e4)
    (folder / "config.toml").write_bytes(config.encode("latin-1"))
    run = read(folder)
    assert (run.steps, run.state) == (None, "stopped")
    assert read_curves(run, "tokens").validation[-1][0] == 100 * 2048


def test_a_run_that_starts_has_the_age_of_its_files(tmp_path):
    folder = make_run(tmp_path / "x")
    (folder / "metrics.jsonl").write_text("")
    os.utime(folder / "metrics.jsonl", (NOW - 20, NOW - 20))
    run = read(folder)
    assert (run.state, run.age) == ("running", 20)
    os.utime(folder / "metrics.jsonl", (NOW + 20, NOW + 20))  # another machine's clock
    assert read(folder).age == 0


def test_only_the_end_of_a_long_file_is_parsed(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "x", steps=40_000, of=40_000, evaluate=10_000)
    with open(folder / "metrics.jsonl", "a") as file:  # the last evaluation lies far back
        file.writelines(line("train", 40_000 + n, NOW, loss=1.0) for n in range(1000))
    parsed = []
    original = history._record
    monkeypatch.setattr(history, "_record", lambda text: parsed.append(text) or original(text))
    run = read(folder)
    assert (run.step, run.validation_loss) == (40_999, pytest.approx(8 - 4.5 * 40_000 / 40_100))
    assert len(parsed) < 1100  # of 5000
    curves = read_curves(run, "steps")
    assert 1000 < len(curves.training) < 2600
    assert [x for x, _ in curves.validation] == [0, 10_000, 20_000, 30_000, 40_000]


# ------------------------------------------------------------------------------------------------------- Many runs


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three runs, one of them deeper, beside what is no run."""
    now = time.time() - NOW  # main looks at the clock
    make_run(tmp_path / "b", steps=60, checkpoint=50, age=30.0 - now)
    make_run(tmp_path / "a", checkpoint=100, age=8000.0 - now)
    make_run(tmp_path / "sweep" / "lr" / "c", steps=30, age=90000.0 - now)
    for name in ("notes/todo.txt", ".cache/metrics.jsonl", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "again").symlink_to(tmp_path / "sweep")
    return tmp_path


def test_table_of_folders_and_of_runs(folder):
    head, first, second, third = main([str(folder)]).splitlines()
    assert head.split() == ["run", "step", "saved", "train", "val", "bits/B", "tok/s", "tokens", "age", "state"]
    assert " ".join(first.split()) == "a 100/100 100 5.5000 5.7500 @100 2.500 1.1k 205k 2h finished"
    assert " ".join(second.split()).startswith("b 60/100 50 6.1250 6.3125 @60 2.500 ") and second.endswith("running")
    assert third.startswith("sweep/lr/c ") and third.endswith("25h  no checkpoint")
    assert find_runs(folder / "a") == [("a", folder / "a")]
    for arguments, expected in (
        ([folder, "--sort", "validation"], ["a", "b", "sweep/lr/c"]),
        ([folder, "--sort", "age"], ["b", "a", "sweep/lr/c"]),
        ([folder / "b", folder / "sweep", folder / "b"], ["b", "lr/c"]),
    ):
        text = main([str(argument) for argument in arguments])
        assert [row.split()[0] for row in text.splitlines()[1:]] == expected


def test_unknown_values_come_last():
    losses = {"x": None, "y": 3.0, "z": 2.0, "a": None}
    found = sort_runs([unknown(name, validation_loss=loss) for name, loss in losses.items()], "validation")
    assert [entry.name for entry in found] == ["z", "y", "a", "x"]
    assert [entry.name for entry in sort_runs(found, "age")] == ["a", "x", "y", "z"]


def test_table_fits():
    long = unknown("harmonic-" + "gain0.05-" * 12 + "seed1337", step=600_000, steps=600_000)
    _, row = lines = table([long]).splitlines()
    assert max(map(len, lines)) <= 120
    assert row.startswith("harmonic-gain0.05") and "…" in row and "seed1337  600000/600000" in row


# ----------------------------------------------------------------------------------------------------------- Plots


def test_curves_over_tokens_and_steps(folder):
    run = read(folder / "a")
    steps, tokens = read_curves(run, "steps"), read_curves(run, "tokens")
    assert [x for x, _ in steps.training] == list(range(10, 101, 10))
    assert [x for x, _ in steps.validation] == [0, 50, 100]
    assert tokens.training == [(x * 2048, loss) for x, loss in steps.training]
    assert tokens.validation == [(x * 2048, loss) for x, loss in steps.validation]
    (folder / "a" / "metrics.jsonl").write_text(line("eval", 7, NOW, loss=3.0))
    assert read_curves(run, "tokens").validation == [(7 * 16 * 128, 3.0)]  # by the configuration
    (folder / "a" / "config.toml").unlink()
    assert read_curves(run, "tokens").validation == []


def test_plot(folder):
    from matplotlib.image import imread

    for number in range(6):  # more runs than colours
        make_run(folder / f"more{number}", steps=40 + number)
    target = folder / "losses.png"
    assert main([str(folder), "--plot", str(target), "--x", "steps"]).endswith(f"plotted 9 runs in {target}")
    image = imread(target)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (np.rint(image[..., :3] * 255) == colour).all(-1).any()


def test_smoothed_losses_and_the_range_of_a_plot():
    assert runs._smoothed([5.0, 3.0, 4.0, 2.0]).tolist() == [5, 4, 3, 3]
    assert runs._smoothed([1.0]).tolist() == [1]
    line = np.arange(100.0)  # windows of 11: centred ones leave a straight line as it is
    assert np.allclose(runs._smoothed(line)[:95], line[:95]) and runs._smoothed(line)[-1] == 96.5
    # The first losses do not flatten the rest.
    curve = runs.Curves(name="x", training=[(1, 90.0), (40, 4.0), (100, 3.0)], validation=[(0, 99.0), (100, 3.2)])
    last, (low, high) = runs._ranges([curve])
    assert last == 100 and 2.9 < low < 3.0 and 4.0 < high < 4.1
    assert runs._ranges([runs.Curves(name="x", training=[], validation=[(0, 2.0)])]) == (0, (1.5, 2.5))


def test_terminal_plot(folder):
    text = main([str(folder), "--terminal"])
    assert max(map(len, text.splitlines())) <= 100
    assert "a, A: a" in text and "c, C: sweep/lr/c" in text and "205k tokens" in text
    rows = [row[8:] for row in text.splitlines() if len(row) > 7 and row[7] == "|"]
    assert len(rows) == 22
    # A falling loss: what is to the left stands above what is to the right.
    columns = [[number for number, row in enumerate(rows) if row[x : x + 1] == "a"] for x in range(20, 90)]
    heights = [column[0] for column in columns if column]
    assert len(heights) > 20 and heights == sorted(heights)
    assert sum(row.count("A") for row in rows) == 2  # of three evaluations the first is beyond the plot


def test_bad_input(folder, monkeypatch):
    def refused(*arguments: str | Path) -> str:
        with pytest.raises(UserError) as error:
            main([str(argument) for argument in arguments])
        return str(error.value)

    for target in (folder / "losses.xyz", folder / "none" / "losses.png"):
        assert f"--plot {target} cannot be written" in refused(folder, "--plot", target)
    for number in range(24):
        make_run(folder / f"more{number}", steps=20)
    assert "--terminal shows at most 26 runs; got 27" in refused(folder, "--terminal")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib" in refused(folder, "--plot", "x.png")
    (make_run(folder / "young" / "x") / "metrics.jsonl").unlink()
    assert "none of these runs has logged a loss yet" in refused(folder / "young", "--terminal")
    assert "a run is a folder with metrics" in refused(folder / "notes")
    assert f"{folder / 'none'} is no folder" in refused(folder / "none")
