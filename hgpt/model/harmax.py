"""HarMax as pure functions: squared distances, scores, probabilities, their inverse, a dense reference loss.

For a hidden state x ∈ R^D and a centre w_i ∈ R^D for each of V classes

    d_i = ||w_i − x||₂        p_i = d_i^(−n) / Σ_j d_j^(−n)        loss = −log p_y

(Baek, Liu, Tyagi, Tegmark, *Harmonic Loss Trains Interpretable AI Models*, arXiv:2502.01628, §2). The
exponent n is defined on the distance d everywhere in this project, never on d².

Computed in log space, as softmax(z) of the scores z_i = −(n/2) · log d_i²: d^(−n) leaves float32's range long before p
does.

With a radius ρ_i for each class, p_i ∝ (d_i / ρ_i)^(−n). The functions take the log-weight a_i = n log ρ_i, and add it
to the score.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_EXPONENT = re.compile(r"(?:(?P<factor>[0-9.eE+-]+)\s*\*\s*)?(?P<base>sqrt_dim|dim)")

# Bound on the rounding error of d² = |x|² + |w|² − 2 x·w, in units of ε |x|² (ε of the accumulation dtype). Measured
# at w = x, where d² should be 0, on 15,000 pairs with D = 64 to 1600 on a CPU: 2 on average, 12 at most.
_ROUNDING_ULPS = 16.0


def resolve_exponent(exponent: float | str, dim: int) -> float:
    """n as a number: a positive number itself, `"dim"` = D, `"sqrt_dim"` = √D, or a multiple, `"2*sqrt_dim"`.

    Raises:
        ValueError: for anything else, and for n ≤ 0.
    """
    match = _EXPONENT.fullmatch(exponent.strip()) if isinstance(exponent, str) else None
    try:
        base = {"dim": float(dim), "sqrt_dim": math.sqrt(dim)}[match["base"]] if match else 1.0
        value = base * float((match["factor"] or 1) if match else exponent)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            'exponent (n on the distance d) must be a positive number, "dim", "sqrt_dim" or a multiple such '
            f'as "2*sqrt_dim"; got {exponent!r}'
        )
    return value


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which distances of `dtype` operands are accumulated: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inner_products(x: Tensor, w: Tensor) -> Tensor:
    """x·w_i for every pair, (N, D), (V, D) → (N, V), accumulated and returned in `accumulation_dtype`.

    Products rounded to bfloat16 would lose the difference between near centres: d² is a small difference of large
    numbers.
    """
    if x.dtype == accumulation_dtype(x.dtype):
        return x @ w.T
    if x.is_cuda and not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)):
        return torch.mm(x, w.T, out_dtype=torch.float32)  # tensor cores; this overload has no autograd
    return x.float() @ w.float().T  # the same products, since the operands are already rounded


def squared_norms(w: Tensor) -> Tensor:
    """|w_i|², (V, D) → (V,), in `accumulation_dtype`, a thousand rows at a time.

    All rows at once would need a temporary of the size of w, which takes seven times as long as the products of one
    position (V = 50304, D = 768, two CPU threads).
    """
    dtype = accumulation_dtype(w.dtype)
    if torch.is_grad_enabled() and w.requires_grad:
        return torch.cat([rows.to(dtype).square().sum(-1) for rows in w.split(1024)])
    # Write into one preallocated tensor: small live results between large temporaries fragment the heap.
    norms = w.new_empty(len(w), dtype=dtype)
    for start in range(0, len(w), 1024):
        norms[start : start + 1024] = w[start : start + 1024].to(dtype).square().sum(-1)
    return norms


def distance_floor(x_sq: Tensor) -> Tensor:
    """The smallest d² that |x|² + |w|² − 2 x·w can tell from rounding noise, for |x|² of shape (N, 1).

    16 ε |x|², and never 0: at x = 0 it is 4e-29 in float32, small compared with any d², yet large enough for d² / floor
    to be finite. d² is near the floor only where |w| ≈ |x|, so |w| need not enter it.
    """
    limits = torch.finfo(x_sq.dtype)
    return (_ROUNDING_ULPS * limits.eps * x_sq).clamp_min(limits.tiny**0.75)


def squared_distances(x: Tensor, w: Tensor, w_sq: Tensor | None = None) -> Tensor:
    """d²_ti = |x_t|² + |w_i|² − 2 x_t·w_i, clamped from below at `distance_floor(|x_t|²)`.

    Args:
        x: hidden states, (..., D), any float dtype.
        w: centres, (V, D), the dtype of `x`.
        w_sq: `squared_norms(w)`, (V,), if known; for few x they take as long as the products.

    Returns:
        (..., V) in float32 (float64 for float64 operands). The squared norms are sums, in that dtype, of the same
        rounded values that enter the product, so that the terms cancel also for bfloat16. A clamped entry passes no
        gradient.

    Raises:
        ValueError: the dtypes or the last dimensions of `x` and `w` differ.
    """
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must have the same dtype: x is {x.dtype}, w is {w.dtype}; cast one of them")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x and w must have the same width: x is {tuple(x.shape)}, w is {tuple(w.shape)}")
    rows = x.reshape(-1, x.shape[-1])  # (N, D)
    dtype = accumulation_dtype(x.dtype)
    x_sq = rows.to(dtype).square().sum(-1, keepdim=True)  # (N, 1)
    if w_sq is None:
        w_sq = squared_norms(w)
    d_sq, floor = inner_products(rows, w), distance_floor(x_sq.detach())  # (N, V), (N, 1)
    # nan stays nan and stops the run; clamped, it would look like a distance near 0.
    if d_sq.requires_grad:
        d_sq = x_sq + (w_sq - 2 * d_sq)
        d_sq = torch.where(d_sq <= floor, floor, d_sq)
    else:  # in place: allocating an (N, V) tensor takes longer than the arithmetic
        d_sq.mul_(-2).add_(w_sq).add_(x_sq).clamp_min_(floor)
    return d_sq.reshape(*x.shape[:-1], w.shape[0])


def harmonic_scores(d_sq: Tensor, exponent: float | Tensor, log_weight: Tensor | None = None) -> Tensor:
    """z_i = −(n/2) · log d_i² + a_i: the scores whose softmax is HarMax.

    Args:
        d_sq: d² > 0, (..., V).
        exponent: n on d.
        log_weight: a_i = n log ρ_i, (V,), in nats; None: 0, so every radius ρ_i is 1.
    """
    scores = -0.5 * exponent * d_sq.log()
    return scores if log_weight is None else scores + log_weight


def log_harmax(d_sq: Tensor, exponent: float | Tensor, log_weight: Tensor | None = None) -> Tensor:
    """log p_i = z_i − log Σ_j exp(z_j) over the last dimension, with z = `harmonic_scores`."""
    return F.log_softmax(harmonic_scores(d_sq, exponent, log_weight), dim=-1)


def harmax(d_sq: Tensor, exponent: float | Tensor, log_weight: Tensor | None = None) -> Tensor:
    """p_i = (d_i/ρ_i)^(−n) / Σ_j (d_j/ρ_j)^(−n) over the last dimension; arguments of `harmonic_scores`."""
    return F.softmax(harmonic_scores(d_sq, exponent, log_weight), dim=-1)


def relative_distances(log_probs: Tensor, exponent: float | Tensor, log_weight: Tensor | None = None) -> Tensor:
    """The inverse of HarMax: d_i / d_min, with d_i ∝ ρ_i p_i^(−1/n), over the last dimension.

    Args:
        log_probs: log p_i, or scores that differ from them by a constant per row, (..., V). −inf (a masked class)
            gives the distance inf.
        exponent: n on d.
        log_weight: a_i = n log ρ_i, (V,), in nats. None: every radius is 1; with the logits of a head with radii the
            result is then d_i / ρ_i over the smallest of these.

    Returns:
        (..., V), at least 1. d_min itself cannot be recovered: HarMax is invariant to d → c·d.

    Raises:
        ValueError: `log_weight` is not one number per class of `log_probs`, for example because it has padding rows.
    """
    if log_weight is not None:
        if log_weight.shape != log_probs.shape[-1:]:
            raise ValueError(
                f"log_weight must have one number for each of the {log_probs.shape[-1]} classes of log_probs; got "
                f"{tuple(log_weight.shape)}: HarmonicHead.relative_distances leaves out padding rows"
            )
        log_probs = log_probs - log_weight
    return torch.exp((log_probs.amax(dim=-1, keepdim=True) - log_probs) / exponent)


def harmonic_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float | Tensor,
    log_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """−log p_y with the whole (N, V) matrix in memory: the reference that `loss` is tested against.

    Args:
        x: hidden states, (..., D).
        w: centres, (V, D), the dtype of `x`.
        targets: class indices, (...), int64.
        exponent, log_weight: as in `harmonic_scores`.
        options: `ignore_index`, `reduction` and `label_smoothing` of `torch.nn.functional.cross_entropy`.
    """
    scores = harmonic_scores(squared_distances(x, w), exponent, log_weight)
    return F.cross_entropy(scores.reshape(-1, w.shape[0]), targets.reshape(-1), **options)
