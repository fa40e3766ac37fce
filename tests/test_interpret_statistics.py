"""Intervals and tests: values worked out by hand, and SciPy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hgpt.interpret.statistics import (
    bootstrap_counts,
    bootstrap_ratio,
    holm,
    percentile_interval,
    sign_flip_test,
    smallest_shuffle_p,
    smallest_sign_flip_p,
)


@pytest.mark.parametrize(
    "p, adjusted",
    [
        # Sorted 0.01, 0.02, 0.03, 0.5; times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5; already rising.
        ([0.03, 0.01, 0.5, 0.02], [0.06, 0.04, 0.5, 0.06]),
        ([0.05, 0.04], [0.08, 0.08]),  # 0.04 · 2 = 0.08, then max(0.08, 0.05 · 1)
        ([0.9, 0.8], [1.0, 1.0]),
        ([], []),
        ([0.02, np.nan, 0.01], [0.02, np.nan, 0.02]),
    ],
)
def test_holm_by_hand(p, adjusted):
    assert holm(p).tolist() == pytest.approx(adjusted, nan_ok=True)


def test_sign_flips():
    for size in (2, 3, 7, 13):  # few differences: every pattern
        differences = np.random.default_rng(size).normal(0.4, 1, size)
        patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
        expected = np.mean(np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-12)
        assert sign_flip_test(differences) == pytest.approx(expected)
    # Of the four sign patterns of (1, 2), the sums are ±3 and ±1: two are as large as 3.
    assert sign_flip_test(np.array([1.0, 2.0])) == 0.5
    assert sign_flip_test(np.zeros(5)) == 1.0
    assert sign_flip_test(np.full(40, 1.0)) == 1 / 10_000  # never 0
    many = np.random.default_rng(1).normal(0.15, 1, 100)
    assert sign_flip_test(many) == sign_flip_test(many) != sign_flip_test(many, seed=1)


def test_smallest_p_values():
    for size in (2, 5, 13, 14, 40):  # no pattern of signs of powers of two is as large as the two extremes
        found = sign_flip_test(2.0 ** np.arange(size))
        assert smallest_sign_flip_p(size) == pytest.approx(found, rel=1e-9 if size < 14 else 0.7)
    assert smallest_sign_flip_p(40, permutations=99) == 0.01
    assert smallest_shuffle_p(4, 999) == 1 / 24
    assert smallest_shuffle_p(7, 999) == 0.001 > 1 / math.factorial(7)
    assert smallest_shuffle_p(500, 9) == 0.1


def test_bootstrap():
    counts = bootstrap_counts(7, 5000, seed=3)
    assert (counts.sum(axis=1) == 7).all()
    # Multinomial: mean 1 and variance 1 − 1/7 of each count.
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.05)
    assert counts.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.06)
    values = np.random.default_rng(4).exponential(size=60)
    found = percentile_interval(bootstrap_ratio(values, np.ones(60), bootstrap_counts(60, 20_000, seed=0)))
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.01)
    assert percentile_interval(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0)  # undefined replicates are left out
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()
    # Two windows with 10 and 30 targets: a resample of twice the first has a mean of 1, of the second 2.
    counts = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert bootstrap_ratio(np.array([10.0, 60.0]), np.array([10.0, 30.0]), counts).tolist() == [1.0, 2.0, 70 / 40]
