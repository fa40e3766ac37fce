"""One model under measurement: what several measures need of it, each computed once."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

from hgpt.data.tokenizer import TOKENIZER_FILE
from hgpt.errors import UserError
from hgpt.interpret.corpus import Text
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import TextMeasures, Window, measure_text
from hgpt.interpret.relations import SMALLEST_RELATION, Relation, TokenPairs, WordForm, spellings, token_pairs
from hgpt.interpret.statistics import Estimate, bootstrap_counts, bootstrap_ratio, estimate
from hgpt.interpret.vectors import Matrix

FEWEST_TOKENS = 64
HIDDEN_SAMPLE = 1024  # positions whose hidden states are kept
# A checkpoint is measured on eight windows, so that they are spread over the text. They are shorter than a long
# context, with which the blocks would take most of the time.
CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, CHECKPOINT_SAMPLE = 2048, 256, 512


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is measured, and on how much; python -m hgpt.interpret has an option for each field.

    Args:
        data: data folder written by data_prep; left out: the one that the runs name
        relations: folder of relation sets, one .json each; left out: those that ship
        tokens: validation tokens that every model predicts, spread evenly over the split; 0: all of them
        bootstrap: resamples behind every interval
        text: UTF-8 text to show token by token; left out: the beginning of the validation text
        words: tokens whose centres to read, a leading space in quotes: ' the'; left out: the commonest words
        seed: of every random choice: quadruples, resamples, positions
        device: cpu, cuda, cuda:1, mps, ...
    """

    data: str | None = None
    relations: str | None = None
    tokens: int = 8192
    bootstrap: int = 1000
    text: str | None = None
    words: Sequence[str] = ()
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"--tokens must be 0 (the whole validation split) or more; got {self.tokens}")
        if self.bootstrap < 100:
            raise UserError(f"--bootstrap must be at least 100 resamples for an interval; got {self.bootstrap}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more; got {self.seed}")

    def seed_of(self, *words: str) -> int:
        """A seed that depends on `seed` and the words alone, so that two models share the draws of a relation."""
        return zlib.crc32("/".join((str(self.seed), *words)).encode())


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all models of a report are measured on."""

    settings: AnalysisSettings
    relations: Sequence[Relation]
    text: Text | None

    def for_checkpoints(self, on_text: bool) -> "Task":
        """The same with little text, or with none."""
        if self.text is None or not on_text:
            return replace(self, text=None)
        window = min(self.text.seq_len, CHECKPOINT_WINDOW)
        return replace(
            self, text=replace(self.text, seq_len=window, tokens=CHECKPOINT_TOKENS, sample=CHECKPOINT_SAMPLE)
        )


@dataclass(frozen=True)
class Read:
    """The text that a model has read, and what it did at each position.

    Attributes:
        windows, text_bytes: as in `corpus.Passages`.
        fits: whether the model's tokens are the data's.
        measures: of every position.
        counts: resamples of the windows, (bootstrap, windows).
    """

    windows: list[Window]
    text_bytes: np.ndarray | None
    fits: bool
    measures: TextMeasures
    counts: np.ndarray

    def mean(self, values: np.ndarray, inside: np.ndarray | None = None) -> Estimate:
        """The mean of one value per position, (N,), over those `inside` or over all; its interval is over windows."""
        weights = np.ones(len(values)) if inside is None else inside.astype(np.float64)
        above, _ = self.measures.positions.window_sums(values.astype(np.float64) * weights)
        below, _ = self.measures.positions.window_sums(weights)
        return estimate(above.sum() / below.sum(), bootstrap_ratio(above, below, self.counts))


class Subject:
    """A model in memory. `notes` are sentences for the summary, `skipped` say which scores could not be computed."""

    def __init__(self, model: LoadedModel, task: Task) -> None:
        self.model = model
        self.label = model.source.label
        self.settings = task.settings
        self.relations = task.relations
        self.text = task.text
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self._pairs: dict[WordForm, dict[str, TokenPairs]] = {}

    @cached_property
    def input(self) -> Matrix:
        """Rows of the input embedding."""
        return Matrix(self.model.embedding_rows())

    @cached_property
    def centres(self) -> Matrix:
        """Rows of the unembedding; the same object as `input` where they are tied."""
        return self.input if self.model.tied else Matrix(self.model.centre_rows())

    @property
    def matrices(self) -> dict[str, Matrix]:
        return {"input": self.input, "centres": self.centres}

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        return self.model.encode_each(spellings(self.relations))

    def pairs(self, form: WordForm) -> dict[str, TokenPairs]:
        """The token pairs of every relation, by its name."""
        if form not in self._pairs:
            self._pairs[form] = {
                relation.name: token_pairs(relation, self._encoded.__getitem__, form, self.model.unknown)
                for relation in self.relations
            }
        return self._pairs[form]

    @property
    def scored(self) -> dict[str, TokenPairs]:
        """The pairs of the relations that are large enough to be scored, as last tokens."""
        return {name: pairs for name, pairs in self.pairs("last").items() if len(pairs.words) >= SMALLEST_RELATION}

    def resamples(self, items: int, *words: str) -> np.ndarray:
        """Bootstrap counts of `items`, (bootstrap, items); the words name the draw."""
        return bootstrap_counts(items, self.settings.bootstrap, self.settings.seed_of(*words, str(items)))

    @cached_property
    def read(self) -> Read | None:
        """The model's pass over the text; None without text, or where the text cannot be had in the model's tokens."""
        if self.text is None:
            return None
        corpus, folder = self.text.corpus, self.text.corpus.val.folder
        fits = corpus.fits(self.model)
        if not fits and corpus.tokenizer is None:
            self.notes.append(
                f"{self.label} predicts {self.model.vocab_size:,} tokens, and the vocabulary of {folder} has "
                f"{corpus.val.vocab_size:,}: nothing was measured on text. With the data's {TOKENIZER_FILE} in that "
                "folder the text can be encoded again."
            )
            return None
        passages = corpus.read(self.model, self.text.seq_len, self.text.tokens, self.text.longest.get(self.label))
        total = sum(len(inputs) for inputs, _ in passages.windows)
        if total < FEWEST_TOKENS:
            raise UserError(
                f"{folder}: {total} validation tokens are too few to measure a model on; prepare the data with "
                f"a larger validation split, or raise --tokens to at least {FEWEST_TOKENS}"
            )
        self._note_tokens(passages.windows, passages.text_bytes, fits)
        with tqdm(total=total, desc=f"{self.label}: text", unit="token", disable=None, leave=False) as bar:
            measures = measure_text(
                self.model, passages.windows, sample=self.text.sample, seed=self.settings.seed, advance=bar.update
            )
        counts = self.resamples(measures.windows, "windows")
        return Read(passages.windows, passages.text_bytes, fits, measures, counts)

    def _note_tokens(self, windows: Sequence[Window], text_bytes: np.ndarray | None, fits: bool) -> None:
        """Notes on a tokenizer that is another one, or unknown."""
        assert self.text is not None
        folder = self.text.corpus.val.folder
        if self.text.corpus.vocabulary is None and self.label not in self.text.trained:
            self.notes.append(
                f"{folder} has no {TOKENIZER_FILE}: that its tokens are those of {self.label} is a guess from the size "
                "of the vocabulary. A loss that is much too high means that they are not."
            )
        if not fits:
            bits = "" if text_bytes is None else "Bits per byte are comparable. "
            self.notes.append(
                f"{self.label} has another tokenizer than {folder}: the same text was encoded again, and read in "
                f"{len(windows):,} pieces of at most {max(len(inputs) for inputs, _ in windows):,} tokens (its context "
                f"is {self.model.context:,}). "
                f"{bits}Losses per token, accuracies and entropies are not comparable."
            )
        if text_bytes is None:
            self.notes.append(
                f"{self.label} has no bits per byte: its tokens are not pieces of UTF-8, and nothing says how much "
                "text they stand for."
            )
