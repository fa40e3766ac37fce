"""Documents to tokens, in worker processes, in the order of the source.

A unit of work is a few megabytes of text: consecutive sections of files (data_prep/text_files.py). A worker encodes one
unit at a time and returns the tokens and counts of each split. Results come back in the order of the units, so they do
not depend on the number of workers.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from data_prep.splits import Split
from data_prep.text_files import SECTION_BYTES, Fields, Section, read_section
from data_prep.worker_pool import worker_pool
from hgpt.data.shards import SPLITS, token_dtype
from hgpt.data.tokenizer import Tokenizer
from hgpt.errors import UserError

UNITS_AHEAD = 3  # per worker: units submitted and not yet written; bounds the memory
FEW_BYTES = 32 << 20  # less text is encoded faster than worker processes import their modules
LENGTH_CLASSES = 40  # powers of two


@dataclass
class Counts:
    """The size of one split."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def add(self, other: "Counts") -> None:
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass
class Tally:
    """Statistics of a number of documents.

    `counts`: by split. `missing`: documents without text, which were left out. `replaced`: documents with invalid
    UTF-8. `bad`: messages about unreadable text. A document of n tokens, without its end-of-text, is in length class
    ⌊log2 n⌋ + 1 (0 for n = 0); it adds 1 to `length_documents` and n to `length_tokens` of its class.
    """

    counts: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})
    missing: int = 0
    replaced: int = 0
    bad: list[str] = field(default_factory=list)
    length_documents: list[int] = field(default_factory=lambda: [0] * LENGTH_CLASSES)
    length_tokens: list[int] = field(default_factory=lambda: [0] * LENGTH_CLASSES)
    longest: int = 0

    @property
    def rows(self) -> int:
        """Number of documents, including those without text."""
        return self.missing + self.both.documents

    @property
    def both(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            total.add(counts)
        return total

    def add_length(self, tokens: int) -> None:
        self.length_documents[tokens.bit_length()] += 1
        self.length_tokens[tokens.bit_length()] += tokens
        self.longest = max(self.longest, tokens)

    def add(self, other: "Tally") -> None:
        for split in SPLITS:
            self.counts[split].add(other.counts[split])
        self.missing += other.missing
        self.replaced += other.replaced
        self.bad += other.bad
        self.length_documents = [a + b for a, b in zip(self.length_documents, other.length_documents, strict=True)]
        self.length_tokens = [a + b for a, b in zip(self.length_tokens, other.length_tokens, strict=True)]
        self.longest = max(self.longest, other.longest)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Consecutive sections, encoded by one process. `first`: index of the first document in the source."""

    sections: tuple[Section, ...]
    first: int
    documents: int
    bytes: int


def plan_units(sections: Sequence[Section]) -> list[Unit]:
    """Group sections into units of at least SECTION_BYTES; the last unit may be smaller."""
    units: list[Unit] = []
    group: list[Section] = []
    first = documents = size = 0
    for index, section in enumerate(sections):
        group.append(section)
        documents += section.documents
        size += section.bytes
        if size >= SECTION_BYTES or index + 1 == len(sections):
            units.append(Unit(sections=tuple(group), first=first, documents=documents, bytes=size))
            first += documents
            group, documents, size = [], 0, 0
    return units


Encoded = tuple[dict[str, np.ndarray], Tally]  # the tokens of each split of a unit, and its statistics


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes the documents of a unit, with end-of-text after each.

    `keep_empty` keeps empty or blank documents. `skip_bad` leaves out unreadable ones, and names them.
    """

    tokenizer: Tokenizer
    split: Split
    fields: Fields
    keep_empty: bool
    skip_bad: bool

    def __call__(self, unit: Unit) -> Encoded:
        tally = Tally()
        dtype = token_dtype(self.tokenizer.vocab_size)
        end_of_text = np.array([self.tokenizer.end_of_text], dtype=dtype)
        pieces: dict[str, list[np.ndarray]] = {split: [np.empty(0, dtype=dtype)] for split in SPLITS}
        for number, document in enumerate(read_documents(unit.sections, self.fields, tally.bad, self.skip_bad)):
            text, valid = ("", True) if document is None else decode_utf8(document)
            if document is None or not (self.keep_empty or text.strip()):
                tally.missing += 1
                continue
            split = self.split.side(unit.first + number, text)
            (tokens,) = self.tokenizer.encode_batch([text])
            pieces[split] += [tokens.astype(dtype), end_of_text]
            size = len(document) if valid else len(text.encode())
            tally.counts[split].add(Counts(documents=1, tokens=tokens.size + 1, characters=len(text), bytes=size))
            tally.replaced += not valid
            tally.add_length(tokens.size)
        return {split: np.concatenate(parts) for split, parts in pieces.items()}, tally


def read_documents(
    sections: Iterable[Section], fields: Fields, bad: list[str], skip_bad: bool = True
) -> Iterator[bytes | None]:
    """Documents of the sections. Unreadable ones raise UserError; with `skip_bad` a message goes to `bad`."""
    for section in sections:
        yield from read_section(section, fields, bad.append if skip_bad else None)


def decode_utf8(document: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; invalid bytes become U+FFFD."""
    try:
        return document.decode(), True
    except UnicodeDecodeError:
        return document.decode(errors="replace"), False


def needs_workers(units: Sequence[Unit], workers: int) -> bool:
    """Whether there is enough work for worker processes."""
    return workers > 1 and len(units) > 1 and sum(unit.bytes for unit in units) >= FEW_BYTES


def encode_in_order(encoder: Encoder, units: Sequence[Unit], workers: int) -> Generator[Encoded, None, None]:
    """encoder(unit) of each unit, in order. Raises UserError if a worker dies."""
    if not needs_workers(units, workers):
        yield from map(encoder, units)
        return
    pending: deque[Future[Encoded]] = deque()
    try:
        with worker_pool(min(workers, len(units)), encoder) as encode:
            for unit in units:
                pending.append(encode(unit))
                if len(pending) >= UNITS_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, most likely because memory ran out. Run the same command with fewer --workers: it "
            "resumes, and finished work is kept."
        ) from error
