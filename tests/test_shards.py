"""hgpt/data/shards.py: round trips, reading across shards, and every way in which a data folder can be bad."""

import hashlib
import itertools
import json
import os
import pickle
import re
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_prep import documents
from hgpt.cli import run
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
from hgpt.errors import UserError

VOCAB_SIZE = 507
TOKENS = {
    "train": np.random.default_rng(0).integers(0, VOCAB_SIZE, 1003),
    "val": np.random.default_rng(1).integers(0, VOCAB_SIZE, 57),
}


@pytest.fixture
def folder(tmp_path):
    """A data folder whose train split is cut into shards of 250 tokens, the last of 3."""
    splits = {}
    for split, tokens in TOKENS.items():
        with ShardWriter(tmp_path, split, tokens_per_shard=250) as writer:
            for piece in np.array_split(tokens, 7):
                writer.write(piece)
            splits[split] = SplitMeta(tokens=tokens.size, documents=3, bytes=4000, shards=writer.close())
    meta = DataMeta(
        tokenizer="bpe:507",
        vocab_size=VOCAB_SIZE,
        end_of_text=506,
        splits=splits,
        source="random numbers",
        source_revision="r1",
        preparation={"seed": 0},
        packages={"python": "3"},
    )
    write_meta(tmp_path, meta)
    return tmp_path


def patch(path, position, content):
    """Overwrite bytes of a file."""
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


def test_files_are_in_the_format_of_llm_c(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.json", *(f"train_00000{i}.bin" for i in range(5)), "val_000000.bin"]
    data = (folder / "train_000004.bin").read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert np.array_equal(np.frombuffer(data[1024:], dtype="<u2"), TOKENS["train"][1000:])
    meta = read_meta(folder)
    for record in meta.splits["train"].shards:
        assert record.sha256 == hashlib.sha256((folder / record.file).read_bytes()).hexdigest()
    assert meta.splits["train"].tokens == 1003 and meta.source_revision == "r1" and meta.end_of_text == 506
    write_meta(folder, meta)
    assert read_meta(folder) == meta


@pytest.mark.parametrize(
    ("vocab_size", "header", "dtype"),
    [(65_535, [20240520, 1], "<u2"), (65_536, [20240801, 7], "<u4"), (128_256, [20240801, 7], "<u4")],
)
def test_the_vocabulary_decides_the_type_of_the_tokens(tmp_path, vocab_size, header, dtype):
    """As llm.c's dev/data/data_common.py writes GPT-2's and Llama 3's, also by a writer that was interrupted."""
    tokens = np.random.default_rng(2).integers(0, vocab_size, 1003)
    tokens[-1] = vocab_size - 1
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", 400, dtype=token_dtype(vocab_size)) as writer:
        writer.write(tokens[:900])
        raise RuntimeError
    with ShardWriter(tmp_path, "train", 400, writer.records, 50, dtype=token_dtype(vocab_size)) as writer:
        writer.write(tokens[850:])
        records = writer.close()
    read = []
    for record in records:
        data = (tmp_path / record.file).read_bytes()
        assert np.frombuffer(data[:1024], dtype="<i4").tolist() == [*header, record.tokens] + [0] * 253
        read.append(np.frombuffer(data[1024:], dtype=dtype))
    assert np.array_equal(np.concatenate(read), tokens)
    splits = {"train": SplitMeta(tokens=1003, documents=1, bytes=9, shards=records)}
    write_meta(tmp_path, DataMeta(tokenizer="x", vocab_size=vocab_size, end_of_text=0, splits=splits, source="y"))
    assert np.array_equal(TokenShards.open(tmp_path, "train").read(390, 1003), tokens[390:])
    other = 507 if vocab_size > 0xFFFF else 70_000
    write_meta(tmp_path, DataMeta(tokenizer="x", vocab_size=other, end_of_text=0, splits=splits, source="y"))
    message = f"train_000002.bin holds {np.dtype(dtype).name} tokens, and the vocabulary of its data takes "
    with pytest.raises(UserError, match=message + token_dtype(other).name):
        TokenShards.open(tmp_path, "train")


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
    with pytest.raises(UserError, match=r"vocab_size 50257 does not match .*bpe:507 has 507 tokens"):
        TokenShards.open(folder, "train", vocab_size=50257)


# --------------------------------------------------------------------------------------------------- writing


def test_an_exception_leaves_no_unfinished_file_with_the_name_of_a_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train", tokens_per_shard=10) as writer:
        writer.write(np.arange(14))
        raise RuntimeError
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".train_000001.bin.partial", "train_000000.bin"]


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
    with pytest.raises(UserError, match=r"train_000005\.bin\.partial is missing or cut short"):
        ShardWriter(folder, "train", 250, records, 5)
    (folder / "train_000001.bin").unlink()
    with pytest.raises(UserError, match=r"train_000001\.bin is missing"):
        ShardWriter(folder, "train", 250, records, 5)


# ------------------------------------------------------------------------------------- shards that others wrote


def write_llm_c(path, tokens, llama=False):
    """As modded-nanogpt's data/fineweb.py and llm.c's dev/data/data_common.py write a shard."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (20240801, 7, len(tokens)) if llama else (20240520, 1, len(tokens))
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(np.uint32 if llama else np.uint16).tobytes())


@pytest.mark.parametrize("header", [True, False], ids=["llm.c", "nanoGPT"])
@pytest.mark.parametrize("llama", [False, True], ids=["uint16", "uint32"])
def test_shards_of_others(tmp_path, header, llama):
    """The header tells the type of the tokens; without a header, the vocabulary does."""
    first, size = (127_000, 128_256) if llama else (0, VOCAB_SIZE)
    for split, tokens in TOKENS.items():
        if not header:
            (tokens + first).astype("<u4" if llama else "<u2").tofile(tmp_path / f"{split}.bin")
            continue
        for number, part in enumerate(np.array_split(tokens + first, 3), start=1):
            write_llm_c(tmp_path / f"fineweb_{split}_{number:06d}.bin", part, llama)
    for split, tokens in TOKENS.items():
        shards = TokenShards.open(tmp_path, split, vocab_size=size)
        assert np.array_equal(shards.read(0, len(shards)), tokens + first)
        assert (shards.meta, shards.end_of_text, shards.vocab_size) == (None, None, size)
    verify(tmp_path, vocab_size=size)
    with pytest.raises(UserError, match=r"shards of other tools.*state vocab_size \(50257"):
        TokenShards.open(tmp_path, "train", vocab_size=None)
    position = int(np.argmax(TOKENS["train"] >= 100))
    beyond = rf"train\S*\.bin: token \d+ at position {position} is beyond .* {first + 100}"
    for read in (verify, lambda *folder: TokenShards.open(folder[0], "train", first + 100).read(0, 1003)):
        with pytest.raises(UserError, match=beyond):
            read(tmp_path, first + 100)
    if header:
        write_llm_c(tmp_path / "x_val_000009.bin", TOKENS["val"], not llama)
        for split in TOKENS:
            with pytest.raises(UserError, match=r"mixes shards of two types, \S+ of \w+ and x_val_000009.bin of uint"):
                TokenShards.open(tmp_path, split, vocab_size=size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", r"val\.bin is truncated: 3 bytes"),
        (b"", r"val\.bin is empty"),
        (np.array([20240520, 1], dtype="<i4").tobytes(), r"val\.bin .*llm\.c's header"),
        (None, r"has no val\.bin"),
    ],
)
def test_bad_bare_nanogpt_files(tmp_path, content, message):
    TOKENS["train"].astype("<u2").tofile(tmp_path / "train.bin")
    if content is not None:
        (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        TokenShards.open(tmp_path, "val", vocab_size=9)


def test_a_single_shard_of_llm_c(tmp_path):
    write_llm_c(tmp_path / "tiny_shakespeare_train.bin", TOKENS["train"])
    assert len(TokenShards.open(tmp_path, "train", vocab_size=VOCAB_SIZE)) == 1003
    with pytest.raises(UserError, match=r"split train only, and none with 'val' in its name"):
        TokenShards.open(tmp_path, "val", vocab_size=VOCAB_SIZE)


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
    with pytest.raises(UserError, match=r"train_000001\.bin ends before token 101: it was cut short"):
        shards.read(0, 351)
    (folder / "train_000004.bin").unlink()
    with pytest.raises(UserError, match=r"train_000004\.bin can no longer be read"):
        shards.read(1000, 1003)


# -------------------------------------------------------------------------------------------------- bad folders


def test_folders_that_hold_no_data(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (folder / "meta.json").unlink()
    for path, message in (
        (tmp_path / "nowhere", r"nowhere does not exist.*data_prep\.documents"),
        (tmp_path / "empty", "holds no token shards"),
        (tmp_path / "val_000000.bin", "is not a folder"),
        (folder, r"meta\.json is missing, so the preparation .* never finished"),
    ):
        with pytest.raises(UserError, match=message):
            TokenShards.open(path, "train")


def test_the_advice_for_a_folder_of_text_can_be_followed(tmp_path, capsys):
    """--out has to be new or empty, and the folder is the text."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number}")
    for path in (tmp_path / "text", tmp_path / "text" / "1.txt", tmp_path / "new"):
        with pytest.raises(UserError) as caught:
            TokenShards.open(path, "train")
        arguments = re.search(r"python -m data_prep\.documents (.*?)(,|$)", str(caught.value))[1]
        arguments = arguments.replace("NEW_FOLDER", str(tmp_path / f"out_{path.name}")).replace("gpt2", "bpe:300")
        arguments = arguments.replace("FILES...", str(tmp_path / "text")).replace("1.txt", "")
        assert run(documents.main, [*arguments.split(), "--val-fraction", "0.3"]) == 0, arguments


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("vocab_size"), "vocab_size .* is missing"),
        (lambda m: m.update(vocab_size="507"), "vocab_size .* '507'"),
        (lambda m: m.update(vocab_size=2**24 + 1), "16,777,216, not 16,777,217"),
        (lambda m: m.update(vocab_size=0), "must be at least 1"),
        (lambda m: m.update(end_of_text=507), "end_of_text .*0 to 506, not 507"),
        (lambda m: m.update(format_version=2), "format_version is 2, this version of hgpt reads 1"),
        (lambda m: m["splits"].update(train=3), r"splits\.train must be a table, but is 3"),
        (lambda m: m["splits"]["train"].update(tokens=9), "tokens is 9, but its shards sum to 1003"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../x.bin"), "not a plain file name"),
        (lambda m: m["splits"].pop("train"), "no shards of the split 'train'; meta.json names val"),
    ],
)
def test_broken_meta(folder, edit, message):
    content = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(content | {"vocab_size": 2**24}))  # as large as it may be
    assert read_meta(folder).vocab_size == 2**24
    edit(content)
    (folder / "meta.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        TokenShards.open(folder, "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p, 1522), r"truncated: 1522 bytes, where 250 tokens take 1524"),
        (lambda p: os.truncate(p, 100), "truncated: 100 bytes, less than the header"),
        (lambda p: p.write_bytes(p.read_bytes() + b"xx"), "too long"),
        (lambda p: patch(p, 0, b"\x00"), "no token shard: it starts with .*20240520"),
        (lambda p: patch(p, 4, b"\x07"), "version 7 of the shard format, this version of hgpt reads 1"),
        (lambda p: patch(p, 8, b"\x01"), "header says 1 tokens, meta.json says 250"),
        (lambda p: p.unlink(), "is missing, but meta.json names it"),
    ],
)
def test_damaged_shard_is_found_at_opening(folder, damage, message):
    damage(folder / "train_000002.bin")
    with pytest.raises(UserError, match=rf"train_000002\.bin.*{message}"):
        TokenShards.open(folder, "train")
    TokenShards.open(folder, "val")


def test_all_damaged_shards_are_named_at_once(folder):
    (folder / "train_000001.bin").unlink()
    patch(folder / "train_000003.bin", 0, b"\x00")
    (folder / "train_000009.bin").touch()
    with pytest.raises(UserError, match=r"(?s)train_000009.*train_000001.*train_000003"):
        TokenShards.open(folder, "train")


def test_token_beyond_the_vocabulary_is_found_when_read(folder):
    patch(folder / "train_000001.bin", HEADER_BYTES + 2 * 77, np.array([507], dtype="<u2").tobytes())
    shards = TokenShards.open(folder, "train")
    shards.read(0, 327)
    for start, stop in ((0, 1003), (327, 328), (300, 330)):
        with pytest.raises(UserError, match=r"train_000001\.bin: token 507 at position 77 is beyond .* 507"):
            shards.read(start, stop)
