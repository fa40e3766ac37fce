"""Intervals and tests: values worked out by hand, SciPy, and rates under a true null hypothesis."""

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


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5; times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5; already rising.
    assert holm([0.03, 0.01, 0.5, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])
    # 0.04 · 2 = 0.08, then max(0.08, 0.05 · 1) = 0.08.
    assert holm([0.05, 0.04]).tolist() == pytest.approx([0.08, 0.08])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []
    assert holm([0.02, np.nan, 0.01]).tolist() == pytest.approx([0.02, np.nan, 0.02], nan_ok=True)


@pytest.mark.parametrize("size", [2, 3, 7, 13])
def test_sign_flips_of_few_differences_are_every_pattern(size):
    differences = np.random.default_rng(size).normal(0.4, 1, size)
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
    expected = np.mean(np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-12)
    assert sign_flip_test(differences) == pytest.approx(expected)


def test_sign_flips_by_hand():
    # Of the four sign patterns of (1, 2), the sums are ±3 and ±1: two are as large as 3.
    assert sign_flip_test(np.array([1.0, 2.0])) == 0.5
    assert sign_flip_test(np.zeros(5)) == 1.0
    assert sign_flip_test(np.full(40, 1.0)) == 1 / 10_000  # never 0
    many = np.random.default_rng(1).normal(0.15, 1, 100)
    assert sign_flip_test(many) == sign_flip_test(many) != sign_flip_test(many, seed=1)


@pytest.mark.parametrize("size", [2, 5, 13, 14, 40])
def test_smallest_p_of_sign_flips_is_that_of_differences_of_one_sign(size):
    # No two sums of subsets of powers of two are the same, and no pattern but the two extremes is as large.
    found = sign_flip_test(2.0 ** np.arange(size))
    assert smallest_sign_flip_p(size) == pytest.approx(found, rel=1e-9 if size < 14 else 0.7)
    assert smallest_sign_flip_p(40, permutations=99) == 0.01


def test_smallest_p_of_shuffles():
    # Of the 24 orders of 4 items only the rising one has the largest sum of products.
    sums = sorted(np.dot(np.arange(4), order) for order in itertools.permutations(range(4)))
    assert sums[-1] > sums[-2]
    assert smallest_shuffle_p(4, 999) == 1 / len(sums)
    assert smallest_shuffle_p(7, 999) == 0.001 > 1 / math.factorial(7)
    assert smallest_shuffle_p(500, 9) == 0.1


def test_bootstrap_counts_are_resamples():
    counts = bootstrap_counts(7, 5000, seed=3)
    assert (counts.sum(axis=1) == 7).all()
    # Multinomial: mean 1 and variance 1 − 1/7 of each count.
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.05)
    assert counts.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.06)


def test_bootstrap_interval_is_that_of_scipy():
    values = np.random.default_rng(4).exponential(size=60)
    counts = bootstrap_counts(60, 20_000, seed=0)
    low, high = percentile_interval(bootstrap_ratio(values, np.ones(60), counts))
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)
    # Replicates that are not defined are left out.
    assert percentile_interval(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0)
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()


def test_clusters_are_resampled_whole():
    # Two windows with 10 and 30 targets: a resample of twice the first has a mean of 1, of the second 2.
    counts = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    replicates = bootstrap_ratio(np.array([10.0, 60.0]), np.array([10.0, 30.0]), counts)
    assert replicates.tolist() == pytest.approx([1.0, 2.0, 70 / 40])
