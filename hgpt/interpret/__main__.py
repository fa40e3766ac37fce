"""python -m hgpt.interpret RUN_OR_MODEL… [--data DIR] [--relations DIR] --out report/"""

import argparse
import sys
import time
from collections.abc import Sequence

from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.interpret.report import PAGE, interpret
from hgpt.interpret.subject import AnalysisSettings
from hgpt.model.distances import load_distances


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    defaults = AnalysisSettings()
    parser = Parser(
        prog="python -m hgpt.interpret",
        description="Measure what can be read in one model or several, and write a report.",
        epilog="The first model is the one that the others are compared with.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="RUN_OR_MODEL",
        help="run folder (its latest checkpoint), checkpoint folder, exported model, Hugging Face GPT-2 (folder or id)",
    )
    add("--out", required=True, metavar="DIR", help="folder of the report")
    add("--data", metavar="DIR", help="data folder written by data_prep (default: the one that the runs name)")
    add("--relations", metavar="DIR", help="folder of relation sets, one .json each (default: those that ship)")
    add(
        "--tokens",
        type=int,
        default=defaults.tokens,
        metavar="N",
        help=f"validation tokens to predict, spread over the split; 0: all of them (default: {defaults.tokens})",
    )
    add(
        "--bootstrap",
        type=int,
        default=defaults.bootstrap,
        metavar="N",
        help=f"resamples behind every interval (default: {defaults.bootstrap})",
    )
    add("--text", metavar="FILE", help="text to show token by token (default: the beginning of the validation text)")
    add(
        "--words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="tokens whose centres to read, a leading space in quotes: ' the' (default: the commonest words)",
    )
    add("--distance-file", metavar="FILE", help="a Python file that registers a model's own distance; it is executed")
    add("--seed", type=int, default=defaults.seed, help=f"of every random choice (default: {defaults.seed})")
    add("--device", default=defaults.device, help=f"cpu, cuda, cuda:1, mps, ... (default: {defaults.device})")
    add(
        "--final-only",
        action="store_true",
        help="do not measure the earlier checkpoints that run folders have kept",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> str:
    """Measure and write the report; returns where it is."""
    start = time.perf_counter()
    options = parse_arguments(argv)
    if options.distance_file is not None:
        try:
            load_distances(options.distance_file)
        except ValueError as error:
            raise UserError(f"--distance-file: {error}") from error
    settings = AnalysisSettings(
        data=options.data,
        relations=options.relations,
        tokens=options.tokens,
        bootstrap=options.bootstrap,
        text=options.text,
        words=tuple(options.words),
        seed=options.seed,
        device=options.device,
    )
    analysis = interpret(options.models, settings, options.out, checkpoints=not options.final_only)
    for note in analysis.notes:
        print(f"note: {note}", file=sys.stderr)
    for model in analysis.models:
        for entry in model.skipped:
            print(f"skipped: {model.label}: {entry}", file=sys.stderr)
    return f"{options.out.rstrip('/')}/{PAGE} ({time.perf_counter() - start:.0f} s)"


if __name__ == "__main__":
    sys.exit(run(main, interrupted="interrupted; nothing was written"))
