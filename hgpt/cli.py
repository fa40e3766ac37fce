"""The parser of every command, and the exit of all but train.py (hgpt/run/stop.py). A command ends with

if __name__ == "__main__":
    sys.exit(run(main))

where `main` takes the arguments, returns the text to print (or None) and raises UserError for bad input.
"""

import argparse
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from hgpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for bad arguments, and whose --help begins with examples instead of the usage.

    Args:
        prog: the command, "python -m hgpt.runs".
        about: what the command does, an empty line, examples; further text stands at the end of --help.
    """

    def __init__(self, prog: str, about: str | None, **others: Any) -> None:
        what, examples, end = [*(about or "").split("\n\n", 2), "", ""][:3]
        super().__init__(
            prog=prog,
            usage=argparse.SUPPRESS,
            description=f"{what}\n\n{examples}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **{"epilog": end} | others,
        )
        self._positionals.title = "arguments"

    @property
    def options(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.partition("=")[0]
            if option.startswith("--") and " " not in word and option not in self.options:
                hint = did_you_mean(option, self.options)
                self.error(f"there is no option {option}{hint and '; '}{hint}")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists every option)")


def checked(kind: Callable[[str], Any], rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse: a value of `kind` that must follow `rule`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must {rule}; got {value}")
        return value

    read.__name__ = kind.__name__  # argparse: "invalid int value"
    return read


at_least_1 = checked(int, "be at least 1", lambda number: number >= 1)


# ---------------------------------------------------------------------------------------------------------------
# Suggestions and tables

# Our name of a setting or option → names of nanoGPT, transformers and others. Only names that the command knows are
# suggested.
OTHER_NAMES = {
    "name runs_dir --checkpoint --out": "out_dir output_dir",
    "name": "wandb_run_name run_name",
    "name runs_dir": "logging_dir",
    "resume": "overwrite_output_dir resume_from_checkpoint",
    "checkpoint.every": "always_save_checkpoint save_steps save_strategy",
    "checkpoint.keep_last": "save_total_limit",
    "data.path --data --source": "dataset dataset_name",
    "data.path": "train_file",
    "data.seq_len --seq-len": "block_size n_positions n_ctx max_position_embeddings max_seq_length context_length",
    "eval.every": "eval_interval eval_steps eval_strategy",
    "eval.micro_batch": "per_device_eval_batch_size",
    "log.every": "log_interval logging_steps",
    "log.trackers": "wandb_log report_to",
    "model.activation_function": "hidden_act",
    "model.dropout": "resid_pdrop embd_pdrop attn_pdrop",
    "model.head.centre_init_std": "initializer_range",
    "model.head.exponent --num-samples": "n",
    "model.init_from --checkpoint": "model_name_or_path",
    "model.n_embd": "hidden_size d_model dim",
    "model.n_head": "num_heads num_attention_heads",
    "model.n_layer": "num_layers num_hidden_layers",
    "optim.algorithm": "optim optimizer",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon",
    "optim.grad_clip": "max_grad_norm",
    "optim.lr": "learning_rate",
    "optim.schedule": "decay_lr lr_scheduler_type",
    "optim.warmup_steps": "warmup_iters warmup_ratio",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.compile": "torch_compile",
    "train.global_batch": "train_batch_size",
    "train.hang_timeout": "ddp_timeout",
    "train.label_smoothing": "label_smoothing_factor",
    "train.micro_batch train.global_batch --num-samples": "batch_size",
    "train.micro_batch": "per_device_train_batch_size",
    "train.precision": "dtype bf16 fp16",
    "train.seed": "data_seed",
    "train.steps": "max_iters iters max_steps",
    "--prompt --prompt-file": "start",
    "--prompt files": "input",
    "--checkpoint model.init_from": "model",
    "--checkpoint": "init_from",
    "--num-samples": "num_return_sequences",
    "--max-new-tokens": "max_length max_tokens",
    "--greedy": "do_sample",
    "--out": "output",
    "--workers": "num_proc num_workers",
    "--text-column": "column text_field",
    "--val-fraction": "test_size validation_split_percentage",
    "--tokens-per-shard": "shard_size",
}
MEANINGS = {theirs: ours for ours, names in OTHER_NAMES.items() for theirs in names.split()}
# Names without a counterpart → why.
ANSWERS = {
    "layer_norm_epsilon": "it is always 1e-5, as in GPT-2",
    "eval_iters": "every evaluation reads the whole validation set",
    "eval_only": "python -m hgpt.evaluate RUN evaluates",
    "gradient_accumulation_steps": "it follows: train.global_batch / (train.micro_batch x number of processes)",
    "lr_decay_iters": "the learning rate decays until train.steps",
    "num_train_epochs": "train.steps sets the length; an epoch has tokens / (train.global_batch x data.seq_len) steps",
    "epochs": "train.steps sets the length; an epoch has tokens / (train.global_batch x data.seq_len) steps",
    "wandb_project": "the environment variable WANDB_PROJECT names it",
    "device": "a GPU is taken if there is one; ACCELERATE_USE_CPU=true takes the CPU",
    "backend": "accelerate launch starts several processes (docs/training.md)",
    "deepspeed": "accelerate launch with a file of configs/accelerate/ chooses the engine (docs/training.md)",
    "fsdp": "accelerate launch with a file of configs/accelerate/ chooses the engine (docs/training.md)",
    "n_inner": "it is always 4 x model.n_embd",
    "intermediate_size": "it is always 4 x model.n_embd",
    "tokenizer_name": "the tokenizer lies in the data folder; data_prep chooses it with --tokenizer",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for the unknown `name`, as a question or a sentence; "" if nothing in `known` resembles it.

    First names with the same last part, then of the same meaning, then of similar spelling.
    """

    def last_part(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()

    known, last = list(known), last_part(name)
    found = [one for one in known if last_part(one) == last]
    found = found or [one for one in MEANINGS.get(last, "").split() if one in known]
    if not found and last in ANSWERS:
        return ANSWERS[last]
    found = found or difflib.get_close_matches(name, known, n=3)
    if not found:
        close = difflib.get_close_matches(last, {last_part(one) for one in known}, n=1)
        found = [one for one in known if last_part(one) in close]
    return f"did you mean {' or '.join(found)}?" if found else ""


def shown(value: float | None, form: str, missing: str = "-") -> str:
    """The cell of a table for a number in the format `form`."""
    return missing if value is None else format(value, form)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def markdown(rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table whose first row is the header, the last `numbers` columns right-aligned."""
    rule = ["---"] * (len(rows[0]) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


# ---------------------------------------------------------------------------------------------------------------
# Beginning and end


def is_command() -> bool:
    """Whether this process runs one of our programs: `python -m hgpt.…`, `-m data_prep.…`, train.py, sample.py."""
    if sys.argv[:1] == ["-m"]:  # Python looks for the module that follows -m
        ours = re.compile(r"(-\w*m)?(hgpt|data_prep)(\.\w+)*")  # also -um hgpt.runs and -mhgpt.runs
        return any(map(ours.fullmatch, sys.orig_argv))
    checkout = Path(__file__).resolve().parent.parent
    return Path(sys.argv[0] if sys.argv else "").resolve() in (checkout / "train.py", checkout / "sample.py")


# While a command imports its modules, until `restore_interrupts`, Ctrl-C ends the process without a traceback.
COMMAND = is_command()
if COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def needs(extra: str, *packages: str) -> None:
    """Raise ModuleNotFoundError if one of `packages`, in `extra` of pyproject.toml, is not installed.

    A command prints the message and ends with exit status 2.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        message = (
            f'{" and ".join(missing)} must be installed: pip install "hgpt[{extra}]" (in a checkout: -e ".[{extra}]")'
        )
        if COMMAND:
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2)
        raise ModuleNotFoundError(message, name=missing[0])


def restore_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    main: Callable[[Sequence[str]], str | None],
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Call `main`, print the text that it returns, and return the exit status.

    0: done, or the reader of standard output (`| head`) closed it. 2: UserError, printed as one message without a
    traceback. 130: Ctrl-C. Other exceptions are raised.

    Args:
        arguments: default: the command line's.
        interrupted: the message after Ctrl-C, such as how to resume.
    """
    restore_interrupts()
    try:
        text = main(sys.argv[1:] if arguments is None else arguments)
        if text is not None:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
            print(text)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():  # some other pipe, such as that of a worker process
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
    return 0


def _output_is_closed() -> bool:
    """Whether standard output's reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))
