"""Geometry of the input embedding, the centres and the hidden states: ranks, isotropy, norms."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hgpt.interpret.drawing import finish, line_look, new_figure
from hgpt.interpret.measure import Analysis, Block, Cell, Curve, ModelResult, Quantity, paragraph, states_text
from hgpt.interpret.subject import Subject
from hgpt.interpret.vectors import Matrix, chunks

TITLE = "Geometry"
SETS = {"input": "input embedding", "centres": "centres", "hidden": "hidden states at the head"}


def result_of(model: ModelResult, vectors: str) -> dict[str, Any] | None:
    """The measures of one of `SETS`; None for hidden states without text."""
    return model.found.get("geometry", {}).get(vectors)


def explained_variance(eigenvalues: np.ndarray) -> np.ndarray:
    """Cumulative share of the variance, Σ_{i ≤ k} λ_i / Σ λ_i for k = 1 … D; eigenvalues in falling order, (D,)."""
    return np.cumsum(eigenvalues) / np.sum(eigenvalues)


def effective_rank(eigenvalues: np.ndarray) -> float:
    """exp(−Σ p_i log p_i) with p_i = σ_i / Σ σ_j and the singular values σ_i = √λ_i.

    Between 1 and D, which equal eigenvalues give. `eigenvalues` are those of the covariance, as if the vectors were
    centred. Roy & Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.
    """
    singular = np.sqrt(np.maximum(eigenvalues, 0.0))
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(eigenvalues: np.ndarray) -> float:
    """(Σ λ_i)² / Σ λ_i² of a covariance's eigenvalues: D if they are equal, 1 for vectors on a line.

    Gao et al., *A theory of multineuronal dimensionality, dynamics and measurement*, bioRxiv 214262 (2017).
    """
    return float(np.sum(eigenvalues) ** 2 / np.sum(np.square(eigenvalues)))


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine over all pairs of different rows, (|Σ u|² − N) / (N (N − 1)) with u = x/|x|, without zero rows.

    0 for uniform directions, near 1 for a narrow cone: the anisotropy of Ethayarajh, arXiv:1909.00512.
    """
    total, count = np.zeros(x.shape[1]), 0
    for part in chunks(x):
        norms = np.linalg.norm(part, axis=1)
        part = part[norms > 0] / norms[norms > 0, None]
        total += part.sum(axis=0)
        count += len(part)
    if count < 2:
        return float("nan")
    return float((total @ total - count) / (count * (count - 1)))


def isotropy(x: np.ndarray) -> float:
    """min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(c·x_i / s), over ±c of the eigenvectors c of XᵀX; s = √mean |x|².

    1 for isotropic vectors, 0 for degenerate ones. Mu & Viswanath, *All-but-the-top*, arXiv:1702.01417, eq. 5; dividing
    by the root mean square norm s makes the value independent of the scale of the vectors.
    """
    gram = np.zeros((x.shape[1], x.shape[1]))
    for part in chunks(x):
        gram += part.T @ part
    scale = np.sqrt(np.trace(gram) / len(x))
    directions = np.linalg.eigh(gram)[1]  # (D, D)
    partition = np.zeros((2, x.shape[1]))
    for part in chunks(x):
        projected = (part / scale) @ directions
        partition += np.stack([np.exp(projected).sum(axis=0), np.exp(-projected).sum(axis=0)])
    return float(partition.min() / partition.max())


def norm_summary(x: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, 5 % and 95 % quantiles and maximum of |x_i|."""
    norms = np.linalg.norm(x, axis=1).astype(np.float64)
    low, high = np.quantile(norms, [0.05, 0.95])
    found = {"mean": norms.mean(), "sd": norms.std(), "quantile_05": low, "quantile_95": high, "max": norms.max()}
    return {name: float(value) for name, value in found.items()}


def frequency_correlation(centres: np.ndarray, counts: np.ndarray) -> float:
    """Spearman's correlation of |w_i − w̄| with the count of token i, over the tokens that occur, (V, D), (V,) → ().

    −1: the rarer the token, the farther out its centre. w̄ is the mean of all centres: neither head changes its
    predictions if all centres (and, of a harmonic head, the hidden states) are shifted.
    """
    far_out = np.linalg.norm(centres - centres.mean(axis=0), axis=1)
    return float(spearmanr(far_out[counts > 0], counts[counts > 0]).statistic)


def geometry(vectors: Matrix) -> dict[str, Any]:
    variances = vectors.principal.variances
    return {
        "effective_rank": effective_rank(variances),
        "participation_ratio": participation_ratio(variances),
        "isotropy": isotropy(vectors.rows),
        "mean_cosine": mean_cosine(vectors.rows),
        "norms": norm_summary(vectors.rows),
        "explained_variance": explained_variance(variances).tolist(),
    }


def compute(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {"input": geometry(subject.input)}
    found["centres"] = found["input"] if subject.model.tied else geometry(subject.centres)
    if (counts := subject.training_counts) is not None:
        found["frequency_correlation"] = frequency_correlation(subject.centres.rows, counts)
    if subject.read is not None:
        found["hidden"] = geometry(Matrix(subject.read.measures.sample[-1]))
    return found


def checkpoint(subject: Subject) -> dict[str, float]:
    variances = subject.centres.principal.variances
    return {
        "centre_norm": norm_summary(subject.centres.rows)["mean"],
        "centre_effective_rank": effective_rank(variances),
        "centre_participation_ratio": participation_ratio(variances),
    }


def section(analysis: Analysis) -> list[Block]:
    sets = {name: title for name, title in SETS.items() if any(result_of(model, name) for model in analysis.models)}
    if all(model.tied for model in analysis.models):  # one and the same matrix
        sets["input"] += ", also centres (tied)"
        del sets["centres"]
    figure, axes = new_figure(1, len(sets), height=3.3, sharey=True)
    for panel, (name, title) in zip(axes[0], sets.items(), strict=True):
        for index, model in enumerate(analysis.models):
            if (found := result_of(model, name)) is not None:
                shares = found["explained_variance"]
                panel.plot(range(1, len(shares) + 1), shares, **line_look(index), label=model.label)
        panel.set_xscale("log")
        panel.set(xlabel="principal components", title=title, ylim=(0, 1))
    axes[0, 0].set_ylabel("cumulative share of the variance")
    hidden = f"; hidden states: {states_text(analysis.models)} sampled validation positions of: {analysis.data_source}"
    return [
        paragraph(
            "The summary lists ranks, participation ratio, isotropy, mean cosine and norms. They have no intervals: "
            "those of the centres are computed from all centres, and the rank of the hidden states depends on the size "
            "of the sample."
        ),
        finish(
            figure,
            "explained_variance",
            "Explained variance",
            caption="The share of the variance in the first principal components. If a curve rises early, the vectors "
            "use few directions.",
            source=f"Principal components of all rows{hidden if 'hidden' in sets else ''}.",
        ),
    ]


def _value(vectors: str, name: str) -> Callable[[ModelResult], Cell]:
    return lambda model: None if (found := result_of(model, vectors)) is None else found[name]


def rows(model: ModelResult) -> dict[str, Any]:
    return {"geometry": model.found["geometry"]}


QUANTITIES = (
    Quantity("effective rank of the centres", _value("centres", "effective_rank"), key="effective_rank_centres"),
    Quantity("participation ratio of the centres", _value("centres", "participation_ratio")),
    Quantity(
        "share of the centres' variance in two components",
        lambda model: model.found["geometry"]["centres"]["explained_variance"][1],
        key="explained_2_centres",
    ),
    Quantity(
        "rank correlation of frequency with the centre's distance from the mean centre",
        lambda model: model.found["geometry"].get("frequency_correlation"),
        key="frequency_correlation_centres",
    ),
    Quantity("isotropy of the centres", _value("centres", "isotropy")),
    Quantity("mean cosine of two centres", _value("centres", "mean_cosine")),
    Quantity("effective rank of hidden states", _value("hidden", "effective_rank")),
    Quantity("mean norm of the centres", lambda model: model.found["geometry"]["centres"]["norms"]["mean"]),
)
CURVES = (
    Curve("centre_norm", "mean norm of the centres", logged="w_norm_mean", log_scale=True),
    Curve("centre_effective_rank", "effective rank of the centres"),
    Curve("centre_participation_ratio", "participation ratio of the centres"),
)
