"""metrics.jsonl, the record of a run: one JSON object a line, {"kind": "train", "step": 10, "time": …, "loss": …}.

A record is an object with a string `kind` and an integer `step` ≥ 0, on a line that ends in a line break. Other lines
(half written by a killed process, or damaged) are dropped, so a run stays readable and can resume.
"""

import json
import mmap
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hgpt.errors import UserError

METRICS_FILE = "metrics.jsonl"
DIVERGED = "diverged"  # the kind of the last record of a run whose loss or gradient was not finite
LARGEST = 1e300  # larger numbers come from damaged files; JSON integers can exceed the range of a float


def records(source: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run folder or a file, in their order; only those of `kind` if it is given.

    A missing file has no records. Prints one warning with the dropped lines. Raises UserError if the file cannot be
    read.
    """
    path = _file(source)
    if not path.exists():
        return []
    try:
        *lines, unfinished = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    parsed = [_record(line) for line in lines]
    dropped = [str(number) for number, record in enumerate(parsed, start=1) if record is None]
    if unfinished:
        dropped.append(str(len(lines) + 1))
    if dropped:
        some = ", ".join(dropped[:5]) + (f" and {len(dropped) - 5} more" if len(dropped) > 5 else "")
        _warn(f"{path}, line {some}: not a whole record (kind, step), dropped")
    return [record for record in parsed if record is not None and kind in (None, record["kind"])]


def newest_first(source: Path) -> Iterator[dict[str, Any]]:
    """The records of a run folder or a file, the last one first, read lazily.

    Other lines are dropped without a warning. A missing or unreadable file has no records.
    """
    try:
        with open(_file(source), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n")
            while end >= 0:
                start = content.rfind(b"\n", 0, end) + 1
                record = _record(content[start:end])
                if record is not None:
                    yield record
                end = start - 1
    except (OSError, ValueError):  # mmap raises ValueError for an empty file
        return


def number_in(record: Any, name: str) -> float | None:
    """The finite number with this name in a record or another table; None if there is none, as in a damaged file."""
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST else None  # False for NaN


@cache  # a command that reads a file several times warns once
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _file(source: Path) -> Path:
    return source / METRICS_FILE if source.is_dir() else source


def _record(line: bytes) -> dict[str, Any] | None:
    """The record on a line, None if the line holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 2**63 else None
