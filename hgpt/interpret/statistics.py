"""Uncertainty: bootstrap intervals, permutation tests, and Holm's correction for multiple tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 1 - CONFIDENCE
SIGN_FLIPS = 9999  # random sign patterns; a test with at most this many counts all


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
    """The mean of several values, for example over relations, with the interval of the mean of their replicates."""
    return estimate(float(np.mean(values)), np.mean(replicates, axis=0))


def percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the finite replicates, (B,); nan if there are none.

    Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), §13.3.
    """
    kept = replicates[np.isfinite(replicates)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@lru_cache(maxsize=4)  # the variants of a score use the same resamples in succession
def bootstrap_counts(items: int, replicates: int, seed: int) -> np.ndarray:
    """How often each item is drawn in each of `replicates` samples with replacement, (B, items), float64, read-only.

    The statistic of a resample is a sum weighted by these counts. The same seed gives the same resamples, so the
    replicates of two models are paired.
    """
    draws = np.random.default_rng(seed).integers(0, items, size=(replicates, items))
    flat = draws + items * np.arange(replicates)[:, None]
    counts = np.bincount(flat.ravel(), minlength=replicates * items).reshape(replicates, items).astype(np.float64)
    counts.setflags(write=False)
    return counts


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Replicates of Σ numerators / Σ denominators when whole clusters are resampled, (B,); nan for 0 / 0.

    Args:
        numerators, denominators: one sum per cluster, (clusters,), such as a window's losses and number of targets.
        counts: `bootstrap_counts(clusters, …)`.
    """
    with np.errstate(invalid="ignore"):
        return (counts @ numerators) / (counts @ denominators)


def sign_flip_test(differences: np.ndarray, *, permutations: int = SIGN_FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test that the mean of `differences` δ, (m ≥ 2,), is 0.

        p = #{s : |mean(s ⊙ δ)| ≥ |mean(δ)|} / #{s}        s ∈ {−1, 1}^m

    Under the null hypothesis the members of a pair are exchangeable, so the sign of its difference is arbitrary. If
    there are at most `permutations` patterns, all 2^m are counted. Otherwise `permutations` random patterns and the
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
    """The smallest p-value that `sign_flip_test` can give for m differences (on average if patterns are sampled).

    The observed signs and their opposites always count: 2 / 2^m. Sampling cannot give less than 1 / (1 + permutations).
    """
    exact = 2.0 ** (1 - m)
    return exact if 2**m <= permutations else max(exact, 1 / (permutations + 1))


def smallest_shuffle_p(pairs: int, permutations: int) -> float:
    """The smallest mean p-value of a test with `permutations` random orders of `pairs` items.

    At least 1 / (1 + permutations), and at least 1 / pairs!, the probability that an order is the observed one.
    """
    return max(1 / math.factorial(pairs), 1 / (permutations + 1))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment of m p-values, in the given order; nan stays nan.

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
