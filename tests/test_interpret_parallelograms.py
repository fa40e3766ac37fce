"""Parallelograms and analogies: hand-worked values, brute force, planted structure and random embeddings."""

import itertools
import tracemalloc

import numpy as np
import pytest
from sklearn.decomposition import PCA
from small_models import relation_score

from hgpt.interpret.measures.analogies import EPSILON, analogy_answers, offset_consistency, resampled_accuracy
from hgpt.interpret.measures.differences import difference_over_relations
from hgpt.interpret.measures.parallelograms import (
    BAEK2025,
    VARIANTS,
    disjoint_pairs_of_pairs,
    mean_over_relations,
    mean_parallelogram_score,
    pairs_of_pairs,
    parallelogram_scores,
    random_pairings,
    relative_to_random_pairs,
    shuffled_scores,
)
from hgpt.interpret.statistics import bootstrap_counts, percentile_interval
from hgpt.interpret.vectors import Matrix, ScoreSettings, project


def random_ids(pairs, vocabulary, seed=0):
    return np.random.default_rng(seed).permutation(vocabulary)[: 2 * pairs].reshape(pairs, 2)


def test_mean_over_all_pairs_of_pairs_is_brute_force():
    # E(a) = (0, 0), E(b) = (1, 0), E(c) = (0, 2), E(d) = (3, 3): a + d − b − c = (2, 1), squared length 5.
    two = np.array([[1.0, 0.0], [3.0, 3.0]]) - np.array([[0.0, 0.0], [0.0, 2.0]])
    assert parallelogram_scores(two, 2.0, np.array([[0, 1]])).tolist() == [2.5] == [mean_parallelogram_score(two, 2.0)]
    offsets = np.random.default_rng(0).normal(3, 1, (9, 4))
    every = np.array(list(itertools.permutations(range(9), 2)))
    assert mean_parallelogram_score(offsets, 1.7) == pytest.approx(parallelogram_scores(offsets, 1.7, every).mean())
    counts = bootstrap_counts(9, 20, seed=1)
    for replicate, row in zip(mean_parallelogram_score(offsets, 1.7, counts), counts, strict=True):
        weights = row[every[:, 0]] * row[every[:, 1]]
        assert replicate == pytest.approx(np.average(parallelogram_scores(offsets, 1.7, every), weights=weights))
    one_pair = np.array([[3.0, 0.0, 0.0]])  # such a resample has no score
    assert np.isnan(mean_parallelogram_score(np.eye(3), 1.0, one_pair)).all()
    assert np.isnan(offset_consistency(np.eye(3), one_pair)).all()


@pytest.mark.parametrize("name", [n for n, s in VARIANTS.items() if s.vectors == "input"])
def test_perfect_parallelograms_score_zero_and_a_random_embedding_about_four(name):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 120))
    ids = random_ids(30, 400)
    vectors[ids[:, 1]] = vectors[ids[:, 0]] + rng.normal(size=120)
    perfect = project(Matrix(vectors), ids, VARIANTS[name])
    assert mean_parallelogram_score(perfect.offsets, perfect.scale) == pytest.approx(0, abs=1e-12)
    shuffled = shuffled_scores(perfect.inputs, perfect.outputs, perfect.scale, random_pairings(30, 199, seed=0))
    assert shuffled.min() > 0.05  # the same words paired at random are no parallelograms
    assert offset_consistency(perfect.offsets) == pytest.approx(1)
    if name in (BAEK2025, "10 components", "full space", "scale of the relation"):
        means = []
        for seed in range(40):
            vectors = np.random.default_rng(seed).normal(size=(500, 30)) * np.linspace(0.5, 2, 30) + 5
            found = project(Matrix(vectors), random_ids(40, 500, seed), VARIANTS[name])
            means.append(mean_parallelogram_score(found.offsets, found.scale))
        assert np.mean(means) == pytest.approx(4, abs=0.25)


def test_intervals_cover_the_expectation():
    """95 % intervals over pairs hold the score of the population that the offsets come from: 2 k σ² / scale."""
    covered = 0
    for seed in range(150):
        offsets = np.random.default_rng(seed).normal(size=(40, 3))
        low, high = percentile_interval(mean_parallelogram_score(offsets, 1.0, bootstrap_counts(40, 300, seed)))
        covered += low <= 6.0 <= high
    assert covered / 150 > 0.86


def test_planes_and_scales_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 12)) * np.linspace(3, 0.3, 12)).astype(np.float32)
    ids = random_ids(20, 200)
    words = vectors[np.unique(ids)]
    for settings, fitted, share in (
        (VARIANTS[BAEK2025], vectors, "plane_variance"),
        (ScoreSettings(plane="relation", normalisation="relation"), words, "plane_variance_of_words"),
    ):
        pca = PCA(n_components=2, svd_solver="full").fit(fitted)
        found = project(Matrix(vectors), ids, settings)
        offsets = pca.transform(vectors[ids[:, 1]]) - pca.transform(vectors[ids[:, 0]])
        assert np.abs(found.offsets) == pytest.approx(np.abs(offsets), abs=1e-4)  # up to the signs of the axes
        assert found.scale == pytest.approx(np.square(pca.transform(fitted)).sum(axis=1).mean(), rel=1e-5)
        assert getattr(found, share) == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)
    full, of_words = (np.square(x - x.mean(axis=0)).sum(axis=1).mean() for x in (vectors, words))
    for settings, scale in (
        (ScoreSettings(normalisation="full_space"), full),
        (ScoreSettings(components=None), full),
        (ScoreSettings(components=None, normalisation="relation"), of_words),
    ):
        assert project(Matrix(vectors), ids, settings).scale == pytest.approx(scale, rel=1e-5)


def test_baek2025_is_the_score_of_the_paper():
    paper = ScoreSettings(components=2, plane="vocabulary", normalisation="vocabulary", words="last", vectors="input",
                          distinct=False)  # fmt: skip
    assert [name for name, settings in VARIANTS.items() if settings == paper] == [BAEK2025]


@pytest.mark.parametrize("block", [2, 7, 256])
def test_shuffled_scores_are_scores_of_shuffled_pairs(block, monkeypatch):
    monkeypatch.setattr("hgpt.interpret.measures.parallelograms.INPUTS_AT_A_TIME", block)
    rng = np.random.default_rng(2)
    inputs, outputs = rng.normal(size=(7, 3)) + 1, rng.normal(size=(7, 3)) - 2
    pairings = random_pairings(7, 5, seed=9)
    expected = [mean_parallelogram_score(outputs[pairing] - inputs, 1.3) for pairing in pairings.T]
    assert shuffled_scores(inputs, outputs, 1.3, pairings) == pytest.approx(np.array(expected))


def test_random_pairs_of_a_large_relation_need_little_memory():
    """5,199 pairs, the most in the function vectors' sets: a matrix of all pairs would take 216 MB."""
    inputs, outputs = np.random.default_rng(0).normal(size=(2, 5199, 2))
    pairings = random_pairings(5199, 20, seed=0)
    tracemalloc.start()
    shuffled_scores(inputs, outputs, 1.0, pairings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_pairs_of_pairs():
    chosen = pairs_of_pairs(5, 4000, seed=0)
    counts = np.bincount(chosen[:, 0] * 5 + chosen[:, 1], minlength=25).reshape(5, 5)
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert off_diagonal.sum() == 4000 and off_diagonal.min() > 140 and off_diagonal.max() < 260  # 200 each
    disjoint = disjoint_pairs_of_pairs(7, seed=0)
    assert disjoint.shape == (3, 2) and len(np.unique(disjoint)) == 6


def test_offset_consistency_is_brute_force():
    offsets = np.random.default_rng(3).normal(0.5, 1, (8, 5))
    unit = offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i, j in itertools.permutations(range(8), 2)]
    assert offset_consistency(offsets) == pytest.approx(np.mean(cosines))
    with_zero = np.concatenate([offsets, np.zeros((1, 5))])  # a word twice has no direction
    assert offset_consistency(with_zero) == pytest.approx(np.mean(cosines))


def test_analogies_are_brute_force():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    questions = rng.integers(0, 40, (25, 3))
    found = analogy_answers(vectors, questions)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, question in enumerate(questions):
        a, b, c = unit[question] @ unit.T
        mul = (b + 1) / 2 * (c + 1) / 2 / ((a + 1) / 2 + EPSILON)
        for method, scores in (("3CosAdd", b - a + c), ("3CosMul", mul)):
            scores[question] = -np.inf
            assert found[method][number] == scores.argmax(), method
    correct, chosen = np.array([True, False, False]), np.array([[0, 1], [1, 2], [0, 2]])
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    # A question weighs as much as its pairs: 1 1 1 → 1/3; 2 0 0 → 1; 0 0 2 → 0.
    assert resampled_accuracy(correct, chosen, counts).tolist() == pytest.approx([1 / 3, 1, 0])


def test_means_over_relations_by_hand():
    results = {"x": relation_score(1.0), "y": relation_score(3.0, shuffled=3.0)}
    mean = mean_over_relations(results)
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.0, 1.81, 2.19))
    relative = relative_to_random_pairs(results)  # (1/2 + 3/3) / 2
    assert (relative.value, relative.high - relative.low) == pytest.approx((0.75, 0.38 * (1 / 2 + 1 / 3) / 2))
    other = {"x": relation_score(1.5), "z": relation_score(0)}  # differences are paired, over shared relations
    found = difference_over_relations(results, other)
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert difference_over_relations({"y": results["y"]}, other) is None
