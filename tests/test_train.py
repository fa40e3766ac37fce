"""The training loop: what it learns, that it goes on exactly, and what it does when something goes wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from small_run import (
    HARMONIC,
    SEQ_LEN,
    SOFTMAX,
    VOCAB,
    assert_same_checkpoint,
    losses,
    make_config,
    markov_tokens,
    records,
    write_data,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from hgpt.durable import folder_lock
from hgpt.errors import UserError
from hgpt.run.checkpoint import LOCK, checkpoints, damage
from hgpt.run.config import RunConfig

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
HEADS = pytest.mark.parametrize("head", [HARMONIC, SOFTMAX], ids=["harmonic", "softmax"])


# ---------------------------------------------------------------------------------------------------------------
# Learning


@HEADS
def test_overfits_one_batch(tmp_path, head):
    batch = np.random.RandomState(0).randint(0, VOCAB, 4 * SEQ_LEN + 1).astype(np.uint16)
    data = write_data(tmp_path / "data", batch, batch)
    config = make_config(
        data,
        tmp_path,
        head,
        model={"dropout": 0.0},
        train={"steps": 120, "global_batch": 4, "micro_batch": 4},
        optim={"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.0},
        eval={"every": 1000},
        checkpoint={"every": 1000},
    )
    evaluation = train.main(config)
    assert losses(config.run_folder)[0] > 4
    assert losses(config.run_folder)[-1] < 0.05
    assert evaluation["loss"] < 0.05
    assert evaluation["accuracy"] == 1.0


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


@HEADS
def test_loss_does_not_depend_on_the_micro_batch(data, tmp_path, head):
    curves = []
    for micro_batch in (8, 4, 1):
        config = make_config(
            data,
            tmp_path,
            head,
            name=f"micro{micro_batch}",
            model={"dropout": 0.0},
            train={"micro_batch": micro_batch},
            eval={"micro_batch": micro_batch},
        )
        train.main(config)
        curves.append(losses(config.run_folder) + [r["loss"] for r in records(config.run_folder, "eval")])
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], atol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"precision": "bf16"}, {"activation_checkpointing": True}], ids=lambda s: next(iter(s))
)
def test_settings_of_speed_and_memory_keep_the_curve(data, tmp_path, setting):
    plain = make_config(data, tmp_path, name="plain", model={"dropout": 0.0})
    changed = make_config(data, tmp_path, name="changed", model={"dropout": 0.0}, train=setting)
    train.main(plain)
    _fresh_accelerator()
    train.main(changed)
    _fresh_accelerator()
    np.testing.assert_allclose(
        losses(changed.run_folder), losses(plain.run_folder), atol=0.02 if "precision" in setting else 1e-5
    )


def _fresh_accelerator() -> None:
    """Accelerate keeps one precision per process; a user has one run per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------------------
# Going on


@HEADS
def test_six_steps_are_three_and_three_bit_for_bit(data, tmp_path, head):
    whole = make_config(data, tmp_path, head, name="whole")
    train.main(whole)
    _, last = checkpoints(whole.run_folder)

    # The run as it stood when its first checkpoint had been written, and two more steps had been logged.
    parted = make_config(data, tmp_path, head, name="parted", resume="auto")
    shutil.copytree(whole.run_folder, parted.run_folder, symlinks=True)
    shutil.rmtree(parted.run_folder / "checkpoints" / last.name)
    (parted.run_folder / "latest").unlink()
    train.main(parted)

    assert_same_checkpoint(parted.run_folder / "checkpoints" / last.name, last)
    assert losses(parted.run_folder) == losses(whole.run_folder)
    assert [(r["step"], r["loss"]) for r in records(parted.run_folder, "eval")] == [
        (r["step"], r["loss"]) for r in records(whole.run_folder, "eval")
    ]
    assert (parted.run_folder / "latest").resolve().name == last.name


def test_muon_goes_on_exactly_too(data, tmp_path):
    sections = {"optim": {"algorithm": "muon", "schedule": "trapezoidal", "decay_fraction": 0.5}}
    whole = make_config(data, tmp_path, name="whole", **sections)
    train.main(whole)
    middle, last = checkpoints(whole.run_folder)
    names = load_file(last / "optimizer.safetensors").keys()
    assert "momentum_buffer/transformer.h.1.mlp.c_fc.weight" in names and "exp_avg/transformer.wte.weight" in names
    branch = make_config(data, tmp_path, name="branch", resume=str(middle), **sections)
    train.main(branch)
    assert losses(branch.run_folder) == losses(whole.run_folder)[3:]
    assert_same_checkpoint(checkpoints(branch.run_folder)[-1], last)
    with pytest.raises(UserError, match=r"optim\.algorithm: 'muon' in the checkpoint, 'adamw' now"):
        train.main(make_config(data, tmp_path, name="other", resume=str(middle)))


def test_a_killed_run_goes_on_exactly(data, tmp_path):
    whole = make_config(data, tmp_path, name="whole", train={"steps": 40})
    train.main(whole)

    killed = make_config(data, tmp_path, name="killed", train={"steps": 40}, resume="auto")
    path = tmp_path / "killed.toml"
    train.write_toml(killed, path)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    command = [sys.executable, "train.py", "--config", path]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoints(killed.run_folder):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    # What a kill in the middle of a write leaves behind.
    with open(killed.run_folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    (killed.run_folder / "checkpoints" / ".step_0000039.partial").mkdir()

    train.main(killed)
    assert losses(killed.run_folder) == losses(whole.run_folder)
    assert_same_checkpoint(checkpoints(killed.run_folder)[-1], checkpoints(whole.run_folder)[-1])


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path, monkeypatch):
    whole = make_config(data, tmp_path, name="whole")
    train.main(whole)
    config = make_config(data, tmp_path, name="stopped", resume="auto")

    def interrupt_in_step_4(step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, *rest)

    original = train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupt_in_step_4)
        with pytest.raises(KeyboardInterrupt, match=r"after step 4.*step_0000004.*--resume auto"):
            train.main(config)
    assert [path.name for path in checkpoints(config.run_folder)] == ["step_0000003", "step_0000004"]
    train.main(config)
    assert losses(config.run_folder) == losses(whole.run_folder)
    assert_same_checkpoint(
        config.run_folder / "checkpoints/step_0000006", whole.run_folder / "checkpoints/step_0000006"
    )


def test_ctrl_c_stops_at_once_where_no_checkpoint_is_wanted(data, tmp_path, monkeypatch):
    config = make_config(data, tmp_path, checkpoint={"on_interrupt": False}, resume="auto")
    original = train.learning_rate

    def interrupt(step, *rest):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return original(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    assert [path.name for path in checkpoints(config.run_folder)] == ["step_0000003"]
    train.main(config)
    assert len(losses(config.run_folder)) == 6


def test_a_damaged_checkpoint_is_named_and_passed_over(data, tmp_path, capsys):
    config = make_config(data, tmp_path, resume="auto")
    train.main(config)
    newest = checkpoints(config.run_folder)[-1]
    weights = newest / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    train.main(config)
    out = capsys.readouterr().out
    assert f"{newest} is damaged and passed over: model/model.safetensors has" in out
    assert "resuming from" in out and "step_0000003" in out
    assert damage(newest) is None

    # Nothing is trained over the remains of a run that has no whole checkpoint left.
    for checkpoint in checkpoints(config.run_folder):
        (checkpoint / "manifest.json").unlink()
    before = (config.run_folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged"):
        train.main(config)
    assert (config.run_folder / "metrics.jsonl").read_bytes() == before


def test_a_branch_goes_on_from_another_runs_checkpoint_in_a_folder_of_its_own(data, tmp_path):
    first = make_config(data, tmp_path, name="first")
    train.main(first)
    middle = first.run_folder / "checkpoints" / "step_0000003"
    branch = make_config(data, tmp_path, name="branch", resume=str(middle))
    train.main(branch)
    assert_same_checkpoint(
        branch.run_folder / "checkpoints/step_0000006", first.run_folder / "checkpoints/step_0000006"
    )
    assert losses(branch.run_folder) == losses(first.run_folder)[3:]
    other = make_config(data, tmp_path, name="other")
    train.main(other)
    with pytest.raises(UserError, match=r"other exists already and .*step_0000003 is not its checkpoint"):
        train.main(replace(other, resume=str(middle)))


def run_on_two(config: RunConfig, path: Path) -> None:
    train.write_toml(config, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29731", "train.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--config", path], cwd=ROOT, env=environment, check=True, timeout=300)


def test_two_processes_give_the_curve_of_one(data, tmp_path):
    """Real DDP on gloo: the same loss and gradient norm at every step, the same validation loss, and it goes on."""
    single = make_config(data, tmp_path, name="single", model={"dropout": 0.0}, train={"micro_batch": 4})
    train.main(single)
    double = make_config(data, tmp_path, name="double", model={"dropout": 0.0}, train={"micro_batch": 4}, resume="auto")
    run_on_two(double, tmp_path / "double.toml")
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [r[key] for r in records(double.run_folder, "train")],
            [r[key] for r in records(single.run_folder, "train")],
            rtol=1e-5,
        )
    np.testing.assert_allclose(
        [r["loss"] for r in records(double.run_folder, "eval")],
        [r["loss"] for r in records(single.run_folder, "eval")],
        rtol=1e-5,
    )
    newest = checkpoints(double.run_folder)[-1]
    assert damage(newest) is None
    assert (newest / "rng_00001.safetensors").exists()

    expected = tmp_path / "expected"
    newest.rename(expected)
    run_on_two(double, tmp_path / "double.toml")
    assert_same_checkpoint(newest, expected)


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_the_run_folder(data, tmp_path, capsys):
    config = make_config(
        data,
        tmp_path,
        log={"trackers": ("tensorboard",)},
        checkpoint={"keep_last": 1},
        eval={"unigram_baseline": True},
    )
    evaluation = train.main(config)
    run = config.run_folder
    out = capsys.readouterr().out
    assert re.search(r"step +3/6  loss \d\.\d{3}  tok/s [\d,]+  \d:\d\d:\d\d left", out)
    assert re.search(rf"\nvalidation loss {evaluation['loss']:.4f}, of a unigram model \d\.\d{{4}}\n", out)
    assert [path.name for path in checkpoints(run)] == ["step_0000006"]
    assert os.readlink(run / "latest") == "checkpoints/step_0000006"
    assert train.load_run_config(["--config", str(run / "config.toml")]) == config
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(run, "eval")] == [0, 3, 6]
    assert all("mfu" not in record for record in records(run, "train")), "a CPU has no peak in the table"
    assert records(run, "train")[-1]["tokens"] == 6 * 8 * SEQ_LEN

    model = AutoModelForCausalLM.from_pretrained(run / "latest" / "model")
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(run / "latest" / "model")
    assert len(tokenizer) == VOCAB and tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.model_max_length == SEQ_LEN
    card = (run / "latest" / "model" / "README.md").read_text()
    assert f"n = {2 * 32**0.5:g}" in card and f"{evaluation['loss']:.4f}" in card
    assert "a test" in card and "768 in 6 steps" in card and "vLLM" in card


def test_a_bare_nanogpt_folder_is_trained_on(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for split, tokens in (("train", markov_tokens(2_000, 0)), ("val", markov_tokens(500, 1))):
        tokens.tofile(folder / f"{split}.bin")
    config = make_config(folder, tmp_path)
    with pytest.raises(UserError, match="nothing says how large its vocabulary is"):
        train.main(config)
    config = replace(config, data=replace(config.data, vocab_size=VOCAB))
    train.main(config)
    model = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model")
    assert model.config.vocab_size == VOCAB and model.config.eos_token_id is None
    assert not (config.run_folder / "latest" / "model" / "tokenizer.json").exists()
    train.main(replace(config, resume="auto"))


@HEADS
def test_label_smoothing_is_in_the_training_loss_alone(data, tmp_path, head):
    plain = make_config(data, tmp_path, head, name="plain", train={"steps": 3})
    smoothed = make_config(data, tmp_path, head, name="smoothed", train={"steps": 3, "label_smoothing": 0.3})
    train.main(plain)
    train.main(smoothed)
    first = [records(config.run_folder, "eval")[0]["loss"] for config in (plain, smoothed)]
    assert first[0] == first[1]
    assert losses(plain.run_folder)[2] != losses(smoothed.run_folder)[2]
    config = json.loads((smoothed.run_folder / "latest/model/config.json").read_text())
    assert "label_smoothing" not in config


@pytest.mark.slow
def test_blocks_compile_in_place(data, tmp_path):
    plain = make_config(data, tmp_path, name="plain", model={"dropout": 0.0}, train={"steps": 3})
    compiled = make_config(data, tmp_path, name="compiled", model={"dropout": 0.0}, train={"steps": 3, "compile": True})
    train.main(plain)
    train.main(compiled)
    np.testing.assert_allclose(losses(compiled.run_folder), losses(plain.run_folder), atol=1e-4)
    weights = load_file(compiled.run_folder / "latest/model/model.safetensors")
    assert weights.keys() == load_file(plain.run_folder / "latest/model/model.safetensors").keys()


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_run_folder_is_never_overwritten(data, tmp_path):
    config = make_config(data, tmp_path)
    config.run_folder.mkdir()
    (config.run_folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run exists already and is never overwritten.*--resume auto"):
        train.main(config)
    assert [path.name for path in config.run_folder.iterdir()] == ["notes.txt"]


def test_a_folder_in_which_another_process_trains_is_left_alone(data, tmp_path):
    config = make_config(data, tmp_path)
    train.main(config)
    before = {path: path.read_bytes() for path in config.run_folder.glob("*.*") if path.is_file()}
    longer = replace(config, resume="auto", train=replace(config.train, steps=config.train.steps + 1))
    with folder_lock(config.run_folder / LOCK, busy=""):
        with pytest.raises(UserError, match=r"another process is training in .*run: .* or choose another --name"):
            train.main(longer)
        assert {path: path.read_bytes() for path in before} == before
    assert math.isfinite(train.main(longer)["loss"])


def test_a_resume_with_another_model_or_data_shows_the_difference(data, tmp_path):
    config = make_config(data, tmp_path)
    train.main(config)
    before = (config.run_folder / "config.toml").read_text()
    wider = replace(config, resume="auto", model=replace(config.model, n_embd=64))
    with pytest.raises(UserError, match=r"model\.n_embd: 32 in the checkpoint, 64 now"):
        train.main(wider)
    other = write_data(tmp_path / "other", markov_tokens(20_000, 5), markov_tokens(1_000, 1))
    with pytest.raises(UserError, match="is not the data it was trained on"):
        train.main(replace(config, resume="auto", data=replace(config.data, path=str(other))))
    with pytest.raises(UserError, match=r'must be "never", "auto" or the folder of a checkpoint'):
        train.main(replace(config, resume=str(tmp_path / "nothing")))
    assert (config.run_folder / "config.toml").read_text() == before


@pytest.mark.parametrize(
    ("bad_step", "found"),
    [
        (2, "the validation loss after step 3 is nan"),  # found where a checkpoint is due
        (3, "step 5 has loss nan"),
        (5, "the validation loss after step 6 is nan"),
    ],
)
def test_a_run_that_diverges_stops_and_saves_nothing_bad(data, tmp_path, monkeypatch, bad_step, found):
    config = make_config(data, tmp_path)
    original = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *rest: 1e30 if step == bad_step else original(step, *rest))
    saved = [] if bad_step == 2 else ["step_0000003"]
    last = r".*step_0000003" if saved else "none"
    with pytest.raises(UserError, match=rf"{found}.*last checkpoint: {last}"):
        train.main(config)
    assert [path.name for path in checkpoints(config.run_folder)] == saved
    for checkpoint in checkpoints(config.run_folder):
        weights = load_file(checkpoint / "model" / "model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_gradient_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    config = make_config(data, tmp_path, eval={"every": 1000})
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *arguments: clip(*arguments) * float("nan"))
    with pytest.raises(UserError, match=r"step 1 has loss .* and gradient norm nan"):
        train.main(config)
    assert not checkpoints(config.run_folder)


def test_what_the_launcher_cannot_have(data, tmp_path, monkeypatch):
    config = make_config(data, tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(UserError, match=r"mixed precision fp16, and train\.precision is fp32"):
            train.main(config)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.MEGATRON_LM)
        with pytest.raises(UserError, match="the launcher asks for MEGATRON_LM"):
            train.main(config)
    assert not config.run_folder.exists()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that not even root may write to")
def test_a_runs_dir_that_is_read_only(data):
    with pytest.raises(
        UserError, match=r"run folder /sys/kernel/runs/run cannot be written: .*choose another --runs_dir"
    ):
        train.main(make_config(data, Path("/sys/kernel/runs")))


def test_a_runs_dir_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run folder .* cannot be written: .*choose another --runs_dir"):
        train.main(make_config(data, tmp_path / "file"))


def test_data_that_does_not_fit_is_found_before_anything_is_written(data, tmp_path):
    config = make_config(data, tmp_path)
    for changed, message in (
        ({"seq_len": 2000}, "the val split has 1,000 tokens, fewer than one sequence"),
        ({"path": str(tmp_path / "nowhere")}, "nowhere"),
        ({"vocab_size": 50257}, "vocab_size 50257 does not match"),
    ):
        changed_config = replace(config, data=replace(config.data, **changed))
        with pytest.raises(UserError, match=message):
            train.main(changed_config)
        assert not config.run_folder.exists()
    with pytest.raises(UserError, match=r"train\.global_batch = 8 cannot be reached with train\.micro_batch = 3"):
        train.main(make_config(data, tmp_path, train={"micro_batch": 3}))


def test_damaged_data_is_found_before_training(tmp_path):
    tokens = markov_tokens(2_000, 0)
    tokens[1_234] = VOCAB
    data = write_data(tmp_path / "data", tokens, markov_tokens(500, 1))
    config = make_config(data, tmp_path, train={"steps": 20})
    with pytest.raises(UserError, match=r"train_000000\.bin: token 300 at position 1234 is beyond the vocabulary"):
        train.main(config)
    assert not config.run_folder.exists()
    # Not looked for at the start, it is found when it is read.
    unverified = replace(config, data=replace(config.data, verify=False))
    with pytest.raises(UserError, match="token 300 at position 1234 is beyond the vocabulary"):
        train.main(unverified)

    shard = data / "val_000000.bin"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"val_000000\.bin: checksum failure"):
        train.main(config)


def test_the_command_line_prints_one_line_and_exits_with_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "train.py", "--config", "configs/quickstart.toml", "--optim.learning_rate", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: command line: there is no setting optim.learning_rate")
    assert "Traceback" not in result.stderr
