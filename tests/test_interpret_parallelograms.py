"""Parallelograms and analogies: hand-worked values, brute force, planted structure and planted nulls."""

import itertools
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
from sklearn.decomposition import PCA

from hgpt.interpret.measures.analogies import EPSILON, analogy_answers, offset_consistency, resampled_accuracy
from hgpt.interpret.measures.differences import difference_over_relations
from hgpt.interpret.measures.parallelograms import (
    BAEK2025,
    VARIANTS,
    RelationScore,
    disjoint_pairs_of_pairs,
    mean_over_relations,
    mean_parallelogram_score,
    pairs_of_pairs,
    parallelogram_scores,
    random_pairings,
    relative_to_random_pairs,
    shuffled_scores,
)
from hgpt.interpret.statistics import Estimate, bootstrap_counts, percentile_interval, sign_flip_test
from hgpt.interpret.vectors import Matrix, ScoreSettings, project


def projected(vectors, ids, settings):
    return project(Matrix(vectors), ids, settings)


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
def test_perfect_parallelograms_score_zero_in_every_variant(name):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 120))
    ids = random_ids(30, 400)
    vectors[ids[:, 1]] = vectors[ids[:, 0]] + rng.normal(size=120)
    result = projected(vectors, ids, VARIANTS[name])
    offsets = result.offsets
    assert mean_parallelogram_score(offsets, result.scale) == pytest.approx(0, abs=1e-12)
    shuffled = shuffled_scores(result.inputs, result.outputs, result.scale, random_pairings(30, 199, seed=0))
    assert shuffled.min() > 0.05  # the same words paired at random are no parallelograms
    assert offset_consistency(offsets) == pytest.approx(1)


@pytest.mark.parametrize("name", [BAEK2025, "10 components", "full space", "scale of the relation"])
def test_a_random_embedding_scores_about_four(name):
    means = []
    for seed in range(40):
        vectors = np.random.default_rng(seed).normal(size=(500, 30)) * np.linspace(0.5, 2, 30) + 5
        result = projected(vectors, random_ids(40, 500, seed), VARIANTS[name])
        means.append(mean_parallelogram_score(result.offsets, result.scale))
    assert np.mean(means) == pytest.approx(4, abs=0.25)


def test_a_random_embedding_is_not_found_and_a_planted_relation_is():
    p_null, p_planted = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(300, 20))
        ids = random_ids(40, 300, seed)
        for planted, p_values in ((False, p_null), (True, p_planted)):
            if planted:
                vectors[ids[:, 1]] = vectors[ids[:, 0]] + rng.normal(size=20) + rng.normal(size=(40, 20))
            result = projected(vectors, ids, ScoreSettings(components=None))
            score = mean_parallelogram_score(result.offsets, result.scale)
            shuffled = shuffled_scores(result.inputs, result.outputs, result.scale, random_pairings(40, 99, seed))
            p_values.append((1 + np.sum(shuffled <= score)) / 100)
    assert np.mean(np.array(p_null) <= 0.05) < 0.15
    assert np.mean(np.array(p_planted) <= 0.05) > 0.95


def test_two_models_that_differ_are_told_apart_and_two_equal_ones_are_not():
    """Whole comparison: models in spaces of their own, disjoint pairs of pairs, the sign-flip test."""

    def scores(seed, noise, ids):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(300, 20))
        vectors[ids[:, 1]] = vectors[ids[:, 0]] + rng.normal(size=20) + noise * rng.normal(size=(len(ids), 20))
        result = projected(vectors, ids, ScoreSettings(components=None, normalisation="relation"))
        chosen = disjoint_pairs_of_pairs(len(ids), 0)
        return parallelogram_scores(result.offsets, result.scale, chosen)

    ids = random_ids(50, 300)

    def p_value(s, noise):
        return sign_flip_test(scores(2 * s, 1.0, ids) - scores(2 * s + 1, noise, ids), permutations=999, seed=s)

    same, other = [p_value(s, 1.0) for s in range(80)], [p_value(s, 1.5) for s in range(20)]
    assert np.mean(np.array(same) <= 0.05) < 0.13
    assert np.mean(np.array(other) <= 0.05) > 0.9


def test_intervals_cover_the_expectation():
    """95 % intervals over pairs hold the score of the population that the offsets come from: 2 k σ² / scale."""
    covered = 0
    for seed in range(150):
        offsets = np.random.default_rng(seed).normal(size=(40, 3))
        replicates = mean_parallelogram_score(offsets, 1.0, bootstrap_counts(40, 300, seed))
        low, high = percentile_interval(replicates)
        covered += low <= 6.0 <= high
    assert covered / 150 > 0.86


def test_planes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 12)) * np.linspace(3, 0.3, 12)).astype(np.float32)
    ids = random_ids(20, 200)
    pca = PCA(n_components=2, svd_solver="full").fit(vectors)
    expected = pca.transform(vectors)
    result = projected(vectors, ids, VARIANTS[BAEK2025])
    assert np.abs(result.inputs) == pytest.approx(np.abs(expected[ids[:, 0]]), abs=1e-4)  # up to the axes' signs
    assert result.scale == pytest.approx(np.square(expected).sum(axis=1).mean(), rel=1e-5)
    assert result.plane_variance == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)

    words = vectors[np.unique(ids)]
    pca = PCA(n_components=2, svd_solver="full").fit(words)
    result = projected(vectors, ids, ScoreSettings(plane="relation", normalisation="relation"))
    distance = np.linalg.norm(pca.transform(vectors[ids[:, 0]]) - pca.transform(vectors[ids[:, 1]]), axis=1)
    assert np.linalg.norm(result.offsets, axis=1) == pytest.approx(distance, rel=1e-4)
    assert result.scale == pytest.approx(np.square(pca.transform(words)).sum(axis=1).mean(), rel=1e-5)
    assert result.plane_variance_of_words == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)

    full, of_words = (np.square(x - x.mean(axis=0)).sum(axis=1).mean() for x in (vectors, words))
    for settings, scale in (
        (ScoreSettings(normalisation="full_space"), full),
        (ScoreSettings(components=None), full),
        (ScoreSettings(components=None, normalisation="relation"), of_words),
    ):
        assert projected(vectors, ids, settings).scale == pytest.approx(scale, rel=1e-5)


def test_baek2025_is_the_score_of_the_paper():
    assert VARIANTS[BAEK2025] == ScoreSettings(
        components=2, plane="vocabulary", normalisation="vocabulary", words="last", vectors="input", distinct=False
    )
    for name, settings in VARIANTS.items():
        assert (settings == VARIANTS[BAEK2025]) == (name == BAEK2025), name


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
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(5199, 2)), rng.normal(size=(5199, 2))
    pairings = random_pairings(5199, 20, seed=0)
    tracemalloc.start()
    found = shuffled_scores(inputs, outputs, 1.0, pairings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert found[3] == pytest.approx(mean_parallelogram_score(outputs[pairings[:, 3]] - inputs, 1.0))


def test_pairs_of_pairs():
    chosen = pairs_of_pairs(5, 4000, seed=0)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    counts = np.bincount(chosen[:, 0] * 5 + chosen[:, 1], minlength=25).reshape(5, 5)
    off_diagonal = counts[~np.eye(5, dtype=bool)]
    assert off_diagonal.min() > 140 and off_diagonal.max() < 260  # 200 each
    disjoint = disjoint_pairs_of_pairs(7, seed=0)
    assert disjoint.shape == (3, 2) and len(np.unique(disjoint)) == 6


def test_offset_consistency_is_brute_force():
    offsets = np.random.default_rng(3).normal(0.5, 1, (8, 5))
    unit = offsets / np.linalg.norm(offsets, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i, j in itertools.permutations(range(8), 2)]
    assert offset_consistency(offsets) == pytest.approx(np.mean(cosines))
    with_zero = np.concatenate([offsets, np.zeros((1, 5))])  # a word twice has no direction
    assert offset_consistency(with_zero) == pytest.approx(np.mean(cosines))
    noise = np.random.default_rng(4).normal(size=(2000, 50))
    assert abs(offset_consistency(noise)) < 0.005


def test_analogies_are_brute_force():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    questions = rng.integers(0, 40, (25, 3))
    found = analogy_answers(vectors, questions)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, (a, b, c) in enumerate(questions):
        cosines = {name: unit @ unit[token] for name, token in (("a", a), ("b", b), ("c", c))}
        positive = {name: (value + 1) / 2 for name, value in cosines.items()}
        add = cosines["b"] - cosines["a"] + cosines["c"]
        mul = positive["b"] * positive["c"] / (positive["a"] + EPSILON)
        for method, scores in (("3CosAdd", add), ("3CosMul", mul)):
            scores[[a, b, c]] = -np.inf
            assert found[method][number] == scores.argmax(), method


def test_resampled_accuracy_weighs_questions_by_their_pairs():
    correct, chosen = np.array([True, False, False]), np.array([[0, 1], [1, 2], [0, 2]])
    counts = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
    # Weights 1 1 1 → 1/3; 2 0 0 → 1; 0 0 2 → 0.
    assert resampled_accuracy(correct, chosen, counts).tolist() == pytest.approx([1 / 3, 1, 0])


def result(score: float, shuffled: float, spread: float = 0.0) -> RelationScore:
    values = {field.name: 0.1 for field in fields(RelationScore)}
    estimate = Estimate(value=score, low=score - spread, high=score + spread)
    replicates = score + spread * np.linspace(-1, 1, 401)
    return RelationScore(**values | {"score": estimate, "shuffled": shuffled, "replicates": replicates})


def test_means_over_relations_by_hand():
    results = {"x": result(1.0, 2.0, 0.2), "y": result(3.0, 3.0, 0.2)}
    mean = mean_over_relations(results)
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.0, 1.81, 2.19))
    relative = relative_to_random_pairs(results)  # (1/2 + 3/3) / 2
    assert relative.value == pytest.approx(0.75)
    assert relative.high - relative.low == pytest.approx(0.38 * (1 / 2 + 1 / 3) / 2)


def test_differences_are_paired_and_over_shared_relations():
    mine, theirs = {"x": result(1.0, 2, 0.5), "y": result(9, 2)}, {"x": result(1.5, 2, 0.5), "z": result(0, 2)}
    found = difference_over_relations(mine, theirs)
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert difference_over_relations({"a": result(1, 2)}, {"b": result(1, 2)}) is None
