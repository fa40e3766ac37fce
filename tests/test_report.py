"""hgpt/run/report.py: FLOPs as torch counts them, tokens/s without pauses, metrics.jsonl, trackers, phases, spikes."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import PartialState
from small_run import make_config, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run import report
from hgpt.run.config import LogConfig
from hgpt.run.report import LossSpikes, MetricsLog, PhaseTimes, Report, build_trackers, flops_per_token


@pytest.mark.parametrize("head", ["harmonic", "softmax"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_that_torch_counts(head, tied):
    """Eager attention multiplies all T · T scores, and so the formula counts them; a causal kernel skips half of them.

    The counter sees matrix products alone: norms, activations and the pointwise work on distances are in neither.
    """
    T = 32
    config = HGPTConfig(
        vocab_size=200, n_positions=T, n_embd=48, n_layer=2, n_head=3, head=head, tie_word_embeddings=tied
    )
    model = HGPTForCausalLM(config)
    model.set_attn_implementation("eager")
    ids = torch.randint(200, (3, T))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
    # The dense head multiplies with the 200 classes or with all 256 rows, as it likes; the fused one with all rows.
    per_row = 6 * 48
    padding = (config.padded_vocab_size - config.vocab_size) * per_row
    counted = counter.get_total_flops() / ids.numel()
    assert counted in (flops_per_token(config, T), flops_per_token(config, T) - padding)


def test_flops_per_token_of_gpt2_small():
    # PaLM's formula by hand: 6 N + 12 L D T with N = 12 · 12 · 768² + 50304 · 768 = 123,568,128 weights.
    config = HGPTConfig()
    assert flops_per_token(config, 1024) == 6 * 123_568_128 + 12 * 12 * 768 * 1024


def test_speed_leaves_pauses_out(tmp_path, monkeypatch):
    """3 steps of 8 · 16 tokens in 10 s, of which an evaluation takes 2 s and a checkpoint 5 s: 128 tokens/s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(report, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    accelerator = SimpleNamespace(gather=lambda mine: torch.cat([mine, mine + 1]))  # the other process needs 1 s more
    engine = SimpleNamespace(is_main=False, device=torch.device("cpu"), accelerator=accelerator, world_size=2)
    engine.precision, engine.model_config = "bf16", HGPTConfig()
    run = Report(make_config(tmp_path, tmp_path), engine, SimpleNamespace(resumed=None))
    with run:
        for phase, seconds in (("data", 0.5), ("evaluation", 2.0), ("save", 5.0), ("forward", 1.5), ("step", 1.0)):
            with run.phase(phase):
                clock.now += seconds
        for _ in range(3):
            run.stepped(torch.tensor(1.0), torch.tensor(2.0))
        speed = run.speed()
        assert speed.tokens_per_second == 3 * 128 / 3
        # 312 TFLOP/s is an A100's peak.
        assert speed.mfu == pytest.approx(128 * flops_per_token(HGPTConfig(), 16) / (2 * 312e12))
        assert speed.own == [2.0, 3.0] and len(speed.memory) == 2
        clock.now += 4
        run.stepped(torch.tensor(1.0), torch.tensor(2.0))
        assert run.speed().tokens_per_second == 32  # what was before is forgotten


# --------------------------------------------------------------------------------------------------- metrics.jsonl


def test_lines(tmp_path):
    log = MetricsLog(tmp_path, [], {}, 0)
    log.write("train", 1, {"loss": 5.5, "lr": 1e-3})
    assert len(records(tmp_path, "train")) == 1  # at once, not when the run ends
    log.write("eval", 1, {"loss": float("nan"), "x_norm_max": float("inf")})
    log.write("processes", 1, {"memory_gib": [1.0, 2.0]}, track=False)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second, third = (json.loads(line, parse_constant=pytest.fail) for line in lines)  # no NaN token
    assert first.pop("time") > 1.6e9
    assert first == {"kind": "train", "step": 1, "loss": 5.5, "lr": 1e-3}
    assert (second["loss"], second["x_norm_max"]) == (None, None)
    assert (third["kind"], third["step"], third["memory_gib"]) == ("processes", 1, [1.0, 2.0])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    for step, left in ((1, ["train", "processes"]), (0, [])):  # resumed there; the evaluation is repeated
        MetricsLog(tmp_path, [], {}, step).close()
        assert [record["kind"] for record in records(tmp_path)] == left


def test_a_full_disk_is_a_clear_error(tmp_path):
    log = MetricsLog(tmp_path, [], {}, 0)
    log._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"could not write .*No space left on device; make room"):
        log.write("train", 1, {"loss": 1.0})
    with pytest.raises(OSError):
        log._file.close()


# -------------------------------------------------------------------------------------------------------- Trackers


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard(tmp_path):
    PartialState()  # accelerate's trackers ask which process they are in
    config = LogConfig()
    log = MetricsLog(tmp_path, build_trackers(config, tmp_path, "x"), {"optim.lr": 1e-3, "betas": (0.9, 0.95)}, 0)
    for step in range(1, 6):
        log.write("train", step, {"loss": 10.0 - step, "lr": 1e-3})
    log.write("eval", 5, {"loss": 4.5})
    log.write("train", 5, {"seconds_data": 0.5})
    log.close()
    # TensorBoard takes each folder with events for a run, and sorts groups of tags by name.
    assert [path.parent.name for path in tmp_path.rglob("events.*")] == ["tensorboard"]
    assert scalars(tmp_path, "train_seconds/data") == [(5, 0.5)]
    assert scalars(tmp_path, "train/loss") == [(step, 10.0 - step) for step in range(1, 6)]
    assert scalars(tmp_path, "eval/loss") == [(5, 4.5)]
    # The run broke off after step 5 and resumes a checkpoint of step 3: steps 4 and 5 are not shown twice.
    log = MetricsLog(tmp_path, build_trackers(config, tmp_path, "x", 3), {"optim.lr": 1e-3}, 3)
    for step in range(4, 7):
        log.write("train", step, {"loss": 20.0 - step})
    log.close()
    assert scalars(tmp_path, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 16.0), (5, 15.0), (6, 14.0)]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """With a stand-in for the package: what it is asked to do, which is all that can be tried offline."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"log\.trackers .*hgpt\[wandb\]\".* = \[\]"):
        patch.setattr(report, "find_spec", lambda name: None)
        build_trackers(LogConfig(trackers=("wandb",)), tmp_path, "x")
    PartialState()
    started, logged = [], []
    run = SimpleNamespace(log=lambda values, step, **_: logged.append((step, values)), finish=lambda: None)
    stub = SimpleNamespace(init=lambda **settings: started.append(settings) or run, config=Mock())
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(report, "find_spec", lambda name: stub)
    monkeypatch.setenv("WANDB_PROJECT", "p")
    config = LogConfig(trackers=("wandb",))
    for step in (0, 3):
        log = MetricsLog(tmp_path, build_trackers(config, tmp_path, "x", step), {"a": 1}, step)
        log.write("train", step + 1, {"loss": 2.0})
        log.close()
    first, second = started
    assert (first["project"], first["name"], first["resume"]) == ("p", "x", "allow")
    assert first == second and len(first["id"]) == 16
    assert logged == [(1, {"train/loss": 2.0}), (4, {"train/loss": 2.0})]


# ----------------------------------------------------------------------------------------------- Phases and spikes


def test_phases_are_timed_and_read_once():
    phases = PhaseTimes(torch.device("cpu"))
    for phase, seconds in (("forward", 0.05), ("forward", 0.05), ("data", 0.01)):
        with phases(phase):
            time.sleep(seconds)
    seconds = phases.read()
    assert list(seconds) == ["forward", "data"]
    assert 0.1 <= seconds["forward"] < 1 and 0.01 <= seconds["data"] < 0.5
    assert phases.read() == {}


def test_a_spike_is_far_above_the_running_mean():
    quiet = (3 + 0.1 * np.random.RandomState(0).randn(1000)).tolist()
    falling = [10 - step / 200 for step in range(1000)]
    # Six standard deviations of 0.1 above 3 are 3.6; the estimate of both is not exact. The first steps never count.
    for losses, found in ((quiet, []), (falling, []), ([1.0, 100.0], []), ([*quiet, 3.4, 3.9, 9.0, 3.0], [1001, 1002])):
        spikes = LossSpikes()
        assert [step for step, loss in enumerate(losses) if spikes.add(loss)] == found
