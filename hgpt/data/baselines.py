"""Losses of models that need no training, as baselines for a language model."""

import numpy as np

from hgpt.data.shards import TokenShards
from hgpt.errors import UserError


def unigram_loss(train: TokenShards, val: TokenShards) -> float:
    """Mean loss in nats on `val` of the unigram model of `train`: maximum likelihood, add-one smoothing.

        p(v) = (count_train(v) + 1) / (len(train) + V)        loss = −mean over val targets of log p(target)

    The targets are those of `Evaluation`, every token of `val` but the first, so the two losses are comparable. Raises
    UserError when the vocabularies differ or `val` has fewer than two tokens.
    """
    if train.vocab_size != val.vocab_size:
        raise UserError(
            f"{train.folder} has a vocabulary of {train.vocab_size} tokens, {val.folder} one of "
            f"{val.vocab_size}: prepare both with the same tokenizer."
        )
    if len(val) < 2:
        raise UserError(
            f"{val.folder}: the {val.split} split holds {len(val)} token and so no target; a loss needs at "
            "least 2 tokens. Prepare the data with a larger --val-fraction."
        )
    train_counts, val_counts = _token_counts(train), _token_counts(val)
    val_counts[val.read(0, 1)] -= 1
    log_p = np.log((train_counts + 1) / (len(train) + train.vocab_size))  # (V,)
    return float(-(val_counts * log_p).sum() / (len(val) - 1))


def _token_counts(shards: TokenShards) -> np.ndarray:
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for tokens in shards.chunks():
        counts += np.bincount(tokens, minlength=shards.vocab_size)
    return counts
