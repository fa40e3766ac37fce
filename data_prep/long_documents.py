"""Documents too long to be held in memory: read a piece at a time, from wherever they lie."""

import codecs
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hgpt.errors import UserError

LONG_DOCUMENT = 1 << 20  # bytes; a longer one is read in pieces of this size


class LongDocument:
    """A document in a binary file, from where that stands to its end: UTF-8 text, possibly invalid. To be read once."""

    def __init__(self, file: Any) -> None:
        """`file` has `read(size)`; it is closed when nothing refers to it any more."""
        self._file = file
        self.valid = True

    def pieces(self) -> Iterator[bytes]:
        while piece := self._file.read(LONG_DOCUMENT):
            yield piece

    def texts(self) -> Iterator[str]:
        """The text in parts; invalid bytes become U+FFFD, and `valid` then becomes False."""
        strict, lenient = (codecs.getincrementaldecoder("utf-8")(errors) for errors in ("strict", "replace"))
        for piece in self.pieces():
            self._check(strict, piece, final=False)
            yield lenient.decode(piece)
        self._check(strict, b"", final=True)
        if rest := lenient.decode(b"", final=True):
            yield rest

    def _check(self, strict: codecs.IncrementalDecoder, piece: bytes, final: bool) -> None:
        if self.valid:
            try:
                strict.decode(piece, final)
            except UnicodeDecodeError:
                self.valid = False


def spool(pieces: Iterable[bytes], folder: Path | None) -> bytes | LongDocument:
    """What `pieces` are together: bytes, or if that is longer than LONG_DOCUMENT a file without a name in `folder`.

    `folder` None is that of the system's temporary files. Raises UserError if the file cannot be written; errors of
    `pieces` pass through.
    """
    where = str(folder or tempfile.gettempdir())
    file = tempfile.SpooledTemporaryFile(max_size=LONG_DOCUMENT, dir=where)  # noqa: SIM115 - LongDocument keeps it

    def write(method: Callable[[Any], Any], argument: Any) -> None:
        try:
            method(argument)
        except OSError as error:  # which must not be taken for one of `pieces`
            with suppress(OSError):
                file.close()
            raise UserError(
                f"A document of more than {LONG_DOCUMENT:,} bytes is kept in {where} while it is encoded, and that "
                f"cannot be written: {error.strerror or error}. Free space there, and go on with the same command; "
                "what is finished stays."
            ) from error

    size = 0
    for piece in pieces:
        size += len(piece)
        write(file.write, piece)
    write(file.seek, 0)  # which writes what is still buffered
    return LongDocument(file) if size > LONG_DOCUMENT else file.read()
