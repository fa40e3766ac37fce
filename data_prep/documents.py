"""Your own text to token shards.

    python -m data_prep.documents --out data/mine my_texts/
    python -m data_prep.documents --out data/mine --tokenizer bpe:1024 --val-fraction 0.05 one.txt more.jsonl.gz

Documents are separated by end-of-text and split into train and val by a hash of their words, so copies of a text are
in the same split. After an interruption the same command resumes and writes the same bytes.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.encoding import Tally, decode_utf8, read_documents
from data_prep.engine import INTERRUPTED, ONE_DOCUMENT, prepare
from data_prep.parts import Record
from data_prep.recipe import Recipe, Source, add_options, add_text_options
from data_prep.splits import HashSplit
from data_prep.state import Preparation
from data_prep.text_files import Section, find_files, kind_of, printable, say_left_out
from hgpt.cli import Parser, run
from hgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Documents(Recipe):
    """Own texts, split by a hash of their words."""

    files: Sequence[str]

    keep_empty = False
    training_bytes = float("inf")
    missing = "skipped, empty"
    packages = ("hgpt",)

    @cached_property
    def _found(self) -> tuple[list[Path], list[Path]]:
        return find_files(self.files)

    @property
    def source_name(self) -> str:
        names = [printable(path.name) for path in self._found[0]]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more files" if len(names) > 4 else "")

    def check(self) -> None:
        super().check()
        if self.separator is not None and not any(kind_of(path) == ".txt" for path in self._found[0]):
            raise UserError("--separator has no effect without a .txt file: leave it out.")

    def find_source(self, preparation: Preparation) -> Source:
        files, ignored = self._found
        say_left_out(ignored)
        return Source(files=files)

    def split(self, documents: int) -> HashSplit:
        return HashSplit(seed=self.seed, val_fraction=self.val_fraction)

    def check_sides(self, tally: Tally, sections: Sequence[Section]) -> None:
        documents = tally.both.documents
        if documents == 0:
            reason = " ".join(["", *tally.bad[:1]])
            raise UserError(
                f"There is no text: {tally.missing} empty documents and no others.{reason} Give other files."
            )
        if documents == 1:
            raise UserError(ONE_DOCUMENT)
        empty = [split for split, counts in tally.counts.items() if not counts.documents]
        if not empty:
            return
        texts = (decode_utf8(document or b"")[0] for document in read_documents(sections, self.fields, []))
        hashes = [self.split(0).hash(text) for text in texts if text.strip()]
        if min(hashes) == max(hashes):
            raise UserError(
                f"All {documents} documents have the same words, and copies of a text are on the same side: there is "
                "nothing to validate on. Give other documents as well; --val-fraction and --seed do not help."
            )
        if empty == ["val"]:
            way_out = f"raise it to {min(hashes) + 1e-4:.4f} or more"
        else:
            way_out = f"lower it to {max(max(hashes) - 1e-4, 0):.4f} or less"
        raise UserError(
            f"None of the {documents} documents fell on the {empty[0]} side with --val-fraction {self.val_fraction}: "
            f"{way_out}, or give more documents."
        )

    def describe(self, record: Record, tally: Tally) -> dict[str, Any]:
        left_out = [*record.left_out, *tally.bad]
        return {
            "seed": self.seed,
            "val_fraction": self.val_fraction,
            "skipped_empty_documents": tally.missing,
            "documents_with_replaced_utf8": tally.replaced,
            "text_column": self.text_column,
            "separator": self.separator,
        } | ({"left_out": left_out} if left_out else {})


def main(arguments: Sequence[str]) -> str:
    parser = Parser("python -m data_prep.documents", __doc__)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help="files or folders: .txt, .md, .py (one document), .jsonl, .ndjson (one per line), .json (one per line, or "
        "an array), .parquet, .arrow (one per row); text and JSON also with .gz or .zst",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="data folder to write, new or empty")
    add_options(parser, tokenizer="gpt2", val_fraction=0.01)
    parser.add_argument(
        "--separator",
        type=_unescape,
        metavar="TEXT",
        help=r"text between the documents of a .txt file, for example '\n\n'; without it a file is one document",
    )
    add_text_options(parser)
    options = parser.parse_args(arguments)
    return prepare(options.out, Documents.of(options), workers=options.workers)


def _unescape(text: str) -> str:
    r"""Replace \n, \t and the like in a command-line argument by the characters that they name."""
    value = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    if not value or printable(value) != value:
        raise argparse.ArgumentTypeError("must not be empty, and must be UTF-8")
    return value


if __name__ == "__main__":
    sys.exit(run(main, interrupted=INTERRUPTED))
