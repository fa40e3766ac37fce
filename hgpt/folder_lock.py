"""One process at a time in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hgpt.errors import UserError


@contextmanager
def folder_lock(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock on `file`, which is made if need be; it ends with the process, however that ends.

    Raises UserError with the message `busy` if another process holds it, and OSError if the file cannot be written.
    Where the file system has no locks, nothing is held.
    """
    with open(file, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError:  # ENOLCK, ENOTSUP
            pass
        yield
