"""The two unembeddings, as modules of one interface: `head(x)` gives logits, `head(x, targets)` the loss.

`HarmonicHead` is the harmonic distance layer of arXiv:2502.01628; `SoftmaxHead` its twin, a linear layer
without bias. Both are used by `HGPTForCausalLM`, and `HarmonicHead` stands on its own as the last layer of
any classifier trained with `torch.nn.functional.cross_entropy`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distances import make_distance, pairwise_distances
from .harmax import accumulation_dtype, inner_products, resolve_exponent, squared_distances, squared_norms
from .loss import fused_harmonic_loss, fused_softmax_loss
from .pairwise_loss import pairwise_harmonic_loss


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _times(values: Tensor, factor: float | Tensor) -> Tensor:
    """`values` times a number: in their own memory, which is new to nobody, where no gradient is to come of it."""
    if torch.is_grad_enabled() and (values.requires_grad or (isinstance(factor, Tensor) and factor.requires_grad)):
        return values * factor
    return values.mul_(factor)


class _Head(nn.Module):
    """One row of `weight` for each class, and rows of padding after them that never become a class."""

    def __init__(
        self, in_features: int, num_classes: int, rows: int | None, label_smoothing: float, chunk: int | None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.label_smoothing = label_smoothing
        self.chunk = chunk
        self.compiled = False  # of the fused loss, as its argument
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.empty(num_classes if rows is None else rows, in_features))
        if not 1 <= num_classes <= self.weight.shape[0]:
            raise ValueError(
                f"num_classes must lie between 1 and the number of rows, {self.weight.shape[0]}; got {num_classes}"
            )

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        ignore_index: int = -100,
        num_items: Tensor | float | None = None,
        reduction: str = "mean",
        recompute: bool = False,
    ) -> Tensor:
        """`logits(x)`, or with `targets` `loss(x, targets)`.

        One entry for both uses, and the only place where the weight is read: engines that shard parameters
        gather them when a module is called.
        """
        if targets is None:
            return self.logits(x)
        return self.loss(
            x, targets, ignore_index=ignore_index, num_items=num_items, reduction=reduction, recompute=recompute
        )

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """−log p_y of `targets` (...), without the logits of x, (..., D).

        Args:
            ignore_index: target of positions that do not count, default −100.
            reduction: "mean" (default), "sum" or "none".
            num_items: divisor of the sum, with "mean"; default the number of counted positions.
            recompute: keep no gradients for the backward pass, which then computes the products again.

        In training mode with `label_smoothing` ε, −Σ_i q_i log p_i with q = (1 − ε) 1[i = y] + ε / num_classes; in
        evaluation mode never.
        """
        raise NotImplementedError

    def _loss_options(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "label_smoothing": self.label_smoothing if self.training else 0.0}

    def _fused_options(self) -> dict[str, Any]:
        return self._loss_options() | {"chunk": self.chunk, "compiled": self.compiled}

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and the weight in the compute dtype: autocast's where it is on, otherwise that of x."""
        dtype = _compute_dtype(x)
        return x.to(dtype), self.weight.to(dtype)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, rows={self.weight.shape[0]}"
        return f"{text}, label_smoothing={self.label_smoothing:g}" if self.label_smoothing else text


class HarmonicHead(_Head):
    """Logits z_i = −n log d_i of the distances to V centres, so softmax(logits) = HarMax = d_i^(−n) / Σ_j d_j^(−n).

    Works in place of the last `nn.Linear` of a classifier with a plain `F.cross_entropy` on its output:

        >>> head = HarmonicHead(in_features=64, num_classes=10)
        >>> loss = F.cross_entropy(head(features), labels)    # or head(features, labels), without the logits
        >>> head = HarmonicHead(in_features=64, num_classes=10, distance="minkowski", p=3)

    Args:
        in_features: D, the width of x.
        num_classes: V, the number of classes.
        exponent: n on d: a number, "sqrt_dim" (the default: √D, as in arXiv:2502.01628), "dim" or a multiple,
            "2*sqrt_dim".
        distance: what d is, by default |x − w_i|₂; `hgpt.model.distances` has the list.
        init_std: standard deviation of the normal distribution that the centres are drawn from; default
            1/√D, centres of norm about 1. HarMax does not see a common scale of x and w, but optimisers
            with absolute steps do: hidden states should be of about the centres' norm.
        rows: rows of the weight, at least `num_classes`; the rest is padding, which takes no probability.
        learn_exponent: n is trained too, as the parameter `log_exponent` = log n, (1,): n stays positive, and an
            optimiser's steps are relative.
        label_smoothing: ε of the loss in training mode.
        chunk: positions whose products the loss computes at a time; default `loss.chunk_positions`. Without
            effect on a distance without a matrix product.
        memory: bytes that a distance without a matrix product works with; default `distances.memory_of` the device.
        options: those of the distance, such as p of "minkowski".

    Attributes:
        metric: the `Distance`, whose parameters are what is learnt of it.
    """

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
        label_smoothing: float = 0.0,
        chunk: int | None = None,
        memory: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, rows, label_smoothing, chunk)
        self.distance = distance
        self.metric = make_distance(distance, in_features, **options)
        self.initial_exponent = resolve_exponent(exponent, in_features)
        self.log_exponent = nn.Parameter(torch.empty(1)) if learn_exponent else None
        self.init_std = in_features**-0.5 if init_std is None else init_std
        self.memory = memory
        # While the centres stay as they are: w′, None if that is the weight, and |w′|², by dtype and device.
        self._kept: dict[tuple[torch.dtype, torch.device], tuple[Tensor | None, Tensor]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.log_exponent is not None:
            nn.init.constant_(self.log_exponent, math.log(self.initial_exponent))
        self.metric.reset_parameters()

    @property
    def exponent(self) -> float | Tensor:
        """n on d: a number, or where it is learnt a tensor of shape ()."""
        return self.initial_exponent if self.log_exponent is None else self.log_exponent.exp().squeeze()

    def log_distances(self, x: Tensor) -> Tensor:
        """log d_i to every class, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        metric, shape = self.metric, (*x.shape[:-1], self.num_classes)
        if metric.power is None:
            x, w = self._exact_operands(x, self.weight[: self.num_classes])
            return pairwise_distances(metric, x.reshape(-1, x.shape[-1]), w, self.memory).log().reshape(shape)
        x, w, w_sq = self._operands_and_norms(x)
        with torch.autocast(x.device.type, enabled=False):
            d_sq = squared_distances(x, w, w_sq)[..., : self.num_classes]
            log_d = _times(d_sq.log() if d_sq.requires_grad else d_sq.log_(), 0.5 * metric.power)
        return log_d if metric.scale == 1 else log_d + math.log(metric.scale)

    def distances(self, x: Tensor) -> Tensor:
        """d_i to every class, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        return self.log_distances(x).exp()

    def logits(self, x: Tensor) -> Tensor:
        """z_i = −n log d_i, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        return _times(self.log_distances(x), -self.exponent)

    def loss(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        if self.metric.power is None:
            options |= self._loss_options()
            x, w = self._exact_operands(x, self.weight[: options.pop("num_classes")])
            return pairwise_harmonic_loss(self.metric, x, w, targets, self.exponent, memory=self.memory, **options)
        x, w = self._operands(x)
        return fused_harmonic_loss(x, w, targets, self.metric.power * self.exponent, **self._fused_options(), **options)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The distance's operands in the compute dtype, to which they are rounded once, at the end."""
        if not self.metric.transforms:
            return super()._operands(x)
        dtype = _compute_dtype(x)
        x, w = self._exact_operands(x, self.weight)
        return x.to(dtype), w.to(dtype)

    @contextmanager
    def unchanged_centres(self) -> Iterator[None]:
        """As long as this lasts nothing may change the weight or the metric: what is made of them is made only once.

        For the many calls with few x of a text that is generated. It concerns logits and distances without gradients.
        """
        outer, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = outer

    def _operands_and_norms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_operands`, and |w′|², (V,), where that is kept."""
        transforms = self.metric.transforms
        if self._kept is None or torch.is_grad_enabled() or (transforms and not self.metric.apart):
            return *self._operands(x), None
        place = _compute_dtype(x), x.device
        if place not in self._kept:
            x, w = self._operands(x)
            # Not the weight itself, which an engine that shards it takes away again.
            self._kept[place] = w if transforms else None, squared_norms(w)
            return x, w, self._kept[place][1]
        kept, w_sq = self._kept[place]
        if kept is None:
            return *self._operands(x), w_sq
        return self._exact_operands(x, self.weight[:0])[0].to(kept.dtype), kept, w_sq

    def _exact_operands(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The distance's operands in float32, or float64 for float64. Called as a module, as `_Head.forward` says."""
        if x.shape[-1] != w.shape[-1]:
            raise ValueError(f"x and w must have one width: x is {tuple(x.shape)}, w is {tuple(w.shape)}")
        dtype = accumulation_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self.metric(x.to(dtype), w.to(dtype))

    def extra_repr(self) -> str:
        learnt = "" if self.log_exponent is None else " (learnt)"
        n = float(torch.as_tensor(self.exponent).detach())
        return f"{super().extra_repr()}, exponent={n:g}{learnt}, distance={self.distance}"


class SoftmaxHead(_Head):
    """The twin: logits_i = w_i · x, as nanoGPT's and GPT-2's `lm_head`."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        init_std: float = 0.02,
        rows: int | None = None,
        label_smoothing: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, rows, label_smoothing, chunk)
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def logits(self, x: Tensor) -> Tensor:
        """w_i · x, (..., D) → (..., num_classes), in float32 (float64 for float64 input)."""
        x, w = self._operands(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = inner_products(x.reshape(-1, self.in_features), w[: self.num_classes])
        return logits.reshape(*x.shape[:-1], self.num_classes)

    def loss(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        x, w = self._operands(x)
        return fused_softmax_loss(x, w, targets, **self._fused_options(), **options)
