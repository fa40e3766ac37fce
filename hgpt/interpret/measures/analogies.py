"""Relations between words without a plane: consistency of the offsets, and accuracy in analogy questions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from hgpt.interpret.measure import ModelResult, Quantity, tied
from hgpt.interpret.measures.parallelograms import pairs_of_pairs
from hgpt.interpret.relations import TokenPairs
from hgpt.interpret.statistics import Estimate, estimate, mean_estimate
from hgpt.interpret.subject import Subject

EPSILON = 1e-3  # of 3CosMul, as in Levy & Goldberg
QUESTIONS = 500  # per relation; each question is a search of the vocabulary


@dataclass(frozen=True, kw_only=True)
class WordMeasures:
    """One relation in one matrix.

    `accuracy`: by method, empty without questions. `replicates`: of "consistency" and of each method.
    """

    consistency: Estimate
    accuracy: dict[str, Estimate]
    questions: int
    replicates: dict[str, np.ndarray]


def result_of(model: ModelResult, vectors: str) -> dict[str, WordMeasures]:
    """Relation → measures, of "input" or "centres"."""
    return model.found.get("analogies", {}).get(vectors, {})


def offset_consistency(offsets: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean cosine between the offsets of different pairs: (‖Σ w u‖² − Σ w²) / (W² − Σ w²) with u_i = o_i / ‖o_i‖.

    1 for parallel offsets, 0 for unrelated ones; offsets of length 0 are left out. `counts` as in
    `parallelograms.mean_parallelogram_score`.
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
    """Answers of both methods to "a is to b as c is to …", (Q,) token ids, among all tokens but a, b and c.

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
    """Replicates of an accuracy when pairs are resampled, (B,): the question of pairs (i, j) has weight w_i w_j.

    Args:
        correct: (Q,) bool; chosen: (Q, 2) indices of the pairs; counts: (B, pairs).
    """
    weights = counts[:, chosen[:, 0]] * counts[:, chosen[:, 1]]  # (B, Q)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ correct.astype(np.float64)) / weights.sum(axis=1)


def word_measures(rows: np.ndarray, pairs: TokenPairs, subject: Subject, name: str) -> WordMeasures:
    """The measures of the relation `name` with the tokens `pairs` in the matrix `rows`, (V, D)."""
    ids = pairs.ids
    offsets = rows[ids[:, 1]].astype(np.float64) - rows[ids[:, 0]]
    counts = subject.resamples(len(ids), name, "bootstrap")
    replicates = {"consistency": offset_consistency(offsets, counts)}
    consistency = estimate(float(offset_consistency(offsets)), replicates["consistency"])
    chosen = pairs_of_pairs(len(ids), QUESTIONS, subject.settings.seed_of(name, "analogies"))
    first, second = ids[chosen[:, 0]], ids[chosen[:, 1]]
    questions = np.column_stack([first, second[:, 0]])
    asked = (questions != second[:, 1:]).all(axis=1)  # a, b and c are never answers
    accuracy = {}
    answers = analogy_answers(rows, questions[asked]) if asked.any() else {}
    for method, given in answers.items():
        correct = given == second[asked, 1]
        replicates[method] = resampled_accuracy(correct, chosen[asked], counts)
        accuracy[method] = estimate(float(correct.mean()), replicates[method])
    return WordMeasures(consistency=consistency, accuracy=accuracy, questions=int(asked.sum()), replicates=replicates)


def compute(subject: Subject) -> dict[str, dict[str, WordMeasures]]:
    found: dict[str, dict[str, WordMeasures]] = {}
    for vectors, matrix in subject.matrices.items():
        if vectors == "centres" and subject.model.tied:
            found[vectors] = found["input"]
            continue
        bar = tqdm(subject.scored.items(), desc=f"{subject.label}: analogies, {vectors}", disable=None, leave=False)
        found[vectors] = {name: word_measures(matrix.rows, pairs, subject, name) for name, pairs in bar}
    return found


def _mean(vectors: str, what: str) -> Callable[[ModelResult], Estimate | None]:
    """The mean over relations of "consistency" or of a method's accuracy."""

    def value(model: ModelResult) -> Estimate | None:
        found = [measures for measures in result_of(model, vectors).values() if what in measures.replicates]
        values = [m.consistency.value if what == "consistency" else m.accuracy[what].value for m in found]
        return mean_estimate(values, [m.replicates[what] for m in found]) if found else None

    return value


def rows(model: ModelResult) -> dict[str, Any]:
    words: dict[str, dict[str, Any]] = {vectors: {} for vectors in model.found.get("analogies", {})}
    for vectors, relations in words.items():
        for name, w in result_of(model, vectors).items():
            relations[name] = {"consistency": w.consistency, "analogies": w.accuracy, "questions": w.questions}
    return {"words": words}


QUANTITIES = (
    Quantity("offset consistency, input embedding", _mean("input", "consistency"), "higher"),
    Quantity("offset consistency, centres", _mean("centres", "consistency"), "higher", "consistency_centres",
             repeats=tied),
    Quantity("analogy accuracy 3CosAdd, input embedding", _mean("input", "3CosAdd"), "higher", "analogies_input"),
    Quantity("analogy accuracy 3CosMul, input embedding", _mean("input", "3CosMul"), "higher"),
    Quantity("analogy accuracy 3CosAdd, centres", _mean("centres", "3CosAdd"), "higher", "analogies_centres",
             repeats=tied),
)  # fmt: skip
