"""Atomic writes of files and folders, checksums, and a lock on a folder.

A file or folder is written under a temporary name (.NAME.partial), flushed to the disk and then renamed. So after a
crash it has the old or the complete new content. Two processes must not write the same name.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hgpt.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # the file system does not support locks
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, way_out: str) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, and UserError if it is no file or no JSON."""
    try:
        if not path.is_file() and path.exists():  # opening a FIFO would block
            raise UserError(f"{path} is not a file. {way_out}")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Change its permissions, or: {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). {way_out}") from error


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk, so that it survives a power cut.

    Folders that cannot be flushed (SMB, FUSE) are ignored.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise


def publish(partial: Path, target: Path) -> None:
    """Flush the file or folder `partial` to the disk and rename it to `target`."""
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def partial_name(target: Path) -> Path:
    """The temporary name under which `target` is written."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `target` when the block ends without an error.

    After an error the temporary file is removed and `target` unchanged.
    """
    partial = partial_name(target)
    try:
        partial.unlink(missing_ok=True)  # left by a process that was killed
        yield partial
        publish(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder to write into; rename it to `target` when the block ends without an error.

    After an error the new folder is removed and `target` unchanged. An older folder is renamed to .NAME.replaced first:
    if the process is killed between the two renames, there is no `target`, and the next call puts the older folder
    back. It also removes temporary folders of killed processes. All files get the mode of new files: libraries make
    temporary files that only their owner may read. Raises UserError for an error of the disk.
    """
    partial, older = partial_name(target), target.with_name(f".{target.name}.replaced")
    clean_up(target.parent)
    try:
        _restore(older, target)
        partial.mkdir(parents=True)
        yield partial
        mode = partial.stat().st_mode & 0o666  # a new folder's mode shows the umask, which only os.umask could return
        for path in partial.rglob("*"):
            if path.is_file():
                with suppress(OSError):  # a file system without modes
                    path.chmod(mode)
            sync(path)
        if target.exists():
            os.replace(target, older)
        try:
            publish(partial, target)
        finally:
            _restore(older, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Libraries written in Rust (safetensors, tokenizers) raise exceptions that are no OSError.
        if isinstance(error, OSError) or "os error" in str(error):
            raise UserError(
                f"could not write {target}: {error}. The unfinished folder was removed, older ones are unchanged; "
                "make room, then repeat the command (train.py: with --resume auto)"
            ) from error
        raise


def _restore(older: Path, target: Path) -> None:
    """Rename the folder that was replaced to `target` if there is no `target`, otherwise delete it."""
    if older.exists() and not target.exists():
        os.replace(older, target)
    shutil.rmtree(older, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Delete the temporary folders in `folder` that killed processes left: .NAME.partial and .NAME.deleted."""
    for pattern in (".*.partial", ".*.deleted"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so an interrupted deletion leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a UserError: `path`, a file of a run, could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not write {path}: {error}; make room, then resume with --resume auto") from error


@contextmanager
def folder_lock(file: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on `file`, created if missing. A killed process releases its lock.

    Raises UserError with the message `busy` if another process holds the lock, and OSError if the file cannot be
    written. On a file system without locks, prints a warning and holds none.
    """
    # No fallback to filelock's soft lock, which a killed process would not release.
    lock = FileLock(file, timeout=0.2, fallback_to_soft=False)  # `is_locked` holds it for a moment
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(busy) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: the file system of {file.parent} does not support locks ({error.strerror}): make sure that no "
            "second process works in this folder.",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        lock.release()


def is_locked(file: Path) -> bool | None:
    """Whether a process holds the `folder_lock` of `file`.

    None if unknown: the file is missing or not writable, or the file system does not support locks.
    """
    if not file.is_file():
        return None
    try:
        with FileLock(file, blocking=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:
        return None
