"""hgpt/run/optim.py: the learning rate against hand-worked values and torch's schedulers, the groups, fused AdamW."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import OptimConfig
from hgpt.run.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate


def small_model(**settings) -> HGPTForCausalLM:
    shape = {"vocab_size": 61, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "final_norm_gain": 0.05}
    return HGPTForCausalLM(HGPTConfig(**(shape | settings)))


def train_step(model: HGPTForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(16).reshape(2, 8)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------
# Learning rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2]),
        ("linear", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("constant", 4, [0.25, 0.5, 0.75] + [1.0] * 6),
        ("trapezoidal", 2, [0.5, *[1.0] * 15, 0.8, 0.6, 0.4, 0.2]),  # the last fifth
        ("trapezoidal", 0, [1.0] * 8 + [0.6, 0.2]),
        ("cosine", 0, [1.0]),
        ("cosine", 0, [1.0, 0.2]),
    ],
)
def test_learning_rate_by_hand(schedule, warmup, expected):
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=warmup, schedule=schedule)
    total = len(expected)
    assert [learning_rate(step, total, config) for step in range(total)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("total", "warmup", "lr", "min_lr"), [(50, 10, 6e-4, 6e-5), (33, 1, 1e-2, 0.0), (20, 0, 1, 0.1)]
)
def test_learning_rate_is_torchs(total, warmup, lr, min_lr):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    cosine = CosineAnnealingLR(optimizer, T_max=total - 1 - warmup, eta_min=min_lr)
    schedule = cosine
    if warmup:
        optimizer.param_groups[0]["lr"] = lr
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1))
        schedule = SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    config = OptimConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup)
    assert [learning_rate(step, total, config) for step in range(total)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------
# Parameter groups


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("head", "final_norm"), [("harmonic", "layer_norm"), ("softmax", "none")])
def test_groups_are_the_parameters_of_the_model(tied, bias, head, final_norm):
    settings = {"head": head, "final_norm": final_norm, "radius": "learned"}
    model = small_model(tie_word_embeddings=tied, bias=bias, **settings)
    config = OptimConfig(weight_decay=0.1, centre_lr_multiplier=3.0, final_norm_lr_multiplier=5.0)
    groups = parameter_groups(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())  # each exactly once
    settings = {names[p]: (group["weight_decay"], group["lr_multiplier"]) for group in groups for p in group["params"]}
    centres = "transformer.wte.weight" if tied else "lm_head.weight"
    for name, (decay, multiplier) in settings.items():
        is_vector = name.endswith((".bias", ".log_weight")) or ".ln_" in name
        assert decay == (0.0 if is_vector else 0.1), name
        assert multiplier == (3.0 if name == centres else 5.0 if ".ln_f." in name else 1.0), name
    assert any(name.endswith("ln_f.bias") for name in settings) == (bias and final_norm == "layer_norm")
    # Muon takes the matrices of the blocks.
    groups = parameter_groups(model, OptimConfig(algorithm="muon"))
    chosen = {names[parameter] for group in groups if group["muon"] for parameter in group["params"]}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert chosen == {f"transformer.h.{block}.{kind}.weight" for block in range(2) for kind in kinds}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_frozen_parameters_are_left_out():
    model = small_model()
    model.transformer.h.requires_grad_(False)
    grouped = {p for group in parameter_groups(model, OptimConfig()) for p in group["params"]}
    assert grouped == set(model.parameters()) - set(model.transformer.h.parameters())
    with pytest.raises(UserError, match=r'optim.algorithm = "muon" .* requires a gradient.*"adamw"'):
        build_optimizer(model, OptimConfig(algorithm="muon"))


def test_multipliers_take_effect():
    # Adam's first step has length lr in every entry whose gradient is not 0, whatever the gradient's size.
    model = small_model(tie_word_embeddings=False)
    config = OptimConfig(weight_decay=0.0, eps=1e-30, centre_lr_multiplier=4.0, final_norm_lr_multiplier=0.5)
    optimizer = build_optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_learning_rate(optimizer, 1e-3)
    train_step(model, optimizer)
    for name, parameter in model.named_parameters():
        expected = {"lm_head.weight": 4e-3, "transformer.ln_f.weight": 0.5e-3}.get(name, 1e-3)
        length = (parameter - before[name]).abs().max().item()
        assert length == pytest.approx(expected, rel=1e-3), name


# ---------------------------------------------------------------------------------------------------------------
# Fused AdamW


def test_fused_equals_unfused():
    config = OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, centre_lr_multiplier=2.0)
    model = small_model()
    reference = copy.deepcopy(model)
    optimizer = build_optimizer(model, config)
    assert all(group["fused"] for group in optimizer.param_groups)
    plain = torch.optim.AdamW(
        parameter_groups(reference, config), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False
    )
    for step in range(5):
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for each in (optimizer, plain):
            set_learning_rate(each, learning_rate(step, 5, config))
            each.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------
# Muon


def test_muon_with_adamw_does_what_each_does_alone():
    """Against the two optimisers side by side."""
    config = OptimConfig(algorithm="muon", lr=1e-2, weight_decay=0.1)
    model, twin = small_model(), small_model()
    twin.load_state_dict(model.state_dict())
    optimizer = build_optimizer(model, config)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    set_learning_rate(optimizer, 5e-3)
    groups = parameter_groups(twin, config)
    muon = torch.optim.Muon([g for g in groups if g["muon"]], lr=5e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([g for g in groups if not g["muon"]], lr=5e-3, betas=config.betas, fused=True)
    trained_by_muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    ids = torch.arange(16).reshape(2, 8)
    for _ in range(3):
        twin.load_state_dict(model.state_dict())
        before = [parameter.detach().clone() for parameter in model.parameters()]
        train_step(model, optimizer)
        twin(ids, labels=ids).loss.backward()
        muon.step()
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
        for ours, theirs, start in zip(model.parameters(), twin.parameters(), before, strict=True):
            # But for the rounding of torch's to bfloat16.
            rounding = 0.15 * (theirs - start).norm() if id(ours) in trained_by_muon else 0
            assert (ours - theirs).norm() <= rounding
    assert optimizer.state[model.transformer.h[0].mlp.c_fc.weight].keys() == {"momentum_buffer"}
    assert optimizer.state[model.transformer.wte.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}

    def values():
        states = (value for parameter in model.parameters() for value in optimizer.state[parameter].values())
        return [value.detach().clone() for value in (*model.parameters(), *states)]

    before = values()
    optimizer.found_inf = torch.ones(())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    torch.testing.assert_close(values(), before, rtol=0, atol=0)  # and so do the momenta


@pytest.mark.parametrize("name", ["mlp.c_fc", "mlp.c_proj"])  # wide and tall
def test_muon_iterates_in_float32_on_a_cpu(name):
    """A CPU without units for bfloat16 takes up to 90 times as long in it. Against the iteration in float64."""
    model = small_model()
    weight = model.transformer.h[0].get_submodule(name).weight
    before = weight.detach().double()
    optimizer = build_optimizer(model, OptimConfig(algorithm="muon", lr=1e-2, weight_decay=0.0))
    ids = torch.arange(16).reshape(2, 8)
    model(ids, labels=ids).loss.backward()
    # Nesterov momentum in the first step: (1 + 0.95) · 0.05 times the gradient, whose norm does not matter.
    x = weight.grad.double() / weight.grad.double().norm()
    for _ in range(5):  # the coefficients are Keller Jordan's
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    optimizer.step()
    torch.testing.assert_close(
        weight.detach().double(), before - 1e-2 * 0.2 * max(weight.shape) ** 0.5 * x, rtol=0, atol=1e-6
    )
