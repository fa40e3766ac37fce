"""data_prep/verify.py: what it finds, what it prints."""

import json
import random
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import openwebtext, verify
from hgpt.cli import run
from hgpt.data.shards import HEADER_BYTES

main = partial(run, verify.main)

TEXTS = [" ".join(random.Random(n).choices(["distance", "centre", "日本", "loss"], k=n % 40 + 1)) for n in range(200)]


@pytest.fixture
def folder(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    out = tmp_path / "out"
    options = ["--tokenizer", "bpe:300", "--val-fraction", "0.1", "--tokens-per-shard", "2000", "--workers", "1"]
    assert run(openwebtext.main, ["--source", str(tmp_path / "a.parquet"), "--out", str(out), *options]) == 0
    return out


def verified(capsys, folder, *options, status=0):
    capsys.readouterr()
    assert main([str(folder), *map(str, options)]) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err[captured.err.index("error: ") :] if status else captured.out


def overwrite(path, position, tokens):
    content = bytearray(path.read_bytes())
    part = np.array(tokens, dtype="<u2").tobytes()
    start = HEADER_BYTES + 2 * position if position >= 0 else len(content) + 2 * position
    content[start : start + len(part)] = part
    path.write_bytes(content)


def test_a_whole_folder(folder, capsys):
    printed = verified(capsys, folder)
    assert f"{folder} is whole" in printed
    train, val = printed.splitlines()[:2]
    assert train.split()[0] == "train" and "180 documents" in train
    assert val.split()[0] == "val" and "20 documents" in val


def test_decode_prints_the_documents(folder, capsys):
    val = openwebtext.val_documents(200, 0.1).tolist()
    printed = verified(capsys, folder, "--decode", 2, "--split", "val")
    for number in (0, 1):
        text = TEXTS[val[number]]
        assert f"--- val, document {number}: {len(text):,} characters\n{text}\n" in printed
    assert "document 2" not in printed
    train = [text for place, text in enumerate(TEXTS) if place not in val]
    printed = verified(capsys, folder, "--decode", 1000)
    assert printed.count("--- train, document") == 180 and all(text in printed for text in train)


def test_everything_that_is_damaged_is_named(folder, capsys):
    overwrite(folder / "train_000000.bin", 100, [65535])
    path = folder / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-100])
    message = verified(capsys, folder, status=2)
    assert "train_000001.bin is truncated" in message and "val" not in message
    assert "train_000000.bin: checksum failure" in message  # the shards that open are read all the same

    path.write_bytes(path.read_bytes() + bytes(100))
    overwrite(folder / "val_000000.bin", -1, [5])
    message = verified(capsys, folder, status=2)
    for expected in (
        "train_000000.bin: checksum failure",
        "train_000000.bin: token 65535 at position 100 is beyond the vocabulary of 280",
        "train_000001.bin: checksum failure",
        "val_000000.bin: checksum failure",
        "the val split holds 19 end-of-text tokens, and meta.json counts 20 documents",
        "the val split ends with token 5, not with end-of-text, 279",
    ):
        assert expected in message


def test_end_of_text_is_checked_where_the_checksum_is_right(folder, capsys):
    """A file that was written wrongly has the checksum of what is wrong in it."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["val"]["documents"] = 21
    (folder / "meta.json").write_text(json.dumps(meta))
    message = verified(capsys, folder, status=2)
    assert "holds 20 end-of-text tokens, and meta.json counts 21" in message and "checksum" not in message


def test_shards_without_a_meta(tmp_path, capsys):
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    assert "state vocab_size (50257" in verified(capsys, tmp_path, status=2)
    printed = verified(capsys, tmp_path, "--vocab-size", 100)
    assert "100 tokens; no meta.json, so no checksums" in printed and "is whole" in printed
    assert "token 99 at position 99" in verified(capsys, tmp_path, "--vocab-size", 99, status=2)
    message = verified(capsys, tmp_path, "--vocab-size", 100, "--decode", 1, status=2)
    assert "--decode needs" in message and "tokenizer.json" in message


def test_bad_arguments(tmp_path, capsys):
    assert "nowhere does not exist" in verified(capsys, tmp_path / "nowhere", status=2)
    assert "--decode must be at least 0" in verified(capsys, tmp_path, "--decode", -1, status=2)
