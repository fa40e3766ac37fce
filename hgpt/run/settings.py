"""Read the settings of a run (hgpt/run/config.py) from TOML and the command line, write them, compare them on resume.

    python train.py --config configs/x.toml --optim.lr 1e-3

In this module and in checkpoints, settings are a flat dictionary by dotted name:
{"train.steps": 800, "model.head.exponent": 14.0, "model.head.distance_options.p": 3}.
"""

import ast
import difflib
import functools
import json
import math
import os
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from hgpt.cli import Parser, did_you_mean
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.run.config import RunConfig

CONFIG_FILE = "config.toml"
OPTIONS = "model.head.distance_options"  # the only table whose keys are not fields of a dataclass


class Setting(NamedTuple):
    """A setting in its dataclass."""

    kind: Any  # the type, as the dataclass has it
    default: Any  # MISSING for a required setting
    doc: str


@functools.cache
def known_settings(section: type = RunConfig, prefix: str = "") -> dict[str, Setting]:
    """All settings of a dataclass by dotted name, `model.head.exponent`."""
    docs = _docs(HGPTConfig) | _docs(section)
    found: dict[str, Setting] = {}
    for entry in fields(section):
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            found |= known_settings(entry.type, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = Setting(entry.type, entry.default, docs.get(entry.name, ""))
    return found


def _docs(section: type) -> dict[str, str]:
    """Descriptions for --help; none in a checkout without docstring_parser."""
    try:
        import docstring_parser
    except ImportError:
        return {}
    params = docstring_parser.parse(section.__doc__ or "").params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


# ---------------------------------------------------------------------------------------------------------------
# Settings of earlier versions

RENAMED = {f"model.head.{name}": f"{OPTIONS}.{name}" for name in ("p", "temperature", "metric", "rank")}


def removed(settings: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Removed settings of earlier versions: the one value that is still accepted, and the reason."""
    return {
        "model.initializer_range": (0.02, "it is always 0.02, as in GPT-2"),
        "model.pad_vocab_to_multiple_of": (64, "it is always 64"),
        "train.loss_chunk": (None, "the size follows from the device"),
        "train.distance_memory": (None, "the size follows from the device"),
        "train.compile_loss": (settings.get("train.compile_loss"), "on a GPU the loss has kernels of its own"),
        "optim.muon_momentum": (0.95, "it is always 0.95"),
        "optim.decay_fraction": (0.2, "it is always 0.2"),
        "checkpoint.on_interrupt": (True, "Ctrl-C always saves a checkpoint"),
        "log.wandb_project": ("hgpt", "the environment variable WANDB_PROJECT replaces it"),
        "log.energy": (settings.get("log.energy_country") is not None, "log.energy_country alone turns it on"),
    }


# ---------------------------------------------------------------------------------------------------------------
# Reading


ABOUT = """Train a GPT-2 with a harmonic or a softmax head.

    python train.py --config configs/quickstart.toml
    python train.py --config configs/quickstart.toml --name longer --train.steps 2000
    python train.py --config configs/quickstart.toml --resume auto
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml train.py --config configs/gpt2_small_harmonic.toml

"""


def load_run_config(
    arguments: Sequence[str],
    shape_of: Callable[..., dict[str, int]] | None = None,
    other_options: Sequence[str] = (),
) -> RunConfig:
    """The run of command-line arguments: `--config FILE.toml`, repeatable, and `--section.key VALUE`.

    A later file overrides an earlier one, and the command line overrides all files. `--help` prints every setting and
    exits; `--print_config` prints the resolved settings as TOML and exits. With `shape_of` (hgpt.source), n_layer,
    n_head and n_embd come from model.init_from unless given. If the command line asks for no more steps than a file's
    warm-up, the warm-up becomes a tenth of the steps. `other_options` of the calling command are suggested for
    misspelled names.

    Raises UserError for a missing or invalid file, an unknown setting (with the nearest known ones), a missing setting,
    and a value of the wrong type or out of range.
    """
    parser = Parser("python train.py", ABOUT + _every_setting())
    parser.add_argument("--config", action="append", default=[], metavar="FILE.toml",
        help="settings, as in configs/; later files override earlier ones, the command line all")  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as TOML, and exit")
    own, others = parser.parse_known_args(arguments)
    given = [(f"{file}: ", name, value) for file in own.config for name, value in _read_toml(file).items()]
    typed = [("command line: ", name, _from_text(name, text)) for name, text in _pairs(others)]
    values = _merged([*given, *typed], [*parser.options, *other_options])
    _shorten_warmup(values, {name for _, name, _ in typed})
    shape = [name for name in ("n_layer", "n_head", "n_embd") if f"model.{name}" not in values]
    if shape_of is not None and shape and values.get("model.init_from") is not None:
        run_folder = Path(values.get("runs_dir", "runs")) / values["name"]
        found = shape_of(values["model.init_from"], values.get("resume", "never"), run_folder)
        values |= {f"model.{name}": found[name] for name in shape}
    config = _build(RunConfig, values)
    if config.model.backbone is not None:  # its file has the shape
        found = config.model.to_hf(vocab_size=1, seq_len=1)
        config = _build(RunConfig, values | {f"model.{name}": getattr(found, name) for name in shape})
    if own.print_config:
        print(to_toml(settings(config)), end="")
        raise SystemExit(0)
    return config


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of `--name text` and `--name=text`."""
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            raise UserError(f"unrecognized arguments: {argument}; settings are given as --section.key VALUE")
        name, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise UserError(f"--{name} needs a value: --{name} VALUE")
        yield name, text


def _read_toml(file: str) -> dict[str, Any]:
    """The settings in a file by dotted name."""
    try:
        return flatten(tomllib.loads(Path(file).read_bytes().decode("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        shipped = {path.stem: str(path) for path in sorted(Path("configs").rglob("*.toml"))}
        close = difflib.get_close_matches(Path(file).stem, shipped, n=2)
        near = " or ".join(shipped[name] for name in close)
        hint = f"did you mean {near}?" if near else "configs/ has the shipped files"
        raise UserError(f"--config {file}: cannot read the file ({error}); {hint}") from error
    except RecursionError as error:
        raise UserError(f"--config {file}: not valid TOML: nested too deeply") from error
    except ValueError as error:  # also from int(), for numbers of thousands of digits
        raise UserError(f"--config {file}: not valid TOML: {error}") from error


def _merged(given: list[tuple[str, str, Any]], options: Sequence[str]) -> dict[str, Any]:
    """Checked settings from (place, name, value); a later value of a setting replaces an earlier one.

    `options` of the command are also suggested for an unknown name.
    """
    values: dict[str, Any] = {}
    for place, name, value in given:
        name = RENAMED.get(name, name)
        _check_name(name, place, options)
        if name == OPTIONS and isinstance(value, dict | None):  # a whole table replaces all earlier options
            values = {key: old for key, old in values.items() if not key.startswith(f"{OPTIONS}.")}
            values |= {f"{OPTIONS}.{key}": option for key, option in (value or {}).items()}
        else:
            values[name] = value
    for name, (fixed, reason) in removed(values).items():
        if values.get(name) not in (None, fixed):
            raise UserError(f"{name} = {values[name]!r}: this setting was removed, {reason}: remove it")
        values.pop(name, None)
    required = [name for name, setting in known_settings().items() if setting.default is MISSING]
    if not values.keys() >= set(required):
        raise UserError(
            f"these settings are required: {', '.join(name for name in required if name not in values)}; name a file "
            "that has them, such as --config configs/quickstart.toml"
        )
    return {name: _checked(name, value) for name, value in values.items()}


def _shorten_warmup(values: dict[str, Any], typed: set[str]) -> None:
    """Lower a file's warm-up to a tenth of the steps if fewer steps were `typed`, and print this once."""
    steps, warmup = values["train.steps"], values.get("optim.warmup_steps", 0)
    if 0 < steps <= warmup and "train.steps" in typed and "optim.warmup_steps" not in typed:
        values["optim.warmup_steps"] = steps // 10
        _say_once(f"optim.warmup_steps is lowered from {warmup} to {steps // 10}, a tenth of train.steps = {steps}")


@functools.cache
def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _check_name(name: str, place: str, options: Sequence[str]) -> None:
    """Raise UserError for a name that is no setting."""
    known = known_settings()
    if name in known or name in removed({}) or name.rpartition(".")[0] == OPTIONS:
        return
    if any(key.startswith(f"{name}.") for key in known):
        raise UserError(f"{place}{name} is a section: give its settings one by one, as {name}.KEY")
    hint = did_you_mean(name, [*known, *options]) or "python train.py --help lists all settings"
    raise UserError(f"{place}there is no setting {name}; {hint}")


def _build(section: type, values: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass `section` from values by dotted name."""
    arguments: dict[str, Any] = {}
    for entry in fields(section):
        name = prefix + entry.name
        if isinstance(entry.type, type) and is_dataclass(entry.type):
            arguments[entry.name] = _build(entry.type, values, f"{name}.")
        elif name == OPTIONS:
            table = {key.removeprefix(f"{OPTIONS}."): value for key, value in values.items() if key.startswith(OPTIONS)}
            arguments[entry.name] = {key: value for key, value in table.items() if value is not None} or None
        elif name in values:
            arguments[entry.name] = values[name]
    return section(**arguments)


# ---------------------------------------------------------------------------------------------------------------
# Types of values

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None}
_OPTION_KIND = bool | int | float | str | None


def _kind_of(name: str) -> Any:
    return known_settings()[name].kind if name in known_settings() else _OPTION_KIND


def _checked(name: str, value: Any) -> Any:
    """`value` with the setting's type. Raises UserError."""
    try:
        return _converted(value, _kind_of(name))
    except (TypeError, OverflowError) as error:
        shown = "a number of thousands of digits"
        with suppress(ValueError):
            shown = repr(value)
        size = ", of 64 bits at most" if isinstance(error, OverflowError) else ""
        raise UserError(f"{name} must be {_in_words(_kind_of(name))}{size}; got {shown:.300}") from error


def _from_text(name: str, text: str) -> Any:
    """`text` read as true, false, null or a Python literal if that has the setting's type; otherwise `text` itself."""
    try:
        value = _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
        _converted(value, _kind_of(name))
    except OverflowError:
        return value
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return text if isinstance(value, str) else value


def _converted(value: Any, kind: Any) -> Any:
    """`value` as a value of the type `kind`: whole numbers become floats, lists become tuples. Raises TypeError."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            with suppress(TypeError):
                return _converted(value, part)
    if origin is Literal and value in parts:
        return value
    if origin is dict and isinstance(value, dict):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(kinds) == len(value):
            return tuple(map(_converted, value, kinds))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is int and type(value) is int and abs(value) >= 2**63:
        raise OverflowError
    # Python reads arguments of the command line that are not UTF-8 as surrogates.
    if kind is str and isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise TypeError("no file can have this name, and no TOML hold it")
    if kind in (bool, int, str, NoneType) and type(value) is kind:
        return value
    raise TypeError(f"{value!r} is not {_in_words(kind)}")


def _in_words(kind: Any) -> str:
    """A type in words: "a whole number", 'one of "harmonic", "softmax"'."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text (UTF-8, without NUL)"}
    if kind in names:
        return names[kind]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{part}"' for part in parts)
    if get_origin(kind) is dict:
        return "a table"
    if get_origin(kind) is tuple:
        count = "" if parts[-1] is Ellipsis else f" of {len(parts)}"
        return f"a list{count}, each {_in_words(parts[0])}"
    return " or ".join(_in_words(part) for part in parts if part is not NoneType)


def _placeholder(kind: Any) -> str:
    """The placeholder of a value in --help: N, X, TEXT, true|false, adamw|muon."""
    names = {int: "N", float: "X", bool: "true|false", str: "TEXT", tuple: "LIST", dict: "TABLE"}
    if (name := names.get(get_origin(kind) or kind)) is not None:
        return name
    parts = [part for part in get_args(kind) if part is not NoneType]
    return "|".join(parts if get_origin(kind) is Literal else map(_placeholder, parts))


def _every_setting() -> str:
    """--help on settings: by section, each setting's name, default and description."""
    text, section = "settings, here as --section.key VALUE, in a TOML file as key = VALUE under [section]:\n\n", ""
    for name, (kind, default, doc) in known_settings().items():
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            text += f"\n[{section}]\n"
        shown = "required" if default is MISSING else "not set" if default is None else f"default {json.dumps(default)}"
        text += f"  --{name} {_placeholder(kind)}  ({shown})\n"
        text += textwrap.fill(doc, 118, initial_indent=" " * 6, subsequent_indent=" " * 6) + "\n"
    return text


# ---------------------------------------------------------------------------------------------------------------
# Writing


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def settings(config: RunConfig) -> dict[str, Any]:
    """The resolved settings by dotted name; settings that are None are left out."""
    return {name: value for name, value in flatten(asdict(config)).items() if value is not None}


def write_toml(config: RunConfig, path: Path) -> None:
    """Write the resolved settings as TOML, which `load_run_config(["--config", path])` reads back to the same."""
    path.write_text(to_toml(settings(config)), encoding="utf-8")


def to_toml(values: dict[str, Any]) -> str:
    """Settings by dotted name as TOML, a table per section.

    Values are written as JSON, which is valid TOML except for the control character U+007F, which JSON does not escape.
    The package toml would turn the path C:\\x41 into C:A.
    """
    sections: dict[str, str] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        line = f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        sections[section] = sections.get(section, f"[{section}]\n" if section else "") + line
    return "\n".join(sections.values())


# ---------------------------------------------------------------------------------------------------------------
# Resuming

# Settings that a run must share with the checkpoint it resumes: model, order of the data, optimiser's state.
_FIXED_ON_RESUME = ("model.", "data.", "train.seed", "train.global_batch", "optim.algorithm")
_FREE_ON_RESUME = (
    *("model.init_from", "model.backbone", "model.head.radius_init", "model.head.distance_file"),
    *("data.path", "data.verify"),
)


def check_resume(saved: dict[str, Any], config: RunConfig, checkpoint: Path) -> list[str]:
    """Compare `saved` (settings of the checkpoint by dotted name) with the configuration of the resuming run.

    Returns the allowed differences, one line each. Raises UserError with the differences that change the model, the
    data or the optimiser's state.
    """
    now = json.loads(json.dumps(settings(config)))  # with lists for tuples, as in a checkpoint
    # Settings newer than the checkpoint: their defaults are the older behaviour.
    defaults = {name: kept.default for name, kept in known_settings().items() if kept.default not in (MISSING, None)}
    saved = json.loads(json.dumps(defaults)) | {RENAMED.get(name, name): value for name, value in saved.items()}
    now |= {name: fixed for name, (fixed, _) in removed(now).items() if name in saved}
    lines = {
        name: f"{name}: {_shown(saved.get(name))} in the checkpoint, {_shown(now.get(name))} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name) and name != "resume"
    }
    fixed = [line for name, line in lines.items() if name.startswith(_FIXED_ON_RESUME) and name not in _FREE_ON_RESUME]
    if fixed:
        raise UserError(
            f"cannot resume {checkpoint}: these settings belong to the model, the data or the optimiser's state.\n  "
            + "\n  ".join(fixed)
            + "\nSet them back, or start a run with another name (model.init_from can load the weights)."
        )
    return list(lines.values())


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
