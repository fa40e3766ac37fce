"""The lines of a .jsonl file: each a JSON object, with a document in one of its fields.

A line of more than LONG_DOCUMENT bytes is taken apart while it is read. As a Python object it would take up to ten
times its size, since a str has 4 bytes for every character as soon as one of them is an emoji.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

from data_prep import long_documents
from data_prep.long_documents import LongDocument, spool
from hgpt.errors import UserError


class BadLine(UserError):
    """A line that holds no document; behind it the file can be read on."""


def without_mark(content: bytes, path: Path) -> bytes:
    """`content` without a UTF-8 byte order mark; another mark means another encoding, and is refused."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path}")
    return content.removeprefix(b"\xef\xbb\xbf")


class Stream(Protocol):
    def readline(self, size: int, /) -> bytes: ...


def pieces_of_line(stream: Stream) -> Iterator[bytes]:
    """The next line with its line break, in pieces of at most LONG_DOCUMENT bytes; none at the end of the stream."""
    while piece := stream.readline(long_documents.LONG_DOCUMENT):
        yield piece
        if piece.endswith(b"\n"):
            break


def text_of_line(line: bytes, path: Path, number: int, text_column: str) -> bytes | None:
    """The text in line `number` of `path`, as UTF-8, invalid where the text is; None for null. Raises BadLine."""
    try:
        # Invalid bytes pass through as surrogates and are replaced, and counted, with the others.
        row = json.loads(line.decode(errors="surrogateescape"))
    except ValueError as error:
        raise _not_json(path, number, str(error)) from error
    except RecursionError as error:
        raise _not_json(path, number, "nested too deep") from error
    text = _field(row, path, number, text_column)
    return None if text is None else _raw_bytes(text)


def text_of_long_line(
    pieces: Iterator[bytes], path: Path, number: int, text_column: str, folder: Path | None
) -> bytes | LongDocument | None:
    """As `text_of_line`, of a line in pieces; a long text is kept in a file in `folder` (`spool`).

    Lists and objects inside the object are skipped: only their brackets are checked.
    """
    line = _LongLine(pieces, text_column)
    try:
        text = spool(line.texts(), folder)
        row = json.loads(line.rest.decode(errors="surrogateescape"))
    except ValueError as error:
        raise _not_json(path, number, getattr(error, "msg", str(error))) from error
    finally:
        for _ in pieces:  # to the end of the line, whatever is wrong with it
            pass
    return None if _field(row, path, number, text_column) is None else text


def _not_json(path: Path, number: int, reason: str) -> BadLine:
    return BadLine(
        f"{path}, line {number}: cannot be read as JSON ({reason}). Every line must be one JSON object; mend or delete "
        "the line."
    )


def _field(row: Any, path: Path, number: int, text_column: str) -> str | None:
    if not isinstance(row, dict) or text_column not in row:
        found = f"has the keys {', '.join(sorted(row)) or 'none'}" if isinstance(row, dict) else "is none"
        raise BadLine(
            f"{path}, line {number}: no JSON object with a field {text_column!r}; this one {found}. "
            "Name the field that holds the text with --text-column."
        )
    text = row[text_column]
    if not isinstance(text, str | None):
        raise BadLine(
            f"{path}, line {number}: the field {text_column!r} must be a string, not "
            f"{type(text).__name__}. Name the field that holds the text with --text-column."
        )
    return text


def _raw_bytes(text: str) -> bytes:
    """UTF-8 of `text`, invalid where the text is: escaped bytes as they were, other lone surrogates in three bytes."""
    return text.encode(errors=_raw_surrogates.__name__)


def _raw_surrogates(error: UnicodeError) -> tuple[bytes, int]:
    # One by one, so that a text has the same bytes in parts as in one.
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    escaped = ("surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass" for character in characters)
    return b"".join(map(str.encode, characters, repeat("utf-8"), escaped)), error.end


codecs.register_error(_raw_surrogates.__name__, _raw_surrogates)

_LONGEST_REST = 1 << 20  # bytes of keys, numbers and spaces of an object, which are held
_DEEPEST = 1000
_SPACES = b" \t\n\r"
_CLOSING = {b"[": b"]", b"{": b"}"}
_BRACKET = re.compile(rb"([\[\]{}])")
# Whole characters and escapes inside a string. The escape of a high surrogate is one with that of a low one behind it,
# for json joins the two; and what is behind it must be seen.
_INSIDE = re.compile(
    rb"""(?: [^"\\]++
           | \\ [^u]
           | \\u (?!HIGH) .{4}
           | \\u HIGH .. (?: \\u LOW .. | (?= [^\\] | \\[^u] | \\u (?!LOW) .. ) )
       )*+""".replace(b"HIGH", b"[dD][89abAB]").replace(b"LOW", b"[dD][c-fC-F]"),
    re.DOTALL | re.VERBOSE,
)


class _LongLine:
    """A line that is taken apart: `texts` gives the text in its field, and leaves the others in `rest`.

    `rest` is the line without what is inside its lists, objects and strings other than keys, all but as it would be
    if they were empty: {"title": "", "text": "", "tokens": []}.
    """

    def __init__(self, pieces: Iterator[bytes], text_column: str) -> None:
        self.rest = bytearray()
        self._pieces = pieces
        self._text_column = text_column
        self._held = b""
        self._position = 0  # in `_held`, of what comes next

    def texts(self) -> Iterator[bytes]:
        """The text in parts. Raises ValueError for what is too large, or no JSON unless `rest` is none."""
        if self._first() != b"{":  # whatever it is, and however large, it is no object
            self.rest += b"0"
            return
        closing: list[bytes] = []  # of the brackets that are open, the innermost last
        key, found = None, False
        before = b""  # the last of `rest` that is no space
        while self._position < len(self._held) or self._read_on():
            quote = self._held.find(b'"', self._position)
            end = quote if quote >= 0 else len(self._held)
            for part in _BRACKET.split(self._held[self._position : end]):
                level = len(closing)
                if part in _CLOSING:
                    closing.append(_CLOSING[part])
                    if len(closing) > _DEEPEST:
                        raise ValueError(f"nested more than {_DEEPEST:,} deep")
                elif part in _CLOSING.values() and (not closing or closing.pop() != part):
                    raise ValueError(f"unexpected {part.decode()}")
                if min(level, len(closing)) <= 1:
                    self.rest += part
                    before = part.strip()[-1:] or before
            _check_size(self.rest)
            self._position = end
            if quote < 0:
                continue
            if not closing:
                raise ValueError("a string outside the object")
            self._position += 1
            if len(closing) > 1:
                for _ in self._inside():
                    pass
                continue
            if before == b":":
                wanted = key == self._text_column
                if wanted and found:
                    raise ValueError(f"the field {key!r} comes twice")
                found |= wanted
                for part in self._inside():
                    text = _decoded(part)
                    if wanted:
                        yield _raw_bytes(text)
                self.rest += b'""'
            else:
                content = bytearray()
                for part in self._inside():
                    content += part
                    _check_size(content)
                key = _decoded(content)
                self.rest += b'"' + content + b'"'
            before = b'"'

    def _first(self) -> bytes:
        """The first character that is no space."""
        while not (held := self._held.lstrip(_SPACES)):
            self._position = len(self._held)
            if not self._read_on():
                break
        return held[:1]

    def _inside(self) -> Iterator[bytes]:
        """What is inside a string, in parts that each are JSON, to behind its closing quote."""
        while True:
            match = _INSIDE.match(self._held, self._position)
            assert match is not None
            end = match.end()
            closed = self._held[end : end + 1] == b'"'
            if not closed:
                end = _end_of_characters(self._held, self._position, end)
            yield self._held[self._position : end]
            self._position = end + closed
            if closed:
                return
            if not self._read_on():
                raise ValueError("unterminated string")

    def _read_on(self) -> bool:
        piece = next(self._pieces, b"")
        self._held = self._held[self._position :] + piece
        self._position = 0
        return bool(piece)


def _check_size(rest: bytearray) -> None:
    if len(rest) > _LONGEST_REST:
        raise ValueError(f"its keys, numbers and spaces take more than {_LONGEST_REST:,} bytes")


def _decoded(content: bytes | bytearray) -> str:
    """What is inside a JSON string, without its escapes. Raises ValueError."""
    return json.loads('"' + content.decode(errors="surrogateescape") + '"')


def _end_of_characters(content: bytes, start: int, end: int) -> int:
    """`end`, or before it the beginning of the UTF-8 character that stands there and may not be whole."""
    for place in range(end - 1, max(start, end - 4) - 1, -1):
        if content[place] >= 0xC0:
            return place
        if content[place] < 0x80:
            break
    return end
