"""Your own text to token shards.

    python -m data_prep.documents --out data/mine --tokenizer gpt2 FILES...

`prepare` is the core that every data script shares: it takes documents from anywhere, encodes them in worker
processes, splits them into train and val, and writes a data folder (hgpt/shards.py says what is in one).
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hgpt.errors import UserError
from hgpt.shards import (
    META_FILE,
    SPLITS,
    TOKENS_PER_SHARD,
    DataMeta,
    ShardWriter,
    SplitMeta,
    check_vocab_size,
    write_meta,
)
from hgpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, package_versions

BATCH_BYTES = 1 << 20  # text handed to a worker at once: about 70 ms of work with tiktoken
BATCH_DOCUMENTS = 1024
ONE_DOCUMENT = (
    "All the text is one document, and the split into train and val is by document. Give several files, a .jsonl file "
    "with one document per line, or say with --separator what separates the documents of a .txt file (a blank line: "
    r"--separator '\n\n')."
)
FEW_BATCHES = 32  # less than this is encoded before worker processes have even imported their modules


# ------------------------------------------------------------------------------------------------------------
# The core: documents → data folder


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which side a document falls on: a function of the seed and the document's own words, of nothing else.

        place = BLAKE2b(words joined by single spaces; key = seed) / 2^64 ∈ [0, 1)
        val ⟺ place < val_fraction

    So the split does not depend on the order of the documents, on the other documents, on the number of
    workers or on the tokenizer; a document added later moves no other one; and texts that are identical, or
    differ only in white space, always fall on the same side, so a copy of a training document is never
    validated on.
    """

    seed: int = 0
    val_fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"--val-fraction must lie between 0 and 1, not {self.val_fraction}: both sides need "
                "documents. 0.01 keeps one document in a hundred for validation."
            )
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must be from 0 to 2^64 - 1, not {self.seed}.")

    def place(self, text: str) -> float:
        words = " ".join(text.split()).encode()
        digest = hashlib.blake2b(words, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") / 2.0**64

    def side(self, place: float) -> str:
        return "val" if place < self.val_fraction else "train"


@dataclass
class Counts:
    """What one side of the split, or both together, hold."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def add(self, other: "Counts") -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.characters += other.characters
        self.bytes += other.bytes


@dataclass
class EncodedBatch:
    """Some documents, encoded: per split the tokens (uint16, end-of-text after each document) and the counts.

    `empty` documents were skipped, `replaced` ones held invalid UTF-8. `smallest_place` and `largest_place`
    are the extremes of `SplitRule.place`: they tell which fraction would have given both sides a document.
    """

    tokens: dict[str, np.ndarray]
    counts: dict[str, Counts]
    empty: int
    replaced: int
    smallest_place: float
    largest_place: float


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes a batch of documents, given as the bytes of UTF-8 text. Pickled once into each worker."""

    tokenizer: Tokenizer
    split: SplitRule

    def __call__(self, documents: Sequence[bytes]) -> EncodedBatch:
        texts = {side: [] for side in SPLITS}  # type: dict[str, list[str]]
        counts = {side: Counts() for side in SPLITS}
        empty = replaced = 0
        smallest, largest = 1.0, 0.0
        for document in documents:
            text, valid = decode_utf8(document)
            if not text or text.isspace():
                empty += 1
                continue
            replaced += not valid
            place = self.split.place(text)
            smallest, largest = min(smallest, place), max(largest, place)
            side = self.split.side(place)
            texts[side].append(text)
            size = len(document) if valid else len(text.encode())
            counts[side].add(Counts(documents=1, characters=len(text), bytes=size))
        end_of_text = np.array([self.tokenizer.end_of_text], dtype=np.uint16)
        tokens = {}
        for side in SPLITS:
            pieces = []
            for encoded in self.tokenizer.encode_batch(texts[side]):
                pieces += [encoded.astype(np.uint16), end_of_text]
            tokens[side] = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)
            counts[side].tokens = tokens[side].size
        return EncodedBatch(tokens, counts, empty, replaced, smallest, largest)


def decode_utf8(document: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; invalid bytes become U+FFFD."""
    try:
        return document.decode(), True
    except UnicodeDecodeError:
        return document.decode(errors="replace"), False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` did, for its summary."""

    folder: Path
    meta: DataMeta
    counts: dict[str, Counts]
    empty: int
    replaced: int
    seconds: float


def prepare(
    open_documents: Callable[[], Iterable[bytes]],
    out: str | Path,
    *,
    tokenizer: str,
    split: SplitRule,
    source: str,
    source_revision: str | None = None,
    preparation: dict[str, Any] | None = None,
    workers: int = 1,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    total: int | None = None,
) -> Prepared:
    """Write the data folder `out` from the documents (bytes of UTF-8 text) that `open_documents()` yields.

    `open_documents` is called once, and once more before if `tokenizer` is bpe:N, which is trained on the
    train side alone. The shards hold each side's documents in the order in which they came, each followed by
    one end-of-text, whatever the number of workers. `total`, if known, is for the progress bar; `source`,
    `source_revision` and `preparation` go into meta.json.

    `out` must not exist or be empty: nothing is ever overwritten. meta.json is written last, and when
    anything goes wrong, or on Ctrl-C, what was written is removed again. Raises UserError.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}.")
    started = time.perf_counter()
    out = Path(out)
    created = _claim(out)
    try:

        def training_texts() -> Iterator[str]:
            for document in _progress(open_documents(), total, "training the tokenizer"):
                text, _ = decode_utf8(document)
                if split.side(split.place(text)) == "train":
                    yield text

        encoder = Encoder(tokenizer=load_tokenizer(tokenizer, training_texts), split=split)
        check_vocab_size(encoder.tokenizer.vocab_size, f"tokenizer {tokenizer}")
        counts = {side: Counts() for side in SPLITS}
        empty = replaced = 0
        smallest, largest = 1.0, 0.0
        with (
            ShardWriter(out, "train", tokens_per_shard) as train,
            ShardWriter(out, "val", tokens_per_shard) as val,
            tqdm(total=total, desc="encoding", unit=" documents", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            for batch in _encode_in_order(encoder, _batches(open_documents()), workers):
                train.write(batch.tokens["train"])
                val.write(batch.tokens["val"])
                for side in SPLITS:
                    counts[side].add(batch.counts[side])
                empty += batch.empty
                replaced += batch.replaced
                smallest = min(smallest, batch.smallest_place)
                largest = max(largest, batch.largest_place)
                tokens = train.tokens + val.tokens
                bar.set_postfix_str(f"{tokens / (time.time() - bar.start_t):,.0f} tokens/s", refresh=False)
                bar.update(sum(batch.counts[side].documents for side in SPLITS) + batch.empty)
            shards = {"train": train.close(), "val": val.close()}
        _check_both_sides(split, counts, empty, smallest, largest)
        encoder.tokenizer.save(out)
        meta = DataMeta(
            tokenizer=encoder.tokenizer.name,
            vocab_size=encoder.tokenizer.vocab_size,
            end_of_text=encoder.tokenizer.end_of_text,
            splits={
                side: SplitMeta(
                    tokens=counts[side].tokens,
                    documents=counts[side].documents,
                    bytes=counts[side].bytes,
                    shards=shards[side],
                )
                for side in SPLITS
            },
            source=source,
            source_revision=source_revision,
            preparation={
                "seed": split.seed,
                "val_fraction": split.val_fraction,
                "skipped_empty_documents": empty,
                "documents_with_replaced_utf8": replaced,
                **(preparation or {}),
            },
            packages={
                "hgpt": importlib.metadata.version("hgpt"),
                "python": platform.python_version(),
                **package_versions(),
            },
        )
        write_meta(out, meta)
    except BaseException as error:
        _clear(out, created)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "A worker process died, most likely killed because memory ran out. Try again with fewer "
                f"--workers. Nothing was left in {out}."
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"Preparing {out} failed: {error}. Nothing was left in it.") from error
        raise
    return Prepared(
        folder=out,
        meta=meta,
        counts=counts,
        empty=empty,
        replaced=replaced,
        seconds=time.perf_counter() - started,
    )


def summary(prepared: Prepared) -> str:
    """A table of what was written, for the terminal."""
    both = Counts()
    for side in SPLITS:
        both.add(prepared.counts[side])
    rows: list[tuple[str, ...]] = [("", "train", "val", "both")]
    columns = [prepared.counts["train"], prepared.counts["val"], both]
    for name in ("documents", "characters", "tokens"):
        rows.append((name, *(f"{getattr(column, name):,}" for column in columns)))
    rows.append(("characters/token", *(f"{column.characters / column.tokens:.2f}" for column in columns)))
    rows.append(("shards", *(str(len(prepared.meta.splits[side].shards)) for side in SPLITS), ""))
    lines = [f"{row[0]:<18}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    seconds = prepared.seconds
    lines += [
        f"tokenizer         {prepared.meta.tokenizer}, {prepared.meta.vocab_size:,} tokens",
        f"skipped, empty    {prepared.empty:,}",
        f"invalid UTF-8     {prepared.replaced:,} documents, the invalid bytes replaced by U+FFFD",
        f"time              {seconds:.1f} s: {both.documents / seconds:,.0f} documents/s, "
        f"{both.tokens / seconds:,.0f} tokens/s, {both.bytes / seconds / 1e6:.1f} MB/s",
        f"written to        {prepared.folder}",
    ]
    return "\n".join(lines)


def _claim(out: Path) -> list[Path]:
    """Make the folder `out`, or take an empty one; returns the folders that were made, deepest first."""
    if out.is_dir():
        files = sorted(path.name for path in out.iterdir())
        if META_FILE in files:
            raise UserError(
                f"--out {out} holds a prepared data set already. Nothing is overwritten: choose another "
                "folder or delete it."
            )
        if files:
            raise UserError(
                f"--out {out} is not empty (it holds {files[0]}{', ...' if len(files) > 1 else ''}) and has "
                f"no {META_FILE}, so it is something else or the remains of a preparation that was killed. "
                "Choose another folder or delete it."
            )
        return []
    if out.exists():
        raise UserError(f"--out {out} is a file; it must be a folder, new or empty.")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}. Choose another folder.") from error
    return missing


def _clear(out: Path, created: list[Path]) -> None:
    """Take back what `prepare` wrote into `out`, and the folders it made."""
    ours = [f"{side}_*.bin" for side in SPLITS] + [".*.unfinished", TOKENIZER_FILE, META_FILE]
    for pattern in ours:
        for path in out.glob(pattern):
            path.unlink()
    for folder in created:
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_both_sides(split: SplitRule, counts: dict[str, Counts], empty: int, smallest: float, largest: float) -> None:
    documents = sum(counts[side].documents for side in SPLITS)
    if documents == 0:
        raise UserError(f"There is no text: {empty} empty documents and no others. Give other files.")
    if documents == 1:
        raise UserError(ONE_DOCUMENT)
    if not counts["val"].documents:
        raise UserError(
            f"None of the {documents} documents fell on the val side with --val-fraction "
            f"{split.val_fraction}: raise it to {smallest + 1e-4:.4f} or more, or give more documents."
        )
    if not counts["train"].documents:
        raise UserError(
            f"None of the {documents} documents fell on the train side with --val-fraction "
            f"{split.val_fraction}: lower it to {max(largest - 1e-4, 0):.4f} or less, or give more documents."
        )


def _progress(documents: Iterable[bytes], total: int | None, description: str) -> Iterable[bytes]:
    return tqdm(documents, total=total, desc=description, unit=" documents", unit_scale=True, dynamic_ncols=True)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(encoder: Encoder, batches: Iterable[list[bytes]], workers: int) -> Iterator[EncodedBatch]:
    """encoder(batch) of each batch, in order. Only 3 batches per worker, and the first few, are in memory."""
    batches = iter(batches)
    head = list(islice(batches, FEW_BATCHES))
    if workers == 1 or len(head) < FEW_BATCHES:
        yield from map(encoder, chain(head, batches))
        return
    # Not a plain fork: tokenizers and pyarrow have threads by now, whose locks a forked child would inherit.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once and not by every worker. Not this module: it may be __main__, and would come twice.
        context.set_forkserver_preload(["hgpt.tokenizer", "pyarrow.parquet", "tqdm"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in chain(head, batches):
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _encode_in_worker(batch: list[bytes]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)


# ------------------------------------------------------------------------------------------------------------
# Documents in files

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".parquet")


def find_files(paths: Sequence[str | Path]) -> tuple[list[Path], list[Path]]:
    """The text files named by `paths`, folders searched in full, sorted; and the files of folders left out.

    A file that is named itself must be of a kind that can be read; in a folder, others (a README, say) are
    left out, hidden ones silently.
    """
    found: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [
                file
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            readable = [file for file in files if _kind(file) is not None]
            if not readable:
                raise UserError(
                    f"folder {path} holds no text to read. Wanted: {', '.join(SUFFIXES)} files, the first "
                    "two also with .gz or .zst."
                )
            found += readable
            ignored += [file for file in files if _kind(file) is None]
        elif not path.exists():
            raise UserError(f"{path} does not exist. Give the path of a file or a folder of text.")
        elif _kind(path) is None:
            raise UserError(
                f"{path}: cannot tell from its name what it holds. Wanted: {', '.join(SUFFIXES)}, the first "
                "two also with .gz or .zst; rename it if it is one of these."
            )
        else:
            found.append(path)
    unique = {path.resolve(): path for path in reversed(found)}
    return sorted(unique.values(), key=lambda path: path.as_posix()), sorted(ignored)


def read_documents(files: Sequence[Path], text_column: str = "text", separator: str | None = None) -> Iterator[bytes]:
    """The documents of the files, in order, as bytes of UTF-8 text, possibly invalid. Memory stays bounded.

    A .txt file is one document, or several with `separator` between them; a .jsonl file has one per line and a .parquet
    file one per row, in the field or column `text_column`; a null there is an empty document. Raises UserError with
    file and line or column.
    """
    for file in files:
        kind = _kind(file)
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
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {error}. Is it complete? Copy it again.") from error


def count_documents(files: Sequence[Path]) -> int | None:
    """The number of documents if it can be had without reading them, which .jsonl does not allow."""
    total = 0
    for file in files:
        kind = _kind(file)
        if kind == ".jsonl":
            return None
        try:
            total += pq.read_metadata(file).num_rows if kind == ".parquet" else 1
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {error}. Is it complete? Copy it again.") from error
    return total


def _kind(path: Path) -> str | None:
    """.txt, .jsonl or .parquet, or None for what cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl") else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


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
        if not line.strip():
            continue
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
        yield _raw_bytes(text or "")


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
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_column not in schema.names:
            raise UserError(
                f"{path} has no column {text_column!r}; its columns are "
                f"{', '.join(schema.names) or 'none'}. Name the one that holds the text with --text-column."
            )
        kind = schema.field(text_column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not any(
            test(kind)
            for test in (
                pa.types.is_string,
                pa.types.is_large_string,
                pa.types.is_string_view,
                pa.types.is_binary,
                pa.types.is_large_binary,
            )
        ):
            raise UserError(
                f"{path}: the column {text_column!r} holds {kind}, not text. Its columns are "
                f"{', '.join(schema.names)}: name the one that holds the text with --text-column."
            )
        for batch in file.iter_batches(batch_size=BATCH_DOCUMENTS, columns=[text_column]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: pyarrow makes no str of invalid UTF-8, and the decoding is left to the workers.
            for document in column.cast(pa.large_binary()).to_pylist():
                yield document or b""


# ------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.documents",
        description="Turn text files into token shards to train on. Documents are separated by end-of-text "
        "and split into train and val by a hash of their words, so that copies of a text stay on one side.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help="files or folders: .txt (one document), .jsonl (one per line), .parquet (one per row); .txt and "
        ".jsonl also with .gz or .zst",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="data folder to write, new or empty")
    add_options(parser, tokenizer="gpt2", val_fraction=0.01)
    parser.add_argument(
        "--separator",
        type=_unescape,
        metavar="TEXT",
        help=r"what separates the documents inside a .txt file, for example '\n\n'; without it a file is one document",
    )
    parser.add_argument(
        "--text-column", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    files, ignored = find_files(options.files)
    if ignored:
        left_out = ", ".join(path.name for path in ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        print(f"left out {len(ignored)} files of other kinds: {left_out}", file=sys.stderr)
    if options.separator is not None and not any(_kind(path) == ".txt" for path in files):
        raise UserError("--separator has no effect without a .txt file: leave it out.")
    total = count_documents(files) if options.separator is None else None
    if total == 1:  # a tokenizer would be trained before this is found; what is wrong with the file comes first
        next(iter(read_documents(files, options.text_column)), None)
        raise UserError(ONE_DOCUMENT)
    names = [path.name for path in files]
    prepared = prepare(
        lambda: read_documents(files, options.text_column, options.separator),
        options.out,
        source=", ".join(names[:4]) + (f" and {len(names) - 4} more files" if len(names) > 4 else ""),
        preparation={"text_column": options.text_column, "separator": options.separator},
        total=total,
        **core_settings(options),
    )
    print(summary(prepared))


def _unescape(text: str) -> str:
    r"""A command-line argument in which \n, \t and the like stand for the characters."""
    value = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def exit_status(run: Callable[[], None]) -> int:
    """The exit status of a script that does `run`: 0, 2 for bad input, 130 for Ctrl-C; no traceback."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was written so far was removed again", file=sys.stderr)
        return 130
    return 0


def add_options(parser: argparse.ArgumentParser, *, tokenizer: str, val_fraction: float) -> None:
    """The options that every data script has, with its defaults; `core_settings` reads them."""
    parser.add_argument(
        "--tokenizer",
        default=tokenizer,
        help="gpt2, bpe:N (byte-level BPE of N tokens, trained on this text), or the path of a Hugging Face "
        "tokenizer folder or tokenizer.json (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=val_fraction,
        help="share of the documents kept for validation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=_processors(),
        help="processes that encode (default: the number of processors, here %(default)s)",
    )
    parser.add_argument("--tokens-per-shard", type=int, default=TOKENS_PER_SHARD, help="(default: %(default)s)")


def core_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `prepare` that `add_options` put on the command line."""
    return {
        "tokenizer": options.tokenizer,
        "split": SplitRule(seed=options.seed, val_fraction=options.val_fraction),
        "workers": options.workers,
        "tokens_per_shard": options.tokens_per_shard,
    }


def _processors() -> int:
    """Processors that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
