"""The two unembeddings: `head(x)` returns logits z with p = softmax(z), `head(x, targets)` the loss −log p_y.

    harmonic    z_i = −n log d_i    so p_i = d_i^(−n) / Σ_j d_j^(−n), HarMax; d_i = |x − w_i|₂, or another distance
    softmax     z_i = w_i · x       a linear layer without bias, as `lm_head` of nanoGPT and GPT-2

With `radius=True` a learned log-weight a_i is added to z_i. In the harmonic head a_i = n log ρ_i with a radius ρ_i, so
p_i ∝ (d_i / ρ_i)^(−n); in softmax a_i is the bias.

`HarmonicHead` is the harmonic distance layer of Baek et al., arXiv:2502.01628. `HGPTForCausalLM` uses either head; both
work as the last layer of any classifier.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distances import make_distance, pairwise_distances
from .harmax import (
    accumulation_dtype,
    inner_products,
    relative_distances,
    resolve_exponent,
    squared_distances,
    squared_norms,
)
from .loss import LossParams, head_loss


class _Head(nn.Module):
    """Base class of both heads.

    Attributes:
        weight: (rows, D), one row per class, then padding rows.
        log_weight: a_i (rows,), in nats, initially 0; None without radii.
    """

    exponent: Any  # n on d; None for softmax
    metric: Any  # the distance; None for softmax

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        rows: int | None,
        init_std: float,
        label_smoothing: float,
        radius: bool,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = num_classes
        self.init_std = init_std
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(num_classes if rows is None else rows, in_features))
        self.log_weight = nn.Parameter(torch.empty(len(self.weight))) if radius else None
        if not 1 <= num_classes <= len(self.weight):
            raise ValueError(
                f"num_classes must lie between 1 and the number of rows, {len(self.weight)}; got {num_classes}"
            )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.log_weight is not None:
            nn.init.zeros_(self.log_weight)

    def forward(self, x: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """`logits(x)`, or with `targets` `loss(x, targets, **options)`.

        Under an engine that shards parameters, call the module, not its methods: the call gathers the weight.
        """
        return self.logits(x) if targets is None else self.loss(x, targets, **options)

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """−log p_y of x (..., D) and `targets` (...), without the logits.

        In training mode with `label_smoothing` ε, −Σ_i q_i log p_i with q = (1 − ε) 1[i = y] + ε / num_classes.

        Args:
            options: `ignore_index`, `num_items`, `reduction` and `recompute` of `loss.LossParams`.
        """
        params = LossParams(
            n=self.exponent,
            distance=self.metric,
            log_weight=self.log_weight,
            num_classes=self.num_classes,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            **options,
        )
        x, w = self._operands(x, self.weight)
        return head_loss(x, w, targets, params)

    def _weighted(self, logits: Tensor) -> Tensor:
        """logits + a, (..., num_classes), in place when no gradient is needed."""
        if self.log_weight is None:
            return logits
        a = self.log_weight[: self.num_classes].to(logits.dtype)
        return logits + a if logits.requires_grad or (a.requires_grad and torch.is_grad_enabled()) else logits.add_(a)

    def _operands(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """x and w in the dtype of the products: autocast's if it is enabled, otherwise that of x."""
        if x.shape[-1] != w.shape[-1]:
            raise ValueError(f"x and w must have the same width: x is {tuple(x.shape)}, w is {tuple(w.shape)}")
        dtype = _compute_dtype(x)
        return x.to(dtype), w.to(dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "bias":  # a caller that reads it would compute x @ weight.T + bias
            raise AttributeError(
                f"{type(self).__name__} has no bias: its logits are not x @ weight.T + bias (distances, padding rows, "
                "log-weights); call the head, or the model without this shortcut"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, rows={len(self.weight)}"
        text += "" if self.log_weight is None else ", radius=True"
        return f"{text}, label_smoothing={self.label_smoothing:g}" if self.label_smoothing else text


class SoftmaxHead(_Head):
    """logits_i = w_i · x, or with `radius=True` w_i · x + a_i."""

    exponent = metric = None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        init_std: float = 0.02,
        rows: int | None = None,
        radius: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_classes, rows, init_std, label_smoothing, radius)
        self.reset_parameters()

    def logits(self, x: Tensor) -> Tensor:
        """w_i · x + a_i, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        x, w = self._operands(x, self.weight[: self.num_classes])
        with torch.autocast(x.device.type, enabled=False):
            products = inner_products(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], len(w))
            return self._weighted(products)


class HarmonicHead(_Head):
    """logits_i = −n log d(x, w_i), so softmax(logits) = HarMax = d_i^(−n) / Σ_j d_j^(−n).

    With `radius=True` logits_i = −n log d(x, w_i) + a_i, i.e. p_i ∝ (d_i / ρ_i)^(−n) with ρ_i = exp(a_i / n).

    Replaces the last `nn.Linear` of a classifier:

        >>> head = HarmonicHead(64, num_classes=10)           # or (64, 10, distance="minkowski", p=3)
        >>> loss = F.cross_entropy(head(features), labels)    # or head(features, labels), without the logits

    Args:
        in_features: D, the width of x.
        num_classes: V, the number of classes.
        exponent: n on d: a number, "sqrt_dim" (the default: √D, as in arXiv:2502.01628), "dim" or a multiple,
            "2*sqrt_dim".
        distance: what d is, by default |x − w_i|₂; `hgpt.model.distances` has the list.
        init_std: standard deviation of the normal distribution of the initial centres; default 1/√D, for centres of
            norm about 1. Scaling x and w together does not change HarMax, but the optimiser's steps do not scale with
            the weights: hidden states should have about the norm of the centres.
        rows: rows of the weight, at least `num_classes` (the default); the rest is padding without probability.
        learn_exponent: train n as the parameter `log_exponent` = log n, (1,): n stays positive, and the optimiser's
            steps are relative to n.
        radius: train a radius of each class as the parameter `log_weight` = a = n log ρ, (rows,), initially 0. Set it
            to the logarithms of the classes' frequencies if these are unequal. Train it without weight decay.
        label_smoothing: ε of the loss in training mode.
        options: options of the distance, such as p of "minkowski".

    Attributes:
        metric: the `Distance`, with its learned parameters.
        log_weight: a_i in nats, (rows,); None without radii.
    """

    # All settings in one call, as torch.nn's layers have them: who replaces an nn.Linear makes no object of settings.
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        exponent: float | str = "sqrt_dim",
        *,
        distance: str = "euclidean",
        init_std: float | None = None,
        rows: int | None = None,
        learn_exponent: bool = False,
        radius: bool = False,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        init_std = in_features**-0.5 if init_std is None else init_std
        super().__init__(in_features, num_classes, rows, init_std, label_smoothing, radius)
        self.distance = distance
        self.metric = make_distance(distance, in_features, **options)
        self.initial_exponent = resolve_exponent(exponent, in_features)
        self.log_exponent = nn.Parameter(torch.empty(1)) if learn_exponent else None
        self._cache = _Cache()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.log_exponent is not None:
            nn.init.constant_(self.log_exponent, math.log(self.initial_exponent))
        self.metric.reset_parameters()

    @property
    def exponent(self) -> float | Tensor:
        """n on d: a number, or a tensor of shape () if it is learned."""
        return self.initial_exponent if self.log_exponent is None else self.log_exponent.exp().squeeze()

    def logits(self, x: Tensor) -> Tensor:
        """−n log d_i + a_i, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        return self._weighted(_scaled(self.log_distances(x), -self.exponent))

    def relative_distances(self, log_probs: Tensor) -> Tensor:
        """`harmax.relative_distances` with the exponent and the radii of this head, (..., num_classes)."""
        a = None if self.log_weight is None else self.log_weight[: self.num_classes]
        return relative_distances(log_probs, self.exponent, a)

    @property
    def radii(self) -> Tensor:
        """ρ_i = exp(a_i / n), (num_classes,); 1 without `radius=True`. Only their ratios have an effect."""
        if self.log_weight is None:
            return self.weight.new_ones(self.num_classes)
        return (self.log_weight[: self.num_classes] / self.exponent).exp()

    def distances(self, x: Tensor) -> Tensor:
        """d_i to every class, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        return self.log_distances(x).exp()

    def log_distances(self, x: Tensor) -> Tensor:
        """log d_i to every class, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        metric = self.metric
        if metric.power is None:
            rows, w = self._operands(x.reshape(-1, x.shape[-1]), self.weight[: self.num_classes])
            return pairwise_distances(metric, rows, w).log().reshape(*x.shape[:-1], len(w))
        x, w, w_sq = self._operands_and_norms(x)
        with torch.autocast(x.device.type, enabled=False):
            d_sq = squared_distances(x, w, w_sq)[..., : self.num_classes]
            log_d = _scaled(d_sq.log() if d_sq.requires_grad else d_sq.log_(), 0.5 * metric.power)
        return log_d if metric.scale == 1 else log_d + math.log(metric.scale)

    @contextmanager
    def unchanged_centres(self) -> Iterator[None]:
        """Context in which w′ and |w′|² are computed once and cached, for logits and distances without gradients.

        Generation uses it. Each thread has its own cache. It detects in-place changes of a weight, except in compiled
        code, in inference mode or through `.data`.
        """
        outer, self._cache.entries = self._cache.entries, {}
        try:
            yield
        finally:
            self._cache.entries = outer

    def _operands(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """x′ and w′ of the distance, computed in the accumulation dtype; for products, cast to the compute dtype."""
        metric = self.metric
        if metric.power is not None and not metric.transforms:
            return super()._operands(x, w)
        dtype = accumulation_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            exact_x, exact_w = metric(*super()._operands(x.to(dtype), w))
        dtype = dtype if metric.power is None else _compute_dtype(x)
        return exact_x.to(dtype), exact_w.to(dtype)

    def _operands_and_norms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_operands`, and |w′|² (V,) from the cache, or None if nothing may be cached."""
        metric, cache = self.metric, self._cache.entries
        if cache is None or torch.is_grad_enabled() or (metric.transforms and not metric.apart):
            return *self._operands(x, self.weight), None
        key = _compute_dtype(x), x.device, _versions(self.weight, *metric.parameters())
        if key not in cache:
            w = self._operands(x, self.weight)[1]
            # Do not cache the weight itself: an engine that shards it frees it after each call.
            cache[key] = w if metric.transforms else None, squared_norms(w)
        kept, w_sq = cache[key]
        if kept is None:
            return *self._operands(x, self.weight), w_sq
        return self._operands(x, self.weight[:0])[0], kept, w_sq

    def extra_repr(self) -> str:
        learned = "" if self.log_exponent is None else " (learned)"
        n = float(torch.as_tensor(self.exponent).detach())
        return f"{super().extra_repr()}, exponent={n:g}{learned}, distance={self.distance}"


class HarmonicLoss(nn.Module):
    """−log p_y with p = HarMax, for networks that return distances: replaces `nn.CrossEntropyLoss`.

        >>> loss = HarmonicLoss(exponent=8)(distances, labels)

    `HarmonicHead(x, labels)` is faster and more exact: it needs no matrix of distances.

    Args:
        exponent: n on d, a positive number.
        options: those of `nn.CrossEntropyLoss`: weight, ignore_index, reduction, label_smoothing.
    """

    def __init__(self, exponent: float, **options: Any) -> None:
        super().__init__()
        if not 0 < exponent < math.inf:
            raise ValueError(f"exponent (n on the distance d) must be a positive number; got {exponent!r}")
        self.exponent = exponent
        self.cross_entropy = nn.CrossEntropyLoss(**options)

    def forward(self, distances: Tensor, targets: Tensor) -> Tensor:
        """`distances` d ≥ 0 (N, V) or (N, V, ...), `targets` (N) or (N, ...). d is clamped at the smallest float."""
        d = distances.to(accumulation_dtype(distances.dtype))
        return self.cross_entropy(-self.exponent * d.clamp_min(torch.finfo(d.dtype).tiny).log(), targets)


class _Cache(threading.local):
    """Cache of `unchanged_centres`, one per thread: key → (w′ or None, |w′|²). None outside the context."""

    entries: dict[Any, tuple[Tensor | None, Tensor]] | None = None

    def __reduce__(self) -> Any:
        return _Cache, ()  # copying or unpickling a head empties the cache


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """How often each tensor was changed in place; () where PyTorch does not count."""
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return ()
    return tuple(tensor._version for tensor in tensors)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _scaled(values: Tensor, factor: float | Tensor) -> Tensor:
    """values * factor, in place when no gradient is needed."""
    if torch.is_grad_enabled() and (values.requires_grad or (isinstance(factor, Tensor) and factor.requires_grad)):
        return values * factor
    return values.mul_(factor)
