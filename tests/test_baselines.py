"""hgpt/data/baselines.py against the formula written out."""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
from small_texts import refused

from hgpt.data.baselines import training_counts, unigram_log_p, unigram_loss
from hgpt.data.shards import TokenShards


def nanogpt(folder, vocab_size, **splits):
    for split, tokens in splits.items():
        np.array(tokens, dtype="<u2").tofile(folder / f"{split}.bin")
    return [TokenShards.open(folder, split, vocab_size) for split in splits]


def test_unigram_loss_is_the_formula(tmp_path):
    rng = np.random.default_rng(0)
    tokens, held_out = rng.integers(0, 7, 300) ** 2 % 11, rng.integers(0, 13, 57)
    train, val = nanogpt(tmp_path, 13, train=tokens, val=held_out)
    counts = Counter(tokens.tolist())
    expected = -sum(math.log((counts[t] + 1) / (300 + 13)) for t in held_out[1:].tolist()) / 56
    assert unigram_loss(train, val) == pytest.approx(expected, rel=1e-12)


def test_tokens_are_counted_once(tmp_path, data, monkeypatch):
    """And again if the shards change; in a folder of ours, and in one of nanoGPT's."""
    for folder, vocab_size in ((tmp_path, 13), (data, None)):
        if vocab_size is not None:
            nanogpt(tmp_path, vocab_size, train=[3, 3, 5, 12])
        shards = TokenShards.open(folder, "train", vocab_size)
        expected = np.bincount(shards.read(0, len(shards)), minlength=shards.vocab_size)
        assert np.array_equal(training_counts(shards), expected)
        with monkeypatch.context() as patch:
            patch.setattr(TokenShards, "chunks", lambda *_: pytest.fail("counted again"))
            assert np.array_equal(training_counts(TokenShards.open(folder, "train", vocab_size)), expected)
    (changed,) = nanogpt(tmp_path, 13, train=[1, 1, 1, 1])
    os.utime(tmp_path / "train.bin", ns=(1, 1))  # a clock may be too coarse to tell the two apart
    assert training_counts(changed)[1] == 4


def test_a_folder_that_cannot_be_written_is_counted_each_time(tmp_path, monkeypatch):
    (shards,) = nanogpt(tmp_path, 3, train=[0, 2, 2])

    def refuse(*_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert training_counts(shards).tolist() == [1, 0, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]
    assert unigram_log_p(shards).tolist() == pytest.approx([math.log(k / 6) for k in (2, 1, 3)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "cannot be read as JSON"),
        ('{"shards": "DIGEST", "counts": [1' + "0" * 40 + "]}", "is damaged"),
        ("[1]", "is damaged"),
        ('{"shards": "DIGEST", "counts": [1, 0]}', "3 tokens and a vocabulary of 3. Delete it"),
        ('{"shards": "DIGEST", "counts": [1, 0, 1]}', "counts 2 of 3"),
        ('{"shards": "DIGEST", "counts": [4, 0, -1]}', "counts 3 of 3"),
        ('{"shards": "DIGEST", "counts": ["x"]}', "is damaged"),
    ],
)
def test_counts_that_do_not_fit(tmp_path, content, message):
    (shards,) = nanogpt(tmp_path, 3, train=[0, 2, 2])
    training_counts(shards)
    path = tmp_path / "train_counts.json"
    path.write_text(content.replace("DIGEST", json.loads(path.read_text())["shards"]))
    refused(("train_counts.json", message), training_counts, shards)


def test_unigram_loss_needs_one_vocabulary_and_a_target(tmp_path):
    train, val = nanogpt(tmp_path, 5, train=[1, 2, 3], val=[4])
    refused("holds 1 token and so no target", unigram_loss, train, val)
    refused(("vocabulary of 5 tokens", "one of 6"), unigram_loss, train, TokenShards.open(tmp_path, "val", 6))
