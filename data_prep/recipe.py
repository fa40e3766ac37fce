"""A recipe: the options of a preparation, the source of its documents, and their split."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from data_prep.encoding import Tally
from data_prep.parts import Record
from data_prep.splits import Split
from data_prep.state import Preparation
from data_prep.text_files import Fields, Section
from hgpt.data.shards import TOKENS_PER_SHARD
from hgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that hold the documents, in order.

    `revision` goes into meta.json. `asked` is the request to the Hugging Face hub; a run that resumes the preparation
    must make the same request.
    """

    files: Sequence[Path]
    revision: str | None = None
    asked: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The common options of all commands. Each command implements the methods in a subclass."""

    tokenizer: str
    val_fraction: float
    seed: int
    tokens_per_shard: int = TOKENS_PER_SHARD
    text_column: str = "text"
    separator: str | None = None
    skip_bad: bool = False

    keep_empty: ClassVar[bool]  # whether to keep empty or blank documents
    training_bytes: ClassVar[float]  # approximate bytes of text to train a bpe:N tokenizer on
    missing: ClassVar[str]  # the summary's name for documents without text
    packages: ClassVar[tuple[str, ...]]  # meta.json records their versions, and those of the tokenizer's packages

    def check(self) -> None:
        """Raise UserError for options that are always wrong."""
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"--val-fraction must lie between 0 and 1, not {self.val_fraction}: train and val both need documents. "
                "0.01 keeps one document in a hundred for validation."
            )
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed must be from 0 to 2^64 - 1, not {self.seed}.")
        if not 1 <= self.tokens_per_shard < 1 << 31:  # the header's int32
            raise UserError(f"--tokens-per-shard must be at least 1 and below 2^31, not {self.tokens_per_shard}.")

    @property
    def source_name(self) -> str:
        """`source` of meta.json; needs no request to the hub."""
        raise NotImplementedError

    def find_source(self, preparation: Preparation) -> Source:
        """Find the files, and download them if necessary. Raises UserError."""
        raise NotImplementedError

    def split(self, documents: int) -> Split:
        """The split of so many documents. Raises UserError if train or val would be empty."""
        raise NotImplementedError

    def check_sides(self, tally: Tally, sections: Sequence[Section]) -> None:
        """Raise UserError if train or val has no documents. `sections`: those of all documents."""

    def remarks(self, record: Record, tally: Tally) -> list[str]:
        """Lines to print after the summary."""
        return []

    def describe(self, record: Record, tally: Tally) -> dict[str, Any]:
        """`preparation` of meta.json."""
        raise NotImplementedError

    def notes(self, documents: int) -> list[str]:
        """Lines to print before the work begins."""
        return []

    @property
    def fields(self) -> Fields:
        return Fields(column=self.text_column, separator=self.separator)

    @classmethod
    def of(cls, options: argparse.Namespace, **others: Any) -> Self:
        """The recipe of a command line; `others`: fields that are not options."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(options).items() if name in names}, **others)


def add_options(parser: argparse.ArgumentParser, *, tokenizer: str, val_fraction: float, seed: int = 0) -> None:
    """The common options, with the command's defaults."""
    parser.add_argument(
        "--tokenizer",
        default=tokenizer,
        help="gpt2, bpe:N (byte-level BPE of N tokens, trained on this text), or the path of a Hugging Face "
        "tokenizer folder or tokenizer.json (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=val_fraction,
        help="share of the documents kept for validation (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=seed, help="seed of the split (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        help="processes that encode (default: the number of processors, here %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-shard", type=int, default=TOKENS_PER_SHARD, help="tokens per shard file (default: %(default)s)"
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of the commands that read files."""
    parser.add_argument(
        "--text-column",
        default="text",
        help="field or column that holds the text, text.body for a nested field (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out what cannot be read and name it, instead of stopping"
    )
