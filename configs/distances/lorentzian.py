"""Example of a user's own distance, the Lorentzian Σ_k log(1 + |x_k − w_k| / s), with a learned unit of length s."""

import math

import torch
from torch import Tensor, nn

from hgpt import Distance, register_distance


@register_distance("lorentzian")
class Lorentzian(Distance):
    """Σ_k log(1 + |x_k − w_k| / s), with a learned s = e^`log_scale`."""

    power = None  # no power of a Euclidean distance: d comes from `pairwise`, block by block

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__(dim)
        if not scale > 0:
            raise ValueError(f"scale must be positive; got {scale}")
        self.initial_scale = scale
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.initial_scale))

    def pairwise(self, x: Tensor, w: Tensor) -> Tensor:
        """(C, D) and (V′, D) → (C, V′); its gradients are autograd's."""
        return torch.log1p((x[:, None] - w).abs() / self.log_scale.exp()).sum(-1)
