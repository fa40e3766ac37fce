"""Sections of files to shards: in parallel, in order, and able to go on after being killed.

The documents are cut into units of a few megabytes of text (`plan_units`; up to 100 where a file cannot be entered
anywhere, data_prep/text_files.py; never more than a shard of tokens, but for a longer document), which worker processes
encode in any order, each unit into a file of tokens for each split. While the workers start, which takes seconds, the
main process encodes units itself. It appends these files to the shards in the order of the documents, so that shards do
not depend on the number of workers. A worker holds a piece of a document, or a megabyte of short ones, and its tokens.

What a preparation needs to go on stands in the hidden folder `.preparation` of its data folder:

    lock            held while a process works on the folder
    settings.json   what decides the bytes of the shards; a run that goes on must have the same
    journal.jsonl   a line for each unit that was encoded (`EncodedUnit`) and for each shard that was finished
    unit_000012.train, unit_000012.val      tokens of an encoded unit, kept until the shards that hold them are whole

Every file appears by rename. A unit counts as encoded once the journal says so, a shard as finished once it has its
name. What is redone after a kill is the copying into the last shard, and what the workers were encoding or had encoded
while the main process did something else: a unit each, seldom more, and never more than UNITS_AHEAD.
"""

import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from data_prep.documents import Counts, decode_utf8
from data_prep.long_documents import LongDocument
from data_prep.text_files import LARGEST_SECTION, SECTION_BYTES, Section, read_section
from data_prep.worker_pool import finished_imports, worker_pool
from hgpt.data.shards import (
    HEADER_BYTES,
    META_FILE,
    PART_FILE,
    SPLITS,
    TOKEN,
    UNFINISHED_FOLDER,
    ShardRecord,
    ShardWriter,
    shard_name,
)
from hgpt.data.tokenizer import Tokenizer
from hgpt.durable import folder_lock, sha256, sync, whole_file
from hgpt.errors import UserError

UNITS_AHEAD = 3  # per worker, encoded or being encoded and not yet in a shard: bounds the disk space they take
LENGTH_CLASSES = 40  # powers of two
UNFINISHED = ".unfinished"


# ------------------------------------------------------------------------------------------------------------
# What was encoded


@dataclass
class Tally:
    """What some documents are, summed up.

    `missing` rows held no text (null), `replaced` documents invalid UTF-8, `bad` names what could not be read. A
    document of n tokens, its end-of-text not counted, is of length class ⌊log2 n⌋ + 1 (0 for n = 0), and adds 1 to
    `length_documents` and n to `length_tokens` of its class.
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
        """Documents, those without text among them."""
        return self.missing + sum(counts.documents for counts in self.counts.values())

    @property
    def both(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            total.add(counts)
        return total

    def add_length(self, tokens: int) -> None:
        """Count the length of a document, its end-of-text not included."""
        self.length_documents[tokens.bit_length()] += 1
        self.length_tokens[tokens.bit_length()] += tokens
        self.longest = max(self.longest, tokens)

    def add(self, other: "Tally") -> None:
        for split in SPLITS:
            self.counts[split].add(other.counts[split])
        self.missing += other.missing
        self.replaced += other.replaced
        self.bad += other.bad
        for length in range(LENGTH_CLASSES):
            self.length_documents[length] += other.length_documents[length]
            self.length_tokens[length] += other.length_tokens[length]
        self.longest = max(self.longest, other.longest)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tally":
        counts = {split: Counts(**values) for split, values in content["counts"].items()}
        return cls(**{**content, "counts": counts})


@dataclass(frozen=True, kw_only=True)
class EncodedUnit:
    """A line of the journal: what the unit holds, and the CRC-32 of its file of tokens of each split."""

    unit: int
    tally: Tally
    crc: dict[str, int]


# ------------------------------------------------------------------------------------------------------------
# Encoding, in a worker


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a worker encodes at a time: consecutive sections. `val` are the documents in it, counted from 0, of val."""

    number: int
    sections: tuple[Section, ...]
    documents: int
    bytes: int
    val: frozenset[int]


def plan_units(sections: Sequence[Section], val: np.ndarray, largest: int = LARGEST_SECTION) -> list[Unit]:
    """The sections in units of at least SECTION_BYTES each, but of no more than `largest`, if no section is.

    `val` holds the places of the val documents, sorted.
    """
    units: list[Unit] = []
    group: list[Section] = []
    first = documents = size = 0
    for index, section in enumerate(sections):
        group.append(section)
        documents += section.documents
        size += section.bytes
        following = sections[index + 1].bytes if index + 1 < len(sections) else largest
        if size < SECTION_BYTES and size + following <= largest:
            continue
        start, end = np.searchsorted(val, [first, first + documents])
        units.append(
            Unit(
                number=len(units),
                sections=tuple(group),
                documents=documents,
                bytes=size,
                val=frozenset((val[start:end] - first).tolist()),
            )
        )
        first += documents
        group, documents, size = [], 0, 0
    return units


@dataclass(frozen=True, kw_only=True)
class UnitEncoder:
    """Encodes units into files of tokens in `folder`. Pickled once into each worker."""

    tokenizer: Tokenizer
    text_column: str
    skip_bad: bool
    folder: Path

    def __call__(self, unit: Unit) -> EncodedUnit:
        tally = Tally()
        crc = dict.fromkeys(SPLITS, 0)
        files: dict[str, BinaryIO] = {}
        end_of_text = np.array([self.tokenizer.end_of_text], dtype=TOKEN)
        with ExitStack() as stack:
            for place, document in enumerate(self._documents(unit, tally)):
                if document is None:
                    tally.missing += 1
                    continue
                split = "val" if place in unit.val else "train"
                if split not in files:
                    # With the process in its name: the worker of a run that was just killed lives on for a moment.
                    path = unit_file(self.folder, unit.number, split, f".{os.getpid()}{UNFINISHED}")
                    files[split] = stack.enter_context(open(path, "wb", buffering=1 << 20))
                tokens = 0
                for part in self._encode(document, split, tally):
                    content = part.astype(TOKEN).data
                    files[split].write(content)
                    crc[split] = zlib.crc32(content, crc[split])
                    tokens += part.size
                files[split].write(end_of_text.data)
                crc[split] = zlib.crc32(end_of_text.data, crc[split])
                tally.add_length(tokens)
                tally.counts[split].tokens += tokens + 1
        for split, file in files.items():
            os.replace(file.name, unit_file(self.folder, unit.number, split))
        return EncodedUnit(unit=unit.number, tally=tally, crc=crc)

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[bytes | LongDocument | None]:
        on_bad = tally.bad.append if self.skip_bad else None
        for section in unit.sections:
            yield from read_section(section, self.text_column, on_bad, self.folder)

    def _encode(self, document: bytes | LongDocument, split: str, tally: Tally) -> Iterator[np.ndarray]:
        """The tokens of a document, in parts, while the text is counted."""
        counts = tally.counts[split]
        counts.documents += 1
        if isinstance(document, LongDocument):

            def texts() -> Iterator[str]:
                for text in document.texts():
                    counts.characters += len(text)
                    counts.bytes += len(text.encode())
                    yield text

            yield from self.tokenizer.encode_chunks(texts())
            tally.replaced += not document.valid
        else:
            text, valid = decode_utf8(document)
            counts.characters += len(text)
            counts.bytes += len(document) if valid else len(text.encode())
            tally.replaced += not valid
            yield from self.tokenizer.encode_batch([text])


_encoder: UnitEncoder | None = None  # of this worker process


def _start_worker(encoder: UnitEncoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_worker(unit: Unit) -> EncodedUnit:
    assert _encoder is not None
    return _encoder(unit)


class _ThisProcess(Executor):
    """The executor of a single worker: it does the work at once, here."""

    def __init__(self, encoder: UnitEncoder) -> None:
        self._encoder = encoder

    def submit(self, _: Any, unit: Unit) -> Future[EncodedUnit]:  # type: ignore[override]
        future: Future[EncodedUnit] = Future()
        future.set_result(self._encoder(unit))
        return future


# ------------------------------------------------------------------------------------------------------------
# The state of a preparation, on disk


def unit_file(folder: Path, unit: int, split: str, suffix: str = "") -> Path:
    return folder / f"unit_{unit:06d}.{split}{suffix}"


class Preparation(AbstractContextManager["Preparation"]):
    """A data folder while it is being prepared; as a context it holds the folder's lock.

    `out` is made if it does not exist; else it must be empty but for names that `may_hold` accepts, or hold a
    preparation to go on with. If `begin` is never reached, everything that was made is removed again. Raises UserError
    for any other folder, for one that another process is preparing, for one that is finished, and for an OSError that
    leaves the context. `complete` says that an earlier run was killed when all but `finish` was done.
    """

    def __init__(self, out: Path, may_hold: Callable[[str], bool] = lambda name: False) -> None:
        self.out = out
        self._may_hold = may_hold
        self.folder = out / UNFINISHED_FOLDER
        self._settings = self.folder / "settings.json"
        self._journal = self.folder / "journal.jsonl"

    def __enter__(self) -> "Preparation":
        self._made: list[Path] = []
        try:
            self._check_content()
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = ExitStack()
            self._lock.enter_context(
                folder_lock(
                    self.folder / "lock",
                    f"--out {self.out}: another process is preparing data in this folder. Wait for it, or end it; what "
                    "it has finished stays.",
                )
            )
            self.complete = any((self.out / name).exists() for name in (META_FILE, PART_FILE))
        except OSError as error:
            self._remove_made()
            raise UserError(
                f"--out {self.out} cannot be written: {error.strerror}. Choose another folder, or change "
                "its permissions."
            ) from error
        return self

    def _check_content(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; it must be a folder, new or empty.")
        if not self.out.is_dir() or self.folder.is_dir():
            return
        names = sorted(path.name for path in self.out.iterdir() if not self._may_hold(path.name))
        if META_FILE in names or PART_FILE in names:
            raise UserError(
                f"--out {self.out} holds prepared data already. Nothing is overwritten: choose another "
                "folder or delete it."
            )
        if names:
            raise UserError(
                f"--out {self.out} is not empty (it holds {names[0]}{', ...' if len(names) > 1 else ''}), and "
                "there is no preparation in it to go on with. Choose another folder or delete it."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._settings.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._remove_made()
        self._lock.close()
        if isinstance(error, OSError):  # those of reading the source are UserErrors by now
            raise UserError(
                f"Writing to {self.out} failed: {error.strerror or error}. Mend that (a full disk: free space), and go "
                "on with the same command; what is finished stays."
            ) from error

    def _remove_made(self) -> None:
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def begun(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All settings of the earlier run, {} if there is none; raises UserError if one of `settings` was another."""
        if not self._settings.exists():
            return {}
        begun = json.loads(self._settings.read_text())
        for name, value in settings.items():
            if begun.get(name) != value:
                raise UserError(
                    f"--out {self.out} holds a preparation that was begun with another {name}: "
                    f"{begun.get(name)!r}, now {value!r}. Go on with the same, or delete the folder."
                )
        return begun

    def begin(self, settings: dict[str, Any]) -> None:
        """Record the settings that decide the bytes, or raise UserError if those of an earlier run are others."""
        begun = self.begun({})
        self.begun({**dict.fromkeys(begun), **settings})
        if not begun:
            with whole_file(self._settings) as path:
                path.write_text(json.dumps(settings, indent=2), encoding="utf-8")

    def read_journal(self) -> tuple[dict[int, EncodedUnit], dict[str, ShardRecord]]:
        """The encoded units by number, and the finished shards by file name."""
        units: dict[int, EncodedUnit] = {}
        shards: dict[str, ShardRecord] = {}
        whole = 0
        if self._journal.exists():
            for line in self._journal.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line if line.endswith(b"\n") else b"")
                except ValueError:
                    break  # the process was killed while it wrote this line, or a power cut took it
                whole += len(line)
                if "unit" in entry:
                    units[entry["unit"]] = EncodedUnit(**entry | {"tally": Tally.from_json(entry["tally"])})
                else:
                    shards[entry["file"]] = ShardRecord(**entry)
            os.truncate(self._journal, whole)
        return units, shards

    def record(self, entry: EncodedUnit | ShardRecord) -> None:
        with open(self._journal, "ab") as journal:
            journal.write(json.dumps(asdict(entry)).encode() + b"\n")
        if isinstance(entry, ShardRecord):
            sync(self._journal)  # the tokens of the units in the shard are deleted next

    def sweep(self) -> None:
        """Remove what a run that was killed had not finished."""
        for path in [*self.folder.glob(f"*{UNFINISHED}"), *self.out.glob(f".*{UNFINISHED}")]:
            path.unlink()

    def finish(self) -> None:
        """Remove the state, when meta.json (or the record of a part) has made the folder complete."""
        shutil.rmtree(self.folder)


# ------------------------------------------------------------------------------------------------------------
# Units to shards


def write_shards(
    preparation: Preparation,
    units: Sequence[Unit],
    encoder: UnitEncoder,
    *,
    workers: int,
    tokens_per_shard: int,
    on_start: Callable[[Tally, int, Sequence[Unit]], None],
    on_unit: Callable[[Tally], None],
) -> tuple[Tally, dict[str, tuple[ShardRecord, ...]]]:
    """Encode the units and write the shards of both splits, going on where an earlier run was stopped.

    `on_start` is told what is encoded already, how many tokens of it are in no finished shard, and the units that are
    not encoded; `on_unit` each unit as it is done. Returns the sum of all units and the records of the shards. Raises
    UserError, and OSError for a full disk; what was finished then stays.
    """
    preparation.sweep()
    done, recorded = preparation.read_journal()
    finished = {split: _finished_shards(preparation, units, done, recorded, split) for split in SPLITS}
    _forget_lost_units(preparation, units, done, finished)
    earlier = Tally()
    for encoded in done.values():
        earlier.add(encoded.tally)
    todo = deque(unit for unit in units if unit.number not in done)
    in_shards = sum(record.tokens for records in finished.values() for record in records)
    on_start(earlier, earlier.both.tokens - in_shards, todo)
    try:
        with ExitStack() as stack:
            appenders = [
                stack.enter_context(_Appender(preparation, split, tokens_per_shard, finished[split]))
                for split in SPLITS
            ]
            pool: AbstractContextManager[Executor] = nullcontext(_ThisProcess(encoder))
            importing: Future[None] | None = None
            if workers > 1 and len(todo) > 1:
                pool = worker_pool(min(workers, len(todo)), _start_worker, encoder)
                importing = finished_imports()
            executor = stack.enter_context(pool)
            running: set[Future[EncodedUnit]] = set()
            ahead = 1 if workers == 1 else UNITS_AHEAD * workers
            total = Tally()

            def keep(encoded: EncodedUnit) -> None:
                preparation.record(encoded)
                done[encoded.unit] = encoded
                on_unit(encoded.tally)

            for unit in units:
                while unit.number not in done:
                    if importing is not None:
                        if not importing.done():
                            keep(encoder(todo.popleft()))  # it is `unit`, for nothing is given to workers yet
                            continue
                        importing.result()
                        importing = None
                    while todo and todo[0].number < unit.number + ahead:
                        running.add(executor.submit(_encode_in_worker, todo.popleft()))
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        keep(future.result())
                for appender in appenders:
                    appender.append(done[unit.number])
                total.add(done[unit.number].tally)
            records = {appender.split: appender.close() for appender in appenders}
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, most likely killed because memory ran out. Go on with the same command and fewer "
            "--workers; what is finished stays."
        ) from error
    return total, records


def _finished_shards(
    preparation: Preparation,
    units: Sequence[Unit],
    done: dict[int, EncodedUnit],
    recorded: dict[str, ShardRecord],
    split: str,
) -> list[ShardRecord]:
    """The whole shards of a split that stand in the folder, as far as the journal says what is in them."""
    known = 0
    for unit in units:
        if unit.number not in done:
            break
        known += done[unit.number].tally.counts[split].tokens
    finished: list[ShardRecord] = []
    for path in sorted(preparation.out.glob(f"{split}_*.bin")):
        record = recorded.get(path.name)
        if record is None:  # killed between its renaming and its line in the journal
            tokens = (path.stat().st_size - HEADER_BYTES) // TOKEN.itemsize
            record = ShardRecord(file=path.name, tokens=tokens, sha256=sha256(path))
        if path.name == shard_name(split, len(finished)) and record.tokens <= known:
            finished.append(record)
            known -= record.tokens
        else:  # one before it is missing, or a power cut took lines of the journal
            known = 0
            path.unlink()
    return finished


def _forget_lost_units(
    preparation: Preparation,
    units: Sequence[Unit],
    done: dict[int, EncodedUnit],
    finished: dict[str, list[ShardRecord]],
) -> None:
    """Take out of `done` the units whose tokens are still needed and not there; remove files that are not needed."""
    lost = set()
    for split in SPLITS:
        in_shards = sum(record.tokens for record in finished[split])
        position: int | None = 0  # of the unit in the stream; None behind one that is not encoded
        for unit in units:
            encoded = done.get(unit.number)
            if encoded is None:
                position = None
                continue
            path = unit_file(preparation.folder, unit.number, split)
            if position is not None:
                position += encoded.tally.counts[split].tokens
                if position <= in_shards:
                    path.unlink(missing_ok=True)
                    continue
            if not _is_intact(path, encoded, split):
                lost.add(unit.number)
    for number in lost:
        del done[number]


def _is_intact(path: Path, encoded: EncodedUnit, split: str) -> bool:
    if not encoded.tally.counts[split].tokens:
        return True
    crc = 0
    try:
        with open(path, "rb") as file:
            while content := file.read(1 << 22):
                crc = zlib.crc32(content, crc)
    except FileNotFoundError:
        return False
    return crc == encoded.crc[split]


class _Appender(AbstractContextManager["_Appender"]):
    """Appends the tokens of units, in order, to the shards of one split; removes their files as shards are finished."""

    def __init__(
        self, preparation: Preparation, split: str, tokens_per_shard: int, finished: Sequence[ShardRecord]
    ) -> None:
        self.split = split
        self._preparation = preparation
        self._in_shards = sum(record.tokens for record in finished)
        self._writer = ShardWriter(preparation.out, split, tokens_per_shard, finished, self._shard_finished)
        self._position = 0  # of the next unit in the stream
        self._kept: deque[tuple[int, Path]] = deque()  # (position behind the unit, its file)

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def append(self, encoded: EncodedUnit) -> None:
        start = self._position
        tokens = encoded.tally.counts[self.split].tokens
        self._position += tokens
        if self._position <= self._writer.tokens:  # in the shards of an earlier run, or nothing of this split
            return
        path = unit_file(self._preparation.folder, encoded.unit, self.split)
        self._kept.append((self._position, path))
        with open(path, "rb") as file:
            file.seek((self._writer.tokens - start) * TOKEN.itemsize)
            while content := file.read(1 << 22):
                self._writer.write(np.frombuffer(content, dtype=TOKEN))

    def close(self) -> tuple[ShardRecord, ...]:
        return self._writer.close()

    def _shard_finished(self, record: ShardRecord) -> None:
        self._preparation.record(record)
        self._in_shards += record.tokens
        while self._kept and self._kept[0][0] <= self._in_shards:
            self._kept.popleft()[1].unlink()
