"""hgpt/data/shards.py: round trips, reading across shards, and every way in which a data folder can be bad."""

import hashlib
import itertools
import os
import pickle
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from small_texts import overwrite, refused, status

from data_prep import documents
from hgpt.data.shards import (
    HEADER_BYTES,
    UINT16,
    UINT32,
    DataMeta,
    ShardWriter,
    SplitMeta,
    TokenShards,
    read_meta,
    token_dtype,
    write_meta,
)
from hgpt.data.verify import verify

VOCAB_SIZE = 507
TOKENS = {
    "train": np.random.default_rng(0).integers(0, VOCAB_SIZE, 1003),
    "val": np.random.default_rng(1).integers(0, VOCAB_SIZE, 57),
}


U2, U4 = (20240520, 1), (20240801, 7)  # magic number and version in llm.c's headers of uint16 and uint32


def header(*numbers):
    """256 int32, of which these come first."""
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes()


@pytest.fixture
def folder(tmp_path):
    """A data folder whose train split is cut into shards of 250 tokens, the last of 3."""
    splits = {}
    for split, tokens in TOKENS.items():
        with ShardWriter(tmp_path, split, tokens_per_shard=250) as writer:
            for piece in np.array_split(tokens, 7):
                writer.write(piece)
            splits[split] = SplitMeta(tokens=tokens.size, documents=3, bytes=4000, shards=writer.close())
    meta = DataMeta(tokenizer="bpe:507", vocab_size=VOCAB_SIZE, end_of_text=506, splits=splits, source="random numbers",
                    source_revision="r1", preparation={"seed": 0}, packages={"python": "3"})  # fmt: skip
    write_meta(tmp_path, meta)
    return tmp_path


def test_meta_describes_the_files_of_a_folder(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.json", *(f"train_00000{i}.bin" for i in range(5)), "val_000000.bin"]
    meta = read_meta(folder)
    for record in meta.splits["train"].shards:
        assert record.sha256 == hashlib.sha256((folder / record.file).read_bytes()).hexdigest()
    assert meta.splits["train"].tokens == 1003 and meta.source_revision == "r1" and meta.end_of_text == 506
    largest = replace(meta, vocab_size=2**24)
    write_meta(folder, largest)
    assert read_meta(folder) == largest


@pytest.mark.parametrize(("vocab_size", "magic", "dtype"), [(65_535, U2, "<u2"), (65_536, U4, "<u4")])
def test_the_vocabulary_decides_the_type_of_the_tokens(tmp_path, vocab_size, magic, dtype):
    """As llm.c's dev/data/data_common.py writes GPT-2's and Llama 3's, also by a writer that was interrupted."""
    tokens = np.random.default_rng(2).integers(0, vocab_size, 1003)
    tokens[-1] = vocab_size - 1
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", 400, dtype=token_dtype(vocab_size)) as writer:
        writer.write(tokens[:900])
        raise RuntimeError
    names = sorted(path.name for path in tmp_path.iterdir())  # no unfinished file has the name of a shard
    assert names == [".train_000002.bin.partial", "train_000000.bin", "train_000001.bin"]
    with ShardWriter(tmp_path, "train", 400, writer.records, 50, dtype=token_dtype(vocab_size)) as writer:
        writer.write(tokens[850:])
        records = writer.close()
    read = []
    for record in records:
        data = (tmp_path / record.file).read_bytes()
        assert data[:1024] == header(*magic, record.tokens)
        read.append(np.frombuffer(data[1024:], dtype=dtype))
    assert np.array_equal(np.concatenate(read), tokens)
    splits = {"train": SplitMeta(tokens=1003, documents=1, bytes=9, shards=records)}
    write_meta(tmp_path, DataMeta(tokenizer="x", vocab_size=vocab_size, end_of_text=0, splits=splits, source="y"))
    assert np.array_equal(TokenShards.open(tmp_path, "train").read(390, 1003), tokens[390:])
    other = 507 if vocab_size > 0xFFFF else 70_000
    write_meta(tmp_path, DataMeta(tokenizer="x", vocab_size=other, end_of_text=0, splits=splits, source="y"))
    holds, takes = np.dtype(dtype).name, token_dtype(other).name
    message = f"train_000002.bin holds {holds} tokens, and the vocabulary of its data takes {takes}"
    refused(message, TokenShards.open, tmp_path, "train")


def test_every_slice_equals_the_stream(folder):
    """Also after pickling, which carries no tokens, and in threads."""
    shards, tokens = TokenShards.open(folder, "train", vocab_size=VOCAB_SIZE), TOKENS["train"]
    assert (shards.vocab_size, shards.end_of_text, shards.meta) == (VOCAB_SIZE, 506, read_meta(folder))
    assert len(shards) == 1003 and np.array_equal(np.concatenate(list(shards.chunks(101))), tokens)
    content = pickle.dumps(shards)
    assert tokens[:100].astype("<u2").tobytes() not in content
    slices = list(itertools.combinations_with_replacement((0, 1, 249, 250, 251, 499, 500, 999, 1000, 1003), 2))
    with ThreadPoolExecutor(4) as pool:
        for copy in (shards, pickle.loads(content)):
            for (start, stop), part in zip(slices, pool.map(copy.read, *zip(*slices, strict=True)), strict=True):
                assert part.dtype == np.int64 and np.array_equal(part, tokens[start:stop])
    for start, stop in ((-1, 3), (0, 1004), (5, 4)):
        with pytest.raises(IndexError):
            shards.read(start, stop)
    refused(("vocab_size 50257 does not match", "bpe:507 has 507 tokens"), TokenShards.open, folder, "train", 50257)


# --------------------------------------------------------------------------------------------------- writing


def test_a_full_disk_is_an_os_error(tmp_path):
    """What is still buffered cannot be written when the file is closed either."""
    (tmp_path / ".train_000000.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, "train") as writer:
        writer.write(np.empty(0, dtype=np.uint16))
        assert writer.close() == () and len(list(tmp_path.iterdir())) == 1  # nothing gives no shard
        writer.write(TOKENS["train"])
        writer.close()
    assert not (tmp_path / "train_000000.bin").exists()


@pytest.mark.parametrize("dtype", [UINT16, UINT32])
@pytest.mark.parametrize("tokens", [[1 << 32], [-1], [1.0], [[1]]], ids=str)
def test_the_writer_refuses_what_does_not_fit(tmp_path, tokens, dtype):
    tokens = np.array(tokens) if dtype == UINT32 or tokens != [1 << 32] else np.array([1 << 16])
    with pytest.raises(ValueError), ShardWriter(tmp_path, "train", dtype=dtype) as writer:
        writer.write(tokens)


@pytest.mark.parametrize(("whole", "unfinished"), [(0, 7), (1, 0), (2, 30), (4, 2)])
def test_a_writer_goes_on_behind_what_was_written(folder, whole, unfinished):
    """Whatever was written behind that, under a temporary name or as whole shards."""
    expected = {path.name: path.read_bytes() for path in folder.glob("train_*.bin")}
    records = read_meta(folder).splits["train"].shards
    position = 250 * whole + unfinished
    with ShardWriter(folder, "train", 250, records[:whole], unfinished) as writer:
        assert writer.tokens == position and writer.unfinished == unfinished
        assert sorted(path.name for path in folder.glob("train_*.bin")) == sorted(expected)[:whole]
        writer.write(TOKENS["train"][position:])
        assert writer.close() == records
    assert {path.name: path.read_bytes() for path in folder.glob("train_*.bin")} == expected
    assert not list(folder.glob(".*"))


def test_a_writer_that_cannot_go_on_says_so(folder):
    records = read_meta(folder).splits["train"].shards
    refused("train_000005.bin.partial is missing or cut short", ShardWriter, folder, "train", 250, records, 5)
    (folder / "train_000001.bin").unlink()
    refused("train_000001.bin is missing", ShardWriter, folder, "train", 250, records, 5)


# ------------------------------------------------------------------------------------- shards that others wrote


def write_llm_c(path, tokens, llama=False):
    """As modded-nanogpt's data/fineweb.py and llm.c's dev/data/data_common.py write a shard."""
    content = np.asarray(tokens).astype("<u4" if llama else "<u2").tobytes()
    path.write_bytes(header(*(U4 if llama else U2), len(tokens)) + content)


@pytest.mark.parametrize("bare", [False, True], ids=["llm.c", "nanoGPT"])
@pytest.mark.parametrize("llama", [False, True], ids=["uint16", "uint32"])
def test_shards_of_others(tmp_path, bare, llama):
    """The header tells the type of the tokens; without a header, the vocabulary does."""
    first, size = (127_000, 128_256) if llama else (0, VOCAB_SIZE)
    for split, tokens in TOKENS.items():
        if bare:
            (tokens + first).astype("<u4" if llama else "<u2").tofile(tmp_path / f"{split}.bin")
            continue
        for number, part in enumerate(np.array_split(tokens + first, 3), start=1):
            write_llm_c(tmp_path / f"fineweb_{split}_{number:06d}.bin", part, llama)
    for split, tokens in TOKENS.items():
        shards = TokenShards.open(tmp_path, split, vocab_size=size)
        assert np.array_equal(shards.read(0, len(shards)), tokens + first)
        assert (shards.meta, shards.end_of_text, shards.vocab_size) == (None, None, size)
    verify(tmp_path, vocab_size=size)
    refused(("shards of other tools", "state vocab_size (50257"), TokenShards.open, tmp_path, "train")
    position = int(np.argmax(TOKENS["train"] >= 100))
    beyond = (f"at position {position} is beyond", first + 100)
    refused(beyond, verify, tmp_path, first + 100)
    refused(beyond, TokenShards.open(tmp_path, "train", first + 100).read, 0, 1003)
    if not bare:
        write_llm_c(tmp_path / "x_val_000009.bin", TOKENS["val"], not llama)
        for split in TOKENS:
            refused(("mixes shards of two types", "x_val_000009.bin of uint"), TokenShards.open, tmp_path, split, size)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.bin", b"abc", "val.bin is truncated: 3 bytes"),
        ("val.bin", b"", "val.bin is empty"),
        ("val.bin", header(*U2), "llm.c's header"),
        ("val.bin", None, "has no val.bin"),
        ("x_val_000001.bin", b"\x93NUMPY\x01\x00v\x00".ljust(2000), ".npy"),
        ("x_val_000001.bin", b"PK\x03\x04".ljust(2000), "zip"),
        ("x_val_000001.bin", header(*U4), "says 0 tokens"),
        ("x_val_000001.bin", header(20240520, 2), "version 2"),
        ("x_val_000001.bin", b"", "starts with 0"),
        ("x_train_000001.bin", b"", "split train only, and none with 'val' in its name"),
        ("pytorch_model.bin", b"PK\x03\x04", "no token shards"),
    ],
)
def test_bad_files_of_others_are_named_and_never_to_be_deleted(tmp_path, name, content, message):
    if name == "val.bin":
        TOKENS["train"].astype("<u2").tofile(tmp_path / "train.bin")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert "elete" not in refused((tmp_path, message), TokenShards.open, tmp_path, "val", 300)


# ----------------------------------------------------------------------------------------- reading large data sets


def test_resident_memory_does_not_grow_with_what_is_read(tmp_path):
    """Every byte of a larger shard is read; a memory map would count each page that was touched."""
    write_llm_c(tmp_path / "x_train_000000.bin", np.zeros(30_000_000))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    shards = TokenShards.open(tmp_path, "train", vocab_size=VOCAB_SIZE)
    shards.read(0, 1025)
    before = resident()
    for start in range(0, len(shards) - 1025, 1024):
        shards.read(start, start + 1025)
    assert resident() - before < 10_000_000  # of 60 MB


def test_more_shards_than_a_process_may_open_files(tmp_path):
    for number in range(200):
        write_llm_c(tmp_path / f"x_train_{number:06d}.bin", [number, number])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 150, hard))
    try:
        shards = TokenShards.open(tmp_path, "train", vocab_size=200)
        for _ in range(2):
            assert np.array_equal(shards.read(0, 400), np.repeat(np.arange(200), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_is_cut_short_or_deleted_after_it_was_opened(folder):
    """A memory map would end the process by SIGBUS."""
    shards = TokenShards.open(folder, "train")
    os.truncate(folder / "train_000001.bin", HEADER_BYTES + 2 * 100)
    shards.read(0, 350)
    refused("train_000001.bin ends before token 101: it was cut short", shards.read, 0, 351)
    (folder / "train_000004.bin").unlink()
    refused("train_000004.bin can no longer be read", shards.read, 1000, 1003)


# -------------------------------------------------------------------------------------------------- bad folders


def test_folders_that_hold_no_data(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (folder / "meta.json").unlink()
    for path, words in (
        (tmp_path / "nowhere", ("nowhere does not exist", "data_prep.documents")),
        (tmp_path / "empty", "holds no token shards"),
        (tmp_path / "val_000000.bin", "is not a folder"),
        (folder, "meta.json is missing, so the preparation"),
    ):
        refused(words, TokenShards.open, path, "train")


def test_the_advice_for_a_folder_of_text_can_be_followed(tmp_path, capsys):
    """--out has to be new or empty, and the folder is the text."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number}")
    for path in (tmp_path / "text", tmp_path / "text" / "1.txt", tmp_path / "new"):
        message = refused((), TokenShards.open, path, "train")
        arguments = re.search(r"python -m data_prep\.documents (.*?)(,|$)", message)[1]
        arguments = arguments.replace("NEW_FOLDER", str(tmp_path / f"out_{path.name}")).replace("gpt2", "bpe:300")
        arguments = arguments.replace("FILES...", str(tmp_path / "text")).replace("1.txt", "")
        assert status(documents.main, *arguments.split(), "--val-fraction", "0.3") == 0, arguments


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p, 1522), "truncated: 1522 bytes, where 250 tokens take 1524"),
        (lambda p: os.truncate(p, 100), "truncated: 100 bytes, less than the header"),
        (lambda p: p.write_bytes(p.read_bytes() + b"xx"), "too long"),
        (lambda p: overwrite(p, 0, b"\x00"), "not with the magic number 20240520"),
        (lambda p: overwrite(p, 4, b"\x07"), "version 7 of the shard format, this version of hgpt reads 1"),
        (lambda p: overwrite(p, 8, b"\x01"), "header says 1 tokens, meta.json says 250"),
        (lambda p: p.unlink(), "is missing, but meta.json names it"),
    ],
)
def test_damaged_shard_is_found_at_opening(folder, damage, message):
    damage(folder / "train_000002.bin")
    refused(("train_000002.bin", message), TokenShards.open, folder, "train")
    TokenShards.open(folder, "val")


def test_all_damaged_shards_are_named_at_once(folder):
    (folder / "train_000001.bin").unlink()
    overwrite(folder / "train_000003.bin", 0, b"\x00")
    (folder / "train_000009.bin").touch()
    refused(("train_000001", "train_000003", "train_000009"), TokenShards.open, folder, "train")


def test_token_beyond_the_vocabulary_is_found_when_read(folder):
    overwrite(folder / "train_000001.bin", HEADER_BYTES + 2 * 77, np.array([507], dtype="<u2").tobytes())
    shards = TokenShards.open(folder, "train")
    shards.read(0, 327)
    for start, stop in ((0, 1003), (327, 328), (300, 330)):
        refused("train_000001.bin: token 507 at position 77 is beyond", shards.read, start, stop)
