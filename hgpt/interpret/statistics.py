"""Uncertainty: bootstrap intervals, permutation tests, and the correction for many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 1 - CONFIDENCE
SIGN_FLIPS = 9999  # patterns of signs; where there are no more, all of them are counted


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(value: float, replicates: np.ndarray) -> Estimate:
    """A value with the percentile interval of its bootstrap replicates."""
    low, high = percentile_interval(replicates)
    return Estimate(value=float(value), low=low, high=high)


def mean_estimate(values: Sequence[float], replicates: Sequence[np.ndarray]) -> Estimate:
    """The mean of several values, such as those of all relations, with the interval that their replicates give it."""
    return estimate(float(np.mean(values)), np.mean(replicates, axis=0))


def percentile_interval(replicates: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile bootstrap interval: the (1 − c)/2 and (1 + c)/2 quantiles of the replicates, (B,), without nan.

    Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), §13.3.
    """
    kept = replicates[np.isfinite(replicates)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)  # variants of a score ask for the same resamples one after the other
def bootstrap_counts(items: int, replicates: int, seed: int) -> np.ndarray:
    """How often each of `items` is drawn in each of `replicates` samples with replacement, (B, items), float64.

    Statistics of a resample are then weighted sums with these counts. The same seed gives the same resamples, so the
    replicates of two models are paired. The array is shared: it cannot be written to.
    """
    draws = np.random.default_rng(seed).integers(0, items, size=(replicates, items))
    flat = draws + items * np.arange(replicates)[:, None]
    counts = np.bincount(flat.ravel(), minlength=replicates * items).reshape(replicates, items).astype(np.float64)
    counts.setflags(write=False)
    return counts


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Replicates of Σ numerators / Σ denominators when whole clusters are resampled, (B,); nan for 0 / 0.

    Args:
        numerators, denominators: sums of each cluster, (clusters,): a window's losses and its number of targets.
        counts: `bootstrap_counts(clusters, …)`.
    """
    with np.errstate(invalid="ignore"):
        return (counts @ numerators) / (counts @ denominators)


def sign_flip_test(differences: np.ndarray, *, permutations: int = SIGN_FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of the permutation test of paired samples: the mean of `differences` δ, (m ≥ 2,), against 0.

        p = #{s : |mean(s ⊙ δ)| ≥ |mean(δ)|} / #{s}        s ∈ {−1, 1}^m

    Under the null hypothesis the two members of each pair may be exchanged, which flips the sign of its difference. All
    2^m patterns are counted where there are at most `permutations`. Otherwise `permutations` random ones and the
    identity are counted, so p is never 0 (Phipson & Smyth 2010, arXiv:1603.05766).
    """
    test = stats.permutation_test(
        (differences,),
        lambda x, axis: np.abs(np.sum(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=permutations,
        vectorized=True,
        batch=max(1, 4_000_000 // len(differences)),  # at most 32 MB at a time
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def smallest_sign_flip_p(m: int, permutations: int = SIGN_FLIPS) -> float:
    """The least p-value that `sign_flip_test` can give for m differences (on average where patterns are sampled).

    Their own signs and the opposite ones always count, 2 / 2^m; a sample never gives less than 1 / (1 + permutations).
    """
    exact = 2.0 ** (1 - m)
    return exact if 2**m <= permutations else max(exact, 1 / (permutations + 1))


def smallest_shuffle_p(pairs: int, permutations: int) -> float:
    """The least p-value of a test that shuffles `pairs` items at random `permutations` times, on average.

    1 / (1 + permutations), and not below 1 / pairs!: one shuffle in so many gives the observed order again.
    """
    return max(1 / math.factorial(pairs), 1 / (permutations + 1))


def holm(p_values: list[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted for their number m by Holm's step-down method, in the order given; nan stays nan.

        p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j))

    Controls the probability of one or more false discoveries under any dependence (Holm, Scand. J. Statist. 6, 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted
