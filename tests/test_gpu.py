"""Training on a GPU: a run resumes bit for bit, every engine gives the curve of one process, and no step waits for the
device. Where a test means something on a CPU too, `device` is both."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from processes import run
from small_run import HARMONIC, SOFTMAX, assert_same_checkpoint, at_step, losses, make_config, set_back
from torch.autograd import DeviceType

import train
from hgpt.run.config import RunConfig

GPU = pytest.mark.gpu
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=GPU)]
SLOW_CPU_AND_GPU = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
PROCESSES = sorted({1, max(1, torch.cuda.device_count())})
TOLERANCE = 2e-3  # of a loss in bf16, where ZeRO keeps the residual stream in bf16 and autocast in float32


@pytest.fixture(autouse=True)
def _on_the_device(request, monkeypatch):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("device") == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision per process
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def gpu_config(data: Path, runs: Path, name: str, **changes) -> RunConfig:
    """A run of 12 steps of 2048 tokens in bf16, saved after 6."""
    sections = {
        "model": {"n_embd": 64, "dropout": 0.0},
        "train": {"steps": 12, "global_batch": 32, "micro_batch": 4, "precision": "bf16"},
        "optim": {"lr": 5e-4, "min_lr": 5e-5},  # at higher rates the rounding of the first steps grows
        "eval": {"every": 12},
        "checkpoint": {"every": 6},
    }
    sections = {s: sections.get(s, {}) | changes.get(s, {}) for s in sections | changes}
    config = make_config(data, runs, name=name, **sections)
    return replace(config, data=replace(config.data, seq_len=64))


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_a_run_resumes_bit_for_bit_in_deterministic_mode(data, tmp_path, device):
    """With dropout, whose random numbers belong to the checkpoint; conftest sets cuBLAS's workspace."""
    whole = gpu_config(data, tmp_path, "whole", model={"dropout": 0.1}, train={"micro_batch": 16})
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the index of a median, which is not used, is not
    try:
        train.main(whole)
        parted = set_back(whole, 6, name="parted")
        train.main(parted)
    finally:
        torch.use_deterministic_algorithms(before)
    assert losses(parted.run_folder) == losses(whole.run_folder)
    assert_same_checkpoint(parted.run_folder / "latest", whole.run_folder / "latest")


@pytest.fixture
def unlogged_steps(data, tmp_path, monkeypatch):
    """Train, and call one function before the fourth step, and another one before the eighth."""

    def trained(begin, end, head=HARMONIC, algorithm="adamw"):
        own = {"model": {"head": head}, "optim": {"algorithm": algorithm}}
        config = gpu_config(data, tmp_path, "run", **own, log={"every": 12}, checkpoint={"every": 12})
        at_step(monkeypatch, 3, begin)
        at_step(monkeypatch, 7, end)
        train.main(config)

    return trained


@pytest.mark.gpu
@pytest.mark.parametrize(("head", "algorithm"), [(HARMONIC, "adamw"), (SOFTMAX, "adamw"), (HARMONIC, "muon")], ids=str)
def test_no_unlogged_step_waits_for_the_device(unlogged_steps, head, algorithm):
    seen = []

    def begin() -> None:
        torch.cuda.set_sync_debug_mode("error")

    def end() -> None:
        seen.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")

    try:
        unlogged_steps(begin, end, head, algorithm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [2]  # "error", until then


@pytest.mark.gpu
def test_the_profiler_sees_no_wait_in_unlogged_steps(unlogged_steps):
    """Also of waits that PyTorch's own check does not know."""
    profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
    steps = torch.profiler.record_function("unlogged steps")

    def begin() -> None:
        profiler.start()
        steps.__enter__()

    def end() -> None:
        steps.__exit__(None, None, None)
        torch.cuda.synchronize()
        profiler.stop()

    unlogged_steps(begin, end)
    calls = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    (span,) = (event.time_range for event in calls if event.name == "unlogged steps")
    inside = [event.name for event in calls if span.start < event.time_range.start < span.end]
    assert any("LaunchKernel" in name for name in inside)
    assert [name for name in inside if "Synchronize" in name] == []


DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
ENGINES = ["fsdp2", *(pytest.param(name, marks=DEEPSPEED) for name in ("zero2", "zero3"))]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", SLOW_CPU_AND_GPU)
def test_an_engine_gives_the_curve_of_one_plain_process(data, tmp_path, device, engine, tied, processes):
    if device == "cpu" and engine == "fsdp2":
        pytest.skip("Accelerate runs FSDP on GPUs only")
    model = {"tie_word_embeddings": tied}
    plain, sharded = (gpu_config(data, tmp_path, name, model=model) for name in ("plain", engine))
    train.main(plain)
    run(sharded, processes, engine)
    np.testing.assert_allclose(losses(sharded.run_folder), losses(plain.run_folder), rtol=0, atol=TOLERANCE)
    assert len(losses(plain.run_folder)) == 12


@DEEPSPEED
@pytest.mark.parametrize("device", SLOW_CPU_AND_GPU)
def test_a_checkpoint_of_zero2_goes_on_in_a_plain_process(data, tmp_path, device):
    whole = gpu_config(data, tmp_path, "whole")
    run(whole, PROCESSES[-1], "zero2")
    handed = set_back(whole, 6, name="handed")
    train.main(handed)
    np.testing.assert_allclose(losses(handed.run_folder), losses(whole.run_folder), rtol=0, atol=TOLERANCE)
    assert len(losses(handed.run_folder)) == 12
