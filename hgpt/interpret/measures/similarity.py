"""Similarity of two models' hidden states on the same text: debiased centered kernel alignment (CKA)."""

from typing import Any

import numpy as np
from tqdm import tqdm

from hgpt.interpret.drawing import finish, grid
from hgpt.interpret.measure import Analysis, Block, ModelResult, states_text

TITLE = "Similarity of hidden states"


def centred_gram(x: np.ndarray) -> np.ndarray:
    """K̃, (N, N), the U-centred Gram matrix of the linear kernel K = X Xᵀ. Off the diagonal

        K̃_ij = K_ij − Σ_l K_il / (N − 2) − Σ_l K_lj / (N − 2) + Σ_lm K_lm / ((N − 1)(N − 2))

    with the diagonals of K and K̃ set to 0 (Székely & Rizzo 2014, arXiv:1310.2926, §3). Needs N ≥ 4.
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"a U-centred Gram matrix needs at least 4 vectors; got {n}")
    k = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(k, 0.0)
    rows = k.sum(axis=1) / (n - 2)
    k = k - rows[:, None] - rows[None, :] + rows.sum() / (n - 1)
    np.fill_diagonal(k, 0.0)
    return k


def debiased_cka(x_gram: np.ndarray, y_gram: np.ndarray) -> float:
    """⟨K̃, L̃⟩ / √(⟨K̃, K̃⟩ ⟨L̃, L̃⟩) of two U-centred Gram matrices of the same N positions.

    It is CKA with the unbiased estimator of HSIC: 0 on average for independent representations, whatever N and D
    (Nguyen et al. 2021, arXiv:2010.15327, §2; Song et al. 2012).
    """
    return float(np.sum(x_gram * y_gram) / np.sqrt(np.sum(x_gram**2) * np.sum(y_gram**2)))


def compare(first: ModelResult, other: ModelResult) -> np.ndarray | None:
    """CKA of each layer of the first model (rows) with each layer of the other (columns)."""
    if first.text is None or other.text is None:
        return None
    first_grams = [centred_gram(layer) for layer in first.text.sample]
    table = np.empty((len(first_grams), len(other.text.sample)))
    bar = tqdm(other.text.sample, desc=f"{other.label}: CKA", unit="layer", disable=None, leave=False)
    for column, layer in enumerate(bar):
        gram = centred_gram(layer)
        table[:, column] = [debiased_cka(row, gram) for row in first_grams]
    return table


def overall(analysis: Analysis) -> dict[str, Any]:
    return {"cka_with_the_first": analysis.compared.get("similarity", {})}


def section(analysis: Analysis) -> list[Block]:
    found: dict[str, np.ndarray] = analysis.compared.get("similarity", {})
    if not found:
        return []
    first = analysis.models[0]
    figure, axes = grid(len(found), 3, row_height=2.9, extra=0.8)
    for panel, (label, table) in zip(axes.flat, found.items(), strict=False):
        image = panel.pcolormesh(*map(range, table.T.shape), table, vmin=0, vmax=1, cmap="cividis", shading="nearest")
        panel.set(xlabel=f"{label}: block", ylabel=f"{first.label}: block")
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set_fontsize(7)
            axis.get_major_locator().set_params(integer=True)
        if max(table.shape) <= 13:
            for (y, x), value in np.ndenumerate(table):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6,
                           color="white" if value < 0.6 else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label="debiased linear CKA", shrink=0.8, aspect=20 * len(axes))
    models = [first, *(model for model in analysis.models if model.label in found)]
    return [
        finish(
            figure,
            "cka",
            "Debiased CKA, block by block",
            caption="Debiased linear CKA between the layers of the first model and those of each other model on the "
            "same text: 1 for hidden states that are equal up to rotation and scale, 0 for unrelated ones.",
            source=f"On {states_text(models)} sampled validation positions of: {analysis.data_source}.",
        )
    ]
