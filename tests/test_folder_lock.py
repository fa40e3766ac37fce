"""hgpt/durable.py: one process at a time, file systems without locks, and a file that is removed under the lock."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from hgpt.durable import folder_lock
from hgpt.errors import UserError


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
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


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys, code):
    def no_locks(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_lock(tmp_path / "lock", "busy"):
        printed = capsys.readouterr()
    assert f"the file system of {tmp_path} has no locks ({os.strerror(code)})" in printed.err and not printed.out


def test_any_other_error_is_raised(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="input/output error"), folder_lock(tmp_path / "lock", "busy"):
        pass
    with pytest.raises(FileNotFoundError), folder_lock(tmp_path / "nowhere" / "lock", "busy"):
        pass
    assert not capsys.readouterr().err


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
