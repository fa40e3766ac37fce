"""Quality and calibration of predictions, from one number per position. Arrays in, numbers out."""

from dataclasses import dataclass

import numpy as np

# Ranks of a token's frequency in the training set: the ten most frequent tokens, the next ninety, …
BANDS = ((1, 10), (11, 100), (101, 1_000), (1_001, 10_000), (10_001, None))
BINS = 15  # of the reliability curve, as in Guo et al.


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


def bits_per_byte(losses: np.ndarray, target_bytes: np.ndarray) -> float:
    """Σ loss / (ln 2 · Σ bytes): losses in nats, (N,), and the bytes of UTF-8 that each target stands for, (N,).

    Comparable between tokenizers, which nats per token are not.
    """
    return float(losses.sum() / (np.log(2) * target_bytes.sum()))


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
