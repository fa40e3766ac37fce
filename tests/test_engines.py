"""hgpt/run/engines.py with processes on gloo: whatever the engine, the same losses, and a run that resumes exactly."""

import functools
import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from full_disk import file_size_limit
from processes import ENGINES, engine_environment, finish, free_port, in_group, run, start, wait_for_step
from safetensors.torch import load_file
from small_run import HARMONIC as WITHOUT_RADII
from small_run import SOFTMAX, altered, assert_same_checkpoint, losses, make_config, records, set_back, stub_accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import train
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmonized import HarmonizedConfig, model_class
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run import engines
from hgpt.run.checkpoint import checkpoint_step, checkpoints, damage
from hgpt.run.config import OptimConfig, RunConfig
from hgpt.run.engines import Engine, whole
from hgpt.run.optim import build_optimizer
from hgpt.run.stop import EXIT_HUNG, EXIT_PREEMPTED

HARMONIC = replace(WITHOUT_RADII, radius="learned")
pytestmark = pytest.mark.skipif(os.uname().sysname != "Linux", reason="DeepSpeed exists for Linux")


def engine_config(data: Path, tmp_path: Path, name: str, **sections) -> RunConfig:
    # The norm is well below the gradient's, so that clipping is at work.
    defaults = {"model": {"dropout": 0.0}, "train": {"micro_batch": 2}, "optim": {"grad_clip": 0.5}}
    sections |= {section: values | sections.get(section, {}) for section, values in defaults.items()}
    return make_config(data, tmp_path, name=name, resume="auto", **sections)


def curve(config: RunConfig) -> np.ndarray:
    """Loss and gradient norm of every step, (steps, 2)."""
    return np.array([[record["loss"], record["grad_norm"]] for record in records(config.run_folder, "train")])


def assert_same_run(config: RunConfig, expected: RunConfig, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(curve(config), curve(expected), rtol=0, atol=tolerance)
    evaluations = [[r["loss"] for r in records(c.run_folder, "eval")] for c in (config, expected)]
    np.testing.assert_allclose(*evaluations, rtol=0, atol=tolerance)
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(c.run_folder / "latest" / name) for c in (config, expected))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=tolerance, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run of one process to compare with, for a head and tied or untied weights; trained once for each."""
    runs = tmp_path_factory.mktemp("alone")

    @functools.cache
    def trained(head, tied: bool) -> RunConfig:
        model = {"head": head, "tie_word_embeddings": tied}
        config = engine_config(data, runs, f"{head.type}-{tied}", model=model, train={"steps": 20}, eval={"every": 10})
        train.main(config)
        return config

    return trained


FAST = [("ddp", 2, SOFTMAX, False), ("zero1", 2, HARMONIC, True), ("zero2", 2, SOFTMAX, False),
        ("zero3", 2, HARMONIC, True)]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "processes", "head", "tied"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in product(ENGINES, (1, 2, 4), (HARMONIC, SOFTMAX), (True, False))
    ],
    ids=lambda value: getattr(value, "type", str(value)),
)
def test_every_engine_gives_the_curve_of_one_process(tmp_path, alone, engine, processes, head, tied):
    expected = alone(head, tied)
    config = replace(expected, runs_dir=str(tmp_path))
    run(config, processes, engine)
    assert_same_run(config, expected)
    model = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model")
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto")
# ZeRO-3 that keeps no parameter whole for a moment longer than it has to; by default it keeps small models' for good.
KEEPS = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
STRICT_ZERO3 = AUTO | {"zero_optimization": {"stage": 3} | {f"stage3_{name}": 0 for name in KEEPS}}


def test_a_line_reaches_a_pipe_at_once(monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))
    Engine.say(SimpleNamespace(accelerator=SimpleNamespace(print=print)), "step 1")
    assert pipe.getvalue() == b"step 1\n"


def test_a_distance_may_read_parameters_that_zero3_keeps_in_pieces(data, tmp_path):
    """They are whole while their module is called, and `pairwise` is called outside: DeepSpeed collects them there too,
    since they are read as attributes within the head's forward."""
    strict = tmp_path / "strict.json"
    strict.write_text(json.dumps(STRICT_ZERO3))
    file = Path(__file__).parent.parent / "configs" / "distances" / "lorentzian.py"
    head = replace(HARMONIC, distance="lorentzian", distance_file=str(file))
    alone = engine_config(data, tmp_path, "alone", model={"head": head}, optim={"metric_lr_multiplier": 10.0})
    together = replace(alone, name="together")
    train.main(alone)
    run(together, 2, "zero3", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(strict))
    assert_same_run(together, alone, tolerance=3e-5)  # gradient norms of up to 10 in float32
    weights = load_file(together.run_folder / "latest" / "model" / "model.safetensors")
    (learnt,) = (value for name, value in weights.items() if name.endswith("log_scale"))
    assert learnt.abs() > 0.01  # it starts at 0


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.slow if e in ("zero1", "zero2") else ()) for e in ENGINES]
)
def test_six_steps_are_three_and_three_under_every_engine(data, tmp_path, engine):
    whole = engine_config(data, tmp_path, "whole", model={"dropout": 0.1})
    run(whole, 2, engine)
    assert (whole.run_folder / "latest" / "rng_00001.safetensors").exists()
    parted = set_back(whole, 3, name="parted")
    run(parted, 2, engine)
    assert_same_run(parted, whole, 1e-6)


def test_master_weights_are_float32_under_bf16(data, tmp_path):
    whole = engine_config(data, tmp_path, "whole", train={"precision": "bf16"})
    run(whole, 2, "zero2")
    weights = load_file(whole.run_folder / "latest" / "model" / "model.safetensors")
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), f"{name} was rounded"
    parted = set_back(whole, 3, name="parted")
    run(parted, 2, "zero2")
    assert_same_run(parted, whole, 1e-6)
    # bf16 is close to float32, so nothing is lost on the way but digits.
    exact = engine_config(data, tmp_path, "exact")
    train.main(exact)
    np.testing.assert_allclose(losses(whole.run_folder), losses(exact.run_folder), atol=0.02)


ELASTIC = [
    [("ddp", 2, 2), ("zero3", 2, 1), ("ddp", 1, 8)],
    [("ddp", 1, 2), ("ddp", 2, 1), ("ddp", 1, 4)],
    [("zero3", 2, 2), ("zero1", 1, 4), ("zero2", 2, 1)],
]


@pytest.mark.parametrize(
    "legs",
    [pytest.param(legs, marks=pytest.mark.slow if number else ()) for number, legs in enumerate(ELASTIC)],
    ids=lambda legs: "-".join(f"{engine}x{count}" for engine, count, _ in legs),
)
def test_a_run_resumes_with_other_processes_engines_and_micro_batches(data, tmp_path, legs):
    """From the checkpoints of 3 and 6 of its 9 steps."""
    whole = engine_config(data, tmp_path, "whole", train={"steps": 9})
    train.main(whole)
    config = replace(whole, name="moved0")
    for step, (engine, processes, micro_batch) in zip((0, 3, 6), legs, strict=True):
        config = set_back(config, step, name=f"moved{step}") if step else config
        config = altered(config, train={"micro_batch": micro_batch})
        run(config, processes, engine)
    assert_same_run(config, whole, 1e-4)


# ---------------------------------------------------------------------------------------------------------- Faults


@pytest.fixture
def training(data, tmp_path):
    """A function: a run of two processes, and these, which have trained 3 steps of many."""

    def in_step_3(**settings):
        often = {"every": 10_000}
        config = engine_config(data, tmp_path, "run", train={"steps": 10_000} | settings, checkpoint=often, eval=often)
        started = start([config], 2, log=tmp_path / "run.log")
        wait_for_step(config.run_folder, 3, started)
        return config, started

    return in_step_3


def test_preemption_saves_and_asks_to_be_started_again(tmp_path, training):
    config, started = training()
    for process in started:  # a cluster tells all of them
        os.kill(process.pid, signal.SIGTERM)
    assert finish(started) == [EXIT_PREEMPTED] * 2
    (saved,) = checkpoints(config.run_folder)
    step = checkpoint_step(saved)
    assert damage(saved) is None and (config.run_folder / "preempted").exists()
    assert f"stopped by SIGTERM after step {step}" in (tmp_path / "run.0").read_text()
    run(altered(config, train={"steps": step + 2}), 2)
    assert not (config.run_folder / "preempted").exists()
    assert [record["step"] for record in records(config.run_folder, "train")] == list(range(1, step + 3))


def test_when_one_process_dies_the_others_stop(tmp_path, training):
    _, started = training(hang_timeout=20)
    started[1].kill()
    assert finish(started, timeout=45) == [EXIT_HUNG, -signal.SIGKILL]
    assert "error: process 0 lost contact with another one: " in (tmp_path / "run.0").read_text()


@pytest.mark.parametrize("frozen", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_named(tmp_path, training, frozen):
    """Even process 0, which holds the store."""
    _, started = training(hang_timeout=6)
    os.kill(started[frozen].pid, signal.SIGSTOP)
    started[1 - frozen].join(45)
    assert started[1 - frozen].exitcode == EXIT_HUNG
    started[frozen].kill()
    finish(started)
    message = (tmp_path / f"run.{1 - frozen}").read_text()
    assert f"process {1 - frozen} has waited for 6 s in step" in message and "--resume auto" in message
    assert ("process 1 has been silent for" if frozen else "process 0") in message


def test_processes_with_different_settings_do_not_start(data, tmp_path):
    config = engine_config(data, tmp_path, "run")
    other = altered(config, optim={"lr": 1e-4, "min_lr": 1e-5})
    assert finish(start([config, other], 2, log=tmp_path / "run.log")) == [2, 2]
    assert "optim.lr: 0.003 on process 0, 0.0001 on process 1" in (tmp_path / "run.1").read_text()
    assert not config.run_folder.exists()


@pytest.mark.parametrize(
    ("engine", "variables", "file", "settings", "message"),
    [
        ("zero2", {"GRADIENT_ACCUMULATION_STEPS": "3"}, {}, {}, "gradient_accumulation_steps = 3, and the run's .* 4"),
        ("zero2", {"GRADIENT_CLIPPING": "2.0"}, {}, {}, r"gradient_clipping = 2\.0, and the run's .* says 0\.5"),
        ("zero2", {}, {"optimizer": {"type": "Adam"}}, {}, "a section 'optimizer'"),
        ("zero2", {}, {"bf16": {"enabled": True}}, {}, "bf16.enabled = true, and the run trains in fp32"),
        ("zero2", {}, {"fp16": {"enabled": True}}, {"precision": "bf16"}, "fp16.enabled = true, .* trains in bf16"),
        ("zero2", {}, {"bf16": {"enabled": False}}, {"precision": "bf16"}, "bf16.enabled = false, .* trains in bf16"),
        ("zero3", {}, {}, {"compile": True}, r"train\.compile = true .* ZeRO-3"),
        ("zero1", {}, {}, {"skip_non_finite": 1}, r"train\.skip_non_finite = 1 .* DeepSpeed ZeRO-1"),
        ("zero1", {}, {}, {"algorithm": "muon"}, r'optim\.algorithm = "muon" .* DeepSpeed ZeRO-1'),
        ("ddp", {}, {}, {"algorithm": "muon"}, r'optim\.algorithm = "muon" .* FSDP2'),
    ],
)
def test_what_an_engine_cannot_do_and_a_launcher_that_contradicts_the_run_are_refused(
    data, tmp_path, monkeypatch, engine, variables, file, settings, message
):
    """`variables`: of the environment, ACCELERATE_…; `file`: sections of DeepSpeed's file."""
    config = engine_config(data, tmp_path, "run", **{"optim" if "algorithm" in settings else "train": settings})
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which is lengthened
    for name, value in (ENGINES[engine] | {f"ACCELERATE_{name}": value for name, value in variables.items()}).items():
        monkeypatch.setenv(name, value)
    if file:
        (tmp_path / "deepspeed.json").write_text(json.dumps(STRICT_ZERO3 | file))
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    with pytest.raises(UserError, match=message):
        precision = engines._mixed_precision(config.train.precision, on_gpu=False)
        kind, plugin = ("FSDP", None) if engine == "ddp" else ("DEEPSPEED", engines._deepspeed_plugin(precision))
        Engine(config, stub_accelerator(kind, deepspeed_plugin=plugin)).configure(4)


@pytest.mark.parametrize(("apart", "limit"), [(False, 8), (True, 12)])
def test_blocks_compile_with_a_torch_that_cannot_keep_compilations_apart(monkeypatch, apart, limit):
    """`isolate_recompiles` is newer than torch 2.11: all blocks then share a limit, which has to be high enough."""
    compiled = []

    def compile(module, **options):
        if options:
            raise TypeError(f"compile() got an unexpected keyword argument {next(iter(options))!r}")
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    shape = {"vocab_size": 50, "n_positions": 8, "n_layer": 3, "n_head": 2, "n_embd": 16}
    model = HGPTForCausalLM(HGPTConfig(**shape, scale_attn_by_inverse_layer_idx=apart))
    with torch._dynamo.config.patch(recompile_limit=8):
        engines.compile_blocks(model)
        assert torch._dynamo.config.recompile_limit == limit
    assert compiled == list(model.transformer.h)


def test_engines_that_are_not_there(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"asks for FSDP, .* on GPUs"):
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        engines.build_accelerator("fp32", 60)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for platform, way_out in (("linux", r'pip install "hgpt\[deepspeed\]"'), ("darwin", "Linux only")):
        monkeypatch.setattr(engines.sys, "platform", platform)
        with pytest.raises(UserError, match=f"DeepSpeed, which is not installed: .*{way_out}"):
            engines.build_accelerator("fp32", 60)


def test_a_rendezvous_that_nobody_answers(data, tmp_path):
    config = engine_config(data, tmp_path, "run", train={"hang_timeout": 2})
    started = start([config], 1, log=tmp_path / "run.log", WORLD_SIZE="2", RANK="1", MASTER_PORT=str(free_port()))
    assert finish(started) == [2]
    message = (tmp_path / "run.0").read_text()
    assert "the 2 processes of this run did not find each other within 3 s at 127.0.0.1:" in message


def test_another_checkout_is_another_code(tmp_path):
    ours = engines.code_fingerprint()
    copy = tmp_path / "hgpt"
    shutil.copytree(Path(engines.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert engines.code_fingerprint(copy) == ours
    with open(copy / "model" / "harmax.py", "a") as file:
        file.write("# another word\n")
    assert engines.code_fingerprint(copy) != ours


def test_a_disk_that_fills_up_while_training_goes_on(data, tmp_path):
    """No file may grow beyond 200 KB: the optimiser's state, written in the background, does not fit."""
    whole, config = (engine_config(data, tmp_path, name) for name in ("whole", "run"))
    with file_size_limit(200_000), pytest.raises(UserError, match=r"could not write .*make room, .*--resume auto"):
        train.main(config)
    assert not checkpoints(config.run_folder) and not list(config.run_folder.glob("checkpoints/.*"))
    train.main(config)
    train.main(whole)
    assert losses(config.run_folder) == losses(whole.run_folder)


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_fsdp2_pieces_are_collected_and_handed_out(tmp_path, backbone):
    """What Accelerate does on GPUs, done by hand in two processes: sharded by fully_shard, steps, and back."""
    codes = in_group(partial(_fsdp2, backbone), 2, tmp_path)
    assert codes == [0, 0], (tmp_path / "log.0").read_text()[-3000:]


def _fsdp2(backbone: str | None, folder: Path) -> None:
    free = {"radius": "learned", "final_norm": "none"}
    config = HGPTConfig(vocab_size=61, n_positions=8, n_layer=2, n_head=2, n_embd=10, exponent=5.0, **free)
    if backbone is not None:
        shape = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"model_type": backbone, "vocab_size": 64, "num_key_value_heads": 1, "tie_word_embeddings": True}
        config = HarmonizedConfig(backbone=shape, vocab_size=61, exponent=5.0, radius="learned")
    os.environ.update(engine_environment("fsdp2"))  # what configs/accelerate/fsdp2.yaml says
    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    accelerator = stub_accelerator("FSDP", rank, 2)
    tokens = torch.arange(16).reshape(2, 8) % 61

    def steps(model, optimizer, count: int) -> None:
        for _ in range(count):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def build(weights=None, *, pieces: bool = True):
        torch.manual_seed(0)
        model = model_class(config)(config)
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        if pieces:
            split = fsdp2_prepare_auto_wrap_policy(FullyShardedDataParallelPlugin(), model)
            blocks = [module for module in model.modules() if split(module)]
            assert blocks == list(model.transformer.h)
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, build_optimizer(model, OptimConfig(lr=1e-2))

    plain, plain_optimizer = build(pieces=False)
    steps(plain, plain_optimizer, 2)
    model, optimizer = build()
    steps(model, optimizer, 2)
    engine = Engine(None, accelerator)
    engine.prepare(model, optimizer, {})
    collected = [engine.collect()]
    assert (collected[0] is None) == (rank != 0)
    torch.distributed.broadcast_object_list(collected)
    full = collected[0]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(full.weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)
        for kind, value in plain_optimizer.state[parameter].items():
            torch.testing.assert_close(full.optimizer[name][kind], value, rtol=1e-4, atol=1e-7)

    again, optimizer_again = build(full.weights)
    Engine(None, accelerator).prepare(again, optimizer_again, full.optimizer)
    with whole(again.lm_head.weight) as centres:
        assert torch.equal(centres, full.weights[again._tied_weights_keys["lm_head.weight"]])
    steps(model, optimizer, 1)
    steps(again, optimizer_again, 1)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_ends_with_the_same_weights(data, tmp_path):
    sections = {"train": {"steps": 150}, "eval": {"every": 50}, "checkpoint": {"every": 1}}
    whole, killed = (engine_config(data, tmp_path, name, model={"dropout": 0.1}, **sections) for name in ("w", "k"))
    train.main(whole)
    rng = np.random.RandomState(0)
    for _ in range(20):
        (process,) = start([killed], 1, log=tmp_path / "killed.log")
        newest = checkpoints(killed.run_folder)[-1:]
        while process.is_alive() and checkpoints(killed.run_folder)[-1:] == newest:
            time.sleep(0.005)  # every life gets at least one checkpoint further
        time.sleep(rng.uniform(0, 0.2))
        assert process.is_alive(), (tmp_path / "killed.0").read_text()[-3000:]
        process.kill()
        process.join()
    # What a kill in the middle of a write leaves behind.
    with open(killed.run_folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    (killed.run_folder / "checkpoints" / ".step_0000039.partial").mkdir(exist_ok=True)
    train.main(killed)
    assert losses(killed.run_folder) == losses(whole.run_folder)
    assert_same_checkpoint(checkpoints(killed.run_folder)[-1], checkpoints(whole.run_folder)[-1])
