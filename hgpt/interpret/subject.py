"""A model under measurement, with the quantities that several measures share, each computed once."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from tqdm import tqdm

from hgpt.data.tokenizer import TOKENIZER_FILE
from hgpt.errors import UserError
from hgpt.interpret.corpus import Passages, TextPlan
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import TextMeasures, measure_text
from hgpt.interpret.relations import SMALLEST_RELATION, Relation, TokenPairs, WordForm, token_pairs
from hgpt.interpret.statistics import Estimate, bootstrap_counts, bootstrap_ratio, estimate
from hgpt.interpret.vectors import Matrix

FEWEST_TOKENS = 64
HIDDEN_SAMPLE = 1024  # positions whose hidden states are kept
# Checkpoints are measured on eight windows spread over the text, shorter than a long context to save time.
CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, CHECKPOINT_SAMPLE = 2048, 256, 512


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """The options of python -m hgpt.interpret, one per field.

    Args:
        data: data folder written by data_prep; default: the runs' own
        relations: folder of relation sets, one .json each; default: the shipped sets
        tokens: validation tokens that every model predicts, spread evenly over the split; 0: all of them
        bootstrap: resamples per interval
        text: UTF-8 text to show token by token; default: the beginning of the validation text
        words: tokens whose centres to show (quote a leading space: ' the'); default: frequent words of the text
        seed: seed of all random choices: pairs of pairs, resamples, positions
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
        """A seed that depends only on `seed` and the words, so that all models share the draws for a relation."""
        return zlib.crc32("/".join((str(self.seed), *words)).encode())


@dataclass(frozen=True, kw_only=True)
class Task:
    """The settings, relations and text of all models of a report."""

    settings: AnalysisSettings
    relations: Sequence[Relation]
    text: TextPlan | None

    def for_checkpoints(self, on_text: bool) -> "Task":
        """The task for the kept checkpoints of a run: less text, or none unless `on_text`."""
        if self.text is None or not on_text:
            return replace(self, text=None)
        window = min(self.text.seq_len, CHECKPOINT_WINDOW)
        text = replace(self.text, seq_len=window, tokens=CHECKPOINT_TOKENS, sample=CHECKPOINT_SAMPLE)
        return replace(self, text=text)


@dataclass(frozen=True)
class Read:
    """The text that a model read, and the measures at each position."""

    passages: Passages
    fits: bool  # whether the model's tokens are the data's
    measures: TextMeasures
    counts: np.ndarray  # bootstrap counts of the windows, (bootstrap, windows)

    def mean(self, values: np.ndarray, inside: np.ndarray | None = None) -> Estimate:
        """Mean of `values`, (N,), over the positions `inside`, (N,) bool, or over all; windows are resampled."""
        weights = np.ones(len(values)) if inside is None else inside.astype(np.float64)
        numerators = self.measures.positions.window_sums(values.astype(np.float64) * weights)
        denominators = self.measures.positions.window_sums(weights)
        return estimate(numerators.sum() / denominators.sum(), bootstrap_ratio(numerators, denominators, self.counts))


class Subject:
    """A model in memory and its task. `notes` go into the summary; `skipped` lists scores that were not computed."""

    def __init__(self, model: LoadedModel, task: Task) -> None:
        self.model = model
        self.label = model.source.label
        self.settings = task.settings
        self.relations = task.relations
        self.text = task.text
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self._encode = cache(model.encode)
        self._pairs: dict[WordForm, dict[str, TokenPairs]] = {}

    @cached_property
    def input(self) -> Matrix:
        """Rows of the input embedding."""
        return Matrix(self.model.embedding_rows())

    @cached_property
    def centres(self) -> Matrix:
        """Rows of the unembedding; the same object as `input` if they are tied."""
        return self.input if self.model.tied else Matrix(self.model.centre_rows())

    @property
    def matrices(self) -> dict[str, Matrix]:
        return {"input": self.input, "centres": self.centres}

    def pairs(self, form: WordForm) -> dict[str, TokenPairs]:
        """Relation → its token pairs."""
        if form not in self._pairs:
            unknown = self.model.tokenizer.unk_token_id
            self._pairs[form] = {r.name: token_pairs(r, self._encode, form, unknown) for r in self.relations}
        return self._pairs[form]

    @property
    def scored(self) -> dict[str, TokenPairs]:
        """The token pairs (last tokens) of the relations that are large enough for a score."""
        return {name: pairs for name, pairs in self.pairs("last").items() if len(pairs.words) >= SMALLEST_RELATION}

    def resamples(self, items: int, *words: str) -> np.ndarray:
        """Bootstrap counts of `items`, (bootstrap, items); the same words give the same resamples."""
        return bootstrap_counts(items, self.settings.bootstrap, self.settings.seed_of(*words, str(items)))

    @cached_property
    def read(self) -> Read | None:
        """The model's pass over the text; None without text, or if the text cannot be encoded for the model."""
        if self.text is None:
            return None
        corpus, folder = self.text.corpus, self.text.corpus.val.folder
        fits = corpus.fits(self.model)
        if not fits and corpus.tokenizer is None:
            self.notes.append(
                f"{self.label} predicts {self.model.vocab_size:,} tokens, and the vocabulary of {folder} has "
                f"{corpus.val.vocab_size:,}: nothing was measured on text. Put the data's {TOKENIZER_FILE} into that "
                "folder, and the text is encoded again for the model."
            )
            return None
        passages = corpus.read(self.model, self.text.seq_len, self.text.tokens, self.text.longest.get(self.label))
        total = sum(len(inputs) for inputs, _ in passages.windows)
        if total < FEWEST_TOKENS:
            raise UserError(
                f"{folder}: {total} validation tokens are too few to measure a model on; prepare the data with "
                f"a larger validation split, or raise --tokens to at least {FEWEST_TOKENS}"
            )
        self._note_tokens(self.text, passages, fits)
        with tqdm(total=total, desc=f"{self.label}: text", unit="token", disable=None, leave=False) as bar:
            measures = measure_text(
                self.model, passages.windows, sample=self.text.sample, seed=self.settings.seed, advance=bar.update
            )
        counts = self.resamples(measures.windows, "windows")
        return Read(passages, fits, measures, counts)

    @cached_property
    def training_counts(self) -> np.ndarray | None:
        """Count of each token in the training split, (V,); None if data and model have different tokens."""
        fits = self.read is not None and self.read.fits
        return self.text.corpus.counts(self.model.vocab_size) if self.text is not None and fits else None

    def _note_tokens(self, text: TextPlan, passages: Passages, fits: bool) -> None:
        """Add notes if the model's tokenizer may not be the data's."""
        folder = text.corpus.val.folder
        if text.corpus.vocabulary is None and self.label not in text.trained:
            self.notes.append(
                f"{folder} has no {TOKENIZER_FILE}. Its vocabulary is as large as that of {self.label}, so the same "
                "tokens are assumed; a loss far too high means that they are others."
            )
        if not fits:
            longest = max(len(inputs) for inputs, _ in passages.windows)
            bits = "" if passages.text_bytes is None else "Bits per byte are comparable. "
            self.notes.append(
                f"{self.label} has another tokenizer than {folder}: the same text was encoded again, and read in "
                f"{len(passages.windows):,} pieces of at most {longest:,} tokens (its context is "
                f"{self.model.context:,}). {bits}Losses per token, accuracies and entropies are not comparable."
            )
        if passages.text_bytes is None:
            self.notes.append(
                f"{self.label} has no bits per byte: its tokens are not sequences of bytes, and the data does not "
                "state how many bytes its text has."
            )
