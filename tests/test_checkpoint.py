"""hgpt/run/checkpoint.py: complete or absent, whatever interrupts a save; found again; bit for bit the same state."""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import file_size_limit
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialized
from small_run import VOCAB, flip_a_bit, steps_in, stub_accelerator, write_data

from hgpt.data.shards import TokenShards, fingerprint, same_data
from hgpt.durable import whole_folder
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import (
    Checkpoint,
    TrainState,
    Writer,
    checkpoint_folder,
    checkpoints,
    damage,
    newest_checkpoint,
    point_latest,
    random_state,
    remove_old,
    save_model,
    save_training_state,
    write_manifest,
)
from hgpt.run.config import CheckpointConfig, OptimConfig
from hgpt.run.engines import Engine, FullState
from hgpt.run.optim import build_optimizer

FILES = {"manifest.json", "model", "optimizer.safetensors", "rng_00000.safetensors", "state.json"}


def collect(model, optimizer) -> FullState:
    engine = Engine(None, stub_accelerator())
    engine.prepare(model, optimizer, {})
    return engine.collect()


def small_model(**settings) -> HGPTForCausalLM:
    shape = {"vocab_size": 61, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return HGPTForCausalLM(HGPTConfig(**(shape | settings)))


def trained(model: HGPTForCausalLM, steps: int = 3) -> torch.optim.AdamW:
    """An optimiser with something in its state."""
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state(step: int) -> TrainState:
    known = {"settings": {"optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "name": "x"}, "data": "d", "world_size": 1}
    return TrainState(step=step, tokens=24, validation_loss=4.5, validation_step=2, **known)


def save(run_folder: Path, step: int, model=None, optimizer=None) -> Path:
    """A checkpoint as train.py writes it, tokenizer and card aside."""
    model = model or small_model()
    target = checkpoint_folder(run_folder, step)
    with whole_folder(target) as folder:
        full = collect(model, optimizer or trained(model))
        save_training_state(folder, full, [random_state()], state(step))
        save_model(folder / "model", model.config, full.weights)
        write_manifest(folder)
    point_latest(run_folder, target)
    return target


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------------- Complete or absent


def test_a_checkpoint_is_whole_and_replaced_when_the_new_one_is(tmp_path):
    first = save(tmp_path, 1)
    assert {path.name for path in first.iterdir()} == FILES
    assert damage(first) is None
    assert Checkpoint(first).state == state(1)
    (first / "model" / "config.json").write_text("{")
    save(tmp_path, 1)
    assert damage(first) is None
    assert names(tmp_path) == ["step_0000001"]


@pytest.mark.parametrize("limit", [1000, 10_000, 40_000])
def test_a_disk_that_fills_up(tmp_path, limit):
    """Files stop growing at `limit` bytes: in the random state (5 kB), the optimiser (60 kB), the model (30 kB)."""
    first = save(tmp_path, 1)
    with (
        file_size_limit(limit),
        pytest.raises(UserError, match=r"could not write .*step_0000002: .*--resume auto"),
    ):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_0000001"] and damage(first) is None
    assert (tmp_path / "latest").resolve() == first == newest_checkpoint(tmp_path, pytest.fail)


# ---------------------------------------------------------------------------------------------------------- Damage


def list_file(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def write_list(text: str):
    return lambda checkpoint: (checkpoint / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda c: (c / "model" / "model.safetensors").unlink(), "model/model.safetensors is missing"),
        (lambda c: os.truncate(c / "optimizer.safetensors", 100), "optimizer.safetensors has 100 bytes instead of "),
        (lambda c: flip_a_bit(c / "optimizer.safetensors"), "optimizer.safetensors does not match its checksum"),
        (lambda c: flip_a_bit(c / "model" / "model.safetensors"), "model/model.safetensors does not match"),
        (lambda c: (c / "state.json").write_text(""), "state.json has 0 bytes instead of "),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be read"),
        *((write_list(text), "manifest.json cannot be read") for text in ("{", '{"files": []}', "[]", "[" * 20_000)),
        (write_list('{"files": {"x": {"bites": 3}}}'), "manifest.json cannot be read"),
        (write_list('{"files": {}}'), "manifest.json does not list model/config.json"),
        (lambda c: list_file(c, "../x"), "manifest.json lists '../x', which lies outside"),
        (lambda c: list_file(c, "/etc/hostname"), "manifest.json lists '/etc/hostname', which lies outside"),
        (lambda c: list_file(c, "a" * 300), f"{'a' * 300} "),
    ],
)
def test_damage_is_seen_and_passed_over(tmp_path, harm, fault):
    first = save(tmp_path, 1)
    second = shutil.copytree(first, checkpoint_folder(tmp_path, 2))
    assert damage(second) is None
    harm(second)
    assert fault in damage(second)
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append) == first
    assert len(warnings) == 1
    assert f"{second} is damaged and skipped: " in warnings[0] and fault in warnings[0]
    harm(first)
    assert newest_checkpoint(tmp_path, warnings.append) is None


# -------------------------------------------------------------------------------------------------- The run folder


def empty_checkpoints(run_folder: Path, *steps: int) -> None:
    for step in steps:
        (run_folder / "checkpoints" / f"step_{step:07d}" / "model").mkdir(parents=True)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    assert checkpoints(tmp_path) == [] and newest_checkpoint(tmp_path, pytest.fail) is None
    empty_checkpoints(tmp_path, 90, 1000, 20_000_000, 5)
    for other in ("step_x", ".step_0000002.partial", ".step_0000003.deleted"):
        (tmp_path / "checkpoints" / other / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_7").write_text("a file")
    assert steps_in(tmp_path) == [5, 90, 1000, 20_000_000]


def test_which_checkpoints_are_written_and_which_stay(tmp_path):
    run = tmp_path / "last"
    empty_checkpoints(run, 1, 2, 3, 4)
    for keep, left in ((0, [1, 2, 3, 4]), (10**30, [1, 2, 3, 4]), (3, [2, 3, 4]), (1, [4])):
        remove_old(run, CheckpointConfig(keep_last=keep))
        assert steps_in(run) == left and len(names(run)) == len(left)
    assert [step for step in range(9) if CheckpointConfig(every=4).due(step)] == [4, 8]
    # Log-spaced steps, and multiples of keep_every, stay for good.
    config = CheckpointConfig(every=10, keep_last=1, keep_every=20, log_spaced_until=16)
    due = [step for step in range(61) if config.due(step)]
    assert due == [0, 1, 2, 4, 8, 10, 16, 20, 30, 40, 50, 60]
    for step in due:
        empty_checkpoints(tmp_path, step)
        remove_old(tmp_path, config)
    assert steps_in(tmp_path) == [0, 1, 2, 4, 8, 16, 20, 40, 60]


def test_latest_is_a_relative_link_and_never_absent(tmp_path, monkeypatch):
    run = tmp_path / "a"
    empty_checkpoints(run, 1, 2)
    point_latest(run, checkpoint_folder(run, 1))
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.readlink(run / "latest")), replace(a, b)))
    point_latest(run, checkpoint_folder(run, 2))
    assert seen == ["checkpoints/step_0000001"]  # there until the rename, which is atomic
    assert os.readlink(run / "latest") == "checkpoints/step_0000002"
    monkeypatch.undo()
    run = run.rename(tmp_path / "b")  # a run folder may be moved
    assert (run / "latest" / "model").is_dir()


# ----------------------------------------------------------------------------------------------------------- State


@pytest.mark.parametrize("tied", [True, False])
def test_optimizer_state_comes_back_bit_for_bit(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied, bias=tied)
    optimizer = trained(model)
    checkpoint = save(tmp_path, 3, model, optimizer)
    other = HGPTForCausalLM.from_pretrained(checkpoint / "model")
    restored = build_optimizer(other, OptimConfig())
    Engine(None, stub_accelerator()).prepare(other, restored, Checkpoint(checkpoint).load_optimizer(other, restored))
    assert len(restored.state) == len(list(model.parameters()))
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        torch.testing.assert_close(restored.state[twin], optimizer.state[parameter], rtol=0, atol=0)
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    optimizer.step()
    restored.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 1}, "not in the model ['exp_avg/transformer.h.1."),
        ({"n_layer": 3}, "not in the file ['exp_avg/transformer.h.2."),
        ({"tie_word_embeddings": False}, "not in the file ['exp_avg/lm_head.weight', "),
        ({"n_embd": 32}, "of another shape or dtype ['exp_avg/transformer.h.0."),
    ],
)
def test_the_optimizer_of_another_model_is_refused(tmp_path, settings, message):
    checkpoint, other = save(tmp_path, 1), small_model(**settings)
    said = f"{checkpoint / 'optimizer.safetensors'} cannot be used: it belongs to another model: "
    with pytest.raises(UserError, match=f"{re.escape(said)}.*{re.escape(message)}"):
        Checkpoint(checkpoint).load_optimizer(other, build_optimizer(other, OptimConfig()))


def test_random_state_comes_back(tmp_path):
    torch.manual_seed(7)
    torch.rand(5)
    first = random_state()
    torch.rand(3)
    model = small_model()
    full, second = collect(model, trained(model)), random_state()
    save_training_state(tmp_path, full, [first, second], state(1))
    (tmp_path / "rng_00003.safetensors").write_bytes(b"{" * 99)
    save_file({"torch": first["torch"][:-1]}, tmp_path / "rng_00004.safetensors")
    save_file({"numpy": first["torch"]}, tmp_path / "rng_00005.safetensors")
    checkpoint = Checkpoint(tmp_path)
    expected = torch.rand(4)
    assert checkpoint.load_random_state(rank=1)
    assert torch.equal(torch.rand(4), expected)
    assert checkpoint.load_random_state(rank=0)
    assert torch.equal(torch.get_rng_state(), first["torch"])
    for rank in (2, 3, 4, 5):
        with pytest.raises(UserError, match=f"rng_0000{rank}") if rank > 2 else contextlib.nullcontext():
            assert not checkpoint.load_random_state(rank)
        assert torch.equal(torch.get_rng_state(), first["torch"])


def test_a_state_whose_values_cannot_be(tmp_path):
    """Its checksum fits. Step 2 is not that of the folder's name."""
    checkpoint = save(tmp_path, 1)
    content = json.loads((checkpoint / "state.json").read_text())
    assert set(content["packages"]) >= {"python", "torch", "hgpt"}
    wrong = [
        {"moon": "full"}, {"step": -1}, {"step": "3"}, {"step": 1.0}, {"step": True}, {"step": 2**70}, {"step": None},
        {"step": 2}, {"tokens": -5}, {"tokens": [1]}, {"world_size": "all"}, {"validation_loss": "low"}, {"data": 3},
        {"validation_loss": float("nan")}, {"validation_step": 1.5}, {"settings": []}, {"packages": "torch"},
    ]  # fmt: skip
    texts = [(json.dumps(content | changed), next(iter(changed))) for changed in wrong]
    for text, named in [*texts, *((text, "") for text in ("[" * 20_000, "null", '{"step": 1}', "\xff", "{"))]:
        (checkpoint / "state.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=rf"state\.json cannot be used: .*{named}"):
            Checkpoint(checkpoint)


MEAN, STEP = "exp_avg/transformer.wte.weight", "step/transformer.wte.weight"


def test_an_optimizer_state_that_would_write_beyond_its_buffers(tmp_path):
    checkpoint, model = save(tmp_path, 3), small_model()
    file = checkpoint / "optimizer.safetensors"
    whole = load_file(file)
    wrong = [
        {MEAN: torch.tensor(0.0)}, {MEAN: whole[MEAN].half()}, {MEAN: None}, {"no_slash": torch.ones(3)},
        {STEP: torch.tensor(-1.0)}, {STEP: torch.tensor(float("nan"))},
    ]  # fmt: skip
    tensors = [{name: value for name, value in (whole | changed).items() if value is not None} for changed in wrong]
    for content in [*map(serialized, tensors), b"none"]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be used: "):
            Checkpoint(checkpoint).load_optimizer(model, build_optimizer(model, OptimConfig()))


def edit_config(model: Path, **changed) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | changed))


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: edit_config(c, exponent=3.0), lambda c: edit_config(c, n_layer=5),
        lambda c: edit_config(c, n_embd="x"), lambda c: edit_config(c, vocab_size=10**12),
        lambda c: (c / "config.json").write_text("[" * 9999),
        lambda c: (c / "config.json").write_text("[]"), lambda c: (c / "model.safetensors").write_bytes(b"x" * 99),
        lambda c: save_file({}, c / "model.safetensors"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_that_of_the_run(tmp_path, harm):
    checkpoint = save(tmp_path, 1)
    harm(checkpoint / "model")
    with pytest.raises(UserError, match=f"{checkpoint / 'model'} cannot be used: "):
        Checkpoint(checkpoint).load_model(small_model().config)


def test_fingerprints_of_data(tmp_path):
    def shards(folder: str, seed: int) -> list[TokenShards]:
        train, val = (np.random.RandomState(seed + i).randint(0, VOCAB, 50).astype(np.uint16) for i in range(2))
        write_data(tmp_path / folder, train, val)
        return [TokenShards.open(tmp_path / folder, split) for split in ("train", "val")]

    a, copy, other = shards("a", 0), shards("copy", 0), shards("other", 1)
    assert fingerprint(a, whole=True) == fingerprint(copy, whole=False) != fingerprint(other, whole=False)
    assert not same_data(fingerprint([a[0], other[1]], whole=True), fingerprint(a, whole=True))

    def bare(place: int) -> list[str]:
        """Fingerprints of 6 MB without checksums, with one byte changed."""
        content = bytearray(6_000_000)
        content[place] = 1
        for split in ("train", "val"):
            (tmp_path / f"{split}.bin").write_bytes(content if split == "train" else b"ab")
        splits = [TokenShards.open(tmp_path, split, 65_000) for split in ("train", "val")]
        return [fingerprint(splits, whole=whole) for whole in (False, True)]

    # The second and third differ between two of the blocks.
    (sampled, full), (here, full_here), (there, full_there) = map(bare, (5_999_999, 4_100_000, 4_100_002))
    assert same_data(sampled, full) and not same_data(sampled, here) and not same_data(full, full_here)
    assert same_data(here, there) and not same_data(full_here, full_there)
    lengths = sampled.split()[0]  # all that checkpoints of earlier versions have
    assert same_data(lengths, full) and same_data(full_here, lengths)


@pytest.mark.parametrize("background", [True, False])
def test_the_writer_writes_one_after_the_other(background):
    order, go_on = [], threading.Event()
    if not background:
        go_on.set()

    def write(number: int) -> None:
        assert go_on.wait(30)
        order.append(number)

    with Writer(background) as writer:
        writer.submit(lambda: write(1))
        writer.wait(only_look=True)
        assert order == ([] if background else [1]), "in the background nobody waits"
        threading.Timer(0.2, go_on.set).start()
        writer.submit(lambda: write(2))  # waits for the first
        assert order[:1] == [1]
    assert order == [1, 2]


def test_a_failure_in_the_background_is_raised_at_the_next_look():
    def fail() -> None:
        raise UserError("the disk is full")

    with Writer(background=True) as writer, pytest.raises(UserError, match="the disk is full"):
        writer.submit(fail)
        for _ in range(100):
            writer.wait(only_look=True)
            time.sleep(0.05)
    # At the latest when the run ends, and not in the place of what ended it.
    for ended in (UserError, KeyboardInterrupt):
        with pytest.raises(ended), Writer(background=True) as writer:
            writer.submit(fail)
            if ended is KeyboardInterrupt:
                raise KeyboardInterrupt
