"""data_prep/verify.py and hgpt/data/verify.py: what they find, what is printed."""

import json
import shutil

import numpy as np
import pytest
from small_texts import as_nanogpt, fails, overwrite, status, texts, write_parquet

from data_prep import openwebtext, verify
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


def whole(capsys, folder, *options):
    """What the command prints about a folder in which nothing is damaged."""
    capsys.readouterr()
    assert status(verify.main, folder, *options) == 0
    return capsys.readouterr().out


def test_what_a_folder_holds(prepared, capsys):
    documents = as_nanogpt(TEXTS)
    printed = whole(capsys, prepared, "--decode", 2, "--split", "val")
    assert f"{prepared} is whole" in printed
    lines = [line.split() for line in printed.splitlines()[:2]]
    assert [(line[0], *line[3:5]) for line in lines] == [("train", "180", "documents"), ("val", "20", "documents")]
    for number in (0, 1):
        text = documents["val"][number]
        assert f"--- val, document {number}: {len(text):,} characters\n{text}\n" in printed
    assert "document 2" not in printed
    printed = whole(capsys, prepared, "--decode", 1000)
    assert printed.count("--- train, document") == 180 and all(text in printed for text in documents["train"])


def test_everything_that_is_damaged_is_named(folder, capsys):
    overwrite(folder / "train_000000.bin", HEADER_BYTES + 2 * 100, b"\xff\xff")
    path = folder / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-100])
    message = fails(capsys, verify.main, folder)
    assert "train_000001.bin is truncated" in message and "val" not in message
    assert "train_000000.bin: checksum failure" in message  # the shards that open are read all the same

    path.write_bytes(path.read_bytes() + bytes(100))
    val = (folder / "val_000000.bin").read_bytes()
    (folder / "val_000000.bin").write_bytes(val[:-2] + b"\5\0")
    message = fails(capsys, verify.main, folder)
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
    message = fails(capsys, verify.main, folder)
    assert "holds 20 end-of-text tokens, and meta.json counts 21" in message and "checksum" not in message


def test_shards_without_a_meta_and_no_folder(tmp_path, capsys):
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    assert "state vocab_size (50257" in fails(capsys, verify.main, tmp_path)
    printed = whole(capsys, tmp_path, "--vocab-size", 100)
    assert "100 tokens; no meta.json, so no checksums" in printed and "is whole" in printed
    assert "token 99 at position 99" in fails(capsys, verify.main, tmp_path, "--vocab-size", 99)
    message = fails(capsys, verify.main, tmp_path, "--vocab-size", 100, "--decode", 1)
    assert "--decode needs" in message and "tokenizer.json" in message
    message = fails(capsys, verify.main, tmp_path / "nowhere")
    assert "nowhere does not exist" in message and "whole" not in message
