"""OpenWebText to token shards, with nanoGPT's validation split.

    python -m data_prep.openwebtext --out data/openwebtext

The documents come from the Hugging Face hub, or with `--source` from a folder of Parquet, JSONL or text files. All
processors encode. After an interruption the same command resumes and writes the same bytes. Several machines can share
the work: `--part 1/4` ... `--part 4/4`, then `--merge`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from data_prep.encoding import Tally
from data_prep.engine import INTERRUPTED, prepare
from data_prep.hub import REPOSITORY, REVISION, cached, download
from data_prep.parts import Record, merge, total
from data_prep.recipe import Recipe, Source, add_options, add_text_options
from data_prep.splits import IndexSplit, nanogpt_indices
from data_prep.state import Preparation
from data_prep.summary import summary
from data_prep.text_files import find_files, kind_of, printable, say_left_out
from hgpt.cli import Parser, run
from hgpt.errors import UserError

# OpenWebText, and the counts that nanoGPT's data/openwebtext/readme.md reports for its prepare.py.
DOCUMENTS = 8_013_769
VAL_FRACTION = 0.0005
SEED = 2357
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
# On the files of REVISION, nanoGPT's script gives the same total with 291 fewer validation tokens, as others report; a
# few documents were probably reordered after 2022.
TOKENS_AT_REVISION = {"train": 9_035_582_489, "val": 4_434_606}


@dataclass(frozen=True, kw_only=True)
class OpenWebText(Recipe):
    """The documents of a data set on the hub or of a folder, with nanoGPT's split.

    Empty documents are kept, as in nanoGPT. A row without text (null) is left out, but counts as a document in the
    split.
    """

    source: str = REPOSITORY
    revision: str | None = None

    keep_empty = True
    training_bytes = 200e6
    missing = "without text"
    packages = ("hgpt", "numpy", "pyarrow")

    @property
    def source_name(self) -> str:
        return printable(Path(self.source).resolve().name) if self._is_local() else self.source

    def _is_local(self) -> bool:
        try:
            return Path(self.source).exists()
        except OSError as error:
            raise UserError(
                f"--source {self.source} cannot be read: {error.strerror}. Change its permissions, or give another."
            ) from error

    def find_source(self, preparation: Preparation) -> Source:
        """The files of `source`: a folder or file on this machine if it exists, otherwise a data set on the hub."""
        if self._is_local():
            return self._local_source()
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.source):
            raise UserError(
                f"--source {self.source} is neither a folder or file on this machine, nor the id of a data set on the "
                f"Hugging Face hub, like {REPOSITORY}."
            )
        revision = self.revision or REVISION
        asked = f"{self.source} at {revision}"
        begun = preparation.begun({"data set on the hub": asked})
        revision = begun.get("revision", revision)
        found = None
        if begun or huggingface_hub.constants.HF_HUB_OFFLINE:
            found = cached(self.source, revision, begun.get("files"))
        files, commit = found or download(self.source, revision)
        return Source(files=files, revision=commit, asked=asked)

    def _local_source(self) -> Source:
        if self.revision is not None:
            raise UserError(
                f"--revision {self.revision} has no effect on --source {self.source}, which is a folder or file on "
                "this machine: leave it out."
            )
        files, ignored = find_files([self.source])
        say_left_out(ignored)
        kinds = sorted({kind for kind in map(kind_of, files) if kind is not None})
        if len(kinds) > 1:
            raise UserError(
                f"The source holds {' and '.join(kinds)} files. They may hold the same documents twice, and their "
                "order is not defined. Give a folder with files of one kind."
            )
        return Source(files=files)

    def split(self, documents: int) -> IndexSplit:
        return IndexSplit(val=nanogpt_indices(documents, self.val_fraction, self.seed))

    def notes(self, documents: int) -> list[str]:
        if documents == DOCUMENTS:
            return []
        return [
            f"note: {documents:,} documents, but OpenWebText has {DOCUMENTS:,}: this is a part of it or another text. "
            "The validation split is not nanoGPT's, and losses cannot be compared with those on OpenWebText."
        ]

    def describe(self, record: Record, tally: Tally) -> dict[str, Any]:
        return {
            "split": "train_test_split(test_size=val_fraction, seed=seed, shuffle=True) of datasets, each side in "
            "the order of the source",
            "seed": record.settings["seed"],
            "val_fraction": record.settings["val_fraction"],
            "documents": record.settings["documents"],
            "documents_of_openwebtext": DOCUMENTS,
            "text_column": record.settings["text_column"],
            "parts": record.part[1],
            "documents_without_text": tally.missing,
            "documents_with_replaced_utf8": tally.replaced,
            "left_out": [*record.left_out, *tally.bad],
        }

    def remarks(self, record: Record, tally: Tally) -> list[str]:
        """How the token counts compare with nanoGPT's; only for all of OpenWebText with nanoGPT's split."""
        usual = (record.settings["val_fraction"], record.settings["seed"], record.tokenizer)
        if not (record.settings["documents"] == tally.rows == DOCUMENTS and usual == (VAL_FRACTION, SEED, "gpt2")):
            return []
        found = {split: counts.tokens for split, counts in tally.counts.items()}
        theirs = f"{TOKENS['train']:,} and {TOKENS['val']:,}, which nanoGPT reports"
        if found == TOKENS:
            return [f"train and val have as many tokens as nanoGPT's: {theirs}"]
        if sum(found.values()) != sum(TOKENS.values()):
            return [f"note: not the {theirs}: the text differs, so losses are only roughly comparable"]
        known = ", as others found at this revision" if found == TOKENS_AT_REVISION else ""
        return [
            f"note: the total is nanoGPT's, with {abs(found['val'] - TOKENS['val']):,} "
            f"{'fewer' if found['val'] < TOKENS['val'] else 'more'} in val than the {theirs}: the same documents in "
            f"another order{known}"
        ]


def merged(out: Path, recipe: OpenWebText) -> str:
    """Merge the parts in `out`; returns the summary to print."""
    parts = merge(out, recipe.describe)
    if not parts:
        return f"{out} was complete."
    tally = total(parts)
    lines = [*summary(parts, tally, recipe.missing), *recipe.remarks(parts[0], tally)]
    lines.append(
        f"merged from       {len(parts)} parts; the sizes of their shards were checked; to check every byte: "
        f"python -m data_prep.verify {out}"
    )
    return "\n".join([*lines, f"written to        {out}"])


def main(arguments: Sequence[str]) -> str:
    parser = Parser("python -m data_prep.openwebtext", __doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="data folder to write, new or empty")
    parser.add_argument(
        "--source",
        default=REPOSITORY,
        metavar="HUB_ID_OR_FOLDER",
        help="data set on the hub, or a folder (or file) of Parquet, .jsonl or .txt files, the last two also with .gz "
        "or .zst; documents are taken in the order of the files' names (default: %(default)s)",
    )
    parser.add_argument(
        "--revision",
        help="revision of the data set on the hub, with Parquet files: a commit, branch, tag or pull request. It is "
        "resolved to a commit, which meta.json records and from which an interrupted preparation resumes (default: the "
        f"commit {REVISION})",
    )
    parser.add_argument(
        "--part", type=_part, metavar="I/K", help="write only the I-th of K parts, into its own folder in --out"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the finished parts in --out into one data folder; checks sizes (data_prep.verify: every byte)",
    )
    add_options(parser, tokenizer="gpt2", val_fraction=VAL_FRACTION, seed=SEED)
    add_text_options(parser)
    options = parser.parse_args(arguments)
    recipe = OpenWebText.of(options)
    if not options.merge:
        return prepare(options.out, recipe, workers=options.workers, part=options.part)
    for name, value in vars(options).items():
        if name not in ("out", "merge") and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with --merge: leave it out.")
    return merged(options.out, recipe)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/K with 1 <= I <= K, like 2/4, not {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(run(main, interrupted=INTERRUPTED))
