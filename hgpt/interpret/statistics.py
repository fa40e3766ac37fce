"""Uncertainty: bootstrap intervals, permutation tests, and the correction for many of them."""

import itertools
import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


def percentile_interval(replicates: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile bootstrap interval: the (1 − c)/2 and (1 + c)/2 quantiles of the replicates, (B,); nan are left
    out.

    Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), §13.3.
    """
    kept = replicates[np.isfinite(replicates)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_counts(items: int, replicates: int, seed: int) -> np.ndarray:
    """How often each of `items` is drawn in each of `replicates` samples with replacement, (B, items), float64.

    Statistics of a resample are then weighted sums with these counts. The same seed gives the same resamples, so that
    the replicates of two models are paired.
    """
    draws = np.random.default_rng(seed).integers(0, items, size=(replicates, items))
    flat = draws + items * np.arange(replicates)[:, None]
    return np.bincount(flat.ravel(), minlength=replicates * items).reshape(replicates, items).astype(np.float64)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Replicates of Σ numerators / Σ denominators when whole clusters are resampled, (B,).

    Args:
        numerators, denominators: sums of each cluster, (clusters,): a window's losses and its number of targets.
        counts: `bootstrap_counts(clusters, …)`.
    """
    return (counts @ numerators) / (counts @ denominators)


def wilson_interval(
    share: np.ndarray, count: np.ndarray, confidence: float = CONFIDENCE
) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share p of n independent trials, element by element; inside [0, 1], and of some width
    also for p = 0 and 1.

        (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

    Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return (middle - half) / scale, (middle + half) / scale


# Up to here all 2^m sign patterns are counted, beyond it a sample of them is.
LARGEST_EXACT = 12
SIGN_FLIPS = 9999  # of the sample


def sign_flip_test(differences: np.ndarray, *, permutations: int = SIGN_FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of the permutation test of paired samples: the mean of `differences` (m,) against 0.

        p = #{s : |mean(s ⊙ δ)| ≥ |mean(δ)|} / #{s}        s ∈ {−1, 1}^m

    Under the null hypothesis the two members of each pair may be exchanged, which flips the sign of its difference. All
    2^m patterns are counted up to m = 12; beyond it `permutations` random ones and the identity (Phipson & Smyth 2010,
    arXiv:1603.05766: p is never 0). The same test as `scipy.stats.permutation_test(permutation_type="samples")`.
    """
    m = len(differences)
    if m == 0:
        return float("nan")
    observed = abs(differences.sum())
    # Sums that are equal but for the order of their terms count as equal.
    slack = 1e-9 * np.abs(differences).sum()
    if m <= LARGEST_EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=m)))
        return float(np.mean(np.abs(signs @ differences) >= observed - slack))
    rng = np.random.default_rng(seed)
    as_large = 1
    for part in np.array_split(np.arange(permutations), max(1, permutations * m // 4_000_000)):
        signs = rng.integers(0, 2, size=(len(part), m), dtype=np.int8) * 2.0 - 1.0
        as_large += int(np.sum(np.abs(signs @ differences) >= observed - slack))
    return as_large / (permutations + 1)


def smallest_sign_flip_p(m: int, permutations: int = SIGN_FLIPS) -> float:
    """The least p-value that `sign_flip_test` gives for m differences, whatever they are (on average where patterns are
    sampled).

    Their own signs and the opposite ones always count, 2 / 2^m; of a sample p is never below 1 / (1 + permutations).
    """
    exact = 2.0 ** (1 - m)
    return exact if m <= LARGEST_EXACT else max(exact, 1 / (permutations + 1))


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
