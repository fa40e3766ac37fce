"""What goes wrong around a run: file systems, environments, output, other nodes, a course that is given up.

Each row of a table is one fault: what happens, the exit code, and the names that the message must have.
"""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from processes import finish, start
from small_run import (
    HARMONIC,
    altered,
    assert_same_checkpoint,
    at_step,
    flip_a_bit,
    losses,
    make_config,
    markov_tokens,
    set_back,
    steps_in,
    write_data,
)

import train
from hgpt import durable
from hgpt.durable import sync, whole_folder
from hgpt.errors import UserError
from hgpt.history import records
from hgpt.run import checkpoint as checkpoint_module
from hgpt.run.checkpoint import checkpoints, damage, find_checkpoint, latest_checkpoint, remove_old, set_aside
from hgpt.run.engines import Engine, check_environment
from hgpt.run.report import MetricsLog
from hgpt.run.settings import write_toml
from hgpt.run.stop import EXIT_HUNG
from hgpt.source import model_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def killed(monkeypatch):
    """A function: train, and break off after step 4."""

    def train_on(config):
        with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
            at_step(patch, 4, lambda: 1 / 0)
            train.main(config)

    return train_on


# --------------------------------------------------------------------------------------- A course that is given up


def test_a_run_that_was_set_back_and_killed_goes_on_from_its_new_course(tmp_path, killed, capsys, finished):
    config = set_back(finished(), 6, runs_dir=str(tmp_path), train={"steps": 8}, checkpoint={"every": 4})
    other = altered(config, optim={"lr": 1e-3}, resume=str(checkpoints(config.run_folder)[0]))
    killed(other)
    assert steps_in(config.run_folder) == [3, 4]
    assert damage(config.run_folder / "abandoned" / "step_0000006") is None
    assert "step_0000006 is later than the resumed checkpoint: moved to " in capsys.readouterr().out
    train.main(replace(other, resume="auto"))
    assert "step_0000004" in capsys.readouterr().out
    assert steps_in(config.run_folder) == [3, 4, 8]
    assert len(losses(config.run_folder)) == 8
    assert set_aside(config.run_folder, checkpoints(config.run_folder)[0]).name == "step_0000003"


def test_a_damaged_newer_checkpoint_does_not_come_back(tmp_path, killed, monkeypatch, finished):
    """It cannot be read once, on a file system over the network, and can be read again later."""
    config = set_back(finished(), 6, runs_dir=str(tmp_path))
    real = checkpoint_module.sha256

    def fails_once(path):
        monkeypatch.setattr(checkpoint_module, "sha256", real)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoint_module, "sha256", fails_once)
    killed(config)
    assert steps_in(config.run_folder) == [3]
    train.main(config)
    assert losses(config.run_folder) == losses(finished().run_folder)


def test_a_branch_that_was_killed_before_its_first_checkpoint_is_a_branch_still(tmp_path, killed, finished):
    middle, last = checkpoints(finished().run_folder)
    branch = replace(finished(), name="branch", runs_dir=str(tmp_path), resume=str(middle))
    for resume in (branch.resume, branch.resume, "auto"):
        killed(replace(branch, resume=resume))
        assert not checkpoints(branch.run_folder)
    train.main(replace(branch, resume="auto"))
    assert losses(branch.run_folder) == losses(finished().run_folder)[3:]
    assert_same_checkpoint(checkpoints(branch.run_folder)[-1], last)


# ---------------------------------------------------------------------------------------------------- File systems


def no_links(*arguments, **options):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_a_file_system_without_links(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "symlink", no_links)
    config = make_config(data, tmp_path, resume="auto", checkpoint={"keep_last": 1})
    for steps in (6, 7):
        train.main(altered(config, train={"steps": steps}))
        assert steps_in(config.run_folder) == [steps]
    printed = capsys.readouterr()
    assert f"no link {config.run_folder / 'latest'} could be made" in printed.err
    assert f"the model is in {config.run_folder}/checkpoints/step_0000007/model" in printed.out
    assert model_folder(config.run_folder) == checkpoints(config.run_folder)[0] / "model"


def test_a_run_that_was_copied_with_its_links_followed(tmp_path, finished):
    config = altered(finished(), runs_dir=str(tmp_path), resume="auto", train={"steps": 7})
    shutil.copytree(finished().run_folder, config.run_folder)
    assert (config.run_folder / "latest" / "model").is_dir() and not (config.run_folder / "latest").is_symlink()
    train.main(config)
    assert latest_checkpoint(config.run_folder).resolve() == checkpoints(config.run_folder)[-1]
    assert (config.run_folder / "abandoned" / "latest" / "model").is_dir()


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, code, raises):
    def refuses(descriptor):
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(durable.os, "fsync", refuses)
    with pytest.raises(OSError) if raises else nullcontext():
        sync(tmp_path)
    with pytest.raises(OSError):  # a file that cannot be flushed may be lost
        sync(tmp_path / "file")


def test_what_a_run_finds_to_delete(tmp_path, monkeypatch, capsys, finished):
    """What a killed deletion left goes at the start; an old checkpoint that cannot be deleted is a warning."""
    config = set_back(finished(), 6, runs_dir=str(tmp_path))
    left = config.run_folder / "checkpoints" / ".step_0000001.deleted"
    (left / "model").mkdir(parents=True)
    train.main(config)  # nothing is left to train
    assert not left.exists()
    monkeypatch.setattr(os, "replace", no_links)
    remove_old(config.run_folder, replace(config.checkpoint, keep_last=1))
    assert steps_in(config.run_folder) == [3, 6]
    assert "step_0000003 could not be deleted" in capsys.readouterr().err


def test_a_run_folder_that_is_renamed_while_training(data, tmp_path, monkeypatch, capsys, finished):
    config = make_config(data, tmp_path, resume="auto")
    at_step(monkeypatch, 4, lambda: config.run_folder.rename(tmp_path / "elsewhere") and None)
    train.main(config)
    assert f"{config.run_folder} was renamed or deleted" in capsys.readouterr().err
    assert_same_checkpoint(checkpoints(config.run_folder)[-1], checkpoints(finished().run_folder)[-1])
    # Step 3 is written in the background while the folder is renamed: before it or after it.
    assert 3 in steps_in(tmp_path / "elsewhere") + steps_in(config.run_folder)
    assert len(losses(tmp_path / "elsewhere")) == 6
    train.main(altered(config, train={"steps": 7}))
    assert steps_in(config.run_folder)[-2:] == [6, 7]


def test_every_file_of_a_checkpoint_has_the_mode_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "x") as folder:
            (folder / "model").mkdir()
            (folder / "model" / "weights").touch(0o600)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "x" / "model", tmp_path / "x" / "model" / "weights")]
    assert modes == [0o750, 0o640]


@pytest.mark.parametrize("resume", ["never", "auto", "a" * 300, "latest/" * 999])
def test_run_folders_that_cannot_be_looked_into(tmp_path, resume):
    long = SimpleNamespace(run_folder=tmp_path / ("a" * 300), resume=resume)
    with pytest.raises(UserError, match=r"run folder .*File name too long.*--name"):
        find_checkpoint(long, pytest.fail)


# -------------------------------------------------------------------------------------------------------- Trackers


CALLS = ["start", "store_init_configuration", "log", "log", "log", "finish"]


@pytest.mark.parametrize("fails", sorted(set(CALLS)))
def test_a_tracker_that_fails_is_said_once_and_ends_nothing(tmp_path, capsys, fails):
    broken, whole = Mock(), Mock()
    broken.name = "tensorboard"
    getattr(broken, fails).side_effect = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    log = MetricsLog(tmp_path, [broken, whole], {}, 0)
    for step in range(3):
        log.write("train", step, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("the tracker tensorboard failed and is left out: ") == 1
    called, expected = ([name for name, *_ in tracker.method_calls] for tracker in (broken, whole))
    assert expected == CALLS and called == CALLS[: CALLS.index(fails) + 1]
    assert len(records(tmp_path)) == 3


# ------------------------------------------------------------------------- What processes read and nobody compared


RANK_1 = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        *(({"WORLD_SIZE": value}, "WORLD_SIZE") for value in ("two", "0", "-1", "1.0", "", "²", "9" * 5000)),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK"),
        (RANK_1 | {"RANK": "x"}, "RANK"),
        (RANK_1 | {"LOCAL_RANK": "one"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        *((RANK_1 | {"MASTER_PORT": port}, "MASTER_PORT") for port in ("http", "70000")),
        (RANK_1 | {"MASTER_PORT": "7000"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_environments_that_no_launcher_makes(monkeypatch, environment, named):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    check_environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        check_environment()


class Others(Engine):
    """The engine of process 0 of two, and what the other process answers."""

    def __init__(self, *answers) -> None:
        self.answers = iter(answers)

    def gather_objects(self, mine):
        return [mine, next(self.answers)]


def test_what_processes_do_together():
    def fails():
        raise UserError("no such file")

    assert Others(None).together(lambda: 5) == 5
    for work, other, message in (
        (fails, None, "process 0: no such file"),
        (lambda: 5, "it is damaged", "process 1: it is damaged"),
        (fails, "no such file", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            Others(other).together(work)
    Others({"a": 1}).compare({"a": 1})
    with pytest.raises(UserError, match="b: None on process 0, 2 on process 1"):
        Others({"a": 1, "b": 2}).compare({"a": 1})


def other_data(folder: Path) -> None:
    shutil.rmtree(folder)
    write_data(folder, markov_tokens(20_000, 7), markov_tokens(1_000, 1))


NEWEST = "runs/run/checkpoints/step_0000006"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize(
    ("harm", "file", "message"),
    [
        (shutil.rmtree, NEWEST, "step_0000006/manifest.json"),
        (lambda file: os.truncate(file, 50), f"{NEWEST}/manifest.json", "step_0000006/manifest.json"),
        (lambda file: os.truncate(file, 900), f"{NEWEST}/model/model.safetensors", "process 1: "),
        (other_data, "data", "the data in data"),
        (flip_a_bit, "data/train_000000.bin", "process 1: "),
        (shutil.rmtree, "data", "process 1: "),
    ],
)
def test_two_nodes_that_see_different_files(data, tmp_path, finished, engine, harm, file, message):
    """Folders that are not shared. All processes exit with 2 and name the difference, soon, and nothing is written."""
    nodes = [tmp_path / f"node{number}" for number in range(2)]
    for node in nodes:
        shutil.copytree(finished().run_folder, node / "runs" / "run", symlinks=True)
        shutil.copytree(data, node / "data")
    harm(nodes[1] / file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    name, resume = ("run", "auto") if file.startswith("runs") else ("new", "never")
    config = altered(finished(), name=name, runs_dir="runs", resume=resume, data={"path": "data"})
    config = altered(config, train={"steps": 8, "micro_batch": 4})
    started = start([config], 2, engine, tmp_path / "log", folders=nodes)
    assert finish(started, timeout=100) == [2, 2]
    for rank in range(2):
        assert message in (tmp_path / f"log.{rank}").read_text()
    assert {path: path.read_bytes() for path in before} == before
    assert not (nodes[0] / "runs" / "new").exists()


@pytest.mark.slow
def test_a_fault_that_the_main_process_alone_meets_ends_all_with_its_message(data, tmp_path):
    """The main process counts the tokens for all."""
    counts = shutil.copytree(data, tmp_path / "data") / "train_counts.json"
    counts.write_text("{")
    learned = {"head": replace(HARMONIC, radius="learned")}
    config = make_config(counts.parent, tmp_path, model=learned, train={"micro_batch": 4})
    assert finish(start([config], 2, log=tmp_path / "log")) == [2, 2]
    for rank in (0, 1):
        assert "train_counts.json" in (tmp_path / f"log.{rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
@pytest.mark.parametrize(
    ("fault", "codes", "named"),
    [
        (partial(os._exit, 1), [EXIT_HUNG, 1], "error: process 0 lost contact"),
        (partial(time.sleep, 60), [EXIT_HUNG, EXIT_HUNG], "has waited for 6 s in step 0 (building the model)"),
    ],
    ids=["dies", "hangs"],
)
def test_a_process_that_fails_before_the_first_step_ends_the_others(data, tmp_path, engine, fault, codes, named):
    config = make_config(data, tmp_path, train={"hang_timeout": 6, "micro_batch": 2})
    assert finish(start([config], 2, engine, tmp_path / "log", at_build=[None, fault]), timeout=50) == codes
    assert named in "".join((tmp_path / f"log.{rank}").read_text() for rank in range(2))


# ------------------------------------------------------------------------------------- Output, systems and threads


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_run_goes_on_when_nobody_reads_its_output(data, tmp_path, closed):
    file = tmp_path / "run.toml"
    seldom = {"every": 40}
    write_toml(make_config(data, tmp_path, train={"steps": 40}, checkpoint=seldom, eval=seldom), file)
    read, write = os.pipe()
    streams = {name: write if closed in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    run = subprocess.Popen([sys.executable, "train.py", "--config", file], cwd=ROOT, **streams)
    os.close(write)
    os.close(read)
    assert run.wait(120) == 0 and steps_in(tmp_path / "run") == [40]


@pytest.mark.slow
def test_train_py_is_imported_where_unix_modules_are_missing():
    """On Windows: its modules are without fcntl and resource, its signals without SIGUSR1 and SIGHUP."""
    script = """
import builtins, signal
real = builtins.__import__
def without(name, globals=None, *rest, **named):
    importer = (globals or {}).get("__name__", "")
    if name in ("fcntl", "resource", "pwd", "grp") and importer.startswith(("hgpt", "train")):
        raise ImportError(name)
    return real(name, globals, *rest, **named)
builtins.__import__ = without
for name in ("SIGUSR1", "SIGHUP"):
    delattr(signal, name)
import train
from types import SimpleNamespace
with train.StopSignals(SimpleNamespace(world_size=1)) as signals:
    assert signals.update(together=False) == 0
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_a_run_in_a_thread(data, tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(train.main(make_config(data, tmp_path))))
    thread.start()
    thread.join()
    assert done[0]["loss"] > 0 and steps_in(tmp_path / "run") == [3, 6]
