"""From checkpoints to numbers: every measure of every model, and the tests between models.

Models are loaded one after another; what is kept of each is small, so that their number does not decide the memory.
"""

import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from hgpt.data.tokenizer import TOKENIZER_FILE
from hgpt.errors import UserError
from hgpt.history import records
from hgpt.interpret import calibration, centres, geometry, parallelograms
from hgpt.interpret.corpus import Corpus
from hgpt.interpret.models import LoadedModel, Outline, Source, find_sources, loaded, outlines, run_checkpoints
from hgpt.interpret.parallelograms import PRESET, VARIANTS, RelationVectors, ScoreSettings
from hgpt.interpret.positions import TextMeasures, measure_text
from hgpt.interpret.relations import (
    SMALLEST_RELATION,
    Relation,
    TokenPairs,
    WordForm,
    load_relations,
    spellings,
    token_pairs,
)
from hgpt.interpret.results import (
    Analysis,
    AnalysisSettings,
    Estimate,
    ModelResult,
    RelationResult,
    WordMeasures,
    estimate,
)
from hgpt.interpret.statistics import bootstrap_counts, bootstrap_ratio, holm, percentile_interval, sign_flip_test

# Analogy questions per relation: each costs a search of the vocabulary.
ANALOGY_QUESTIONS = 500
PRESET_QUADRUPLES = 10_000
SHUFFLES = 999
CKA_POSITIONS = 1024
FEWEST_TOKENS = 64
LENS_POSITIONS = 512
NEAREST = 5
READ_WORDS = 12
TEXT_POSITIONS = 160
CONTEXT_TOKENS = 12
# What a checkpoint of a run is measured on: eight windows, so that it is not the beginning of the text alone. They are
# shorter than a long context, whose trunk would take most of the time.
CHECKPOINT_TOKENS, CHECKPOINT_WINDOW = 2048, 256


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text of an analysis, and how it is cut.

    Attributes:
        seq_len: tokens of a window, in the data's own tokens.
        longest: of each model, by label, how many tokens it reads at a time if its tokenizer is another one.
        trained: labels of the models that were trained on the data, by their run's own account.
    """

    corpus: Corpus
    seq_len: int
    longest: dict[str, int]
    trained: frozenset[str]


def analyse(paths: list[str], settings: AnalysisSettings, *, checkpoints: bool = True) -> Analysis:
    """Measure every model that `paths` name and compare each with the first.

    Raises UserError for whatever in the input is wrong.
    """
    sources = find_sources(paths)
    relations = load_relations(settings.relations)
    device = _device(settings.device)
    notes: list[str] = []
    known = outlines(sources)
    data = settings.data or _data_of_runs(sources)
    text = None if data is None else _text(data, known, notes)
    if text is None:
        notes.append(
            "No --data was given and the models are no runs that name theirs, so nothing was measured on text: no "
            "loss, calibration, hidden states or contexts."
        )
    models: list[ModelResult] = []
    for outline in tqdm(known, desc="models", unit="model", disable=None):
        with loaded(outline.source, device) as model:
            models.append(_measure(model, outline, relations, text, settings, notes))
        if checkpoints:
            models[-1].checkpoints = _over_training(outline.source, relations, text, settings, device, models[-1])
    comparisons = [
        row for other in models[1:] if _comparable(models[0], other, notes) for row in _compare(models[0], other)
    ]
    similar = [
        other
        for other in models[1:]
        if models[0].text is not None and other.text is not None and other.vocabulary == models[0].vocabulary
    ]
    cka = {other.label: _cka(models[0], other) for other in similar}
    first = next((model for model in models if model.text is not None), None)
    return Analysis(
        settings=settings,
        models=models,
        comparisons=comparisons,
        cka=cka,
        last_layer_cka={other.label: _last_layer_cka(models[0], other) for other in similar},
        data=None if text is None else str(text.corpus.val.folder),
        data_source=None if text is None else text.corpus.source,
        evaluated_tokens=0 if first is None or first.text is None else len(first.text.positions.loss),
        windows=0 if first is None or first.text is None else len(np.unique(first.text.positions.window)),
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------------------
# Text


def _data_settings(source: Source) -> dict[str, Any]:
    """[data] in the config.toml of the run of `source`; empty without one."""
    if source.run is None or not (source.run / "config.toml").is_file():
        return {}
    try:
        return tomllib.loads((source.run / "config.toml").read_text(encoding="utf-8")).get("data", {})
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{source.run / 'config.toml'} is no TOML: {error}. Restore it, or name the exported model instead of the "
            "run"
        ) from error


def _data_of_runs(sources: list[Source]) -> str | None:
    """data.path of the first run that names one which is there."""
    paths = (_data_settings(source).get("path") for source in sources)
    return next((str(path) for path in paths if path is not None and Path(path).is_dir()), None)


def _text(folder: str, known: Sequence[Outline], notes: list[str]) -> Text:
    """The data in `folder`, in windows of the shortest context, so that models that can be compared read the same."""
    trained = [
        outline
        for outline in known
        if (path := _data_settings(outline.source).get("path")) is not None
        and Path(path).resolve() == Path(folder).resolve()
    ]
    # A folder without meta.json does not say how large its vocabulary is; the runs that were trained on it had to.
    sizes = [_data_settings(outline.source).get("vocab_size") for outline in trained]
    stated = {size for size in sizes if size is not None}
    corpus = Corpus.open(
        folder,
        vocab_sizes=sorted(stated or {outline.vocab_size for outline in known}),
        tokenizer_files=[Path(outline.source.folder) / TOKENIZER_FILE for outline in trained],
    )
    shortest = {
        outline.source.label: min((o for o in known if o.words == outline.words), key=lambda o: o.context)
        for outline in known
    }
    readers = [outline for outline in known if corpus.is_written_in(outline.words, outline.vocab_size)]
    first = min(readers or known, key=lambda outline: outline.context)
    shortest |= {outline.source.label: first for outline in readers}
    for outline in known:
        limit = shortest[outline.source.label]
        if limit.context < outline.context:
            notes.append(
                f"{outline.source.label} read windows of {limit.context:,} tokens, not of its whole context of "
                f"{outline.context:,}: models with the same tokenizer read the same windows, and {limit.source.label} "
                "has no longer context."
            )
    return Text(
        corpus=corpus,
        seq_len=first.context,
        longest={label: limit.context for label, limit in shortest.items()},
        trained=frozenset(outline.source.label for outline in trained),
    )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(1, device=name).device  # naming a device succeeds without it; taking memory there does not
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------------------------
# One model


def _measure(
    model: LoadedModel,
    outline: Outline,
    relations: list[Relation],
    text: Text | None,
    settings: AnalysisSettings,
    notes: list[str],
) -> ModelResult:
    result = ModelResult(
        source=model.source,
        description=model.description,
        harmonic=model.harmonic,
        exponent=model.exponent,
        parameters=model.parameters,
        tied=model.tied,
        vocabulary=outline.words,
    )
    matrices = {"input": model.embedding_rows()}
    matrices["centres"] = matrices["input"] if model.tied else model.centre_rows()
    shapes: dict[str, tuple[geometry.Covariance, geometry.PrincipalAxes]] = {}
    for name, rows in matrices.items():
        if name == "centres" and model.tied:
            shapes[name], result.geometry[name] = shapes["input"], result.geometry["input"]
            continue
        spread = geometry.covariance(rows)
        shapes[name] = (spread, geometry.principal_axes(spread.matrix))
        result.geometry[name] = _shape_of(rows, shapes[name][1].variances)
    _relations(model, result, matrices, shapes, relations, settings)
    result.history = _history(model.source)
    windows = [] if text is None else _on_text(model, result, text, settings, notes)
    _read(model, result, windows, settings)
    return result


def _shape_of(rows: np.ndarray, variances: np.ndarray) -> dict[str, Any]:
    return {
        "effective_rank": geometry.effective_rank(variances),
        "participation_ratio": geometry.participation_ratio(variances),
        "isotropy": geometry.isotropy(rows),
        "mean_cosine": geometry.mean_cosine(rows),
        "norms": geometry.norm_summary(rows),
        "explained_variance": geometry.explained_variance(variances).tolist(),
    }


def _seed(settings: AnalysisSettings, *words: str) -> int:
    """A seed that depends on the words alone: two models share the draws of a relation."""
    return zlib.crc32("/".join((str(settings.seed), *words)).encode())


def _relations(
    model: LoadedModel,
    result: ModelResult,
    matrices: dict[str, np.ndarray],
    shapes: dict[str, tuple[geometry.Covariance, geometry.PrincipalAxes]],
    relations: list[Relation],
    settings: AnalysisSettings,
) -> None:
    """Every variant of the parallelogram score, and the measures that need no plane, of every relation.

    Relation by relation: variants that start from the same vectors share them, and all share their resamples.
    """
    dimensions = matrices["input"].shape[1]
    usable = {v: s for v, s in VARIANTS.items() if s.components is None or s.components <= dimensions}
    alike: dict[tuple[str, WordForm, bool], list[str]] = {}
    for variant, score in usable.items():
        key = ("input" if model.tied else score.vectors, score.words, score.distinct)
        alike.setdefault(key, []).append(variant)
    separate = [name for name in matrices if name == "input" or not model.tied]
    scores: dict[str, dict[str, RelationResult]] = {variant: {} for variant in usable}
    small: dict[str, list[str]] = {variant: [] for variant in usable}
    words: dict[str, dict[str, WordMeasures]] = {name: {} for name in separate}
    encoded = model.encode_each(spellings(relations))
    steps = len(relations) * (len(usable) + len(separate))
    with tqdm(total=steps, desc=f"{result.label}: relations", unit="score", disable=None, leave=False) as bar:
        for relation in relations:
            draws = _Draws(relation.name, settings)
            tokenized: dict[WordForm, TokenPairs] = {}
            for (vectors, form, distinct), variants in alike.items():
                if form not in tokenized:
                    tokenized[form] = token_pairs(relation, encoded.__getitem__, form, model.unknown)
                ids = tokenized[form].ids
                ids = ids[parallelograms.distinct_pairs(ids)] if distinct else ids
                if len(ids) < SMALLEST_RELATION:
                    for variant in variants:
                        small[variant].append(f"{relation.name} ({len(ids)} of {len(relation.pairs)})")
                    bar.update(len(variants))
                    continue
                spread, axes = shapes[vectors]
                located = RelationVectors(matrices[vectors], ids, spread.mean)
                for variant in variants:
                    projected = parallelograms.project(located, spread, axes, usable[variant])
                    dropped = len(relation.pairs) - len(ids)
                    scores[variant][relation.name] = _score(projected, dropped, variant, draws)
                    bar.update()
            pairs = tokenized["last"]
            if relation.name in scores[PRESET]:
                for name in separate:
                    words[name][relation.name] = _word_measures(matrices[name], pairs, draws)
                result.planes[relation.name] = _plane(matrices["input"], pairs, shapes["input"])
            bar.update(len(separate))
    result.relations = {variant: found for variant, found in scores.items() if found}
    result.words = {name: words[name if name in words else "input"] for name in matrices}
    for variant in VARIANTS:
        if variant not in usable:
            result.skipped.append(f"{variant}: the model has only {dimensions} dimensions")
        elif small[variant]:
            listed = ", ".join(small[variant])
            result.skipped.append(f"{variant}: fewer than {SMALLEST_RELATION} pairs can be used of {listed}")


class _Draws:
    """The random choices of one relation, each made once: they depend on its name and on its number of pairs only, so
    that variants and models share them."""

    def __init__(self, name: str, settings: AnalysisSettings) -> None:
        self.name = name
        self.settings = settings
        self._counts: dict[int, np.ndarray] = {}
        self._pairings: dict[int, np.ndarray] = {}

    def seed(self, *words: str) -> int:
        return _seed(self.settings, self.name, *words)

    def counts(self, pairs: int) -> np.ndarray:
        """Resamples of the pairs, (bootstrap, pairs)."""
        if pairs not in self._counts:
            self._counts[pairs] = bootstrap_counts(pairs, self.settings.bootstrap, self.seed("bootstrap", str(pairs)))
        return self._counts[pairs]

    def pairings(self, pairs: int) -> np.ndarray:
        """Random outputs for the inputs, (pairs, SHUFFLES)."""
        if pairs not in self._pairings:
            self._pairings[pairs] = parallelograms.random_pairings(pairs, SHUFFLES, self.seed("shuffle"))
        return self._pairings[pairs]


def _score(projected: parallelograms.Projection, dropped: int, variant: str, draws: _Draws) -> RelationResult:
    offsets, scale = projected.outputs - projected.inputs, projected.scale
    pairs = len(offsets)
    replicates = parallelograms.mean_parallelogram_score(offsets, scale, draws.counts(pairs))
    value = float(parallelograms.mean_parallelogram_score(offsets, scale))
    shuffled = parallelograms.shuffled_scores(projected.inputs, projected.outputs, scale, draws.pairings(pairs))
    disjoint = parallelograms.disjoint_pairs_of_pairs(pairs, draws.seed("disjoint", str(pairs)))
    sampled = np.empty(0)
    if variant == PRESET:
        chosen = parallelograms.pairs_of_pairs(pairs, PRESET_QUADRUPLES, draws.seed("quadruples"))
        sampled = parallelograms.parallelogram_scores(offsets, scale, chosen)
    return RelationResult(
        pairs=pairs,
        dropped=dropped,
        score=estimate(value, replicates),
        shuffled=float(shuffled.mean()),
        p_shuffled=float((1 + np.sum(shuffled <= value * (1 + 1e-12))) / (1 + len(shuffled))),
        plane_variance=projected.plane_variance,
        plane_variance_of_words=projected.plane_variance_of_words,
        replicates=replicates,
        disjoint=parallelograms.parallelogram_scores(offsets, scale, disjoint),
        sampled=sampled,
    )


def _word_measures(rows: np.ndarray, pairs: TokenPairs, draws: _Draws) -> WordMeasures:
    ids = pairs.ids
    offsets = rows[ids[:, 1]].astype(np.float64) - rows[ids[:, 0]]
    counts = draws.counts(len(ids))
    replicates = {"consistency": parallelograms.offset_consistency(offsets, counts)}
    consistency = estimate(float(parallelograms.offset_consistency(offsets)), replicates["consistency"])
    chosen = parallelograms.pairs_of_pairs(len(ids), ANALOGY_QUESTIONS, draws.seed("analogies"))
    first, second = ids[chosen[:, 0]], ids[chosen[:, 1]]
    questions = np.column_stack([first, second[:, 0]])
    # a, b and c are never an answer, so a question whose answer is one of them cannot be asked.
    asked = (questions != second[:, 1:]).all(axis=1)
    accuracy = {}
    answers = parallelograms.analogy_answers(rows, questions[asked]) if asked.any() else {}
    for method, given in answers.items():
        correct = given == second[asked, 1]
        replicates[method] = parallelograms.resampled_accuracy(correct, chosen[asked], counts)
        accuracy[method] = estimate(float(correct.mean()), replicates[method])
    return WordMeasures(consistency=consistency, accuracy=accuracy, questions=int(asked.sum()), replicates=replicates)


def _plane(
    rows: np.ndarray, pairs: TokenPairs, shape: tuple[geometry.Covariance, geometry.PrincipalAxes]
) -> dict[str, Any]:
    """Pairs in the two planes that are drawn: that of the vocabulary and that of the relation's words."""
    drawn: dict[str, Any] = {"words": pairs.words}
    located = RelationVectors(rows, pairs.ids, shape[0].mean)
    planes: dict[str, Literal["vocabulary", "relation"]] = {"vocabulary": "vocabulary", "relation": "relation"}
    for name, plane in planes.items():
        projected = parallelograms.project(located, *shape, ScoreSettings(plane=plane))
        drawn[name] = np.stack([projected.inputs, projected.outputs], axis=1)  # (pairs, 2, 2)
        drawn[f"{name}_variance"] = projected.plane_variance
        drawn[f"{name}_variance_of_words"] = projected.plane_variance_of_words
    return drawn


def _on_text(
    model: LoadedModel, result: ModelResult, text: Text, settings: AnalysisSettings, notes: list[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Quality, calibration and hidden states on the validation split; returns the windows that were read."""
    corpus, folder = text.corpus, text.corpus.val.folder
    fits = corpus.fits(model)
    if not fits and corpus.tokenizer is None:
        notes.append(
            f"{result.label} predicts {model.vocab_size:,} tokens, and the vocabulary of {folder} has "
            f"{corpus.val.vocab_size:,}: nothing was measured on text. With the data's {TOKENIZER_FILE} in that folder "
            "the text can be encoded again."
        )
        return []
    if corpus.vocabulary is None and result.label not in text.trained:
        notes.append(
            f"{folder} has no {TOKENIZER_FILE}: that its tokens are those of {result.label} is a guess from the size "
            "of the vocabulary. A loss that is much too high means that they are not."
        )
    passages = corpus.read(model, text.seq_len, settings.tokens, text.longest[result.label])
    windows = passages.windows
    total = sum(len(inputs) for inputs, _ in windows)
    if total < FEWEST_TOKENS:
        raise UserError(
            f"{folder}: {total} validation tokens are too few to measure a model on; prepare the data with "
            f"a larger validation split, or raise --tokens to at least {FEWEST_TOKENS}"
        )
    if not fits:
        rest = "per token, accuracies and entropies are not"
        rest = (
            f"Losses {rest} comparable."
            if passages.text_bytes is None
            else f"Bits per byte are comparable; losses {rest}."
        )
        notes.append(
            f"{result.label} has another tokenizer than {folder}: the same text was encoded again, and read in "
            f"{len(windows):,} pieces of at most {max(len(inputs) for inputs, _ in windows):,} tokens (its context is "
            f"{model.context:,}). {rest}"
        )
    if passages.text_bytes is None:
        notes.append(
            f"{result.label} has no bits per byte: its tokens are no pieces of UTF-8, and nothing says how much text "
            "they stand for."
        )
    with tqdm(total=total, desc=f"{result.label}: text", unit="token", disable=None, leave=False) as bar:
        measured = measure_text(
            model,
            windows,
            sample=CKA_POSITIONS,
            lens_sample=LENS_POSITIONS,
            seed=settings.seed,
            advance=bar.update,
        )
    result.text = measured
    positions = measured.positions
    clusters = len(np.unique(positions.window))
    counts = bootstrap_counts(clusters, settings.bootstrap, _seed(settings, "windows", str(clusters)))
    mean = partial(_window_mean, measured, counts)
    result.quality = {
        "loss": mean(positions.loss),
        "accuracy": mean(positions.correct),
        "top5": mean(positions.top5),
        "entropy": mean(positions.entropy),
        "ece": _ece(measured, counts),
        "confidence": mean(positions.confidence),
        "nearest_accuracy": mean(positions.nearest),
        "log_margin": mean(positions.log_margin),
        "target_ratio": mean(positions.target_ratio),
    }
    if passages.text_bytes is not None:
        result.quality["bits_per_byte"] = _bits_per_byte(measured, counts, passages.text_bytes)
    result.reliability = calibration.reliability_curve(positions.confidence, positions.correct)
    result.geometry["hidden"] = _shape_of(
        measured.sample[-1], geometry.principal_axes(geometry.covariance(measured.sample[-1]).matrix).variances
    )
    if fits:
        band_of = calibration.frequency_bands(corpus.counts(model.vocab_size))[positions.target]
        result.bands = [
            _band(measured, settings, band, band_of == band)
            for band in range(len(calibration.BANDS))
            if (band_of == band).any()
        ]
    return windows


def _window_mean(measured: TextMeasures, counts: np.ndarray, values: np.ndarray) -> Estimate:
    """The mean over positions, its interval over windows."""
    sums, sizes = measured.positions.window_sums(values.astype(np.float64))
    return estimate(float(sums.sum() / sizes.sum()), bootstrap_ratio(sums, sizes, counts))


def _ratio_estimate(
    measured: TextMeasures, counts: np.ndarray, numerators: np.ndarray, denominators: np.ndarray
) -> Estimate:
    above, _ = measured.positions.window_sums(numerators)
    below, _ = measured.positions.window_sums(denominators)
    with np.errstate(invalid="ignore"):  # a resample may hold no position of a rare band; it is left out
        return estimate(float(above.sum() / below.sum()), bootstrap_ratio(above, below, counts))


def _bits_per_byte(measured: TextMeasures, counts: np.ndarray, text_bytes: np.ndarray) -> Estimate:
    losses, _ = measured.positions.window_sums(measured.positions.loss.astype(np.float64))
    value = calibration.bits_per_byte(losses, text_bytes)
    return estimate(value, bootstrap_ratio(losses / np.log(2), text_bytes, counts))


def _ece(measured: TextMeasures, counts: np.ndarray) -> Estimate:
    """ECE with its interval over windows; the sums of each bin are resampled together."""
    positions = measured.positions
    windows = np.unique(positions.window, return_inverse=True)[1]
    index = windows * calibration.BINS + calibration.confidence_bins(positions.confidence)
    gap = positions.correct.astype(np.float64) - positions.confidence
    sizes = np.bincount(windows).astype(np.float64)
    gaps = np.bincount(index, weights=gap, minlength=len(sizes) * calibration.BINS).reshape(len(sizes), -1)
    low, high = calibration.calibration_error_interval(gaps, sizes, counts)
    return Estimate(
        value=calibration.expected_calibration_error(positions.confidence, positions.correct), low=low, high=high
    )


def _band(measured: TextMeasures, settings: AnalysisSettings, band: int, inside: np.ndarray) -> dict[str, Any]:
    positions = measured.positions
    clusters = len(np.unique(positions.window))
    counts = bootstrap_counts(clusters, settings.bootstrap, _seed(settings, "windows", str(clusters)))
    values = {
        name: _ratio_estimate(
            measured, counts, getattr(positions, name).astype(np.float64) * inside, inside.astype(np.float64)
        )
        for name in ("loss", "correct", "top5", "entropy", "target_ratio")
    }
    ece = calibration.expected_calibration_error(positions.confidence[inside], positions.correct[inside])
    return {"band": calibration.band_name(band), "positions": int(inside.sum()), "ece": ece, **values}


def _read(
    model: LoadedModel, result: ModelResult, windows: list[tuple[np.ndarray, np.ndarray]], settings: AnalysisSettings
) -> None:
    """The text browser's passage, and the centres of some words."""
    passage = _passage(model, windows, settings)
    if passage is not None:
        result.reading = centres.read_text(model, *passage, NEAREST)
    for token in _words_to_read(model, result, settings):
        contexts = []
        if result.text is not None:
            states, places = result.text.sample[-1], result.text.sample_at
            nearest = centres.nearest_contexts(model, states, token, NEAREST)
            contexts = [_context_at(model, windows, int(places[index]), value) for index, value in nearest]
        result.words_read.append(
            {
                "token": model.token_text(token),
                "neighbours": centres.neighbours(model, token, 2 * NEAREST),
                "contexts": contexts,
            }
        )


def _passage(
    model: LoadedModel, windows: list[tuple[np.ndarray, np.ndarray]], settings: AnalysisSettings
) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and targets of the user's text, or of the beginning of the validation text; None without either."""
    longest = min(TEXT_POSITIONS, model.context)
    if settings.text is not None:
        try:
            text = Path(settings.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {settings.text} cannot be read as UTF-8: {error}") from error
        tokens = np.array(model.encode(text)[: longest + 1], dtype=np.int64)
        if len(tokens) < 2:
            raise UserError(
                f"--text {settings.text} has {len(tokens)} tokens, but at least 2 are needed to predict one"
            )
        return tokens[:-1], tokens[1:]
    if not windows:
        return None
    inputs, targets = windows[0]
    return inputs[:longest], targets[:longest]


def _words_to_read(model: LoadedModel, result: ModelResult, settings: AnalysisSettings) -> list[int]:
    """The user's words (the last token of each), or the text's commonest tokens that are words of four letters."""
    if settings.words:
        tokens = [(word, model.encode(word)) for word in settings.words]
        if empty := [word for word, ids in tokens if not ids]:
            raise UserError(f"--words {empty[0]!r} has no token; leave it out")
        return list(dict.fromkeys(ids[-1] for _, ids in tokens))
    if result.text is None:
        return []
    commonest = np.argsort(-np.bincount(result.text.positions.target, minlength=model.vocab_size), kind="stable")
    names = ((int(token), model.token_text(int(token)).strip()) for token in commonest[:2000])
    return [token for token, text in names if len(text) >= 4 and text.isalpha()][:READ_WORDS]


def _context_at(
    model: LoadedModel, windows: list[tuple[np.ndarray, np.ndarray]], at: int, value: float
) -> dict[str, Any]:
    """The text before a position of the whole text, and the token that came there."""
    starts = np.cumsum([0, *(len(inputs) for inputs, _ in windows)])
    window = int(np.searchsorted(starts, at, side="right") - 1)
    inputs, targets = windows[window]
    inside = at - int(starts[window])
    before = inputs[max(0, inside - CONTEXT_TOKENS + 1) : inside + 1]
    return {
        "before": model.tokenizer.decode(before.tolist()),
        "next": model.token_text(int(targets[inside])),
        "value": value,
    }


# ------------------------------------------------------------------------------------------------------------
# Over training


def _history(source: Source) -> list[dict[str, Any]]:
    """The run's own metrics up to the step of the checkpoint: training losses and evaluations."""
    if source.run is None:
        return []
    return [record for record in records(source.run) if source.step is None or record["step"] <= source.step]


def _over_training(
    source: Source,
    relations: list[Relation],
    text: Text | None,
    settings: AnalysisSettings,
    device: torch.device,
    final: ModelResult,
) -> list[dict[str, Any]]:
    """Norms, ranks, target distances and the preset's score of every checkpoint that the run has kept."""
    kept = run_checkpoints(source)
    if len(kept) < 2:
        return []
    scored = [relation for relation in relations if relation.name in final.relations.get(PRESET, {})]
    rows = []
    for checkpoint in tqdm(kept, desc=f"{source.label}: checkpoints", disable=None, leave=False):
        with loaded(checkpoint, device) as model:
            embedding = model.embedding_rows()
            rows_of_centres = embedding if model.tied else model.centre_rows()
            spread = geometry.covariance(embedding)
            axes = geometry.principal_axes(spread.matrix)
            encoded = model.encode_each(spellings(scored))
            scores = []
            for relation in scored:
                ids = token_pairs(relation, encoded.__getitem__, "last", model.unknown).ids
                located = RelationVectors(embedding, ids, spread.mean)
                projected = parallelograms.project(located, spread, axes, VARIANTS[PRESET])
                offsets = projected.outputs - projected.inputs
                scores.append(float(parallelograms.mean_parallelogram_score(offsets, projected.scale)))
            centre_axes = axes if model.tied else geometry.principal_axes(geometry.covariance(rows_of_centres).matrix)
            row: dict[str, Any] = {
                "step": checkpoint.step,
                "tokens": checkpoint.tokens_seen,
                "centre_norm": geometry.norm_summary(rows_of_centres)["mean"],
                "centre_effective_rank": geometry.effective_rank(centre_axes.variances),
                "centre_participation_ratio": geometry.participation_ratio(centre_axes.variances),
                "parallelogram_score": float(np.mean(scores)) if scores else None,
            }
            if text is not None and text.corpus.fits(model):
                windows = text.corpus.windows(model, min(text.seq_len, CHECKPOINT_WINDOW), CHECKPOINT_TOKENS)
                measured = measure_text(model, windows, sample=LENS_POSITIONS, lens_sample=0, seed=settings.seed)
                row["hidden_norm"] = geometry.norm_summary(measured.sample[-1])["mean"]
                row["target_ratio"] = float(measured.positions.target_ratio.mean())
                row["loss"] = float(measured.positions.loss.mean())
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------------
# Between models


def _comparable(first: ModelResult, other: ModelResult, notes: list[str]) -> bool:
    if first.vocabulary == other.vocabulary:
        return True
    notes.append(
        f"{other.label} and {first.label} have different tokenizers: their words are different tokens, so no test "
        "compares their parallelograms, and no CKA their hidden states."
    )
    return False


def _compare(first: ModelResult, other: ModelResult) -> list[dict[str, Any]]:
    """Other minus first, for each variant and relation: difference, interval over pairs, permutation test, Holm."""
    rows = []
    for variant, results in other.relations.items():
        shared = [name for name in results if name in first.relations.get(variant, {})]
        p_values = []
        for name in shared:
            mine, theirs = results[name], first.relations[variant][name]
            low, high = percentile_interval(mine.replicates - theirs.replicates)
            p_values.append(sign_flip_test(mine.disjoint - theirs.disjoint))
            rows.append(
                {
                    "variant": variant,
                    "relation": name,
                    "model": other.label,
                    "against": first.label,
                    "difference": mine.score.value - theirs.score.value,
                    "low": low,
                    "high": high,
                    "p": p_values[-1],
                }
            )
        for row, adjusted in zip(rows[len(rows) - len(shared) :], holm(p_values), strict=True):
            row["p_holm"] = float(adjusted)
    return rows


def _last_layer_cka(first: ModelResult, other: ModelResult) -> float:
    """Linear CKA, not debiased, of what the two heads see: the figure that papers quote."""
    assert first.text is not None and other.text is not None
    return geometry.linear_cka(first.text.sample[-1], other.text.sample[-1])


def _cka(first: ModelResult, other: ModelResult) -> np.ndarray:
    """Debiased linear CKA of every layer of `first` (rows) with every layer of `other` (columns)."""
    assert first.text is not None and other.text is not None
    first_grams = [geometry.centred_gram(layer) for layer in first.text.sample]
    table = np.empty((len(first_grams), len(other.text.sample)))
    bar = tqdm(other.text.sample, desc=f"{other.label}: CKA", unit="layer", disable=None, leave=False)
    for column, layer in enumerate(bar):
        gram = geometry.centred_gram(layer)
        table[:, column] = [geometry.debiased_cka(row, gram) for row in first_grams]
    return table
