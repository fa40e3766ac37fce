"""From checkpoints to numbers: every measure of every model, and the tests between models.

Models are loaded one after another; what is kept of each is small, so that their number does not decide the memory.
"""

import json
import tomllib
import zlib
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from hgpt.errors import UserError
from hgpt.interpret import calibration, centres, geometry, parallelograms
from hgpt.interpret.corpus import Corpus
from hgpt.interpret.models import LoadedModel, Source, find_sources, loaded, run_checkpoints
from hgpt.interpret.parallelograms import PRESET, VARIANTS, ScoreSettings
from hgpt.interpret.positions import TextMeasures, measure_text
from hgpt.interpret.relations import SMALLEST_RELATION, Relation, TokenPairs, load_relations, token_pairs
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
from hgpt.metrics import METRICS_FILE

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


def analyse(paths: list[str], settings: AnalysisSettings, *, checkpoints: bool = True) -> Analysis:
    """Measure every model that `paths` name and compare each with the first.

    Raises UserError for whatever in the input is wrong.
    """
    sources = find_sources(paths)
    relations = load_relations(settings.relations)
    device = _device(settings.device)
    notes: list[str] = []
    data = settings.data or _data_of_runs(sources)
    corpus = None if data is None else Corpus.open(data)
    if corpus is None:
        notes.append(
            "No --data was given and the models are no runs that name theirs, so nothing was measured on text: no "
            "loss, calibration, hidden states or contexts."
        )
    models: list[ModelResult] = []
    # Windows of the shortest context, so that all models read the same.
    seq_len = min((length for source in sources if (length := _context(source)) is not None), default=None)
    for source in tqdm(sources, desc="models", unit="model", disable=None):
        with loaded(source, device) as model:
            models.append(_measure(model, relations, corpus, settings, seq_len or model.context, notes))
        if checkpoints:
            models[-1].checkpoints = _over_training(source, relations, corpus, settings, seq_len, device, models[-1])
    comparisons = [
        row for other in models[1:] if _comparable(models[0], other, notes) for row in _compare(models[0], other)
    ]
    cka = {
        other.label: _cka(models[0], other)
        for other in models[1:]
        if corpus is not None and other.vocabulary == models[0].vocabulary
    }
    first = next((model for model in models if model.text is not None), None)
    return Analysis(
        settings=settings,
        models=models,
        comparisons=comparisons,
        cka=cka,
        last_layer_cka={
            label: _last_layer_cka(models[0], next(model for model in models if model.label == label)) for label in cka
        },
        data=None if corpus is None else str(corpus.val.folder),
        data_source=None if corpus is None else corpus.source,
        evaluated_tokens=0 if first is None or first.text is None else len(first.text.positions.loss),
        windows=0 if first is None or first.text is None else len(np.unique(first.text.positions.window)),
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------------------
# Text


def _data_of_runs(sources: list[Source]) -> str | None:
    """data.path of the first run that names one which is there."""
    for source in sources:
        if source.run is not None and (source.run / "config.toml").is_file():
            path = tomllib.loads((source.run / "config.toml").read_text(encoding="utf-8")).get("data", {}).get("path")
            if path is not None and Path(path).is_dir():
                return str(path)
    return None


def _context(source: Source) -> int | None:
    try:
        return int(json.loads((Path(source.folder) / "config.json").read_bytes())["n_positions"])
    except (OSError, ValueError, KeyError):
        return None


def _device(name: str) -> torch.device:
    try:
        return torch.empty(1, device=name).device  # naming a device succeeds without it; taking memory there does not
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------------------------
# One model


def _measure(
    model: LoadedModel,
    relations: list[Relation],
    corpus: Corpus | None,
    settings: AnalysisSettings,
    seq_len: int,
    notes: list[str],
) -> ModelResult:
    result = ModelResult(
        source=model.source,
        description=model.description,
        harmonic=model.harmonic,
        exponent=model.exponent,
        parameters=model.parameters,
        tied=model.tied,
        vocabulary=frozenset(model.vocabulary().items()),
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
    windows = [] if corpus is None else _on_text(model, result, corpus, settings, seq_len, notes)
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
    """Every variant of the parallelogram score, and the measures that need no plane, of every relation."""
    tokenized: dict[tuple[str, str], TokenPairs] = {}
    for variant, score in VARIANTS.items():
        if score.components is not None and score.components > matrices["input"].shape[1]:
            result.skipped.append(f"{variant}: the model has only {matrices['input'].shape[1]} dimensions")
            continue
        small = []
        for relation in relations:
            key = (relation.name, score.words)
            if key not in tokenized:
                tokenized[key] = token_pairs(relation, model.encode, score.words, model.unknown)
            pairs = tokenized[key]
            ids = pairs.ids[parallelograms.distinct_pairs(pairs.ids)] if score.distinct else pairs.ids
            if len(ids) < SMALLEST_RELATION:
                small.append(f"{relation.name} ({len(ids)} of {len(relation.pairs)})")
                continue
            spread, axes = shapes[score.vectors]
            projected = parallelograms.project(matrices[score.vectors], ids, spread, axes, score)
            result.relations.setdefault(variant, {})[relation.name] = _score(
                projected, len(relation.pairs) - len(ids), relation.name, variant, settings
            )
        if small:
            result.skipped.append(f"{variant}: fewer than {SMALLEST_RELATION} pairs can be used of {', '.join(small)}")
    for vectors, rows in matrices.items():
        if vectors == "centres" and model.tied:
            result.words[vectors] = result.words["input"]
            continue
        result.words[vectors] = {
            relation.name: _word_measures(rows, tokenized[relation.name, "last"], relation.name, settings)
            for relation in relations
            if relation.name in result.relations.get(PRESET, {})
        }
    for relation in relations:
        if relation.name in result.relations.get(PRESET, {}):
            pairs = tokenized[relation.name, "last"]
            result.planes[relation.name] = _plane(matrices["input"], pairs, shapes["input"])


def _score(
    projected: parallelograms.Projection, dropped: int, name: str, variant: str, settings: AnalysisSettings
) -> RelationResult:
    offsets, scale = projected.outputs - projected.inputs, projected.scale
    pairs = len(offsets)
    counts = bootstrap_counts(pairs, settings.bootstrap, _seed(settings, name, "bootstrap", str(pairs)))
    replicates = parallelograms.mean_parallelogram_score(offsets, scale, counts)
    value = float(parallelograms.mean_parallelogram_score(offsets, scale))
    shuffled = parallelograms.shuffled_scores(
        projected.inputs, projected.outputs, scale, SHUFFLES, _seed(settings, name, "shuffle")
    )
    disjoint = parallelograms.disjoint_pairs_of_pairs(pairs, _seed(settings, name, "disjoint", str(pairs)))
    sampled = np.empty(0)
    if variant == PRESET:
        chosen = parallelograms.pairs_of_pairs(pairs, PRESET_QUADRUPLES, _seed(settings, name, "quadruples"))
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


def _word_measures(rows: np.ndarray, pairs: TokenPairs, name: str, settings: AnalysisSettings) -> WordMeasures:
    ids = pairs.ids
    offsets = rows[ids[:, 1]].astype(np.float64) - rows[ids[:, 0]]
    counts = bootstrap_counts(len(ids), settings.bootstrap, _seed(settings, name, "bootstrap", str(len(ids))))
    replicates = {"consistency": parallelograms.offset_consistency(offsets, counts)}
    consistency = estimate(float(parallelograms.offset_consistency(offsets)), replicates["consistency"])
    chosen = parallelograms.pairs_of_pairs(len(ids), ANALOGY_QUESTIONS, _seed(settings, name, "analogies"))
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
    planes: dict[str, Literal["vocabulary", "relation"]] = {"vocabulary": "vocabulary", "relation": "relation"}
    for name, plane in planes.items():
        projected = parallelograms.project(rows, pairs.ids, *shape, ScoreSettings(plane=plane))
        drawn[name] = np.stack([projected.inputs, projected.outputs], axis=1)  # (pairs, 2, 2)
        drawn[f"{name}_variance"] = projected.plane_variance
        drawn[f"{name}_variance_of_words"] = projected.plane_variance_of_words
    return drawn


def _on_text(
    model: LoadedModel,
    result: ModelResult,
    corpus: Corpus,
    settings: AnalysisSettings,
    seq_len: int,
    notes: list[str],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Quality, calibration and hidden states on the validation split; returns the windows that were read."""
    if not corpus.fits(model) and corpus.tokenizer is None:
        notes.append(f"{result.label}: its tokenizer is not that of {corpus.val.folder}: nothing was measured on text.")
        return []
    if not corpus.fits(model):
        notes.append(
            f"{result.label} has another tokenizer than {corpus.val.folder}: the same text was encoded again. Bits per "
            "byte are comparable; losses per token, accuracies and entropies are not."
        )
    windows = corpus.windows(model, min(seq_len, model.context), settings.tokens)
    total = sum(len(inputs) for inputs, _ in windows)
    if total < FEWEST_TOKENS:
        raise UserError(
            f"{corpus.val.folder}: {total} validation tokens are too few to measure a model on; prepare the data with "
            f"a larger validation split, or raise --tokens to at least {FEWEST_TOKENS}"
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
    bytes_of = model.token_bytes()[positions.target].astype(np.float64)
    clusters = len(np.unique(positions.window))
    counts = bootstrap_counts(clusters, settings.bootstrap, _seed(settings, "windows", str(clusters)))
    mean = partial(_window_mean, measured, counts)
    result.quality = {
        "loss": mean(positions.loss),
        "bits_per_byte": _bits_per_byte(measured, counts, bytes_of),
        "accuracy": mean(positions.correct),
        "top5": mean(positions.top5),
        "entropy": mean(positions.entropy),
        "ece": _ece(measured, settings),
        "confidence": mean(positions.confidence),
        "nearest_accuracy": mean(positions.nearest),
        "log_margin": mean(positions.log_margin),
        "target_ratio": mean(positions.target_ratio),
    }
    result.reliability = calibration.reliability_curve(positions.confidence, positions.correct)
    result.geometry["hidden"] = _shape_of(
        measured.sample[-1], geometry.principal_axes(geometry.covariance(measured.sample[-1]).matrix).variances
    )
    if corpus.fits(model):
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
    return estimate(float(above.sum() / below.sum()), bootstrap_ratio(above, below, counts))


def _bits_per_byte(measured: TextMeasures, counts: np.ndarray, bytes_of: np.ndarray) -> Estimate:
    losses, _ = measured.positions.window_sums(measured.positions.loss.astype(np.float64))
    sizes, _ = measured.positions.window_sums(bytes_of)
    value = calibration.bits_per_byte(measured.positions.loss, bytes_of)
    return estimate(value, bootstrap_ratio(losses / np.log(2), sizes, counts))


def _ece(measured: TextMeasures, settings: AnalysisSettings) -> Estimate:
    """ECE with its interval over windows; the sums of each bin are resampled together."""
    positions = measured.positions
    windows = np.unique(positions.window, return_inverse=True)[1]
    clusters = int(windows.max()) + 1
    index = windows * calibration.BINS + calibration.confidence_bins(positions.confidence)
    gap = positions.correct.astype(np.float64) - positions.confidence
    gaps = np.bincount(index, weights=gap, minlength=clusters * calibration.BINS).reshape(clusters, -1)
    sizes = np.bincount(windows).astype(np.float64)
    counts = bootstrap_counts(clusters, settings.bootstrap, _seed(settings, "windows", str(clusters)))
    replicates = np.abs(counts @ gaps).sum(axis=1) / (counts @ sizes)
    value = calibration.expected_calibration_error(positions.confidence, positions.correct)
    return estimate(value, replicates)


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
    if source.run is None or not (source.run / METRICS_FILE).is_file():
        return []
    lines = (source.run / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if source.step is None or record["step"] <= source.step]


def _over_training(
    source: Source,
    relations: list[Relation],
    corpus: Corpus | None,
    settings: AnalysisSettings,
    seq_len: int | None,
    device: torch.device,
    final: ModelResult,
) -> list[dict[str, Any]]:
    """Norms, ranks, target distances and the preset's score of every checkpoint that the run has kept."""
    kept = run_checkpoints(source)
    if len(kept) < 2:
        return []
    rows = []
    for checkpoint in tqdm(kept, desc=f"{source.label}: checkpoints", disable=None, leave=False):
        with loaded(checkpoint, device) as model:
            embedding = model.embedding_rows()
            rows_of_centres = embedding if model.tied else model.centre_rows()
            spread = geometry.covariance(embedding)
            axes = geometry.principal_axes(spread.matrix)
            scores = []
            for relation in relations:
                if relation.name in final.relations.get(PRESET, {}):
                    ids = token_pairs(relation, model.encode, "last", model.unknown).ids
                    projected = parallelograms.project(embedding, ids, spread, axes, VARIANTS[PRESET])
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
            if corpus is not None and corpus.fits(model):
                windows = corpus.windows(model, min(seq_len or model.context, model.context), LENS_POSITIONS)
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
    for column, layer in enumerate(other.text.sample):
        gram = geometry.centred_gram(layer)
        table[:, column] = [geometry.debiased_cka(row, gram) for row in first_grams]
    return table
