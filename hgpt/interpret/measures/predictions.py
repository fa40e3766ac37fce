"""Predictions on text: loss, accuracy, entropy, and the distance of the target's centre."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hgpt.interpret.drawing import draw_intervals, finish, new_figure
from hgpt.interpret.measure import Analysis, Block, Curve, ModelResult, Quantity, paragraph, tokens_text
from hgpt.interpret.measures.calibration import expected_calibration_error
from hgpt.interpret.measures.geometry import norm_summary
from hgpt.interpret.statistics import Estimate, bootstrap_ratio, estimate
from hgpt.interpret.subject import Read, Subject

TITLE = "Predictions"
# First and last rank of a band; rank 1 is the most frequent token of the training set.
BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))


def result_of(model: ModelResult) -> dict[str, Any]:
    """ "quality": name → mean over positions; "bands": the same by frequency of the target. Empty without text."""
    return model.found.get("predictions") or {"quality": {}, "bands": []}


def bits_per_byte(losses: np.ndarray, text_bytes: np.ndarray) -> float:
    """Σ loss / (ln 2 · Σ bytes): losses of targets in nats, and the UTF-8 bytes of the same targets.

    Comparable between tokenizers, unlike nats per token.
    """
    return float(losses.sum() / (np.log(2) * text_bytes.sum()))


def frequency_ranks(counts: np.ndarray) -> np.ndarray:
    """The rank of each token by its count in the training set, (V,): 1 for the most frequent; ties by token id."""
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return ranks


def frequency_bands(counts: np.ndarray) -> np.ndarray:
    """The index in `BANDS` of each token, (V,)."""
    limits = [last for _, last in BANDS if last is not None]
    return np.searchsorted(np.array(limits), frequency_ranks(counts))


def band_name(band: int) -> str:
    first, last = BANDS[band]
    return f"rank {first:,}–{last:,}" if last is not None else f"rank above {first - 1:,}"


def compute(subject: Subject) -> dict[str, Any] | None:
    read = subject.read
    if read is None:
        return None
    positions = read.measures.positions
    means = ("loss", "top5", "entropy", "confidence", "log_margin", "target_ratio")
    quality = {name: read.mean(getattr(positions, name)) for name in means}
    quality |= {"accuracy": read.mean(positions.correct), "nearest_accuracy": read.mean(positions.nearest)}
    if read.passages.text_bytes is not None:
        losses = positions.window_sums(positions.loss.astype(np.float64))
        replicates = bootstrap_ratio(losses / np.log(2), read.passages.text_bytes, read.counts)
        quality["bits_per_byte"] = estimate(bits_per_byte(losses, read.passages.text_bytes), replicates)
    bands = []
    if subject.training_counts is not None:
        band_of = frequency_bands(subject.training_counts)[positions.target]
        bands = [_band(read, band, band_of == band) for band in range(len(BANDS)) if (band_of == band).any()]
    return {"quality": quality, "bands": bands}


def _band(read: Read, band: int, inside: np.ndarray) -> dict[str, Any]:
    positions = read.measures.positions
    names = ("loss", "correct", "top5", "entropy", "target_ratio")
    means = {name: read.mean(getattr(positions, name), inside) for name in names}
    ece = expected_calibration_error(positions.confidence[inside], positions.correct[inside])
    return {"band": band_name(band), "positions": int(inside.sum()), "ece": ece, **means}


def checkpoint(subject: Subject) -> dict[str, float]:
    if subject.read is None:
        return {}
    positions, states = subject.read.measures.positions, subject.read.measures.sample[-1]
    means = {name: float(getattr(positions, name).mean()) for name in ("target_ratio", "loss")}
    return {"hidden_norm": norm_summary(states)["mean"], **means}


def section(analysis: Analysis) -> list[Block]:
    models = analysis.having(lambda model: result_of(model)["bands"])
    if not models:
        return []
    figure, axes = new_figure(1, 3)
    names = [band["band"] for band in result_of(models[0][1])["bands"]]
    step = 0.6 / len(models)
    panels = (("loss", "loss (nats per token)"), ("correct", "accuracy"), ("entropy", "entropy (nats)"))
    for panel, (name, label) in zip(axes[0], panels, strict=True):
        for place, (index, model) in enumerate(models):
            bands = [band for band in result_of(model)["bands"] if band["band"] in names]
            places = np.array([names.index(band["band"]) for band in bands]) - 0.3 + step * (place + 0.5)
            draw_intervals(panel, [band[name] for band in bands], places, index, model.label, across=False)
        panel.set_xticks(range(len(names)), [name.replace("rank ", "") for name in names], rotation=30, ha="right")
        panel.set(xlabel="frequency rank of the target", ylabel=label)
    shown = [model for _, model in models]
    drawing = finish(
        figure,
        "frequency_bands",
        "By frequency of the target",
        caption="Targets grouped by their frequency rank in the training data, the most frequent on the left.",
        source=f"Measured on {tokens_text(shown)} validation tokens of: {analysis.data_source}. 95 % "
        f"intervals, {analysis.resampled} of windows.",
    )
    return [paragraph("The summary lists the means over all positions."), drawing]


def _mean(name: str) -> Callable[[ModelResult], Estimate | None]:
    return lambda model: result_of(model)["quality"].get(name)


def rows(model: ModelResult) -> dict[str, Any]:
    return result_of(model)


def _nearest_is_predicted(model: ModelResult) -> str:
    """For a harmonic head without radii, whose most probable token has the nearest centre."""
    found = result_of(model)["quality"]
    same = model.harmonic and found.get("nearest_accuracy") == found.get("accuracy")
    return "= accuracy" if same else ""


OVER_MEDIAN = "distance to the target over the median distance"
_ratio = _mean("target_ratio")
QUANTITIES = (
    Quantity("loss, nats per token, unsmoothed", _mean("loss"), "lower"),
    Quantity("bits per byte", _mean("bits_per_byte"), "lower"),
    Quantity("accuracy", _mean("accuracy"), "higher"),
    Quantity("top-5 accuracy", _mean("top5"), "higher"),
    Quantity("entropy of predictions, nats", _mean("entropy")),
    Quantity("accuracy of the nearest centre", _mean("nearest_accuracy"), "higher", repeats=_nearest_is_predicted),
    Quantity("margin log(d of the nearest other centre / d of the target)", _mean("log_margin"), "higher"),
    Quantity(OVER_MEDIAN, _ratio, "lower"),
    Quantity("", lambda model: _ratio(model) if model.harmonic else None, "lower", "target_ratio", OVER_MEDIAN),
)
CURVES = (
    Curve("hidden_norm", "mean norm of hidden states", logged="x_norm_mean", log_scale=True),
    Curve("target_ratio", OVER_MEDIAN, logged="target_over_median_distance"),
)
