"""Measure one model or several, and write a report.

    python -m hgpt.interpret runs/quickstart --out report
    python -m hgpt.interpret runs/quickstart runs/quickstart_softmax --text mine.txt --out report

The other models are compared with the first.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import docstring_parser

from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.interpret.report import PAGE, analyse, earlier_figures, write_report
from hgpt.interpret.subject import AnalysisSettings
from hgpt.source import load_distance_file

METAVARS = {"data": "DIR", "relations": "DIR", "tokens": "N", "bootstrap": "N", "text": "FILE", "words": "WORD"}
MODELS = "run folder (its latest checkpoint), checkpoint folder, exported model, Hugging Face GPT-2 (folder or id)"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The models, --out, and an option for each field of `AnalysisSettings`."""
    parser = Parser("python -m hgpt.interpret", __doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN_OR_MODEL", help=MODELS)
    add("--out", required=True, metavar="DIR", help="folder of the report")
    described = docstring_parser.parse(AnalysisSettings.__doc__ or "").params
    for field, about in zip(fields(AnalysisSettings), described, strict=True):
        assert field.name == about.arg_name
        shown = "" if field.default in (None, ()) else f" (default: {field.default})"
        add(
            f"--{field.name}",
            type=int if isinstance(field.default, int) else str,
            nargs="+" if field.name == "words" else None,
            default=field.default,
            metavar=METAVARS.get(field.name),
            help=f"{about.description}{shown}",
        )
    add("--distance-file", metavar="FILE", help="a Python file that registers a model's own distance; it is executed")
    add("--overwrite", action="store_true", help="replace the report in the folder, if it holds one")
    add("--final-only", action="store_true", help="do not measure the earlier checkpoints in run folders")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> str:
    """Measure and write the report; returns its path and the elapsed time."""
    start = time.perf_counter()
    options = parse_arguments(argv)
    out = Path(options.out)
    load_distance_file(options.distance_file)
    settings = AnalysisSettings(**{field.name: getattr(options, field.name) for field in fields(AnalysisSettings)})
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if earlier_figures(out) is not None and not options.overwrite:
        raise UserError(f"--out {out} holds a report: name another folder, or replace the report with --overwrite")
    analysis = analyse(options.models, settings, checkpoints=not options.final_only)
    write_report(analysis, out)
    for note in analysis.notes:
        print(f"note: {note}", file=sys.stderr)
    for entry, labels in analysis.skipped.items():
        print(f"skipped: {labels}: {entry}", file=sys.stderr)
    return f"{options.out.rstrip('/')}/{PAGE} ({time.perf_counter() - start:.0f} s)"


if __name__ == "__main__":
    sys.exit(run(main, interrupted="interrupted; nothing was written"))
