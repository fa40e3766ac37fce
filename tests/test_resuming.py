"""data_prep/state.py, engine.py: a preparation that is killed, interrupted or out of disk goes on to the same bytes."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_texts import contents, fails, json_lines, small_units, status, texts, write_parquet

import sample
from data_prep import documents, encoding, engine, openwebtext, verify
from data_prep.state import Preparation
from data_prep.summary import ProgressBar
from data_prep.worker_pool import start_imports
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.errors import UserError

ROOT = Path(__file__).parent.parent
SMALL = ["--tokenizer", "bpe:300", "--val-fraction", "0.1", "--tokens-per-shard", "3000", "--workers", "1"]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    small_units(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two files of 300 documents together."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(2):
        (folder / f"{number}.jsonl").write_bytes(json_lines(texts(300)[150 * number : 150 * (number + 1)]))
    return folder


def command(name, source, out, *options):
    """The main function of a command and its arguments."""
    main, *first = (documents.main,) if name == "documents" else (openwebtext.main, "--source")
    return main, *first, str(source), "--out", str(out), *SMALL, *options


def prepare(name, source, out, *options):
    assert status(*command(name, source, out, *options)) == 0
    return out


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What each command makes of the source without being stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_units(patch)
        return {name: contents(prepare(name, source, folder / name)) for name in ("documents", "openwebtext")}


def units_done(out):
    progress = out / ".preparation" / "progress.json"
    return json.loads(progress.read_text())["units"] if progress.exists() else 0


def units_encoded(name, source, out, monkeypatch, interrupt_at=None):
    """Run a command, with Ctrl-C before the unit of this number; how many units it encoded."""
    encoded, encode = [], encoding.Encoder.__call__

    def count(self, unit):
        if len(encoded) == interrupt_at:
            raise KeyboardInterrupt
        encoded.append(unit)
        return encode(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(encoding.Encoder, "__call__", count)
        assert status(*command(name, source, out)) == (0 if interrupt_at is None else 130)
    return len(encoded)


# ------------------------------------------------------------------------------------------------------- killed

# What a process does to files, each announced by Python before it is done (sys.addaudithook).
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def killed_run(out, kill_at, main, *arguments):
    """In a process of its own: a command that is killed by kill -9 before its `kill_at`-th work on a file in `out`."""
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(str(out)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    small_units(pytest.MonkeyPatch())
    sys.addaudithook(count)
    sys.exit(status(main, *arguments))


def start(out, kill_at, *command):
    process = start_imports().Process(target=killed_run, args=(out, kill_at, *command))
    process.start()
    return process


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        *(("documents", [9, 77]), ("openwebtext", [111])),
        # Before every work on a file, until there is no more.
        *(pytest.param(name, range(1, 10_000), marks=pytest.mark.slow) for name in ("documents", "openwebtext")),
    ],
    ids=str,
)
def test_killed_it_ends_with_the_same_bytes(tmp_path, source, whole, monkeypatch, name, kills):
    units = units_encoded(name, source, tmp_path / "counted", monkeypatch)
    assert units > 10
    for kill_at in kills:
        out = tmp_path / f"killed_{kill_at}"
        process = start(out, kill_at, *command(name, source, out))
        process.join()
        if process.exitcode == 0:
            assert kill_at > 100
            break
        assert process.exitcode == -signal.SIGKILL
        if (out / "meta.json").exists():  # at most the last tidying is missing
            assert not (out / ".preparation").exists() or status(*command(name, source, out)) == 0
        else:
            done = units_done(out)
            assert units_encoded(name, source, out, monkeypatch) == units - done
        assert contents(out) == whole[name], kill_at


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(2, 1), (3, 4)])
def test_killed_while_several_workers_are_at_it(tmp_path, source, whole, capsys, workers, kills):
    out = tmp_path / "out"
    for _ in range(kills):
        before = units_done(out)
        process = start(out, 0, *command("openwebtext", source, out, "--workers", str(workers)))
        while units_done(out) < before + 2 and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (out / "meta.json").exists()
    assert contents(prepare("openwebtext", source, out)) == whole["openwebtext"]
    assert "documents are already encoded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["documents", "openwebtext"])
def test_ctrl_c_keeps_what_is_finished(tmp_path, source, whole, monkeypatch, capsys, name):
    out = tmp_path / "out"
    units_encoded(name, source, out, monkeypatch, interrupt_at=9)
    assert units_done(out) == 9 and "interrupted: " in capsys.readouterr().err
    with pytest.raises(UserError, match="has not finished"):
        TokenShards.open(out, "train")
    assert contents(prepare(name, source, out)) == whole[name]
    assert status(*command(name, source, out)) == 0
    assert "was already prepared" in capsys.readouterr().out
    assert contents(out) == whole[name]


def test_nothing_stays_of_a_run_of_a_few_seconds(tmp_path, source, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_SECONDS", 60)
    units_encoded("documents", source, tmp_path / "a" / "out", monkeypatch, interrupt_at=9)
    assert not (tmp_path / "a").exists()


def test_going_on_needs_the_same_settings_shards_and_files(tmp_path, source, monkeypatch, capsys):
    shutil.copytree(source, tmp_path / "source")
    out = tmp_path / "out"
    units_encoded("documents", tmp_path / "source", out, monkeypatch, interrupt_at=9)
    again = command("documents", tmp_path / "source", out)
    assert "begun with another seed: 0, now 1" in fails(capsys, *again, "--seed", "1")
    assert "another tokenizer: 'bpe:300', now 'bpe:301'" in fails(capsys, *again, "--tokenizer", "bpe:301")
    for name in ("train_000000.bin", ".val_000000.bin.partial"):
        recorded = (out / name).read_bytes()
        os.truncate(out / name, len(recorded) - 2)
        assert name in fails(capsys, *again)
        (out / name).write_bytes(recorded)
    os.rename(tmp_path / "source" / "1.jsonl", tmp_path / "source" / "2.jsonl")
    assert "begun with another source" in fails(capsys, *again)


# ------------------------------------------------------------------------------------------- workers and processes


@pytest.mark.parametrize("name", ["documents", "openwebtext"])
def test_workers_change_nothing(tmp_path, source, whole, name):
    assert contents(prepare(name, source, tmp_path / "out", "--workers", "2")) == whole[name]
    assert len(whole[name]) > 6


def test_a_worker_that_dies_is_told_of_and_gone_on_from(tmp_path, source, whole, monkeypatch, capsys):
    def kill_the_workers(self, tally):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "update", kill_the_workers)
        message = fails(capsys, *command("documents", source, tmp_path / "out", "--workers", "2"))
    assert "A worker process died" in message and "--workers" in message
    assert contents(prepare("documents", source, tmp_path / "out")) == whole["documents"]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_silently(tmp_path, source, whole):
    """It reaches all of the terminal's processes: this one, and those that are importing what they need."""
    out = tmp_path / "out"
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_resuming as tests
tests.small_units(tests.pytest.MonkeyPatch())
sys.exit(tests.status(*tests.command("documents", {str(source)!r}, {str(out)!r}, "--workers", "2")))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    while not (out / ".preparation" / "settings.json").exists():
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=120)  # until the last process that can write there has ended
    assert process.returncode == 130 and "Traceback" not in printed
    assert contents(prepare("documents", source, out)) == whole["documents"]


# ------------------------------------------------------------------------------------------------- folder and disk


def test_out_is_never_overwritten(tmp_path, source, whole, capsys):
    out = tmp_path / "out"
    with Preparation(out):
        assert "another process is preparing data" in fails(capsys, *command("documents", source, out))
    out.mkdir(exist_ok=True)
    for name, content in whole["documents"].items():
        (out / name).write_bytes(content)
    assert "already holds prepared data" in fails(capsys, *command("documents", source, out, "--seed", "1"))
    assert contents(out) == whole["documents"]
    (out / "meta.json").unlink()
    assert "no preparation in it to resume" in fails(capsys, *command("documents", source, out))
    assert "is a file" in fails(capsys, *command("documents", source, out / "tokenizer.json"))
    assert "cannot be written" in fails(capsys, *command("documents", source, "/sys/hgpt"))  # not even by root


def test_too_little_disk_space_is_found_before_it_is_used(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9_000_000_000))
    engine.check_disk_space(tmp_path, 19_000_000_000)
    with pytest.raises(UserError, match=r"will need about 9\.45 GB, and 9\.00 GB are free"):
        engine.check_disk_space(tmp_path, 21_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    assert "0.00 GB are free" in fails(capsys, *command("documents", source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def limited_run(limit, out, main, *arguments):
    small_units(pytest.MonkeyPatch())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stderr = open(out.parent / "stderr", "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(status(main, *arguments))


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_clean_error_and_can_be_gone_on_from(tmp_path, source, workers):
    options = ("--tokens-per-shard", "100000", "--workers", workers)
    out = tmp_path / "out"
    limit = 12_000  # bytes of a file: more than the tokenizer has, less than a shard
    arguments = (limit, out, *command("documents", source, out, *options))
    process = start_imports().Process(target=limited_run, args=arguments)
    process.start()
    process.join()
    message = (tmp_path / "stderr").read_text()
    assert process.exitcode == 2 and "Traceback" not in message and "File too large" in message
    assert units_done(out) > 1 and not list(out.glob("*.bin"))
    expected = contents(prepare("documents", source, tmp_path / "whole", *options))
    assert contents(prepare("documents", source, out, *options)) == expected


@pytest.fixture
def closed(source):
    """Folders that this process may not enter ("closed", "data/inside") or not change ("data").

    The process is another user's meanwhile where the tests are run by root, whom permissions do not keep out.
    """
    folder = Path(tempfile.mkdtemp())  # unlike tmp_path, within the reach of every user
    modes = {folder / "closed": 0, folder / "data" / "inside": 0, folder / "data": 0o555, folder: 0o777}
    shutil.copytree(source, folder / "closed" / "data")
    shutil.copytree(source, folder / "data")
    (folder / "data" / "inside").mkdir()
    user = os.geteuid()
    for path, mode in modes.items():
        path.chmod(mode)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    for path in reversed(modes):
        path.chmod(0o777)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (openwebtext.main, "--source data --out closed/out", "--out {}/closed/out cannot be written"),
        (openwebtext.main, "--source data --out data/out", "--out {}/data/out cannot be written"),
        (openwebtext.main, "--source closed/data --out out", "--source {}/closed/data cannot be read"),
        (openwebtext.main, "--source data --out out", "{}/data/inside cannot be read"),
        (openwebtext.main, "--out closed/out --merge", "{}/closed/out is no readable folder"),
        (verify.main, "closed/data", "{}/closed/data cannot be read"),
        (documents.main, "--out out closed/data", "{}/closed/data cannot be read"),
        (sample.main, "--checkpoint closed/data", "{}/closed/data cannot be read"),
        (sample.main, "--checkpoint data --prompt-file closed/data", "{}/closed/data cannot be read"),
    ],
)
def test_folders_that_permissions_close(closed, capsys, main, arguments, message):
    words = [word if word.startswith("--") else closed / word for word in arguments.split()]
    assert message.format(closed) in fails(capsys, main, *words)
    assert not (closed / "out").exists()


# ------------------------------------------------------------------------------------------------------- memory


MEMORY_GROWN = """
import sys
from data_prep.openwebtext import main
from hgpt.data.tokenizer import load_tokenizer
load_tokenizer("gpt2")
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
before = peak()
main(["--source", sys.argv[1], "--out", sys.argv[2], "--workers", "1"])
print("grown", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
@pytest.mark.parametrize("documents", ["many", "one long"])
def test_memory(tmp_path, kind, documents):
    """It does not grow with the number of documents, and one document takes no more than twelve times its size."""
    folder = tmp_path / "source"
    folder.mkdir()
    some, limit = " ".join(texts(300)), 150
    found = [some] * 3000  # 200 MB
    if documents == "one long":
        long = "😀 " + some * (60_000_000 // len(some.encode()))  # a str of 4 bytes per character
        found, limit = [long, "short", "shorter"], 12 * len(long.encode()) / 1e6
    if kind == "parquet":
        write_parquet(folder / "a.parquet", found, row_group_size=500)
    elif kind == "jsonl":
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
        (folder / "a.jsonl").write_text("".join(lines))
    else:
        for number, text in enumerate(found):
            (folder / f"{number}.txt").write_text(text)
    command = [sys.executable, "-c", MEMORY_GROWN, folder, tmp_path / "out"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout
    assert int(printed.split()[-1]) / 1e3 < limit  # MB
    assert sum(len(TokenShards.open(tmp_path / "out", split)) for split in SPLITS) > 1e7
