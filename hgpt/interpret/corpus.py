"""The text that models are measured on, as windows of each model's own tokens."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgpt.data.baselines import training_counts
from hgpt.data.shards import META_FILE, TokenShards
from hgpt.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, token_ids, tokenizer_file
from hgpt.errors import UserError
from hgpt.interpret.models import LoadedModel, Outline, Source
from hgpt.interpret.positions import Window


class Passages(NamedTuple):
    """The text in the tokens of one model."""

    windows: list[Window]
    text_bytes: np.ndarray | None  # UTF-8 bytes of each window's targets, (windows,) float64; None if unknown


@dataclass(frozen=True)
class Corpus:
    """A data folder: its splits, and the tokenizer that made them, if known."""

    train: TokenShards
    val: TokenShards
    tokenizer: Tokenizer | None
    vocabulary: frozenset[tuple[str, int]] | None
    source: str

    @classmethod
    def open(cls, folder: str, *, vocab_sizes: Sequence[int] = (), tokenizer_files: Sequence[Path] = ()) -> "Corpus":
        """Open a data folder.

        Args:
            vocab_sizes: candidates for the vocabulary size of a folder without meta.json and tokenizer. The smallest
                that holds every token of the validation split is used.
            tokenizer_files: further places to look for the tokenizer if the folder has none.
        """
        try:
            os.stat(folder)
        except FileNotFoundError:
            pass  # `TokenShards` says how to prepare one
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise UserError(f"data folder {folder} cannot be read: {error}. Give another path") from error
        own_file = tokenizer_file(Path(folder))
        file = own_file or next((file for file in tokenizer_files if file.is_file()), None)
        tokenizer = vocabulary = None
        if file is not None:
            tokenizer = load_tokenizer(str(file))
            vocabulary = frozenset(token_ids(file).items())
        vocab_size = None
        if own_file is None and not (Path(folder) / META_FILE).is_file():
            own = [] if tokenizer is None else [tokenizer.vocab_size]
            vocab_size = _vocab_size(folder, vocab_sizes or own)
        train, val = (TokenShards.open(folder, split, vocab_size) for split in ("train", "val"))
        if len(val) < 2:
            raise UserError(f"{folder}: the val split has {len(val)} tokens, and at least 2 are needed to predict one")
        return cls(train, val, tokenizer, vocabulary, source=folder if val.meta is None else val.meta.source)

    def read(self, model: LoadedModel, seq_len: int, tokens: int, longest: int | None = None) -> Passages:
        """Windows of `seq_len` tokens of the data, evenly spread over the validation split, in the tokens of `model`.

        For a model with another tokenizer each window is decoded and encoded again, and split into windows of about
        equal length if it exceeds the model's context. Every token is a target once, except the first of each window of
        the data.

        Args:
            tokens: about how many targets the windows have together; 0: the whole split.
            longest: tokens that a model with another tokenizer reads at a time; default: its context.
        """
        if self.fits(model):
            windows = [(part[:-1], part[1:]) for part in self._parts(seq_len, tokens)]
            return Passages(windows, self._text_bytes(model, windows, None))
        windows = []
        sizes: list[int | None] = []  # bytes of each window
        for part in self._parts(seq_len, tokens):
            ids, ends = self._reencode(model, part)
            predicted = np.arange(1, len(ids))
            pieces = -(-len(predicted) // (longest or model.context))
            for piece in np.array_split(predicted, pieces) if pieces else []:
                first, last = piece[0] - 1, piece[-1]
                windows.append((ids[first:last], ids[piece]))
                sizes.append(None if ends is None else int(ends[last] - ends[first]))
        return Passages(windows, self._text_bytes(model, windows, sizes))

    def share(self, seq_len: int, tokens: int) -> float:
        """The share of the validation split's targets that `read` reads."""
        targets = len(self.val) - 1
        return sum(min(seq_len, targets - start) for start in self._starts(seq_len, tokens)) / targets

    def _starts(self, seq_len: int, tokens: int) -> list[int]:
        """The first token of each window."""
        every = -(-(len(self.val) - 1) // seq_len)
        count = every if tokens == 0 else min(every, max(1, tokens // seq_len))
        return [seq_len * window for window in sorted({int(i * every / count) for i in range(count)})]

    def _parts(self, seq_len: int, tokens: int) -> Iterator[np.ndarray]:
        """The seq_len + 1 tokens of each window; the last token of a window is the first of the next."""
        for start in self._starts(seq_len, tokens):
            yield self.val.read(start, min(start + seq_len + 1, len(self.val)))

    def _reencode(self, model: LoadedModel, part: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The text of `part` in the tokens of `model`, (N,), and the byte of the text at which each token ends, (N,).

        The end of a document becomes the model's own end-of-text token, if it has one, and has no bytes.
        """
        assert self.tokenizer is not None
        end_of_text = model.tokenizer.eos_token_id
        ids: list[np.ndarray] = []
        ends: list[np.ndarray | None] = []
        read = 0
        for number, document in enumerate(np.split(part, np.flatnonzero(part == self.tokenizer.end_of_text))):
            if number and end_of_text is not None:
                ids.append(np.array([end_of_text]))
                ends.append(np.array([read]))
            # A window may start or end inside a character; an incomplete character cannot be encoded.
            text = self.tokenizer.decode(document[1:] if number else document).strip("\ufffd")
            tokens, ends_inside = model.encode_with_ends(text)
            ids.append(tokens)
            ends.append(None if ends_inside is None else read + ends_inside)
            read += len(text.encode())
        known = [inside for inside in ends if inside is not None]
        return np.concatenate(ids), np.concatenate(known) if len(known) == len(ends) else None

    def _text_bytes(
        self, model: LoadedModel, windows: Sequence[Window], sizes: list[int | None] | None
    ) -> np.ndarray | None:
        """UTF-8 bytes of the targets of each window, (windows,).

        Byte-level tokens: the sum of the tokens' bytes. Text that was encoded again: `sizes`. Otherwise the model has
        the data's tokens, and the bytes are the targets' share of the split's, which data_prep counted.
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
        """Whether the data has the tokens of `model`."""
        return self.has_tokens_of(frozenset(model.tokenizer.get_vocab().items()), model.vocab_size)

    def has_tokens_of(self, words: frozenset[tuple[str, int]], vocab_size: int) -> bool:
        """Whether the data has the tokens of a model with these (token, id) and `vocab_size` rows.

        If the data's tokenizer is unknown, its vocabulary size must equal the rows or the tokens of the model.
        """
        if self.vocabulary is not None:
            return self.vocabulary == words
        return self.val.vocab_size in (vocab_size, min(vocab_size, len(words)))

    def counts(self, vocab_size: int) -> np.ndarray:
        """Count of each token in the training split, (V,); 0 for rows beyond the data's vocabulary."""
        counts = training_counts(self.train)[:vocab_size]
        return np.pad(counts, (0, vocab_size - len(counts)))


def _vocab_size(folder: str, sizes: Sequence[int]) -> int | None:
    """The smallest of `sizes` that holds every token of the validation split, the largest if none does."""
    for size in sorted(set(sizes))[:-1]:
        with suppress(UserError):
            for _ in TokenShards.open(folder, "val", size).chunks():
                pass  # raises for a token that is not below `size`
            return size
    return max(sizes, default=None)


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """The windows of a corpus that the models read."""

    corpus: Corpus
    seq_len: int  # tokens of a window, in the data's tokens
    tokens: int  # about how many tokens a model predicts; 0: the whole validation split
    sample: int  # positions whose hidden states are kept
    longest: dict[str, int]  # label of a model with another tokenizer → tokens that it reads at a time
    trained: frozenset[str]  # labels of the models trained on this data

    @property
    def share(self) -> float:
        """The share of the validation split that is read."""
        return self.corpus.share(self.seq_len, self.tokens)


def data_settings(source: Source) -> dict[str, Any]:
    """[data] in the config.toml of the run of `source`; empty without one."""
    if source.run is None or not (source.run / "config.toml").is_file():
        return {}
    try:
        data: Any = tomllib.loads((source.run / "config.toml").read_text(encoding="utf-8")).get("data", {})
        if not isinstance(data.get("path", ""), str) or type(data.get("vocab_size", 0)) is not int:
            raise ValueError("data.path must be a text and data.vocab_size a whole number")
        return data
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{source.run / 'config.toml'} is not TOML of a run: {error}. Restore it, or name the exported model "
            "instead of the run"
        ) from error


def data_of_runs(sources: Sequence[Source]) -> str | None:
    """data.path of the first run whose data folder exists."""
    paths = (data_settings(source).get("path") for source in sources)
    return next((str(path) for path in paths if path is not None and Path(path).is_dir()), None)


def open_text(folder: str, known: Sequence[Outline], tokens: int, sample: int, notes: list[str]) -> TextPlan:
    """The data in `folder` and its windows. Models with the same tokenizer read the same windows.

    Windows have the models' shortest context. Adds a note for each model with a longer context.
    """
    trained = [
        outline
        for outline in known
        if (path := data_settings(outline.source).get("path")) is not None
        and Path(path).resolve() == Path(folder).resolve()
    ]
    # Without meta.json only the configurations of runs trained on the data have its vocabulary size.
    stated = {size for outline in trained if (size := data_settings(outline.source).get("vocab_size")) is not None}
    corpus = Corpus.open(
        folder,
        vocab_sizes=sorted(stated or {outline.vocab_size for outline in known}),
        tokenizer_files=[Path(outline.source.folder) / TOKENIZER_FILE for outline in trained],
    )
    readers = [outline for outline in known if corpus.has_tokens_of(outline.words, outline.vocab_size)]
    seq_len = min(outline.context for outline in readers or known)
    longest: dict[str, int] = {}
    for outline in known:
        same = readers if outline in readers else [other for other in known if other.words == outline.words]
        limit = min(same, key=lambda other: other.context)
        longest[outline.source.label] = limit.context
        if limit.context < outline.context:
            notes.append(
                f"{outline.source.label} read windows of {limit.context:,} tokens, not of its whole context of "
                f"{outline.context:,}: models with the same tokenizer read the same windows, and "
                f"{limit.source.label} has the shortest context."
            )
    return TextPlan(
        corpus=corpus,
        seq_len=seq_len,
        tokens=tokens,
        sample=sample,
        longest=longest,
        trained=frozenset(outline.source.label for outline in trained),
    )
