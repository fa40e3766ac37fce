"""The loss of a head and its gradients, without a (tokens, vocabulary) matrix.

In two lines of PyTorch (`harmax.harmonic_loss`, the tests' reference):

    scores = -n * torch.log(distance(x, w)) + a    # (N, V); softmax head: x @ w.T + a; a (V,): log-weights, if any
    loss = F.cross_entropy(scores, targets, label_smoothing=ε)

Positions are processed in chunks. A chunk's distances or products, (C, V), are overwritten with the probabilities p,
then with G, the derivative of the loss with respect to them. With q_i = (1 − ε) 1[i = y] + ε/V,

    harmonic, by matrix products    G_ti = n (p_ti − q_ti) / d²_ti, for the product x_t·w_i
                                    ∂L/∂x = G w − rowsum(G) ⊙ x,    ∂L/∂w = Gᵀ x − colsum(G) ⊙ w
    harmonic, in blocks             G_ti = −n (p_ti − q_ti) / d_ti, for the distance d_ti
                                    ∂L/∂x_t = Σ_i G_ti ∂d_ti/∂x_t,  ∂L/∂w_i = Σ_t G_ti ∂d_ti/∂w_i
    softmax                         G_ti = p_ti − q_ti,  ∂L/∂x = G w,  ∂L/∂w = Gᵀ x
    learned n                       ∂L/∂n = −Σ_ti (p_ti − q_ti) log d_ti
    log-weights                     ∂L/∂a_i = Σ_t (p_ti − q_ti)

There are three kernels: `by_products` for softmax and for powers of a Euclidean distance, `row_kernels.by_rows` for the
same on a GPU, and `by_blocks` for every other distance. `HeadLoss` is the autograd node around each.

`torch.nn.functional.linear_cross_entropy` does the same for softmax, but sums the loss over chunks in bfloat16 if the
operands are bfloat16 (torch 2.13: 29312 instead of 29099.6 nats over 3000 tokens): too coarse to compare two heads.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .distances import Distance, add_gradients_in_blocks, distances_in_blocks, score_chunk
from .harmax import accumulation_dtype, distance_floor, inner_products, squared_norms

# Bytes of a chunk's products, measured with V = 50304, D = 768. CPU, two threads: 384 positions (74 MiB) take 3 to 5 %
# less time than 256. H200, bf16: 4096 positions; 2048 take 7 % longer, 3264 3 %, and 5504 and 8192 no less time.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_GPU = 78 * 2**20, 786 * 2**20
# Bytes of the rows of products that a CPU processes at a time, so that they stay in its cache.
_CACHE_BYTES = 4 * 2**20

_LOG2_E, _LN_2 = 1 / math.log(2), math.log(2)


@dataclass(frozen=True, kw_only=True)
class LossParams:
    """Parameters of a head's loss.

    Attributes:
        n: exponent on the distance d: a number, or a learned tensor of shape (); None for softmax.
        distance: the distance d; None for |x − w|₂.
        log_weight: a_i (V,), added to the logit of class i, in nats; None: 0.
        num_classes: the first rows of w are classes, the rest is padding without probability; None: all are classes.
        ignore_index: target of positions that are left out of the loss.
        num_items: divisor of the sum with reduction "mean"; None: the number of counted positions.
        reduction: "mean", "sum", or "none" for the loss of every position, 0 where ignored.
        label_smoothing: ε of q = (1 − ε) 1[i = y] + ε / num_classes.
        recompute: keep only the operands for the backward pass, which computes the products again: four matrix products
            instead of three, but no gradient of w in memory between the passes. Reduction "none" always does this.
        chunk: positions per chunk; None: `chunk_positions`, or `distances.score_chunk` for a distance in blocks.

    Raises:
        ValueError: a parameter is out of range or has no effect.
    """

    n: float | Tensor | None
    distance: Distance | None = None
    log_weight: Tensor | None = None
    num_classes: int | None = None
    ignore_index: int = -100
    num_items: Tensor | float | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    recompute: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.n, int | float) and not 0 < self.n < math.inf:
            raise ValueError(f"exponent must be a positive number; got {self.n}")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be one of mean, sum, none; got {self.reduction!r}")
        if self.num_items is not None and self.reduction != "mean":
            raise ValueError(f'num_items divides the sum of reduction="mean"; it has no effect with {self.reduction!r}')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {self.label_smoothing}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 position; got {self.chunk}")

    def classes(self, w: Tensor) -> int:
        """The number of rows of w that are classes."""
        return len(w) if self.num_classes is None else self.num_classes


@torch.compiler.disable
def head_loss(x: Tensor, w: Tensor, targets: Tensor, params: LossParams) -> Tensor:
    """Σ_t −Σ_i q_ti log p_ti / N over the positions whose target is not ignored, with p = HarMax or softmax(x wᵀ).

    Args:
        x: hidden states as `params.distance` transforms them, x′ (..., D), float64, float32, bfloat16 or float16.
        w: centres as `params.distance` transforms them, w′ (V, D), the dtype of `x`.
        targets: class indices, (...), int64.

    Returns:
        A float32 scalar, or losses (...) with reduction "none" (float64 for float64 operands). Gradients reach x, w, a
        learned n, the log-weights and the parameters of the distance in their dtypes, with sums over positions
        accumulated in float32. Gradients of x and w that are not required are not computed. Autocast has no effect.
        torch.compile breaks the graph here.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a second derivative, from the backward pass.
    """
    if x.dtype != w.dtype or x.shape[-1] != w.shape[-1] or x.shape[:-1] != targets.shape:
        raise ValueError(
            "x (..., D), w (V, D) and targets (...) must fit, x and w with one dtype: "
            f"x is {tuple(x.shape)} {x.dtype}, w is {tuple(w.shape)} {w.dtype}, targets is {tuple(targets.shape)}"
        )
    if not 1 <= params.classes(w) <= len(w):
        raise ValueError(f"num_classes must lie between 1 and the rows of w, {len(w)}; got {params.num_classes}")
    if params.log_weight is not None:
        if params.log_weight.shape != w.shape[:1]:
            got = tuple(params.log_weight.shape)
            raise ValueError(f"log_weight must be ({len(w)},), one number for each row of w; got {got}")
        wide = params.log_weight[: params.classes(w)].to(accumulation_dtype(x.dtype))
        params = replace(params, log_weight=wide)
    shape, dtype, metric = targets.shape, accumulation_dtype(x.dtype), params.distance
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = targets != params.ignore_index
    targets = targets.where(counted, 0)
    weights = counted.to(dtype)  # (N,)
    if params.reduction == "mean":
        weights = weights / (counted.sum().clamp_min(1) if params.num_items is None else params.num_items)
    kernel: Kernel = kernel_for_products(x.device, x.dtype)
    parameters: list[Tensor] = []
    power = 1.0 if metric is None else metric.power
    if metric is not None and power is None:
        kernel, parameters = by_blocks, list(metric.parameters())
        x, w = x.to(dtype), w.to(dtype)
    elif power is not None and params.n is not None:
        params = replace(params, n=power * params.n)  # on |x − w|₂
    operands = (x, w, params.n if isinstance(params.n, Tensor) else None, params.log_weight, *parameters)
    tracked = torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)
    if tracked and params.reduction != "none" and not params.recompute:
        return HeadLoss.apply(kernel, params, targets, weights, *operands)
    losses = HeadLoss.apply(kernel, params, targets, None, *operands).where(counted, 0.0)
    return losses.reshape(shape) if params.reduction == "none" else (losses * weights).sum()


# (params, operands, targets (N,), weights (N,) or None, needed) → losses (N,), and the gradient of
# Σ_t weights_t losses_t with respect to each operand, valid only where `needed` is true. The operands are x (N, D),
# w (V, D), the learned n or None, the log-weights of the classes or None (the same tensors as `params.n` and
# `params.log_weight`), and the parameters of the distance.
Kernel = Callable[
    [LossParams, Sequence[Any], Tensor, Tensor | None, Sequence[bool]], tuple[Tensor, list[Tensor | None]]
]


class HeadLoss(torch.autograd.Function):
    """Σ_t weights_t losses_t, with its gradients computed in the forward pass; without weights, the losses (N,).

    Without weights, and for a second backward pass through one graph, `backward` runs the kernel again.
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, params: LossParams, targets: Tensor, weights: Tensor | None, *operands: Tensor | None
    ) -> Tensor:
        ctx.kernel, ctx.params, ctx.grads = kernel, params, None
        ctx.save_for_backward(targets, weights, *operands)
        with torch.autocast(targets.device.type, enabled=False):
            if weights is None:
                return kernel(params, operands, targets, None, [False] * len(operands))[0]
            losses, ctx.grads = kernel(params, operands, targets, weights, ctx.needs_input_grad[4:])
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would treat these gradients as constants
            raise RuntimeError(
                "this loss has no second derivative: for create_graph=True call the head without targets "
                "and torch.nn.functional.cross_entropy on its logits"
            )
        targets, weights, *operands = ctx.saved_tensors
        # Removed from ctx: w.grad may share their memory, so a second backward pass must not use them.
        needed, stored, ctx.grads = ctx.needs_input_grad[4:], ctx.grads, None
        grads = stored
        if stored is None:
            weights = grad_output if weights is None else weights * grad_output
            with torch.autocast(targets.device.type, enabled=False):
                _, grads = ctx.kernel(ctx.params, operands, targets, weights, needed)

        def scaled(grad: Tensor, operand: Tensor) -> Tensor:
            """In the operand's dtype; a stored one times grad_output, in one pass and in place if the dtype stays."""
            if stored is None:
                return grad.to(operand)
            return torch.mul(grad, grad_output, out=grad if grad.dtype == operand.dtype else torch.empty_like(operand))

        each = zip(grads, operands, needed, strict=True)
        return None, None, None, None, *(scaled(g, o) if need and g is not None else None for g, o, need in each)


def slices(count: int, size: int) -> list[slice]:
    """Ranges of `size` that cover 0 to `count`; the last may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# ----------------------------------------------------------------------------------------------------------------------
# From distances or products to probabilities and G


def cross_entropy(
    scores: Tensor, targets: Tensor, factor: Tensor | None, smoothing: float, powers: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of R positions: losses (R, 1), factor (p − q) (R, V), and Σ_i (p_i − q_i) powers_i (R, 1) in nats.

    Args:
        scores: (R, V), in base 2 (on a CPU exp2 is several times faster than exp), minus the largest of the position,
            because scores of thousands would lose precision. Overwritten unless they are `powers`.
        targets: (R, 1), int64.
        factor: (R, 1). None: only the losses are meaningful.
        powers: the scores without log-weights, (R, V), in base 2; None: the third result is not needed.
    """

    def by_q(values: Tensor) -> Tensor:  # Σ_i q_i values_i
        own = values.gather(-1, targets) * (1 - smoothing)
        return own + values.mean(-1, keepdim=True) * smoothing if smoothing else own

    q_scores = by_q(scores)
    p = torch.exp2(scores, out=None if scores is powers else scores)
    total = p.sum(-1, keepdim=True)
    losses, slopes = total.log() - q_scores * _LN_2, q_scores
    if factor is not None:
        if powers is not None:
            slopes = ((p * powers).sum(-1, keepdim=True) / total - by_q(powers)) * _LN_2
        p.mul_(factor / total)
        if smoothing:
            p.sub_(factor * (smoothing / p.shape[-1]))
        p.scatter_add_(-1, targets, factor * (smoothing - 1))
    return losses, p, slopes


def harmonic_rows(
    params: LossParams,
    d: Tensor,
    floor: Tensor,
    exponent: float | Tensor,
    targets: Tensor,
    factor: Tensor | None,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses of p ∝ e^a d^(−exponent); factor (p − q) / d overwrites d.

    Returns:
        Losses (R, 1), −Σ_i (p_i − q_i) exponent log d_i (R, 1), and Σ_t factor_t (p_ti − q_ti) (V,), None without
        log-weights.

    Args:
        params: only `log_weight` and `label_smoothing` are used.
        d: (R, V), distances or squared distances. Values up to `floor`, (R, 1), are clamped to it and have no gradient.
        targets, factor: as in `cross_entropy`; `learned`: whether the second result is needed.
    """
    log_weight = params.log_weight
    nearest = d.amin(-1, keepdim=True)
    # On a CPU the mask is made only if something is clamped. On a GPU this test would be a sync.
    clamped = None
    if torch.compiler.is_compiling() or not d.is_cpu or bool((nearest <= floor).any()):
        clamped = d <= floor  # false for nan, which stays
        d, nearest = torch.maximum(d, floor, out=d), torch.maximum(nearest, floor)
    ratio = torch.div(nearest, d, out=d)
    scores = torch.log2(ratio).mul_(exponent)
    powers = scores if learned else None
    if log_weight is not None:
        scores = torch.add(scores, log_weight, alpha=_LOG2_E, out=None if learned else scores)
        scores.sub_(scores.amax(-1, keepdim=True))
    factor = None if factor is None else factor / nearest
    losses, residual, slopes = cross_entropy(scores, targets, factor, params.label_smoothing, powers)
    residual_sums = None
    if factor is not None:
        if log_weight is not None:
            residual_sums = residual.T @ nearest[:, 0]
        torch.mul(residual, ratio, out=d)
        if clamped is not None:
            d.masked_fill_(clamped, 0.0)
    return losses, slopes, residual_sums


# ----------------------------------------------------------------------------------------------------------------------
# Distances that are matrix products, and softmax


def chunk_positions(num_rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    """Positions per chunk for `num_rows` rows of w, a multiple of 64: products of 78 MiB on a CPU, else 786 MiB."""
    size = _CHUNK_BYTES_CPU if device == "cpu" else _CHUNK_BYTES_GPU
    return max(64, size // (num_rows * accumulation_dtype(dtype).itemsize) // 64 * 64)


def product_rows(
    params: LossParams,
    products: Tensor,
    x: Tensor,
    w_sq: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses of a chunk and ∂losses/∂log n, (C, 1), and ∂L/∂a (V,), None without log-weights.

    `products` is overwritten by G times the weights, on a CPU a few rows at a time, so that they stay in its cache.

    Args:
        products: x·w_i, (C, V), in the accumulation dtype.
        x, w_sq: (C, D) and |w_i|² (V,), for the harmonic head.
        targets, weights: (C, 1). Without weights only the losses are meaningful.
        learned: whether ∂losses/∂log n is needed.
    """
    n, log_weight = params.n, params.log_weight
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []
    size = _CACHE_BYTES // (products.shape[1] * products.itemsize) if products.is_cpu else len(products)
    for rows in slices(len(products), max(1, size)):
        scores, own, factor = products[rows], targets[rows], None if weights is None else weights[rows]
        if n is None:
            if log_weight is not None:
                scores.add_(log_weight)
            scores.sub_(scores.amax(-1, keepdim=True)).mul_(_LOG2_E)
            losses, residual, slopes = cross_entropy(scores, own, factor, params.label_smoothing, None)
            residual_sums = None if log_weight is None or factor is None else residual.sum(0)
        else:
            x_sq = x[rows].to(w_sq.dtype).square().sum(-1, keepdim=True)
            d_sq = torch.add(w_sq, scores, alpha=-2, out=scores).add_(x_sq)
            factor, floor = None if factor is None else factor * n, distance_floor(x_sq)
            losses, slopes, residual_sums = harmonic_rows(params, d_sq, floor, 0.5 * n, own, factor, learned)
            residual_sums = None if residual_sums is None else residual_sums / n
        found.append((losses, slopes, residual_sums))
    each_loss, each_slope, each_sum = zip(*found, strict=True)
    return torch.cat(each_loss), torch.cat(each_slope), None if each_sum[0] is None else torch.stack(each_sum).sum(0)


@functools.cache
def kernel_for_products(device: torch.device, dtype: torch.dtype) -> Kernel:
    """`row_kernels.by_rows` on a GPU if Triton works there, else `by_products` with a warning that says why.

    Exported models do not contain the row kernels, and run without them.
    """
    if device.type not in ("cuda", "xpu") or dtype == torch.float64:
        return by_products
    try:
        row_kernels = importlib.import_module(".row_kernels", __package__)
        x, targets = torch.ones(1, 16, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=torch.int64)
        row_kernels.by_rows(LossParams(n=2.0), (x, x, None, None), targets, targets.float(), [True, True, False, False])
    except Exception as error:  # Triton, its compiler or the device's driver may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the head's loss runs without Triton on {device}, several times slower: {reason}", stacklevel=2)
        return by_products
    return row_kernels.by_rows


def by_products(
    params: LossParams, operands: Sequence[Any], targets: Tensor, weights: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The kernel for softmax and for powers of |x − w|₂; see `Kernel`.

    With bfloat16 operands the products use R, G rounded to bfloat16. rowsum and colsum are those of G: they are nearly
    0, so their rounding errors times x would be large. The products' error is Σ_i (R − G)_ti w_i; its part along the
    mean of w, rowsum(R − G) w̄, is known and subtracted, and likewise along the mean of x in ∂L/∂w.
    """
    x, w, *_ = operands
    need_x, need_w, learned, _ = needed
    classes, harmonic, dtype = params.classes(w), params.n is not None, accumulation_dtype(x.dtype)
    g_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # the gradients of a mean underflow in float16
    w_g, w_sq = w.to(g_dtype), squared_norms(w[:classes]) if harmonic else w.new_empty(0)
    rounded = harmonic and g_dtype != dtype
    x_mean, w_mean = (v.mean(0, dtype=dtype) if rounded else None for v in (x, w[:classes]))
    losses = x.new_empty(len(x), 1, dtype=dtype)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=g_dtype)
    grad_w = x.new_zeros(w.shape if need_w else 0, dtype=dtype)
    grad_n, grad_a = x.new_zeros((), dtype=dtype), x.new_zeros(classes, dtype=dtype)
    column_sums = x.new_zeros(2, len(w), dtype=dtype)

    for rows in slices(len(x), params.chunk or chunk_positions(len(w), x.dtype, x.device.type)):
        x_c, weights_c = x[rows], None if weights is None else weights[rows, None]
        products = inner_products(x_c, w)  # (C, V); `product_rows` overwrites them with G
        losses[rows], slopes, residual_sums = product_rows(
            params, products[:, :classes], x_c, w_sq, targets[rows, None], weights_c, learned
        )
        if weights_c is None:
            del products
            continue
        if residual_sums is not None:
            grad_a += residual_sums
        products[:, classes:] = 0
        g = products.to(g_dtype)
        if need_x:
            grad = inner_products(g, w_g.T)
            grad_x[rows] = subtract_sums(grad, x_c, w_mean, sums(products, g, 1)) if harmonic else grad
            del grad
        if need_w:
            if g_dtype == dtype:
                grad_w.addmm_(g.T, x_c.to(dtype))
            else:
                grad_w += inner_products(g.T, x_c.T)
            column_sums += sums(products, g, 0) if harmonic else 0
        if learned:
            grad_n += (slopes * weights_c).sum()
        del products, g  # free them before the next chunk's products are allocated
    if need_w and harmonic:
        subtract_sums(grad_w, w, x_mean, column_sums)
    return losses[:, 0], [grad_x, grad_w, grad_n / params.n if params.n is not None else grad_n, grad_a]


def sums(products: Tensor, g: Tensor, dim: int) -> Tensor:
    """Sums of G (`products`) and of rounded G (`g`) over `dim`, (2, V) or (2, C)."""
    exact = products.sum(dim)
    return torch.stack([exact, exact if g is products else g.sum(dim, dtype=exact.dtype)])


def subtract_sums(grad: Tensor, own: Tensor, mean: Tensor | None, sums: Tensor) -> Tensor:
    """grad − sums[0] ⊙ own − (sums[1] − sums[0]) ⊙ mean in place, (R, D)."""
    exact, rounded = sums[:, :, None]
    for rows in slices(len(grad), 1024):  # in parts: `own` in float32 may be a copy
        grad[rows].addcmul_(exact[rows], own[rows].to(grad.dtype), value=-1)
    return grad if mean is None else grad.addcmul_(rounded - exact, mean, value=-1)


def by_blocks(
    params: LossParams, operands: Sequence[Any], targets: Tensor, weights: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The kernel for distances without a power; see `Kernel`.

    Computes d and then its derivatives for every pair, in blocks of positions and classes (`distances.py`).
    """
    x, w, *_ = operands
    assert params.distance is not None and params.n is not None
    metric, n, learned, centres = params.distance, params.n, needed[2], w[: params.classes(w)]
    losses, grad_n, grad_a = x.new_empty(len(x), 1), x.new_zeros(()), x.new_zeros(len(centres))
    grad_x, grad_w, *others = (torch.zeros_like(v) for v in (x, w, *metric.parameters()))
    for rows in slices(len(x), params.chunk or score_chunk(len(centres), x.itemsize, x.device)):
        d, floor = distances_in_blocks(metric, x[rows], centres)  # (C, V), (C, 1)
        g, factor = d.clone(), None if weights is None else weights[rows, None] * -n
        losses[rows], slopes, residual_sums = harmonic_rows(params, g, floor, n, targets[rows, None], factor, learned)
        if weights is None:
            continue
        if residual_sums is not None:
            grad_a -= residual_sums / n
        add_gradients_in_blocks(metric, x[rows], centres, d, g, (grad_x[rows], grad_w[: len(centres)], *others))
        if learned:
            grad_n += (slopes * weights[rows, None]).sum() / n
    return losses[:, 0], [grad_x, grad_w, grad_n, grad_a, *others]
