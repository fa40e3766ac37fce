"""The distances of a harmonic head: what each computes, how it is computed, and how to add one.

A `Distance` says what d(x, w) is for hidden states x (N, D) and centres w (V, D):

    x′, w′ = distance(x, w)                   x and w themselves unless it says otherwise
    d = scale · |x′ − w′|₂^power              where `power` is a number: the head's loss is then matrix products
    d = distance.pairwise(x′, w′)             otherwise, in blocks of (C, D) and (V′, D)

HarMax is p_i = d_i^(−n) / Σ_j d_j^(−n) with the same n for each. A constant factor on d changes nothing.

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

They are those of scipy.spatial.distance where it has them. Its braycurtis divides by Σ |x_k + w_k|, which is the same
for vectors without negative entries and no distance for others; its hamming compares for equality. The choice follows
Miller-Golub et al., arXiv:2603.10225.

Near zero. A d below `Distance.floor(x)`, a few units in the last place of x's own distance from the origin, is rounding
noise: it is clamped to that floor and passes no gradient, so x = w has a finite loss. At its kink, x_k = w_k, the
gradient of |x_k − w_k| is 0. The gradient of a maximum goes to the first coordinate that attains it.
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

# Bytes that a distance in blocks works with: one half for the (C, V′, D) tensors of a block, eight of them at a time,
# the other for a chunk's scores, three tensors (C, V). On a CPU that makes tensors of 4 MiB, twice as fast as 256 KiB
# or 16 MiB (one thread, D = 768). On a GPU not measured.
_MEMORY_CPU, _MEMORY_GPU = 64 * 2**20, 512 * 2**20
_BLOCK_TENSORS, _SCORE_TENSORS = 8, 3

_ROUNDING_ULPS = 4.0


class Distance(nn.Module):
    """A distance between hidden states and centres; d = |x − w|₂ unless a subclass says otherwise.

    A subclass that is no power of a Euclidean distance sets `power = None` and defines `pairwise`. Its `gradients` are
    then autograd's of a recomputed block; where that is slow they may be written by hand. Options are keyword-only
    arguments of `__init__` with their defaults. What is learned is an `nn.Parameter`, whose initial value
    `reset_parameters` sets by `torch.nn.init`.

    Attributes:
        power, scale: d = scale · |x′ − w′|₂^power; `power = None` where that is not so.
        apart: whether `forward` makes x′ of x alone and w′ of w alone. Then generation computes w′ once for a text, not
            for each of its tokens.
        traffic: how often the loss and its gradients read or write a tensor of the size (tokens, V, D), by which
            `hgpt.plan` estimates their time; only without a power.
        options: those it was made with, as `make_distance` takes them.
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
        """Set the initial values of what is learned."""

    @property
    def transforms(self) -> bool:
        """Whether x′ and w′ are not simply x and w."""
        return type(self).forward is not Distance.forward

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """x′, w′ of x (..., D) and w (V, D), float32 or float64, in the same dtype."""
        return x, w

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        """d of every pair in a block, (C, D), (V′, D) → (C, V′), of the operands that `forward` returned.

        It has to be finite with finite derivatives, at x = w and x = 0 too. d(x, 0) tells `floor` how large x is:
        distances below 1e-6 times that (in float32) count as rounding noise, unless `floor` is defined anew.
        """
        raise NotImplementedError(f"{type(self).__name__} has no power and no pairwise value")

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Gradients of Σ g d by x (C, D), by w (V′, D) and by each of `parameters()`, from d and g (C, V′).

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
        """The smallest d that counts, (C, D) → (C, 1): four units in the last place of d(x, 0), and never 0."""
        limits = torch.finfo(x.dtype)
        origin = self.pairwise(x, x.new_zeros(1, x.shape[1]))
        return (_ROUNDING_ULPS * limits.eps * origin).clamp_min(limits.tiny**0.75)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


# ----------------------------------------------------------------------------------------------------------------------
# The registry

_REGISTRY: dict[str, type[Distance]] = {}


def register_distance(name: str) -> Callable[[type[Distance]], type[Distance]]:
    """Class decorator: makes a `Distance` known under `name` to heads, configurations and checkpoints.

    Raises:
        ValueError: when another class has that name, or one of hgpt's own distances.
        TypeError: when the class is no `Distance`.
    """

    def register(cls: type[Distance]) -> type[Distance]:
        if not (isinstance(cls, type) and issubclass(cls, Distance)):
            raise TypeError(f"register_distance({name!r}) is for subclasses of hgpt.Distance; got {cls!r}")
        known = _REGISTRY.get(name)
        # A notebook's cell or a file that is executed again registers the same class once more.
        own = known is not None and known.__module__ == __name__ != cls.__module__
        if known is not None and (own or known.__qualname__ != cls.__qualname__):
            raise ValueError(f"there is a distance {name!r} already, {known.__qualname__}: choose another name")
        _REGISTRY[name] = cls
        return cls

    return register


def load_distances(file: str) -> None:
    """Execute a Python file that calls `register_distance`, unless that was done before.

    Raises:
        ValueError: a file that cannot be executed, or that registers nothing.
    """
    _load_distances(Path(file).resolve())


@functools.cache
def _load_distances(path: Path) -> None:
    before = dict(_REGISTRY)
    try:
        runpy.run_path(str(path))
    except Exception as error:  # whatever somebody's own file does
        raise ValueError(f"{path} cannot be executed: {type(error).__name__}: {error}") from error
    if before == _REGISTRY:
        raise ValueError(f"{path} registers no distance: it has to use @hgpt.register_distance")


def distance_names() -> tuple[str, ...]:
    """Names of all distances that can be chosen."""
    return tuple(_REGISTRY)


def make_distance(name: str, dim: int, **options: Any) -> Distance:
    """The distance `name` for vectors of width `dim`; an option that is None counts as not given.

    Raises:
        ValueError: an unknown name (naming those that exist), an option that the distance does not have or that is
            out of range.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"distance must be one of {', '.join(distance_names())}; got {name!r}. One of your own is known only after "
            "the file that calls hgpt.register_distance was imported, one of a newer hgpt only to that version"
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
    except TypeError as error:  # text for a number in a checkpoint, for example
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

    |x̂ − ŵ|² comes from the squared norms of the very operands that enter the product, so that their rounding to
    bfloat16 cancels near 0; in 1 − x̂·ŵ it does not. In float32 angles below 1e-3 count as the floor's. A vector shorter
    than 1e-19 (in float32) counts as 0: its distance from all others is ½, and it gets no gradient.
    """

    power, scale, apart = 2.0, 0.5, True

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _Direction.apply(x), _Direction.apply(w)


class _Direction(torch.autograd.Function):
    """v̂ = v / |v| of rows, (..., D); 0, without a gradient, where |v|² would leave the dtype's range.

    ∂L/∂v = (g − (g·v̂) v̂) / |v|. Autograd's takes 2.4 times as long (R = 16384, D = 768, one CPU thread) and three more
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

    HarMax does not see the scale of L. At x = w the distance is 0 whatever L.

    Args:
        metric: "diagonal", L = diag(e^s) with s = `log_scale` (D,). "low_rank", L = I + A B with A = `left` (D, r),
            which starts at 0, and B = `right` (r, D), which starts at N(0, 1/D), so that A has a gradient. "full",
            L = Cᵀ with a lower triangular C (M = C Cᵀ): below its diagonal that of `factor` (D, D), on it e^(that of
            `factor`).
        rank: r of "low_rank", at most D.

    Making w′ and its gradients costs V·D·r·12 FLOPs ("low_rank") or V·D²·6 ("full") however many tokens there are: for
    N tokens at a time 2 r/N or D/N of what the loss's own products cost.
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
# Distances in blocks. Their gradients are written by hand: autograd's take 2 to 4 times as long, and a distance and its
# gradients together 2.3 (chebyshev) to 3.3 times (minkowski; blocks of 36 x 36 x 768, one CPU thread).


def _differences(x: Tensor, w: Tensor) -> Tensor:
    return x[:, None] - w  # (C, V′, D)


def _difference_gradients(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Σ g d by x and w from g ∂d/∂(x − w), (C, V′, D)."""
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

    Powers are taken of |x_k − w_k| over the pair's largest: those of small differences would leave float32's range.
    p = 2 is Euclid's and goes through the matrix product.

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
        # Rounding may take a quotient above 1, whose powers would grow.
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

    A coordinate that is 0 in both counts 0, as in SciPy; one that is below 1e-19 in both (in float32) counts less than
    it should, so that gradients stay finite. Where the signs differ a coordinate counts 1 and has no gradient.
    """

    power, traffic = None, 33.0

    def _sums(self, x: Tensor, w: Tensor) -> Tensor:
        return (x.abs()[:, None] + w.abs()).clamp_min_(torch.finfo(x.dtype).tiny ** 0.5)  # (C, V′, D)

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        return _differences(x, w).abs_().div_(self._sums(x, w)).sum(-1)

    def gradients(self, x: Tensor, w: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        differences, sums = _differences(x, w), self._sums(x, w)
        # By x_k, with s = |x_k| + |w_k|: sign(x_k − w_k) / s − sign(x_k) |x_k − w_k| / s².
        falling = differences.abs().div_(sums)
        weights = g[..., None] / sums
        falling.mul_(weights)
        grad_x, grad_w = _difference_gradients(differences.sign_().mul_(weights))
        return grad_x.sub_(x.sign() * falling.sum(1)), grad_w.sub_(w.sign() * falling.sum(0))


@register_distance("bray_curtis")
class BrayCurtis(Distance):
    """Σ |x_k − w_k| / (|x|₁ + |w|₁): Manhattan over the most it could be, between 0 and 1.

    Two vectors whose norms add up to less than 1e-19 (in float32) count as nearer than they are.
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
        falling = weights * d
        return (
            grad_x.sub_(x.sign() * falling.sum(1, keepdim=True)),
            grad_w.sub_(w.sign() * falling.sum(0)[:, None]),
        )


@register_distance("hamming")
class Hamming(Manhattan):
    """(1/D) Σ |σ(x_k/τ) − σ(w_k/τ)|, with σ(a) = 1/(1 + e^(−a)): the share of coordinates that differ, made soft.

    For τ → 0 it counts the coordinates whose signs differ, for τ far above the coordinates it is Manhattan / (4 D τ).
    Coordinates far above τ have hardly a gradient. Computed by tanh, ½ |tanh(x_k/2τ) − tanh(w_k/2τ)|, which keeps small
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
    """Bytes that the distances in blocks work with, beside operands and gradients."""
    return _MEMORY_CPU if torch.device(device).type == "cpu" else _MEMORY_GPU


def score_chunk(num_classes: int, itemsize: int, device: torch.device | str) -> int:
    """Tokens whose scores, (C, V), with all that is needed beside them take half of `memory_of`; at least 1."""
    return max(1, memory_of(device) // (2 * _SCORE_TENSORS * num_classes * itemsize))


def _blocks(x: Tensor, w: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows of x and of w, nearly square, whose (C, V′, D) tensors together take half of `memory_of`."""
    pairs = max(1, memory_of(x.device) // (2 * _BLOCK_TENSORS * x.shape[1] * x.itemsize))
    rows = _even(len(x), max(1, math.isqrt(pairs)))
    columns = _even(len(w), max(1, pairs // rows))
    for i in range(0, len(x), rows):
        for j in range(0, len(w), columns):
            yield slice(i, i + rows), slice(j, j + columns)


def _even(count: int, most: int) -> int:
    """The size of equal parts of `count`, none larger than `most`; at least 1."""
    return max(1, -(-count // max(1, -(-count // most))))


def distances_in_blocks(metric: Distance, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """d (C, V) of all pairs, clamped at the floor (C, 1), which comes with it; without a gradient."""
    d, floor = x.new_empty(len(x), len(w)), x.new_empty(len(x), 1)
    for rows, _ in _blocks(x, x[:1]):
        floor[rows] = metric.floor(x[rows])
    for rows, columns in _blocks(x, w):
        d[rows, columns] = metric.pairwise(x[rows], w[columns])
    return torch.where(d <= floor, floor, d), floor  # asked this way round, a nan stays a nan


def add_gradients_in_blocks(
    metric: Distance, x: Tensor, w: Tensor, d: Tensor, g: Tensor, grads: tuple[Tensor, ...]
) -> None:
    """Add the gradients of Σ g d to `grads`: by x (C, D), by w (V, D), and by each parameter of the distance."""
    grad_x, grad_w, *others = grads
    for rows, columns in _blocks(x, w):
        by_x, by_w, *by_parameters = metric.gradients(x[rows], w[columns], d[rows, columns], g[rows, columns])
        grad_x[rows] += by_x
        grad_w[columns] += by_w
        for total, share in zip(others, by_parameters, strict=True):
            total += share


class _PairwiseDistances(torch.autograd.Function):
    """d (N, V) of all pairs; nothing of the size (N, V, D) is kept for the backward pass."""

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

    `metric` has no power. Gradients reach x, w and its parameters; a second derivative raises RuntimeError. For
    torch.compile this is a break in the graph.
    """
    return _PairwiseDistances.apply(metric, x, w, *metric.parameters())
