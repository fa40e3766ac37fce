"""data_prep/verify.py and hgpt/data/verify.py: what they find, what is printed."""

import json
import shutil

import numpy as np
import pytest
from small_texts import fails, status, texts, write_parquet

from data_prep import openwebtext, verify
from data_prep.splits import nanogpt_places
from hgpt.data.shards import HEADER_BYTES

TEXTS = texts(200)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_parquet(folder / "a.parquet", TEXTS)
    options = ["--tokenizer", "bpe:300", "--val-fraction", "0.1", "--tokens-per-shard", "2000", "--workers", "1"]
    assert status(openwebtext.main, "--source", folder / "a.parquet", "--out", folder / "out", *options) == 0
    return folder / "out"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "out")


def verified(capsys, folder, *options, status_=0):
    if status_:
        return fails(capsys, verify.main, folder, *options)
    capsys.readouterr()
    assert status(verify.main, folder, *options) == 0
    return capsys.readouterr().out


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
    val = nanogpt_places(200, 0.1, 2357).tolist()
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
    message = verified(capsys, folder, status_=2)
    assert "train_000001.bin is truncated" in message and "val" not in message
    assert "train_000000.bin: checksum failure" in message  # the shards that open are read all the same

    path.write_bytes(path.read_bytes() + bytes(100))
    overwrite(folder / "val_000000.bin", -1, [5])
    message = verified(capsys, folder, status_=2)
    for expected in (
        "train_000000.bin: checksum failure",
        "train_000000.bin: token 65535 at position 100 is beyond the vocabulary of 300",
        "train_000001.bin: checksum failure",
        "val_000000.bin: checksum failure",
        "the val split holds 19 end-of-text tokens, and meta.json counts 20 documents",
        "the val split ends with token 5, not with end-of-text, 299",
    ):
        assert expected in message


def test_end_of_text_is_checked_where_the_checksum_is_right(folder, capsys):
    """A file that was written wrongly has the checksum of what is wrong in it."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["val"]["documents"] = 21
    (folder / "meta.json").write_text(json.dumps(meta))
    message = verified(capsys, folder, status_=2)
    assert "holds 20 end-of-text tokens, and meta.json counts 21" in message and "checksum" not in message


def test_shards_without_a_meta(tmp_path, capsys):
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    assert "state vocab_size (50257" in verified(capsys, tmp_path, status_=2)
    printed = verified(capsys, tmp_path, "--vocab-size", 100)
    assert "100 tokens; no meta.json, so no checksums" in printed and "is whole" in printed
    assert "token 99 at position 99" in verified(capsys, tmp_path, "--vocab-size", 99, status_=2)
    message = verified(capsys, tmp_path, "--vocab-size", 100, "--decode", 1, status_=2)
    assert "--decode needs" in message and "tokenizer.json" in message


def test_no_folder(tmp_path, capsys):
    message = verified(capsys, tmp_path / "nowhere", status_=2)
    assert "nowhere does not exist" in message and "whole" not in message
