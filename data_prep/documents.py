"""Your own text to token shards.

    python -m data_prep.documents --out data/mine --tokenizer gpt2 FILES...

`prepare` is the core that every data script shares: it takes documents from anywhere, encodes them in worker
processes, splits them into train and val, and writes a data folder (hgpt/data/shards.py says what is in one).
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.text_files import count_documents, find_files, kind_of, read_documents
from data_prep.worker_pool import worker_pool
from hgpt.cli import Parser, run
from hgpt.data.shards import (
    META_FILE,
    SPLITS,
    TOKENS_PER_SHARD,
    DataMeta,
    ShardWriter,
    SplitMeta,
    check_vocab_size,
    write_meta,
)
from hgpt.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, package_versions
from hgpt.errors import UserError

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


def counts_table(counts: dict[str, Counts], shards: dict[str, int]) -> list[str]:
    """Lines for the terminal: the counts of each split, of both, and the number of shards."""
    both = Counts()
    for side in SPLITS:
        both.add(counts[side])
    columns = [*(counts[side] for side in SPLITS), both]
    rows: list[tuple[str, ...]] = [("", *SPLITS, "both")]
    for name in ("documents", "characters", "tokens"):
        rows.append((name, *(f"{getattr(column, name):,}" for column in columns)))
    rows.append(("characters/token", *(f"{column.characters / max(1, column.tokens):.2f}" for column in columns)))
    rows.append(("shards", *(str(shards[side]) for side in SPLITS), str(sum(shards.values()))))
    return [f"{row[0]:<18}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]


def summary(prepared: Prepared) -> str:
    """A table of what was written, for the terminal."""
    both = Counts()
    for side in SPLITS:
        both.add(prepared.counts[side])
    lines = counts_table(prepared.counts, {side: len(prepared.meta.splits[side].shards) for side in SPLITS})
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
    pending: deque[Future[EncodedBatch]] = deque()
    with worker_pool(workers, _start_worker, encoder) as pool:
        for batch in chain(head, batches):
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_encoder: Encoder | None = None  # of this worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_worker(batch: list[bytes]) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)


# ------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str]) -> str:
    """Prepare the files; returns the summary."""
    parser = Parser(
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
    files, ignored = find_files(options.files)
    if ignored:
        left_out = ", ".join(path.name for path in ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        print(f"left out {len(ignored)} files of other kinds: {left_out}", file=sys.stderr)
    if options.separator is not None and not any(kind_of(path) == ".txt" for path in files):
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
    return summary(prepared)


def _unescape(text: str) -> str:
    r"""A command-line argument in which \n, \t and the like stand for the characters."""
    value = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def add_options(parser: argparse.ArgumentParser, *, tokenizer: str, val_fraction: float, seed: int = 0) -> None:
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
    parser.add_argument("--seed", type=int, default=seed, help="of the split (default: %(default)s)")
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
    sys.exit(run(main, interrupted="interrupted: what was written so far was removed again"))
