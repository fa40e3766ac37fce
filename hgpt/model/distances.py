"""The distances of a harmonic head: formulas, computation, and how to add one.

A `Distance` says what d(x, w) is for hidden states x (N, D) and centres w (V, D):

    x′, w′ = distance(x, w)                   by default x and w
    d = scale · |x′ − w′|₂^power              if `power` is a number: the loss is then matrix products
    d = distance.pairwise(x′, w′)             if `power` is None: in blocks of x′ (C, D) and w′ (V′, D)

HarMax is p_i = d_i^(−n) / Σ_j d_j^(−n) with the same n for every distance. A constant factor on d has no effect.

    name          d(x, w)                                           computed as
    euclidean     |x − w|₂                                          product
    cosine        1 − cos(x, w) = ½ |x/|x| − w/|w||²                product
    mahalanobis   |L (x − w)|₂ with a learned L                     product
    manhattan     Σ |x_k − w_k|                                     blocks
    minkowski     (Σ |x_k − w_k|^p)^(1/p), p ≥ 1                    blocks; p = 2: product
    chebyshev     max |x_k − w_k|                                   blocks
    canberra      Σ |x_k − w_k| / (|x_k| + |w_k|), 0/0 = 0          blocks
    bray_curtis   Σ |x_k − w_k| / Σ (|x_k| + |w_k|), 0/0 = 0        blocks
    hamming       (1/D) Σ |σ(x_k/τ) − σ(w_k/τ)|                     blocks

They agree with scipy.spatial.distance, with two exceptions: SciPy's braycurtis divides by Σ |x_k + w_k|, equal for
non-negative vectors but no distance for others; SciPy's hamming counts unequal entries. The selection follows
Miller-Golub et al., arXiv:2603.10225.

Near zero. A d below `Distance.floor(x)`, a few epsilons of d(x, 0), is rounding noise: it is clamped to the floor and
passes no gradient, so x = w has a finite loss. The gradient of |x_k − w_k| is 0 at x_k = w_k. The gradient of a maximum
goes to the first coordinate that attains it.
"""

import functools
import inspect
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Bytes of temporaries of a distance in blocks: half for eight (C, V′, D) tensors of a block, half for three
# (C, V) tensors of a chunk's scores. On a CPU a block's tensor is then 4 MiB, twice as fast as 256 KiB or 16 MiB (one
# thread, D = 768). Not measured on a GPU.
_MEMORY_CPU, _MEMORY_GPU = 64 * 2**20, 512 * 2**20
_BLOCK_TENSORS, _SCORE_TENSORS = 8, 3

_ROUNDING_ULPS = 4.0


class Distance(nn.Module):
    """A distance between hidden states and centres; d = |x − w|₂ unless a subclass says otherwise.

    A subclass whose d is no power of a Euclidean distance sets `power = None` and defines `pairwise`. By default
    `gradients` recomputes a block and calls autograd; a subclass may override it with faster code. Options are
    keyword-only arguments of `__init__`. Learned tensors are `nn.Parameter`s, which `reset_parameters` initialises by
    `torch.nn.init`.

    Attributes:
        power, scale: d = scale · |x′ − w′|₂^power; `power` is None for any other d.
        apart: whether `forward` computes x′ from x alone and w′ from w alone. Generation then computes w′ once per
            text, not once per token.
        traffic: how often the loss and its gradients read or write a tensor (tokens, V, D), from which `hgpt.plan`
            estimates their time; used only if `power` is None.
        options: given options and the defaults of the others, as `make_distance` takes them.
    """

    power: float | None = 1.0
    scale: float = 1.0
    apart: bool = False
    traffic: float = 40.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.options: dict[str, Any] = {}

    def reset_parameters(self) -> None:
        """Initialise the learned parameters."""

    @property
    def transforms(self) -> bool:
        """Whether x′ and w′ differ from x and w."""
        return type(self).forward is not Distance.forward

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D), w (V, D) → x′, w′ of the same shapes and dtype, float32 or float64."""
        return x, w

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        """d of every pair in a block of `forward`'s results, (C, D), (V′, D) → (C, V′).

        d and its derivatives must be finite, also at x = w and x = 0. `floor` is 5e-7 · d(x, 0) in float32; override
        `floor` if the rounding error is not proportional to d(x, 0).
        """
        raise NotImplementedError(f"{type(self).__name__} has no power and no pairwise value")

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Gradients of Σ g d with respect to x (C, D), w (V′, D) and each of `parameters()`, given d and g (C, V′).

        g is 0 where d is clamped.
        """
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        inputs = [x, w, *self.parameters()]
        with torch.enable_grad():
            value = self.pairwise(x, w)
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(value, trained, g, allow_unused=True, materialize_grads=True))
        return tuple(next(found) if tensor.requires_grad else torch.zeros_like(tensor) for tensor in inputs)

    def floor(self, x: Tensor) -> Tensor:
        """The smallest d that is not rounding noise, (C, D) → (C, 1): 4 ε d(x, 0), with the dtype's ε, and never 0."""
        limits = torch.finfo(x.dtype)
        origin = self.pairwise(x, x.new_zeros(1, x.shape[1]))
        return (_ROUNDING_ULPS * limits.eps * origin).clamp_min(limits.tiny**0.75)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


# ----------------------------------------------------------------------------------------------------------------------
# The registry

_REGISTRY: dict[str, type[Distance]] = {}


def register_distance(name: str) -> Callable[[type[Distance]], type[Distance]]:
    """Class decorator: registers a `Distance` under `name` for heads, configurations and checkpoints.

    Raises:
        ValueError: another class already has that name.
        TypeError: the class is no subclass of `Distance`.
    """

    def register(cls: type[Distance]) -> type[Distance]:
        if not (isinstance(cls, type) and issubclass(cls, Distance)):
            raise TypeError(f"register_distance({name!r}) is for subclasses of hgpt.Distance; got {cls!r}")
        known = _REGISTRY.get(name)
        # A notebook cell or a file that is executed again may replace its own class.
        own = known is not None and known.__module__ == __name__ != cls.__module__
        if known is not None and (own or known.__qualname__ != cls.__qualname__):
            raise ValueError(f"there already is a distance {name!r}, {known.__qualname__}: choose another name")
        _REGISTRY[name] = cls
        return cls

    return register


@functools.cache
def load_distances(file: str) -> None:
    """Execute a Python file that calls `register_distance`, once per process.

    Raises:
        ValueError: the file cannot be executed, or registers nothing.
    """
    path, before = Path(file).resolve(), dict(_REGISTRY)
    try:
        runpy.run_path(str(path))
    except Exception as error:  # the file may raise anything
        raise ValueError(f"{path} cannot be executed: {type(error).__name__}: {error}") from error
    if before == _REGISTRY:
        raise ValueError(f"{path} registers no distance: it must use @hgpt.register_distance")


def distance_names() -> tuple[str, ...]:
    """Names of all registered distances."""
    return tuple(_REGISTRY)


def make_distance(name: str, dim: int, **options: Any) -> Distance:
    """The distance `name` for vectors of width `dim`; an option that is None counts as not given.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or an unknown, missing or invalid option.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"distance must be one of {', '.join(distance_names())}; got {name!r}. For your own distance import the "
            "file that calls hgpt.register_distance first; a newer hgpt may have more"
        )
    cls = _REGISTRY[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in given:
        if option not in known:
            has = f"which has {', '.join(known)}" if known else "which has no options"
            raise ValueError(f'{option} = {given[option]!r} has no effect with distance = "{name}", {has}: remove it')
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in given:
            raise ValueError(f'{option} is required with distance = "{name}"')
    try:
        metric = cls(dim, **given)
    except TypeError as error:  # for example a string where a number is expected
        options_given = ", ".join(f"{option} = {value!r}" for option, value in given.items())
        raise ValueError(f'distance = "{name}" cannot be made with {options_given or "no options"}: {error}') from error
    defaults = {option: default for option, default in known.items() if default not in (None, inspect.Parameter.empty)}
    metric.options = defaults | given
    return metric


# ----------------------------------------------------------------------------------------------------------------------
# Distances that are matrix products


@register_distance("euclidean")
class Euclidean(Distance):
    """|x − w|₂."""


@register_distance("cosine")
class Cosine(Distance):
    """1 − cos(x, w) = ½ |x̂ − ŵ|², with x̂ = x/|x|: 0 for parallel vectors, 2 for opposite ones.

    |x̂ − ŵ|² is computed with the squared norms of the rounded operands of the product, so that rounding to bfloat16
    cancels near 0; in 1 − x̂·ŵ it does not. In float32 the floor clamps angles below 1.4e-3. A vector shorter than 1e-19
    (in float32) counts as 0: its distance from all others is ½, and it gets no gradient.
    """

    power, scale, apart = 2.0, 0.5, True

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _Direction.apply(x), _Direction.apply(w)


class _Direction(torch.autograd.Function):
    """v̂ = v / |v| of rows, (..., D); 0, without a gradient, where |v|² would underflow.

    ∂L/∂v = (g − (g·v̂) v̂) / |v|. Autograd takes 2.4 times as long (16384 rows, D = 768, one CPU thread) and three more
    tensors of the size of the centres.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v * _inverse_norm(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        inverse = _inverse_norm(v)
        along = torch.linalg.vecdot(grad, v)[..., None] * inverse.square()
        return torch.addcmul(grad, along, v, value=-1).mul_(inverse)


def _inverse_norm(v: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return norm.reciprocal().masked_fill(norm <= torch.finfo(v.dtype).tiny ** 0.5, 0.0)


@register_distance("mahalanobis")
class Mahalanobis(Distance):
    """√((x − w)ᵀ M (x − w)) = |L (x − w)|₂ with M = Lᵀ L learned, starting from the identity.

    The scale of L has no effect on HarMax. At x = w the distance is 0 for every L.

    Args:
        metric: "diagonal", L = diag(e^s) with s = `log_scale` (D,). "low_rank", L = I + A B with A = `left` (D, r),
            initially 0, and B = `right` (r, D), initially from N(0, 1/D), so that A has a gradient. "full", L = Cᵀ with
            a lower triangular C (M = C Cᵀ): `factor` (D, D) below the diagonal, exp of its diagonal on it.
        rank: r of "low_rank", at most D.

    w′ and its gradients cost 12 V D r FLOPs ("low_rank") or 6 V D² ("full") for any number of tokens: 2 r/N or D/N of
    the loss's products for N tokens.
    """

    METRICS: ClassVar = ("diagonal", "low_rank", "full")

    apart = True

    def __init__(self, dim: int, *, metric: str = "diagonal", rank: int | None = None) -> None:
        super().__init__(dim)
        if metric not in self.METRICS:
            raise ValueError(f"metric must be one of {', '.join(self.METRICS)}; got {metric!r}")
        if metric == "low_rank" and rank is None:
            raise ValueError('rank is required with metric = "low_rank"')
        if metric != "low_rank" and rank is not None:
            raise ValueError(f'rank = {rank} has no effect with metric = "{metric}": remove it, or set "low_rank"')
        if rank is not None and not 1 <= rank <= dim:
            raise ValueError(f"rank must lie between 1 and the width of the vectors, {dim}; got {rank}")
        self.metric = metric
        if metric == "diagonal":
            self.log_scale = nn.Parameter(torch.empty(dim))
        elif rank is not None:
            self.left = nn.Parameter(torch.empty(dim, rank))
            self.right = nn.Parameter(torch.empty(rank, dim))
        else:
            self.factor = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.metric == "diagonal":
            nn.init.zeros_(self.log_scale)
        elif self.metric == "low_rank":
            nn.init.zeros_(self.left)
            nn.init.normal_(self.right, std=self.dim**-0.5)
        else:
            nn.init.zeros_(self.factor)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return self._transformed(x), self._transformed(w)

    def _transformed(self, v: Tensor) -> Tensor:
        """L v of rows, (..., D)."""
        if self.metric == "diagonal":
            return v * self.log_scale.to(v.dtype).exp()
        if self.metric == "low_rank":
            return v + v @ self.right.to(v.dtype).T @ self.left.to(v.dtype).T
        factor = self.factor.to(v.dtype)
        return v @ (factor.tril(-1) + factor.diagonal().exp().diag())


# ----------------------------------------------------------------------------------------------------------------------
# Distances in blocks. Their gradients are written by hand: autograd takes 2 to 4 times as long, and for distance and
# gradients together 2.3 (chebyshev) to 3.3 times (minkowski; blocks of 36 x 36 x 768, one CPU thread).


def _differences(x: Tensor, w: Tensor) -> Tensor:
    return x[:, None] - w  # (C, V′, D)


def _difference_gradients(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ g d with respect to x (C, D) and w (V′, D), from `slopes` = g ∂d/∂(x − w), (C, V′, D)."""
    return slopes.sum(1), slopes.sum(0).neg_()


@register_distance("manhattan")
class Manhattan(Distance):
    """Σ |x_k − w_k|."""

    power, traffic = None, 11.0

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        return _differences(x, w).abs_().sum(-1)

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return _difference_gradients(_differences(x, w).sign_().mul_(g[..., None]))


@register_distance("minkowski")
class Minkowski(Distance):
    """(Σ |x_k − w_k|^p)^(1/p), with ∂d/∂x_k = sign(x_k − w_k) (|x_k − w_k| / d)^(p − 1).

    |x_k − w_k| is divided by the pair's largest before it is raised to p: powers of small differences underflow in
    float32. p = 2 is Euclidean and computed by matrix products.

    Args:
        p: 1 (Manhattan) or more; its limit for p → ∞ is "chebyshev".
    """

    power, traffic = None, 27.0

    def __init__(self, dim: int, *, p: float) -> None:
        super().__init__(dim)
        if not 1 <= p < math.inf:
            raise ValueError(f'p must be a number of at least 1 (for infinity: distance = "chebyshev"); got {p}')
        self.p = float(p)
        if p == 2:
            self.power = 1.0

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        a = _differences(x, w).abs_()
        largest = a.amax(-1, keepdim=True)
        a.div_(largest.clamp_min(torch.finfo(x.dtype).tiny))
        return a.pow_(self.p).sum(-1).pow_(1 / self.p).mul_(largest[..., 0])

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        slopes = _differences(x, w).div_(d[..., None])
        # Rounding may make a quotient larger than 1, and its powers large.
        magnitudes = slopes.abs().clamp_max_(1.0).pow_(self.p - 1)
        return _difference_gradients(slopes.sign_().mul_(magnitudes).mul_(g[..., None]))


@register_distance("chebyshev")
class Chebyshev(Distance):
    """max |x_k − w_k|; its gradient goes to the first k that attains it."""

    power, traffic = None, 8.0

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        return _differences(x, w).abs_().amax(-1)

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        differences = _differences(x, w)
        at = differences.abs().argmax(-1)  # (C, V′)
        slopes = differences.gather(-1, at[..., None])[..., 0].sign_().mul_(g)
        grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
        return grad_x.scatter_add_(1, at, slopes), grad_w.scatter_add_(1, at.T, slopes.T.neg())


@register_distance("canberra")
class Canberra(Distance):
    """Σ |x_k − w_k| / (|x_k| + |w_k|): between 0 and D, each coordinate on its own scale.

    A coordinate that is 0 in both contributes 0, as in SciPy. The denominator is clamped at 1e-19 (in float32), so that
    gradients stay finite. A coordinate whose signs differ contributes 1 and has no gradient.
    """

    power, traffic = None, 33.0

    def _sums(self, x: Tensor, w: Tensor) -> Tensor:
        return (x.abs()[:, None] + w.abs()).clamp_min_(torch.finfo(x.dtype).tiny ** 0.5)  # (C, V′, D)

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        return _differences(x, w).abs_().div_(self._sums(x, w)).sum(-1)

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        differences, sums = _differences(x, w), self._sums(x, w)
        # ∂/∂x_k with s = |x_k| + |w_k|: sign(x_k − w_k) / s − sign(x_k) |x_k − w_k| / s².
        through_sums = differences.abs().div_(sums)
        weights = g[..., None] / sums
        through_sums.mul_(weights)
        grad_x, grad_w = _difference_gradients(differences.sign_().mul_(weights))
        return grad_x.sub_(x.sign() * through_sums.sum(1)), grad_w.sub_(w.sign() * through_sums.sum(0))


@register_distance("bray_curtis")
class BrayCurtis(Distance):
    """Σ |x_k − w_k| / (|x|₁ + |w|₁): Manhattan divided by its largest possible value, between 0 and 1.

    The denominator is clamped at 1e-19 (in float32).
    """

    power, traffic = None, 11.0

    def _sums(self, x: Tensor, w: Tensor) -> Tensor:
        sums = x.abs().sum(-1)[:, None] + w.abs().sum(-1)
        return sums.clamp_min_(torch.finfo(x.dtype).tiny ** 0.5)  # (C, V′)

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        return _differences(x, w).abs_().sum(-1).div_(self._sums(x, w))

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        weights = g / self._sums(x, w)
        grad_x, grad_w = _difference_gradients(_differences(x, w).sign_().mul_(weights[..., None]))
        through_sums = weights * d
        return (
            grad_x.sub_(x.sign() * through_sums.sum(1, keepdim=True)),
            grad_w.sub_(w.sign() * through_sums.sum(0)[:, None]),
        )


@register_distance("hamming")
class Hamming(Manhattan):
    """(1/D) Σ |σ(x_k/τ) − σ(w_k/τ)|, with σ(a) = 1/(1 + e^(−a)): a smooth share of coordinates that differ.

    For τ → 0 the share of coordinates whose signs differ; for τ far above the coordinates, Manhattan / (4 D τ).
    Coordinates far above τ have almost no gradient. Computed as ½ |tanh(x_k/2τ) − tanh(w_k/2τ)|, which keeps small
    differences exact.

    Args:
        temperature: τ, in the unit of the hidden states, whose scale `final_norm_gain` sets.
    """

    def __init__(self, dim: int, *, temperature: float = 1.0) -> None:
        super().__init__(dim)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number; got {temperature}")
        self.temperature = float(temperature)

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        halved = 0.5 / self.temperature
        share = 0.5 / self.dim
        return torch.tanh(x * halved) * share, torch.tanh(w * halved) * share


# ----------------------------------------------------------------------------------------------------------------------
# All pairs, block by block


def memory_of(device: torch.device | str) -> int:
    """Bytes of temporaries of a distance in blocks, without operands and gradients."""
    return _MEMORY_CPU if torch.device(device).type == "cpu" else _MEMORY_GPU


def score_chunk(num_classes: int, itemsize: int, device: torch.device | str) -> int:
    """C: tokens whose three (C, V) tensors of scores take half of `memory_of`; at least 1."""
    return max(1, memory_of(device) // (2 * _SCORE_TENSORS * num_classes * itemsize))


def _blocks(x: Tensor, w: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows of x, rows of w), nearly square, whose eight (C, V′, D) tensors take half of `memory_of`."""
    pairs = max(1, memory_of(x.device) // (2 * _BLOCK_TENSORS * x.shape[1] * x.itemsize))
    rows = _part_size(len(x), max(1, math.isqrt(pairs)))
    columns = _part_size(len(w), max(1, pairs // rows))
    for i in range(0, len(x), rows):
        for j in range(0, len(w), columns):
            yield slice(i, i + rows), slice(j, j + columns)


def _part_size(count: int, largest: int) -> int:
    """Size of nearly equal parts of `count`, between 1 and `largest`."""
    return max(1, -(-count // max(1, -(-count // largest))))


def distances_in_blocks(metric: Distance, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x (C, D), w (V, D) → d (C, V) of all pairs, clamped at the floor, and the floor (C, 1); no gradient."""
    d, floor = x.new_empty(len(x), len(w)), x.new_empty(len(x), 1)
    for rows, _ in _blocks(x, x[:1]):
        floor[rows] = metric.floor(x[rows])
    for rows, columns in _blocks(x, w):
        d[rows, columns] = metric.pairwise(x[rows], w[columns])
    return torch.where(d <= floor, floor, d), floor  # `d <= floor` is false for nan, which stays


def add_gradients_in_blocks(
    metric: Distance, x: Tensor, w: Tensor, d: Tensor, g: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Add the gradients of Σ g d to `grads`: those of x (C, D), of w (V, D) and of each parameter of the distance."""
    grad_x, grad_w, *others = grads
    for rows, columns in _blocks(x, w):
        by_x, by_w, *by_parameters = metric.gradients(x[rows], w[columns], d[rows, columns], g[rows, columns])
        grad_x[rows] += by_x
        grad_w[columns] += by_w
        for total, share in zip(others, by_parameters, strict=True):
            total += share


class _PairwiseDistances(torch.autograd.Function):
    """d (N, V) of all pairs; keeps no (N, V, D) tensor for the backward pass."""

    @staticmethod
    def forward(ctx: Any, metric: Distance, x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            d, floor = distances_in_blocks(metric, x, w)
        ctx.metric = metric
        ctx.save_for_backward(x, w, d, floor, *parameters)
        return d

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would treat these gradients as constants
            raise RuntimeError("a distance in blocks has no second derivative (create_graph=True)")
        x, w, d, floor, *parameters = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in (x, w, *parameters))
        with torch.autocast(x.device.type, enabled=False):
            add_gradients_in_blocks(ctx.metric, x, w, d, grad_output.masked_fill(d <= floor, 0.0), grads)
        return (None, *grads)


@torch.compiler.disable
def pairwise_distances(metric: Distance, x: Tensor, w: Tensor) -> Tensor:
    """d of all pairs, x′ (N, D), w′ (V, D) → (N, V), float32 or float64, clamped at `metric.floor(x)`.

    For a `metric` with `power = None`. Gradients reach x, w and the metric's parameters; a second derivative raises
    RuntimeError. torch.compile breaks the graph here.
    """
    return _PairwiseDistances.apply(metric, x, w, *metric.parameters())
