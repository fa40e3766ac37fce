"""Matrices whose rows are vectors: covariance, principal axes, and the words of a relation in a plane.

Vectors have any float dtype; sums are in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import scipy.linalg

from hgpt.interpret.relations import WordForm

CHUNK = 8192  # rows that are converted to float64 at a time


class Covariance(NamedTuple):
    """Mean μ, (D,), and covariance C = (1/N) Σ (x − μ)(x − μ)ᵀ, (D, D), of N vectors, float64."""

    mean: np.ndarray
    matrix: np.ndarray


class PrincipalAxes(NamedTuple):
    """Eigenvectors of a covariance as columns, (D, k), and their eigenvalues, (k,), in falling order."""

    axes: np.ndarray
    variances: np.ndarray


def chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Float64 copies of CHUNK rows of x at a time."""
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK].astype(np.float64)


def covariance(x: np.ndarray) -> Covariance:
    """Mean and covariance of the rows of x, (N, D), without a float64 copy of all of x."""
    mean = x.mean(axis=0, dtype=np.float64)
    matrix = np.zeros((x.shape[1], x.shape[1]))
    for part in chunks(x):
        part -= mean
        matrix += part.T @ part
    return Covariance(mean, matrix / len(x))


def principal_axes(matrix: np.ndarray, components: int | None = None) -> PrincipalAxes:
    """The first principal axes of a covariance, (D, D), or all of them. The largest entry of an axis is positive."""
    size = len(matrix)
    first = 0 if components is None else max(0, size - components)
    variances, axes = scipy.linalg.eigh(matrix, subset_by_index=(first, size - 1))  # rising
    variances, axes = variances[::-1], axes[:, ::-1]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    return PrincipalAxes(axes, np.maximum(variances, 0.0))


class Matrix:
    """A vector per token, (V, D) float32, with its covariance and all its principal axes."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    @cached_property
    def covariance(self) -> Covariance:
        return covariance(self.rows)

    @cached_property
    def principal(self) -> PrincipalAxes:
        return principal_axes(self.covariance.matrix)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """A variant of the parallelogram score: its words, vectors, plane and scale."""

    components: int | None = 2  # principal components that vectors are projected on; None: no projection
    plane: Literal["vocabulary", "relation"] = "vocabulary"  # whose components: of all rows, or of the relation's words
    # The scale is the mean ‖E‖² of the vocabulary or of the relation's words in the plane, or of the unprojected
    # vocabulary.
    normalisation: Literal["vocabulary", "relation", "full_space"] = "vocabulary"
    words: WordForm = "last"  # the token that represents a word
    vectors: Literal["input", "centres"] = "input"  # rows of the input embedding or of the unembedding
    # Drop pairs of two equal tokens and repeated pairs of tokens. Last tokens often coincide, and equal tokens always
    # form perfect parallelograms.
    distinct: bool = False


class Projection(NamedTuple):
    """The vectors of a relation's pairs under one `ScoreSettings`, minus the vocabulary's mean."""

    inputs: np.ndarray  # (pairs, k), float64
    outputs: np.ndarray  # (pairs, k), float64
    scale: float  # > 0
    plane_variance: float  # the plane's share of the vocabulary's variance
    plane_variance_of_words: float  # the plane's share of the variance of the relation's words

    @property
    def offsets(self) -> np.ndarray:
        """o_i = E(b_i) − E(a_i), (pairs, k)."""
        return self.outputs - self.inputs


def project(matrix: Matrix, ids: np.ndarray, settings: ScoreSettings) -> Projection:
    """The pairs of tokens `ids`, (pairs, 2), as vectors of `matrix` in the plane of `settings`, and the scale."""
    mean, vocabulary = matrix.covariance
    words = covariance(matrix.rows[np.unique(ids)]).matrix  # of the relation's words, each token once
    axes = None
    if settings.components is not None:
        of_words = settings.plane == "relation"
        principal = principal_axes(words, settings.components) if of_words else matrix.principal
        axes = principal.axes[:, : settings.components]  # (D, k)

    def inside(c: np.ndarray) -> float:
        """The mean ‖E‖² inside the plane of vectors with covariance C: the trace of Aᵀ C A."""
        return float(np.trace(c) if axes is None else np.sum(axes * (c @ axes)))

    scales = {"vocabulary": inside(vocabulary), "relation": inside(words), "full_space": float(np.trace(vocabulary))}
    pairs = matrix.rows[ids].astype(np.float64) - mean
    pairs = pairs if axes is None else pairs @ axes
    shares = (inside(c) / float(np.trace(c)) for c in (vocabulary, words))
    return Projection(pairs[:, 0], pairs[:, 1], scales[settings.normalisation], *shares)
