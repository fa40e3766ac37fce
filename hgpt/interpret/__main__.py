"""python -m hgpt.interpret RUN_OR_MODEL… [--data DIR] [--relations DIR] --out report/"""

import argparse
import sys
import time
from collections.abc import Sequence

from hgpt import cli
from hgpt.errors import UserError
from hgpt.interpret.report import PAGE, interpret
from hgpt.interpret.subject import AnalysisSettings
from hgpt.model.distances import load_distances


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    defaults = AnalysisSettings()
    parser = cli.Parser(
        prog="python -m hgpt.interpret",
        description="Measure what can be read in one model or several, and write a report.",
        epilog="The other models are compared with the first one.",
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
        help="validation tokens to predict, spread over the split; 0: all of them (default: %(default)s)",
    )
    add(
        "--bootstrap",
        type=int,
        default=defaults.bootstrap,
        metavar="N",
        help="resamples behind every interval (default: %(default)s)",
    )
    add("--text", metavar="FILE", help="text to show token by token (default: the beginning of the validation text)")
    add(
        "--words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="tokens whose centres to show, a leading space in quotes: ' the' (default: the most frequent words)",
    )
    add("--distance-file", metavar="FILE", help="a Python file that registers a model's own distance; it is executed")
    add("--seed", type=int, default=defaults.seed, help="of every random choice (default: %(default)s)")
    add("--device", default=defaults.device, help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    add("--final-only", action="store_true", help="do not measure the earlier checkpoints that run folders have kept")
    return parser.parse_args(argv)


def report(argv: Sequence[str]) -> str:
    """Write the report that the arguments ask for; returns the line that names it."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return cli.run(report, argv, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
