"""hgpt/cli.py: how commands end."""

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import GPT2Config, TrainingArguments

import sample
from data_prep import documents, openwebtext
from hgpt import plan
from hgpt.cli import ANSWERS, MEANINGS, Parser, did_you_mean, run
from hgpt.errors import UserError
from hgpt.run.settings import known_settings

ROOT = Path(__file__).resolve().parent.parent


def command(arguments):
    parser = Parser("python -m x", "What it does.\n\n    python -m x --number 3\n\nMore.")
    parser.add_argument("--number", type=int, required=True)
    return f"number {parser.parse_args(arguments).number}"


def raising(error):
    def main(_):
        raise error

    return main


HELP = " (python -m x --help lists every option)"


@pytest.mark.parametrize(
    ("main", "arguments", "status", "out", "err"),
    [
        (command, "--number 3", 0, "number 3\n", ""),
        (lambda _: None, "", 0, "", ""),
        (command, "", 2, "", f"error: the following arguments are required: --number{HELP}\n"),
        (command, "--number", 2, "", f"error: argument --number: expected one argument{HELP}\n"),
        (command, "--number x", 2, "", f"error: argument --number: invalid int value: 'x'{HELP}\n"),
        (command, "--numbr 4", 2, "", f"error: there is no option --numbr; did you mean --number?{HELP}\n"),
        (command, "--number 3 y", 2, "", f"error: unrecognized arguments: y{HELP}\n"),
        (raising(UserError("set x")), "", 2, "", "error: set x\n"),
        (raising(KeyboardInterrupt()), "", 130, "", "\nwhat is finished stays\n"),
    ],
)
def test_how_a_command_ends(capsys, main, arguments, status, out, err):
    assert run(main, arguments.split(), interrupted="what is finished stays") == status
    assert capsys.readouterr() == (out, err)


@pytest.mark.parametrize("lines", [1, 1_000_000])
def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys, lines):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(lambda _: "x\n" * lines, []) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError, BrokenPipeError])
def test_other_exceptions_and_other_broken_pipes_are_raised(monkeypatch, error):
    reading, writing = os.pipe()
    with open(reading), open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(error):
            run(raising(error()), [])


# What others call a setting → what the suggestion says.
SUGGESTED = {
    "optim.learning_rate": "optim.lr",
    "batch_size": "train.micro_batch or train.global_batch",
    "max_iters": "train.steps",
    "n_layers": "model.n_layer",
    "block_size": "data.seq_len",
    "num_hidden_layers": "model.n_layer",
    "per_device_train_batch_size": "train.micro_batch",
    "weight-decay": "optim.weight_decay",
    "gradient_accumulation_steps": "train.global_batch",
    "eval_iters": "whole validation set",
    "train.sede": "train.seed",
}
# Every setting of nanoGPT's train.py.
NANOGPT = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head
n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters
lr_decay_iters min_lr backend device dtype compile"""


def test_names_of_other_programs_are_understood():
    known = list(known_settings())
    for name, expected in SUGGESTED.items():
        assert expected in did_you_mean(name, known), name
    assert all(did_you_mean(name, known) for name in NANOGPT.split())
    assert did_you_mean("zzz", known) == ""
    assert not MEANINGS.keys() & ANSWERS.keys()
    theirs = {field.name for field in fields(TrainingArguments)} | set(GPT2Config().to_dict()) | set(NANOGPT.split())
    assert len(theirs & (MEANINGS.keys() | ANSWERS.keys())) > 40  # whose spelling is theirs


@pytest.mark.parametrize(
    ("main", "arguments", "suggested"),
    [
        (plan.main, "--gpu 8", "--gpus"),
        (plan.main, "--max_iters 8", "train.steps"),
        (sample.main, "--start hello", "--prompt or --prompt-file"),
        (sample.main, "--max_new_tokens 4", "--max-new-tokens"),
        (sample.main, "--out_dir runs/x", "--checkpoint"),
        (documents.main, "--output_dir x y.txt", "--out"),
        (documents.main, "--num_proc 2 --out x y.txt", "--workers"),
    ],
)
def test_each_command_suggests_its_own_options(capsys, main, arguments, suggested):
    assert run(main, arguments.split()) == 2
    assert f"did you mean {suggested}?" in capsys.readouterr().err


def test_help_opens_with_what_a_command_does_and_every_meaning_is_a_name_that_exists(capsys):
    names = {*known_settings(), "--data", "--seq-len", "files"}
    for main in (plan.main, sample.main, documents.main, openwebtext.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        what, nothing, example, *_ = text.splitlines()
        assert what.endswith((".", "split.")) and not nothing and example.startswith("    python ")
        names |= set(text.split())
    assert {name for meaning in MEANINGS.values() for name in meaning.split()} <= names


@pytest.mark.parametrize("command", ["train.py", "sample.py", "-m hgpt.runs", "-um hgpt.runs", "-mdata_prep.verify"])
def test_ctrl_c_while_importing_prints_no_traceback(tmp_path, command):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
        )
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=os.environ | path, capture_output=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")
