"""What is measured, on how much, and what came out: settings and results, their summaries, and their JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hgpt.errors import UserError
from hgpt.interpret import calibration, centres
from hgpt.interpret.models import Source
from hgpt.interpret.parallelograms import PRESET, VARIANTS
from hgpt.interpret.positions import TextMeasures
from hgpt.interpret.statistics import percentile_interval


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is measured, and on how much.

    Args:
        data: a data folder written by data_prep; None: the one that the first run was trained on.
        relations: a folder of relation sets; None: those that ship.
        tokens: validation tokens that every model predicts, spread evenly over the split; 0: all of them.
        bootstrap: resamples behind every interval.
        text: a UTF-8 file to show in the text browser; None: the beginning of the validation text.
        words: whose centres are read; none: the commonest words of the validation text.
        seed: of every random choice: quadruples, resamples, positions.
        device: of the models.
    """

    data: str | None = None
    relations: str | None = None
    tokens: int = 8192
    bootstrap: int = 1000
    text: str | None = None
    words: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"--tokens must be 0 (the whole validation split) or more; got {self.tokens}")
        if self.bootstrap < 100:
            raise UserError(f"--bootstrap must be at least 100 resamples for an interval; got {self.bootstrap}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more; got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class RelationResult:
    """One relation under one variant in one model.

    `score` is the mean over all pairs of pairs with its interval over pairs, `sampled` the scores of the random pairs
    of pairs of the preset (empty elsewhere), `shuffled` the mean score of the same words paired at random and
    `p_shuffled` how often such a pairing scores as low. `replicates` and `disjoint` serve comparisons between models.
    """

    pairs: int
    dropped: int
    score: Estimate
    shuffled: float
    p_shuffled: float
    plane_variance: float
    plane_variance_of_words: float
    replicates: np.ndarray
    disjoint: np.ndarray
    sampled: np.ndarray


@dataclass(frozen=True, kw_only=True)
class WordMeasures:
    """What needs no plane: offsets' consistency and analogies, for the input embedding and for the centres."""

    consistency: Estimate
    accuracy: dict[str, Estimate]
    questions: int
    replicates: dict[str, np.ndarray]


@dataclass(kw_only=True)
class ModelResult:
    """All that is known of one model; see `Analysis.to_json` for the shape in results.json."""

    source: Source
    description: str
    harmonic: bool
    exponent: float | None
    parameters: int
    tied: bool
    vocabulary: frozenset[tuple[str, int]]
    relations: dict[str, dict[str, RelationResult]] = field(default_factory=dict)  # variant → relation
    words: dict[str, dict[str, WordMeasures]] = field(default_factory=dict)  # vectors → relation
    planes: dict[str, dict[str, Any]] = field(default_factory=dict)  # relation → points to draw
    skipped: list[str] = field(default_factory=list)
    geometry: dict[str, dict[str, Any]] = field(default_factory=dict)  # matrix → measures
    text: TextMeasures | None = None
    quality: dict[str, Any] = field(default_factory=dict)
    bands: list[dict[str, Any]] = field(default_factory=list)
    reliability: calibration.Reliability | None = None
    reading: list[centres.Reading] = field(default_factory=list)
    words_read: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of the run's metrics.jsonl
    checkpoints: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def energy(self) -> dict[str, Any] | None:
        """What the training up to this step spent, as hgpt.run.energy logged it; None where it did not."""
        return next((record for record in reversed(self.history) if record["kind"] == "energy"), None)

    @property
    def provenance(self) -> str:
        step = "" if self.source.step is None else f", step {self.source.step:,}"
        seen = "" if self.source.tokens_seen is None else f", {self.source.tokens_seen / 1e6:.3g} M tokens seen"
        return f"{self.label}: {self.description}{step}{seen}"


@dataclass(kw_only=True)
class Analysis:
    """The results of all models, and what was compared between them."""

    settings: AnalysisSettings
    models: list[ModelResult]
    comparisons: list[dict[str, Any]]
    cka: dict[str, np.ndarray]  # label of the other model → (layers + 1, layers + 1) against the first
    last_layer_cka: dict[str, float]  # label of the other model → linear CKA of the last hidden states, not debiased
    data: str | None
    data_source: str | None
    evaluated_tokens: int
    windows: int
    notes: list[str]


# ------------------------------------------------------------------------------------------------------------
# Summaries


def estimate(value: float, replicates: np.ndarray) -> Estimate:
    """A value with the percentile interval of its bootstrap replicates."""
    low, high = percentile_interval(replicates)
    return Estimate(value=value, low=low, high=high)


def mean_over_relations(results: dict[str, RelationResult]) -> Estimate:
    """The mean score over relations, its interval over the pairs of each: the relations themselves are not a sample."""
    value = float(np.mean([result.score.value for result in results.values()]))
    return estimate(value, np.mean([result.replicates for result in results.values()], axis=0))


def relative_to_random_pairs(results: dict[str, RelationResult]) -> Estimate:
    """Mean over relations of the score over that of the same words paired at random; 1: no trace of the relation.

    Free of the scale, and of where the words lie as long as they lie there together. The interval is over pairs, with
    the random pairings' mean held fixed.
    """
    value = float(np.mean([result.score.value / result.shuffled for result in results.values()]))
    return estimate(value, np.mean([result.replicates / result.shuffled for result in results.values()], axis=0))


def difference_over_relations(mine: dict[str, RelationResult], theirs: dict[str, RelationResult]) -> Estimate | None:
    """Mean difference over the relations that both have, with its paired interval over pairs; None without any."""
    shared = [name for name in mine if name in theirs]
    if not shared:
        return None
    value = float(np.mean([mine[name].score.value - theirs[name].score.value for name in shared]))
    return estimate(value, np.mean([mine[name].replicates - theirs[name].replicates for name in shared], axis=0))


def mean_consistency(model: ModelResult, vectors: str) -> Estimate | None:
    """Mean offset consistency over relations, of "input" or "centres"; None without relations."""
    found = list(model.words.get(vectors, {}).values())
    if not found:
        return None
    value = float(np.mean([measures.consistency.value for measures in found]))
    return estimate(value, np.mean([measures.replicates["consistency"] for measures in found], axis=0))


def mean_analogy(model: ModelResult, vectors: str, method: str) -> Estimate | None:
    """Mean analogy accuracy over the relations that have questions; None without any."""
    found = [measures for measures in model.words.get(vectors, {}).values() if method in measures.accuracy]
    if not found:
        return None
    value = float(np.mean([measures.accuracy[method].value for measures in found]))
    return estimate(value, np.mean([measures.replicates[method] for measures in found], axis=0))


OWN_SCALE = "full space, scale of the relation, distinct"
READABILITY = {
    "preset_score": f"parallelogram score, {PRESET}",
    "preset_relative": "the same over random pairs\nof the same words",
    "own_scale_score": "parallelogram score, full space,\nscale of the relation, distinct",
    "own_scale_relative_centres": "the same of the centres, over\nrandom pairs of the same words",
    "analogies_input": "analogy accuracy 3CosAdd,\ninput embedding",
    "analogies_centres": "analogy accuracy 3CosAdd,\ncentres",
    "consistency_centres": "offset consistency, centres",
    "target_ratio": "distance to the target over\nthe median distance",
    "effective_rank_centres": "effective rank of the centres",
    "explained_2_centres": "share of the centres' variance\nin two components",
    "ece": "expected calibration error",
}


def readability(model: ModelResult) -> dict[str, float | None]:
    """One number for each key of `READABILITY`, None where it is not known: what runs of many arms are compared by."""

    def score(variant: str) -> float | None:
        results = model.relations.get(variant)
        return mean_over_relations(results).value if results else None

    def relative(variant: str) -> float | None:
        results = model.relations.get(variant)
        return relative_to_random_pairs(results).value if results else None

    def value(estimate: Estimate | None) -> float | None:
        return None if estimate is None else estimate.value

    return {
        "preset_score": score(PRESET),
        "preset_relative": relative(PRESET),
        "own_scale_score": score(OWN_SCALE),
        "own_scale_relative_centres": relative(f"{OWN_SCALE}, centres"),
        "analogies_input": value(mean_analogy(model, "input", "3CosAdd")),
        "analogies_centres": value(mean_analogy(model, "centres", "3CosAdd")),
        "consistency_centres": value(mean_consistency(model, "centres")),
        "target_ratio": value(model.quality.get("target_ratio")) if model.harmonic else None,
        "effective_rank_centres": model.geometry["centres"]["effective_rank"],
        "explained_2_centres": model.geometry["centres"]["explained_variance"][1],
        "ece": value(model.quality.get("ece")),
    }


# ------------------------------------------------------------------------------------------------------------
# JSON


def to_json(analysis: Analysis) -> dict[str, Any]:
    """results.json: everything but the arrays that only figures need."""
    return {
        "settings": asdict(analysis.settings),
        "data": {
            "folder": analysis.data,
            "source": analysis.data_source,
            "evaluated_tokens": analysis.evaluated_tokens,
            "windows": analysis.windows,
        },
        "notes": analysis.notes,
        "variants": {name: asdict(settings) for name, settings in VARIANTS.items()},
        "models": [_model_json(model) for model in analysis.models],
        "comparisons": analysis.comparisons,
        "cka_with_the_first": {label: table.tolist() for label, table in analysis.cka.items()},
        "linear_cka_of_the_last_layer": analysis.last_layer_cka,
    }


def _model_json(model: ModelResult) -> dict[str, Any]:
    return {
        "label": model.label,
        "folder": model.source.folder,
        "step": model.source.step,
        "tokens_seen": model.source.tokens_seen,
        "head": model.description,
        "exponent": model.exponent,
        "parameters": model.parameters,
        "quality": {name: asdict(value) for name, value in model.quality.items()},
        "bands": [
            {name: asdict(value) if isinstance(value, Estimate) else value for name, value in band.items()}
            for band in model.bands
        ],
        "reliability": None
        if model.reliability is None
        else {name: values.tolist() for name, values in asdict(model.reliability).items()},
        "geometry": model.geometry,
        "parallelograms": {
            variant: {
                "mean": asdict(mean_over_relations(results)),
                "relations": {
                    name: {
                        "score": asdict(result.score),
                        "shuffled": result.shuffled,
                        "p_shuffled": result.p_shuffled,
                        "pairs": result.pairs,
                        "dropped": result.dropped,
                        "plane_variance": result.plane_variance,
                        "plane_variance_of_words": result.plane_variance_of_words,
                        **(
                            {
                                "sampled_mean": float(result.sampled.mean()),
                                "sampled_median": float(np.median(result.sampled)),
                            }
                            if len(result.sampled)
                            else {}
                        ),
                    }
                    for name, result in results.items()
                },
            }
            for variant, results in model.relations.items()
        },
        "words": {
            vectors: {
                name: {
                    "consistency": asdict(measures.consistency),
                    "analogies": {method: asdict(value) for method, value in measures.accuracy.items()},
                    "questions": measures.questions,
                }
                for name, measures in by_relation.items()
            }
            for vectors, by_relation in model.words.items()
        },
        "skipped": model.skipped,
        "energy": model.energy,
        "logit_lens": [] if model.text is None else [asdict(layer) for layer in model.text.lens],
        "checkpoints": model.checkpoints,
        "centres": model.words_read,
        "reading": centres.as_json(model.reading),
    }
