"""train.distill_from and train.exponent_start: the loss, runs that resume, engines, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import run
from safetensors.torch import load_file
from small_models import byte_pairs, export
from small_run import HARMONIC, SOFTMAX, assert_same_checkpoint, losses, make_config, records, set_back
from test_plan import Allocations
from torch.nn import functional as F
from transformers import BertConfig

import hgpt
import train
from hgpt import convert
from hgpt.data.batches import read_windows
from hgpt.data.shards import TokenShards
from hgpt.errors import UserError
from hgpt.run.config import TrainConfig
from hgpt.run.optim import DISTILLING, training_loss

LIFTED = replace(HARMONIC, exponent="4*sqrt_dim", radius="learned")


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> str:
    """A softmax run of 6 steps."""
    config = make_config(data, tmp_path_factory.mktemp("teacher"), SOFTMAX, optim={"lr": 3e-2})
    train.main(config)
    return str(config.run_folder)


def engine(student, teacher, precision="fp32", **settings) -> SimpleNamespace:
    """What `training_loss` needs of the engine of a run with a teacher."""
    train = TrainConfig(steps=1, global_batch=1, micro_batch=1, distill_from="x", **settings)
    config = SimpleNamespace(train=train)
    return SimpleNamespace(teacher=teacher, config=config, precision=precision, model_config=student.config)


@pytest.mark.parametrize(("w", "temperature", "precision"), [(0.3, 2.0, "fp32"), (1.0, 1.0, "bf16")])
def test_the_loss_and_its_gradient_against_float64(w, temperature, precision):
    shape = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    student = hgpt.HGPTForCausalLM(hgpt.HGPTConfig(vocab_size=50, exponent=9.0, centre_init_std=0.5, **shape)).train()
    taught = hgpt.HGPTForCausalLM(hgpt.HGPTConfig(vocab_size=53, head="softmax", **shape, final_norm_gain=9.0)).eval()
    inputs = torch.randint(50, (3, 8))
    targets = torch.where(torch.rand(3, 8) < 0.3, -100, torch.randint(50, (3, 8)))  # a third does not count
    taught_by = engine(student, taught, precision, distill_weight=w, distill_temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = training_loss(student, inputs, targets, taught_by)
    loss.backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.double().zero_grad()
    kept = targets != -100
    logits, teachers = student(inputs).logits[kept], taught.double()(inputs).logits[kept, :50].detach()
    kl = F.kl_div(F.log_softmax(logits / temperature, -1), F.softmax(teachers / temperature, -1), reduction="batchmean")
    expected = (1 - w) * F.cross_entropy(logits, targets[kept]) + w * temperature**2 * kl
    expected.backward()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert kl.item() > 0.1
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for parameter, grad in zip(student.parameters(), found, strict=True):
        assert float((grad - parameter.grad).norm()) < 5 * tolerance * float(parameter.grad.norm()) + 1e-6
    assert all(parameter.grad is None for parameter in taught.parameters())


def test_memory_of_the_logits():
    """More than the plain loss takes: 7 numbers of 4 bytes for each position and token at most."""
    config = hgpt.HGPTConfig(vocab_size=20_000, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    student, taught = (hgpt.HGPTForCausalLM(config).train() for _ in range(2))
    inputs, peaks = torch.randint(20_000, (4, 256)), []
    for teacher in (None, taught):
        with Allocations() as seen:
            training_loss(student, inputs, inputs, engine(student, teacher)).backward()
        peaks.append(seen.peak / inputs.numel() / 20_000)
    assert 0.85 * DISTILLING < peaks[1] - peaks[0] <= DISTILLING


def test_weight_0_is_the_plain_run_to_the_bit(data, tmp_path, teacher):
    settings = [{}, {"distill_from": teacher, "distill_weight": 0.0}, {"distill_from": teacher}]
    plain, without, taught = (make_config(data, tmp_path, name=f"run{i}", train=s) for i, s in enumerate(settings))
    for config in (plain, without, taught):
        train.main(config)
    assert_same_checkpoint(plain.run_folder / "latest", without.run_folder / "latest")
    assert losses(plain.run_folder) == losses(without.run_folder)
    assert losses(plain.run_folder) != losses(taught.run_folder)


@pytest.fixture(scope="module")
def lifted(data, teacher, tmp_path_factory):
    """A function: the configuration of a run from the converted teacher, which it teaches, while n falls."""
    folder = str(tmp_path_factory.mktemp("lift") / "lift")
    convert.main([teacher, "--data", str(data), "--exponent", "16*sqrt_dim", "--out", folder, "--positions", "256"])

    def config(runs, name="run", **changes):
        model = {"backbone": folder, "init_from": folder, "head": LIFTED, "tie_word_embeddings": False, "dropout": 0.0}
        falling = {"distill_from": teacher, "exponent_start": 4.0, "exponent_steps": 4}
        return make_config(data, runs, name=name, model=model, train=falling | changes)

    return config


def test_a_run_from_a_lift_resumes_exactly_while_n_falls(data, tmp_path, teacher, lifted):
    config = lifted(tmp_path)
    train.main(config)
    n = 4 * 32**0.5
    shards = TokenShards.open(data, "val", None)
    seen = {r["step"]: r["loss"] for r in records(config.run_folder, "eval")}
    begun = hgpt.load(config.model.init_from)
    saved = [hgpt.load(config.run_folder / f"checkpoints/step_000000{step}/model") for step in (3, 6)]
    for step, model, exponent in zip((0, 3, 6), (begun, *saved), (4 * n, 4**0.25 * n, n), strict=True):
        assert model.config.exponent == pytest.approx(exponent, rel=1e-9)
        inputs, targets = read_windows(shards, range(63), 16)
        logits = model.eval().double()(inputs).logits
        own = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert seen[step] == pytest.approx(own.item(), abs=1e-5)
    assert config.train.exponent_factor(2) == pytest.approx(2)
    names = load_file(config.run_folder / "latest/model/model.safetensors").keys()
    assert len(names) == len(list(model.parameters()))  # nothing of the teacher
    again = set_back(config, 3, name="again")
    train.main(again)
    assert_same_checkpoint(again.run_folder / "latest", config.run_folder / "latest")
    other = set_back(config, 3, name="other")
    with pytest.raises(UserError, match=r"train\.distill_from = .* has changed: it is softmax head, .* was softmax"):
        train.main(replace(other, train=replace(other.train, distill_from=f"{teacher}/checkpoints/step_0000003")))


@pytest.mark.parametrize("name", ["ddp", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3"))])
def test_two_processes_learn_what_one_does(tmp_path, lifted, name):
    alone, together = lifted(tmp_path, "alone"), lifted(tmp_path, "together", micro_batch=2)
    values = json.loads(Path(alone.model.backbone, "config.json").read_text())
    values["backbone"]["dropout"] = 0.0  # which differs between processes
    (tmp_path / "backbone.json").write_text(json.dumps(values))
    model = replace(alone.model, backbone=str(tmp_path / "backbone.json"))
    alone, together = replace(alone, model=model), replace(together, model=model)
    train.main(alone)
    run(together, 2, name)
    for kind, columns in (("train", ("loss", "grad_norm")), ("eval", ("loss",))):
        curves = [[[r[column] for column in columns] for r in records(c.run_folder, kind)] for c in (alone, together)]
        np.testing.assert_allclose(*curves, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no such folder"),
        ("other", "its vocab_size is 280, and .* has 300 tokens"),
        ("same size", "its tokenizer is not the tokenizer of"),
        ("short", "its context has 8 tokens, and data.seq_len is 16"),
        ("masked", r"it is a masked language model \(bert\): name a causal one"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(data, tmp_path, name, message):
    sizes = {"other": (280, 24), "same size": (300, 24), "short": (300, 8)}
    if name in sizes:
        size, context = sizes[name]
        export(tmp_path / name, byte_pairs(size), context=context)
    elif name == "masked":
        BertConfig(vocab_size=300, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / name)
    config = make_config(data, tmp_path / "runs", train={"distill_from": str(tmp_path / name)})
    with pytest.raises(UserError, match=rf"train\.distill_from = .*{name}: .*{message}"):
        train.main(config)
    assert not config.run_folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": None}, "set model.backbone to the same folder if hgpt.convert made it"),
        ({"head": HARMONIC}, "model.head.radius: a lifted head needs radius = 'learned'"),
        ({"tie_word_embeddings": True}, "model.tie_word_embeddings: a lifted head needs tie_word_embeddings = False"),
        ({"backbone": {"head_version": 2}}, "model.backbone = .*: head_version = 2: another version of hgpt made"),
        ({"backbone": {"backbone": 3}}, "model.backbone = .*: a model of hgpt is no backbone, unless hgpt.convert"),
        ({"backbone": {"backbone": {"bias": True}}}, r"another backbone than model.backbone: .*c_attn\.bias"),
        ({"backbone": {"lift": False}}, r"model.init_from = .* do not fit\n  lm_head.weight: .* 33\) in the check"),
    ],
)
def test_settings_that_are_not_those_of_a_lift_are_refused(tmp_path, lifted, changes, message):
    config = lifted(tmp_path)
    if isinstance(changes.get("backbone"), dict):
        values = json.loads(Path(config.model.backbone, "config.json").read_text())
        for name, value in changes["backbone"].items():
            values[name] = values[name] | value if isinstance(value, dict) else value
        (tmp_path / "changed.json").write_text(json.dumps(values))
        changes = {"backbone": str(tmp_path / "changed.json")}
    with pytest.raises(UserError, match=message):
        train.main(replace(config, model=replace(config.model, **changes)))


def test_another_context_than_the_lift_has_is_refused(tmp_path, lifted):
    config = lifted(tmp_path, distill_from=None)
    with pytest.raises(UserError, match=r"model\.backbone = .*: data\.seq_len = 17 exceeds its 16 positions"):
        train.main(replace(config, data=replace(config.data, seq_len=17)))
