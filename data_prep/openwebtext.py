"""OpenWebText to token shards, with nanoGPT's validation split.

    python -m data_prep.openwebtext --out data/openwebtext

takes it from the Hugging Face hub, or with `--source` from a folder of Parquet, JSONL or text files, and uses all
processors. Killed at any moment, the same command goes on where it was and ends with the same bytes
(data_prep/sharding.py says how). Several machines share the work: `--part 1/4` ... `--part 4/4`, then `--merge`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from data_prep.documents import (
    ONE_DOCUMENT,
    Counts,
    add_options,
    counts_table,
    decode_utf8,
)
from data_prep.long_documents import LONG_DOCUMENT, LongDocument
from data_prep.sharding import (
    UNITS_AHEAD,
    Preparation,
    Tally,
    Unit,
    UnitEncoder,
    plan_units,
    write_shards,
)
from data_prep.text_files import Section, find_files, find_sections, is_compressed, read_section
from data_prep.worker_pool import start_imports
from hgpt.cli import Parser, run
from hgpt.data.shards import (
    HEADER_BYTES,
    PART_FILE,
    SPLITS,
    TOKEN,
    TOKENS_PER_SHARD,
    DataMeta,
    ShardRecord,
    SplitMeta,
    check_vocab_size,
    shard_name,
    write_meta,
)
from hgpt.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, package_versions
from hgpt.durable import sha256, whole_file
from hgpt.errors import UserError

REPOSITORY = "Skylion007/openwebtext"
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"  # 80 Parquet files, with the 8,013,769 documents
HUB_TIMEOUT = 10  # seconds until a hub that does not answer is given up
DOWNLOADS = 8  # files at once

# OpenWebText, and what nanoGPT's data/openwebtext/prepare.py makes of it (its readme.md).
DOCUMENTS = 8_013_769
VAL_FRACTION = 0.0005
SEED = 2357
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}
# What others report of the same script on the files of REVISION: as many in all, so that a few documents must come in
# another order than in 2022.
TOKENS_AT_REVISION = {"train": 9_035_582_489, "val": 4_434_606}

SAMPLE_UNITS = 8  # from which tokens per byte are estimated
SAMPLE_BYTES = 1 << 17  # of each of them
TRAINING_BYTES = 200_000_000  # of text, on which a tokenizer of one's own is trained
PARTS = re.compile(r"part_(\d+)_of_(\d+)")


# ------------------------------------------------------------------------------------------------------------
# nanoGPT's split


def val_documents(documents: int, val_fraction: float = VAL_FRACTION, seed: int = SEED) -> np.ndarray:
    """Which documents are for validation, of `documents` in the order of the source: their places, sorted.

    They are those that `train_test_split(test_size=val_fraction, seed=seed, shuffle=True)` of Hugging Face's datasets
    picks: the first ⌈val_fraction · documents⌉ of `numpy.random.default_rng(seed).permutation(documents)`. A test
    compares the two. Raises UserError if one of the sides would be empty.
    """
    val = ceil(val_fraction * documents)
    if not 0 < val_fraction < 1 or val == documents:
        raise UserError(
            f"--val-fraction {val_fraction} of {documents} documents leaves train or val without any: it must lie "
            f"between 0 and 1, and leave one of each. nanoGPT's is {VAL_FRACTION}."
        )
    return np.sort(np.random.default_rng(seed).permutation(documents)[:val])


# ------------------------------------------------------------------------------------------------------------
# The source


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that hold the documents, in order; `name` and `revision` go into meta.json."""

    files: list[Path]
    name: str
    revision: str | None


def find_source(source: str, revision: str | None, preparation: Preparation) -> tuple[Source, str | None]:
    """A folder or file on this machine, if there is one of that name; else a data set on the hub.

    Also what was asked of the hub, which a preparation that goes on must ask again: it goes on with the commit that was
    found then. None for a source on this machine. Raises UserError.
    """
    try:
        here = Path(source).exists()
    except OSError as error:
        raise UserError(
            f"--source {source} cannot be read: {error.strerror}. Change its permissions, or give another."
        ) from error
    if here:
        if revision is not None:
            raise UserError(
                f"--revision {revision} has no effect on --source {source}, which is a folder or file on this machine: "
                "leave it out."
            )
        files, ignored = find_files([source])
        if ignored:
            print(f"left out {len(ignored)} files of other kinds in {source}", file=sys.stderr)
        return Source(files=files, name=Path(source).resolve().name, revision=None), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"--source {source} is neither a folder or file on this machine, nor the id of a data set on the Hugging "
            f"Face hub, like {REPOSITORY}."
        )
    revision = revision or REVISION
    asked = f"{source} at {revision}"
    begun = preparation.begun({"data set on the hub": asked})
    found = None
    if begun or huggingface_hub.constants.HF_HUB_OFFLINE:
        found = cached(source, begun.get("revision", revision), begun.get("files"))
    return found or download(source, begun.get("revision", revision)), asked


def cached(repository: str, revision: str, files: int | None) -> Source | None:
    """The same as `download`, without the hub, if all of its files are in the Hugging Face cache.

    All are `files`, or when that is None as many as the names of the files say (train-00003-of-00080.parquet).
    """
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns="*.parquet"
            )
        )
    except (LocalEntryNotFoundError, ValueError):  # ValueError: an id that can be none, of which the hub says more
        return None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file())
    numbered = [re.fullmatch(r"(.+)-\d+-of-(\d+)\.parquet", name) for name in names]
    series = Counter(match and match.groups() for match in numbered)
    as_numbered = all(key is not None and number == int(key[1]) for key, number in series.items())
    if not names or not (as_numbered if files is None else len(names) == files):
        return None
    print(f"{repository} at {folder.name}: {len(names)} files, from the cache")
    return Source(files=[folder / name for name in names], name=repository, revision=folder.name)


def download(repository: str, revision: str) -> Source:
    """The Parquet files of a data set on the hub, sorted by path, downloaded into the Hugging Face cache.

    Files that are there already are not downloaded again. All come from the commit that `revision` was at the start.
    Raises UserError with the alternatives when the hub cannot be reached.
    """
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    alternatives = (
        f"Alternatives: on a machine that can reach it, run\n"
        f"  hf download {repository} --repo-type dataset --revision {revision} --local-dir openwebtext\n"
        "copy the folder here and give it with --source openwebtext; or set HF_ENDPOINT to a mirror; or give any "
        "folder of Parquet, JSONL or text files with --source."
    )
    api = huggingface_hub.HfApi()
    try:
        info = api.dataset_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError as error:
        raise UserError(
            f"--revision {revision} does not exist in {repository}. Leave it out for the one that is known to hold "
            f"Parquet files of {REPOSITORY} ({REVISION}), or look for others: "
            f"https://huggingface.co/datasets/{repository}/tree/main"
        ) from error
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"--source {repository} is no folder on this machine, and no data set on the hub that can be read without "
            f"more rights: {_first_line(error)}. Is the name right? For a private one, run: hf auth login"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"The Hugging Face hub answers with an error: {_first_line(error)}. {alternatives}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so nothing is downloaded, and {cache} does not hold all Parquet files of "
            f"{repository} at {revision}. Unset it. {alternatives}"
        ) from error
    except Exception as error:  # whatever the HTTP client of this version of huggingface_hub raises
        raise UserError(
            f"The Hugging Face hub cannot be reached ({type(error).__name__}: {_first_line(error)}). {alternatives}"
        ) from error
    wanted = sorted(
        ((file.rfilename, file.size or 0) for file in info.siblings or [] if file.rfilename.endswith(".parquet")),
    )
    if not wanted:
        raise UserError(
            f"{repository} holds no Parquet files at revision {revision}, and the scripts that older revisions hold "
            f"are run by no version of datasets from 4 on. The Parquet files of {REPOSITORY} are at --revision "
            f"{REVISION}."
        )
    total = sum(size for _, size in wanted)
    in_cache = huggingface_hub.try_to_load_from_cache
    missing = sum(
        size for name, size in wanted if in_cache(repository, name, repo_type="dataset", revision=info.sha) is None
    )
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if missing > free:
        raise UserError(
            f"{missing / 1e9:.1f} GB are to be downloaded to {cache}, and {free / 1e9:.1f} GB are free on that disk. "
            "Free some, or set HF_HOME to a folder on another disk."
        )
    print(f"{repository} at {info.sha}: {len(wanted)} files, {total / 1e9:.1f} GB, from the hub or its cache")

    def fetch(name: str, revision: str | None = info.sha) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))

    names = [name for name, _ in wanted]
    try:
        files = _all_at_once(fetch, names)
    except Exception as error:  # as above, and a full disk
        raise UserError(
            f"The download of {repository} was interrupted ({type(error).__name__}: {_first_line(error)}). The same "
            f"command goes on with it. {alternatives}"
        ) from error
    with suppress(Exception):
        fetch(names[0], revision)  # it is there; the cache notes which commit that is, for a run with HF_HUB_OFFLINE
    return Source(files=files, name=repository, revision=info.sha)


def _all_at_once(fetch: Callable[[str], Path], names: Sequence[str]) -> list[Path]:
    """`fetch` of each name, DOWNLOADS of them at a time.

    In daemon threads: those of a ThreadPoolExecutor would keep the process after Ctrl-C until all files that are under
    way have come.
    """
    todo = deque(names)
    done: SimpleQueue[tuple[str, Path | Exception]] = SimpleQueue()

    def work() -> None:
        with suppress(IndexError):  # nothing is left
            while True:
                name = todo.popleft()
                try:
                    done.put((name, fetch(name)))
                except Exception as error:
                    done.put((name, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(DOWNLOADS, len(names)))]
    paths = {}
    try:
        for thread in threads:
            thread.start()
        for _ in names:
            name, path = done.get()
            if isinstance(path, Exception):
                todo.clear()
                for thread in threads:  # what is under way may come, and stays
                    thread.join()
                raise path
            paths[name] = path
    finally:
        todo.clear()
    return [paths[name] for name in names]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_for(spec: str, sections: Sequence[Section], val: np.ndarray, text_column: str, folder: Path) -> Tokenizer:
    """The tokenizer that `spec` names; one that is trained sees train documents from all over the source."""

    def training_texts() -> Iterator[str]:
        step = max(1, sum(section.bytes for section in sections) // TRAINING_BYTES)
        held_out = set(val.tolist())
        place = 0
        for index, section in enumerate(sections):
            if index % step == 0:
                # What cannot be read is found, with all that belongs to it, where it is encoded.
                documents = read_section(section, text_column, lambda message: None, folder)
                for offset, document in enumerate(documents):
                    if document is None or place + offset in held_out:
                        continue
                    if isinstance(document, LongDocument):
                        yield from document.texts()
                    else:
                        yield decode_utf8(document)[0]
            place += section.documents

    tokenizer = load_tokenizer(spec, training_texts)
    check_vocab_size(tokenizer.vocab_size, f"tokenizer {spec}")
    return tokenizer


def tokens_per_byte(tokenizer: Tokenizer, units: Sequence[Unit], text_column: str, folder: Path) -> float:
    """How many tokens a byte of text becomes, estimated from documents all over the units."""
    # To enter a compressed file further on, all before it would be decompressed.
    units = [unit for unit in units if not (unit.sections[0].first and is_compressed(unit.sections[0].path))] or units
    size = tokens = 0
    for unit in units[:: max(1, len(units) // SAMPLE_UNITS)][:SAMPLE_UNITS]:
        sampled = 0
        for document in read_section(unit.sections[0], text_column, lambda message: None, folder):
            if isinstance(document, LongDocument):
                document = next(document.pieces())
            text, _ = decode_utf8((document or b"")[:SAMPLE_BYTES])
            sampled += len(text.encode())
            tokens += tokenizer.encode_batch([text])[0].size + 1
            if sampled >= SAMPLE_BYTES:
                break
        size += sampled
    return tokens / max(1, size)


def check_disk_space(out: Path, tokens: float, passing: float, copies: int) -> None:
    """Raise UserError unless shards of about `tokens` fit on the disk of `out`.

    Beside them there are for a while `passing` tokens in other files, and `copies` bytes of text.
    """
    needed = int((1.02 * tokens + passing) * TOKEN.itemsize) + copies
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out {out}: the shards will need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that "
            "disk. Free some (what is finished stays, and the same command goes on), or choose a folder on another "
            "disk."
        )


# ------------------------------------------------------------------------------------------------------------
# The run


class Progress:
    """The progress bar: documents, tokens, tokens/s, MB/s of text, time left."""

    def __init__(self, documents: int) -> None:
        self._documents = documents
        self._bar: tqdm | None = None
        self._new = Counts()
        self._tokens = 0

    def start(self, earlier: Tally) -> None:
        self._tokens = earlier.both.tokens
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=self._documents,
            initial=earlier.rows,
            unit_scale=True,
            dynamic_ncols=True,
            # In a file, a line every half a minute.
            mininterval=0.2 if sys.stderr.isatty() else 30,
            bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} documents{postfix}, {remaining} left",
        )

    def update(self, tally: Tally) -> None:
        assert self._bar is not None
        self._new.add(tally.both)
        self._tokens += tally.both.tokens
        seconds = time.perf_counter() - self._started
        self._bar.set_postfix_str(
            f"{self._tokens / 1e6:,.1f} M tokens, {self._new.tokens / seconds / 1e6:.2f} M tokens/s, "
            f"{self._new.bytes / seconds / 1e6:.1f} MB/s",
            refresh=False,
        )
        self._bar.update(tally.rows)

    def close(self) -> Counts:
        """What this run encoded."""
        if self._bar is not None:
            self._bar.close()
        return self._new


def prepare_openwebtext(
    out: Path,
    *,
    source: str = REPOSITORY,
    revision: str | None = None,
    part: tuple[int, int] | None = None,
    text_column: str = "text",
    tokenizer: str = "gpt2",
    val_fraction: float = VAL_FRACTION,
    seed: int = SEED,
    workers: int = 1,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    skip_bad: bool = False,
) -> str:
    """Write the data folder `out`, or with `part` = (i, k) the i-th of k parts of it; returns the summary to print.

    The shards hold each split's documents in the order of the source, each followed by one end-of-text. Empty documents
    are kept, as nanoGPT keeps them; a row without text (null) is left out, but keeps its place in the split. The other
    arguments are those of the command line. Raises UserError; what was finished then stays, to go on with.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}.")
    if tokens_per_shard < 1:
        raise UserError(f"--tokens-per-shard must be at least 1, not {tokens_per_shard}.")
    started = time.perf_counter()
    target = out if part is None else out / f"part_{part[0]}_of_{part[1]}"
    with Preparation(target) as preparation:
        if preparation.complete:
            preparation.finish()
            return f"{target} was complete."
        found, asked = find_source(source, revision, preparation)
        # A byte is one token at most, so that a unit is no more than a shard.
        sections, bad = find_sections(found.files, text_column, skip_bad=skip_bad, largest=tokens_per_shard)
        documents = sum(section.documents for section in sections)
        if documents < 2:
            raise UserError(ONE_DOCUMENT if documents else f"--source {source} holds no documents. Give another.")
        for line in document_count_report(documents, bad):
            print(line, file=sys.stderr)
        val = val_documents(documents, val_fraction, seed)
        units = plan_units(sections, val, largest=tokens_per_shard)
        if part is not None:
            units = units_of_part(units, part)
        if workers > 1 and len(units) > 1:
            start_imports()
        encoding = tokenizer_for(tokenizer, sections, val, text_column, preparation.folder)
        tokenizer_json = encoding.save(preparation.folder).read_bytes()
        decisive = {
            "revision": found.revision,
            "source": files_digest(sections, found.files),
            "documents": documents,
            "text_column": text_column,
            "tokenizer": tokenizer,
            "val_fraction": val_fraction,
            "seed": seed,
            "tokens_per_shard": tokens_per_shard,
            "packages": packages(),
            "tokenizer_json": hashlib.sha256(tokenizer_json).hexdigest(),  # last: it follows from the others
        }
        preparation.begin(
            {"data set on the hub": asked, **decisive, "part": part and list(part), "files": len(found.files)}
        )
        density = tokens_per_byte(encoding, units, text_column, preparation.folder)
        progress = Progress(sum(unit.documents for unit in units))

        def start(earlier: Tally, waiting: int, todo: Sequence[Unit]) -> None:
            if earlier.rows:
                print(f"going on: {earlier.rows:,} documents are encoded already", file=sys.stderr)
            left = density * sum(unit.bytes for unit in todo)
            ahead = density * UNITS_AHEAD * workers * max((unit.bytes for unit in todo), default=0)
            longest = max((section.longest for unit in todo for section in unit.sections), default=0)
            check_disk_space(
                target,
                waiting + left,
                # The files of units stay until the shard that holds them is whole, and some are ahead of it.
                passing=min(left, tokens_per_shard + ahead),
                copies=workers * longest if longest > LONG_DOCUMENT else 0,
            )
            progress.start(earlier)

        try:
            tally, shards = write_shards(
                preparation,
                units,
                UnitEncoder(tokenizer=encoding, text_column=text_column, skip_bad=skip_bad, folder=preparation.folder),
                workers=workers,
                tokens_per_shard=tokens_per_shard,
                on_start=start,
                on_unit=progress.update,
            )
        finally:
            new = progress.close()
        record = PartRecord(
            part=part or (1, 1),
            settings=decisive,
            tokenizer=encoding.name,
            vocab_size=encoding.vocab_size,
            end_of_text=encoding.end_of_text,
            source=found.name,
            left_out=bad,
            tally=tally,
            shards=shards,
        )
        os.replace(preparation.folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
        if part is None:
            write_meta(target, record.meta([record]))
        else:
            record.write(target)
        preparation.finish()
    seconds = time.perf_counter() - started
    rates = (
        f"time              {seconds:.1f} s on {workers} worker{'s' if workers > 1 else ''}: "
        f"{new.documents / seconds:,.0f} documents/s, {new.tokens / seconds:,.0f} tokens/s, "
        f"{new.bytes / seconds / 1e6:.1f} MB/s"
    )
    return "\n".join([*summary(record, tally), rates, f"written to        {target}"])


def document_count_report(documents: int, bad: Sequence[str]) -> list[str]:
    """Lines for the terminal: how the number of documents compares with OpenWebText's, and what was left out."""
    lines = [f"{message} Left out." for message in bad]
    if documents != DOCUMENTS:
        lines.append(
            f"note: {documents:,} documents, and OpenWebText has {DOCUMENTS:,}: this is not all of it or another "
            "text, the validation split is not nanoGPT's, and losses cannot be compared with those on OpenWebText."
        )
    return lines


def units_of_part(units: Sequence[Unit], part: tuple[int, int]) -> list[Unit]:
    """The i-th of k consecutive shares with about as much text in each."""
    index, parts = part
    total = max(1, sum(unit.bytes for unit in units))
    share = []
    before = 0
    for unit in units:
        if before * parts // total == index - 1:
            share.append(unit)
        before += unit.bytes
    if not share:
        raise UserError(
            f"--part {index}/{parts}: there is nothing left for this part; the {len(units)} units of work are divided "
            f"among {parts} parts. Use fewer parts."
        )
    return share


def files_digest(sections: Iterable[Section], files: Sequence[Path]) -> str:
    """SHA-256 of the names of the files and what their sections hold, wherever their folder lies."""
    root = os.path.commonpath([path.parent.absolute() for path in files])
    lines = [
        f"{os.path.relpath(section.path.absolute(), root)} {section.row_group} {section.first} {section.documents} "
        f"{section.bytes}\n"
        for section in sections
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def packages() -> dict[str, str]:
    """Versions of the packages that decide the bytes of the shards."""
    others = {name: importlib.metadata.version(name) for name in ("hgpt", "numpy", "pyarrow")}
    return {**others, "python": platform.python_version(), **package_versions()}


# ------------------------------------------------------------------------------------------------------------
# Parts, and the whole


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What part.json says about a finished part; a preparation on one machine is the only part, (1, 1)."""

    part: tuple[int, int]
    settings: dict[str, Any]
    tokenizer: str
    vocab_size: int
    end_of_text: int
    source: str
    left_out: list[str]
    tally: Tally
    shards: dict[str, tuple[ShardRecord, ...]]

    def write(self, folder: Path) -> None:
        with whole_file(folder / PART_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "PartRecord":
        try:
            content = json.loads((folder / PART_FILE).read_text())
            shards = {
                split: tuple(ShardRecord(**record) for record in records)
                for split, records in content["shards"].items()
            }
            return cls(
                **{**content, "part": tuple(content["part"])}
                | {"tally": Tally.from_json(content["tally"]), "shards": shards}
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / PART_FILE} is damaged ({type(error).__name__}: {error}). Copy the part again from where it "
                "was prepared."
            ) from error

    def meta(self, parts: Sequence["PartRecord"]) -> DataMeta:
        """meta.json of the folder that these parts, of which this is the first, are together."""
        tally = Tally()
        splits = {}
        for part in parts:
            tally.add(part.tally)
        for split in SPLITS:
            records = [record for part in parts for record in part.shards[split]]
            splits[split] = SplitMeta(
                tokens=tally.counts[split].tokens,
                documents=tally.counts[split].documents,
                bytes=tally.counts[split].bytes,
                shards=tuple(
                    ShardRecord(file=shard_name(split, number), tokens=record.tokens, sha256=record.sha256)
                    for number, record in enumerate(records)
                ),
            )
        return DataMeta(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
            splits=splits,
            source=self.source,
            source_revision=self.settings["revision"],
            preparation={
                "split": "train_test_split(test_size=val_fraction, seed=seed, shuffle=True) of datasets, each side in "
                "the order of the source",
                "seed": self.settings["seed"],
                "val_fraction": self.settings["val_fraction"],
                "documents": self.settings["documents"],
                "documents_of_openwebtext": DOCUMENTS,
                "text_column": self.settings["text_column"],
                "parts": self.part[1],
                "documents_without_text": tally.missing,
                "documents_with_replaced_utf8": tally.replaced,
                "left_out": [*self.left_out, *tally.bad],
            },
            packages=self.settings["packages"],
        )


def merge(out: Path) -> str:
    """Make one data folder of the finished parts in `out`; returns the summary. Raises UserError if one is missing.

    The shards keep their bytes and get consecutive numbers; their sizes are checked, and their checksums only by
    data_prep.verify, which reads them. May be killed and called again.
    """
    if not os.path.isdir(out):
        raise UserError(f"--out {out} is no folder that can be read. Give the one in which the parts were written.")
    with Preparation(out, may_hold=lambda name: PARTS.fullmatch(name) is not None) as preparation:
        if preparation.complete:
            for path in out.iterdir():
                if PARTS.fullmatch(path.name):
                    shutil.rmtree(path)
            preparation.finish()
            return f"{out} was complete."
        parts = _finished_parts(out)
        preparation.begin({"parts": parts[0].part[1], **parts[0].settings})
        for split in SPLITS:
            number = 0
            for part in parts:
                for record in part.shards[split]:
                    source = _part_folder(out, part.part) / record.file
                    target = out / shard_name(split, number)
                    number += 1
                    if source.exists():
                        expected = HEADER_BYTES + record.tokens * TOKEN.itemsize
                        if source.stat().st_size != expected:
                            raise UserError(
                                f"{source} has {source.stat().st_size:,} bytes and not {expected:,}. Copy the part "
                                "again from where it was prepared."
                            )
                        os.replace(source, target)
                    elif not target.exists():
                        raise UserError(f"{source} is missing. Copy the part again from where it was prepared.")
        shutil.copy(_part_folder(out, parts[0].part) / TOKENIZER_FILE, out)
        meta = parts[0].meta(parts)
        write_meta(out, meta)
        for part in parts:
            shutil.rmtree(_part_folder(out, part.part))
        preparation.finish()
    tally = Tally()
    for part in parts:
        tally.add(part.tally)
    lines = summary(parts[0], tally, {split: len(meta.splits[split].shards) for split in SPLITS})
    return "\n".join(
        [
            *lines,
            f"merged from       {len(parts)} parts, by the sizes of their shards; to check every byte: "
            f"python -m data_prep.verify {out}",
            f"written to        {out}",
        ]
    )


def _part_folder(out: Path, part: tuple[int, int]) -> Path:
    return out / f"part_{part[0]}_of_{part[1]}"


def _finished_parts(out: Path) -> list[PartRecord]:
    """The parts in order, checked to be all of them and of one preparation."""
    numbers = sorted((int(match[1]), int(match[2])) for path in out.iterdir() if (match := PARTS.fullmatch(path.name)))
    if not numbers:
        raise UserError(f"--out {out} holds no parts (part_1_of_4 and so on). Prepare them with --part 1/4 and so on.")
    counts = sorted({parts for _, parts in numbers})
    if len(counts) > 1:
        raise UserError(
            f"--out {out} holds parts of different divisions, of {' and of '.join(map(str, counts))} parts. Remove the "
            "ones that do not belong."
        )
    wanted = [(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [
        f"{number}/{parts}" for number, parts in wanted if not (_part_folder(out, (number, parts)) / PART_FILE).exists()
    ]
    if missing:
        raise UserError(
            f"--merge: of {counts[0]} parts in {out}, {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing or not finished. Prepare or copy "
            f"{'them' if len(missing) > 1 else 'it'}, then merge again."
        )
    parts = [PartRecord.read(_part_folder(out, part)) for part in wanted]
    for part in parts[1:]:
        for name, value in parts[0].settings.items():
            if part.settings[name] != value:
                raise UserError(
                    f"--merge: part {part.part[0]} was prepared with another {name} than part 1: "
                    f"{part.settings[name]!r}, not {value!r}. Prepare it again with the same."
                )
    tokenizer = _part_folder(out, wanted[0]) / TOKENIZER_FILE
    if not tokenizer.is_file() or sha256(tokenizer) != parts[0].settings["tokenizer_json"]:
        raise UserError(f"{tokenizer} is missing or damaged. Copy the part again from where it was prepared.")
    return parts


# ------------------------------------------------------------------------------------------------------------
# The summary


def summary(record: PartRecord, tally: Tally, shards: dict[str, int] | None = None) -> list[str]:
    """Lines for the terminal: what was written, and how long the documents are."""
    if shards is None:
        shards = {split: len(record.shards[split]) for split in SPLITS}
    lines = [
        *counts_table(tally.counts, shards),
        f"tokenizer         {record.tokenizer}, {record.vocab_size:,} tokens",
        f"source            {record.source}" + (f" at {revision}" if (revision := record.settings["revision"]) else ""),
        f"without text      {tally.missing:,} documents, left out",
        f"invalid UTF-8     {tally.replaced:,} documents, the invalid bytes replaced by U+FFFD",
    ]
    left_out = [*record.left_out, *tally.bad]
    if left_out:
        lines.append(f"could not be read {len(left_out):,}:")
        lines += [f"  {message}" for message in left_out[:10]] + (["  ..."] if len(left_out) > 10 else [])
    lines += length_table(tally)
    usual = (record.settings["val_fraction"], record.settings["seed"], record.tokenizer)
    if record.settings["documents"] == DOCUMENTS and tally.rows == DOCUMENTS and usual == (VAL_FRACTION, SEED, "gpt2"):
        lines.append(token_count_report({split: tally.counts[split].tokens for split in SPLITS}))
    return lines


def token_count_report(found: dict[str, int]) -> str:
    """A line for the terminal: how the tokens of all of OpenWebText, with nanoGPT's split, compare with nanoGPT's."""
    theirs = f"{TOKENS['train']:,} and {TOKENS['val']:,}, which nanoGPT reports"
    if found == TOKENS:
        return f"the tokens of train and val are as many as nanoGPT's: {theirs}"
    if sum(found.values()) == sum(TOKENS.values()):
        known = ", as others found at this revision" if found == TOKENS_AT_REVISION else ""
        return (
            f"note: in all as many tokens as nanoGPT's, but {abs(found['val'] - TOKENS['val']):,} "
            f"{'fewer' if found['val'] < TOKENS['val'] else 'more'} in val than the {theirs}: the same documents in "
            f"another order{known}"
        )
    return f"note: not the {theirs}: this is another text, and losses cannot quite be compared"


def length_table(tally: Tally) -> list[str]:
    """The distribution of document lengths: per power of two the documents, and their share of all tokens."""
    documents, tokens = sum(tally.length_documents), max(1, sum(tally.length_tokens))
    if not documents:
        return []
    shown = [length for length, number in enumerate(tally.length_documents) if number]
    widest = max(tally.length_documents)
    lines = ["", "length in tokens       documents    share   of all tokens"]
    for length in range(shown[0], shown[-1] + 1):
        low, high = (1 << length - 1, (1 << length) - 1) if length else (0, 0)
        number = tally.length_documents[length]
        lines.append(
            f"{f'{low:,} to {high:,}' if low < high else f'{low}':>20}{number:>12,}{number / documents:>9.1%}"
            f"{tally.length_tokens[length] / tokens:>10.1%}   {'#' * round(30 * number / widest)}".rstrip()
        )
    mean = sum(tally.length_tokens) / documents
    return [*lines, f"mean {mean:,.0f}, longest {tally.longest:,} tokens", ""]


# ------------------------------------------------------------------------------------------------------------
# Command line


def main(arguments: Sequence[str]) -> str:
    """Prepare or merge; returns the summary."""
    parser = Parser(
        prog="python -m data_prep.openwebtext",
        description="Turn OpenWebText, from the Hugging Face hub or from a folder, into token shards to train on, with "
        "nanoGPT's validation split. When it was stopped, the same command goes on.",
    )
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
        help="of a data set on the hub, one with Parquet files: a commit, or a branch, a tag or a pull request, which "
        "may move. The commit that it is when encoding begins is recorded in meta.json, and a preparation that was "
        f"stopped goes on with that one (default: the commit {REVISION})",
    )
    parser.add_argument(
        "--text-column", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out, count and name what cannot be read, instead of stopping"
    )
    parser.add_argument(
        "--part", type=_part, metavar="I/K", help="write only the I-th of K parts, into a folder of its own in --out"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="make one data folder of the finished parts in --out; sizes are checked, by data_prep.verify every byte",
    )
    add_options(parser, tokenizer="gpt2", val_fraction=VAL_FRACTION, seed=SEED)
    options = parser.parse_args(arguments)
    settings = vars(options)
    out, merging = settings.pop("out"), settings.pop("merge")
    if not merging:
        return prepare_openwebtext(out, **settings)
    given = [name for name, value in settings.items() if value != parser.get_default(name)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with --merge: leave it out.")
    return merge(out)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/K with 1 <= I <= K, like 2/4, not {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(run(main, interrupted="interrupted: what is finished stays, the same command goes on"))
