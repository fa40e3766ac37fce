"""The speed of preparing and reading token shards, compared with nanoGPT's script and tiktoken alone.

    python -m benchmarks.data_prep --source FOLDER

Four ways to prepare the same documents, in turn, each in a new process:

    ours            python -m data_prep.openwebtext with all processors
    nanoGPT's way   datasets.map with one process per processor, then a copy into a memory map; without a warm cache
    bare            tiktoken's encode_ordinary of each document in one process; text in memory, tokens discarded
    our pattern     as "bare", with the regular expression and the call of hgpt.data.tokenizer; the same tokens

The first two times contain reading, encoding, writing and the start of the worker processes, but not the start of
Python and its imports. Reading is measured on 2 billion tokens in shards of 100 million, as GPT-2 small reads
OpenWebText. The shards are sparse files, which take no disk space.
"""

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

from data_prep.encoding import decode_utf8, read_documents
from data_prep.engine import prepare
from data_prep.openwebtext import SEED, VAL_FRACTION, OpenWebText
from data_prep.text_files import Fields, find_files, find_sections
from hgpt import cli
from hgpt.data.batches import TrainingBatches, epoch_permutation, num_windows
from hgpt.data.shards import (
    HEADER_BYTES,
    TOKENS_PER_SHARD,
    UINT16,
    DataMeta,
    ShardRecord,
    SplitMeta,
    TokenShards,
    read_meta,
    shard_header,
    shard_name,
    write_meta,
)
from hgpt.data.tokenizer import END_OF_TEXT, load_tokenizer

OPENWEBTEXT_WINDOWS = num_windows(9_035_582_198, 1024)
COPIES = 1024  # number of batches that nanoGPT's script copies
H100_TOKENS_PER_SECOND = 468_000  # GPT-2 small in llm.c: the rate that a loader must reach


# ------------------------------------------------------------------------------------------------------------
# Preparation


class Timing(NamedTuple):
    seconds: float
    tokens: int


def read_texts(files: list[Path]) -> list[str]:
    sections, _ = find_sections(files, Fields())
    return [decode_utf8(document or b"")[0] for document in read_documents(sections, Fields(), [])]


def tiktokens_own() -> tiktoken.Encoding:
    """The encoding of tiktoken.get_encoding("gpt2"), without its download."""
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer._fast is not None
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=tokenizer._fast._mergeable_ranks,
        special_tokens={END_OF_TEXT: tokenizer.end_of_text},
    )


def ours(files: list[Path], folder: Path, workers: int) -> Timing:
    """Write the shards of the documents in `files`, which lie in one folder."""
    start = time.perf_counter()
    recipe = OpenWebText(tokenizer="gpt2", val_fraction=VAL_FRACTION, seed=SEED, source=str(files[0].parent))
    prepare(folder / "ours", recipe, workers=workers)
    seconds = time.perf_counter() - start
    splits = read_meta(folder / "ours").splits
    return Timing(seconds, sum(split.tokens for split in splits.values()))


def nanogpts_way(files: list[Path], folder: Path, workers: int) -> Timing:
    """Write the same tokens with datasets, as nanoGPT's data/openwebtext/prepare.py does."""
    import datasets

    encoding = tiktokens_own()
    start = time.perf_counter()
    loaded = datasets.load_dataset(
        "parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(folder), num_proc=workers
    )
    split = loaded.train_test_split(test_size=VAL_FRACTION, seed=SEED, shuffle=True)

    def tokenized(example: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    encoded = split.map(tokenized, remove_columns=["text"], num_proc=workers)
    tokens = 0
    for name, rows in encoded.items():
        length = int(np.sum(rows["len"], dtype=np.uint64))
        tokens += length
        target = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(length,))
        batches = min(COPIES, len(rows))
        position = 0
        for index in range(batches):
            batch = rows.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            target[position : position + len(ids)] = ids
            position += len(ids)
        target.flush()
    return Timing(time.perf_counter() - start, tokens)


def bare(files: list[Path], folder: Path, workers: int) -> Timing:
    """Call tiktoken's `encode_ordinary` on each document, in this process."""
    return _encoded_here(files, tiktokens_own().encode_ordinary)


def our_pattern(files: list[Path], folder: Path, workers: int) -> Timing:
    """Encode each document, in this process, with the tokenizer of `ours`."""
    tokenizer = load_tokenizer("gpt2")
    return _encoded_here(files, lambda text: tokenizer.encode_batch([text])[0])


def _encoded_here(files: list[Path], encode: Callable[[str], Sized]) -> Timing:
    texts = read_texts(files)
    start = time.perf_counter()
    tokens = sum(len(encode(text)) for text in texts)
    return Timing(time.perf_counter() - start, tokens + len(texts))  # one end-of-text for each


OURS, NANOGPT, BARE, PATTERN = "ours", "nanoGPT's way", "bare", "our pattern"
WAYS: dict[str, Callable[[list[Path], Path, int], Timing]] = {
    OURS: ours,
    NANOGPT: nanogpts_way,
    BARE: bare,
    PATTERN: our_pattern,
}


def measure_preparation(source: str, folder: Path, *, workers: int, copies: int, rounds: int) -> None:
    originals, _ = find_files([source])
    size = sum(len(text.encode()) for text in read_texts(originals))
    inputs = folder / "input"
    inputs.mkdir()
    for copy in range(copies):
        for file in originals:
            shutil.copy(file, inputs / f"{copy:03}_{file.name}")  # copies: find_files lists a linked file once
    files = sorted(inputs.iterdir())
    print(
        f"preparation of {copies} x {size / 1e6:.1f} MB of text in {len(files)} files; {workers} processors; {rounds} "
        f"rounds in turn; bare: of 1 x {size / 1e6:.1f} MB"
    )
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {way: [] for way in WAYS}  # bytes per second
    tokens: set[float] = set()  # per copy, the same for every way
    for _ in range(rounds):
        for way, found in rates.items():
            own = folder / "own"
            own.mkdir()
            encoded = 1 if way in (BARE, PATTERN) else copies  # copies of the source
            with ProcessPoolExecutor(1, context) as process:
                timing = process.submit(WAYS[way], files[: encoded * len(originals)], own, workers).result()
            found.append(size * encoded / timing.seconds)
            tokens.add(timing.tokens / encoded)
            if len(tokens) > 1:
                raise RuntimeError(
                    f"{way}: {timing.tokens:,} tokens in {encoded} copies; the others found other numbers"
                )
            shutil.rmtree(own)
            print(f"  {way:<14} {found[-1] / 1e6:8.2f} MB/s", flush=True)

    print(f"{'median, MB/s':<16}" + "".join(f"{way:>16}" for way in WAYS))
    print(" " * 16 + "".join(f"{statistics.median(found) / 1e6:>16.2f}" for found in rates.values()))

    def ratio(way: str, to: str, factor: int = 1) -> float:
        return statistics.median(a / (b * factor) for a, b in zip(rates[way], rates[to], strict=True))

    print(f"ours / (bare x {workers} processors)   {ratio(OURS, BARE, workers):.2f}")
    print(f"our pattern / bare           {ratio(PATTERN, BARE):.2f}")
    print(f"ours / nanoGPT's way         {ratio(OURS, NANOGPT):.2f}\n")


# ------------------------------------------------------------------------------------------------------------
# Reading


def sparse_data_set(folder: Path, tokens: int) -> None:
    """A data folder of sparse files: `tokens` zeros for train, and one shard for val."""
    splits = {}
    for split, count in (("train", tokens), ("val", 1_000_000)):
        records: list[ShardRecord] = []
        for first in range(0, count, TOKENS_PER_SHARD):
            length = min(TOKENS_PER_SHARD, count - first)
            name = shard_name(split, len(records))
            with open(folder / name, "wb") as file:
                file.write(shard_header(length))
                file.truncate(HEADER_BYTES + length * UINT16.itemsize)
            records.append(ShardRecord(file=name, tokens=length, sha256="0" * 64))
        splits[split] = SplitMeta(tokens=count, documents=1, bytes=4 * count, shards=tuple(records))
    write_meta(folder, DataMeta(tokenizer="gpt2", vocab_size=50_257, end_of_text=50_256, splits=splits, source="zeros"))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_reading(folder: Path, *, tokens: int, seq_len: int, micro_batch: int, device: str) -> None:
    sparse_data_set(folder, tokens)
    print(f"reading of {tokens / 1e9:g} billion tokens, {-(-tokens // TOKENS_PER_SHARD)} shards, sparse on disk")
    before = resident_mb()
    start = time.perf_counter()
    shards = TokenShards.open(folder, "train")
    seconds = time.perf_counter() - start
    print(f"opening                     {seconds * 1e3:8.1f} ms, {resident_mb() - before:.1f} MB")

    times = []
    for _ in range(3):
        epoch_permutation.cache_clear()
        start = time.perf_counter()
        epoch_permutation(0, 0, OPENWEBTEXT_WINDOWS)
        times.append(time.perf_counter() - start)
    epoch_permutation.cache_clear()
    line = f"order of {OPENWEBTEXT_WINDOWS / 1e6:.1f} M windows"
    print(f"{line:<28}{statistics.median(times) * 1e3:8.0f} ms")

    windows = num_windows(len(shards), seq_len)
    order = epoch_permutation(0, 0, windows)
    before = resident_mb()
    start = time.perf_counter()
    for window in order.tolist():
        shards.read(window * seq_len, window * seq_len + seq_len + 1)
    seconds = time.perf_counter() - start
    print(f"a window of {seq_len + 1} tokens    {seconds / windows * 1e6:8.2f} us")
    line = f"{resident_mb() - before:8.1f} MB more after {windows:,} windows"
    print(f"an epoch in random order    {line}")

    batches = TrainingBatches(
        shards, seq_len=seq_len, global_batch=micro_batch, micro_batch=micro_batch, seed=0, device=device
    )
    batches.read(0, 0)
    start = time.perf_counter()
    for step in range(500):
        batches.read(step, 0)
    seconds = (time.perf_counter() - start) / 500
    compute = micro_batch * seq_len / H100_TOKENS_PER_SECOND  # seconds
    print(
        f"a micro-batch of {micro_batch} windows  {seconds * 1e6:8.0f} us, {seconds / compute:.2%} of an H100's "
        f"{compute * 1e3:.0f} ms of GPT-2 small for it, if nothing were read ahead"
    )
    waited = 0.0
    for number in range(50):
        start = time.perf_counter()
        batches(number, 0)
        if device == "cuda":
            torch.cuda.synchronize()
        waited += (time.perf_counter() - start) * (number > 0)
        time.sleep(compute)  # simulates the computation, during which the next micro-batch is read
    print(f"read ahead, on {device:<13}{waited / 49 * 1e6:8.0f} us, {waited / 49 / compute:.2%}")


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("python -m benchmarks.data_prep", __doc__)
    parser.add_argument("--source", help="folder of Parquet files to prepare; without it only reading is measured")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--copies", type=int, default=32, help="copies of the source, to make start-up times small")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2_000_000_000, help="tokens of the data set that is read")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scratch", help="folder for temporary files (default: the system's)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if options.source is not None:
            measure_preparation(
                options.source, Path(scratch), workers=options.workers, copies=options.copies, rounds=options.rounds
            )
        measure_reading(
            Path(scratch),
            tokens=options.tokens,
            seq_len=options.seq_len,
            micro_batch=options.micro_batch,
            device=options.device,
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
