"""The loss of either head on a GPU: Triton kernels between the matrix products.

`by_rows` has the contract `loss.Kernel` and computes what `loss.by_products` computes, for softmax and for powers of a
Euclidean distance. Per chunk of C positions, with V classes and target y; scores are relative to those of one class, 0:

    products = x wᵀ                 (C, V) float32, a matrix product into one buffer
    `_losses`                       reads the products: z_i = a_i log₂ e + n/2 log₂ (d_0²/d_i²), scores to base 2
                                    (softmax: z_i = (a_i + x·w_i − x·w_0) log₂ e), loss = ln 2 (log₂ Σ 2^z_i − z_y)
    `_gradients`                    reads them again; writes G_i = n (p_i − q_i) / d_i² (softmax: p_i − q_i) in the
                                    dtype of the operands, and the sums over rows and columns of G before it is rounded
    G w and Gᵀ x                    matrix products; the second one adds to the gradient of w
    `_subtract`                     rowsum(G) ⊙ x from G w; at the end colsum(G) ⊙ w from Gᵀ x

a_i is the log-weight of class i.

Every sum has a fixed order: the results are the same in every run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .harmax import distance_floor
from .loss import LossParams, chunk_positions, slices

# Tiles (rows, columns) and warps, the fastest of those tried on an H200.
_LOSS_TILE, _LOSS_WARPS = {"ROWS": 1, "COLUMNS": 2048}, 8
_GRADIENT_TILE, _GRADIENT_WARPS = {"STEPS": 32, "ROWS": 1, "COLUMNS": 256}, 1
_VECTOR_TILE = {"ROWS": 16, "COLUMNS": 256}  # of x and w

_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _squared_norms(V, OUT, count, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """|v|² of rows v, summed in float32."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        v = tl.load(V + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += v * v
    tl.store(OUT + rows, tl.sum(total, 1), mask=rows < count)


@triton.jit
def _log2_closeness(d_sq, reference, inverse, FAST: tl.constexpr):
    """log₂ (reference / d²); FAST: by the special-function unit, with an absolute error of 2⁻²² near 1."""
    if FAST:
        return -libdevice.fast_log2f(d_sq * inverse)
    return tl.log2(tl.div_rn(reference, d_sq))  # a quotient below 1 is rounded more finely than one above 1


@triton.jit
def _squared_distances(products, x_sq, floor, w_sq):
    """d², clamped at the floor; nan stays nan."""
    d_sq = (w_sq - 2 * products) + x_sq  # in this order, because |x| may be large
    return tl.where(d_sq <= floor, floor, d_sq)


@triton.jit
def _add(POINTER, values, mask):
    tl.store(POINTER, tl.load(POINTER, mask=mask, other=0.0) + values, mask=mask)


# This signature and those of the kernels below are long: a Triton kernel takes each pointer, stride and constant as an
# argument of its own.
@triton.jit
def _nearest(
    start_of_row, valid, own, x_sq, floor, W_SQ, classes,
    HARMONIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The smallest d² of each row (softmax: the largest product); `own` is the target's."""
    best = tl.broadcast_to(own[:, None], [ROWS, COLUMNS])
    for start in range(0, classes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_class = columns < classes
        inside = valid[:, None] & is_class[None, :]
        value = tl.load(start_of_row[:, None] + columns[None, :], mask=inside, other=0.0)
        if HARMONIC:
            w_sq = tl.load(W_SQ + columns, mask=is_class, other=1.0)
            value = _squared_distances(value, x_sq[:, None], floor[:, None], w_sq[None, :])
            best = tl.where(inside & (value < best), value, best)
        else:
            best = tl.where(inside & (value > best), value, best)
    return tl.min(best, 1) if HARMONIC else tl.max(best, 1)


@triton.jit
def _losses(
    PRODUCTS, stride, TARGETS, X_SQ, FLOOR, W_SQ, LOG_WEIGHT, HALF_N, LOSSES, SLOPES, REFERENCE, SCALES,
    count, classes, smoothing,
    HARMONIC: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, LEARNED: tl.constexpr,
    NEAREST: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Losses of rows of products, their derivatives by log n, and the values per row that `_gradients` needs.

    REFERENCE is d² (softmax: the product) of the class that scores are relative to: the target, or the nearest class
    if NEAREST, which costs one more pass and keeps float32's digits where the target is far. SCALES (4, count) receives
    the largest z, 1 / Σ 2^(z − largest), (1 − ε) reference / d² of the target, and 1 / reference.
    Each lane keeps its own maximum and sum; lanes are combined once, at the end.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    start_of_row = PRODUCTS + rows.to(tl.int64) * stride
    target = tl.load(TARGETS + rows, mask=valid, other=0)
    own = tl.load(start_of_row + target, mask=valid, other=0.0)  # the target's product, then its d²
    x_sq, floor, half_n = own, own, 0.0  # not read
    if HARMONIC:
        half_n = tl.load(HALF_N)
        x_sq = tl.load(X_SQ + rows, mask=valid, other=1.0)
        floor = tl.load(FLOOR + rows, mask=valid, other=1.0)
        own = _squared_distances(own, x_sq, floor, tl.load(W_SQ + target, mask=valid, other=0.0))
    nearest = own
    if NEAREST:
        nearest = _nearest(start_of_row, valid, own, x_sq, floor, W_SQ, classes, HARMONIC, ROWS, COLUMNS)
    inverse = 1.0 / nearest
    own_z = half_n * _log2_closeness(own, nearest, inverse, FAST) if HARMONIC else (own - nearest) * _LOG2_E
    own_slope = own_z
    if WEIGHTED:
        own_z += tl.load(LOG_WEIGHT + target, mask=valid, other=0.0) * _LOG2_E
    largest = tl.full([ROWS, COLUMNS], -1e30, tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)  # Σ 2^(z − largest)
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)  # Σ 2^(z − largest) ∂z/∂log n
    sum_z = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_slope = tl.zeros([ROWS, COLUMNS], tl.float32)  # Σ ∂z/∂log n
    for start in range(0, classes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_class = columns < classes
        inside = valid[:, None] & is_class[None, :]
        z = tl.load(start_of_row[:, None] + columns[None, :], mask=inside, other=0.0)
        if HARMONIC:
            w_sq = tl.load(W_SQ + columns, mask=is_class, other=1.0)
            d_sq = _squared_distances(z, x_sq[:, None], floor[:, None], w_sq[None, :])
            z = half_n * _log2_closeness(d_sq, nearest[:, None], inverse[:, None], FAST)
        else:
            z = (z - nearest[:, None]) * _LOG2_E
        by_log_n = tl.where(inside, z, 0.0)
        if WEIGHTED:
            z += tl.load(LOG_WEIGHT + columns, mask=is_class, other=0.0)[None, :] * _LOG2_E
        if SMOOTHED:
            sum_z += tl.where(inside, z, 0.0)
            sum_slope += by_log_n
        z = tl.where(inside, z, -float("inf"))
        smaller = tl.exp2(-tl.abs(z - largest))
        keep = z <= largest
        total = tl.where(keep, total + smaller, total * smaller + 1.0)
        if LEARNED:
            slope = tl.where(keep, slope + smaller * by_log_n, slope * smaller + by_log_n)
        largest = tl.where(keep, largest, z)
    top = tl.max(largest, 1)
    scale = tl.exp2(largest - top[:, None])
    sums = tl.sum(total * scale, 1)
    expected, expected_slope = own_z * (1 - smoothing), own_slope * (1 - smoothing)  # Σ q z
    if SMOOTHED:
        expected += smoothing / classes * tl.sum(sum_z, 1)
        expected_slope += smoothing / classes * tl.sum(sum_slope, 1)
    tl.store(LOSSES + rows, (tl.log2(sums) + (top - expected)) * _LN_2, mask=valid)
    if LEARNED:
        tl.store(SLOPES + rows, (tl.sum(slope * scale, 1) / sums - expected_slope) * _LN_2, mask=valid)
    tl.store(REFERENCE + rows, nearest, mask=valid)
    tl.store(SCALES + rows, top, mask=valid)
    tl.store(SCALES + count + rows, 1 / sums, mask=valid)
    if HARMONIC:
        tl.store(SCALES + 2 * count + rows, (1 - smoothing) * nearest / own, mask=valid)
        tl.store(SCALES + 3 * count + rows, inverse, mask=valid)


@triton.jit
def _gradients(
    PRODUCTS, stride, G, g_stride, TARGETS, WEIGHTS, X_SQ, FLOOR, W_SQ, LOG_WEIGHT, HALF_N, REFERENCE, SCALES,
    ROW_SUMS, COLUMN_SUMS, WEIGHT_SUMS, count, classes, width, smoothing,
    HARMONIC: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTHED: tl.constexpr, ROUNDED: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, FAST: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """G of a tile (STEPS · ROWS, COLUMNS), times the weights of the positions, and the tile's sums.

    ROW_SUMS (tiles across, planes, count) and COLUMN_SUMS (tiles down, planes, width) receive the sums of G and, in a
    second plane if ROUNDED, of (rounded G − G). WEIGHT_SUMS (tiles down, width) receives the sums of p − q over the
    rows. The sums over rows are added to those of earlier chunks. With one warp a program, a lane owns its columns: it
    sums over rows alone, and lanes are combined only for the sums over columns.
    """
    down, across = tl.program_id(0), tl.program_id(1)
    columns = across * COLUMNS + tl.arange(0, COLUMNS)
    is_class, within = columns < classes, columns < width
    planes = 2 if ROUNDED else 1
    column_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    column_added = tl.zeros([ROWS, COLUMNS], tl.float32)
    weight_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    shift = tl.zeros([COLUMNS], tl.float32)
    if WEIGHTED:
        shift = tl.load(LOG_WEIGHT + columns, mask=is_class, other=0.0) * _LOG2_E
    if HARMONIC:
        half_n = tl.load(HALF_N)
        w_sq = tl.load(W_SQ + columns, mask=is_class, other=1.0)
    for step in range(STEPS):
        rows = (down * STEPS + step) * ROWS + tl.arange(0, ROWS)
        valid = rows < count
        inside = valid[:, None] & is_class[None, :]
        lines = rows[:, None].to(tl.int64)
        product = tl.load(PRODUCTS + lines * stride + columns[None, :], mask=inside, other=0.0)
        hit = columns[None, :] == tl.load(TARGETS + rows, mask=valid, other=-1)[:, None]
        weight = tl.load(WEIGHTS + rows, mask=valid, other=0.0)
        reference = tl.load(REFERENCE + rows, mask=valid, other=1.0)
        top = tl.load(SCALES + rows, mask=valid, other=0.0)
        scale = tl.load(SCALES + count + rows, mask=valid, other=0.0)[:, None]
        if HARMONIC:
            x_sq = tl.load(X_SQ + rows, mask=valid, other=1.0)
            floor = tl.load(FLOOR + rows, mask=valid, other=1.0)
            own = tl.load(SCALES + 2 * count + rows, mask=valid, other=0.0)
            inverse = tl.load(SCALES + 3 * count + rows, mask=valid, other=0.0)
            d_sq = _squared_distances(product, x_sq[:, None], floor[:, None], w_sq[None, :])
            closeness = _log2_closeness(d_sq, reference[:, None], inverse[:, None], FAST)
            g = tl.exp2((shift[None, :] - top[:, None]) + (half_n + 1) * closeness) * scale  # p d_0² / d²
            if SMOOTHED:
                g -= smoothing / classes * tl.exp2(closeness)
            g = tl.where(hit, g - own[:, None], g)
            if WEIGHT_GRADIENT:
                weight_sums += tl.where(inside, g * (weight * inverse)[:, None] * d_sq, 0.0)
            g *= (weight * 2 * half_n * inverse)[:, None]
            g = tl.where(d_sq <= floor[:, None], 0.0, g)  # clamped
        else:
            g = tl.exp2((product - reference[:, None]) * _LOG2_E + (shift[None, :] - top[:, None])) * scale
            if SMOOTHED:
                g -= smoothing / classes
            g = tl.where(hit, g - (1 - smoothing), g) * weight[:, None]
            if WEIGHT_GRADIENT:
                weight_sums += tl.where(inside, g, 0.0)
        g = tl.where(inside, g, 0.0)
        rounded = g.to(G.dtype.element_ty)
        tl.store(G + lines * g_stride + columns[None, :], rounded, mask=valid[:, None] & within[None, :])
        if HARMONIC:
            own_sums = ROW_SUMS + across * planes * count + rows
            tl.store(own_sums, tl.sum(g, 1), mask=valid)
            column_sums += g
            if ROUNDED:
                added = rounded.to(tl.float32) - g
                tl.store(own_sums + count, tl.sum(added, 1), mask=valid)
                column_added += added
    if HARMONIC:
        own_columns = COLUMN_SUMS + down * planes * width + columns
        _add(own_columns, tl.sum(column_sums, 0), within)
        if ROUNDED:
            _add(own_columns + width, tl.sum(column_added, 0), within)
    if WEIGHT_GRADIENT:
        _add(WEIGHT_SUMS + down * width + columns, tl.sum(weight_sums, 0), within)


@triton.jit
def _subtract(
    GRAD, OUT, OWN, MEAN, SUMS, stride, out_stride, own_stride, parts, count, width,
    ROUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """OUT = GRAD − sum ⊙ OWN − added ⊙ MEAN for rows, with SUMS (parts, planes, count) summed over the parts."""
    planes = 2 if ROUNDED else 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < count
    total = tl.zeros([ROWS], tl.float32)
    added = tl.zeros([ROWS], tl.float32)
    for part in range(0, parts):
        total += tl.load(SUMS + part * planes * count + rows, mask=valid, other=0.0)
        if ROUNDED:
            added += tl.load(SUMS + (part * planes + 1) * count + rows, mask=valid, other=0.0)
    lines = rows[:, None].to(tl.int64)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (columns < width)[None, :]
        grad = tl.load(GRAD + lines * stride + columns[None, :], mask=inside, other=0.0)
        own = tl.load(OWN + lines * own_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        grad -= total[:, None] * own
        if ROUNDED:
            grad -= added[:, None] * tl.load(MEAN + columns, mask=columns < width, other=0.0)[None, :]
        tl.store(OUT + lines * out_stride + columns[None, :], grad.to(OUT.dtype.element_ty), mask=inside)


def squared_norms(v: Tensor) -> Tensor:
    """|v|² of rows, (N, D) → (N,) float32, in one kernel."""
    norms = torch.empty(len(v), device=v.device, dtype=torch.float32)
    _squared_norms[(triton.cdiv(len(v), _VECTOR_TILE["ROWS"]),)](v, norms, *v.shape, v.stride(0), **_VECTOR_TILE)
    return norms


def subtract(grad: Tensor, out: Tensor, own: Tensor, mean: Tensor | None, sums: Tensor) -> None:
    """out = grad − Σ sums[:, 0] ⊙ own − Σ sums[:, 1] ⊙ mean, for (R, D) tensors and `sums` (parts, planes, R)."""
    _subtract[(triton.cdiv(len(grad), _VECTOR_TILE["ROWS"]),)](
        grad, out, own, grad if mean is None else mean, sums, grad.stride(0), out.stride(0), own.stride(0),
        len(sums), *grad.shape, ROUNDED=mean is not None, **_VECTOR_TILE,
    )  # fmt: skip


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out + a b with `add`, accumulated in float32; `out` has float32 or the dtype of the operands."""
    if a.dtype == out.dtype or not a.is_cuda:  # not on a GPU: Triton's interpreter, in tests
        a, b = a.to(out.dtype), b.to(out.dtype)
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if add:
        return torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _gradient_rows() -> int:
    return _GRADIENT_TILE["STEPS"] * _GRADIENT_TILE["ROWS"]


def by_rows(
    params: LossParams, operands: Sequence[Any], targets: Tensor, weights: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and its gradients; see `loss.Kernel` for the contract and `loss.by_products` for the roundings.

    Raises:
        torch.OutOfMemoryError: the buffers of a chunk do not fit; the message names their size.
    """
    buffers = _Buffers(params, operands, weights is not None, needed)
    for rows in slices(len(targets), buffers.chunk):
        buffers.losses_of(rows, targets)
        if weights is not None:
            buffers.gradients_of(rows, targets, weights)
    return buffers.results()


class _Buffers:
    """Operands, buffers of a chunk, and results of `by_rows`."""

    def __init__(self, params: LossParams, operands: Sequence[Any], backward: bool, needed: Sequence[bool]) -> None:
        self.x, self.w, n, log_weight, *_ = operands
        x, w = self.x, self.w
        self.smoothing, self.classes, self.harmonic = params.label_smoothing, params.classes(w), params.n is not None
        self.need_x, self.need_w, self.need_n, self.need_log_weight = needed[:4]
        # The gradients of a mean underflow in float16.
        self.g_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        self.rounded = self.harmonic and self.g_dtype != torch.float32
        self.chunk = min(len(x), params.chunk or chunk_positions(len(w), x.dtype, "cuda"))
        # Not for float32, which would lose precision; AMD's library and Triton's interpreter lack the function.
        self.fast = x.dtype != torch.float32 and x.is_cuda and torch.version.hip is None

        def new(*shape: int, zero: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
            return (torch.zeros if zero else torch.empty)(*shape, device=x.device, dtype=dtype)

        width = -(-len(w) // 8) * 8  # rows of buffers start at multiples of 16 bytes, as matrix products need
        tiles = triton.cdiv(self.chunk, _gradient_rows()) if backward else 0
        self.across, self.planes = triton.cdiv(len(w), _GRADIENT_TILE["COLUMNS"]), 2 if self.rounded else 1
        try:
            self.products = new(self.chunk, width)[:, : len(w)]
            self.g = new(self.chunk if backward else 0, width, dtype=self.g_dtype)[:, : len(w)]
            self.column_sums = new(tiles if self.harmonic else 0, self.planes, len(w), zero=True)
            self.weight_sums = new(tiles if self.need_log_weight else 0, len(w), zero=True)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the head's loss does not fit into memory: its buffers for {self.chunk} of {len(x)} positions and "
                f"{len(w)} classes take {self.chunk * width * (4 + self.g_dtype.itemsize) / 2**30:.1f} GiB. Lower "
                f"train.micro_batch, or `chunk` of LossParams. {error}"
            ) from error
        self.row_sums = new(self.across * self.planes * self.chunk if backward and self.harmonic else 0)
        self.reference, self.scales = new(self.chunk), new(4 * self.chunk)
        self.losses, self.slopes = new(len(x)), new(len(x) if self.need_n else 0)
        self.grad_x = new(*x.shape, dtype=self.g_dtype) if backward and self.need_x else None
        self.grad_w = new(*w.shape, zero=True) if backward and self.need_w else None
        self.grad_n = new(1, zero=True).squeeze() if backward and self.need_n else None
        self.product_x = new(self.chunk if self.harmonic and self.grad_x is not None else 0, x.shape[1])
        self.w_g = w.to(self.g_dtype) if backward else w
        self.w_mean, self.x_mean = (
            v.mean(0, dtype=torch.float32) if self.rounded and backward else None for v in (w[: self.classes], x)
        )
        self.weighted = log_weight is not None
        self.log_weight = log_weight if self.weighted else self.losses  # not read
        if params.n is not None:
            self.half_n = n.detach().float() / 2 if isinstance(n, Tensor) else new(1).fill_(params.n / 2)
            self.x_sq, self.w_sq = squared_norms(x), squared_norms(w)
            self.floor = distance_floor(self.x_sq)
        else:
            self.half_n = self.x_sq = self.w_sq = self.floor = self.losses  # not read

    def losses_of(self, rows: slice, targets: Tensor) -> None:
        """Losses of a chunk, and the products for its gradients."""
        count = rows.stop - rows.start
        multiply(self.x[rows], self.w.T, self.products[:count])
        _losses[(triton.cdiv(count, _LOSS_TILE["ROWS"]),)](
            self.products, self.products.stride(0), targets[rows], self.x_sq[rows], self.floor[rows], self.w_sq,
            self.log_weight, self.half_n, self.losses[rows], self.slopes[rows], self.reference, self.scales,
            count, self.classes, self.smoothing,
            HARMONIC=self.harmonic, WEIGHTED=self.weighted, SMOOTHED=self.smoothing > 0,
            LEARNED=self.need_n, NEAREST=self.x.dtype == torch.float32, FAST=self.fast,
            **_LOSS_TILE, num_warps=_LOSS_WARPS,
        )  # fmt: skip

    def gradients_of(self, rows: slice, targets: Tensor, weights: Tensor) -> None:
        """Add the gradients of a chunk, whose products `losses_of` left."""
        count, g = rows.stop - rows.start, self.g[: rows.stop - rows.start]
        _gradients[(triton.cdiv(count, _gradient_rows()), self.across)](
            self.products, self.products.stride(0), g, g.stride(0), targets[rows], weights[rows], self.x_sq[rows],
            self.floor[rows], self.w_sq, self.log_weight, self.half_n, self.reference, self.scales,
            self.row_sums, self.column_sums, self.weight_sums, count, self.classes, len(self.w), self.smoothing,
            HARMONIC=self.harmonic, WEIGHTED=self.weighted, SMOOTHED=self.smoothing > 0,
            ROUNDED=self.rounded, WEIGHT_GRADIENT=self.need_log_weight,
            FAST=self.fast, **_GRADIENT_TILE, num_warps=_GRADIENT_WARPS,
        )  # fmt: skip
        if self.grad_x is not None and self.harmonic:
            product = multiply(g, self.w_g, self.product_x[:count])
            row_sums = self.row_sums[: self.across * self.planes * count].view(self.across, self.planes, count)
            subtract(product, self.grad_x[rows], self.x[rows], self.w_mean, row_sums)
        elif self.grad_x is not None:
            multiply(g, self.w_g, self.grad_x[rows])
        if self.grad_w is not None:
            multiply(g.T, self.x[rows].to(self.g_dtype), self.grad_w, add=True)
        if self.grad_n is not None:
            self.grad_n += (self.slopes[rows] * weights[rows]).sum() / (2 * self.half_n)

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        if self.grad_w is not None and self.harmonic:
            subtract(self.grad_w, self.grad_w, self.w, self.x_mean, self.column_sums)
        by_log_weight = self.weight_sums.sum(0)[: self.classes] if self.need_log_weight else None
        return self.losses, [self.grad_x, self.grad_w, self.grad_n, by_log_weight]
