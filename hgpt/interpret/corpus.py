"""The text that models are measured on, in the tokens of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from hgpt.data.shards import MAX_VOCAB_SIZE, META_FILE, TokenShards
from hgpt.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from hgpt.interpret.models import LoadedModel

# Training tokens that frequencies are counted on; more would change no band of any size.
COUNTED_TOKENS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Passages:
    """What one model reads: inputs and targets of each window, and how much text the targets stand for.

    `text_bytes`: bytes of UTF-8, (windows,), float64; None where neither the tokenizer nor the data says.
    """

    windows: list[tuple[np.ndarray, np.ndarray]]
    text_bytes: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The data that models are measured on: its splits, and the tokenizer that made them, where it is known."""

    train: TokenShards
    val: TokenShards
    tokenizer: Tokenizer | None
    vocabulary: frozenset[tuple[str, int]] | None
    source: str

    @classmethod
    def open(cls, folder: str, *, vocab_sizes: Sequence[int] = (), tokenizer_files: Sequence[Path] = ()) -> "Corpus":
        """Open a data folder.

        Args:
            vocab_sizes: for a folder without meta.json, the sizes that its vocabulary may have. The smallest in which
                every token of the validation split lies is taken for it.
            tokenizer_files: for a folder without tokenizer.json, where else the tokenizer that made it may lie.
        """
        files = [Path(folder) / TOKENIZER_FILE, *tokenizer_files]
        file = next((file for file in files if file.is_file()), None)
        tokenizer = None if file is None else load_tokenizer(str(file))
        vocabulary = None
        if file is not None:
            vocabulary = frozenset(tokenizers.Tokenizer.from_file(str(file)).get_vocab().items())
        vocab_size = None
        if not (Path(folder) / META_FILE).is_file():
            if not vocab_sizes and tokenizer is not None:
                vocab_sizes = [tokenizer.vocab_size]
            vocab_size = _vocab_size(folder, vocab_sizes)
        train, val = TokenShards.open(folder, "train", vocab_size), TokenShards.open(folder, "val", vocab_size)
        return cls(
            train=train,
            val=val,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            source=folder if val.meta is None else val.meta.source,
        )

    def read(self, model: LoadedModel, seq_len: int, tokens: int, longest: int | None = None) -> Passages:
        """`windows`, and how much text each of them is."""
        windows, sizes = self._windows(model, seq_len, tokens, longest)
        return Passages(windows=windows, text_bytes=self._text_bytes(model, windows, sizes))

    def windows(
        self, model: LoadedModel, seq_len: int, tokens: int, longest: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Windows of `seq_len` tokens of the data, spread evenly over the validation split, in the tokens of `model`.

        A model with another tokenizer reads the same text: each window is decoded and encoded again, and where it has
        more tokens than the model can read at a time, it is cut into pieces of about the same length, which are windows
        of their own. Every token but the first of a window is the target of one of them.

        Args:
            tokens: about how many targets the windows have together; 0: the whole split, every token but the first
                once.
            longest: tokens that a model with another tokenizer is to read at a time, by default as many as it can.
        """
        return self._windows(model, seq_len, tokens, longest)[0]

    def _windows(
        self, model: LoadedModel, seq_len: int, tokens: int, longest: int | None
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int | None] | None]:
        """Windows, and the bytes of text of each, as far as encoding again says them; None where nothing is."""
        if self.fits(model):
            return [(part[:-1], part[1:]) for part in self._parts(seq_len, tokens)], None
        windows: list[tuple[np.ndarray, np.ndarray]] = []
        sizes: list[int | None] = []
        for part in self._parts(seq_len, tokens):
            ids, ends = self._encoded_again(model, part)
            predicted = np.arange(1, len(ids))
            pieces = -(-len(predicted) // (longest or model.context))
            for piece in np.array_split(predicted, pieces) if pieces else []:
                first, last = piece[0] - 1, piece[-1]
                windows.append((ids[first:last], ids[piece]))
                sizes.append(None if ends is None else int(ends[last] - ends[first]))
        return windows, sizes

    def _parts(self, seq_len: int, tokens: int) -> Iterator[np.ndarray]:
        """Tokens of the windows, seq_len + 1 each: the last one of a window is the first one of that behind it."""
        every = -(-(len(self.val) - 1) // seq_len)
        count = every if tokens == 0 else min(every, max(1, tokens // seq_len))
        for window in sorted({int(i * every / count) for i in range(count)}):
            start = window * seq_len
            yield self.val.read(start, min(start + seq_len + 1, len(self.val)))

    def _encoded_again(self, model: LoadedModel, part: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """What `part` says in the tokens of `model`, (N,), and where each of them ends in its text, (N,), in bytes.

        Ends of documents are the model's own end-of-text, if it has one, and no text.
        """
        assert self.tokenizer is not None
        ids: list[np.ndarray] = []
        ends: list[np.ndarray | None] = []
        read = 0
        for number, document in enumerate(np.split(part, np.flatnonzero(part == self.tokenizer.end_of_text))):
            if number and model.end_of_text is not None:
                ids.append(np.array([model.end_of_text]))
                ends.append(np.array([read]))
            # A window may begin and end inside a character; half a one is no text that can be encoded again.
            text = self.tokenizer.decode(document[1:] if number else document).strip("\ufffd")
            tokens, ends_inside = model.encode_with_ends(text)
            ids.append(tokens)
            ends.append(None if ends_inside is None else read + ends_inside)
            read += len(text.encode())
        known = [inside for inside in ends if inside is not None]
        return np.concatenate(ids), np.concatenate(known) if len(known) == len(ends) else None

    def _text_bytes(
        self, model: LoadedModel, windows: Sequence[tuple[np.ndarray, np.ndarray]], sizes: list[int | None] | None
    ) -> np.ndarray | None:
        """Bytes of UTF-8 that the targets of each window stand for, (windows,).

        Counted where tokens are pieces of UTF-8, and from the text that was encoded again. Otherwise the model's tokens
        are the data's, and the bytes are the targets' share of the split, whose bytes were counted when it was
        prepared.
        """
        table = model.token_bytes()
        if table is not None:
            return np.array([table[targets].sum() for _, targets in windows], dtype=np.float64)
        if sizes is not None:
            return None if None in sizes else np.array(sizes, dtype=np.float64)
        if self.val.meta is None:
            return None
        split = self.val.meta.splits[self.val.split]
        return np.array([len(targets) for _, targets in windows]) * (split.bytes / split.tokens)

    def fits(self, model: LoadedModel) -> bool:
        """Whether the split is in the tokens of `model`."""
        return self.is_written_in(frozenset(model.vocabulary().items()), model.vocab_size)

    def is_written_in(self, words: frozenset[tuple[str, int]], vocab_size: int) -> bool:
        """Whether the split is in the tokens of a model with these (token, id) that predicts `vocab_size` of them.

        Where the data's tokenizer is not known, the size of the vocabulary alone can tell: that of the model, or that
        of its tokenizer where the model has rows to spare.
        """
        if self.vocabulary is not None:
            return self.vocabulary == words
        return self.val.vocab_size in (vocab_size, min(vocab_size, len(words)))

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


def _vocab_size(folder: str, sizes: Sequence[int]) -> int | None:
    """The smallest of `sizes` that holds every token of the validation split, the largest if none does."""
    if len(set(sizes)) < 2:
        return next(iter(sizes), None)
    largest = max(int(chunk.max()) for chunk in TokenShards.open(folder, "val", MAX_VOCAB_SIZE).chunks())
    return min((size for size in sizes if size > largest), default=max(sizes))
