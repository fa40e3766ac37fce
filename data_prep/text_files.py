"""Text files to documents: .txt, .jsonl and .parquet, the first two also compressed by gzip or zstd.

A document is the bytes of UTF-8 text, possibly invalid: the decoding is left to whoever encodes it, in parallel.
`read_documents` reads files from the first to the last document; `find_sections` cuts them into sections, which
several processes read at once with `read_section`. A .txt file is held as a whole. A line of a .jsonl file takes some
four times its size while it is decoded, and ten times where an emoji stands in plain English: Python's str then has 4
bytes for every character.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hgpt.errors import UserError

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".parquet")
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

SECTION_BYTES = 4 << 20  # of text: some 0.4 s of work with tiktoken, so that many processes end together
# What stands before a section in its row group, or in its compressed file, is decompressed for it once more. So these
# have few sections, of any size up to that of the text of a shard (a byte is one token at most; for as many sections as
# that takes, decompressing again costs less than encoding does).
SECTIONS_PER_ROW_GROUP = 4
LARGEST_SECTION = 100_000_000
BATCH_ROWS = 64  # of a Parquet file at once, fewer where documents are long
BATCH_BYTES = 1 << 20


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
    """The documents of the files, in order, as bytes of UTF-8 text, possibly invalid. Memory stays bounded.

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
                        content = _without_mark(stream.read(), file)
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


def _without_mark(content: bytes, path: Path) -> bytes:
    """`content` without a UTF-8 byte order mark; another mark means another encoding, and is refused."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path}")
    return content.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(stream: Iterable[bytes], path: Path, text_column: str) -> Iterator[bytes]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = _without_mark(line, path)
        if line.strip():
            yield _text_of_line(line, path, number, text_column) or b""


def _text_of_line(line: bytes, path: Path, number: int, text_column: str) -> bytes | None:
    """The text in line `number` of a .jsonl file, None for null."""
    try:
        # Invalid bytes pass through as surrogates and are replaced, and counted, with the others.
        row = json.loads(line.decode(errors="surrogateescape"))
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: not a JSON value ({error}). Every line must be one JSON object; "
            "mend or delete the line."
        ) from error
    if not isinstance(row, dict) or text_column not in row:
        found = f"has the keys {', '.join(sorted(row)) or 'none'}" if isinstance(row, dict) else "is none"
        raise UserError(
            f"{path}, line {number}: no JSON object with a field {text_column!r}; this one {found}. "
            "Name the field that holds the text with --text-column."
        )
    text = row[text_column]
    if not isinstance(text, str | None):
        raise UserError(
            f"{path}, line {number}: the field {text_column!r} must be a string, not "
            f"{type(text).__name__}. Name the field that holds the text with --text-column."
        )
    return None if text is None else _raw_bytes(text)


def _raw_bytes(text: str) -> bytes:
    """UTF-8 of `text`, invalid where the text is: escaped bytes as they were, lone surrogates as such."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


def _read_parquet(path: Path, text_column: str) -> Iterator[bytes]:
    with _open_parquet(path) as file:
        wrong = _wrong_column(file.schema_arrow, text_column)
        if wrong is not None:
            raise UserError(f"{path}{wrong}")
        for row_group in range(file.num_row_groups):
            rows = _row_group(file, row_group, text_column)
            yield from (document or b"" for document in rows)


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
) -> Iterator[bytes | None]:
    """`number` rows of a row group, or all, from row `first` on; null is None.

    As bytes: pyarrow makes no str of invalid UTF-8. Python holds one row at a time. pyarrow holds a batch: BATCH_BYTES
    if its rows are of average size, and never more than BATCH_ROWS rows. How large these are, only reading them tells.
    """
    rows = file.metadata.row_group(row_group).num_rows
    end = rows if number is None else first + number
    average = _text_bytes(file.metadata, row_group, text_column) / max(1, rows)
    batch_size = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, average))))
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


def _values(texts: pa.LargeBinaryArray) -> Iterator[bytes | None]:
    """The values one by one, straight from the buffers: a pyarrow scalar would be one more copy of each."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset :]
    view = memoryview(content) if content is not None else memoryview(b"")
    for index, valid in enumerate(texts.is_valid().to_pylist()):
        yield view[ends[index] : ends[index + 1]].tobytes() if valid else None


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
    document. `bytes` is about the size of the text.
    """

    path: Path
    documents: int
    bytes: int
    row_group: int = 0
    first: int = 0
    offset: int = 0


def find_sections(files: Sequence[Path], text_column: str, *, skip_bad: bool) -> tuple[list[Section], list[str]]:
    """The sections of all files, in order, and what is wrong with the files that `skip_bad` leaves out.

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
                        sections += _parquet_sections(path, file.metadata, text_column)
                    else:
                        wrong.append(f"{path}{reason}")
            elif kinds == [".jsonl"]:
                sections += _jsonl_sections(path)
            else:
                sections.append(Section(path=path, documents=1, bytes=_size_of_text(path)))
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


def _parquet_sections(path: Path, metadata: pq.FileMetaData, text_column: str) -> Iterator[Section]:
    for row_group in range(metadata.num_row_groups):
        rows = metadata.row_group(row_group).num_rows
        size = _text_bytes(metadata, row_group, text_column)
        number = max(min(SECTIONS_PER_ROW_GROUP, round(size / SECTION_BYTES)), ceil(size / LARGEST_SECTION), 1)
        number = min(number, max(1, rows))
        for index in range(number):
            first, end = rows * index // number, rows * (index + 1) // number
            if end > first:
                share = size * (end - first) // rows
                yield Section(path=path, documents=end - first, bytes=share, row_group=row_group, first=first)


def _jsonl_sections(path: Path) -> Iterator[Section]:
    """A section for every SECTION_BYTES; of a compressed file for every LARGEST_SECTION, or more.

    More where that is less than a sixteenth of what stands before it, beyond 1.6 GB of text: decompressing what stands
    before a section never becomes more work than encoding the section.
    """
    compressed = is_compressed(path)
    documents = first = lines = offset = position = 0
    with _open(path) as stream:
        for line in stream:
            documents += bool(line.strip())
            lines += 1
            position += len(line)
            if position - offset >= (max(LARGEST_SECTION, offset // 16) if compressed else SECTION_BYTES):
                yield Section(path=path, documents=documents, bytes=position - offset, first=first, offset=offset)
                documents, first, offset = 0, lines, position
    if documents:
        yield Section(path=path, documents=documents, bytes=position - offset, first=first, offset=offset)


def _size_of_text(path: Path) -> int:
    if not is_compressed(path):
        return path.stat().st_size
    with _open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))


def read_section(
    section: Section, text_column: str, on_bad: Callable[[str], None] | None = None
) -> Iterator[bytes | None]:
    """The documents of a section, exactly `section.documents`; None for one that is null.

    What cannot be read is a UserError; with `on_bad` it is None too, and `on_bad` is told what was wrong: a line of
    a .jsonl file, all that follows the damage in a section of a Parquet file.
    """
    found = 0
    try:
        for document in _documents_of(section, text_column, on_bad):
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


def _documents_of(section: Section, text_column: str, on_bad: Callable[[str], None] | None) -> Iterator[bytes | None]:
    path = section.path
    kind = kind_of(path)
    if kind == ".parquet":
        with _open_parquet(path) as file:
            yield from _row_group(file, section.row_group, text_column, section.first, section.documents)
        return
    with _open(path) as stream:
        if kind == ".txt":
            yield _without_mark(stream.read(), path)
            return
        if is_compressed(path):  # zstd's reader cannot seek
            ahead = section.offset
            while ahead and (skipped := len(stream.read(min(ahead, 1 << 20)))):
                ahead -= skipped
        else:
            stream.seek(section.offset)
        remaining = section.documents
        for number, line in enumerate(stream, start=section.first + 1):
            if number == 1:
                line = _without_mark(line, path)
            if not line.strip():
                continue
            try:
                yield _text_of_line(line, path, number, text_column)
            except UserError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
                yield None
            remaining -= 1
            if not remaining:
                break
