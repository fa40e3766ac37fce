"""The loss of either head and its gradients without the (tokens, vocabulary) matrix.

In two lines of PyTorch, which are what `harmax.harmonic_loss` computes and the tests compare with, the harmonic loss is

    scores = -n / 2 * torch.log(torch.cdist(x, w) ** 2)
    loss = F.cross_entropy(scores, targets, label_smoothing=ε)

Positions are taken in chunks. Within one chunk the products x·wᵀ become d², the scores, the probabilities p
and, in the same pass, G, the derivative of the loss by the products; the backward pass only scales. With
q = (1 − ε) 1[i = y] + ε/V and s_i = log(d_i^(−n)), up to a constant per position,

    G_ti = n (p_ti − q_ti) / d²_ti,    ∂L/∂x = G w − rowsum(G) ⊙ x,    ∂L/∂w = Gᵀ x − colsum(G) ⊙ w
    ∂L/∂n = Σ_ti (p_ti − q_ti) s_ti / n

With bfloat16 operands the products with G are of G as rounded, R. The sums are of G itself: they are nearly 0, and the
rounding's share in them would be multiplied by all of |x|. What R adds to the first product is Σ_i (R − G)_ti w_i, of
which the part along the mean of w is known, rowsum(R − G), and taken off again; likewise that of x in the second.

For the softmax twin the scores are the products themselves, G = p − q, and the sums fall away: three matrix
products either way. `torch.nn.functional.linear_cross_entropy` does the same for softmax, but with bfloat16
operands adds up the loss over its chunks in bfloat16 (torch 2.13: 29312 for 29099.6 nats over 3000 tokens),
and the two heads are to be compared.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .harmax import accumulation_dtype, distance_floor, inner_products, squared_norms

REDUCTIONS = ("mean", "sum", "none")

# Bytes of the (chunk, vocabulary) buffer. On a CPU, two threads, V = 50304, D = 768 (benchmarks/head_loss.py --chunk),
# more positions a chunk go through w less often, and need more memory: 384, 74 MiB, take 3 to 5 % less time than 256.
# On a GPU not measured yet: by arithmetic, adding to the gradient of w is then a tenth of the products' time.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_GPU = 78 * 2**20, 512 * 2**20
# Bytes of the rows of a chunk that go through the pointwise operations together on a CPU: they stay in its cache from
# the first operation to the last. 2 to 6 MiB differ by less than the noise; 1 MiB is a tenth slower at small
# vocabularies, where the calls themselves count.
_BLOCK_BYTES = 4 * 2**20
# Rows of w that are multiplied at a time on a CPU, or as many as positions. MKL is 10 to 25 % faster at 256 x 512
# products at a time than at 256 x 50304 (on an AMD EPYC, two threads; D = 768 and 1600).
_PRODUCT_ROWS = 512

# Forms of the operands that are compiled, each for itself: two sizes of chunks, on a CPU of blocks, with gradients and
# without them. torch.compile's default of 8 is not enough where batches differ, and beyond it nothing is compiled.
_COMPILED_FORMS = 64

_LOG2_E, _LN_2 = 1 / math.log(2), math.log(2)
# Where powers are multiplied out, what is smaller in relation to the largest of a position is 0. Their sum, at least 1,
# would not feel it in float64 either; and between here and 0 lie the subnormal numbers, which some processors multiply
# a hundred times more slowly.
_SMALLEST_POWER = 2.0**-80
# Of the exponents that are multiplied out: beyond it the base of that smallest power is 1 in float32.
_LARGEST_MULTIPLIED = 2**20


def chunk_positions(num_rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    """Positions per chunk for `num_rows` rows of w: a multiple of 64, at least 64, so that a chunk's scores take about
    75 MiB on a CPU and 500 MiB elsewhere."""
    per_position = num_rows * accumulation_dtype(dtype).itemsize
    size = _CHUNK_BYTES_CPU if device == "cpu" else _CHUNK_BYTES_GPU
    return max(64, size // per_position // 64 * 64)


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of G and of the gradients until the backward pass has scaled them: what is divided by the number of tokens lies
    below float16's range. bfloat16 has the range, and runs through the tensor cores."""
    return torch.float32 if dtype == torch.float16 else dtype


def _block_positions(products: Tensor) -> int:
    if products.is_cpu:
        return max(1, _BLOCK_BYTES // (products.shape[1] * products.itemsize))
    return products.shape[0]  # elsewhere what counts is the number of kernels


def _products(x: Tensor, w: Tensor, out: Tensor | None) -> Tensor:
    """x·w_i for every pair, (C, D), (V, D) → (C, V) in the accumulation dtype; in `out`, if that is of the same."""
    if out is None:
        return inner_products(x, w)
    size = max(_PRODUCT_ROWS, len(x)) if x.is_cpu else len(w)
    for rows, columns in zip(w.split(size), out.split(size, dim=1), strict=True):
        torch.mm(x, rows.T, out=columns)
    return out


def _weighted_rows(g: Tensor, w: Tensor) -> Tensor:
    """Σ_i g_ti w_i, (C, V), (V, D) → (C, D) in the accumulation dtype.

    Where C < D its transpose is computed on a CPU: with two threads MKL is 5 to 12 % faster at the longer of two forms.
    """
    if g.is_cpu and g.shape[0] < w.shape[1]:
        return inner_products(w.T, g).T
    return inner_products(g, w.T)


class Terms(NamedTuple):
    """What the loss of a position is made of: n (None: softmax), the classes, ε; and which gradients are wanted."""

    n: float | Tensor | None
    num_classes: int
    smoothing: float
    need_n: bool
    need_x: bool = False
    need_w: bool = False


class Outcome(NamedTuple):
    """What a block of R positions comes to.

    Attributes:
        losses: (R, 1).
        grad_n: its share of ∂L/∂n, or None.
        row_sums, column_sums: rowsum(G), (R, 1), and colsum(G), (V,), or None where they are not needed: for softmax,
            and for a gradient that is not wanted.
        row_rounding, column_rounding: the same sums of what rounding has added to G, or None.
    """

    losses: Tensor
    grad_n: Tensor | None = None
    row_sums: Tensor | None = None
    column_sums: Tensor | None = None
    row_rounding: Tensor | None = None
    column_rounding: Tensor | None = None


class Rows(NamedTuple):
    """Some positions, R of them: x·w_i (R, V), |x|² (R, 1), |w_i|² (V,), and their targets and weights (R, 1)."""

    products: Tensor
    x_sq: Tensor
    w_sq: Tensor
    targets: Tensor
    weights: Tensor


def _proximities(rows: Rows, num_classes: int) -> tuple[Tensor, ...]:
    """min_j d_j² / d²_i (R, V) in place of the products, min_j d_j² (R, 1), and which entries are clamped.

    The mask is empty where nothing is. On a GPU, and in compiled code, that question would cost more than the mask.
    """
    products, x_sq, w_sq, _, _ = rows
    d_sq = torch.add(w_sq, products, alpha=-2, out=products).add_(x_sq)
    if num_classes < d_sq.shape[1]:
        d_sq[:, num_classes:] = torch.inf
    nearest, floor = d_sq.amin(-1, keepdim=True), distance_floor(x_sq)
    clamped = d_sq.new_empty(0, dtype=torch.bool)
    if torch.compiler.is_compiling() or not d_sq.is_cpu or bool((nearest <= floor).any()):
        clamped = d_sq <= floor
        d_sq, nearest = torch.maximum(d_sq, floor, out=d_sq), torch.maximum(nearest, floor)
    return torch.div(nearest, d_sq, out=d_sq), nearest, clamped


def scale_(values: Tensor, factor: float | Tensor) -> Tensor:
    """`values` times a number, in place. On a CPU a number takes half as long again as a tensor of shape ()."""
    return values.mul_(factor if isinstance(factor, Tensor) else values.new_tensor(factor))


def cross_entropy(
    scores: Tensor,
    targets: Tensor,
    weights: Tensor,
    terms: Terms,
    factor: Tensor | None = None,
    multiplier: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses of R positions, (R, 1), G = factor (p − q) multiplier, (R, V), and their share of ∂L/∂n.

    Args:
        scores: (R, V), overwritten. To base 2, whose logarithm and power are several times faster on a CPU than those
            to base e, and relative to the largest of the position: they reach thousands, and so would their rounding.
        targets, weights: (R, 1).
        factor: (R, 1), or None, and there is no G.
        multiplier: (R, V), or None for 1.
        out: (R, V), where G is to go; it may be the memory of `multiplier`.
    """
    n, num_classes, smoothing, need_n, *_ = terms
    q_scores = scores.gather(-1, targets) * (1 - smoothing)  # Σ_i q_i scores_i, (R, 1)
    if smoothing:
        q_scores += scores[:, :num_classes].mean(-1, keepdim=True) * smoothing
    p = torch.exp2(scores, out=None if need_n else scores)  # times the normaliser
    normaliser = p.sum(-1, keepdim=True)
    losses = normaliser.log() - q_scores * _LN_2
    grad_n = None
    if need_n and n is not None:
        p_scores = (p[:, :num_classes] * scores[:, :num_classes]).sum(-1, keepdim=True) / normaliser
        grad_n = ((p_scores - q_scores) * weights).sum() * _LN_2 / n
    if factor is None:
        return losses, None, grad_n
    return losses, _gradient(p, normaliser, targets, terms, factor, multiplier, out), grad_n


def _gradient(
    p: Tensor,
    normaliser: Tensor,
    targets: Tensor,
    terms: Terms,
    factor: Tensor,
    multiplier: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """G = factor (p / normaliser − q) multiplier, (R, V), of `cross_entropy`'s arguments; `p` is overwritten."""
    _, num_classes, smoothing, *_ = terms
    # Each pass over (R, V) counts. What is to be subtracted at the targets is, there alone.
    at_target = p.gather(-1, targets) / normaliser - (1 - smoothing)
    if smoothing:
        p[:, :num_classes] -= normaliser * (smoothing / num_classes)
        at_target -= smoothing / num_classes
    at_target *= factor
    if multiplier is not None:
        at_target *= multiplier.gather(-1, targets)
        p.mul_(multiplier)
    g = torch.mul(p, factor / normaliser, out=p if out is None else out)
    return g.scatter_(-1, targets, at_target.to(g.dtype))


def _multiplications(rows: Rows, terms: Terms) -> str:
    """The binary digits of n/2, where d^(−n) is to be multiplied out of 1/d², or "": for an even n on a CPU.

    There a logarithm and a power of 2 take longer than the few multiplications of numbers in its cache. On a GPU, where
    each would be a pass over memory, they do not.
    """
    n, _, smoothing, need_n, *_ = terms
    if (
        rows.products.is_cpu
        and isinstance(n, float)
        and n % 2 == 0
        and n <= _LARGEST_MULTIPLIED
        and not smoothing
        and not need_n
    ):
        return f"{int(n) // 2:b}"
    return ""


def _multiplied_out(proximity: Tensor, digits: str) -> Tensor:
    """proximity^(n/2) from the binary digits of n/2, in a tensor of its own; below `_SMALLEST_POWER` it is 0.

    From the second digit on each is a square, and a 1 a multiplication as well.
    """
    power = F.threshold(proximity, _SMALLEST_POWER ** (1 / int(digits, 2)), 0.0)
    for digit in digits[1:]:
        power.mul_(power)
        if digit == "1":
            power.mul_(proximity)
    return power


def _block(rows: Rows, terms: Terms, g_out: Tensor | None) -> Outcome:
    """The losses of R positions; G times the weights goes to `g_out`, (R, V).

    The products are overwritten, and `g_out` may be the same memory.
    """
    n, num_classes, *_ = terms
    products, _, _, targets, weights = rows
    if n is None:
        if num_classes < products.shape[1]:
            products[:, num_classes:] = -torch.inf
        scores = scale_(products - products.amax(-1, keepdim=True), _LOG2_E)
        losses, _, _ = cross_entropy(scores, targets, weights, terms, None if g_out is None else weights, out=g_out)
        return Outcome(losses)
    proximity, nearest, clamped = _proximities(rows, num_classes)
    factor = None if g_out is None else weights * n / nearest
    rounded = g_out is not None and g_out.dtype != products.dtype
    out = None if rounded else g_out
    if digits := _multiplications(rows, terms):
        power = _multiplied_out(proximity, digits)
        normaliser = power.sum(-1, keepdim=True)
        # The target's power may be 0, its logarithm is not lost.
        losses, grad_n = normaliser.log() - 0.5 * n * proximity.gather(-1, targets).log(), None
        g = None if factor is None else _gradient(power, normaliser, targets, terms, factor, proximity, out)
    else:
        scores = scale_(torch.log2(proximity), 0.5 * n)
        losses, g, grad_n = cross_entropy(scores, targets, weights, terms, factor, proximity, out)
    if g is None or g_out is None:
        return Outcome(losses, grad_n)
    if clamped.numel():
        g.masked_fill_(clamped, 0.0)
    row_sums = g.sum(-1, keepdim=True) if terms.need_x else None
    column_sums = g.sum(0) if terms.need_w else None
    if not rounded:
        return Outcome(losses, grad_n, row_sums, column_sums)
    g_out.copy_(g)
    row_rounding = None if row_sums is None else g_out.sum(-1, keepdim=True, dtype=g.dtype).sub_(row_sums)
    column_rounding = None if column_sums is None else g_out.sum(0, dtype=g.dtype).sub_(column_sums)
    return Outcome(losses, grad_n, row_sums, column_sums, row_rounding, column_rounding)


def _functional_block(rows: Rows, terms: Terms, g_dtype: torch.dtype | None) -> tuple[Outcome, Tensor | None]:
    """What `_block` gives, and G in a tensor of its own: for torch.compile, which takes its arguments' sizes for others
    where one that is overwritten is a view of another (torch 2.13)."""
    g = None if g_dtype is None else torch.empty_like(rows.products, dtype=g_dtype)
    return _block(rows._replace(products=rows.products.clone()), terms, g), g


@functools.cache
def _compiled() -> Callable[..., tuple[Outcome, Tensor | None]]:
    return torch.compile(_functional_block, dynamic=False, recompile_limit=_COMPILED_FORMS)  # type: ignore[call-overload]


def _compiled_block(rows: Rows, terms: Terms, g_out: Tensor | None) -> Outcome:
    """As `_block`, but that the products are not overwritten, unless by G."""
    outcome, g = _compiled()(rows, terms, None if g_out is None else g_out.dtype)
    if g_out is not None and g is not None:
        g_out.copy_(g)
    return outcome


@torch.no_grad()
def _losses_and_grads(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    exponent: Tensor | None,
    num_classes: int,
    smoothing: float,
    chunk: int,
    compiled: bool,
    need_x: bool,
    need_w: bool,
    need_n: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), and the gradients of Σ_t weights_t losses_t by x, w and n; empty tensors for those not needed.

    Those by x and w are in `_gradient_dtype`.
    """
    num, dtype, harmonic = x.shape[0], accumulation_dtype(x.dtype), exponent is not None
    g_dtype = _gradient_dtype(x.dtype)
    n: float | Tensor | None = exponent
    if exponent is not None and exponent.is_cpu and not (compiled and x.is_cpu):
        n = exponent.item()  # compiled code would be of this number alone, and one that is learnt changes
    terms = Terms(n, num_classes, smoothing, need_n, need_x, need_w)
    block = _compiled_block if compiled else _block
    w_sq = squared_norms(w) if harmonic else x.new_empty(0, dtype=dtype)  # (V,)
    losses = x.new_empty(num, dtype=dtype)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=g_dtype)
    grad_w = x.new_zeros(w.shape if need_w else 0, dtype=dtype)
    grad_n = x.new_zeros((), dtype=dtype)
    column_sums, column_rounding = torch.zeros_like(w_sq), torch.zeros_like(w_sq)
    rounded = harmonic and g_dtype != dtype
    w_mean = w.mean(0, dtype=dtype) if rounded and need_x else None
    # Reused: fresh memory of this size is given back after every chunk, and its pages are mapped anew.
    buffer = x.new_empty(min(chunk, num), w.shape[0]) if x.dtype == dtype else None

    for start in range(0, num, chunk):
        x_c = x[start : start + chunk]  # (C, D)
        products = _products(x_c, w, None if buffer is None else buffer[: len(x_c)])  # (C, V)
        g = None
        if need_x or need_w:
            g = products if g_dtype == dtype else torch.empty_like(products, dtype=g_dtype)
        row_sums, row_rounding = losses.new_zeros(2, len(x_c), 1)
        step = _block_positions(products)
        for first in range(0, len(x_c), step):
            local = slice(first, min(first + step, len(x_c)))  # within the chunk
            part = slice(start + local.start, start + local.stop)
            x_sq = x[part].to(dtype).square().sum(-1, keepdim=True)
            g_block = None if g is None else g[local]
            # The products have no name, which would keep them until the next chunk's are made.
            outcome = block(Rows(products[local], x_sq, w_sq, targets[part, None], weights[part, None]), terms, g_block)
            losses[part, None] = outcome.losses
            if outcome.grad_n is not None:
                grad_n += outcome.grad_n
            if outcome.row_sums is not None:
                row_sums[local] = outcome.row_sums
            if outcome.row_rounding is not None:
                row_rounding[local] = outcome.row_rounding
            if outcome.column_sums is not None:
                column_sums += outcome.column_sums
            if outcome.column_rounding is not None:
                column_rounding += outcome.column_rounding
        if g is None:
            continue
        part = slice(start, start + chunk)
        if need_x:
            grad = _weighted_rows(g, w.to(g_dtype))
            if harmonic:
                grad.addcmul_(row_sums, x_c.to(dtype), value=-1)
            if w_mean is not None:
                grad.addcmul_(row_rounding, w_mean, value=-1)
            grad_x[part] = grad
        if need_w:
            if g_dtype == dtype:
                grad_w.addmm_(g.T, x_c.to(g_dtype))
            else:
                grad_w += inner_products(g.T, x_c.T.to(g_dtype))
    if need_w and harmonic:
        for rows, sums, part_w in zip(grad_w.split(1024), column_sums.split(1024), w.split(1024), strict=True):
            rows.addcmul_(sums[:, None], part_w.to(dtype), value=-1)
        if rounded:
            grad_w.addr_(column_rounding, x.mean(0, dtype=dtype), alpha=-1)
    return losses, grad_x, grad_w.to(g_dtype), grad_n


# Operators of their own, so that torch.compile takes each as one node of its graph. Exported checkpoints bring a copy
# of this file, perhaps of another version, under another module name: the operators carry that name.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::summed_loss", mutates_args=())
def _summed_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    exponent: Tensor | None,
    num_classes: int,
    smoothing: float,
    chunk: int,
    compiled: bool,
    need_x: bool,
    need_w: bool,
    need_n: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_t weights_t · −log p_{t,y_t}, and in the same pass its gradients, which the backward pass scales."""
    with torch.autocast(x.device.type, enabled=False):
        losses, grad_x, grad_w, grad_n = _losses_and_grads(
            x, w, targets, weights, exponent, num_classes, smoothing, chunk, compiled, need_x, need_w, need_n
        )
    return (losses * weights).sum(), grad_x, grad_w, grad_n


@torch.library.custom_op(f"{_NAMESPACE}::position_losses", mutates_args=())
def _position_losses(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: Tensor | None,
    num_classes: int,
    smoothing: float,
    chunk: int,
    compiled: bool,
) -> Tensor:
    """−log p_{t,y_t} of every position, (N,). The backward pass computes everything again."""
    with torch.autocast(x.device.type, enabled=False):
        weights = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))
        losses, *_ = _losses_and_grads(
            x, w, targets, weights, exponent, num_classes, smoothing, chunk, compiled, False, False, False
        )
    return losses


@_summed_loss.register_fake
def _(x, w, targets, weights, exponent, num_classes, smoothing, chunk, compiled, need_x, need_w, need_n):  # type: ignore[no-untyped-def]
    dtype, g_dtype = accumulation_dtype(x.dtype), _gradient_dtype(x.dtype)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=g_dtype)
    grad_w = x.new_empty(w.shape if need_w else 0, dtype=g_dtype)
    return x.new_empty((), dtype=dtype), grad_x, grad_w, x.new_empty((), dtype=dtype)


@_position_losses.register_fake
def _(x, w, targets, exponent, num_classes, smoothing, chunk, compiled):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True would treat these gradients as constants
        raise RuntimeError(
            "the fused loss has no second derivative: for create_graph=True call the head without targets "
            "and torch.nn.functional.cross_entropy on its logits"
        )


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the gradients as outputs, which nobody else sees
    x, w, targets, weights, exponent, *ctx.options = inputs
    ctx.save_for_backward(x, w, targets, weights, exponent)
    # Beside the saved tensors, for the backward pass to take away: w.grad then becomes the very gradient computed here,
    # and there is never a second tensor of its size. Detached, or they would refer to themselves through this node.
    ctx.grads = [grad.detach() for grad in output[1:]]
    ctx.dtypes = x.dtype, w.dtype, None if exponent is None else exponent.dtype


def _scale_gradients(ctx: Any, grad_output: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    if grad_output is None:
        return (None,) * 12
    grads, ctx.grads = ctx.grads, None
    if grads is None:  # a second time through one graph
        _, *grads = _summed_loss(*ctx.saved_tensors, *ctx.options)
    # In a graph that is being compiled it has no value yet; to ask a GPU for it would make the host wait.
    scaled = type(grad_output) is Tensor and grad_output.is_cpu and grad_output == 1
    grad_x, grad_w, grad_n = (
        (grad if scaled else grad.mul_(grad_output)).to(dtype) if needed else None
        for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.options[-3:], strict=True)
    )
    return grad_x, grad_w, None, None, grad_n, *(None,) * 7


def _keep_operands(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, targets, exponent, *ctx.options = inputs
    ctx.save_for_backward(x, w, targets, exponent)


def _compute_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    x, w, targets, exponent = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    _, *grads = _summed_loss(x, w, targets, grad_output.contiguous(), exponent, *ctx.options, *needed)
    grad_x, grad_w, grad_n = (
        grad.to(operand.dtype) if need else None
        for grad, operand, need in zip(grads, (x, w, exponent), needed, strict=True)
    )
    return grad_x, grad_w, None, grad_n, *(None,) * 4


_summed_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)
_position_losses.register_autograd(_compute_gradients, setup_context=_keep_operands)


class Positions(NamedTuple):
    """The operands of a loss with all positions in one dimension.

    Attributes:
        x, targets: (N, D) and (N,); a target that is ignored is 0.
        counted: which positions count, (N,).
        weights: 1/N_counted, 1/num_items or 1 where a position counts, otherwise 0; (N,) in the accumulation dtype.
        num_classes: rows of w from here on are padding.
    """

    x: Tensor
    targets: Tensor
    counted: Tensor
    weights: Tensor
    num_classes: int


def check_and_flatten(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None,
    ignore_index: int,
    num_items: Tensor | float | None,
    reduction: str,
    label_smoothing: float,
) -> Positions:
    """A fused loss's arguments, checked and brought into one form. Raises ValueError and RuntimeError as it does."""
    if x.dtype != w.dtype or x.shape[-1] != w.shape[-1] or x.shape[:-1] != targets.shape:
        raise ValueError(
            "x (..., D), w (V, D) and targets (...) must fit, x and w with one dtype: "
            f"x is {tuple(x.shape)} {x.dtype}, w is {tuple(w.shape)} {w.dtype}, "
            f"targets is {tuple(targets.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items divides the sum of reduction="mean"; it has no effect with {reduction!r}')
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
    if num_classes is not None and not 1 <= num_classes <= w.shape[0]:
        raise ValueError(f"num_classes must lie between 1 and the rows of w, {w.shape[0]}; got {num_classes}")
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(t, level=0).tangent is not None for t in (x, w)
    ):
        # The operator would drop the tangent without a word.
        raise RuntimeError(
            "the fused loss has no forward-mode derivative: for torch.func.jvp call the head without targets "
            "and torch.nn.functional.cross_entropy on its logits"
        )
    dtype = accumulation_dtype(x.dtype)
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    targets = targets.where(counted, 0)
    weights = counted.to(dtype)
    if reduction == "mean":
        divisor = counted.sum().clamp_min(1) if num_items is None else num_items
        weights = weights.where(~counted, 1 / torch.as_tensor(divisor, dtype=dtype, device=x.device))
    return Positions(x, targets, counted, weights, w.shape[0] if num_classes is None else num_classes)


def exponent_tensor(exponent: float | Tensor) -> Tensor:
    """A number as a float64 tensor, a tensor as it is. Raises ValueError for a number that is no exponent."""
    if isinstance(exponent, Tensor):
        return exponent
    if not 0 < exponent < math.inf:
        raise ValueError(f"exponent must be a positive number; got {exponent}")
    return torch.tensor(exponent, dtype=torch.float64)


def _fused_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float | Tensor | None,
    *,
    num_classes: int | None,
    ignore_index: int,
    num_items: Tensor | float | None,
    reduction: str,
    label_smoothing: float,
    recompute: bool,
    chunk: int | None,
    compiled: bool,
) -> Tensor:
    shape = targets.shape
    x, targets, counted, weights, num_classes = check_and_flatten(
        x,
        w,
        targets,
        num_classes=num_classes,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 position; got {chunk}")
    exponent = None if exponent is None else exponent_tensor(exponent)
    chunk = chunk_positions(w.shape[0], x.dtype, x.device.type) if chunk is None else chunk

    if reduction == "none" or recompute:
        losses = _position_losses(x, w, targets, exponent, num_classes, label_smoothing, chunk, compiled)
        losses = losses.where(counted, 0.0)
        return losses.reshape(shape) if reduction == "none" else (losses * weights).sum()
    tracked = torch.is_grad_enabled()  # evaluation does not pay for gradients
    need_n = exponent is not None and exponent.requires_grad and tracked
    return _summed_loss(
        x,
        w,
        targets,
        weights,
        exponent,
        num_classes,
        label_smoothing,
        chunk,
        compiled,
        x.requires_grad and tracked,
        w.requires_grad and tracked,
        need_n,
    )[0]


def fused_harmonic_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    exponent: float | Tensor,
    *,
    num_classes: int | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    recompute: bool = False,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Σ_t −log p_{t,y_t} / N over the positions whose target is not `ignore_index`, with p = HarMax.

    Args:
        x: hidden states, (..., D), float64, float32, bfloat16 or float16. Autocast has no effect here.
        w: centres, (V, D), the dtype of `x`.
        targets: class indices, (...), int64.
        exponent: n on d; a scalar tensor may require a gradient. On a CPU an even number that is not learnt is fastest,
            unless labels are smoothed: d^(−n) is then multiplied out of 1/d², without a logarithm of every score.
        num_classes: rows of `w` from here on are padding without probability; default V.
        num_items: N, the divisor. Default: the number of counted positions (their mean; 0 if there is none).
        reduction: "mean" (the sum over N), "sum", or "none": −log p of every position, (...), 0 where ignored.
        label_smoothing: ε of q = (1 − ε) 1[i = y] + ε / num_classes, for −Σ_i q_i log p_i in the place of −log p_y.
        recompute: keep only the operands for the backward pass, which then computes the products again: four matrix
            products instead of three, and no gradient of w in memory in between. Always so with "none".
        chunk: positions per chunk, default `chunk_positions(V, dtype, device)`.
        compiled: torch.compile what is done with the products of a chunk. On a CPU that is no faster, and takes more
            memory (benchmarks/head_loss.py measures both); on a GPU it should save most of the passes over the scores,
            and has not been measured.

    Returns:
        A float32 scalar (float64 for float64 operands). Gradients reach `x` and `w` in their dtype, with sums
        over positions accumulated in float32. What requires no gradient costs none.

    Raises:
        ValueError: shapes or dtypes that do not fit, an option out of its range, or one without effect.
        RuntimeError: a second derivative (from the backward pass), or one in forward mode.
    """
    return _fused_loss(
        x,
        w,
        targets,
        exponent,
        num_classes=num_classes,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        label_smoothing=label_smoothing,
        recompute=recompute,
        chunk=chunk,
        compiled=compiled,
    )


def fused_softmax_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    recompute: bool = False,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The twin of `fused_harmonic_loss` with p = softmax(x·wᵀ); the same arguments but for the exponent."""
    return _fused_loss(
        x,
        w,
        targets,
        None,
        num_classes=num_classes,
        ignore_index=ignore_index,
        num_items=num_items,
        reduction=reduction,
        label_smoothing=label_smoothing,
        recompute=recompute,
        chunk=chunk,
        compiled=compiled,
    )
