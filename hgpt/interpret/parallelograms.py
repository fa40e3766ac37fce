"""Do relations between words lie in an embedding as parallelograms: a is to b as c is to d, E(a) − E(b) = E(c) − E(d)?

The score of arXiv:2502.01628 and what a sceptic asks besides: other planes and normalisations, the same words paired at
random, analogies, which need no plane, and intervals over pairs.

A relation is given by the vectors of its pairs, `inputs` and `outputs`, (pairs, k), rows in the same order. With the
offsets o_i = E(b_i) − E(a_i), the score of the parallelogram of pairs i and j is

    s_ij = ‖E(a_i) + E(b_j) − E(b_i) − E(a_j)‖² / scale = ‖o_i − o_j‖² / scale

0 for a perfect parallelogram; 4 on average when the four vectors are drawn independently and `scale` is the mean of
‖E‖² around their mean.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from hgpt.interpret.geometry import Covariance, PrincipalAxes, covariance, principal_axes
from hgpt.interpret.relations import WordForm

EXPECTED_AT_RANDOM = 4.0
EPSILON = 1e-3  # of 3CosMul, as in Levy & Goldberg
INPUTS_AT_A_TIME = 64  # of random pairings: with 5,000 pairs a block of products takes 2.6 MB, and stays in the cache


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How a relation is scored.

    Args:
        components: principal components that vectors are projected on; None: no projection.
        plane: whose principal components: of all rows of the vocabulary, or of the relation's words.
        normalisation: the scale: mean ‖E‖² of the vocabulary inside the plane ("vocabulary"), of the relation's words
            inside the plane ("relation"), or of the vocabulary in the full space, whatever the plane ("full_space").
        words: which token stands for a word.
        vectors: rows of the input embedding, or the centres (rows of the unembedding).
        distinct: leave out pairs whose two words have the same token and pairs of tokens that occurred before. Where
            a word is its last token there may be many of them, and their parallelograms are perfect for no reason.
    """

    components: int | None = 2
    plane: Literal["vocabulary", "relation"] = "vocabulary"
    normalisation: Literal["vocabulary", "relation", "full_space"] = "vocabulary"
    words: WordForm = "last"
    vectors: Literal["input", "centres"] = "input"
    distinct: bool = False


PRESET = "baek2025"
# The preset, changed in one thing at a time, and then in what is left of it when nothing depends on a plane.
VARIANTS: dict[str, ScoreSettings] = {
    PRESET: ScoreSettings(),
    "centres": ScoreSettings(vectors="centres"),
    "5 components": ScoreSettings(components=5),
    "10 components": ScoreSettings(components=10),
    "100 components": ScoreSettings(components=100),
    "full space": ScoreSettings(components=None),
    "plane of the relation": ScoreSettings(plane="relation"),
    "scale of the relation": ScoreSettings(normalisation="relation"),
    "plane and scale of the relation": ScoreSettings(plane="relation", normalisation="relation"),
    "plane-free scale": ScoreSettings(normalisation="full_space"),
    "words of one token": ScoreSettings(words="single"),
    "words of one token after a space": ScoreSettings(words="single_after_space"),
    "distinct pairs of tokens": ScoreSettings(distinct=True),
    "full space, scale of the relation, distinct": ScoreSettings(
        components=None, normalisation="relation", distinct=True
    ),
    "full space, scale of the relation, distinct, centres": ScoreSettings(
        components=None, normalisation="relation", distinct=True, vectors="centres"
    ),
}


class RelationVectors:
    """The vectors of a relation's pairs in the full space: what all planes and scales of one matrix start from.

    Attributes:
        pairs: (pairs, 2, D), float64, without the vocabulary's mean.
        words: mean and covariance of the relation's words, each token once.
    """

    def __init__(self, vectors: np.ndarray, ids: np.ndarray, mean: np.ndarray) -> None:
        """`vectors`: (V, D); `ids`: (pairs, 2); `mean`: of all of `vectors`, (D,)."""
        self.pairs = vectors[ids].astype(np.float64)
        self.pairs -= mean  # differences do not see it
        self.words = covariance(vectors[np.unique(ids)])

    @cached_property
    def axes(self) -> PrincipalAxes:
        """All principal axes of the relation's words."""
        return principal_axes(self.words.matrix)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The vectors of a relation as a score sees them.

    `inputs`, `outputs`: (pairs, k), float64; `scale` > 0; `plane_variance`: the plane's share of the vocabulary's
    variance, `plane_variance_of_words` of the relation's words'.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    scale: float
    plane_variance: float
    plane_variance_of_words: float


def project(
    relation: RelationVectors, vocabulary: Covariance, vocabulary_axes: PrincipalAxes, settings: ScoreSettings
) -> Projection:
    """Project a relation as `settings` say.

    Args:
        vocabulary, vocabulary_axes: covariance of all rows of the matrix that `relation` is of, and all of its
            principal axes.
    """
    axes = None
    if settings.components is not None:
        source = vocabulary_axes if settings.plane == "vocabulary" else relation.axes
        axes = source.axes[:, : settings.components]  # (D, k)

    def inside(matrix: np.ndarray) -> float:
        """Mean ‖E‖² inside the plane of vectors of this covariance: the trace of Aᵀ C A."""
        return float(np.trace(matrix) if axes is None else np.sum(axes * (matrix @ axes)))

    scale = {
        "vocabulary": inside(vocabulary.matrix),
        "relation": inside(relation.words.matrix),
        "full_space": float(np.trace(vocabulary.matrix)),
    }[settings.normalisation]
    pairs = relation.pairs if axes is None else relation.pairs @ axes
    return Projection(
        inputs=pairs[:, 0],
        outputs=pairs[:, 1],
        scale=scale,
        plane_variance=inside(vocabulary.matrix) / float(np.trace(vocabulary.matrix)),
        plane_variance_of_words=inside(relation.words.matrix) / float(np.trace(relation.words.matrix)),
    )


def distinct_pairs(ids: np.ndarray) -> np.ndarray:
    """Indices of the first of each pair of tokens, (pairs, 2), whose two tokens differ, in order."""
    first = np.sort(np.unique(ids, axis=0, return_index=True)[1])
    return first[ids[first, 0] != ids[first, 1]]


def pairs_of_pairs(pairs: int, count: int, seed: int) -> np.ndarray:
    """`count` random pairs (i, j) of different pairs, (count, 2), drawn with replacement."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, pairs, count)
    return np.stack([first, (first + rng.integers(1, pairs, count)) % pairs], axis=1)


def disjoint_pairs_of_pairs(pairs: int, seed: int) -> np.ndarray:
    """The pairs in random order, two by two, (⌊pairs / 2⌋, 2): no pair occurs twice, so the scores are independent."""
    order = np.random.default_rng(seed).permutation(pairs)
    return order[: pairs // 2 * 2].reshape(-1, 2)


def parallelogram_scores(offsets: np.ndarray, scale: float, chosen: np.ndarray) -> np.ndarray:
    """s_ij = ‖o_i − o_j‖² / scale of the pairs of pairs `chosen`, (Q, 2) → (Q,); offsets (pairs, k)."""
    return np.sum(np.square(offsets[chosen[:, 0]] - offsets[chosen[:, 1]]), axis=1) / scale


def mean_parallelogram_score(offsets: np.ndarray, scale: float, counts: np.ndarray | None = None) -> np.ndarray:
    """The mean of s_ij over all pairs of different pairs; with `counts`, (B, pairs), of each resample, (B,).

    With weights w_i, W = Σ w_i, it is exactly

        2 (W Σ w_i ‖o_i‖² − ‖Σ w_i o_i‖²) / ((W² − Σ w_i²) scale)

    in which a pair drawn twice is not compared with itself. Without `counts` all weights are 1, and the result has
    shape ().
    """
    w = np.ones((1, len(offsets))) if counts is None else counts
    centred = offsets - offsets.mean(axis=0)  # changes nothing but the rounding error
    total = w.sum(axis=1)
    squares = w @ np.square(centred).sum(axis=1)
    sums = np.square(w @ centred).sum(axis=1)
    compared = total**2 - np.einsum("bi,bi->b", w, w)  # without a second array of the size of w
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may consist of one pair only
        scores = 2 * (total * squares - sums) / (compared * scale)
    scores = np.where(compared > 0, np.maximum(scores, 0.0), np.nan)
    return scores[0] if counts is None else scores


def random_pairings(pairs: int, count: int, seed: int) -> np.ndarray:
    """Which output each input gets when outputs are dealt out at random, `count` times, (pairs, count) int32."""
    rng = np.random.default_rng(seed)
    pairings = np.empty((count, pairs), dtype=np.int32)
    for pairing in pairings:
        pairing[:] = rng.permutation(pairs)
    return np.ascontiguousarray(pairings.T)  # `shuffled_scores` reads an input's outputs one after the other


def shuffled_scores(inputs: np.ndarray, outputs: np.ndarray, scale: float, pairings: np.ndarray) -> np.ndarray:
    """Mean scores of the same words when each input gets the output of a random pair, (B,).

    What the words' places alone would give. With B random pairings, p = (1 + #{shuffled ≤ observed}) / (1 + B) tests
    that outputs belong to their inputs. The mean offset is the same for every pairing, so only Σ a_i · b_π(i) is
    needed; it is summed over blocks of inputs, so that no (pairs, pairs) matrix is in memory.

    Args:
        pairings: (pairs, B), from `random_pairings`.
    """
    pairs, count = pairings.shape
    a, b = inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0)
    products = np.zeros(count)  # Σ a_i · b_π(i)
    for start in range(0, pairs, INPUTS_AT_A_TIME):
        part = slice(start, start + INPUTS_AT_A_TIME)
        products += np.take_along_axis(a[part] @ b.T, pairings[part], axis=1).sum(axis=0)
    sums = np.square(a).sum() + np.square(b).sum() - 2 * products
    return 2 * np.maximum(sums, 0.0) / ((pairs - 1) * scale)  # the mean offset is 0 after centring


def offset_consistency(offsets: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean cosine between the offsets of different pairs: (‖Σ w u‖² − Σ w²) / (W² − Σ w²) with u_i = o_i / ‖o_i‖.

    1 where all offsets point one way, 0 where they are unrelated; offsets of length 0 are left out. `counts` as in
    `mean_parallelogram_score`.
    """
    norms = np.linalg.norm(offsets, axis=1)
    kept = norms > 0
    unit = offsets[kept] / norms[kept, None]
    w = np.ones((1, len(offsets))) if counts is None else counts
    w = w if kept.all() else w[:, kept]
    squares = np.einsum("bi,bi->b", w, w)
    compared = w.sum(axis=1) ** 2 - squares
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(compared > 0, (np.square(w @ unit).sum(axis=1) - squares) / compared, np.nan)
    return cosines[0] if counts is None else cosines


def analogy_answers(vectors: np.ndarray, questions: np.ndarray) -> dict[str, np.ndarray]:
    """The answers of both methods to "a is to b as c is to …", (Q,) token ids, from all tokens but a, b and c.

        3CosAdd: argmax_v  cos(v, b) − cos(v, a) + cos(v, c)
        3CosMul: argmax_v  c⁺(v, b) c⁺(v, c) / (c⁺(v, a) + ε)        c⁺ = (cos + 1) / 2, ε = 0.001

    Levy & Goldberg, *Linguistic Regularities in Sparse and Explicit Word Representations*, CoNLL 2014, eq. 3 and 5.

    Args:
        vectors: (V, D), float32.
        questions: a, b, c as rows, (Q, 3) token ids.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    answers = {method: np.empty(len(questions), dtype=np.int64) for method in ("3CosAdd", "3CosMul")}
    chunk = max(1, 10_000_000 // len(vectors))  # a few (chunk, V) arrays of 40 MB at a time
    for start in range(0, len(questions), chunk):
        part = questions[start : start + chunk]
        words, index = np.unique(part, return_inverse=True)
        cosines = unit[words] @ unit.T  # (words, V)
        a, b, c = (cosines[index.reshape(part.shape)[:, column]] for column in range(3))
        rows = np.arange(len(part))[:, None]
        for method in answers:
            scores = b - a + c if method == "3CosAdd" else (b + 1) * (c + 1) / (2 * (a + 1) + 4 * EPSILON)
            scores[rows, part] = -np.inf
            answers[method][start : start + len(part)] = scores.argmax(axis=1)
    return answers


def resampled_accuracy(correct: np.ndarray, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Replicates of an accuracy over pairs of pairs when the pairs are resampled, (B,): question (i, j) weighs w_i w_j.

    Args:
        correct: (Q,) bool; chosen: (Q, 2) indices of the pairs; counts: (B, pairs).
    """
    weights = counts[:, chosen[:, 0]] * counts[:, chosen[:, 1]]  # (B, Q)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ correct.astype(np.float64)) / weights.sum(axis=1)
