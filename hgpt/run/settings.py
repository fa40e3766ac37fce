"""Settings of a run (hgpt/run/config.py) from TOML and the command line and back, and what may change on resume.

python train.py --config configs/x.toml --optim.lr 1e-3
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from hgpt.errors import UserError
from hgpt.run.config import OWN_OPTIONS, RunConfig

CONFIG_FILE = "config.toml"


def load_run_config(arguments: Sequence[str], shape_of: Callable[..., dict[str, int]] | None = None) -> RunConfig:
    """A run from command-line arguments: `--config FILE.toml`, of several the later wins, and `--section.key value`.

    The command line wins over files, wherever it names them. Raises UserError for a file that is missing or no TOML,
    an unknown key (naming the nearest known ones), a value of the wrong type, and values out of range. `--help` prints
    every setting and exits.

    With `shape_of` (hgpt.source), those of n_layer, n_head and n_embd that are not given come from model.init_from.
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
        texts = [*(f"--config={file}" for file in files), *others]
        parsed = parser.parse_args(texts)
        if shape_of is not None and parsed["model.init_from"] is not None:
            given = parser.parse_args(texts, defaults=False)
            missing = [name for name in ("model.n_layer", "model.n_head", "model.n_embd") if name not in given]
            if missing:
                run_folder = Path(parsed["runs_dir"]) / parsed["name"]
                shape = shape_of(parsed["model.init_from"], parsed["resume"], run_folder)
                for name in missing:
                    parsed[name] = shape[name.removeprefix("model.")]
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
