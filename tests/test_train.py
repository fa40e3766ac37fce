"""The training loop: what it learns, that it resumes exactly, what it leaves behind, and how it stops for bad input."""

import json
import math
import os
import re
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from small_run import (
    HARMONIC,
    SEQ_LEN,
    SOFTMAX,
    VOCAB,
    altered,
    assert_same_checkpoint,
    at_step,
    losses,
    make_config,
    markov_tokens,
    records,
    set_back,
    steps_in,
    write_data,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from hgpt import evaluate
from hgpt.data.batches import epoch_permutation, num_windows
from hgpt.durable import folder_lock
from hgpt.errors import UserError
from hgpt.run.checkpoint import LOCK, checkpoints
from hgpt.run.config import RunConfig
from hgpt.run.settings import load_run_config

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
HEADS = pytest.mark.parametrize("head", [HARMONIC, SOFTMAX], ids=["harmonic", "softmax"])


def assert_same_end(config: RunConfig, expected: RunConfig) -> None:
    """The same losses at every step, the same evaluations, and the same last checkpoint, bit for bit."""
    assert losses(config.run_folder) == losses(expected.run_folder)
    ours, theirs = ([(r["step"], r["loss"]) for r in records(c.run_folder, "eval")] for c in (config, expected))
    assert ours == theirs
    assert_same_checkpoint(checkpoints(config.run_folder)[-1], checkpoints(expected.run_folder)[-1])
    assert (config.run_folder / "latest").resolve() == checkpoints(config.run_folder)[-1].resolve()


# -------------------------------------------------------------------------------------------------------- Learning


@HEADS
def test_radii_start_at_the_frequencies_of_the_tokens(tmp_path, head):
    """Almost the unigram model, whose loss is far below that of a uniform one; they are trained, and exported."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.05, 20_000), VOCAB - 1).astype(np.uint16)
    folder = write_data(tmp_path / "data", tokens, tokens[:2000])
    frequencies = (np.bincount(tokens, minlength=VOCAB) + 1) / (len(tokens) + VOCAB)
    unigram = -np.log(frequencies[tokens[1:2000]]).mean()
    # Far from the small centres all distances are alike; near 0 all products are.
    head = replace(head, radius="learned", final_norm_gain=1.0 if head == HARMONIC else 0.01)
    config = make_config(folder, tmp_path, head, eval={"unigram_baseline": True})
    train.main(config)
    first, *_, last = records(config.run_folder, "eval")
    assert first["loss"] == pytest.approx(unigram, abs=0.01) and unigram < math.log(VOCAB) - 1
    assert first["log_weight_mean"] == pytest.approx(np.log(frequencies).mean(), rel=1e-5)
    weights = load_file(config.run_folder / "latest" / "model" / "model.safetensors")
    trained = weights["lm_head.log_weight"][:VOCAB].double().numpy() - np.log(frequencies)
    assert 1e-4 < np.abs(trained).max() < 0.1
    model = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model")
    assert model.lm_head.log_weight.std().item() > 1 and last["step"] == 6


@HEADS
def test_overfits_one_batch(tmp_path, head):
    batch = np.random.RandomState(0).randint(0, VOCAB, 4 * SEQ_LEN + 1).astype(np.uint16)
    config = make_config(
        write_data(tmp_path / "data", batch, batch),
        tmp_path,
        head,
        model={"dropout": 0.0},
        train={"steps": 80, "global_batch": 4, "micro_batch": 4},
        optim={"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.0},
        eval={"every": 1000},
        checkpoint={"every": 1000},
    )
    evaluation = train.main(config)
    assert losses(config.run_folder)[0] > 4 and losses(config.run_folder)[-1] < 0.05
    assert evaluation["loss"] < 0.05 and evaluation["accuracy"] == 1.0


@HEADS
def test_golden_losses(data, tmp_path, head):
    """20 steps against losses that were committed; HGPT_WRITE_GOLDEN=1 writes them anew."""
    config = make_config(data, tmp_path, head, model={"dropout": 0.0}, train={"steps": 20}, eval={"every": 1000})
    train.main(config)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("HGPT_WRITE_GOLDEN"):
        golden[head.type] = [round(loss, 5) for loss in losses(config.run_folder)]
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    # Other processors sum in another order; 20 steps make little of it.
    np.testing.assert_allclose(losses(config.run_folder), golden[head.type], atol=5e-4)


@pytest.mark.parametrize(
    ("head", "setting", "value", "tolerance"),
    [
        (HARMONIC, "micro_batch", 1, 1e-5),
        (SOFTMAX, "micro_batch", 2, 1e-5),
        (HARMONIC, "activation_checkpointing", True, 1e-5),
        (HARMONIC, "precision", "bf16", 0.02),
        pytest.param(HARMONIC, "compile", True, 1e-4, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "type", str(value)),
)
def test_settings_of_speed_and_memory_keep_the_curve(data, tmp_path, head, setting, value, tolerance):
    plain = make_config(data, tmp_path, head, name="plain", model={"dropout": 0.0})
    changed = altered(plain, name="changed", train={setting: value}, eval={"micro_batch": 5})
    for config in (plain, changed):
        train.main(config)
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision per process
    for kind in ("train", "eval"):
        ours, theirs = ([r["loss"] for r in records(c.run_folder, kind)] for c in (changed, plain))
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
    ours, theirs = (load_file(c.run_folder / "latest/model/model.safetensors") for c in (changed, plain))
    assert ours.keys() == theirs.keys()


@HEADS
def test_label_smoothing_is_in_the_training_loss_alone(data, tmp_path, head, finished):
    smoothed = make_config(data, tmp_path, head, name="smoothed", train={"label_smoothing": 0.3}, eval={"every": 1000})
    train.main(smoothed)
    (first, *_), (second, *_) = (records(c.run_folder, "eval") for c in (finished(head), smoothed))
    assert first["loss"] == second["loss"]
    assert losses(finished(head).run_folder)[0] != losses(smoothed.run_folder)[0]
    assert "label_smoothing" not in json.loads((smoothed.run_folder / "latest/model/config.json").read_text())


# -------------------------------------------------------------------------------------------------------- Resuming


def test_six_steps_are_three_and_three_bit_for_bit(tmp_path, finished):
    """The harmonic head's are below, after Ctrl-C and after damage."""
    parted = set_back(finished(SOFTMAX), 3, runs_dir=str(tmp_path))
    train.main(parted)
    assert_same_end(parted, finished(SOFTMAX))


def test_muon_resumes_exactly_too_in_a_folder_of_its_own(data, tmp_path):
    """From a checkpoint in the middle, and from the one before the first step."""
    sections = {"optim": {"algorithm": "muon", "schedule": "trapezoidal"}, "checkpoint": {"log_spaced_until": 1}}
    whole = make_config(data, tmp_path, name="whole", **sections)
    train.main(whole)
    first, _, middle, last = checkpoints(whole.run_folder)
    names = load_file(last / "optimizer.safetensors").keys()
    assert "momentum_buffer/transformer.h.1.mlp.c_fc.weight" in names and "exp_avg/transformer.wte.weight" in names
    for begin, steps in ((first, [1, 3, 6]), (middle, [6])):
        branch = replace(whole, name=f"from_{begin.name}", resume=str(begin))
        train.main(branch)
        assert steps_in(branch.run_folder) == steps
        assert losses(branch.run_folder) == losses(whole.run_folder)[0 if begin == first else 3 :]
        assert_same_checkpoint(checkpoints(branch.run_folder)[-1], last)


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path, monkeypatch, finished):
    config = make_config(data, tmp_path, resume="auto")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=r"after step 4.*step_0000004.*--resume auto"):
            train.main(config)
    assert steps_in(config.run_folder) == [3, 4] and not (config.run_folder / "preempted").exists()
    train.main(config)
    assert_same_end(config, finished())


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, finished):
    config = set_back(finished(), 6, runs_dir=str(tmp_path))
    older, newest = checkpoints(config.run_folder)
    os.truncate(newest / "model" / "model.safetensors", 1000)
    train.main(config)
    out = capsys.readouterr().out
    assert f"{newest} is damaged and skipped: model/model.safetensors has" in out
    assert f"resuming from {older}" in out
    assert_same_end(config, finished())

    # Nothing is trained over the remains of a run that has no whole checkpoint left.
    for checkpoint in checkpoints(config.run_folder):
        (checkpoint / "manifest.json").unlink()
    before = (config.run_folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged"):
        train.main(config)
    assert (config.run_folder / "metrics.jsonl").read_bytes() == before


def test_what_a_resumed_run_may_not_change(tmp_path, finished):
    config = set_back(finished(), 6, runs_dir=str(tmp_path))
    before = (config.run_folder / "config.toml").read_text()
    other = write_data(tmp_path / "other", markov_tokens(2_000, 5), markov_tokens(1_000, 1))
    for changed, message in (
        (
            altered(finished(SOFTMAX), resume=str(checkpoints(config.run_folder)[0])),
            r"softmax already exists and .*step_0000003 is not its checkpoint",
        ),
        (altered(config, model={"n_embd": 64}), r"model\.n_embd: 32 in the checkpoint, 64 now"),
        (altered(config, data={"path": str(other)}), "is not the data it was trained on"),
        (altered(config, train={"steps": 5}), r"train\.steps = 5 is less than its 6 steps"),
        (altered(config, resume=str(tmp_path / "nothing")), r'"never", "auto" or the folder of a checkpoint'),
        (altered(config, resume="never"), r"harmonic already exists and is never overwritten.*--resume auto"),
    ):
        with pytest.raises(UserError, match=message):
            train.main(changed)
    assert (config.run_folder / "config.toml").read_text() == before


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, finished):
    config = set_back(finished(), 6, runs_dir=str(tmp_path))
    before = {path: path.read_bytes() for path in config.run_folder.glob("*.*") if path.is_file()}
    longer = altered(config, train={"steps": 7})
    with folder_lock(config.run_folder / LOCK, busy=""):
        with pytest.raises(UserError, match=r"another process is training in .*: .* or choose another --name"):
            train.main(longer)
        assert {path: path.read_bytes() for path in before} == before
    assert math.isfinite(train.main(longer)["loss"])


# ---------------------------------------------------------------------------------------- What a run leaves behind


def test_the_run_folder(data, tmp_path, capsys):
    sections = {"log": {"trackers": ("tensorboard",)}, "eval": {"unigram_baseline": True}}
    config = make_config(data, tmp_path, checkpoint={"keep_last": 1}, **sections)
    evaluation = train.main(config)
    run = config.run_folder
    out = capsys.readouterr().out
    assert re.search(r"step +3/6  loss \d\.\d{3}  tok/s [\d,]+  \d:\d\d:\d\d left", out)
    assert re.search(rf"\nvalidation loss {evaluation['loss']:.4f}, of a unigram model \d\.\d{{4}}\n", out)
    assert steps_in(run) == [6] and os.readlink(run / "latest") == "checkpoints/step_0000006"
    assert load_run_config(["--config", str(run / "config.toml")]) == config
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(run, "eval")] == [0, 3, 6]
    assert records(run, "train")[-1]["tokens"] == 6 * 8 * SEQ_LEN
    logged = {name for record in records(run, "train") for name in record}
    phases = {f"seconds_{phase}" for phase in ("data", "forward", "backward", "step", "evaluation", "save")}
    assert {name for name in logged if name.startswith("seconds_")} == phases
    assert "mfu" not in logged, "a CPU has no peak in the table"

    (row,) = json.loads(evaluate.main([str(run), "--json"]))["models"]  # reads its data folder again
    last = records(run, "eval")[-1]
    assert (row["loss"], row["bits_per_byte"]) == pytest.approx((last["loss"], last["bits_per_byte"]), rel=1e-6)
    assert f"validation loss {row['loss']:.4f}  bits per byte {row['bits_per_byte']:.3f}  accuracy" in out
    assert out.count("divided by the median over all tokens") == 1

    model = AutoModelForCausalLM.from_pretrained(run / "latest" / "model")
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(run / "latest" / "model")
    assert len(tokenizer) == VOCAB and tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.model_max_length == SEQ_LEN
    card = (run / "latest" / "model" / "README.md").read_text()
    assert f"n = {2 * 32**0.5:g}" in card and f"{evaluation['loss']:.4f}" in card
    assert "a test" in card and "768 in 6 steps" in card and "vLLM" in card


def test_a_bare_nanogpt_folder_is_trained_on(tmp_path):
    """It is not resumed if one token in the middle has changed, whether or not data.verify reads it all."""
    for folder, changed in (("bare", 0), ("changed", 1)):
        (tmp_path / folder).mkdir()
        for split, tokens in (("train", markov_tokens(2_000, 0)), ("val", markov_tokens(500, 1))):
            tokens[len(tokens) // 2] = (tokens[len(tokens) // 2] + changed) % VOCAB
            tokens.tofile(tmp_path / folder / f"{split}.bin")
    config = make_config(tmp_path / "bare", tmp_path, resume="auto")
    with pytest.raises(UserError, match="state vocab_size"):
        train.main(config)
    config = altered(config, data={"vocab_size": VOCAB})
    train.main(config)
    exported = config.run_folder / "latest" / "model"
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.vocab_size == VOCAB and model.config.eos_token_id is None
    assert not (exported / "tokenizer.json").exists()
    for verify in (False, True):
        train.main(altered(config, data={"verify": verify}))
        with pytest.raises(UserError, match="is not the data it was trained on"):
            train.main(altered(config, data={"verify": verify, "path": str(tmp_path / "changed")}))


# ------------------------------------------------------------------------ Losses and gradients that are not finite


@pytest.mark.parametrize(
    ("bad_step", "found", "saved"),
    [
        (2, r"the validation loss after step 3 is nan.*last checkpoint: none", []),  # found where a checkpoint is due
        (3, r"step 5 has loss nan.*last checkpoint: .*step_0000003", [3]),
    ],
)
def test_a_run_that_diverges_stops_and_saves_nothing_bad(data, tmp_path, monkeypatch, bad_step, found, saved):
    config = make_config(data, tmp_path)
    at_step(monkeypatch, bad_step, lambda: 1e30)
    with pytest.raises(UserError, match=found):
        train.main(config)
    assert steps_in(config.run_folder) == saved
    for checkpoint in checkpoints(config.run_folder):
        weights = load_file(checkpoint / "model" / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_gradient_that_is_not_finite_stops_the_run_or_is_skipped(data, tmp_path, monkeypatch, allowed):
    """The gradient of step 4 is destroyed. If one such step is allowed, the weights after it are those before it."""
    sections = {"train": {"skip_non_finite": allowed}, "checkpoint": {"every": 1}}
    config = make_config(data, tmp_path, model={"dropout": 0.0}, **sections)
    clip, calls = Accelerator.clip_grad_norm_, []

    def broken(self, parameters, limit):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) == 4:
            parameters[0].grad[0, 0] = float("nan")
        return clip(self, parameters, limit)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", broken)
    if allowed:
        train.main(config)
        folders = checkpoints(config.run_folder)
        before, after, later = (load_file(folders[i] / "model" / "model.safetensors") for i in (2, 3, 4))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not all(torch.equal(after[name], later[name]) for name in before)
        assert all(torch.isfinite(value).all() for value in later.values())
        assert [record["skipped"] for record in records(config.run_folder, "train")] == [0, 0, 0, 1, 0, 0]
    else:
        with pytest.raises(UserError, match=r"step 4 has loss .* and gradient norm nan.*step_0000003"):
            train.main(config)
    (noted,) = map(json.loads, (config.run_folder / "non_finite.jsonl").read_text().splitlines())
    assert noted["step"] == 4 and noted["grad_norm"] == "nan"
    # Steps 1 to 3 took the first 24 samples of the run's order, step 4 the next 8.
    order = epoch_permutation(config.train.seed, 0, num_windows(20_000, config.data.seq_len))
    assert noted["windows"] == order[24:32].tolist()


# ------------------------------------------------------------------------------------------------------- Bad input


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        ({}, {"data": {"seq_len": 2000}}, r"val split has 1,000 tokens.*data\.seq_len"),
        ({}, {"data": {"path": "nowhere"}}, "nowhere"),
        ({}, {"data": {"vocab_size": 50257}}, "vocab_size 50257 does not match"),
        ({}, {"train": {"micro_batch": 3}}, r"train\.global_batch = 8 cannot be reached with train\.micro_batch = 3"),
        ({}, {"runs_dir": "file"}, r"run folder file/run .*choose another --runs_dir"),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE must be a whole number"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, r"fp16, but train\.precision is fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "perhaps"}, {}, "ACCELERATE_USE_DEEPSPEED"),
    ],
)
def test_what_cannot_be_trained_is_found_before_anything_is_written(
    data, tmp_path, monkeypatch, environment, sections, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train.main(make_config(data, tmp_path / "runs", **sections))
    assert os.listdir() == ["file"]


def test_an_engine_that_is_not_supported(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(UserError, match="the launcher asks for MEGATRON_LM"):
        train.main(make_config(data, tmp_path))


def test_damaged_data_is_found_before_training(tmp_path):
    tokens = markov_tokens(2_000, 0)
    tokens[1_234] = VOCAB
    data = write_data(tmp_path / "data", tokens, markov_tokens(500, 1))
    config = make_config(data, tmp_path, train={"steps": 20})
    with pytest.raises(UserError, match=r"train_000000\.bin: token 300 at position 1234 is beyond the vocabulary"):
        train.main(config)
    assert not config.run_folder.exists()
    with pytest.raises(UserError, match="token 300 at position 1234 is beyond the vocabulary"):  # when it is read
        train.main(altered(config, data={"verify": False}))


def test_the_command_line_prints_one_line_and_exits_with_2(monkeypatch, capsys):
    arguments = ["--config", str(ROOT / "configs/quickstart.toml"), "--optim.learning_rate", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: command line: there is no setting optim.learning_rate")
