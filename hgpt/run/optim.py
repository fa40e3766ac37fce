"""The training loss; AdamW, or Muon for the blocks' matrices; the learning rate as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgpt.errors import UserError
from hgpt.model.heads import HarmonicHead
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import OptimConfig
from hgpt.run.engines import Engine

MUON_MOMENTUM = 0.95  # Nesterov
DECAY_FRACTION = 0.2  # of all steps, at the end of the trapezoidal schedule
# Bytes at the peak of a step with a teacher, for each position of a micro-batch and token of the vocabulary: logits,
# log-probabilities and gradients. Without one the loss takes none.
DISTILLING = 28


def training_loss(model: nn.Module, inputs: Tensor, targets: Tensor, engine: Engine) -> Tensor:
    """The loss of a micro-batch, (), with its graph; `inputs` and `targets` (B, T); targets of -100 are ignored.

    −log p_target, or with a teacher, w = train.distill_weight and T = train.distill_temperature

        (1 − w) · (−log p_target) + w · T² · KL(softmax(teacher's logits / T) ‖ softmax(logits / T))

    Both are means over the other positions. The logits of both models, (B, T, V), are in memory (`DISTILLING`).
    """
    if engine.teacher is None:
        return model(inputs, shift_labels=targets, use_cache=False).loss
    train, vocab_size = engine.config.train, engine.model_config.vocab_size
    w, t = train.distill_weight, train.distill_temperature
    # Not Accelerate's autocast, which does nothing under DeepSpeed.
    with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=engine.precision == "bf16"):
        logits = engine.teacher(input_ids=inputs, use_cache=False).logits[..., :vocab_size]  # the rest is padding
        log_p = (logits.float() / t).log_softmax(-1)
        del logits
    output = model(inputs, shift_labels=targets, use_cache=False, loss_only=False)
    log_q, counted = (output.logits.float() / t).log_softmax(-1), targets != -100
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).where(counted, 0).sum()
    return (1 - w) * output.loss + w * t**2 * kl / counted.sum().clamp_min(1)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step`, 0 ≤ step < total_steps.

    The warm-up is linear, from lr / warmup_steps to lr. After it the rate falls to min_lr at the last step: along half
    a cosine ("cosine"), linearly ("linear"), or linearly over the last fifth of all steps and constant before
    ("trapezoidal"). With "constant" it stays at lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "trapezoidal":
        start = max(start, round(total_steps * (1 - DECAY_FRACTION)) - 1)
    progress = max(0.0, (step - start) / max(1, total_steps - 1 - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining


def parameter_groups(model: HGPTForCausalLM, config: OptimConfig) -> list[dict]:
    """Groups of all trained parameters, each with `weight_decay`, `lr_multiplier` and `muon` (whether Muon trains it).

    Matrices decay; vectors and the parameters of the head's distance do not. Centres, the final norm and the distance
    have their own learning-rate multipliers.
    """
    special = {model.lm_head.weight: config.centre_lr_multiplier}
    special |= dict.fromkeys(model.transformer.ln_f.parameters(), config.final_norm_lr_multiplier)
    metric = set(model.lm_head.metric.parameters()) if isinstance(model.lm_head, HarmonicHead) else set()
    special |= dict.fromkeys(metric, config.metric_lr_multiplier)
    in_blocks = set(model.transformer.h.parameters()) if config.algorithm == "muon" else set()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 and parameter not in metric else 0.0
            muon = parameter.ndim == 2 and parameter in in_blocks
            groups.setdefault((decay, special.get(parameter, 1.0), muon), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier, "muon": muon}
        for (decay, multiplier, muon), parameters in groups.items()
    ]


def build_optimizer(model: HGPTForCausalLM, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, fused if every parameter's device supports it; or `MuonWithAdamW`.

    Raises UserError for Muon if no matrix of the blocks is trained.
    """
    fused = all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in model.parameters())
    groups = parameter_groups(model, config)
    matrices = [group for group in groups if group["muon"]]
    if config.algorithm == "muon" and not matrices:
        raise UserError(
            'optim.algorithm = "muon" trains the matrices of the blocks, but none requires a gradient: set '
            'optim.algorithm = "adamw"'
        )
    rest = [group for group in groups if not group["muon"]]
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if config.algorithm == "adamw":
        return adamw
    muon = BatchedMuon(matrices, lr=config.lr, momentum=MUON_MOMENTUM)
    return MuonWithAdamW(muon, adamw)


class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon, with one Newton-Schulz iteration for all matrices of one shape: GPT-2 small has 48 of 4 shapes.

    The iteration runs in bfloat16, as torch's; on a CPU in float32, because without bfloat16 units bfloat16 takes 20 to
    90 times as long (one 768 x 3072 matrix on an AMD EPYC with AVX2: 24 s, and 0.3 s in float32).
    """

    found_inf: Tensor | None = None  # as in fused AdamW: 1 skips the step, without a sync

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        momentum, gradient = torch.stack(buffers), torch.stack([parameter.grad for parameter in parameters])  # type: ignore
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, momentum, gradient)
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(momentum))
        direction = orthogonalized(gradient.lerp(momentum, group["momentum"]), group)
        kept: float | Tensor = 1 - group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            kept = torch.where(self.found_inf > 0, 1.0, kept)
            direction = torch.where(self.found_inf > 0, 0.0, direction)
        torch._foreach_mul_(parameters, kept)
        length = group["lr"] * 0.2 * max(parameters[0].shape) ** 0.5  # the root mean square of AdamW's steps
        torch._foreach_add_(parameters, list(direction), alpha=-length)


def orthogonalized(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz iteration of `matrices`, (number, rows, columns), with the coefficients and steps of `group`.

    The singular values of the result lie between about 0.7 and 1.2 (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = group["ns_coefficients"]
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices if matrices.is_cpu else matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups with `muon`, AdamW for the others; they share one list of groups and one state."""

    found_inf: Tensor | None = None  # as in fused AdamW: 1 skips the step

    def __init__(self, muon: BatchedMuon, adamw: torch.optim.AdamW) -> None:
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self.muon, self.adamw = muon, adamw

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both; a closure is not supported."""
        for optimizer, is_muon in ((self.muon, True), (self.adamw, False)):
            # Set at every step: load_state_dict, which Accelerate calls, replaces state and groups.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            optimizer.found_inf = self.found_inf  # type: ignore[union-attr]
            optimizer.step()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
