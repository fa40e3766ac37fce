"""Text files to a data folder: the common steps of all data_prep commands.

`prepare` finds the documents, loads or trains the tokenizer, encodes the documents in worker processes, and writes the
shards, the tokenizer and meta.json (hgpt/data/shards.py says what is in a data folder). After an interruption it
resumes (data_prep/state.py). The bytes of the folder depend neither on interruptions nor on the number of workers.
"""

import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.encoding import (
    Counts,
    Encoder,
    Tally,
    Unit,
    decode_utf8,
    encode_in_order,
    needs_workers,
    plan_units,
    read_documents,
)
from data_prep.parts import Record, part_folder, units_of_part
from data_prep.recipe import Recipe, Source
from data_prep.splits import Split
from data_prep.state import Preparation, Progress
from data_prep.summary import ProgressBar, summary
from data_prep.text_files import Section, find_sections
from data_prep.worker_pool import start_imports
from hgpt.data.shards import (
    META_FILE,
    PART_FILE,
    SPLITS,
    UNFINISHED_FOLDER,
    ShardRecord,
    ShardWriter,
    read_meta,
    token_dtype,
    write_meta,
)
from hgpt.data.tokenizer import TOKENIZER_FILE, TOKENIZER_PACKAGES, Tokenizer, load_tokenizer
from hgpt.durable import publish
from hgpt.errors import UserError
from hgpt.hardware import installed_versions

SAVE_SECONDS = 5.0  # between saves of the progress: a kill loses this much work, and the workers' units
TOKENS_PER_BYTE = 0.225  # of text: a token of GPT-2 is 4.4 bytes of English
ONE_DOCUMENT = (
    "All the text is one document, and the split into train and val is by document. Give several files, a .jsonl file "
    "with one document per line, or name the text between the documents of a .txt file with --separator (a blank "
    r"line: --separator '\n\n')."
)
INTERRUPTED = "interrupted: finished work is kept, and the same command resumes"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of a preparation: the documents in sections, their split, and the units of this part."""

    source: Source
    sections: list[Section]
    left_out: list[str]  # messages about files that cannot be read
    documents: int
    split: Split
    units: list[Unit]


def prepare(out: Path, recipe: Recipe, *, workers: int = 1, part: tuple[int, int] | None = None) -> str:
    """Write the data folder `out`, or with `part` = (i, k) the i-th of k parts of it; returns the summary to print.

    The shards hold the documents of each split in the order of the source, each followed by one end-of-text. Raises
    UserError; saved progress (every SAVE_SECONDS) is kept, and the next call resumes.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}.")
    recipe.check()
    started = time.perf_counter()
    target = out if part is None else part_folder(out, part)
    if _is_done(target, recipe):
        return f"{target} was already prepared with the same settings. Its texts were not compared."
    with Preparation(target) as preparation:
        if preparation.complete:
            preparation.finish()
            return f"{target} was complete."
        plan = _plan(recipe, preparation, part)
        if needs_workers(plan.units, workers):
            start_imports()
        tokenizer = _tokenizer(recipe, plan)
        settings = _settings(recipe, plan, tokenizer.save(preparation.folder))
        preparation.begin(
            {
                "data set on the hub": plan.source.asked,
                "separator": recipe.separator,
                **settings,
                "part": part and list(part),
                "files": len(plan.source.files),
            }
        )
        new, tally, shards = _encode(preparation, recipe, plan, tokenizer, workers)
        record = Record(
            part=part or (1, 1),
            settings=settings,
            tokenizer=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            end_of_text_token=tokenizer.end_of_text_token,
            source=recipe.source_name,
            left_out=plan.left_out,
            tally=tally,
            shards=shards,
        )
        publish(preparation.folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
        if part is None:
            write_meta(target, record.meta([record], recipe.describe(record, tally)))
        else:
            record.write(target)
        preparation.finish()
    seconds = time.perf_counter() - started
    rates = (
        f"time              {seconds:.1f} s on {workers} worker{'s' if workers > 1 else ''}: "
        f"{new.documents / seconds:,.0f} documents/s, {new.tokens / seconds:,.0f} tokens/s, "
        f"{new.bytes / seconds / 1e6:.1f} MB/s"
    )
    lines = [*summary([record], tally, recipe.missing), *recipe.remarks(record, tally)]
    return "\n".join([*lines, rates, f"written to        {target}"])


def _is_done(target: Path, recipe: Recipe) -> bool:
    """Whether meta.json or part.json records a finished preparation with the same source and settings."""
    if os.path.exists(target / UNFINISHED_FOLDER):
        return False
    if os.path.isfile(target / META_FILE):
        meta = read_meta(target)
        made = {"source": meta.source, "tokenizer": meta.tokenizer, **meta.preparation}
    elif os.path.isfile(target / PART_FILE):
        record = Record.read(target)
        made = {**record.settings, "source": record.source}
    else:
        return False
    names = ("tokenizer", "val_fraction", "seed", "text_column", "separator", "tokens_per_shard")
    wanted = {name: getattr(recipe, name) for name in names}
    return all(made.get(name, value) == value for name, value in (wanted | {"source": recipe.source_name}).items())


def _plan(recipe: Recipe, preparation: Preparation, part: tuple[int, int] | None) -> Plan:
    source = recipe.find_source(preparation)
    sections, left_out = find_sections(
        source.files, recipe.fields, skip_bad=recipe.skip_bad, refuse_empty=recipe.keep_empty
    )
    documents = sum(section.documents for section in sections)
    if not any(section.bytes for section in sections):
        raise UserError(f"{recipe.source_name} holds no documents. Give another source.")
    if documents < 2:
        unknown = "" if recipe.separator is None else f"--separator {recipe.separator!r} does not occur. "
        raise UserError(unknown + ONE_DOCUMENT)
    for line in [*(f"{message} Left out." for message in left_out), *recipe.notes(documents)]:
        print(line, file=sys.stderr)
    units = plan_units(sections)
    return Plan(
        source=source,
        sections=sections,
        left_out=left_out,
        documents=documents,
        split=recipe.split(documents),
        units=units if part is None else units_of_part(units, part),
    )


def _tokenizer(recipe: Recipe, plan: Plan) -> Tokenizer:
    """The tokenizer of the recipe. A bpe:N tokenizer is trained on train documents spread over the source."""

    def training_texts() -> Iterator[str]:
        step = max(1, int(sum(section.bytes for section in plan.sections) / recipe.training_bytes))
        first = 0  # index of the section's first document
        with tqdm(desc="training the tokenizer", unit=" documents", unit_scale=True, dynamic_ncols=True) as bar:
            for index, section in enumerate(plan.sections):
                if index % step == 0:
                    documents = read_documents([section], recipe.fields, [], recipe.skip_bad)
                    for offset, document in enumerate(documents):
                        text, _ = decode_utf8(document or b"")
                        if document is not None and plan.split.side(first + offset, text) == "train":
                            yield text
                    bar.update(section.documents)
                first += section.documents

    tokenizer = load_tokenizer(recipe.tokenizer, training_texts)
    if tokenizer.end_of_text < 0:
        raise UserError(
            f"--tokenizer {recipe.tokenizer}: nanoGPT's characters have no end-of-text, which must end documents here. "
            "Use gpt2, bpe:N or a tokenizer.json; nanoGPT's prepare.py writes data of characters, which train.py reads."
        )
    return tokenizer


def _settings(recipe: Recipe, plan: Plan, tokenizer_json: Path) -> dict[str, Any]:
    """The settings that determine the bytes of the shards."""
    return {
        "revision": plan.source.revision,
        "source": files_digest(plan.sections, plan.source.files),
        "documents": plan.documents,
        "text_column": recipe.text_column,
        "tokenizer": recipe.tokenizer,
        "val_fraction": recipe.val_fraction,
        "seed": recipe.seed,
        "tokens_per_shard": recipe.tokens_per_shard,
        "packages": {
            **installed_versions(*recipe.packages),
            "python": platform.python_version(),
            **installed_versions(*TOKENIZER_PACKAGES),
        },
        # Last, because an error names the first differing setting, and this one follows from the others.
        "tokenizer_json": hashlib.sha256(tokenizer_json.read_bytes()).hexdigest(),
    }


def files_digest(sections: Iterable[Section], files: Sequence[Path]) -> str:
    """SHA-256 of the files' names, relative to their common folder, and of the sizes of their sections."""
    root = os.path.commonpath([path.parent.absolute() for path in files])
    lines = [
        f"{os.path.relpath(section.path.absolute(), root)} {section.row_group} {section.first} {section.documents} "
        f"{section.bytes}\n"
        for section in sections
    ]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _encode(
    preparation: Preparation, recipe: Recipe, plan: Plan, tokenizer: Tokenizer, workers: int
) -> tuple[Counts, Tally, dict[str, tuple[ShardRecord, ...]]]:
    """Write the shards, resuming from the saved progress.

    Returns the counts of this run, the tally of all runs, and the records of the shards. Raises UserError, and OSError
    for a full disk.
    """
    progress = preparation.progress()
    todo = plan.units[progress.units :]
    tally = progress.tally
    if progress.units:
        print(f"resuming: {tally.rows:,} documents are already encoded", file=sys.stderr)
    dtype = token_dtype(tokenizer.vocab_size)
    check_disk_space(preparation.out, sum(unit.bytes for unit in todo), dtype.itemsize)
    encoder = Encoder(
        tokenizer=tokenizer,
        split=plan.split,
        fields=recipe.fields,
        keep_empty=recipe.keep_empty,
        skip_bad=recipe.skip_bad,
    )
    bar = ProgressBar(sum(unit.documents for unit in plan.units), tally)
    with ExitStack() as stack:
        stack.callback(bar.close)
        writers = {}
        for split in SPLITS:
            written = recipe.tokens_per_shard, progress.shards[split], progress.unfinished[split]
            writers[split] = stack.enter_context(ShardWriter(preparation.out, split, *written, dtype))
        results = stack.enter_context(closing(encode_in_order(encoder, todo, workers)))
        saved = time.perf_counter()
        for units, (tokens, new) in enumerate(results, start=progress.units + 1):
            for split, writer in writers.items():
                writer.write(tokens[split])
            tally.add(new)
            bar.update(new)
            if time.perf_counter() - saved >= SAVE_SECONDS:
                _save(preparation, units, tally, writers)
                saved = time.perf_counter()
        recipe.check_sides(tally, plan.sections)
        shards = {split: writer.close() for split, writer in writers.items()}
    return bar.new, tally, shards


def _save(preparation: Preparation, units: int, tally: Tally, writers: dict[str, ShardWriter]) -> None:
    for writer in writers.values():
        writer.flush()
    preparation.save(
        Progress(
            units=units,
            tally=tally,
            shards={split: writer.records for split, writer in writers.items()},
            unfinished={split: writer.unfinished for split, writer in writers.items()},
        )
    )


def check_disk_space(out: Path, text: int, token_bytes: int = 2) -> None:
    """Raise UserError unless the shards of `text` bytes of text are likely to fit on the disk of `out`."""
    needed = TOKENS_PER_BYTE * token_bytes * text
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out {out}: the shards will need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on that "
            "disk. Free some and run the same command, which resumes, or choose a folder on another disk."
        )
