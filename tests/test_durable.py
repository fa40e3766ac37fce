"""hgpt/durable.py: whole or absent, whatever goes wrong and whenever; one process at a time in a folder."""

import contextlib
import errno
import fcntl
import itertools
import os
import subprocess
import sys

import pytest

from hgpt import durable
from hgpt.durable import folder_lock, partial_name, remove_folder, whole_file, whole_folder
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


def temporary_names(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("put", [put_file, put_folder])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an older one"])
def test_an_error_at_any_call_loses_nothing(tmp_path, monkeypatch, put, call, there):
    """The n-th call fails, for every n: the target is the older one or the whole new one, and nothing else is left."""
    where, name = (type(tmp_path), "write_text") if call == "write" else (durable.os, call)
    original = getattr(where, name)
    for number in itertools.count(1):
        target = tmp_path / str(number) / "x"
        target.parent.mkdir()
        if there:
            put(target, "old")
        calls = itertools.count(1)

        def failing(*arguments, calls=calls, number=number, **options):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            try:
                put(target, "new")
            except (OSError, UserError) as error:
                assert os.strerror(errno.ENOSPC) in str(error)
        assert not temporary_names(target.parent)
        if next(calls) <= number:  # there is no n-th call
            assert number > 1 and content(target) == "new"
            break
        assert content(target) in ("old", "new") if target.exists() else not there


@pytest.mark.parametrize("writer", [whole_file, whole_folder])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_and_is_raised(tmp_path, writer, error):
    with pytest.raises(type(error)) as raised, writer(tmp_path / "x") as path:
        (path / "y" if path.is_dir() else path).write_text("half")
        raise error
    assert raised.value is error and not list(tmp_path.iterdir())


def test_an_error_of_a_library_in_rust_is_one_of_the_disk(tmp_path):
    with pytest.raises(UserError, match=r"No space left.*--resume auto"), whole_folder(tmp_path / "x"):
        raise Exception("No space left on device (os error 28)")


def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path):
    for name in (".a.partial", ".x.partial", ".b.deleted"):
        (tmp_path / name / "model").mkdir(parents=True)
    put_folder(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    partial_name(tmp_path / "link").symlink_to("nowhere")
    with whole_file(tmp_path / "link") as path:
        path.symlink_to("x")
    assert os.readlink(tmp_path / "link") == "x"
    (tmp_path / "x").rename(tmp_path / ".x.replaced")  # the moment between the two renames
    with pytest.raises(ValueError), whole_folder(tmp_path / "x"):
        raise ValueError
    assert content(tmp_path / "x") == "new" and not temporary_names(tmp_path)


def test_a_deletion_that_fails_leaves_no_half_folder(tmp_path, monkeypatch):
    put_folder(tmp_path / "x", "old")
    monkeypatch.setattr(durable.os, "unlink", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        remove_folder(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------- the lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    script = (
        "import sys, time; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"^wait$"), folder_lock(tmp_path / "lock", "wait"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(tmp_path / "lock", "wait"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, code):
    def no_locks(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    refused = pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext()
    with refused, folder_lock(tmp_path / "lock", "busy"):
        printed = capsys.readouterr()
        assert str(tmp_path) in printed.err and os.strerror(code) in printed.err and not printed.out
