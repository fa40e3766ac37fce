"""Geometry and CKA against scikit-learn, NumPy's SVD, and vectors whose geometry is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from hgpt.interpret.measures.geometry import (
    effective_rank,
    explained_variance,
    frequency_correlation,
    isotropy,
    mean_cosine,
    norm_summary,
    participation_ratio,
)
from hgpt.interpret.measures.similarity import centred_gram, debiased_cka
from hgpt.interpret.vectors import covariance, principal_axes


def cloud(n=300, d=10, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.linspace(3, 0.2, d) + 4).astype(np.float32)


def test_principal_components_are_scikit_learns():
    x = cloud()
    pca = PCA(svd_solver="full").fit(x.astype(np.float64))
    found = principal_axes(covariance(x).matrix)
    assert found.variances * 300 / 299 == pytest.approx(pca.explained_variance_, rel=1e-5)
    assert np.abs(found.axes.T) == pytest.approx(np.abs(pca.components_), abs=1e-4)
    assert explained_variance(found.variances) == pytest.approx(np.cumsum(pca.explained_variance_ratio_), rel=1e-5)
    p = pca.singular_values_ / pca.singular_values_.sum()
    assert effective_rank(found.variances) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
    first = principal_axes(covariance(x).matrix, 2)
    assert first.axes.shape == (10, 2)
    assert (first.axes[np.abs(first.axes).argmax(axis=0), [0, 1]] > 0).all()


def test_covariance_is_numpys_beyond_one_chunk():
    x = cloud(n=20_000, d=4)
    assert covariance(x).matrix == pytest.approx(np.cov(x.T.astype(np.float64), bias=True), rel=1e-9)
    assert covariance(x).mean == pytest.approx(x.mean(axis=0, dtype=np.float64))


def test_ranks_and_norms_by_hand():
    # Eigenvalues 9 and 1: singular values 3 and 1, p = (3/4, 1/4); 10² / 82.
    uneven = np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    for eigenvalues, rank, ratio in (([1.0] * 4, 4, 4), ([5.0, 0.0], 1, 1), ([9.0, 1.0], uneven, 100 / 82)):
        assert effective_rank(np.array(eigenvalues)) == pytest.approx(rank)
        assert participation_ratio(np.array(eigenvalues)) == pytest.approx(ratio)
    found = norm_summary(np.array([[3.0, 4.0], [0.0, 1.0]]))
    assert (found["mean"], found["sd"], found["max"]) == pytest.approx((3, 2, 5))


def test_mean_cosine_is_brute_force():
    x = cloud(n=20)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(20, dtype=bool)]
    assert mean_cosine(x) == pytest.approx(cosines.mean(), rel=1e-5)
    assert mean_cosine(np.concatenate([x, np.zeros((1, 10), np.float32)])) == pytest.approx(cosines.mean(), rel=1e-5)
    assert mean_cosine(np.ones((5, 3))) == pytest.approx(1)
    assert np.isnan(mean_cosine(np.ones((1, 3))))


def test_isotropy():
    rng = np.random.default_rng(0)
    round_cloud = rng.normal(size=(20_000, 5))
    assert isotropy(round_cloud) > 0.95
    assert isotropy(17.0 * round_cloud) == pytest.approx(isotropy(round_cloud))  # no unit of length
    assert isotropy(round_cloud + 5) < 0.2
    # Two points ±1 on a line, s = 1: Z = e + 1/e both ways.
    assert isotropy(np.array([[1.0], [-1.0]])) == pytest.approx(1)
    # The points 1 and 1: Z(1) = 2e, Z(−1) = 2/e.
    assert isotropy(np.array([[1.0], [1.0]])) == pytest.approx(np.exp(-2))


def test_cka_is_invariant_to_rotation_and_scale_and_zero_on_average_for_independent_representations():
    rng = np.random.default_rng(3)
    x, rotation = cloud(200, 8), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert debiased_cka(centred_gram(x), centred_gram(3 * x @ rotation + 1)) == pytest.approx(1)
    pairs = (rng.normal(size=(2, 30, 100)) for _ in range(30))  # D > N: plain CKA is above 0.6 here
    assert abs(np.mean([debiased_cka(*map(centred_gram, pair)) for pair in pairs])) < 0.03


def test_unbiased_hsic_by_its_formula():
    """Song et al. 2012, eq. 5, term by term, is ⟨K̃, L̃⟩ / (N (N − 3))."""
    x, y = cloud(12, 4, 1).astype(float), cloud(12, 3, 2).astype(float)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n, one = 12, np.ones(12)
    expected = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    expected = (expected - 2 * (one @ k @ m @ one) / (n - 2)) / (n * (n - 3))
    assert np.sum(centred_gram(x) * centred_gram(y)) / (n * (n - 3)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 4 vectors; got 3"):
        centred_gram(x[:3])


def test_the_correlation_with_frequency_is_of_tokens_that_occur_and_of_distances_from_the_mean() -> None:
    far_out = np.array([3.0, -3.0, 1.0, -1.0, 0.5, -0.5, 9.0, -9.0])
    counts = np.array([1, 2, 3, 4, 5, 6, 0, 0])
    centres = np.stack([far_out * (1 + 1e-3 * np.arange(8)), np.zeros(8)], axis=1)
    expected = spearmanr(np.abs(centres[:6, 0] - centres[:, 0].mean()), counts[:6]).statistic
    assert expected < -0.9
    assert frequency_correlation(centres + np.array([100.0, 7.0]), counts) == pytest.approx(expected)
