"""The harmonic loss of a distance that is no matrix product, in blocks of tokens, vocabulary and width.

In two lines of PyTorch, which the tests compare with,

    scores = -n * torch.log(distance.pairwise(x, w))
    loss = F.cross_entropy(scores, targets, label_smoothing=ε)

Positions are taken in chunks. A chunk's distances d, (C, V), become the scores, the probabilities p and G, the
derivative of the loss by d; then every block of pairs is visited a second time, for ∂d/∂x and ∂d/∂w. With
q = (1 − ε) 1[i = y] + ε/V

    G_ti = −n (p_ti − q_ti) / d_ti,    ∂L/∂x_t = Σ_i G_ti ∂d_ti/∂x_t,    ∂L/∂w_i = Σ_t G_ti ∂d_ti/∂w_i

Nothing has the size (tokens, vocabulary), and what has (positions, classes, width) is a block that fits into the memory
given, in part of which a chunk's scores go as well.
"""

from typing import Any

import torch
from torch import Tensor

from .distances import (
    Distance,
    add_gradients_in_blocks,
    distances_in_blocks,
    memory_of,
    refuse_second_derivative,
    score_chunk,
)
from .loss import Terms, check_and_flatten, cross_entropy, exponent_tensor, scale_


@torch.no_grad()
def _losses_and_grads(
    metric: Distance,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    exponent: Tensor,
    smoothing: float,
    memory: int,
    need_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Losses (N,), and the gradients of Σ_t weights_t losses_t by n, x, w and the parameters of the distance."""
    n = exponent.item() if exponent.is_cpu else exponent.to(x.device)
    terms = Terms(n, w.shape[0], smoothing, need_grads)
    losses = torch.empty_like(weights)
    wanted = (x.new_zeros(()), x, w, *metric.parameters()) if need_grads else ()
    grads = [torch.zeros_like(tensor) for tensor in wanted]
    with torch.autocast(x.device.type, enabled=False):
        chunk = score_chunk(w.shape[0], x.itemsize, memory)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            d, floor = distances_in_blocks(metric, x[part], w, memory)
            nearest = d.amin(-1, keepdim=True)
            scores = scale_(torch.log2(d / nearest), -n)
            factor = weights[part, None] * -n if need_grads else None
            losses[part, None], g, n_share = cross_entropy(
                scores, targets[part, None], weights[part, None], terms, factor
            )
            if g is None or n_share is None:
                continue
            del scores
            g.div_(d).masked_fill_(d <= floor, 0.0)
            grads[0] += n_share
            _, grad_x, *rest = grads
            add_gradients_in_blocks(metric, x[part], w, d, g, memory, (grad_x[part], *rest))
    return losses, grads


class _SummedLoss(torch.autograd.Function):
    """Σ_t weights_t · −log p_{t,y_t}, and in the same pass its gradients, which the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        metric: Distance,
        smoothing: float,
        memory: int,
        targets: Tensor,
        weights: Tensor,
        exponent: Tensor,
        x: Tensor,
        w: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        losses, ctx.grads = _losses_and_grads(metric, x, w, targets, weights, exponent, smoothing, memory, True)
        ctx.metric, ctx.arguments = metric, (smoothing, memory)
        ctx.save_for_backward(x, w, targets, weights, exponent, *parameters)  # which must not change until then
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Taken away, so that the gradient of w scaled is the very tensor that was computed.
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second time through one graph
            x, w, targets, weights, exponent, *_ = ctx.saved_tensors
            smoothing, memory = ctx.arguments
            _, grads = _losses_and_grads(ctx.metric, x, w, targets, weights, exponent, smoothing, memory, True)
        return (*(None,) * 5, *_like_inputs(grads, grad_output, ctx.saved_tensors[4]))


class _PositionLosses(torch.autograd.Function):
    """−log p_{t,y_t} of every position, (N,). The backward pass computes everything again."""

    @staticmethod
    def forward(
        ctx: Any,
        metric: Distance,
        smoothing: float,
        memory: int,
        targets: Tensor,
        exponent: Tensor,
        x: Tensor,
        w: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.metric, ctx.arguments = metric, (smoothing, memory)
        ctx.save_for_backward(x, w, targets, exponent, *parameters)
        weights = x.new_zeros(len(x))  # of the gradients, of which there are none
        losses, _ = _losses_and_grads(metric, x, w, targets, weights, exponent, smoothing, memory, False)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, w, targets, exponent, *_ = ctx.saved_tensors
        smoothing, memory = ctx.arguments
        weights = grad_output.contiguous()
        _, grads = _losses_and_grads(ctx.metric, x, w, targets, weights, exponent, smoothing, memory, True)
        return (*(None,) * 4, *_like_inputs(grads, None, exponent))


def _like_inputs(grads: list[Tensor], scale: Tensor | None, exponent: Tensor) -> list[Tensor]:
    grad_n, *others = grads if scale is None else [grad.mul_(scale) for grad in grads]
    return [grad_n.to(exponent), *others]


@torch.compiler.disable
def pairwise_harmonic_loss(
    metric: Distance,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float | Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    recompute: bool = False,
    memory: int | None = None,
) -> Tensor:
    """Σ_t −log p_{t,y_t} / N over the positions whose target is not `ignore_index`, with p = HarMax of any distance.

    Args:
        metric: a distance without a power.
        x: hidden states, (..., D), of any float dtype; computed with in float32, or float64 for float64.
        w: centres, (V, D), the dtype of `x`, without rows of padding.
        exponent: n on d; a scalar tensor may require a gradient.
        memory: bytes to work with, default `distances.memory_of` the device. Beside it there are the operands and the
            gradients.

    The other arguments, the result and the errors are those of `loss.fused_harmonic_loss`; gradients reach the
    parameters of the distance, too. For torch.compile this is a break in the graph.
    """
    shape = targets.shape
    x, targets, counted, weights, _ = check_and_flatten(
        x,
        w,
        targets,
        num_classes=None,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    x, w = x.to(weights.dtype), w.to(weights.dtype)
    n = exponent_tensor(exponent)
    memory = memory_of(x.device) if memory is None else memory
    parameters = list(metric.parameters())
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w, n, *parameters))
    if reduction == "none" or recompute or not tracked:  # evaluation does not pay for gradients
        losses = _PositionLosses.apply(metric, label_smoothing, memory, targets, n, x, w, *parameters)
        losses = losses.where(counted, 0.0)
        return losses.reshape(shape) if reduction == "none" else (losses * weights).sum()
    return _SummedLoss.apply(metric, label_smoothing, memory, targets, weights, n, x, w, *parameters)
