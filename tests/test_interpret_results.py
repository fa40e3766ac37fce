"""hgpt/interpret/results.py: what is summed up over relations."""

import numpy as np
import pytest

from hgpt.interpret.results import (
    Estimate,
    RelationResult,
    difference_over_relations,
    mean_over_relations,
    relative_to_random_pairs,
)


def result(score: float, shuffled: float, spread: float = 0.0) -> RelationResult:
    replicates = score + spread * np.linspace(-1, 1, 401)
    return RelationResult(
        pairs=10,
        dropped=0,
        score=Estimate(value=score, low=score - spread, high=score + spread),
        shuffled=shuffled,
        p_shuffled=0.5,
        plane_variance=0.1,
        plane_variance_of_words=0.1,
        replicates=replicates,
        disjoint=np.empty(0),
        sampled=np.empty(0),
    )


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
