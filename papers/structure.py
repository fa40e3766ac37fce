"""Scores of the structure of an embedding of the synthetic tasks, as released by Baek et al., arXiv:2502.01628.

Each takes the task's rows (V, D). 0 is perfect, except for `permutation`, where 1 is. "plane": the first two principal
components.
"""

import itertools
from collections.abc import Callable

import numpy as np
from scipy.spatial.distance import cdist


def plane(embedding: np.ndarray) -> np.ndarray:
    """The first two principal components, (V, D) → (V, 2)."""
    centred = embedding - embedding.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def lattice(embedding: np.ndarray) -> float:
    """Mean of √((ab − cd)² + (ac − bd)²) / √((ab² + bc² + cd² + ad²) / 2) over parallelograms with d = b + c − a."""
    points = np.array(list(itertools.product(range(5), repeat=2)))
    a, b, c = np.array(list(itertools.permutations(range(25), 3))).T
    corner = points[b] + points[c] - points[a]
    inside = ((corner >= 0) & (corner < 5)).all(1)
    a, b, c, d = a[inside], b[inside], c[inside], (corner @ [5, 1])[inside]
    length = cdist(embedding, embedding)
    ab, cd, ac, bd, bc, ad = (length[i, j] for i, j in ((a, b), (c, d), (a, c), (b, d), (b, c), (a, d)))
    return float(np.mean(np.hypot(ab - cd, ac - bd) / np.sqrt((ab**2 + bc**2 + cd**2 + ad**2) / 2)))


def circle(embedding: np.ndarray) -> float:
    """Standard deviation by mean of the distances to the centroid, in the plane scaled to [0, 1]²."""
    points = plane(embedding)
    points = (points - points.min(0)) / np.ptp(points, axis=0)
    radii = np.linalg.norm(points - points.mean(0), axis=1)
    return float(radii.std() / radii.mean())


def equivalence(embedding: np.ndarray) -> float:
    """Mean distance within the classes mod 5 of 0 … 39 by that between them, without those within that exceed it."""
    length, number = cdist(embedding[:40], embedding[:40]), np.arange(40)
    same = (number[:, None] - number) % 5 == 0
    between, within = length[~same].mean(), length[same & (number[:, None] != number)]
    kept = within[within <= between]
    return float(kept.mean() / between) if len(kept) else 1.0


def genealogy(embedding: np.ndarray) -> float:
    """1 − mean over generations of at least five nodes of the first component's share in their points of the plane."""
    points = plane(embedding)
    generation = np.floor(np.log2(np.arange(1, len(points) + 1)))
    groups = [points[generation == one] for one in np.unique(generation) if (generation == one).sum() >= 5]
    values = [np.linalg.svd(group - group.mean(0), compute_uv=False) ** 2 for group in groups]
    return float(1 - np.mean([value[0] / value.sum() for value in values]))


def permutation(embedding: np.ndarray) -> float:
    """1 / (1 + mean distance of the plane's points to the nearest one after rotation by 90, 180 and 270 degrees)."""
    points = plane(embedding)
    turn = np.array([[0, 1], [-1, 0]])
    nearest = [cdist(points @ np.linalg.matrix_power(turn, k), points).min(1).mean() for k in (1, 2, 3)]
    return float(1 / (1 + np.mean(nearest)))


SCORES: dict[str, Callable[[np.ndarray], float]] = {
    score.__name__: score for score in (lattice, circle, equivalence, genealogy, permutation)
}
