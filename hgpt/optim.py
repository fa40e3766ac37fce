"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hgpt.errors import UserError
from hgpt.modeling_hgpt import HGPTForCausalLM


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation: AdamW and the learning-rate schedule.

    Args:
        lr: peak learning rate, reached after the warm-up.
        min_lr: learning rate at the last step, of the schedules that fall.
        warmup_steps: steps of linear warm-up.
        schedule: from the end of the warm-up to the last step: "cosine", "linear", or "constant" at `lr`.
        betas: AdamW's β₁ and β₂.
        eps: AdamW's ε.
        weight_decay: decay of matrices (never of norms and biases), in AdamW's decoupled form.
        grad_clip: largest global norm of the gradient; 0 turns clipping off.
        centre_lr_multiplier: factor on the learning rate of the centres (of the token embedding, where tied).
        final_norm_lr_multiplier: factor on the learning rate of the final layer norm.
    """

    lr: float = 6e-4
    min_lr: float = 6e-5
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    centre_lr_multiplier: float = 1.0
    final_norm_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "centre_lr_multiplier", "final_norm_lr_multiplier"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"optim.{name} must be a positive number; got {value}")
        for name in ("min_lr", "weight_decay", "grad_clip", "warmup_steps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"optim.{name} must be 0 or more; got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must lie in [0, 1); got {list(self.betas)}")
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise UserError(f"optim.min_lr must not exceed optim.lr = {self.lr}; got {self.min_lr}")


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step`, 0 ≤ step < total_steps.

    Linear from lr / warmup_steps to lr in the warm-up, then from lr to min_lr along half a cosine (or a line), which
    is reached in the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def parameter_groups(model: HGPTForCausalLM, config: OptimConfig) -> list[dict]:
    """AdamW groups: matrices decay, vectors do not; centres and final norm have their own learning-rate factor.

    Each group carries `lr_multiplier`; every parameter that is trained is in exactly one group.
    """
    special = {
        model.lm_head.weight: config.centre_lr_multiplier,
        model.transformer.ln_f.weight: config.final_norm_lr_multiplier,
    }
    if isinstance(model.transformer.ln_f.bias, nn.Parameter):
        special[model.transformer.ln_f.bias] = config.final_norm_lr_multiplier
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, special.get(parameter, 1.0)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
        for (decay, multiplier), parameters in groups.items()
    ]


def build_optimizer(model: HGPTForCausalLM, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in the fused implementation where every parameter's device has one."""
    fused = all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
