"""The shape of a cloud of vectors: centres of tokens, embeddings, hidden states. Arrays in, numbers out.

Vectors are rows, (N, D), of any float dtype; every sum is made in float64.
"""

from dataclasses import dataclass

import numpy as np

_CHUNK = 8192  # rows that are widened to float64 at a time


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Mean μ, (D,), and covariance C = (1/N) Σ (x − μ)(x − μ)ᵀ, (D, D), of N vectors, float64."""

    mean: np.ndarray
    matrix: np.ndarray
    count: int


@dataclass(frozen=True, kw_only=True)
class PrincipalAxes:
    """Eigenvectors of a covariance as columns, (D, k), and their eigenvalues, (k,), the largest first."""

    axes: np.ndarray
    variances: np.ndarray


def covariance(x: np.ndarray) -> Covariance:
    """Mean and covariance of the rows of x, (N, D), without a second copy of x in float64."""
    mean = x.mean(axis=0, dtype=np.float64)
    matrix = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK] - mean
        matrix += part.T @ part
    return Covariance(mean=mean, matrix=matrix / len(x), count=len(x))


def principal_axes(matrix: np.ndarray, components: int | None = None) -> PrincipalAxes:
    """The first principal axes of a covariance, (D, D): all of them for None. Signs: the largest entry is positive."""
    variances, axes = np.linalg.eigh(matrix)
    variances, axes = variances[::-1][:components], axes[:, ::-1][:, :components]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    return PrincipalAxes(axes=axes, variances=np.maximum(variances, 0.0))


def explained_variance(eigenvalues: np.ndarray) -> np.ndarray:
    """Cumulated share of the variance, Σ_{i ≤ k} λ_i / Σ λ_i for k = 1 … D, of eigenvalues in falling order, (D,)."""
    return np.cumsum(eigenvalues) / np.sum(eigenvalues)


def effective_rank(eigenvalues: np.ndarray) -> float:
    """exp(−Σ p_i log p_i) with p_i = σ_i / Σ σ_j and the singular values σ_i = √λ_i.

    Between 1 and D; D when all directions are used alike. `eigenvalues` are those of the covariance, so the vectors
    count as centred. Roy & Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.
    """
    singular = np.sqrt(np.maximum(eigenvalues, 0.0))
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(eigenvalues: np.ndarray) -> float:
    """(Σ λ_i)² / Σ λ_i² of a covariance's eigenvalues: D for a round cloud, 1 for a line.

    Gao et al., *A theory of multineuronal dimensionality, dynamics and measurement*, bioRxiv 214262 (2017).
    """
    return float(np.sum(eigenvalues) ** 2 / np.sum(np.square(eigenvalues)))


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine over all pairs of different rows, (|Σ u|² − N) / (N (N − 1)) with u = x/|x|; rows of zero left out.

    0 for directions spread evenly, near 1 for a narrow cone: the anisotropy of Ethayarajh, arXiv:1909.00512.
    """
    total, count = np.zeros(x.shape[1]), 0
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK].astype(np.float64)
        norms = np.linalg.norm(part, axis=1)
        part = part[norms > 0] / norms[norms > 0, None]
        total += part.sum(axis=0)
        count += len(part)
    if count < 2:
        return float("nan")
    return float((total @ total - count) / (count * (count - 1)))


def isotropy(x: np.ndarray) -> float:
    """min_c Z(c) / max_c Z(c) with Z(c) = Σ_i exp(c·x_i / s), over ±c of the eigenvectors c of XᵀX; s = √mean |x|².

    1 for an isotropic cloud, 0 for a degenerate one. Mu & Viswanath, *All-but-the-top*, arXiv:1702.01417, eq. 5;
    vectors are brought to a root mean square norm of 1 first, without which the figure depends on their unit of length.
    """
    gram = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _CHUNK):
        part = x[start : start + _CHUNK].astype(np.float64)
        gram += part.T @ part
    scale = np.sqrt(np.trace(gram) / len(x))
    directions = np.linalg.eigh(gram)[1]  # (D, D)
    partition = np.zeros((2, x.shape[1]))
    for start in range(0, len(x), _CHUNK):
        projected = (x[start : start + _CHUNK].astype(np.float64) / scale) @ directions
        partition += np.stack([np.exp(projected).sum(axis=0), np.exp(-projected).sum(axis=0)])
    return float(partition.min() / partition.max())


def norm_summary(x: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation, 5 % and 95 % quantiles and maximum of |x_i|."""
    norms = np.linalg.norm(x, axis=1).astype(np.float64)
    low, high = np.quantile(norms, [0.05, 0.95])
    return {
        "mean": float(norms.mean()),
        "sd": float(norms.std()),
        "quantile_05": float(low),
        "quantile_95": float(high),
        "max": float(norms.max()),
    }


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
