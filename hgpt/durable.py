"""One process at a time in a folder."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hgpt.errors import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # how a file system without locks says so


@contextmanager
def folder_lock(file: Path, busy: str) -> Iterator[None]:
    """Hold a lock on `file`, which is made if need be; it ends with the process, however that ends.

    Raises UserError with the message `busy` if another process holds it, and OSError if the file cannot be written.
    Where the file system has no locks, nothing is held, and a warning on stderr says so.
    """
    with open(file, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: the file system of {file.parent} has no locks ({error.strerror}): take care that no second "
                "process works in this folder.",
                file=sys.stderr,
            )
        # Whoever held the lock may have removed the file, its work done, after it was opened here.
        if not (file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat())):
            raise UserError(busy)
        yield
