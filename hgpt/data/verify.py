"""Check a data folder by reading every byte of it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from hgpt.data.shards import (
    META_FILE,
    PREPARE_AGAIN,
    SPLITS,
    TokenShards,
    beyond_vocabulary,
    check_shard,
    read_meta,
    token_dtype,
)
from hgpt.data.tokenizer import MAX_VOCAB_SIZE, load_tokenizer
from hgpt.errors import UserError

TOKENS_AT_ONCE = 1 << 22


def verify(folder: str | Path, vocab_size: int | None = None) -> None:
    """Read every byte of a data folder; raise one UserError that lists all damage.

    Checks of each shard: those of `TokenShards.open`, the checksum, and the range of every token. `vocab_size`: as for
    `TokenShards.open`.
    """
    damage = [line for split in SPLITS for line in find_damage(folder, split, vocab_size)]
    if damage:
        raise UserError("\n".join(dict.fromkeys(damage)))


def find_damage(
    folder: str | Path,
    split: str,
    vocab_size: int | None = None,
    *,
    documents: bool = False,
    on_read: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """Read every byte of one split once and yield a line for each fault.

    Checks what `verify` checks. With `documents` also checks that the split ends with end-of-text and contains one for
    each document that meta.json counts, as data_prep writes it. `on_read` is called with the number of bytes of each
    read.
    """
    try:
        shards = TokenShards.open(folder, split, vocab_size)
    except UserError as error:
        yield from str(error).splitlines()
        shards = _intact_shards(Path(folder), split)
        documents = False
    checksums = {} if shards.meta is None else {r.file: r.sha256 for r in shards.meta.splits[split].shards}
    ends = last = 0
    for path, header, count, dtype in shards.files:
        checksum = hashlib.sha256()
        beyond = None
        with open(path, "rb") as file:
            checksum.update(file.read(header))
            for start in range(0, count, TOKENS_AT_ONCE):
                content = file.read(min(count - start, TOKENS_AT_ONCE) * dtype.itemsize)
                checksum.update(content)
                part = np.frombuffer(content, dtype=dtype)
                if part.max() >= shards.vocab_size and beyond is None:
                    beyond = beyond_vocabulary(path, part, start, shards.vocab_size)
                if documents and shards.end_of_text is not None:
                    ends += int(np.count_nonzero(part == shards.end_of_text))
                last = int(part[-1])
                on_read(len(content))
        if path.name in checksums and checksum.hexdigest() != checksums[path.name]:
            yield (
                f"{path}: checksum failure; its SHA-256 is not the one in {META_FILE}. Copy the file again from its "
                f"origin. Otherwise: {PREPARE_AGAIN}"
            )
        if beyond is not None:
            yield beyond
    if documents and shards.meta is not None:
        expected = shards.meta.splits[split].documents
        if ends != expected:
            yield (
                f"{folder}: the {split} split holds {ends} end-of-text tokens, and {META_FILE} counts {expected} "
                f"documents, each of which ends with one. {PREPARE_AGAIN}"
            )
        if last != shards.end_of_text:
            yield (
                f"{folder}: the {split} split ends with token {last}, not with end-of-text, {shards.end_of_text}: its "
                f"last document is cut short. {PREPARE_AGAIN}"
            )


def _intact_shards(folder: Path, split: str) -> TokenShards:
    """The intact shards of a split that `TokenShards.open` refuses."""
    files = []
    try:
        meta = read_meta(folder)
        records = meta.splits[split].shards
    except (UserError, KeyError):
        return TokenShards(folder, split, [], MAX_VOCAB_SIZE, None)
    for record in records:
        with suppress(UserError):
            files.append(check_shard(folder / record.file, record.tokens, token_dtype(meta.vocab_size)))
    return TokenShards(folder, split, files, meta.vocab_size, meta)


def decoded_documents(folder: Path, split: str) -> Iterator[str]:
    """The documents of a split as text, in order, without their end-of-text. Raises UserError without a tokenizer."""
    shards = TokenShards.open(folder, split)
    tokenizer = load_tokenizer(str(folder))
    held: list[np.ndarray] = []
    for chunk in shards.chunks(1 << 16):
        start = 0
        for end in np.flatnonzero(chunk == shards.end_of_text).tolist():
            yield tokenizer.decode(np.concatenate([*held, chunk[start:end]]))
            held = []
            start = end + 1
        held.append(chunk[start:])
