"""Quality and calibration of predictions, from one number per position. Arrays in, numbers out."""

from dataclasses import dataclass

import numpy as np

from hgpt.interpret.statistics import CONFIDENCE

# Ranks of a token's frequency in the training set: the ten most frequent tokens, the next ninety, …
BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
BINS = 15  # of the reliability curve, as in Guo et al.
SURE = 3.0  # standard errors beyond which the sign of a bin's gap counts as known


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """The reliability curve: of each bin that is not empty its mean confidence, its accuracy and its positions."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def confidence_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin of each position, (N,), in 0 … bins − 1: bin m holds the confidences in (m / M, (m + 1) / M]."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability_curve(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Accuracy against confidence in `bins` bins of equal width.

    Args:
        confidence: probability of the predicted token, (N,), in [0, 1].
        correct: whether it was the target, (N,).
    """
    index = confidence_bins(confidence, bins)
    count = np.bincount(index, minlength=bins)
    kept = count > 0
    return Reliability(
        confidence=np.bincount(index, weights=confidence, minlength=bins)[kept] / count[kept],
        accuracy=np.bincount(index, weights=correct.astype(np.float64), minlength=bins)[kept] / count[kept],
        count=count[kept],
    )


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """ECE = Σ_m |B_m| / N · |accuracy(B_m) − confidence(B_m)|, over bins of equal width.

    Guo et al., *On Calibration of Modern Neural Networks*, arXiv:1706.04599, eq. 3. 0 for perfect calibration; on few
    positions noise alone makes it positive.
    """
    curve = reliability_curve(confidence, correct, bins)
    return float(np.sum(curve.count * np.abs(curve.accuracy - curve.confidence)) / curve.count.sum())


def calibration_error_interval(
    gaps: np.ndarray, sizes: np.ndarray, counts: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """An interval for the ECE that infinitely many positions would have, which is a norm, ‖g‖₁, of the bins' gaps g.

    The ECE of a sample, ‖ĝ‖₁, is too large on average (noise in a gap that is 0 adds to it), and that of a resample is
    so once more: quantiles of resamples miss a calibrated model. Resampled is the noise h = g* − ĝ of the gaps instead,
    and what it does to the norm is that of the norm's directional derivative,

        ‖ĝ‖₁ − ‖g‖₁ ≈ Σ_m [g_m ≠ 0] sign(g_m) h_m + [g_m = 0] |h_m|

    in which a gap counts as 0 while it is below SURE standard errors (Fang & Santos, *Inference on Directionally
    Differentiable Functions*, Review of Economic Studies 86, 2019, arXiv:1404.3763). The lower end subtracts the
    upper quantile of that. The upper end subtracts the lower quantile of Σ_m sign(ĝ_m) h_m, which is smaller still:
    noise can only hide an error as far as it has the opposite sign. So the sample's own ECE lies inside.

    Args:
        gaps: Σ correct − confidence of each cluster of positions in each bin, (clusters, M).
        sizes: positions of each cluster, (clusters,).
        counts: `statistics.bootstrap_counts(clusters, …)`, (B, clusters).
    """
    found = gaps.sum(axis=0) / sizes.sum()  # (M,)
    noise = counts @ gaps / (counts @ sizes)[:, None] - found  # (B, M)
    signed = noise * np.sign(found)
    known = np.abs(found) > SURE * noise.std(axis=0)
    error = np.abs(found).sum()
    low = error - np.quantile(np.where(known, signed, np.abs(noise)).sum(axis=1), (1 + confidence) / 2)
    high = error - np.quantile(signed.sum(axis=1), (1 - confidence) / 2)
    return max(0.0, float(low)), min(1.0, float(high))


def bits_per_byte(losses: np.ndarray, text_bytes: np.ndarray) -> float:
    """Σ loss / (ln 2 · Σ bytes): losses of targets in nats, and the bytes of UTF-8 that these stand for, in any parts.

    Comparable between tokenizers, which nats per token are not.
    """
    return float(losses.sum() / (np.log(2) * text_bytes.sum()))


def frequency_ranks(counts: np.ndarray) -> np.ndarray:
    """The rank of each token by its count in the training set, (V,): 1 for the most frequent; ties by token id."""
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return ranks


def frequency_bands(counts: np.ndarray) -> np.ndarray:
    """The band of `BANDS` that each token belongs to by the rank of its count, (V,)."""
    limits = [last for _, last in BANDS if last is not None]
    return np.searchsorted(np.array(limits), frequency_ranks(counts))


def band_name(band: int) -> str:
    first, last = BANDS[band]
    return f"rank {first:,}–{last:,}" if last is not None else f"rank above {first - 1:,}"
