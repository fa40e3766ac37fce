"""hgpt/data/baselines.py against the formula written out."""

import math
from collections import Counter

import numpy as np
import pytest

from hgpt.data.baselines import unigram_loss
from hgpt.data.shards import TokenShards
from hgpt.errors import UserError


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


def test_the_first_token_is_no_target(tmp_path):
    train, val = nanogpt(tmp_path, 3, train=[0, 0, 0], val=[2, 0])
    assert unigram_loss(train, val) == pytest.approx(-math.log(4 / 6))


def test_unigram_loss_needs_one_vocabulary_and_a_target(tmp_path):
    train, val = nanogpt(tmp_path, 5, train=[1, 2, 3], val=[4])
    with pytest.raises(UserError, match="holds 1 token and so no target"):
        unigram_loss(train, val)
    with pytest.raises(UserError, match=r"vocabulary of 5 tokens, .* one of 6"):
        unigram_loss(train, TokenShards.open(tmp_path, "val", 6))
