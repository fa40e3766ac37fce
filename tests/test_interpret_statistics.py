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


def test_holm_counts_only_tests_that_were_made():
    assert holm([0.02, float("nan"), 0.01])[[0, 2]].tolist() == pytest.approx([0.02, 0.02])
    assert np.isnan(holm([0.02, float("nan")])[1])


@pytest.mark.parametrize("size", [2, 3, 7, 13])
def test_sign_flips_of_few_differences_are_every_pattern(size):
    differences = np.random.default_rng(size).normal(0.4, 1, size)
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=size)))
    expected = np.mean(np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-12)
    assert sign_flip_test(differences) == pytest.approx(expected)


def test_sign_flips_of_many_differences_are_a_sample():
    """Against the normal distribution that the sum of 100 signed differences nearly has; reproducible by its seed."""
    differences = np.random.default_rng(1).normal(0.15, 1, 100)
    z = differences.sum() / np.sqrt(np.square(differences).sum())
    found = sign_flip_test(differences)
    assert found == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.015)
    assert sign_flip_test(differences) == found != sign_flip_test(differences, seed=1)


def test_sign_flips_by_hand():
    # Of the four sign patterns of (1, 2), the sums are ±3 and ±1: two are as large as 3.
    assert sign_flip_test(np.array([1.0, 2.0])) == 0.5
    assert sign_flip_test(np.zeros(5)) == 1.0
    assert sign_flip_test(np.full(40, 1.0)) == 1 / 10_000  # never 0


def test_sign_flips_reject_a_true_null_as_often_as_they_should():
    rng = np.random.default_rng(0)
    p = np.array([sign_flip_test(rng.normal(size=20), permutations=199, seed=i) for i in range(600)])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.027)  # three standard errors
    planted = np.array([sign_flip_test(rng.normal(1.0, size=20), permutations=199, seed=i) for i in range(50)])
    assert np.mean(planted <= 0.05) > 0.9


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
    assert counts.shape == (5000, 7)
    assert (counts.sum(axis=1) == 7).all()
    # Multinomial: mean 1 and variance 1 − 1/7 of each count.
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.05)
    assert counts.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.06)
    assert np.array_equal(counts, bootstrap_counts(7, 5000, seed=3))


def test_bootstrap_interval_is_that_of_scipy():
    values = np.random.default_rng(4).exponential(size=60)
    counts = bootstrap_counts(60, 20_000, seed=0)
    low, high = percentile_interval(bootstrap_ratio(values, np.ones(60), counts))
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_clusters_are_resampled_whole():
    # Two windows with 10 and 30 targets: a resample of twice the first has a mean of 1, of the second 2.
    counts = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    replicates = bootstrap_ratio(np.array([10.0, 60.0]), np.array([10.0, 30.0]), counts)
    assert replicates.tolist() == pytest.approx([1.0, 2.0, 70 / 40])


def test_interval_leaves_out_replicates_that_are_not_defined():
    assert percentile_interval(np.array([1.0, float("nan"), 1.0])) == (1.0, 1.0)
    assert np.isnan(percentile_interval(np.array([float("nan")]))).all()
