"""hgpt/run/optim.py: the learning rate by hand, the groups, fused AdamW, and Muon beside it."""

import pytest
import torch

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import OptimConfig
from hgpt.run.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate


def small_model(**settings) -> HGPTForCausalLM:
    shape = {"vocab_size": 61, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "final_norm_gain": 0.05}
    return HGPTForCausalLM(HGPTConfig(**(shape | settings)))


IDS = torch.arange(16).reshape(2, 8)


def train_step(model: HGPTForCausalLM, *optimizers: torch.optim.Optimizer) -> None:
    model(IDS, labels=IDS).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


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
    config = OptimConfig(lr=0.01, min_lr=0.002, warmup_steps=warmup, schedule=schedule)
    found = [learning_rate(step, len(expected), config) for step in range(len(expected))]
    assert found == pytest.approx([0.01 * share for share in expected], abs=1e-8)


# Parameter groups


LEARNT = {"distance": "mahalanobis", "distance_options": {"metric": "low_rank", "rank": 4}, "learn_exponent": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings", [{"head": "harmonic", **LEARNT}, {"head": "softmax", "final_norm": "none"}], ids=["harmonic", "softmax"]
)
def test_groups_are_the_parameters_of_the_model(tied, bias, settings):
    model = small_model(tie_word_embeddings=tied, bias=bias, radius="learned", **settings)
    multipliers = {"centre_lr_multiplier": 3.0, "final_norm_lr_multiplier": 5.0, "metric_lr_multiplier": 7.0}
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1, **multipliers))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())  # each exactly once
    centres = "transformer.wte.weight" if tied else "lm_head.weight"
    for group in groups:
        for name in (names[parameter] for parameter in group["params"]):
            plain = name.endswith((".bias", ".log_weight", ".log_exponent")) or ".ln_" in name or ".metric." in name
            assert group["weight_decay"] == (0.0 if plain else 0.1), name
            expected = 3 if name == centres else 5 if ".ln_f." in name else 7 if ".metric." in name else 1
            assert group["lr_multiplier"] == expected, name
    assert any(name.endswith("ln_f.bias") for name in names.values()) == (bias and settings["head"] == "harmonic")
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


# Fused AdamW


def test_adamw_is_fused_and_has_its_settings():
    optimizer = build_optimizer(small_model(), OptimConfig(betas=(0.8, 0.9), eps=1e-7))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-7, True)


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
    for _ in range(3):
        twin.load_state_dict(model.state_dict())
        before = [parameter.detach().clone() for parameter in model.parameters()]
        train_step(model, optimizer)
        train_step(twin, muon, adamw)
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
    model(IDS, labels=IDS).loss.backward()
    # Nesterov momentum in the first step: (1 + 0.95) · 0.05 times the gradient, whose norm does not matter.
    x = weight.grad.double() / weight.grad.double().norm()
    for _ in range(5):  # the coefficients are Keller Jordan's
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    optimizer.step()
    expected = before - 1e-2 * 0.2 * max(weight.shape) ** 0.5 * x
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
