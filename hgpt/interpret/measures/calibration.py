"""Calibration: accuracy as a function of confidence, and the expected calibration error (ECE)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hgpt.interpret.drawing import GREY, finish, look, new_figure
from hgpt.interpret.measure import Analysis, Block, ModelResult, Quantity, tokens_text
from hgpt.interpret.positions import Positions
from hgpt.interpret.statistics import CONFIDENCE, Estimate
from hgpt.interpret.subject import Subject

TITLE = "Calibration"
BINS = 15  # of the reliability curve, as in Guo et al.
NONZERO = 3.0  # standard errors above which the gap of a bin counts as nonzero


@dataclass(frozen=True)
class Reliability:
    """Mean confidence, accuracy and number of positions of each bin that is not empty."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Calibration:
    ece: Estimate
    reliability: Reliability


def result_of(model: ModelResult) -> Calibration | None:
    return model.found.get("calibration")


def confidence_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each position, (N,), in 0 … bins − 1: bin m holds the confidences in (m / M, (m + 1) / M]."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability_curve(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Accuracy against confidence in bins of equal width.

    Args:
        confidence: probability of the predicted token, (N,), in [0, 1].
        correct: whether it was the target, (N,).
    """
    index = confidence_bins(confidence, bins)
    count = np.bincount(index, minlength=bins)
    kept = count > 0
    values = (confidence, correct.astype(np.float64))
    means = [np.bincount(index, weights=each, minlength=bins)[kept] / count[kept] for each in values]
    return Reliability(confidence=means[0], accuracy=means[1], count=count[kept])


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """ECE = Σ_m |B_m| / N · |accuracy(B_m) − confidence(B_m)|, over bins of equal width.

    Guo et al., *On Calibration of Modern Neural Networks*, arXiv:1706.04599, eq. 3. 0 for perfect calibration; noise
    makes it positive on few positions.
    """
    curve = reliability_curve(confidence, correct, bins)
    return float(np.sum(curve.count * np.abs(curve.accuracy - curve.confidence)) / curve.count.sum())


def calibration_error_interval(gaps: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """A 95 % interval for the ECE of infinitely many positions, ‖g‖₁, where g are the gaps of the bins.

    The sample's ECE ‖ĝ‖₁ is biased upwards, because noise in a gap of 0 adds to it; a resample's ECE is biased twice,
    so its quantiles miss a calibrated model. Instead, the noise h = g* − ĝ of the gaps is resampled, and its effect on
    the norm follows from the norm's directional derivative,

        ‖ĝ‖₁ − ‖g‖₁ ≈ Σ_m [g_m ≠ 0] sign(g_m) h_m + [g_m = 0] |h_m|

    in which a gap counts as 0 below NONZERO standard errors (Fang & Santos, *Inference on Directionally Differentiable
    Functions*, Review of Economic Studies 86, 2019, arXiv:1404.3763). The lower end is ‖ĝ‖₁ minus the upper quantile of
    this sum. The upper end is ‖ĝ‖₁ minus the lower quantile of Σ_m sign(ĝ_m) h_m, which is smaller, because noise hides
    an error only if it has the opposite sign. The sample's own ECE lies inside.

    Args:
        gaps: Σ correct − confidence of each cluster of positions in each bin, (clusters, M).
        sizes: positions of each cluster, (clusters,).
        counts: `statistics.bootstrap_counts(clusters, …)`, (B, clusters).
    """
    found = gaps.sum(axis=0) / sizes.sum()  # (M,)
    noise = counts @ gaps / (counts @ sizes)[:, None] - found  # (B, M)
    signed = noise * np.sign(found)
    nonzero = np.abs(found) > NONZERO * noise.std(axis=0)
    error = np.abs(found).sum()
    low = error - np.quantile(np.where(nonzero, signed, np.abs(noise)).sum(axis=1), (1 + CONFIDENCE) / 2)
    high = error - np.quantile(signed.sum(axis=1), (1 - CONFIDENCE) / 2)
    return max(0.0, float(low)), min(1.0, float(high))


def window_gaps(positions: Positions) -> tuple[np.ndarray, np.ndarray]:
    """Σ correct − confidence of each window in each bin, (windows, BINS), and the positions of each, (windows,)."""
    index = positions.window * BINS + confidence_bins(positions.confidence)
    gap = positions.correct.astype(np.float64) - positions.confidence
    sizes = np.bincount(positions.window)
    return np.bincount(index, weights=gap, minlength=len(sizes) * BINS).reshape(len(sizes), -1), sizes


def compute(subject: Subject) -> Calibration | None:
    if subject.read is None:
        return None
    positions = subject.read.measures.positions
    low, high = calibration_error_interval(*window_gaps(positions), subject.read.counts)
    error = expected_calibration_error(positions.confidence, positions.correct)
    curve = reliability_curve(positions.confidence, positions.correct)
    return Calibration(ece=Estimate(value=error, low=low, high=high), reliability=curve)


def rows(model: ModelResult) -> dict[str, Any]:
    found = result_of(model)
    return {"reliability": None} if found is None else {"quality": {"ece": found.ece}, "reliability": found.reliability}


def section(analysis: Analysis) -> list[Block]:
    models = analysis.having(result_of)
    if not models:
        return []
    figure, axes = new_figure(2, 1, height=4.6, sharex=True, height_ratios=(3, 1))
    curve_panel, count_panel = axes[:, 0]
    for index, model in models:
        found: Calibration = model.found["calibration"]
        curve, style = found.reliability, look(index)
        hits = np.rint(curve.accuracy * curve.count).astype(int)
        intervals = [
            stats.binomtest(hit, count).proportion_ci(CONFIDENCE, method="wilson")
            for hit, count in zip(hits.tolist(), curve.count.tolist(), strict=True)
        ]
        curve_panel.vlines(curve.confidence, *zip(*intervals, strict=True), color=style["color"], linewidth=1)
        label = f"{model.label}, ECE {found.ece.text}"
        curve_panel.plot(curve.confidence, curve.accuracy, **style, markersize=4, label=label)
        count_panel.plot(curve.confidence, curve.count, **style, markersize=3)
    curve_panel.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    curve_panel.set(ylabel="accuracy", ylim=(0, 1))
    count_panel.set(xlabel="confidence: probability of the predicted token", ylabel="positions", xlim=(0, 1))
    count_panel.set_yscale("log")
    shown = [model for _, model in models]
    return [
        finish(
            figure,
            "reliability",
            "Reliability",
            caption=f"Accuracy against confidence in {BINS} bins of equal width. A calibrated model lies on the "
            "diagonal. Bars: Wilson's 95 % intervals for independent positions. They are too short, because positions "
            "of one window are dependent; the interval of the ECE resamples whole windows.",
            source=f"Measured on {tokens_text(shown)} validation tokens of: {analysis.data_source}. ECE "
            f"with 95 % interval over windows, {analysis.resampled}.",
        )
    ]


def _ece(model: ModelResult) -> Estimate | None:
    return None if (found := result_of(model)) is None else found.ece


QUANTITIES = (Quantity("expected calibration error", _ece, "lower", "ece"),)
