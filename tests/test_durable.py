"""hgpt/durable.py: whole or absent, whatever goes wrong and whenever; one process at a time in a folder."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys

import pytest

from hgpt import durable
from hgpt.durable import folder_lock, partial_name, remove_folder, sha256, whole_file, whole_folder
from hgpt.errors import UserError


def put_file(target, content):
    with whole_file(target) as path:
        path.write_text(content)


def put_folder(target, content):
    with whole_folder(target) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(content)


def content(target):
    return (target / "model" / "weights" if target.is_dir() else target).read_text()


WRITERS = pytest.mark.parametrize("put", [put_file, put_folder])


@WRITERS
def test_written_and_replaced(tmp_path, put):
    target = tmp_path / "x"
    for text in ("old", "new"):
        put(target, text)
        assert content(target) == text
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


@WRITERS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an older one"])
def test_an_error_at_any_call_loses_nothing(tmp_path, monkeypatch, put, code, call, there):
    """The n-th call fails, for every n: before the rename the old content stays, after it the new content is there."""
    original = getattr(os, call) if call != "write" else type(tmp_path).write_text
    for number in range(1, 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        target = folder / "x"
        if there:
            put(target, "old")
        calls = []

        def failing(*arguments, calls=calls, number=number, **options):
            calls.append(arguments)
            if len(calls) == number:
                raise OSError(code, os.strerror(code))
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(*((type(tmp_path), "write_text") if call == "write" else (durable.os, call)), failing)
            try:
                put(target, "new")
            except (OSError, UserError) as error:
                assert os.strerror(code) in str(error)
        if len(calls) < number:
            break
        assert not partial_name(target).exists()
        if target.exists():
            assert content(target) in ("old", "new")
        elif there:  # between the renames of an older folder and of the new one
            assert put is put_folder and call in ("fsync", "replace")
    assert number > 1 and content(target) == "new"


@WRITERS
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing_and_is_raised(tmp_path, put, error):
    writer = whole_file if put is put_file else whole_folder
    with pytest.raises(type(error)) as raised, writer(tmp_path / "x") as path:
        (path / "y" if path.is_dir() else path).write_text("half")
        raise error
    assert raised.value is error and not list(tmp_path.iterdir())


def test_an_error_of_a_library_in_rust_is_one_of_the_disk(tmp_path):
    with (
        pytest.raises(UserError, match=r"could not write .*No space left.*--resume auto"),
        whole_folder(tmp_path / "x"),
    ):
        raise Exception("No space left on device (os error 28)")


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".a.partial", ".x.partial", ".b.deleted"):
        (tmp_path / name / "model").mkdir(parents=True)
    put_folder(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    partial_name(tmp_path / "link").symlink_to("nowhere")
    with whole_file(tmp_path / "link") as path:
        path.symlink_to("x")
    assert os.readlink(tmp_path / "link") == "x"


def test_a_deletion_that_breaks_off_leaves_no_half_folder(tmp_path, monkeypatch):
    put_folder(tmp_path / "x", "old")

    def broken(path):
        raise OSError(errno.EIO, "EIO")

    monkeypatch.setattr(durable.shutil, "rmtree", broken)
    with pytest.raises(OSError, match="EIO"):
        remove_folder(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# The lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from hgpt.durable import folder_lock\n"
        "with folder_lock(Path(sys.argv[1]), 'busy'): print('held', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "lock"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"^wait$"), folder_lock(tmp_path / "lock", "wait"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(tmp_path / "lock", "wait"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys, code):
    def no_locks(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)), folder_lock(tmp_path / "lock", "busy"):
            pass
        return
    with folder_lock(tmp_path / "lock", "busy"):
        printed = capsys.readouterr()
    assert str(tmp_path) in printed.err and os.strerror(code) in printed.err and not printed.out


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made anew"])
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch, again):
    """Between opening and locking, the process that held it finishes and removes it; a third may make it again."""
    flock = fcntl.flock

    def late(stream, how):
        (tmp_path / "lock").unlink()
        if again:
            (tmp_path / "lock").touch()
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match=r"^busy$"), folder_lock(tmp_path / "lock", "busy"):
        pass
