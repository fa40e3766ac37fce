"""Text files to documents: .txt, .jsonl and .parquet, the first two also compressed by gzip or zstd.

A document is the bytes of UTF-8 text, possibly invalid: the decoding is left to whoever encodes it, in parallel.
`read_documents` reads files from the first to the last document, and holds each as a whole.

`find_sections` cuts the files into sections, which several processes read at once with `read_section`. There a document
of more than LONG_DOCUMENT bytes is a `LongDocument`, to be read a piece at a time, and of a .txt or .jsonl file no more
than a piece is ever held: some 20 MB of memory while it is decoded. Not so of a Parquet file, for pyarrow reads whole
values: it takes up to four times the size of the largest one (compressed, decompressed, as a value, and what its memory
pool holds back), or of BATCH_ROWS_OF_LARGE neighbours; of all values in a row group of up to LARGE_ROW_GROUP bytes.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import long_documents
from data_prep.jsonl import BadLine, pieces_of_line, text_of_line, text_of_long_line, without_mark
from data_prep.long_documents import LongDocument, spool
from hgpt.errors import UserError

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".parquet")
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

SECTION_BYTES = 4 << 20  # of text: some 0.4 s of work with tiktoken, so that many processes end together
# What stands before a section in its row group is decompressed for it once more, and what stands before it in its
# compressed file once for every process that reads sections of it. So these have few sections, of any size up to this,
# which is no more than a shard of text: a byte is one token at most.
SECTIONS_PER_ROW_GROUP = 4
LARGEST_SECTION = 100_000_000
BATCH_BYTES = 1 << 20  # of a Parquet file at once, if all its rows are of average size
BATCH_ROWS = 64
# Where more than this can stand in a few rows, fewer are read at once. That takes longer: 12 us instead of 9 for a row
# of 5 kB, of which encoding takes 500.
LARGE_ROW_GROUP = 64_000_000
BATCH_ROWS_OF_LARGE = 8


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The text files named by `paths`, folders searched in full, sorted; and the files of folders left out.

    A file that is named itself must be of a kind that can be read; in a folder, others (a README, say) are
    left out, hidden ones silently.
    """
    found: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                files = _files_below(path)
                readable = [file for file in files if kind_of(file) is not None]
                if not readable:
                    raise UserError(
                        f"folder {path} holds no text to read. Wanted: {', '.join(SUFFIXES)} files, the first "
                        "two also with .gz or .zst."
                    )
                found += readable
                ignored += [file for file in files if kind_of(file) is None]
            elif not path.exists():
                raise UserError(f"{path} does not exist. Give the path of a file or a folder of text.")
            elif kind_of(path) is None:
                raise UserError(
                    f"{path}: cannot tell from its name what it holds. Wanted: {', '.join(SUFFIXES)}, the first "
                    "two also with .gz or .zst; rename it if it is one of these."
                )
            else:
                found.append(path)
        except OSError as error:
            raise UserError(
                f"{error.filename or path} cannot be read: {error.strerror}. Change its permissions, or leave it out."
            ) from error
    unique = {path.resolve(): path for path in reversed(found)}
    return sorted(unique.values(), key=lambda path: path.as_posix()), sorted(ignored)


def _files_below(folder: Path) -> list[Path]:
    """The files in a folder and its folders, but for hidden ones. Raises OSError for a folder that cannot be read."""

    def fail(error: OSError) -> NoReturn:
        raise error

    found = []
    for parent, folders, files in os.walk(folder, onerror=fail):  # Path.rglob leaves out what it cannot read
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return [file for file in found if file.is_file()]


def read_documents(files: Sequence[Path], text_column: str = "text", separator: str | None = None) -> Iterator[bytes]:
    """The documents of the files, in order, as bytes of UTF-8 text, possibly invalid; one is held at a time.

    A .txt file is one document, or several with `separator` between them; a .jsonl file has one per line and a .parquet
    file one per row, in the field or column `text_column`; a null there is an empty document. Raises UserError with
    file and line or column.
    """
    for file in files:
        kind = kind_of(file)
        try:
            if kind == ".parquet":
                yield from _read_parquet(file, text_column)
            else:
                with _open(file) as stream:
                    if kind == ".txt":
                        content = without_mark(stream.read(), file)
                        yield from [content] if separator is None else content.split(separator.encode())
                    else:
                        yield from _read_jsonl(stream, file, text_column)
        except READ_ERRORS as error:
            raise _unreadable(file, error) from error


def count_documents(files: Sequence[Path]) -> int | None:
    """The number of documents if it can be had without reading them, which .jsonl does not allow."""
    total = 0
    for file in files:
        kind = kind_of(file)
        if kind == ".jsonl":
            return None
        try:
            total += pq.read_metadata(file).num_rows if kind == ".parquet" else 1
        except READ_ERRORS as error:
            raise _unreadable(file, error) from error
    return total


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {error}. Is it complete? Copy it again.")


def kind_of(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, or None for what cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl") else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def _open(path: Path) -> io.BufferedIOBase | IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        # By pyarrow, because the reader of the package zstandard takes a truncated file for a whole one.
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return open(path, "rb")


def _read_jsonl(stream: Iterable[bytes], path: Path, text_column: str) -> Iterator[bytes]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = without_mark(line, path)
        if line.strip():
            yield text_of_line(line, path, number, text_column) or b""


def _read_parquet(path: Path, text_column: str) -> Iterator[bytes]:
    with _open_parquet(path) as file:
        wrong = _wrong_column(file.schema_arrow, text_column)
        if wrong is not None:
            raise UserError(f"{path}{wrong}")
        for row_group in range(file.num_row_groups):
            rows = _row_group(file, row_group, text_column)
            yield from (b"" if row is None else bytes(row) for row in rows)


def _open_parquet(path: Path) -> pq.ParquetFile:
    # Without pre_buffer a row group is read a megabyte at a time and not as a whole.
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)


def _wrong_column(schema: pa.Schema, text_column: str) -> str | None:
    """Why `text_column` of a Parquet file holds no text, to stand behind the name of the file; None if it does."""
    if text_column not in schema.names:
        return (
            f" has no column {text_column!r}; its columns are {', '.join(schema.names) or 'none'}. Name the one that "
            "holds the text with --text-column."
        )
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    if any(test(kind) for test in text):
        return None
    return (
        f": the column {text_column!r} holds {kind}, not text. Its columns are {', '.join(schema.names)}: name the "
        "one that holds the text with --text-column."
    )


def _row_group(
    file: pq.ParquetFile, row_group: int, text_column: str, first: int = 0, number: int | None = None
) -> Iterator[memoryview | None]:
    """`number` rows of a row group, or all, from row `first` on; null is None.

    As bytes: pyarrow makes no str of invalid UTF-8. They lie in a batch of pyarrow's: of BATCH_BYTES if its rows are of
    average size. How large they are, only reading them tells, so that it never has many rows.
    """
    rows = file.metadata.row_group(row_group).num_rows
    end = rows if number is None else first + number
    size = _text_bytes(file.metadata, row_group, text_column)
    most_rows = BATCH_ROWS if size <= LARGE_ROW_GROUP else BATCH_ROWS_OF_LARGE
    batch_size = max(1, min(most_rows, BATCH_BYTES * rows // max(1, size)))
    position = 0
    for batch in file.iter_batches(batch_size, row_groups=[row_group], columns=[text_column], use_threads=False):
        column = batch.column(0)
        wanted = column[max(0, first - position) : max(0, end - position)]
        position += len(column)
        if len(wanted):
            if pa.types.is_dictionary(wanted.type):
                wanted = wanted.dictionary_decode()
            yield from _values(wanted.cast(pa.large_binary()))
        if position >= end:
            break


def _values(texts: pa.LargeBinaryArray) -> Iterator[memoryview | None]:
    """The values one by one, where they lie: a pyarrow scalar would be a copy of each."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset :]
    view = memoryview(content) if content is not None else memoryview(b"")
    for index, valid in enumerate(texts.is_valid().to_pylist()):
        yield view[ends[index] : ends[index + 1]] if valid else None


def _text_bytes(metadata: pq.FileMetaData, row_group: int, text_column: str) -> int:
    """The size of the text column in a row group before compression."""
    columns = metadata.row_group(row_group)
    for index in range(columns.num_columns):
        if columns.column(index).path_in_schema == text_column:
            return columns.column(index).total_uncompressed_size
    raise UserError(f"no column {text_column!r}")


# ------------------------------------------------------------------------------------------------------------
# Sections: what one process reads without reading what stands before it


@dataclass(frozen=True, kw_only=True)
class Section:
    """Consecutive documents of one file.

    Of a Parquet file `documents` rows from row `first` of row group `row_group`; of a .jsonl file as many lines that
    are not blank, from byte `offset` of what is decompressed, before which there are `first` lines; a .txt file is one
    document. `bytes` is about the size of the text, `longest` that of the longest document if that has to be copied to
    be read in pieces, which one in a Parquet file has not.
    """

    path: Path
    documents: int
    bytes: int
    longest: int = 0
    row_group: int = 0
    first: int = 0
    offset: int = 0


def find_sections(
    files: Sequence[Path], text_column: str, *, skip_bad: bool, largest: int = LARGEST_SECTION
) -> tuple[list[Section], list[str]]:
    """The sections of all files, in order, and what is wrong with the files that `skip_bad` leaves out.

    No section is to have more than `largest` bytes of text, or LARGEST_SECTION, and one document more.
    Of a Parquet file only the footer is read; a .jsonl file is read once, to count its lines, and a compressed .txt
    file for its size. Raises UserError for files that cannot be read (unless `skip_bad`), of different kinds, or whose
    schemas do not fit together.
    """
    kinds = sorted({kind for kind in map(kind_of, files) if kind is not None})
    if len(kinds) > 1:
        raise UserError(
            f"The source holds {' and '.join(kinds)} files, and it cannot be told whether they are the same documents "
            "twice, nor in which order they come. Give a folder with files of one kind."
        )
    sections: list[Section] = []
    bad: list[str] = []
    wrong: list[str] = []
    for path in files:
        try:
            if path.stat().st_size == 0:
                raise OSError("it is empty, 0 bytes")
            if kinds == [".parquet"]:
                with _open_parquet(path) as file:
                    reason = _wrong_column(file.schema_arrow, text_column)
                    if reason is None:
                        sections += _parquet_sections(path, file.metadata, text_column, largest)
                    else:
                        wrong.append(f"{path}{reason}")
            elif kinds == [".jsonl"]:
                sections += _jsonl_sections(path, largest)
            else:
                size = _size_of_text(path)
                sections.append(Section(path=path, documents=1, bytes=size, longest=size))
        except READ_ERRORS as error:
            message = str(_unreadable(path, error))
            if not skip_bad:
                raise UserError(f"{message} With --skip-bad it is left out and named in the summary.") from error
            bad.append(message)
    if wrong:
        fitting = len(files) - len(bad) - len(wrong)
        mixed = f"The source has mixed schemas; in {fitting} of {len(files)} files the text was found.\n"
        raise UserError((mixed if fitting else "") + "\n".join(wrong[:5]) + ("\n..." if len(wrong) > 5 else ""))
    return sections, bad


def _parquet_sections(path: Path, metadata: pq.FileMetaData, text_column: str, largest: int) -> Iterator[Section]:
    for row_group in range(metadata.num_row_groups):
        rows = metadata.row_group(row_group).num_rows
        size = _text_bytes(metadata, row_group, text_column)
        number = max(
            min(SECTIONS_PER_ROW_GROUP, round(size / SECTION_BYTES)), ceil(size / min(LARGEST_SECTION, largest)), 1
        )
        number = min(number, max(1, rows))
        for index in range(number):
            first, end = rows * index // number, rows * (index + 1) // number
            if end > first:
                share = size * (end - first) // rows
                yield Section(path=path, documents=end - first, bytes=share, row_group=row_group, first=first)


def _jsonl_sections(path: Path, largest: int) -> Iterator[Section]:
    """A section for every SECTION_BYTES, of a compressed file for every LARGEST_SECTION."""
    enough = min(LARGEST_SECTION if is_compressed(path) else SECTION_BYTES, largest)
    documents = first = lines = offset = position = longest = 0
    with _open(path) as stream:
        while True:
            size, blank = 0, True
            for piece in pieces_of_line(stream):
                blank = blank and not (piece if position or size else without_mark(piece, path)).strip()
                size += len(piece)
            if size:
                documents += not blank
                lines += 1
                position += size
                longest = max(longest, size)
            if documents and (position - offset >= enough or not size):
                yield Section(
                    path=path,
                    documents=documents,
                    bytes=position - offset,
                    longest=longest,
                    first=first,
                    offset=offset,
                )
                documents, longest, first, offset = 0, 0, lines, position
            if not size:
                return


def _size_of_text(path: Path) -> int:
    if not is_compressed(path):
        return path.stat().st_size
    with _open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))


def read_section(
    section: Section,
    text_column: str,
    on_bad: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> Iterator[bytes | LongDocument | None]:
    """The documents of a section, exactly `section.documents`; None for one that is null.

    One of more than LONG_DOCUMENT bytes is a `LongDocument`, to be read before the next one is asked for. `folder` is
    for those that must be copied to be read in pieces (`spool`). What cannot be read is a UserError; with `on_bad` it
    is None too, and `on_bad` is told what was wrong: a line of a .jsonl file, all that follows the damage in a section
    of a Parquet file.
    """
    kind = kind_of(section.path)
    if kind == ".parquet":
        documents = _documents_of_parquet(section, text_column)
    elif kind == ".txt":
        documents = _document_of_txt(section.path, folder)
    else:
        documents = _documents_of_jsonl(section, text_column, on_bad, folder)
    found = 0
    try:
        for document in documents:
            found += 1
            yield document
        if found < section.documents:
            raise OSError(f"{found} documents instead of {section.documents}: it was changed meanwhile")
    except READ_ERRORS as error:
        if on_bad is None:
            raise UserError(
                f"{_unreadable(section.path, error)} With --skip-bad the documents that cannot be read are left out "
                "and counted in the summary; what is finished stays, and the same command goes on."
            ) from error
        on_bad(f"{section.path}: {section.documents - found} documents cannot be read: {error}")
        yield from [None] * (section.documents - found)


def _documents_of_parquet(section: Section, text_column: str) -> Iterator[bytes | LongDocument | None]:
    with _open_parquet(section.path) as file:
        for row in _row_group(file, section.row_group, text_column, section.first, section.documents):
            if row is None:
                yield None
            elif len(row) > long_documents.LONG_DOCUMENT:
                yield LongDocument(pa.BufferReader(row))
            else:
                yield bytes(row)


def _document_of_txt(path: Path, folder: Path | None) -> Iterator[bytes | LongDocument]:
    with _open(path) as stream:
        head = stream.read(long_documents.LONG_DOCUMENT + 1)
        text = without_mark(head, path)
        if len(head) <= long_documents.LONG_DOCUMENT:
            yield text
        else:  # copied, to find damage before the first piece is encoded
            pieces = iter(lambda: stream.read(long_documents.LONG_DOCUMENT), b"")
            yield spool(chain([text], pieces), folder)


def _documents_of_jsonl(
    section: Section, text_column: str, on_bad: Callable[[str], None] | None, folder: Path | None
) -> Iterator[bytes | LongDocument | None]:
    path = section.path
    with _stream_at(path, section.offset) as stream:
        found = 0
        number = section.first
        while found < section.documents:
            pieces = pieces_of_line(stream)
            line = next(pieces, b"")
            if not line:
                return
            number += 1
            whole = len(line) < long_documents.LONG_DOCUMENT or line.endswith(b"\n")
            if number == 1:
                line = without_mark(line, path)
            while line and not line.strip():
                line = next(pieces, b"")
            if not line:
                continue
            try:
                text: bytes | LongDocument | None
                if whole:
                    text = text_of_line(line, path, number, text_column)
                else:
                    text = text_of_long_line(chain([line], pieces), path, number, text_column, folder)
            except BadLine as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
                text = None
            found += 1
            yield text


class _Decompressed:
    """A compressed file while it is decompressed, and how far that is."""

    def __init__(self, path: Path) -> None:
        self._stream = _open(path)
        self._position = 0
        self.close = self._stream.close

    def readline(self, size: int) -> bytes:
        line = self._stream.readline(size)
        self._position += len(line)
        return line

    def go_to(self, offset: int) -> bool:
        """Whether `offset` is now next: what lies behind is not reached again."""
        while self._position < offset and (skipped := len(self._stream.read(min(offset - self._position, 1 << 20)))):
            self._position += skipped
        return self._position == offset


# The compressed file that this process read last, by what it was then: the next section of it is not far.
_read_last: dict[tuple[Path, int, int, int], _Decompressed] = {}


@contextmanager
def _stream_at(path: Path, offset: int) -> Iterator[IO[bytes] | _Decompressed]:
    """The file from byte `offset` of what is decompressed on."""
    if not is_compressed(path):
        with open(path, "rb") as file:
            file.seek(offset)
            yield file
        return
    state = path.stat()
    this = (path, state.st_ino, state.st_size, state.st_mtime_ns)
    stream = _read_last.pop(this, None)
    try:
        if stream is None or not stream.go_to(offset):
            stream = _Decompressed(path)
            stream.go_to(offset)
        yield stream
    except BaseException:
        if stream is not None:
            stream.close()
        raise
    for other in _read_last.values():
        other.close()
    _read_last.clear()
    _read_last[this] = stream
