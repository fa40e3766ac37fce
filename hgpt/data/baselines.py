"""Token frequencies and bytes of a split, and the unigram model, a baseline that needs no training."""

import hashlib
import json
import sys
from contextlib import suppress

import numpy as np
import tokenizers
from tqdm import tqdm

from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import hf_tokenizer, token_bytes, tokenizer_file
from hgpt.durable import read_json, whole_file
from hgpt.errors import UserError

COUNTS_FILE = "train_counts.json"  # in a data folder: {"shards": digest of the train shards, "counts": (V,)}


def training_counts(shards: TokenShards) -> np.ndarray:
    """Count of each token in the training split, (V,) int64.

    data_prep writes the counts next to the shards. For other folders, and after a change of the shards, the first call
    counts, and writes COUNTS_FILE if the folder can be written.

    Raises:
        UserError: COUNTS_FILE is damaged, or its counts do not fit the vocabulary or the number of tokens.
    """
    path, digest = shards.folder / COUNTS_FILE, _digest(shards)
    again = "Delete it, and the tokens are counted again."
    try:
        content = read_json(path, again)
        if content["shards"] == digest:
            counts = np.array(content["counts"], dtype=np.int64)
            if len(counts) != shards.vocab_size or counts.min() < 0 or counts.sum() != len(shards):
                raise UserError(
                    f"{path} counts {counts.sum():,} of {len(counts)} different tokens, and the {shards.split} split "
                    f"has {len(shards):,} tokens and a vocabulary of {shards.vocab_size}. {again}"
                )
            return counts
    except FileNotFoundError:
        pass  # not counted yet
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({error}). {again}") from error
    counts = count_tokens(shards)
    with suppress(OSError), whole_file(path) as partial:  # a folder that cannot be written is counted each time
        partial.write_text(json.dumps({"shards": digest, "counts": counts.tolist()}))
    return counts


def count_tokens(shards: TokenShards) -> np.ndarray:
    """Count of each token in the split, (V,) int64; reads all of it and shows progress."""
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    interval = 0.2 if sys.stderr.isatty() else 30  # seconds between lines
    text = f"counting the tokens of {shards.folder}"
    with tqdm(desc=text, total=len(shards), unit=" tokens", unit_scale=True, delay=1, mininterval=interval) as bar:
        for tokens in shards.chunks():
            counts += np.bincount(tokens, minlength=shards.vocab_size)
            bar.update(len(tokens))
    return counts


def _digest(shards: TokenShards) -> str:
    """SHA-256 of the shards' checksums; without meta.json, of their names, sizes and times of change."""
    if shards.meta is not None:
        parts = [record.sha256 for record in shards.meta.splits[shards.split].shards]
    else:
        parts = [f"{file.path.name} {file.tokens} {file.path.stat().st_mtime_ns}" for file in shards.files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unigram_log_p(train: TokenShards) -> np.ndarray:
    """log p(v) of the unigram model of `train` with add-one smoothing, (V,): p(v) = (count(v) + 1) / (len + V)."""
    return np.log((training_counts(train) + 1) / (len(train) + train.vocab_size))


def unigram_loss(train: TokenShards, val: TokenShards) -> float:
    """−mean of log p(target) over the targets in `val`, in nats, with p of `unigram_log_p`.

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
    return float(-(target_counts(val) * unigram_log_p(train)).sum() / (len(val) - 1))


def target_counts(shards: TokenShards) -> np.ndarray:
    """Count of each token as a target of the split, (V,) int64: the first token is none."""
    counts = count_tokens(shards)
    counts[shards.read(0, 1)] -= 1
    return counts


def bytes_per_target(shards: TokenShards, backend: tokenizers.Tokenizer | None = None) -> float | None:
    """UTF-8 bytes of a target on average; nats per token / (ln 2 · this) are bits per byte.

    End-of-text has no bytes. Exact for byte-level tokens and characters; for other tokens the mean over the whole
    split, from the bytes in meta.json. None if the tokenizer is unknown.

    Args:
        backend: the tokenizer of the tokens; None takes the folder's.
    """
    if backend is None:
        file = tokenizer_file(shards.folder)
        if file is None:
            return None
        backend = hf_tokenizer(file, 1, shards.end_of_text).backend_tokenizer
    table = token_bytes(backend, shards.vocab_size)
    if table is not None:
        return float(target_counts(shards) @ table) / (len(shards) - 1) or None
    if shards.meta is None:
        return None
    split = shards.meta.splits[shards.split]
    return split.bytes / split.tokens or None
