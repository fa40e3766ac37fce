"""hgpt/run/checkpoint.py: complete or absent, whatever interrupts a save; found again; bit for bit the same state."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from tokenizers import Tokenizer
from tokenizers.models import BPE

from hgpt.data.shards import DataMeta, ShardWriter, SplitMeta, TokenShards, write_meta
from hgpt.durable import partial_name, whole_folder
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import (
    TrainState,
    Writer,
    checkpoint_step,
    checkpoints,
    damage,
    data_fingerprint,
    load_optimizer,
    load_random_state,
    load_state,
    newest_checkpoint,
    point_latest,
    random_state,
    remove_old,
    save_model,
    save_training_state,
    write_manifest,
)
from hgpt.run.config import CheckpointConfig, OptimConfig
from hgpt.run.engines import collect_state, restore_state
from hgpt.run.optim import build_optimizer

# What the engines ask of an Accelerator that has one process.
ALONE = SimpleNamespace(distributed_type=DistributedType.NO, is_main_process=True)
FILES = {"manifest.json", "model", "optimizer.safetensors", "rng_00000.safetensors", "state.json"}


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


def state(step: int = 3) -> TrainState:
    return TrainState(
        step=step,
        tokens=24,
        validation_loss=4.5,
        validation_step=2,
        settings={"optim.lr": 1e-3, "optim.betas": [0.9, 0.95], "name": "x"},
        data="d",
        world_size=1,
    )


def save(run_folder: Path, step: int, model=None, optimizer=None) -> Path:
    """A checkpoint as train.py writes it, tokenizer and card aside."""
    model = model or small_model()
    target = run_folder / "checkpoints" / f"step_{step:07d}"
    with whole_folder(target) as folder:
        full = collect_state(model, optimizer or trained(model), ALONE)
        save_training_state(folder, full, [random_state()], state(step))
        save_model(folder / "model", model.config, full.weights)
        write_manifest(folder)
    point_latest(run_folder, target)
    return target


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def in_a_process(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


# ---------------------------------------------------------------------------------------------------------------
# Complete or absent


def test_a_folder_that_was_written_to_its_end(tmp_path):
    checkpoint = save(tmp_path, 500)
    assert {path.name for path in checkpoint.iterdir()} == FILES
    assert damage(checkpoint) is None
    assert names(tmp_path) == ["step_0000500"]
    assert load_state(checkpoint) == state(500)


def test_a_checkpoint_of_the_same_step_is_replaced_when_the_new_one_is_complete(tmp_path):
    first = save(tmp_path, 1)
    (first / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError), whole_folder(first):
        raise ValueError
    assert (first / "model" / "config.json").read_text() == "{"
    save(tmp_path, 1)
    assert damage(first) is None
    assert names(tmp_path) == ["step_0000001"]


def _save_on_a_full_disk(run_folder: Path, limit: int, connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal: writing fails
    try:
        save(run_folder, 2)
        connection.send("saved")
    except BaseException as error:
        connection.send((type(error).__name__, str(error)))


@pytest.mark.parametrize("limit", [1000, 10_000, 40_000])
def test_a_disk_that_fills_up(tmp_path, limit):
    """Files stop growing at `limit` bytes: in the random state (5 kB), the optimiser (60 kB), the model (30 kB)."""
    first = save(tmp_path, 1)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = in_a_process(_save_on_a_full_disk, tmp_path, limit, sender)
    kind, message = receiver.recv()
    process.join(30)
    assert kind == "UserError", message
    assert message.startswith(f"could not write {tmp_path / 'checkpoints' / 'step_0000002'}: ")
    assert "--resume auto" in message
    assert names(tmp_path) == ["step_0000001"]
    assert damage(first) is None
    assert (tmp_path / "latest").resolve() == first
    assert newest_checkpoint(tmp_path, pytest.fail) == first


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no file system can be mounted here; test_a_disk_that_fills_up tries the same with a limit")
    yield disk
    subprocess.check_call(["umount", "-l", str(disk)])


def test_a_real_disk_that_fills_up(small_disk):
    first = save(small_disk, 1)
    ballast = small_disk / "ballast"
    for kilobytes_left in (0, 8, 32, 64, 96):
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(0, free - kilobytes_left * 1024)))
        with pytest.raises(UserError, match=r"could not write .*step_0000002.*(No space left|os error 28)"):
            save(small_disk, 2)
        ballast.unlink()
        assert names(small_disk) == ["step_0000001"]
        assert damage(first) is None and (small_disk / "latest").resolve() == first
    tokenizer = Tokenizer(BPE())
    tokenizer.add_tokens([f"token {i}" for i in range(200)])
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    with (
        pytest.raises(UserError, match="No space left"),
        whole_folder(small_disk / "checkpoints" / "step_3") as folder,
    ):
        tokenizer.save(str(folder / "tokenizer.json"))  # raises a bare Exception
    ballast.unlink()
    assert damage(save(small_disk, 2)) is None


def _save_and_hang(run_folder: Path) -> None:
    model = small_model()
    with whole_folder(run_folder / "checkpoints" / "step_0000002") as folder:
        save_training_state(folder, collect_state(model, trained(model), ALONE), [random_state()], state(2))
        time.sleep(60)


def test_kill_in_the_middle_of_a_save(tmp_path):
    first = save(tmp_path, 1)
    process = in_a_process(_save_and_hang, tmp_path)
    partial = partial_name(tmp_path / "checkpoints" / "step_0000002")
    deadline = time.monotonic() + 30
    while not (partial / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    # What is left is under no checkpoint's name ...
    assert names(tmp_path) == [".step_0000002.partial", "step_0000001"]
    assert checkpoints(tmp_path) == [first]
    assert newest_checkpoint(tmp_path, pytest.fail) == first
    # ... and the next save, of whatever step, takes it away, with what a broken-off deletion left.
    (tmp_path / "checkpoints" / ".step_0000000.deleted" / "model").mkdir(parents=True)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_0000001", "step_0000003"]


# ---------------------------------------------------------------------------------------------------------------
# Damage


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda c: (c / "model" / "model.safetensors").unlink(), "model/model.safetensors is missing"),
        (lambda c: os.truncate(c / "optimizer.safetensors", 100), "optimizer.safetensors has 100 bytes instead of "),
        (lambda c: _flip_a_bit(c / "optimizer.safetensors"), "optimizer.safetensors does not match its checksum"),
        (lambda c: _flip_a_bit(c / "model" / "model.safetensors"), "model/model.safetensors does not match"),
        (lambda c: (c / "state.json").write_text(""), "state.json has 0 bytes instead of "),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda c: os.truncate(c / "manifest.json", 50), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text('{"files": {"x": {"bites": 3}}}'), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text('{"files": []}'), "manifest.json cannot be read"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_damage_is_seen_and_passed_over(tmp_path, harm, fault):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert damage(second) is None
    harm(second)
    assert damage(second).startswith(fault)
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append) == first
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{second} is damaged and passed over: {fault}")


def test_no_checkpoint_is_left(tmp_path):
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    checkpoint = save(tmp_path, 1)
    (checkpoint / "state.json").unlink()
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1


# ---------------------------------------------------------------------------------------------------------------
# The run folder


def empty_checkpoints(run_folder: Path, *steps: int) -> None:
    for step in steps:
        (run_folder / "checkpoints" / f"step_{step:07d}" / "model").mkdir(parents=True)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    empty_checkpoints(tmp_path, 90, 1000, 20_000_000, 5)
    (tmp_path / "checkpoints" / "step_x").mkdir()
    (tmp_path / "checkpoints" / "step_7").write_text("a file")
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [5, 90, 1000, 20_000_000]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_keep_last(tmp_path, keep, left):
    empty_checkpoints(tmp_path, 1, 2, 3, 4)
    point_latest(tmp_path, tmp_path / "checkpoints" / "step_0000004")
    remove_old(tmp_path, CheckpointConfig(keep_last=keep))
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == left
    assert len(names(tmp_path)) == len(left)


def test_a_run_that_was_set_back_keeps_what_it_has_just_saved(tmp_path):
    empty_checkpoints(tmp_path, 1, 2, 3, 4, 5)
    point_latest(tmp_path, tmp_path / "checkpoints" / "step_0000002")  # gone on from step 1, and saved
    remove_old(tmp_path, CheckpointConfig(keep_last=1))
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [2, 3, 4, 5]


def test_latest_is_a_relative_link(tmp_path):
    run = tmp_path / "a"
    empty_checkpoints(run, 1, 2)
    for step in (1, 2):
        point_latest(run, run / "checkpoints" / f"step_{step:07d}")
        assert os.readlink(run / "latest") == f"checkpoints/step_{step:07d}"
    run.rename(tmp_path / "b")  # a run folder may be moved
    assert (tmp_path / "b" / "latest" / "model").is_dir()
    (tmp_path / "b" / ".latest.partial").symlink_to("nowhere")  # of a process that was killed
    point_latest(tmp_path / "b", tmp_path / "b" / "checkpoints" / "step_0000001")
    assert os.readlink(tmp_path / "b" / "latest") == "checkpoints/step_0000001"
    assert not (tmp_path / "b" / ".latest.partial").is_symlink()


def test_latest_is_never_absent(tmp_path, monkeypatch):
    empty_checkpoints(tmp_path, 1, 2)
    point_latest(tmp_path, tmp_path / "checkpoints" / "step_0000001")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.readlink(tmp_path / "latest")), replace(a, b)))
    point_latest(tmp_path, tmp_path / "checkpoints" / "step_0000002")
    assert seen == ["checkpoints/step_0000001"]  # there until the rename, which is one step


# ---------------------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_optimizer_state_comes_back_bit_for_bit(tmp_path, tied, bias):
    settings = {"tie_word_embeddings": tied, "bias": bias}
    model = small_model(**settings)
    optimizer = trained(model)
    checkpoint = save(tmp_path, 3, model, optimizer)
    other = HGPTForCausalLM.from_pretrained(checkpoint / "model")
    restored = build_optimizer(other, OptimConfig())
    restore_state(other, restored, ALONE, None, load_optimizer(checkpoint, other))
    assert len(restored.state) == len(list(model.parameters()))
    for (name, parameter), (other_name, twin) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and torch.equal(parameter, twin)
        assert optimizer.state[parameter].keys() == restored.state[twin].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[parameter].items():
            twin_value = restored.state[twin][key]
            assert twin_value.dtype == value.dtype and torch.equal(twin_value, value), (name, key)
    # And the next step of both is the same.
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    optimizer.step()
    restored.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 1}, "not in the model ['transformer.h.1."),
        ({"n_layer": 3}, "not in the file ['transformer.h.2."),
        ({"tie_word_embeddings": False}, "not in the file ['lm_head.weight']"),
        ({"n_embd": 32}, "of another shape ['transformer.h.0."),
    ],
)
def test_the_optimizer_of_another_model_is_refused(tmp_path, settings, message):
    checkpoint = save(tmp_path, 1)
    other = small_model(**settings)
    with pytest.raises(UserError) as error:
        load_optimizer(checkpoint, other)
    assert f"{checkpoint / 'optimizer.safetensors'} belongs to another model: " in str(error.value)
    assert message in str(error.value)


def test_random_state_comes_back(tmp_path):
    torch.manual_seed(7)
    torch.rand(5)
    first = random_state()
    torch.rand(3)
    model = small_model()
    full, second = collect_state(model, trained(model), ALONE), random_state()
    save_training_state(tmp_path, full, [first, second], state(1))
    expected = torch.rand(4)
    assert load_random_state(tmp_path, 1)
    assert torch.equal(torch.rand(4), expected)
    assert load_random_state(tmp_path, 0)
    assert torch.equal(torch.get_rng_state(), first["torch"])
    before = torch.get_rng_state()
    assert not load_random_state(tmp_path, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_of_another_version(tmp_path):
    checkpoint = save(tmp_path, 1)
    content = json.loads((checkpoint / "state.json").read_text())
    assert set(content["packages"]) >= {"python", "torch", "hgpt"}
    (checkpoint / "state.json").write_text(json.dumps(content | {"moon": "full"}))
    with pytest.raises(UserError, match=r"state\.json was written by another version of hgpt \(.*'moon'"):
        load_state(checkpoint)


def test_data_fingerprint(tmp_path):
    def shards(folder: str, seed: int) -> list[TokenShards]:
        (tmp_path / folder).mkdir()
        splits = {}
        for split in ("train", "val"):
            with ShardWriter(tmp_path / folder, split) as writer:
                writer.write(np.random.RandomState(seed).randint(0, 9, 50))
                splits[split] = SplitMeta(tokens=50, documents=1, bytes=50, shards=writer.close())
        meta = DataMeta(tokenizer="t", vocab_size=9, end_of_text=8, splits=splits, source=f"in {folder}")
        write_meta(tmp_path / folder, meta)
        return [TokenShards.open(tmp_path / folder, split) for split in splits]

    a, copy, other = shards("a", 0), shards("copy", 0), shards("other", 1)
    assert data_fingerprint(*a) == data_fingerprint(*copy) != data_fingerprint(*other)
    assert data_fingerprint(a[0], other[1]) not in (data_fingerprint(*a), data_fingerprint(*other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": 0}, "checkpoint.every must be at least 1 step; got 0"), ({"keep_last": -1}, "checkpoint.keep_last")],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError) as error:
        CheckpointConfig(**settings)
    assert str(error.value).startswith(message)


# ---------------------------------------------------------------------------------------------------------------
# When, and beside what


def test_log_spaced_checkpoints_and_those_at_multiples_are_kept_for_good(tmp_path):
    config = CheckpointConfig(every=10, keep_last=1, keep_every=20, log_spaced_until=16)
    due = [step for step in range(61) if config.due(step)]
    assert due == [0, 1, 2, 4, 8, 10, 16, 20, 30, 40, 50, 60]
    for step in due:
        empty_checkpoints(tmp_path, step)
        point_latest(tmp_path, tmp_path / "checkpoints" / f"step_{step:07d}")
        remove_old(tmp_path, config)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [0, 1, 2, 4, 8, 16, 20, 40, 60]


def test_without_these_settings_there_is_none_at_step_0():
    assert [step for step in range(9) if CheckpointConfig(every=4).due(step)] == [4, 8]
    assert not any(CheckpointConfig(every=4).for_good(step) for step in range(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_every": -1}, r"checkpoint\.keep_every must be 0 \(none\) or more; got -1"),
        ({"log_spaced_until": -8}, r"checkpoint\.log_spaced_until must be 0 \(none\) or more; got -8"),
        ({"keep_every": 10, "keep_last": 0, "every": 10}, "has no effect with checkpoint.keep_last = 0"),
        ({"keep_every": 15, "every": 10}, "must be a multiple of checkpoint.every = 10"),
    ],
)
def test_checkpoint_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        CheckpointConfig(**settings)


@pytest.mark.parametrize("background", [True, False])
def test_the_writer_writes_one_after_the_other(background):
    order = []

    def write(number: int) -> None:
        time.sleep(0.2)
        order.append(number)

    with Writer(background) as writer:
        start = time.perf_counter()
        writer.submit(lambda: write(1))
        assert (time.perf_counter() - start < 0.1) == background, "in the background nobody waits"
        writer.wait(only_look=True)
        assert order == ([] if background else [1])
        writer.submit(lambda: write(2))  # waits for the first
        assert order == ([1] if background else [1, 2])
    assert order == [1, 2]
    assert writer.seconds > 0.3


def test_a_failure_in_the_background_is_raised_at_the_next_look():
    def fail() -> None:
        raise UserError("the disk is full")

    with Writer(background=True) as writer:
        writer.submit(fail)
        deadline = time.monotonic() + 5
        with pytest.raises(UserError, match="the disk is full"):
            while time.monotonic() < deadline:
                writer.wait(only_look=True)
    # At the latest when the run ends, and not in the place of what ended it.
    with pytest.raises(UserError, match="the disk is full"), Writer(background=True) as writer:
        writer.submit(fail)
    with pytest.raises(KeyboardInterrupt), Writer(background=True) as writer:
        writer.submit(fail)
        raise KeyboardInterrupt
