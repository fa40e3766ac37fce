"""The configuration of a run: frozen dataclasses, read from TOML and the command line.

    python train.py --config configs/x.toml --optim.lr 1e-3

Every section stands beside the code that it configures, where that reads well, and they are composed here. A setting
that cannot take effect is an error.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
from jsonargparse import ArgumentError, ArgumentParser

from hgpt.checkpoint import CheckpointConfig
from hgpt.configuration_hgpt import HGPTConfig
from hgpt.distances import Distance, load_distances, make_distance
from hgpt.errors import UserError
from hgpt.evaluation import EvalConfig
from hgpt.metrics import LogConfig
from hgpt.optim import OptimConfig

CONFIG_FILE = "config.toml"
DISTANCE_OPTIONS = ("p", "temperature", "metric", "rank")
OWN_OPTIONS = "model.head.distance_options"  # the one table whose keys are the user's


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The unembedding.

    Args:
        type: "harmonic" (logits −n log d) or "softmax" (logits w · x).
        exponent: n on the distance d: a number, "sqrt_dim" (√D), "dim" or a multiple such as "2*sqrt_dim".
            Harmonic only, and there required. On a CPU even numbers are fastest: they need no logarithms.
        learn_exponent: n is trained, starting from `exponent`. Harmonic only.
        distance: what d is: "euclidean" (the default), "cosine", "mahalanobis", which go through matrix products, or
            "manhattan", "minkowski", "chebyshev", "canberra", "bray_curtis", "hamming", which take many times as long
            (python -m hgpt.plan). Harmonic only, as are its options.
        distance_file: a Python file that registers a distance of your own (hgpt.register_distance); it is executed.
        distance_options: options of a distance of your own by their names, a table [model.head.distance_options] or
            --model.head.distance_options.NAME VALUE.
        p: of "minkowski", 1 or more; there required.
        temperature: of "hamming", in the unit of the hidden states; default 1.
        metric: of "mahalanobis", "diagonal" (the default), "low_rank" or "full".
        rank: of a "low_rank" metric, at most n_embd; there required.
        final_norm_gain: initial weight of the final layer norm, which sets the norm of the hidden states;
            default 0.05 with the harmonic head, 1 with softmax.
        centre_init_std: initial standard deviation of the centres (of the token embedding, where tied).
    """

    type: Literal["harmonic", "softmax"] = "harmonic"
    exponent: float | str | None = None
    learn_exponent: bool = False
    distance: str | None = None
    distance_file: str | None = None
    distance_options: dict[str, bool | int | float | str] | None = None
    p: float | None = None
    temperature: float | None = None
    metric: str | None = None
    rank: int | None = None
    final_norm_gain: float | None = None
    centre_init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.type == "softmax":
            distance = ("distance", "distance_file", "distance_options", *DISTANCE_OPTIONS)
            for name in ("exponent", "learn_exponent", *distance):
                if getattr(self, name) not in (None, False):
                    raise UserError(
                        f'model.head.{name} = {getattr(self, name)!r} has no effect with model.head.type = "softmax": '
                        f"remove it (on the command line: --model.head.{name} null), or set model.head.type = "
                        '"harmonic"'
                    )
        elif self.exponent is None:
            raise UserError(
                'model.head.exponent is required with model.head.type = "harmonic": n on the distance d, for example '
                '"2*sqrt_dim"'
            )
        if self.distance_file is not None:
            try:
                load_distances(self.distance_file)
            except ValueError as error:
                raise UserError(f"model.head.distance_file: {error}") from error
        for name in DISTANCE_OPTIONS:
            if name in (self.distance_options or {}):
                raise UserError(f"{OWN_OPTIONS}.{name}: this is a setting of its own, model.head.{name}")

    def make_distance(self, dim: int) -> Distance:
        """The distance for vectors of width `dim`, without memory for its weights. Raises ValueError."""
        with torch.device("meta"):
            return make_distance(self.distance or "euclidean", dim, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the distance, whether settings of their own or in `distance_options`."""
        options = {name: getattr(self, name) for name in DISTANCE_OPTIONS} | (self.distance_options or {})
        return {name: value for name, value in options.items() if value is not None}

    def section_of(self, message: str) -> str:
        """The section of the setting that an error of the distance begins with."""
        name = message.split()[0]
        missing = not hasattr(self, name) and message.startswith(f"{name} is required")
        own = missing or name in (self.distance_options or {})
        return f"{OWN_OPTIONS}." if own else "model.head."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model; the vocabulary comes from the data, the context length is data.seq_len.

    Args:
        n_layer: blocks.
        n_head: attention heads.
        n_embd: width D.
        bias: whether linear layers and layer norms have biases.
        dropout: after the embedding, in attention and after each block's projections.
        activation_function: "gelu" as in nanoGPT, "gelu_pytorch_tanh" as in GPT-2.
        scale_attn_by_inverse_layer_idx: divide the attention scores of block i (from 0) by i + 1.
        initializer_range: standard deviation of initial weights.
        tie_word_embeddings: the centres are the token embedding.
        pad_vocab_to_multiple_of: rows of the embedding are rounded up to a multiple of this, for speed.
        init_from: where the weights come from: a Hugging Face GPT-2 (folder or id), an hgpt model folder, or a nanoGPT
            checkpoint (a .pt file). Nothing: random initialisation.
        head: the unembedding.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False
    dropout: float = 0.0
    activation_function: str = "gelu"
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_vocab_to_multiple_of: int = 64
    init_from: str | None = None
    head: HeadConfig

    def __post_init__(self) -> None:
        try:
            self.head.make_distance(self.n_embd)
        except ValueError as error:
            raise UserError(f"{self.head.section_of(str(error))}{error}") from error

    def to_hf(self, *, vocab_size: int, seq_len: int, end_of_text: int | None = None) -> HGPTConfig:
        """The Hugging Face configuration of this model for a vocabulary and a context length."""
        head = self.head
        shared: dict[str, Any] = asdict(self)
        del shared["init_from"], shared["head"]
        if head.exponent is not None:
            shared["exponent"] = head.exponent
        try:
            return HGPTConfig(
                vocab_size=vocab_size,
                n_positions=seq_len,
                head=head.type,
                distance=head.distance or "euclidean",
                distance_options=head.options,
                learn_exponent=head.learn_exponent,
                final_norm_gain=head.final_norm_gain,
                centre_init_std=head.centre_init_std,
                bos_token_id=end_of_text,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
                **shared,
            )
        except ValueError as error:
            setting = str(error).split()[0]
            section = "model.head." if hasattr(head, setting) else "model." if hasattr(self, setting) else ""
            raise UserError(f"{section}{error}") from error


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data.

    Args:
        path: a folder written by data_prep, a bare nanoGPT folder with train.bin and val.bin, or a folder of shards of
            others with llm.c's header.
        seq_len: tokens per sequence T, and the context length of the model.
        vocab_size: only where the folder has no meta.json, so that nothing else says it.
        verify: read all of it once at the start and check checksums and tokens, about a second per GB.
    """

    path: str
    seq_len: int = 1024
    vocab_size: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1 token; got {self.seq_len}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"data.vocab_size must be at least 1; got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimiser steps.
        global_batch: sequences per optimiser step, over all processes; tokens per step = global_batch · seq_len.
        micro_batch: sequences per forward pass and process; accumulation follows from the number of processes.
        seed: of the initial weights, the order of the data and dropout.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on GPUs that have it, fp32 elsewhere.
        compile: torch.compile each block.
        activation_checkpointing: keep only the inputs of blocks and recompute the rest in the backward pass.
        label_smoothing: ε of the training loss −Σ_i q_i log p_i, q = (1 − ε) 1[i = y] + ε / vocabulary. The training
            losses that are logged contain it, validation losses never do.
        skip_non_finite: how many steps with a gradient that is not finite are left out before the run stops; the
            windows of each are written to non_finite.jsonl. 0 stops at the first. Not with DeepSpeed.
        loss_chunk: positions whose products with all centres the head's loss computes at a time, 64 or more: less
            memory against fewer, larger products. Default: as many as take about 75 MiB on a CPU and 500 on a GPU.
        compile_loss: torch.compile what the head's loss does with these products. No faster on a CPU. On a GPU it
            should save most passes over the scores, which eagerly take longer than the products by arithmetic; not yet
            measured there (python -m benchmarks.head_loss --device cuda times both).
        distance_memory: MiB that a distance which is no matrix product may work with, beside operands and gradients.
            Default: 64 on a CPU, 512 on a GPU.
        hang_timeout: seconds without progress after which a process of several gives up, naming those it waits for.
            To be longer than the longest evaluation.
    """

    steps: int
    global_batch: int
    micro_batch: int
    seed: int = 1337
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    label_smoothing: float = 0.0
    skip_non_finite: int = 0
    loss_chunk: int | None = None
    compile_loss: bool = False
    distance_memory: float | None = None
    hang_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"train.label_smoothing must lie in [0, 1); got {self.label_smoothing}")
        if self.skip_non_finite < 0:
            raise UserError(f"train.skip_non_finite must be 0 (none) or more steps; got {self.skip_non_finite}")
        if self.loss_chunk is not None and self.loss_chunk < 64:
            raise UserError(f"train.loss_chunk must be at least 64 positions; got {self.loss_chunk}")
        if self.distance_memory is not None and not 0 < self.distance_memory < math.inf:
            raise UserError(f"train.distance_memory must be a positive number of MiB; got {self.distance_memory}")
        if not 0 < self.hang_timeout < math.inf:
            raise UserError(f"train.hang_timeout must be a positive number of seconds; got {self.hang_timeout}")
        if not 0 <= self.seed < 2**31:  # NumPy's generators take 32 bits, and each process adds its number
            raise UserError(f"train.seed must lie between 0 and 2^31 - 1; got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Args:
        name: the run folder is runs_dir/name.
        runs_dir: folder of all runs.
        resume: "never" refuses a run folder that exists; "auto" goes on from its newest complete checkpoint, or starts
            if there is none; a checkpoint's path goes on from that one.
        model: the model.
        data: the data.
        train: the loop.
        optim: the optimiser.
        eval: evaluation.
        checkpoint: checkpoints.
        log: reporting.
    """

    name: str
    runs_dir: str = "runs"
    resume: str = "never"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise UserError(f"name must be a plain folder name, the run folder under runs_dir; got {self.name!r}")
        if self.optim.warmup_steps >= self.train.steps:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} must be fewer than train.steps = {self.train.steps}: "
                "lower the one or raise the other"
            )
        distance = self.model.head.make_distance(self.model.n_embd)
        what = f'model.head.distance = "{self.model.head.distance or "euclidean"}"'
        if self.model.head.type == "softmax":
            what = 'model.head.type = "softmax"'
        if self.optim.metric_lr_multiplier != 1 and not list(distance.parameters()):
            raise UserError(
                f"optim.metric_lr_multiplier = {self.optim.metric_lr_multiplier} has no effect with {what}, where no "
                "distance is learnt: remove it"
            )
        for name in ("loss_chunk", "compile_loss"):
            if getattr(self.train, name) and distance.power is None:
                raise UserError(
                    f"train.{name} = {getattr(self.train, name)} has no effect with {what}, which goes through no "
                    f"matrix products: remove it"
                )
        if self.train.distance_memory is not None and distance.power is not None:
            raise UserError(
                f"train.distance_memory = {self.train.distance_memory} has no effect with {what}, which goes through "
                "matrix products: remove it"
            )

    @property
    def run_folder(self) -> Path:
        return Path(self.runs_dir) / self.name


def load_run_config(arguments: Sequence[str]) -> RunConfig:
    """A run from command-line arguments: `--config FILE.toml`, of several the later wins, and `--section.key value`.

    The command line wins over files, wherever it names them. Raises UserError for a file that is missing or no TOML,
    an unknown key (naming the nearest known ones), a value of the wrong type, and values out of range. `--help` prints
    every setting and exits.
    """
    known = known_settings(RunConfig)
    files, others = _files_and_others(arguments)
    for file in files:
        for key in flatten(_read_toml(file)):
            _check_name(key, known, file)
    for argument in others:
        if argument.startswith("--") and argument not in ("--help", "--print_config"):
            _check_name(argument[2:].partition("=")[0], known, "command line")

    parser = ArgumentParser(prog="train.py", parser_mode="toml", exit_on_error=False, description=_DESCRIPTION)
    parser.add_argument("--config", action="config", help="a TOML file; configs/ holds those that ship")
    parser.add_class_arguments(RunConfig, sub_configs=False)
    try:
        parsed = parser.parse_args([*(f"--config={file}" for file in files), *others])
        sections = parser.instantiate(parsed)
    except ArgumentError as error:
        raise UserError(_readable(str(error), known)) from error
    return RunConfig(**{entry.name: sections[entry.name] for entry in fields(RunConfig)})


_DESCRIPTION = (
    "Train a GPT-2 with a harmonic or a softmax head. Every setting below is given as --section.key VALUE, or in a "
    "TOML file as key = VALUE under [section]."
)


def known_settings(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all settings of a dataclass, `model.head.exponent`, and their types."""
    types: dict[str, Any] = {}
    for entry in fields(section):
        if is_dataclass(entry.type):
            types |= known_settings(entry.type, f"{prefix}{entry.name}.")
        else:
            types[prefix + entry.name] = entry.type
    return types


def _files_and_others(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --config, and all other arguments."""
    files, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            file = next(remaining, None)
            if file is None:
                raise UserError("--config needs a file: --config configs/quickstart.toml")
            files.append(file)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


def _read_toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file}: cannot read the file ({error}); configs/ holds those that ship") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {file}: not valid TOML: {error}") from error


def _check_name(name: str, known: Iterable[str], where: str) -> None:
    sections = {key[: key.rindex(".")] for key in known if "." in key}
    if name in known or name in sections or name.rpartition(".")[0] == OWN_OPTIONS:
        return
    # A right name in the wrong section is as common as a slip of the pen.
    same_end = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = same_end or difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "python train.py --help lists all settings"
    raise UserError(f"{where}: there is no setting {name}; {hint}")


_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)')


def _readable(message: str, known: dict[str, Any]) -> str:
    """jsonargparse's message in one line; of a mistyped value the setting, what it takes, and the value."""
    message = " ".join(message.split())
    wrong = _WRONG_VALUE.fullmatch(message)
    if wrong is None or wrong[1] not in known:
        return message.replace("Parser key", "setting")
    return f"{wrong[1]} must be {_kind(known[wrong[1]])}; got {wrong[2]}"


def _kind(annotation: Any) -> str:
    """What a value of this type is, for a reader: "a whole number", 'one of "harmonic", "softmax"'."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null (not set)"}
    if annotation in names:
        return names[annotation]
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(f'"{part}"' for part in parts)
    if get_origin(annotation) is dict:
        return "a table"
    if get_origin(annotation) is tuple:
        count = "" if parts[-1] is Ellipsis else f" of {len(parts)}"
        return f"a list{count}, each {_kind(parts[0])}"
    return " or ".join(map(_kind, parts))


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def settings(config: RunConfig) -> dict[str, Any]:
    """The resolved settings by dotted name; what is not set is left out."""
    return {name: value for name, value in flatten(asdict(config)).items() if value is not None}


def write_toml(config: RunConfig, path: Path) -> None:
    """The resolved configuration as TOML, which `load_run_config(["--config", path])` reads back to the same."""
    path.write_text(to_toml(asdict(config)), encoding="utf-8")


def to_toml(table: dict[str, Any], name: str = "") -> str:
    """`table` as TOML: its values, then its tables; None is left out. The standard library reads TOML, but writes none.

    A list, a number, a truth value and a string look in TOML as in JSON, which leaves one control character unescaped.
    """
    values = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for key, value in table.items()
        if value is not None and not isinstance(value, dict)
    ]
    text = "".join(([f"\n[{name}]\n"] if name else []) + values)
    for key, value in table.items():
        if isinstance(value, dict):
            text += to_toml(value, f"{name}.{key}" if name else key)
    return text


# What may differ between a checkpoint and the run that goes on from it: nothing that changes the model, the data or
# what the optimiser remembers.
_FIXED_ON_RESUME = ("model.", "data.", "train.seed", "train.global_batch", "optim.algorithm")
_FREE_ON_RESUME = ("model.init_from", "model.head.distance_file", "data.path", "data.verify")


def check_resume(saved: dict[str, Any], config: RunConfig, checkpoint: Path) -> list[str]:
    """Compare `saved` (dotted settings of the checkpoint) with the configuration of the run that goes on.

    Returns the differences that are allowed, one line each, to be shown. Raises UserError listing those that
    change the model or the order of the data.
    """
    # A setting that the checkpoint does not know, because it is newer, had its default's effect.
    saved, now = _defaults(config) | saved, settings(config)
    changed = {name: (saved.get(name), now.get(name)) for name in sorted(saved.keys() | now.keys())}
    lines = {
        name: f"{name}: {_shown(old)} in the checkpoint, {_shown(new)} now"
        for name, (old, new) in changed.items()
        if _plain(old) != _plain(new) and name != "resume"
    }
    fixed = [line for name, line in lines.items() if name.startswith(_FIXED_ON_RESUME) and name not in _FREE_ON_RESUME]
    if fixed:
        raise UserError(
            f"cannot go on from {checkpoint}: the configuration differs in what makes the model, the data or the "
            "optimiser.\n  "
            + "\n  ".join(fixed)
            + "\nSet these back to go on, or give the run another name to start anew (model.init_from takes the "
            "weights along)."
        )
    return list(lines.values())


def _defaults(section: Any, prefix: str = "") -> dict[str, Any]:
    """The defaults by dotted name of all settings of a dataclass that have one other than "not set"."""
    found: dict[str, Any] = {}
    for entry in fields(section):
        if is_dataclass(entry.type):
            found |= _defaults(entry.type, f"{prefix}{entry.name}.")
        elif entry.default is not MISSING and entry.default is not None:
            found[prefix + entry.name] = entry.default
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
