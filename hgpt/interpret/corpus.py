"""The text that models are measured on, in the tokens of each."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgpt.interpret.models import LoadedModel
from hgpt.shards import TokenShards
from hgpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

# Training tokens that frequencies are counted on; more would change no band of any size.
COUNTED_TOKENS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The data that models are measured on: its splits, and the tokenizer that made them."""

    train: TokenShards
    val: TokenShards
    tokenizer: Tokenizer | None
    vocabulary: frozenset[tuple[str, int]] | None
    source: str

    @classmethod
    def open(cls, folder: str) -> "Corpus":
        train, val = TokenShards.open(folder, "train"), TokenShards.open(folder, "val")
        file = Path(folder) / TOKENIZER_FILE
        vocabulary = None
        if file.is_file():
            content = json.loads(file.read_bytes())
            entries = dict(content["model"]["vocab"]) | {t["content"]: t["id"] for t in content.get("added_tokens", [])}
            vocabulary = frozenset(entries.items())
        return cls(
            train=train,
            val=val,
            tokenizer=load_tokenizer(str(file)) if file.is_file() else None,
            vocabulary=vocabulary,
            source=folder if val.meta is None else val.meta.source,
        )

    def windows(self, model: LoadedModel, seq_len: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of windows spread evenly over the validation split, in the tokens of `model`.

        `tokens` are about how many targets they have together; 0: the whole split, every token but the first once. A
        model with another tokenizer reads the same text: the windows' tokens are decoded and encoded again.
        """
        every = -(-(len(self.val) - 1) // seq_len)
        count = every if tokens == 0 else min(every, max(1, tokens // seq_len))
        chosen = sorted({int(i * every / count) for i in range(count)})
        windows = []
        for window in chosen:
            start = window * seq_len
            part = self.val.read(start, min(start + seq_len + 1, len(self.val)))
            if not self.fits(model):
                assert self.tokenizer is not None
                part = np.array(model.encode(self.tokenizer.decode(part.tolist())), dtype=np.int64)[: model.context + 1]
            if len(part) > 1:
                windows.append((part[:-1], part[1:]))
        return windows

    def fits(self, model: LoadedModel) -> bool:
        """Whether the split is in the tokens of `model`."""
        return self.vocabulary is None or self.vocabulary == frozenset(model.vocabulary().items())

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the first 50 M tokens of the training split, (V,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        seen = 0
        for chunk in self.train.chunks():
            counts += np.bincount(chunk, minlength=vocab_size)[:vocab_size]
            seen += len(chunk)
            if seen >= COUNTED_TOKENS:
                break
        return counts
