"""The loss of either head and its gradients without the (tokens, vocabulary) matrix.

In two lines of PyTorch, which are what `harmax.harmonic_loss` computes and the tests compare with, the harmonic loss is

    scores = -n / 2 * torch.log(torch.cdist(x, w) ** 2)
    loss = F.cross_entropy(scores, targets)

Positions are taken in chunks. Within one chunk the products x·wᵀ become d², the scores, the probabilities p
and, in the same pass, G, the derivative of the loss by the products; the backward pass only scales:

    G_ti = n (p_ti − 1[i = y_t]) / d²_ti,    ∂L/∂x = G w − rowsum(G) ⊙ x,    ∂L/∂w = Gᵀ x − colsum(G) ⊙ w

For the softmax twin the scores are the products themselves, G = p − 1[i = y], and the sums fall away: three
matrix products either way. `torch.nn.functional.linear_cross_entropy` does the same for softmax, but with
bfloat16 operands adds up the loss over its chunks in bfloat16 (torch 2.13: 29312 for 29099.6 nats over 3000
tokens), and the two heads are to be compared.
"""

from typing import Any

import torch
from torch import Tensor

from .harmax import accumulation_dtype, distance_floor, inner_products

# Bytes of the (chunk, vocabulary) buffers. Measured on two CPU threads at V = 50304, D = 768: 256 positions a chunk
# is as fast as 512 and takes half the memory; fewer starve the products.
_CHUNK_BYTES = 52 * 2**20


def chunk_positions(num_rows: int, dtype: torch.dtype = torch.float32) -> int:
    """Positions per chunk for `num_rows` rows of w: about 50 MiB a buffer, a multiple of 64, at least 64."""
    per_position = num_rows * accumulation_dtype(dtype).itemsize
    return max(64, _CHUNK_BYTES // per_position // 64 * 64)


def _scores(x: Tensor, w: Tensor, w_sq: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """z = −(n/2) log d² of a chunk and n / d² = ∂z/∂(x·w), 0 where d² is clamped: both (C, V)."""
    x_sq = x.to(w_sq.dtype).square().sum(-1, keepdim=True)  # (C, 1)
    floor = distance_floor(x_sq)
    d_sq = inner_products(x, w).mul_(-2).add_(w_sq).add_(x_sq)
    clamped = d_sq <= floor
    d_sq = torch.maximum(d_sq, floor, out=d_sq)
    scores = d_sq.log().mul_(-0.5 * exponent)
    return scores, d_sq.reciprocal_().mul_(exponent).masked_fill_(clamped, 0.0)


class _FusedLoss(torch.autograd.Function):
    """Σ_t weights_t · −log p_{t,y_t}, with the gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        targets: Tensor,
        weights: Tensor,
        exponent: float | None,
        num_classes: int,
        chunk: int,
    ) -> Tensor:
        need_x, need_w = ctx.needs_input_grad[:2]
        dtype = accumulation_dtype(x.dtype)
        # G is about p / tokens, below float16's range; for bfloat16 it runs through the tensor cores.
        g_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        w_sq = w.to(dtype).square().sum(-1)  # (V,)
        total = torch.zeros((), dtype=dtype, device=x.device)
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(w, dtype=dtype) if need_w else None
        g_colsum = torch.zeros_like(w_sq)

        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            x_c, y_c, weights_c = x[part], targets[part, None], weights[part, None]  # (C, D), (C, 1), (C, 1)
            if exponent is None:
                scores, slope = inner_products(x_c, w), None
            else:
                scores, slope = _scores(x_c, w, w_sq, exponent)
            scores[:, num_classes:] = -torch.inf
            # The maximum goes first: scores reach thousands, and so would the rounding of their log-sum-exp.
            scores.sub_(scores.amax(-1, keepdim=True))
            target_scores = scores.gather(-1, y_c)  # (C, 1)
            p = scores.exp_()
            normaliser = p.sum(-1, keepdim=True)  # (C, 1)
            loss = normaliser.log() - target_scores
            total += (loss * weights_c).sum()
            if not (need_x or need_w):
                continue

            g = p.div_(normaliser)
            g.scatter_add_(-1, y_c, g.new_full(y_c.shape, -1.0))
            g.mul_(weights_c)
            if slope is not None:
                g.mul_(slope)
            # Rounded before it is summed: then G w − rowsum(G) ⊙ x = Σ G (w − x) holds for the rounded G, and
            # what w and x have in common cancels.
            g, x_c = g.to(g_dtype), x_c.to(g_dtype)
            if grad_x is not None:
                grad = inner_products(g, w.T.to(g_dtype))
                if exponent is not None:
                    grad.addcmul_(g.sum(-1, keepdim=True, dtype=dtype), x_c.to(dtype), value=-1)
                grad_x[part] = grad
            if grad_w is not None:
                g_colsum += g.sum(0, dtype=dtype)
                if g_dtype == dtype:
                    grad_w.addmm_(g.T, x_c)
                else:
                    grad_w += inner_products(g.T, x_c.T)

        if grad_w is not None:
            if exponent is not None:
                grad_w.addcmul_(g_colsum[:, None], w.to(dtype), value=-1)
            grad_w = grad_w.to(w.dtype)
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would treat these gradients as constants
            raise RuntimeError(
                "the fused loss has no second derivative: for create_graph=True call the head without targets "
                "and torch.nn.functional.cross_entropy on its logits"
            )
        grads = (None if grad is None else grad * grad_output for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _fused_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float | None,
    num_classes: int | None,
    ignore_index: int,
    num_items: Tensor | float | None,
    chunk: int | None,
) -> Tensor:
    if x.dtype != w.dtype or x.shape[-1] != w.shape[-1] or x.shape[:-1] != targets.shape:
        raise ValueError(
            "x (..., D), w (V, D) and targets (...) must fit, x and w with one dtype: "
            f"x is {tuple(x.shape)} {x.dtype}, w is {tuple(w.shape)} {w.dtype}, "
            f"targets is {tuple(targets.shape)}"
        )
    if not torch.is_grad_enabled():
        x, w = x.detach(), w.detach()  # needs_input_grad does not know, and evaluation would pay for gradients
    rows, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    divisor = counted.sum().clamp_min(1) if num_items is None else num_items
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLoss.apply(
            rows,
            w,
            targets.where(counted, 0),
            counted.to(accumulation_dtype(x.dtype)) / divisor,
            exponent,
            w.shape[0] if num_classes is None else num_classes,
            chunk_positions(w.shape[0], x.dtype) if chunk is None else chunk,
        )


def fused_harmonic_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float,
    *,
    num_classes: int | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Σ_t −log p_{t,y_t} / N over the positions whose target is not `ignore_index`, with p = HarMax.

    Args:
        x: hidden states, (..., D), float64, float32, bfloat16 or float16. Autocast has no effect here.
        w: centres, (V, D), the dtype of `x`.
        targets: class indices, (...), int64.
        exponent: n on d.
        num_classes: rows of `w` from here on are padding without probability; default V.
        num_items: N, the divisor. Default: the number of counted positions (their mean; 0 if there is none).
        chunk: positions per chunk, default `chunk_positions(V)`.

    Returns:
        A float32 scalar (float64 for float64 operands). Gradients reach `x` and `w` in their dtype, with sums
        over positions accumulated in float32; a second derivative raises RuntimeError.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    return _fused_loss(x, w, targets, float(exponent), num_classes, ignore_index, num_items, chunk)


def fused_softmax_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The twin of `fused_harmonic_loss` with p = softmax(x·wᵀ); the same arguments but for the exponent."""
    return _fused_loss(x, w, targets, None, num_classes, ignore_index, num_items, chunk)
