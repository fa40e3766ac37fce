"""The text that models are measured on, in the tokens of each."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hgpt.data.shards import META_FILE, TokenShards
from hgpt.data.tokenizer import MAX_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from hgpt.errors import UserError
from hgpt.interpret.models import LoadedModel, Outline, Source
from hgpt.interpret.positions import Window

# Training tokens that frequencies are counted on; more would not move a token to another band.
COUNTED_TOKENS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The windows that one model reads, and the bytes of UTF-8 that the targets of each stand for.

    `text_bytes`: (windows,), float64; None where neither the tokenizer nor the data says.
    """

    windows: list[Window]
    text_bytes: np.ndarray | None


@dataclass(frozen=True)
class Corpus:
    """A data folder: its splits, and the tokenizer that made them, where it is known."""

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
        try:
            os.stat(folder)
        except FileNotFoundError:
            pass  # `TokenShards` says how to prepare one
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise UserError(f"data folder {folder} cannot be read: {error}. Give another path") from error
        files = [Path(folder) / TOKENIZER_FILE, *tokenizer_files]
        file = next((file for file in files if file.is_file()), None)
        tokenizer = vocabulary = None
        if file is not None:
            tokenizer = load_tokenizer(str(file))
            vocabulary = frozenset(tokenizers.Tokenizer.from_file(str(file)).get_vocab().items())
        vocab_size = None
        if not (Path(folder) / META_FILE).is_file():
            if not vocab_sizes and tokenizer is not None:
                vocab_sizes = [tokenizer.vocab_size]
            vocab_size = _vocab_size(folder, vocab_sizes)
        train, val = TokenShards.open(folder, "train", vocab_size), TokenShards.open(folder, "val", vocab_size)
        return cls(train, val, tokenizer, vocabulary, source=folder if val.meta is None else val.meta.source)

    def read(self, model: LoadedModel, seq_len: int, tokens: int, longest: int | None = None) -> Passages:
        """Windows of `seq_len` tokens of the data, spread evenly over the validation split, in the tokens of `model`.

        A model with another tokenizer reads the same text: each window is decoded and encoded again. Where it then has
        more tokens than the model can read at a time, it is cut into pieces of about equal length, each a window of its
        own. Every token of a window but its first is a target once.

        Args:
            tokens: about how many targets the windows have together; 0: the whole split.
            longest: tokens that a model with another tokenizer reads at a time, by default its context.
        """
        if self.fits(model):
            windows = [(part[:-1], part[1:]) for part in self._parts(seq_len, tokens)]
            return Passages(windows=windows, text_bytes=self._text_bytes(model, windows, None))
        windows = []
        sizes: list[int | None] = []  # bytes of each window, None where encoding again does not say them
        for part in self._parts(seq_len, tokens):
            ids, ends = self._encoded_again(model, part)
            predicted = np.arange(1, len(ids))
            pieces = -(-len(predicted) // (longest or model.context))
            for piece in np.array_split(predicted, pieces) if pieces else []:
                first, last = piece[0] - 1, piece[-1]
                windows.append((ids[first:last], ids[piece]))
                sizes.append(None if ends is None else int(ends[last] - ends[first]))
        return Passages(windows=windows, text_bytes=self._text_bytes(model, windows, sizes))

    def _parts(self, seq_len: int, tokens: int) -> Iterator[np.ndarray]:
        """The tokens of each window, seq_len + 1 of them: the last of one window is the first of the next."""
        every = -(-(len(self.val) - 1) // seq_len)
        count = every if tokens == 0 else min(every, max(1, tokens // seq_len))
        for window in sorted({int(i * every / count) for i in range(count)}):
            start = window * seq_len
            yield self.val.read(start, min(start + seq_len + 1, len(self.val)))

    def _encoded_again(self, model: LoadedModel, part: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The text of `part` in the tokens of `model`, (N,), and where each ends in that text, (N,), in bytes.

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
            # A window may begin or end inside a character; part of a character cannot be encoded again.
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
        """Bytes of UTF-8 that the targets of each window stand for, (windows,).

        Where tokens are pieces of UTF-8, their bytes are added up. Where the text was encoded again, `sizes` are the
        bytes. Otherwise the model's tokens are the data's, and the bytes are the targets' share of those of the split,
        which data_prep counted.
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

        Where the data's tokenizer is not known, the size of the vocabulary decides: it must be that of the model, or
        that of the model's tokenizer where the model has more rows than tokens.
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


@dataclass(frozen=True, kw_only=True)
class Text:
    """A corpus, and how it is cut into windows.

    Attributes:
        seq_len: tokens of a window, in the data's own tokens.
        tokens: about how many tokens a model predicts; 0: the whole validation split.
        sample: positions whose hidden states are kept.
        longest: for each model, by label, the tokens that it reads at a time if its tokenizer is another one.
        trained: labels of the models whose runs were trained on this data.
    """

    corpus: Corpus
    seq_len: int
    tokens: int
    sample: int
    longest: dict[str, int]
    trained: frozenset[str]


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


def open_text(folder: str, known: Sequence[Outline], tokens: int, sample: int, notes: list[str]) -> Text:
    """The data in `folder`, in windows that all models with one tokenizer can read: as long as the shortest context.

    Adds a note for each model that reads less than its context at a time.
    """
    trained = [
        outline
        for outline in known
        if (path := data_settings(outline.source).get("path")) is not None
        and Path(path).resolve() == Path(folder).resolve()
    ]
    # A folder without meta.json does not say how large its vocabulary is; the runs that were trained on it had to.
    sizes = [data_settings(outline.source).get("vocab_size") for outline in trained]
    stated = {size for size in sizes if size is not None}
    corpus = Corpus.open(
        folder,
        vocab_sizes=sorted(stated or {outline.vocab_size for outline in known}),
        tokenizer_files=[Path(outline.source.folder) / TOKENIZER_FILE for outline in trained],
    )
    readers = [outline for outline in known if corpus.is_written_in(outline.words, outline.vocab_size)]
    first = min(readers or known, key=lambda outline: outline.context)
    shortest = {
        outline.source.label: min((o for o in known if o.words == outline.words), key=lambda o: o.context)
        for outline in known
    }
    shortest |= {outline.source.label: first for outline in readers}
    for outline in known:
        limit = shortest[outline.source.label]
        if limit.context < outline.context:
            notes.append(
                f"{outline.source.label} read windows of {limit.context:,} tokens, not of its whole context of "
                f"{outline.context:,}: models with the same tokenizer read the same windows, and the context of "
                f"{limit.source.label} is no longer."
            )
    return Text(
        corpus=corpus,
        seq_len=first.context,
        tokens=tokens,
        sample=sample,
        longest={label: limit.context for label, limit in shortest.items()},
        trained=frozenset(outline.source.label for outline in trained),
    )
