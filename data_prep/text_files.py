"""Text files to documents: .txt, .jsonl, .parquet, .arrow and similar, text also compressed by gzip or zstd.

`find_files` finds the files, `find_sections` cuts them into sections of a few megabytes, and worker processes read
sections with `read_section`. Documents are bytes, which should be UTF-8; this module does not decode them. One document
is in memory at a time (of a Parquet file up to BATCH_ROWS), and none may be larger than LARGEST_DOCUMENT.
"""

import codecs
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hgpt.errors import UserError

COMPRESSED = (".gz", ".zst")
# Suffix → how the file is read. A folder's files of the second line count only if it has none of the first.
KINDS = {".txt": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".parquet": ".parquet", ".arrow": ".arrow"}
BESIDE_DATA = {".md": ".txt", ".py": ".txt", ".json": ".jsonl"}
KINDS |= BESIDE_DATA
TABLES = (".parquet", ".arrow")
WANTED = (
    f"Wanted: {', '.join(KINDS)} files, text and JSON also with .gz or .zst. Rename what is one of these; convert a "
    "table to .parquet or .jsonl, and other kinds to text."
)
# First bytes of files that are no text, whatever their names say.
NO_TEXT = {
    b"\x1f\x8b": "gzip's: name it .txt.gz or .jsonl.gz",
    b"(\xb5/\xfd": "zstd's: name it .txt.zst or .jsonl.zst",
    b"PAR1": "Parquet's: name it .parquet",
    b"ARROW1": "Arrow's: name it .arrow",
    b"PK\x03\x04": "a zip file's: unpack it",
    b"%PDF-": "PDF's: convert it to text",
}
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException)

LARGEST_DOCUMENT = 64 << 20  # bytes of a text file, of a line of JSON, of a value in a Parquet file
SECTION_BYTES = 4 << 20  # of text: about 0.4 s of work with tiktoken, so that workers finish at about the same time
# Sections of a row group or a compressed file: each is read by decompressing from the beginning, so both have few.
LARGEST_SECTION = 32 << 20
BLOCK = 1 << 20  # bytes that are read from a file at a time
BATCH_ROWS = 16  # rows that are read from a Parquet file at a time


class BadDocument(UserError):
    """A document that cannot be used; the documents after it can be read."""


class WrongColumn(UserError):
    """A table without the column that should hold the text."""


# ------------------------------------------------------------------------------------------------------------
# Files


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The text files in `paths` (files and folders), sorted, and other files in the folders, which cannot be read.

    Folders are searched recursively, also through links; hidden files and folders are skipped. A file named in `paths`
    must be of a readable kind. A file found twice is listed once. Raises UserError.
    """
    found: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                files = _files_below(path)
                possible = [file for file in files if kind_of(file) is not None and file.is_file()]
                readable = [file for file in possible if _suffix(file) not in BESIDE_DATA] or possible
                if not readable:
                    raise UserError(f"folder {path} holds no text to read. {WANTED}")
                found += readable
                ignored += sorted(set(files) - set(readable))
            elif not path.exists():
                raise UserError(f"{path} does not exist. Give the path of a file or a folder of text.")
            elif kind_of(path) is None:
                raise UserError(f"{path}: its name does not say what kind of file it is. {WANTED}")
            elif not path.is_file():
                raise UserError(f"{path} is not a file that can be read twice. Save its content in a file.")
            else:
                found.append(path)
        except OSError as error:
            raise UserError(
                f"{error.filename or path} cannot be read: {error.strerror}. Change its permissions, or leave it out."
            ) from error
    unique = {path.resolve(): path for path in reversed(found)}
    return sorted(unique.values(), key=lambda path: path.as_posix()), sorted(ignored)


def _files_below(folder: Path) -> list[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error

    found = []
    seen = {os.path.realpath(folder)}  # a link may point to a folder above it
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        wanted = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                wanted.append(name)
        folders[:] = wanted
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return found


def say_left_out(ignored: Sequence[Path]) -> None:
    if ignored:
        names = [printable(path.name) + ("" if path.is_file() else " (no file)") for path in ignored[:5]]
        names += ["..."] * (len(ignored) > 5)
        print(f"left out {len(ignored)} files of other kinds: {', '.join(names)}", file=sys.stderr)


def printable(name: str) -> str:
    """`name` with U+FFFD for bytes that are not UTF-8, which Python keeps as surrogates."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def kind_of(path: Path) -> str | None:
    """The kind as which the file is read, .txt, .jsonl, .parquet or .arrow, or None."""
    kind = KINDS.get(_suffix(path))
    return None if is_compressed(path) and kind not in (".txt", ".jsonl") else kind


def _suffix(path: Path) -> str:
    """The suffix of the name without .gz and .zst."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def _open(path: Path) -> IO[bytes]:
    """The decompressed content; a JSON array of a .json file as lines of JSON."""
    stream = _open_compressed(path)
    if _suffix(path) != ".json" or not stream.peek(BLOCK).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        return stream
    with stream:
        content = stream.read(LARGEST_DOCUMENT + 1)
    if len(content) > LARGEST_DOCUMENT:
        raise UserError(
            f"{path} is a JSON array of more than {LARGEST_DOCUMENT >> 20} MiB. Write one object a line into a .jsonl "
            f"file: jq -c '.[]' {path}"
        )
    try:
        rows = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"it is not valid JSON ({error})") from error
    return io.BytesIO("\n".join(map(json.dumps, rows)).encode())


def _open_compressed(path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if suffix == ".zst":
        # pyarrow, because the zstandard package reads a truncated file without an error.
        return io.BufferedReader(pa.input_stream(_for_pyarrow(path), compression="zstd"), BLOCK)
    return open(path, "rb")


def _for_pyarrow(path: Path) -> Any:
    """The path, or the open file if its name is not UTF-8, which pyarrow does not accept."""
    return str(path) if printable(str(path)) == str(path) else open(path, "rb")


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, BadDocument):
        return error
    return UserError(f"{path} cannot be read: {error}. Is it complete? Copy it again.")


# ------------------------------------------------------------------------------------------------------------
# Sections, which can be read independently


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The location of the documents in a file.

    `column`: the field of a line of JSON, or the column of a Parquet or Arrow file, that holds the text; "text.body"
    is the field body of the field text, unless there is a field "text.body". `separator`: the text between the
    documents of a .txt file; None if a file is one document.
    """

    column: str = "text"
    separator: str | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Consecutive documents of one file.

    In a Parquet file: `documents` rows of row group `row_group`, from row `first`; in an Arrow file, of record batch
    `row_group`. In a text file: `documents` documents from byte `offset` of the decompressed content, after the first
    `first` lines or documents. `bytes`: the approximate size of their text.
    """

    path: Path
    documents: int
    bytes: int
    row_group: int = 0
    first: int = 0
    offset: int = 0


def find_sections(
    files: Sequence[Path], fields: Fields, *, skip_bad: bool = False, refuse_empty: bool = False
) -> tuple[list[Section], list[str]]:
    """The sections of all files, in order, and messages about the files that `skip_bad` leaves out.

    Of a Parquet file only the footer is read; any other file is read once, to count its documents. Raises UserError
    for unreadable files (unless `skip_bad`) and for Parquet files without the column. `refuse_empty` treats a file of 0
    bytes as unreadable.
    """
    sections: list[Section] = []
    bad: list[str] = []
    wrong: list[str] = []
    whole: list[Path] = []  # without the separator
    for path in files:
        try:
            if refuse_empty and path.stat().st_size == 0:
                raise OSError("it is empty, 0 bytes")
            if kind_of(path) in TABLES:
                sections += list(_table_sections(path, fields.column))
                continue
            _check_beginning(path)
            of_file = list(_text_sections(path, fields))
            sections += of_file
            if kind_of(path) == ".txt" and fields.separator and sum(s.documents for s in of_file) == 1:
                whole.append(path)
        except WrongColumn as error:
            wrong.append(str(error))
        except (*READ_ERRORS, BadDocument) as error:
            message = str(_unreadable(path, error))
            if not skip_bad:
                raise UserError(f"{message} With --skip-bad it is left out and named in the summary.") from error
            bad.append(message)
    if whole:
        names = ", ".join(map(str, whole[:5])) + (", ..." if len(whole) > 5 else "")
        print(f"note: --separator does not occur in {len(whole)} files, each one document: {names}", file=sys.stderr)
    if wrong:
        fitting = len(files) - len(bad) - len(wrong)
        mixed = f"The source has mixed schemas; in {fitting} of {len(files)} files the text was found.\n"
        raise UserError((mixed if fitting else "") + "\n".join(wrong[:5]) + ("\n..." if len(wrong) > 5 else ""))
    return sections, bad


def read_section(
    section: Section, fields: Fields, on_bad: Callable[[str], None] | None = None
) -> Iterator[bytes | None]:
    """The documents of a section, exactly `section.documents`; None for a null.

    Raises UserError for unreadable documents. With `on_bad` it yields None instead and calls `on_bad` with a message:
    once for a single bad document, or once for all remaining documents of the section if the file is damaged.
    """
    documents = _table_documents if kind_of(section.path) in TABLES else _text_documents
    found = 0
    try:
        for document in documents(section, fields):
            found += 1
            if isinstance(document, BadDocument):
                if on_bad is None:
                    raise document
                on_bad(str(document))
                document = None
            yield document
        if found < section.documents:
            raise OSError(f"{found} documents instead of {section.documents}: it was changed meanwhile")
    except READ_ERRORS as error:
        if on_bad is None:
            raise UserError(
                f"{_unreadable(section.path, error)} With --skip-bad the documents that cannot be read are left out "
                "and counted in the summary. Finished work is kept, and the same command resumes."
            ) from error
        on_bad(f"{section.path}: {section.documents - found} documents cannot be read: {error}")
        yield from [None] * (section.documents - found)


def _too_large(where: str) -> BadDocument:
    return BadDocument(
        f"{where}: a document of more than {LARGEST_DOCUMENT >> 20} MiB. Cut it into several; for a .txt file, "
        "--separator gives the text between its documents. With --skip-bad it is left out."
    )


# ------------------------------------------------------------------------------------------------------------
# .txt and .jsonl


def _pieces(path: Path, fields: Fields, start: int = 0) -> Iterator[tuple[bytes | None, int]]:
    """The lines of a .jsonl file, or the pieces between a .txt file's separators; None if over LARGEST_DOCUMENT.

    Each with the offset of its end in the decompressed content. The first begins at `start`, which must be such an
    offset; in a compressed file it begins at 0.
    """
    separator = b"\n" if kind_of(path) == ".jsonl" else (fields.separator or "").encode()
    # A line break in the separator also matches \r\n. Without a separator nothing matches.
    pattern = re.compile(rb"\r?\n".join(map(re.escape, separator.split(b"\n"))) if separator else rb"(?!)")
    overlap = 2 * len(separator)  # the longest match, if each \n matches \r\n
    with _open(path) as stream:
        offset = 0 if is_compressed(path) else stream.seek(start)
        held = stream.read(BLOCK)
        if offset == 0 and held.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path} is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path}")
        first = searched = 3 if offset == 0 and held.startswith(codecs.BOM_UTF8) else 0  # indices in `held`
        offset += first  # of held[first:]
        ended = too_large = False
        while not ended:
            match = pattern.search(held, searched)
            if match is None:
                too_large |= len(held) - first > LARGEST_DOCUMENT
                unused = len(held) - overlap if too_large else first
                offset += unused - first
                block = stream.read(BLOCK)
                held, first, searched = held[unused:] + block, 0, max(0, len(held) - unused - overlap)
                ended = not block
                if not ended:
                    continue
            begin, end = match.span() if match else (len(held), len(held))
            piece = None if too_large or begin - first > LARGEST_DOCUMENT else held[first:begin]
            offset += end - first
            first, searched, too_large = end, end, False
            yield piece, offset


def _text_sections(path: Path, fields: Fields) -> Iterator[Section]:
    if kind_of(path) == ".txt" and fields.separator is None:
        yield Section(path=path, documents=1, bytes=_size_of_text(path))
        return
    enough = LARGEST_SECTION if is_compressed(path) else SECTION_BYTES
    documents = first = offset = 0
    for number, (piece, end) in enumerate(_pieces(path, fields), start=1):
        documents += _is_document(piece, path)
        if documents and end - offset >= enough:
            yield Section(path=path, documents=documents, bytes=end - offset, first=first, offset=offset)
            documents, first, offset = 0, number, end
    if documents:
        yield Section(path=path, documents=documents, bytes=end - offset, first=first, offset=offset)


def _check_beginning(path: Path) -> None:
    """Raise BadDocument if the first bytes are not of a text; warn of a file full of NUL."""
    with _open(path) as stream:
        start = stream.read(4096)
    for first, advice in NO_TEXT.items():
        if start.startswith(first):
            raise BadDocument(f"{path} is no text; its first bytes are {advice}.")
    if start.count(0) > len(start) / 4:
        print(
            f"warning: {path} is full of NUL bytes. If it is UTF-16 without a mark, convert it: iconv -f UTF-16LE "
            f"-t UTF-8 {path}",
            file=sys.stderr,
        )


def _size_of_text(path: Path) -> int:
    if not is_compressed(path):
        return path.stat().st_size
    with _open(path) as stream:
        return sum(len(block) for block in iter(lambda: stream.read(BLOCK), b""))


def _is_document(piece: bytes | None, path: Path) -> bool:
    """A blank line of a .jsonl file holds no document."""
    return piece is None or kind_of(path) == ".txt" or bool(piece.strip())


# The pieces of the last compressed file that this process read, and their next offset. A next section of the same file
# need not be decompressed again from its beginning.
_kept: dict[Any, tuple[Iterator[tuple[bytes | None, int]], int]] = {}


def _text_documents(section: Section, fields: Fields) -> Iterator[bytes | BadDocument | None]:
    path = section.path
    state = path.stat()
    file = (path, fields, state.st_ino, state.st_size, state.st_mtime_ns)
    pieces, offset = _kept.pop(file, (None, 0))
    if pieces is None or offset > section.offset:
        pieces = _pieces(path, fields, section.offset)
        offset = 0 if is_compressed(path) else section.offset
    while offset < section.offset:
        _, offset = next(pieces, (None, section.offset))
    found = 0
    for number, (piece, end) in enumerate(pieces, start=section.first + 1):
        if not _is_document(piece, path):
            continue
        found += 1
        if kind_of(path) == ".jsonl":
            yield _text_of_line(piece, f"{path}, line {number}", fields.column)
        else:
            yield _too_large(str(path)) if piece is None else piece
        if found == section.documents:
            if is_compressed(path):
                _kept.clear()
                _kept[file] = pieces, end
            break


def _text_of_line(line: bytes | None, where: str, column: str) -> bytes | BadDocument | None:
    """The text in a line of JSON as bytes, with invalid UTF-8 unchanged; None for null."""
    if line is None:
        return _too_large(where)
    try:
        # Invalid bytes become surrogates here and the same bytes again below; data_prep.encoding counts them.
        row = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        return BadDocument(
            f"{where}: cannot be read as JSON ({reason}). Every line must be a JSON object: correct or delete it, or "
            "name the file .txt if it is plain text."
        )
    way_out = _suggest_text_field(row)
    while isinstance(row, dict) and column not in row and isinstance(row.get(column.partition(".")[0]), dict):
        outer, _, column = column.partition(".")
        row = row[outer]
    if not isinstance(row, dict) or column not in row:
        keys = ", ".join(sorted(row)) or "none" if isinstance(row, dict) else ""
        found = f"an object with the keys {keys}" if keys else "another value"
        return BadDocument(f"{where}: no JSON object with a field {column!r}, but {found}. {way_out}")
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        return BadDocument(f"{where}: the field {column!r} must be a string, not {type(text).__name__}. {way_out}")
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # lone surrogates that the JSON writes as escapes
        return b"".join(
            character.encode(errors="surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")
            for character in text
        )


def _suggest_text_field(row: Any) -> str:
    """Advice to name a text field, with the names of those in `row`."""

    def texts(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, dict) and name.count(".") < 5:
            for key, inside in value.items():
                yield from texts(inside, f"{name}.{key}")
        elif isinstance(value, str):
            yield name[1:]

    names = ", ".join(islice(texts(row, ""), 20))
    if not names:
        return 'Nothing in it is text: write each document as {"text": "..."} on a line of a .jsonl file.'
    return f"Name the text field with --text-column. Text is in: {names}."


# ------------------------------------------------------------------------------------------------------------
# .parquet and .arrow


def _open_parquet(path: Path) -> pq.ParquetFile:
    # With pre_buffer=False a row group is read block by block, not at once.
    return pq.ParquetFile(_for_pyarrow(path), pre_buffer=False, buffer_size=BLOCK, page_checksum_verification=True)


@contextmanager
def _open_arrow(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Schema and record batches of a stream, as datasets writes it, or of a file of Arrow's IPC format."""
    with open(path, "rb") as stream:
        if stream.read(6) == b"ARROW1":
            file = pa.ipc.open_file(stream)
            yield file.schema, map(file.get_batch, range(file.num_record_batches))
        else:
            stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            yield reader.schema, iter(reader)


def _field_path(schema: pa.Schema, column: str) -> list[str]:
    """The column, and the fields of structs below it: "text.body" → ["text", "body"], unless it is a name itself."""
    return [column] if column in schema.names else column.split(".")


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    """Raise WrongColumn unless `column` of a table holds text."""
    names = ", ".join(schema.names) or "none"
    way_out = f"Its columns are {names}. {_suggest_text_field({field.name: _example(field.type) for field in schema})}"
    first, *below = _field_path(schema, column)
    if first not in schema.names:
        raise WrongColumn(f"{path} has no column {column!r}. {way_out}")
    if (number := schema.names.count(first)) > 1:
        raise WrongColumn(f"{path} has {number} columns {first!r}; its columns are {names}. Rename or remove one.")
    kind = schema.field(first).type
    for name in below:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            raise WrongColumn(f"{path} has no column {column!r}, and {first!r} holds {kind}. {way_out}")
        kind = kind.field(name).type
    if kind != pa.null() and _example(kind) != "":
        raise WrongColumn(f"{path}: the column {column!r} holds {kind}, not text. {way_out}")


def _example(kind: pa.DataType) -> Any:
    """A value of a column's type: "" for text, a dictionary for a struct, None for anything else."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return {field.name: _example(field.type) for field in kind}
    return "" if kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()) else None


def _table_sections(path: Path, column: str) -> Iterator[Section]:
    """The sections of a table. Raises WrongColumn."""
    for number, (rows, size) in enumerate(_groups(path, column)):
        parts = min(max(1, ceil(size / LARGEST_SECTION)), rows)
        for index in range(parts):
            first, end = (rows * edge // parts for edge in (index, index + 1))
            share = size * (end - first) // rows
            yield Section(path=path, documents=end - first, bytes=share, row_group=number, first=first)


def _groups(path: Path, column: str) -> Iterator[tuple[int, int]]:
    """Rows, and bytes of the column's text, of each row group or record batch."""
    if kind_of(path) == ".arrow":
        with _open_arrow(path) as (schema, batches):
            _check_column(path, schema, column)
            yield from ((batch.num_rows, batch.nbytes) for batch in batches)
        return
    with _open_parquet(path) as file:
        _check_column(path, file.schema_arrow, column)
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = map(group.column, range(group.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            yield group.num_rows, size


def _table_documents(section: Section, fields: Fields) -> Iterator[bytes | BadDocument | None]:
    end = section.first + section.documents
    position = 0
    with _batches(section, fields.column) as batches:
        for batch in batches:
            first, *below = _field_path(batch.schema, fields.column)
            wanted = batch.column(first)[max(0, section.first - position) : max(0, end - position)]
            position += batch.num_rows
            for name in below:
                wanted = pc.struct_field(wanted, name)  # null where the struct is null
            if pa.types.is_dictionary(wanted.type):
                wanted = wanted.dictionary_decode()
            for value in wanted:
                document = value.as_buffer().to_pybytes() if value.is_valid else None
                if document is not None and len(document) > LARGEST_DOCUMENT:
                    document = _too_large(f"{section.path}, row group {section.row_group}")
                yield document
            if position >= end:
                return


@contextmanager
def _batches(section: Section, column: str) -> Iterator[Iterator[pa.RecordBatch]]:
    """The rows of the section's row group or record batch."""
    if kind_of(section.path) == ".arrow":
        with _open_arrow(section.path) as (_, batches):
            yield islice(batches, section.row_group, section.row_group + 1)
    else:
        with _open_parquet(section.path) as file:
            yield file.iter_batches(BATCH_ROWS, row_groups=[section.row_group], columns=[column], use_threads=False)
