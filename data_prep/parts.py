"""Parts of a preparation shared by several machines, and their merge.

Each part is a folder `part_I_of_K` with shards, a tokenizer and part.json (`Record`). `merge` joins all parts into one
data folder.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.encoding import Tally, Unit
from data_prep.state import Preparation, Progress
from hgpt.data.shards import (
    META_FILE,
    PART_FILE,
    SPLITS,
    UNFINISHED_FOLDER,
    DataMeta,
    ShardRecord,
    SplitMeta,
    check_shard,
    from_json,
    shard_name,
    token_dtype,
    write_meta,
)
from hgpt.data.tokenizer import TOKENIZER_FILE
from hgpt.durable import read_json, sha256, whole_file
from hgpt.errors import UserError

PARTS = re.compile(r"part_(\d+)_of_(\d+)")
COPY_AGAIN = "Copy the part again from where it was prepared."


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of part.json for a finished part. A preparation on one machine is part (1, 1)."""

    part: tuple[int, int]
    settings: dict[str, Any]
    tokenizer: str
    vocab_size: int
    end_of_text: int
    source: str
    left_out: list[str]
    tally: Tally
    shards: dict[str, tuple[ShardRecord, ...]]
    end_of_text_token: str | None = None

    def write(self, folder: Path) -> None:
        with whole_file(folder / PART_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, folder: Path) -> "Record":
        path = folder / PART_FILE
        try:
            record: Record = from_json(cls, read_json(path, COPY_AGAIN), str(path), COPY_AGAIN)
        except FileNotFoundError:
            raise UserError(f"{path} is missing. {COPY_AGAIN}") from None
        tokens = {split: sum(shard.tokens for shard in shards) for split, shards in record.shards.items()}
        if tokens != {split: counts.tokens for split, counts in record.tally.counts.items()}:
            raise UserError(f"{path}: its shards have other tokens than its tally. {COPY_AGAIN}")
        return record

    def meta(self, parts: Sequence["Record"], preparation: dict[str, Any]) -> DataMeta:
        """The content of meta.json for the folder merged from `parts`; this is the first part."""
        counts = total(parts).counts
        splits = {}
        for split in SPLITS:
            records = [record for part in parts for record in part.shards[split]]
            splits[split] = SplitMeta(
                tokens=counts[split].tokens,
                documents=counts[split].documents,
                bytes=counts[split].bytes,
                shards=tuple(
                    ShardRecord(file=shard_name(split, number), tokens=record.tokens, sha256=record.sha256)
                    for number, record in enumerate(records)
                ),
            )
        return DataMeta(
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
            end_of_text_token=self.end_of_text_token,
            tokenizer_sha256=self.settings["tokenizer_json"],
            splits=splits,
            source=self.source,
            source_revision=self.settings["revision"],
            preparation=preparation,
            packages=self.settings["packages"],
        )


def total(parts: Sequence[Record]) -> Tally:
    tally = Tally()
    for part in parts:
        tally.add(part.tally)
    return tally


def part_folder(out: Path, part: tuple[int, int]) -> Path:
    return out / f"part_{part[0]}_of_{part[1]}"


def units_of_part(units: Sequence[Unit], part: tuple[int, int]) -> list[Unit]:
    """The i-th of k runs of consecutive units, each with about the same amount of text."""
    index, parts = part
    size = max(1, sum(unit.bytes for unit in units))
    share = []
    before = 0
    for unit in units:
        if before * parts // size == index - 1:
            share.append(unit)
        before += unit.bytes
    if not share:
        raise UserError(
            f"--part {index}/{parts}: there is nothing left for this part; the {len(units)} units of work are divided "
            f"among {parts} parts. Use fewer parts."
        )
    return share


def merge(out: Path, describe: Callable[[Record, Tally], dict[str, Any]]) -> list[Record]:
    """Join the finished parts in `out` into one data folder; returns the parts, none if the folder was complete.

    The shards are renamed, not copied. Their sizes are checked; data_prep.verify checks their checksums. `describe`
    returns `preparation` of meta.json. An interrupted merge resumes when it is called again. Raises UserError.
    """
    try:
        names = os.listdir(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out} is no readable folder. Give the one in which the parts were written.") from error
    if META_FILE in names and UNFINISHED_FOLDER not in names and not any(map(PARTS.fullmatch, names)):
        return []
    with Preparation(out, may_hold=lambda name: PARTS.fullmatch(name) is not None) as preparation:
        parts: list[Record] = []
        if not preparation.complete:
            parts = _finished_parts(out)
            preparation.begin({"parts": parts[0].part[1], **parts[0].settings})
            preparation.save(Progress())  # after the first save, an error removes nothing from `out`
            for split in SPLITS:
                _move_shards(out, split, parts)
            shutil.copy(part_folder(out, parts[0].part) / TOKENIZER_FILE, out)
            write_meta(out, parts[0].meta(parts, describe(parts[0], total(parts))))
        for path in out.iterdir():
            if PARTS.fullmatch(path.name):
                shutil.rmtree(path)
        preparation.finish()
    return parts


def _move_shards(out: Path, split: str, parts: Sequence[Record]) -> None:
    dtype = token_dtype(parts[0].vocab_size)
    shards = [(part_folder(out, part.part) / record.file, record) for part in parts for record in part.shards[split]]
    for number, (source, record) in enumerate(shards):
        target = out / shard_name(split, number)
        if source.exists():
            check_shard(source, record.tokens, dtype)
            os.replace(source, target)
        elif not target.exists():
            raise UserError(f"{source} is missing. {COPY_AGAIN}")


def _finished_parts(out: Path) -> list[Record]:
    """All parts in order. Raises UserError if one is missing or belongs to another preparation."""
    numbers = [(int(match[1]), int(match[2])) for path in out.iterdir() if (match := PARTS.fullmatch(path.name))]
    if not numbers:
        raise UserError(f"--out {out} holds no parts (part_1_of_4 and so on). Prepare them with --part 1/4 and so on.")
    counts = sorted({parts for _, parts in numbers})
    if len(counts) > 1:
        raise UserError(
            f"--out {out} holds parts of different preparations, of {' and of '.join(map(str, counts))} parts. Remove "
            "those that do not belong."
        )
    wanted = [(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [f"{part[0]}/{part[1]}" for part in wanted if not (part_folder(out, part) / PART_FILE).exists()]
    if missing:
        raise UserError(
            f"--merge: of {counts[0]} parts in {out}, {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing or not finished. Prepare or copy "
            f"{'them' if len(missing) > 1 else 'it'}, then merge again."
        )
    parts = [Record.read(part_folder(out, part)) for part in wanted]
    for part in parts[1:]:
        for name, value in parts[0].settings.items():
            if part.settings[name] != value:
                raise UserError(
                    f"--merge: part {part.part[0]} was prepared with another {name} than part 1: "
                    f"{part.settings[name]!r}, not {value!r}. Prepare it again with the value of part 1."
                )
    tokenizer = part_folder(out, wanted[0]) / TOKENIZER_FILE
    if not tokenizer.is_file() or sha256(tokenizer) != parts[0].settings["tokenizer_json"]:
        raise UserError(f"{tokenizer} is missing or damaged. {COPY_AGAIN}")
    return parts
