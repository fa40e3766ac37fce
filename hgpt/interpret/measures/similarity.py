"""How similar the hidden states of two models are on the same text: centred kernel alignment (CKA)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from hgpt.interpret.blocks import Block
from hgpt.interpret.drawing import grid, sign
from hgpt.interpret.measure import Analysis, ModelResult, counts_text, states_sampled

TITLE = "Similarity of hidden states"


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """`debiased`: CKA of every layer of the first model (rows) with every layer of another one (columns).

    `last_layer`: linear CKA, not debiased, of what the two heads see: the figure that papers quote.
    """

    debiased: np.ndarray
    last_layer: float


def centred_gram(x: np.ndarray) -> np.ndarray:
    """K̃ of the linear kernel K = X Xᵀ, (N, N), U-centred: off its diagonal

        K̃_ij = K_ij − Σ_l K_il / (N − 2) − Σ_l K_lj / (N − 2) + Σ_lm K_lm / ((N − 1)(N − 2))

    with the diagonal of K and of K̃ set to 0 (Székely & Rizzo 2014, arXiv:1310.2926, §3). Needs N ≥ 4.
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


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """‖Yᵀ X‖²_F / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F) of centred columns: linear centred kernel alignment, between 0 and 1.

    Kornblith et al., *Similarity of Neural Network Representations Revisited*, arXiv:1905.00414, eq. 3. `x`, (N, D),
    and `y`, (N, E), describe the same N positions. Biased upwards where N is not much larger than D: `debiased_cka` is
    not.
    """
    x = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    y = y.astype(np.float64) - y.mean(axis=0, dtype=np.float64)
    cross = np.linalg.norm(y.T @ x) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def debiased_cka(x_gram: np.ndarray, y_gram: np.ndarray) -> float:
    """⟨K̃, L̃⟩ / √(⟨K̃, K̃⟩ ⟨L̃, L̃⟩) of two U-centred Gram matrices: CKA with the unbiased estimator of HSIC.

    0 on average for independent representations, whatever N and D (Nguyen et al. 2021, arXiv:2010.15327, §2; Song et
    al. 2012). The matrices come from `centred_gram`, of the same positions.
    """
    return float(np.sum(x_gram * y_gram) / np.sqrt(np.sum(x_gram**2) * np.sum(y_gram**2)))


def compare(first: ModelResult, other: ModelResult) -> Similarity | None:
    if first.text is None or other.text is None:
        return None
    first_grams = [centred_gram(layer) for layer in first.text.sample]
    table = np.empty((len(first_grams), len(other.text.sample)))
    bar = tqdm(other.text.sample, desc=f"{other.label}: CKA", unit="layer", disable=None, leave=False)
    for column, layer in enumerate(bar):
        gram = centred_gram(layer)
        table[:, column] = [debiased_cka(row, gram) for row in first_grams]
    return Similarity(debiased=table, last_layer=linear_cka(first.text.sample[-1], other.text.sample[-1]))


def overall(analysis: Analysis) -> dict[str, Any]:
    found: dict[str, Similarity] = analysis.compared.get("similarity", {})
    names = {"cka_with_the_first": "debiased", "linear_cka_of_the_last_layer": "last_layer"}
    return {key: {label: getattr(entry, name) for label, entry in found.items()} for key, name in names.items()}


def section(analysis: Analysis) -> list[Block]:
    found: dict[str, Similarity] = analysis.compared.get("similarity", {})
    if not found:
        return []
    first = analysis.models[0]
    figure, axes = grid(len(found), 3, row_height=2.9, extra=0.8)
    for panel, (label, entry) in zip(axes.flat, found.items(), strict=False):
        image = panel.imshow(entry.debiased, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        panel.set(xlabel=f"{label}: block", ylabel=f"{first.label}: block")
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set_fontsize(7)
            axis.get_major_locator().set_params(integer=True)
        if max(entry.debiased.shape) <= 13:
            for (y, x), value in np.ndenumerate(entry.debiased):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6,
                           color="white" if value < 0.6 else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label="debiased linear CKA", shrink=0.8, aspect=20 * len(axes))
    models = [first, *(model for model in analysis.models if model.label in found)]
    return [
        sign(
            figure,
            "cka",
            "Debiased CKA, block by block",
            caption="Debiased linear CKA between the layers of the first model and those of each other one on the same "
            "text: 1 means the same representation up to rotation and scale, 0 an unrelated one.",
            models=models,
            source=f"On a sample of {counts_text(states_sampled(models))} validation positions of: "
            f"{analysis.data_source}.",
        )
    ]
