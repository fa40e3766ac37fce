"""data_prep/openwebtext.py: nanoGPT's split, shards in parallel, killed and resumed runs, parts, the hub, bad input."""

import contextlib
import gzip
import http.server
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import zstandard
from full_disk import file_size_limit
from tiktoken_ext.openai_public import r50k_pat_str

from data_prep import long_documents, openwebtext, sharding, text_files, verify, worker_pool
from data_prep.openwebtext import val_documents
from data_prep.sharding import Preparation, Tally
from data_prep.worker_pool import start_imports
from hgpt.cli import run
from hgpt.data.shards import SPLITS, TokenShards, read_meta
from hgpt.data.shards import verify as verify_shards
from hgpt.data.tokenizer import load_tokenizer
from hgpt.errors import UserError

main = partial(run, openwebtext.main)

ROOT = Path(__file__).parent.parent
PINNED = openwebtext.REVISION
WORDS = ["distance", "centre", "token", "model", "exponent", "<|endoftext|>", "naïve", "日本", "loss", "norm"]
SMALL = ["--tokenizer", "bpe:300", "--val-fraction", "0.1", "--tokens-per-shard", "3000", "--workers", "1"]


def texts(number, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(number)]


def write_parquet(path, documents, row_group_size=7):
    pq.write_table(pa.table({"text": documents}), path, row_group_size=row_group_size)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units of a few documents, so that a small source has many of them."""
    for module in (text_files, sharding):
        monkeypatch.setattr(module, "SECTION_BYTES", 3000)


@pytest.fixture
def source(tmp_path):
    """Three Parquet files of 300 documents together; `documents` of the folder are `texts(300)`."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        write_parquet(folder / f"train-{number:05}-of-00003.parquet", texts(300)[100 * number : 100 * (number + 1)])
    return folder


def run(source, out, *options):
    assert main(["--source", str(source), "--out", str(out), *SMALL, *map(str, options)]) == 0
    return out


def fails(capsys, *arguments):
    """The message of a run that must fail with exit status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message[message.index("error: ") :]


def ready_workers():
    """In place of `finished_imports`: the main process waits for the workers, and encodes nothing itself."""
    finished = Future()
    finished.set_result(None)
    return finished


def contents(folder):
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def streams(folder):
    found = {}
    for split in SPLITS:
        shards = TokenShards.open(folder, split)
        found[split] = shards.read(0, len(shards))
    return found


def read_back(folder):
    """{split: documents} of a data folder, decoded from its shards with its own tokenizer.json."""
    tokenizer = load_tokenizer(str(folder))
    end_of_text = read_meta(folder).end_of_text
    found = {}
    for split, stream in streams(folder).items():
        ends = np.flatnonzero(stream == end_of_text)
        found[split] = [tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise([-1, *ends])]
    return found


# ------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(
    ("documents", "fraction"), [(2, 0.0005), (1999, 0.0005), (2001, 0.0005), (13_702, 0.0005), (300, 0.1)]
)
def test_split_is_that_of_datasets(documents, fraction):
    import datasets  # here, and not in each process that runs something of this file

    table = datasets.Dataset.from_dict({"place": range(documents)})
    expected = table.train_test_split(test_size=fraction, seed=2357, shuffle=True)
    found = val_documents(documents, fraction)
    assert found.tolist() == sorted(expected["test"]["place"])
    train = np.setdiff1d(np.arange(documents), found)
    assert train.tolist() == sorted(expected["train"]["place"])


def test_split_of_openwebtext_is_pinned():
    # The order of numpy.random.default_rng(2357), which NumPy does not promise to keep: were it to change, validation
    # losses could no longer be compared with those of others.
    val = val_documents(openwebtext.DOCUMENTS)
    assert len(val) == 4007 and val[:4].tolist() == [1997, 3930, 5738, 8090]
    assert int(val.sum()) == 15_941_513_342


def test_shards_hold_the_split_in_the_order_of_the_source(tmp_path, source):
    folder = run(source, tmp_path / "out")
    verify_shards(folder)
    import datasets

    documents = texts(300)
    table = datasets.Dataset.from_dict({"text": documents, "place": range(300)})
    split = table.train_test_split(test_size=0.1, seed=2357, shuffle=True)
    found = read_back(folder)
    for ours, theirs in (("train", "train"), ("val", "test")):
        assert found[ours] == [documents[place] for place in sorted(split[theirs]["place"])]
    meta = read_meta(folder)
    assert len(meta.splits["train"].shards) > 3
    assert meta.splits["train"].bytes == sum(len(text.encode()) for text in found["train"])
    assert meta.source == "source" and meta.preparation["documents"] == 300
    assert (meta.preparation["seed"], meta.preparation["val_fraction"]) == (2357, 0.1)
    assert {"numpy", "pyarrow", "tiktoken", "hgpt"} <= meta.packages.keys()


def test_tokens_are_those_of_nanogpt(tmp_path, source):
    """Of the same documents: `encode_ordinary` of each, then end-of-text."""
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    encoding = load_tokenizer("gpt2")._fast  # the tests of the tokenizer compare it with tiktoken's own
    val = val_documents(300).tolist()
    found = streams(tmp_path / "out")
    for split in SPLITS:
        documents = [text for place, text in enumerate(texts(300)) if (place in val) == (split == "val")]
        expected = [token for text in documents for token in [*encoding.encode_ordinary(text), 50256]]
        assert found[split].tolist() == expected


def test_a_number_of_documents_that_is_not_openwebtexts_is_reported(tmp_path, source, capsys):
    run(source, tmp_path / "out")
    assert "300 documents, and OpenWebText has 8,013,769" in capsys.readouterr().err
    assert openwebtext.document_count_report(8_013_769, []) == []
    assert read_meta(tmp_path / "out").preparation["documents_of_openwebtext"] == 8_013_769


@pytest.mark.parametrize(
    ("train", "val", "report"),
    [
        (9_035_582_198, 4_434_897, "the tokens of train and val are as many as nanoGPT's"),
        (9_035_582_489, 4_434_606, "291 fewer in val than the 9,035,582,198 and 4,434,897, which nanoGPT reports"),
        (9_035_582_189, 4_434_906, "9 more in val than"),
        (9_035_582_199, 4_434_897, "this is another text"),
    ],
)
def test_a_number_of_tokens_that_is_not_nanogpts_is_reported(train, val, report):
    """In the summary of all of OpenWebText, and only there."""
    found = openwebtext.token_count_report({"train": train, "val": val})
    assert report in found and ("others found" in found) == (val == 4_434_606)
    tally = Tally()
    tally.missing = 8_013_769 - 2
    for split, tokens in (("train", train), ("val", val)):
        tally.counts[split].tokens, tally.counts[split].documents = tokens, 1
    settings = {"revision": None, "documents": 8_013_769, "val_fraction": 0.0005, "seed": 2357}
    record = SimpleNamespace(settings=settings, tokenizer="gpt2", vocab_size=50257, source="x", left_out=[])
    shards = dict.fromkeys(SPLITS, 1)
    assert openwebtext.summary(record, tally, shards)[-1] == found
    settings["seed"] = 1
    assert found not in openwebtext.summary(record, tally, shards)


# --------------------------------------------------------------------------------------- workers, order, memory


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("encoded_here", [0, 5])
def test_workers_change_nothing(tmp_path, source, monkeypatch, workers, encoded_here):
    """Whatever the main process has encoded itself until the workers can start."""
    one = contents(run(source, tmp_path / "1"))
    assert len(one) > 6
    finished = Future()
    if not encoded_here:
        finished.set_result(None)
    here = []
    encode = sharding.UnitEncoder.__call__

    def encode_here(self, unit):
        here.append(unit.number)
        if len(here) == encoded_here:
            finished.set_result(None)
        return encode(self, unit)

    monkeypatch.setattr(sharding, "finished_imports", lambda: finished)
    monkeypatch.setattr(sharding.UnitEncoder, "__call__", encode_here)  # the workers import what is in the file
    assert contents(run(source, tmp_path / "out", "--workers", workers)) == one
    assert here == list(range(encoded_here))


def test_the_main_process_encodes_while_workers_start(tmp_path, source, monkeypatch):
    finished = Future()
    monkeypatch.setattr(sharding, "finished_imports", lambda: finished)
    whole = contents(run(source, tmp_path / "whole"))
    assert contents(run(source, tmp_path / "out", "--workers", 2)) == whole  # they never came to it
    finished.set_exception(OSError("no more processes"))
    assert main(["--source", str(source), "--out", str(tmp_path / "no"), *SMALL, "--workers", "2"]) == 2


def test_processes_start_at_once_after_their_imports_and_never_see_ctrl_c(tmp_path):
    """In an interpreter of its own: there is one fork server for each, and another test may have started this one's."""
    script = tmp_path / "report_signals.py"
    script.write_text(
        "import signal\n"
        "from data_prep import worker_pool\n"
        "def report():\n"
        "    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    worker_pool.finished_imports().result(timeout=60)\n"
        "    process = worker_pool.start_imports().Process(target=report)\n"
        "    process.start()\n"
        "    process.join()\n"
        "    report()\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_what_goes_wrong_while_workers_start_is_raised(monkeypatch):
    def fail():
        raise OSError("no more processes")

    monkeypatch.setattr(worker_pool, "start_imports", fail)
    with pytest.raises(OSError, match="no more processes"):
        worker_pool.finished_imports().result(timeout=60)


@pytest.mark.parametrize("long", [1 << 20, 50])
def test_every_kind_of_source_gives_the_same_shards(tmp_path, source, monkeypatch, long):
    """Also when nearly all documents are long ones, to be read in pieces."""
    monkeypatch.setattr(long_documents, "LONG_DOCUMENT", long)
    monkeypatch.setattr(text_files, "LARGEST_SECTION", 2000)
    expected = streams(run(source, tmp_path / "parquet"))
    jsonl = tmp_path / "jsonl"
    jsonl.mkdir()
    lines = [json.dumps({"text": text}) + "\n\n" for text in texts(300)]
    (jsonl / "a.jsonl").write_text("\ufeff\n" + "".join(lines[:250]))  # a byte order mark alone is no document
    (jsonl / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[250:270]).encode()))
    (jsonl / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[270:]).encode()))
    whole = tmp_path / "whole"
    whole.mkdir()
    write_parquet(whole / "one_row_group.parquet", texts(300), row_group_size=300)
    text = tmp_path / "text"
    text.mkdir()
    for number, document in enumerate(texts(300)):
        (text / f"{number:05}.txt").write_text(document)
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    for number, document in enumerate(texts(300)):
        kind, compress = ("gz", gzip.compress) if number % 2 else ("zst", zstandard.compress)
        (compressed / f"{number:05}.txt.{kind}").write_bytes(compress(document.encode()))
    for folder in (jsonl, whole, text, compressed):
        found = streams(run(folder, tmp_path / f"{folder.name}_out"))
        for split in SPLITS:
            assert np.array_equal(found[split], expected[split]), folder


def test_no_unit_is_larger_than_it_has_to_be(tmp_path, monkeypatch):
    """Neither a large row group nor a compressed file is one piece of work, to be redone as a whole after a kill."""
    documents = [f"{i} " + "x" * 200 for i in range(1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    size = sum(map(len, documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", use_dictionary=False)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    for largest in (20_000, 1000):
        monkeypatch.setattr(text_files, "LARGEST_SECTION", largest)
        for path in sorted(tmp_path.iterdir()):
            sections, _ = text_files.find_sections([path], "text", skip_bad=False)
            found = [document for section in sections for document in text_files.read_section(section, "text")]
            assert [document.decode() for document in found] == documents
            assert size <= sum(section.bytes for section in sections) <= 1.2 * size + 100 * 1000
            assert max(section.bytes for section in sections) <= 1.2 * largest + 250


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.gz"])
def test_no_unit_is_more_than_a_shard(tmp_path, monkeypatch, kind):
    """With shards smaller than the usual unit too: what a worker has to redo after a kill is a shard at most."""
    monkeypatch.undo()  # the units of the other tests
    write_documents(tmp_path / "source", kind, texts(3000))
    encode = sharding.UnitEncoder.__call__
    tokens = []

    def count(self, unit):
        encoded = encode(self, unit)
        tokens.append(encoded.tally.both.tokens)
        return encoded

    monkeypatch.setattr(sharding.UnitEncoder, "__call__", count)
    run(tmp_path / "source", tmp_path / "whole", "--tokenizer", "gpt2", "--tokens-per-shard", 10**8)
    assert len(tokens) == 1 and tokens[0] > 100_000
    tokens.clear()
    folder = run(tmp_path / "source", tmp_path / "out", "--tokenizer", "gpt2", "--tokens-per-shard", 20_000)
    assert len(read_meta(folder).splits["train"].shards) > 5
    assert max(tokens) <= 20_000 and len(tokens) < 100


def test_units_are_as_large_as_they_have_to_be_and_no_larger(monkeypatch):
    monkeypatch.setattr(sharding, "SECTION_BYTES", 40)
    sizes = [10, 39, 1000, 20, 20, 5, 999, 990, 9, 1, 1]
    sections = [text_files.Section(path=Path("a"), documents=2, bytes=size) for size in sizes]
    units = sharding.plan_units(sections, np.array([0, 5, 12]), largest=1000)
    assert [[section.bytes for section in unit.sections] for unit in units] == [
        [10, 39],
        [1000],
        [20, 20],
        [5],  # with the next one it would be more than 1000
        [999],
        [990],
        [9, 1, 1],
    ]
    assert [(unit.documents, unit.bytes) for unit in units[:2]] == [(4, 49), (2, 1000)]
    assert [sorted(unit.val) for unit in units] == [[0], [1], [], [], [0], [], []]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_process_decompresses_a_file_once_for_all_its_sections(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text_files, "LARGEST_SECTION", 1000)
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"a.jsonl{suffix}"
    documents = texts(300)
    path.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
    sections, _ = text_files.find_sections([path], "text", skip_bad=False)
    assert len(sections) > 20
    opened = []
    open_file = text_files._open
    monkeypatch.setattr(text_files, "_open", lambda path: opened.append(path) or open_file(path))

    def read(sections):
        return [document.decode() for section in sections for document in text_files.read_section(section, "text")]

    assert read(sections) == documents and len(opened) == 1
    ends = np.cumsum([section.documents for section in sections])
    parts = np.split(documents, ends[:-1])
    assert read(sections[1::3]) == np.concatenate(parts[1::3]).tolist()
    assert len(opened) == 2  # what lies behind is not reached again
    path.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in reversed(documents)).encode()))
    assert read(sections[:1])[0] == documents[-1]  # and not out of the file that was there before


LONG = " " + " ".join(texts(300))  # ends with a letter and begins with a space: between copies there is a boundary


def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(long_documents, "LONG_DOCUMENT", 1000)
    documents = [LONG * 20, *texts(20), LONG, "no boundary: " + "^" * 1_000_000, " " * 1_000_000]
    write_parquet(tmp_path / "long.parquet", documents)
    assert main(["--source", str(tmp_path / "long.parquet"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    found = streams(tmp_path / "out")
    val = val_documents(len(documents)).tolist()
    # tiktoken's own pattern: it takes a million spaces at the end of a text in one step, ours runs out of stack there,
    # and the tokenizer must hand them to tokenizers.
    ranks = load_tokenizer("gpt2")._fast._mergeable_ranks
    reference = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    training = [text for n, text in enumerate(documents) if n not in val]
    assert documents[-1] in training and documents[-2] in training
    expected = [token for text in training for token in [*reference.encode_ordinary(text), 50256]]
    assert found["train"].tolist() == expected
    meta = read_meta(tmp_path / "out")
    assert sum(meta.splits[split].bytes for split in SPLITS) == sum(len(text.encode()) for text in documents)
    assert meta.preparation["documents_with_replaced_utf8"] == 0


def write_documents(folder, kind, documents):
    """A source of these documents; a .txt file each."""
    folder.mkdir()
    open_file = {".gz": gzip.open, ".zst": zstandard.open}.get(Path(f"a{kind}").suffix, open)
    if kind == ".parquet":
        write_parquet(folder / "a.parquet", documents)
    elif kind.startswith(".jsonl"):
        with open_file(folder / f"a{kind}", "wb") as file:
            for text in documents:
                file.write((json.dumps({"id": 1, "text": text}, ensure_ascii=len(text) < 100) + "\n").encode())
    else:
        for number, text in enumerate(documents):
            with open_file(folder / f"{number}{kind}", "wb") as file:
                file.write(text.encode())


def memory_grown(source, out):
    """By how many MB the peak memory of a process grows while it prepares a source."""
    script = (
        "from data_prep.openwebtext import main; from hgpt.cli import run\n"
        "from hgpt.data.tokenizer import load_tokenizer\n"
        "load_tokenizer('gpt2')\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line)\n"
        "before = peak()\n"
        f"assert run(main, ['--source', {str(source)!r}, '--out', {str(out)!r}, '--workers', '1']) == 0\n"
        "print('grown', peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"grown (\d+)", result.stdout)[1]) / 1e3


def check_a_large_document(tmp_path, kind, size, limit):
    copies = size // len(LONG.encode())
    documents = [("😀" + LONG) * copies, "short", "shorter"]  # a str of 4 bytes per character
    write_documents(tmp_path / "source", kind, documents)
    grown = memory_grown(tmp_path / "source", tmp_path / "out")
    assert grown < limit, f"{grown} MB"
    encode = load_tokenizer("gpt2")._fast.encode_ordinary
    tokens = [copies * len(encode("😀") + encode(LONG)), len(encode("short")), len(encode("shorter"))]
    (val,) = val_documents(3)
    splits = read_meta(tmp_path / "out").splits
    assert (splits["val"].tokens, splits["train"].tokens) == (tokens[val] + 1, sum(tokens) - tokens[val] + 2)
    assert not list((tmp_path / "out").glob(".*"))


BOUND = 50  # MB by which a process may grow, whatever the size of a document


@pytest.mark.parametrize("kind", [".jsonl", ".txt.zst"])
def test_memory_does_not_grow_with_a_document(tmp_path, kind):
    check_a_large_document(tmp_path, kind, size=15_000_000, limit=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst"])
def test_memory_does_not_grow_with_a_document_of_200_mb(tmp_path, kind):
    check_a_large_document(tmp_path, kind, size=200_000_000, limit=BOUND)


@pytest.mark.slow
def test_a_document_of_200_mb_in_a_parquet_file_takes_what_pyarrow_takes(tmp_path):
    """Up to four times its size; encoding adds little, and of the whole it would add several times as much."""
    check_a_large_document(tmp_path, ".parquet", size=200_000_000, limit=4 * 200 + BOUND)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
def test_rows_out_of_the_buffers_are_those_of_pyarrow(kind):
    texts = pa.array(["first", None, "", "zwölf", "x" * 1000, None], kind)
    for first in range(len(texts) + 1):  # a section begins anywhere in a batch
        part = texts[first:].cast(pa.large_binary())
        found = [None if value is None else bytes(value) for value in text_files._values(part)]
        assert found == part.to_pylist()
    assert list(text_files._values(pa.nulls(2, pa.large_binary()))) == [None, None]


def test_python_holds_one_row_of_a_row_group(tmp_path):
    """However many large ones stand together between small ones, of which the average knows nothing."""
    documents = ["x" * 1_000_000] * 40 + ["x"] * 40_000
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", use_dictionary=False)
    sections, _ = text_files.find_sections([tmp_path / "a.parquet"], "text", skip_bad=False)
    tracemalloc.start()
    try:
        lengths = [len(document) for section in sections for document in text_files.read_section(section, "text")]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [len(document) for document in documents] and peak < 5_000_000


# ----------------------------------------------------------------------------------------- killed and gone on

# What a process does to files, each announced by Python before it is done (sys.addaudithook).
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock"}


def kill_this_process(out, kill_at):
    """By kill -9, before its `kill_at`-th work on a file in `out`."""
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(str(out)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def killed_run(source, out, kill_at, workers=1):
    """In a process of its own: a run that is killed before its `kill_at`-th work on a file."""
    for module in (text_files, sharding):
        module.SECTION_BYTES = 3000
    sharding.finished_imports = ready_workers
    kill_this_process(out, kill_at)
    sys.exit(main(["--source", str(source), "--out", str(out), *SMALL, "--workers", str(workers)]))


def start_killed_run(*arguments):
    process = start_imports().Process(target=killed_run, args=arguments)
    process.start()
    return process


def recorded_units(out):
    journal = out / ".preparation" / "journal.jsonl"
    return sum(b'"unit"' in line for line in journal.read_bytes().splitlines()) if journal.exists() else 0


def go_on(source, out, monkeypatch):
    """Finish a run that was killed; returns how many units were encoded for it."""
    encoded = []
    encode = sharding.UnitEncoder.__call__
    with monkeypatch.context() as patch:
        patch.setattr(sharding.UnitEncoder, "__call__", lambda self, unit: encoded.append(unit) or encode(self, unit))
        run(source, out)
    return len(encoded)


def kill_everywhere(tmp_path, source, monkeypatch, stride):
    whole = run(source, tmp_path / "whole")
    expected = contents(whole)
    units = go_on(source, tmp_path / "counted", monkeypatch)
    assert units > 15
    kills = 0
    for kill_at in range(1, 10_000, stride):
        out = tmp_path / f"killed_{kill_at}"
        process = start_killed_run(source, out, kill_at)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if (out / "meta.json").exists():  # at most the last tidying is missing
            assert not (out / ".preparation").exists() or main(["--source", str(source), "--out", str(out)]) == 0
        else:
            recorded = recorded_units(out)
            assert go_on(source, out, monkeypatch) == units - recorded
            # With one worker, what was under way is one unit: all others that it had begun are recorded.
        assert contents(out) == expected, kill_at
    return kills


def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(tmp_path, source, monkeypatch):
    assert kill_everywhere(tmp_path, source, monkeypatch, stride=17) > 8


@pytest.mark.slow
def test_killed_at_every_file_operation_it_ends_with_the_same_bytes(tmp_path, source, monkeypatch):
    assert kill_everywhere(tmp_path, source, monkeypatch, stride=1) > 150


@pytest.mark.parametrize(("workers", "kills"), [(2, 1), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_killed_while_several_workers_are_at_it(tmp_path, source, capsys, workers, kills):
    expected = contents(run(source, tmp_path / "whole"))
    out = tmp_path / "out"
    for _ in range(kills):
        process = start_killed_run(source, out, 0, workers)
        before = recorded_units(out)
        while recorded_units(out) < before + 3 and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert recorded_units(out) >= before + 3 and not (out / "meta.json").exists()
        recorded = re.findall(r'"unit": (\d+)', (out / ".preparation" / "journal.jsonl").read_text())
        begun = {int(path.name[5:11]) for path in (out / ".preparation").glob("unit_*")}
        redone = begun - set(map(int, recorded))
        assert len(redone) <= sharding.UNITS_AHEAD * workers
    assert contents(run(source, out)) == expected
    assert re.search(r"going on: \d+ documents are encoded already", capsys.readouterr().err)


def test_a_power_cut_that_takes_what_was_not_flushed(tmp_path, source, monkeypatch):
    """The end of the journal, the content of some files of tokens, a shard: all are made again."""
    expected = contents(run(source, tmp_path / "whole"))
    for number, damage in enumerate(("journal", "spool", "shard")):
        out = tmp_path / damage
        start_killed_run(source, out, 80 + number).join()
        state = out / ".preparation"
        assert recorded_units(out) > 4
        if damage == "journal":
            content = (state / "journal.jsonl").read_bytes()
            (state / "journal.jsonl").write_bytes(content[: len(content) // 2 + 5])
        elif damage == "spool":
            files = sorted(state.glob("unit_*.train"))
            files[0].unlink()
            files[-1].write_bytes(bytes(files[-1].stat().st_size))
        else:
            (out / "train_000000.bin").unlink()
        go_on(source, out, monkeypatch)
        assert contents(out) == expected, damage


def test_going_on_needs_the_same_settings_and_files(tmp_path, source, capsys):
    out = tmp_path / "out"
    start_killed_run(source, out, 60).join()
    base = ("--source", source, "--out", out, *SMALL)
    assert "begun with another seed: 2357, now 1" in fails(capsys, *base, "--seed", 1)
    assert "another tokenizer: 'bpe:300', now 'gpt2'" in fails(capsys, *base, "--tokenizer", "gpt2")
    os.rename(source / "train-00002-of-00003.parquet", source / "renamed.parquet")
    assert "begun with another source" in fails(capsys, *base)
    with pytest.raises(UserError, match=r"has not finished\. The command that began it goes on"):
        TokenShards.open(out, "train")


def interrupted_run(out, monkeypatch, *arguments):
    """A preparation that Ctrl-C stops after 9 units."""
    encode = sharding.UnitEncoder.__call__

    def interrupted(self, unit):
        if unit.number == 9:
            raise KeyboardInterrupt
        return encode(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(sharding.UnitEncoder, "__call__", interrupted)
        assert main(["--out", str(out), *SMALL, *arguments]) == 130
    assert recorded_units(out) == 9


def test_ctrl_c_keeps_what_is_finished(tmp_path, source, monkeypatch, capsys):
    interrupted_run(tmp_path / "out", monkeypatch, "--source", str(source))
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert contents(run(source, tmp_path / "out")) == contents(run(source, tmp_path / "whole"))


def test_ctrl_c_while_workers_start_ends_all_processes_silently(tmp_path, source):
    """It reaches all of the terminal's processes: this one, and those that are importing what they need."""
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background of a shell ignore it
        "from data_prep import long_documents, openwebtext, sharding, text_files\n"
        "text_files.SECTION_BYTES = sharding.SECTION_BYTES = 3000\n"
        "encode = sharding.UnitEncoder.__call__\n"
        "sharding.UnitEncoder.__call__ = lambda self, unit: time.sleep(0.5) or encode(self, unit)\n"
        "from hgpt.cli import run\n"
        f"sys.exit(run(openwebtext.main, ['--source', {str(source)!r}, '--out', {str(tmp_path / 'out')!r}, *{SMALL!r}, "
        "'--workers', '2']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    while not recorded_units(tmp_path / "out"):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)  # until the last process that can write there has ended
    assert process.returncode == 130 and "Traceback" not in printed
    assert printed.endswith("\ninterrupted\n")
    assert contents(run(source, tmp_path / "out")) == contents(run(source, tmp_path / "whole"))


def test_a_worker_that_dies_is_told_of_and_gone_on_from(tmp_path, source, monkeypatch, capsys):
    update = openwebtext.Progress.update

    def kill_the_workers(self, tally):
        update(self, tally)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "finished_imports", ready_workers)
        patch.setattr(openwebtext.Progress, "update", kill_the_workers)
        message = fails(capsys, "--source", source, "--out", tmp_path / "out", *SMALL, "--workers", 2)
    assert "A worker process died" in message and "fewer --workers; what is finished stays" in message
    assert recorded_units(tmp_path / "out") >= 1
    assert contents(run(source, tmp_path / "out")) == contents(run(source, tmp_path / "whole"))


def test_a_second_run_in_one_folder_is_refused(tmp_path, source, capsys):
    out = tmp_path / "out"
    with Preparation(out):
        assert "another process is preparing data in this folder" in fails(capsys, "--source", source, "--out", out)
    assert not out.exists()  # nothing was begun
    run(source, out)
    assert "holds prepared data already" in fails(capsys, "--source", source, "--out", out)
    (out / "meta.json").unlink()
    assert "no preparation in it to go on with" in fails(capsys, "--source", source, "--out", out)


# ------------------------------------------------------------------------------------------------------- disk


def test_too_little_disk_space_is_found_before_it_is_used(tmp_path, source, capsys, monkeypatch):
    splits = read_meta(run(source, tmp_path / "whole")).splits
    tokens = sum(splits[split].tokens for split in SPLITS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9_000_000_000))
        openwebtext.check_disk_space(tmp_path, 4e9, passing=1e8, copies=0)
        with pytest.raises(UserError, match=r"will need about 9\.38 GB, and 9\.00 GB are free"):
            openwebtext.check_disk_space(tmp_path, 4.5e9, passing=1e8, copies=0)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000))
        assert "0.00 GB are free" in fails(capsys, "--source", source, "--out", tmp_path / "out", *SMALL)
    estimate = estimates(monkeypatch)
    run(source, tmp_path / "out")
    assert tokens < estimate[0][0] < 1.5 * tokens  # Parquet adds to row groups as small as these


def estimates(monkeypatch):
    """(tokens of shards, tokens in other files) that each further run finds room for."""
    found = []
    monkeypatch.setattr(
        openwebtext, "check_disk_space", lambda out, tokens, passing, copies: found.append((tokens, passing))
    )
    return found


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst"])
def test_the_estimate_for_compressed_files_is_that_of_their_text(tmp_path, monkeypatch, suffix):
    compress = gzip.compress if suffix.endswith(".gz") else zstandard.compress
    (tmp_path / "source").mkdir()
    documents = [text * 50 for text in texts(40)]  # compress well
    if suffix.startswith(".txt"):
        for number, text in enumerate(documents):
            (tmp_path / "source" / f"{number}{suffix}").write_bytes(compress(text.encode()))
    else:
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        (tmp_path / "source" / f"a{suffix}").write_bytes(compress(lines.encode()))
    estimate = estimates(monkeypatch)
    splits = read_meta(run(tmp_path / "source", tmp_path / "out")).splits
    tokens = sum(split.tokens for split in splits.values())
    assert 0.9 * tokens < estimate[0][0] < 1.2 * tokens


def test_a_run_that_goes_on_needs_room_for_what_is_encoded_and_in_no_shard(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    options = ("--tokens-per-shard", 3000)
    splits = read_meta(run(source, tmp_path / "whole", *options)).splits
    tokens = sum(split.tokens for split in splits.values())
    start_killed_run(source, out, 110).join()
    in_shards = sum((path.stat().st_size - 1024) // 2 for path in out.glob("*.bin"))
    encoded = sum(path.stat().st_size // 2 for path in (out / ".preparation").glob("unit_*.[tv]*[nl]"))
    assert in_shards >= 3000 and encoded > 500 and recorded_units(out) > 5
    estimate = estimates(monkeypatch)
    run(source, out, *options)
    # What is estimated too high (see above) is at most half of what is not encoded.
    left = tokens - in_shards
    assert left < estimate[0][0] < 1.5 * left


LIMIT = 30_000  # bytes of a file: more than the tokenizer and the units have, less than a shard


def limited_run(source, out, limit, workers, section_bytes):
    for module in (text_files, sharding):
        module.SECTION_BYTES = section_bytes
    sharding.finished_imports = ready_workers
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stderr = open(out.parent / "stderr", "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    options = [*SMALL, "--tokens-per-shard", "100000", "--workers", str(workers)]
    sys.exit(main(["--source", str(source), "--out", str(out), *options]))


@pytest.mark.parametrize(
    ("workers", "section_bytes"), [(1, 3000), (2, 3000), (2, 40_000)], ids=["one", "two, in a shard", "two, in a unit"]
)
def test_a_write_that_fails_is_a_clean_error_and_can_be_gone_on_with(
    tmp_path, source, monkeypatch, workers, section_bytes
):
    process = start_imports().Process(
        target=limited_run, args=(source, tmp_path / "out", LIMIT, workers, section_bytes)
    )
    process.start()
    process.join()
    message = (tmp_path / "stderr").read_text()
    assert process.exitcode == 2 and "Traceback" not in message
    assert "failed: File too large. Mend that (a full disk: free space)" in message
    assert not list((tmp_path / "out").glob("*.bin"))
    assert recorded_units(tmp_path / "out") > 10 or section_bytes > 3000
    for module in (text_files, sharding):
        monkeypatch.setattr(module, "SECTION_BYTES", section_bytes)
    options = ("--tokens-per-shard", 100_000)
    expected = contents(run(source, tmp_path / "whole", *options))
    assert contents(run(source, tmp_path / "out", *options)) == expected


@pytest.mark.parametrize("over", [10, 20_000])
def test_a_disk_that_fills_while_a_long_document_is_copied(tmp_path, monkeypatch, capsys, over):
    """It is no damage of the source, which --skip-bad would leave out."""
    monkeypatch.setattr(long_documents, "LONG_DOCUMENT", 50_000)
    (tmp_path / "source").mkdir()
    for name, text in zip("abc", texts(3), strict=True):
        (tmp_path / "source" / f"{name}.txt").write_text(text)
    long = (LONG * 5000)[:120_000]
    (tmp_path / "source" / "b.txt").write_text(long)
    base = ("--source", tmp_path / "source", "--out", tmp_path / "out", *SMALL, "--skip-bad", "--workers", 1)
    base = (*base, "--val-fraction", "0.3")
    with file_size_limit(len(long.encode()) - over):
        message = fails(capsys, *base)
    assert "is kept in" in message and "cannot be written: File too large. Free space there" in message
    assert main(list(map(str, base))) == 0
    assert read_meta(tmp_path / "out").preparation["documents_without_text"] == 0
    found = read_back(tmp_path / "out")
    assert long in found["train"] + found["val"]


def test_a_folder_that_cannot_be_written(source, capsys):
    # Not even root may make a folder there.
    assert "cannot be written" in fails(capsys, "--source", source, "--out", "/sys/hgpt")
    (source.parent / "file").touch()
    assert "is a file" in fails(capsys, "--source", source, "--out", source.parent / "file")


@contextlib.contextmanager
def ordinary_user():
    """As one whom permissions keep out, also where the tests are run by root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folders_that_permissions_close(source, capsys):
    folder = Path(tempfile.mkdtemp())  # unlike tmp_path, within the reach of every user
    folder.chmod(0o777)
    closed, data = folder / "closed", folder / "data"
    shutil.copytree(source, closed / "data")
    shutil.copytree(source, data)
    (data / "inside").mkdir()
    try:
        for path in (closed, data / "inside"):
            path.chmod(0)
        data.chmod(0o555)
        with ordinary_user():
            for out in (closed / "out", data / "out"):
                message = fails(capsys, "--source", data, "--out", out)
                assert f"--out {out} cannot be written: Permission denied. Choose another folder" in message
            message = fails(capsys, "--source", closed / "data", "--out", folder / "out")
            assert f"--source {closed / 'data'} cannot be read: Permission denied" in message
            message = fails(capsys, "--source", data, "--out", folder / "out")
            assert f"{data / 'inside'} cannot be read: Permission denied" in message
            assert "is no folder that can be read" in fails(capsys, "--out", closed / "out", "--merge")
            assert run(verify.main, [str(closed / "data")]) == 2
            assert f"{closed / 'data'} cannot be read: Permission denied" in capsys.readouterr().err
            assert not (folder / "out").exists()
    finally:
        for path in (closed, data, data / "inside"):
            path.chmod(0o777)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------- parts


def test_parts_are_merged_into_the_same_streams(tmp_path, source, capsys):
    whole = run(source, tmp_path / "whole")
    out = tmp_path / "out"
    for part in (3, 1):
        run(source, out, "--part", f"{part}/3")
    assert "of 3 parts in" in (message := fails(capsys, "--out", out, "--merge")) and "2/3 is missing" in message
    run(source, out, "--part", "2/3")
    assert main(["--out", str(out), "--merge"]) == 0
    verify_shards(out)
    found, expected = streams(out), streams(whole)
    for split in SPLITS:
        assert np.array_equal(found[split], expected[split])
    ours, theirs = read_meta(out), read_meta(whole)
    assert (ours.preparation.pop("parts"), theirs.preparation.pop("parts")) == (3, 1)
    assert ours.preparation == theirs.preparation and ours.packages == theirs.packages
    assert {path.name for path in out.iterdir() if path.suffix != ".bin"} == {"meta.json", "tokenizer.json"}
    assert "merged from       3 parts" in capsys.readouterr().out


def test_merging_killed_at_any_file_operation(tmp_path, source):
    parts = tmp_path / "parts"
    for part in (1, 2):
        run(source, parts, "--part", f"{part}/2")
    expected = None
    for kill_at in range(0, 60, 7):
        out = tmp_path / f"merged_{kill_at}"
        subprocess.run(["cp", "-r", parts, out], check=True)
        process = start_imports().Process(target=killed_merge, args=(out, kill_at))
        process.start()
        process.join()
        if process.exitcode:
            assert main(["--out", str(out), "--merge"]) == 0
        expected = expected or contents(out)
        assert contents(out) == expected


def killed_merge(out, kill_at):
    kill_this_process(out, kill_at)
    sys.exit(main(["--out", str(out), "--merge"]))


def test_parts_that_do_not_belong_together(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert "is no folder" in fails(capsys, "--out", out, "--merge")
    run(source, out, "--part", "1/2")
    run(source, out, "--part", "2/2", "--seed", 7)
    assert "part 2 was prepared with another seed than part 1: 7, not 2357" in fails(capsys, "--out", out, "--merge")
    run(source, out, "--part", "3/3")
    assert "parts of different divisions, of 2 and of 3 parts" in fails(capsys, "--out", out, "--merge")
    assert "--seed has no effect with --merge" in fails(capsys, "--out", out, "--merge", "--seed", 1)
    shutil.rmtree(out / "part_3_of_3")
    run(source, tmp_path / "other", "--part", "2/2")
    shutil.rmtree(out / "part_2_of_2")
    (tmp_path / "other" / "part_2_of_2").rename(out / "part_2_of_2")
    shard = out / "part_2_of_2" / "train_000000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    assert "part_2_of_2/train_000000.bin has" in fails(capsys, "--out", out, "--merge")
    shard.write_bytes(content)
    assert main(["--out", str(out), "--merge"]) == 0
    verify_shards(out)
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--part", "0/2"])
    assert "--part 400/1000: there is nothing left" in fails(
        capsys, "--source", source, "--out", tmp_path / "many", "--part", "400/1000", *SMALL
    )


def test_parts_that_are_damaged(tmp_path, source, capsys):
    out = tmp_path / "out"
    for part in (1, 2):
        run(source, out, "--part", f"{part}/2")
    whole = contents(out / "part_1_of_2")
    assert run(verify.main, [str(out / "part_1_of_2")]) == 2
    message = capsys.readouterr().err
    assert f"python -m data_prep.openwebtext --out {out} --merge" in message and "Delete" not in message

    record = json.loads(whole["part.json"])
    for damaged in (b"", b"[]", whole["part.json"][:-100], json.dumps(record | {"shards": {"train": [1]}}).encode()):
        (out / "part_1_of_2" / "part.json").write_bytes(damaged)
        message = fails(capsys, "--out", out, "--merge")
        assert "part_1_of_2/part.json is damaged" in message and "Copy the part again" in message
    del record["tally"]
    (out / "part_1_of_2" / "part.json").write_text(json.dumps(record))
    assert "part_1_of_2/part.json is damaged (KeyError: 'tally')" in fails(capsys, "--out", out, "--merge")
    (out / "part_1_of_2" / "part.json").write_bytes(whole["part.json"])

    tokenizer = out / "part_1_of_2" / "tokenizer.json"
    for content in (None, whole["tokenizer.json"][:-1]):
        tokenizer.unlink()
        if content is not None:
            tokenizer.write_bytes(content)
        message = fails(capsys, "--out", out, "--merge")
        assert f"{tokenizer} is missing or damaged. Copy the part again" in message
        tokenizer.write_bytes(whole["tokenizer.json"])
    assert main(["--out", str(out), "--merge"]) == 0
    assert f"python -m data_prep.verify {out}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- bad input


def test_null_rows_keep_their_places_and_are_counted(tmp_path, capsys):
    documents = texts(300)
    for place in (0, 17, 18, 299):
        documents[place] = None
    write_parquet(tmp_path / "a.parquet", documents)
    folder = run(tmp_path / "a.parquet", tmp_path / "out")
    val = val_documents(300, 0.1).tolist()
    assert read_back(folder)["val"] == [documents[place] for place in val if documents[place] is not None]
    assert read_meta(folder).preparation["documents_without_text"] == 4
    assert "without text      4 documents" in capsys.readouterr().out


def test_empty_documents_are_documents(tmp_path):
    """nanoGPT writes an end-of-text for each, and the number of its tokens is to be reached."""
    write_parquet(tmp_path / "a.parquet", ["", " ", *texts(20)])
    folder = run(tmp_path / "a.parquet", tmp_path / "out")
    assert sum(split.documents for split in read_meta(folder).splits.values()) == 22


def test_surrogates_and_invalid_utf8_are_replaced_and_counted(tmp_path, capsys, monkeypatch):
    lines = [
        '{"text": "lone \\ud800 surrogate"}',
        '{"text": "fine \ufffd"}',
        *(json.dumps({"text": t}) for t in texts(9)),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b").mkdir()
    column = pa.array([b"par\xc3quet" + LONG.encode(), b"\xef\xbf\xbd valid" + LONG.encode()] + [b"x"] * 5, pa.binary())
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "b" / "a.parquet")
    for long in (1 << 20, 10):  # decoded as a whole, and in chunks
        monkeypatch.setattr(long_documents, "LONG_DOCUMENT", long)
        assert (
            read_meta(run(tmp_path / "a.jsonl", tmp_path / f"1_{long}")).preparation["documents_with_replaced_utf8"]
            == 1
        )
        folder = run(tmp_path / "b", tmp_path / f"2_{long}")
        assert read_meta(folder).preparation["documents_with_replaced_utf8"] == 1
        found = read_back(folder)
        assert {text[:8] for text in found["train"] + found["val"]} == {"par\ufffdquet"[:8], "\ufffd valid ", "x"}
        assert sum(s.bytes for s in read_meta(folder).splits.values()) == len(LONG.encode()) * 2 + 10 + 9 + 5
    assert read_back(tmp_path / "1_10") == read_back(tmp_path / f"1_{1 << 20}")


def test_files_that_are_empty_or_cut_short(tmp_path, source, capsys):
    (source / "train-00003.parquet").touch()
    cut = source / "train-00001-of-00003.parquet"
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    base = ("--source", source, "--out", tmp_path / "out", *SMALL)
    message = fails(capsys, *base)
    assert "train-00001-of-00003.parquet cannot be read" in message and "With --skip-bad" in message
    assert not (tmp_path / "out").exists()
    folder = run(source, tmp_path / "out", "--skip-bad")
    printed = capsys.readouterr().out
    assert "could not be read 2:" in printed
    for name in ("train-00001-of-00003.parquet", "train-00003.parquet"):
        assert name in printed and name in str(read_meta(folder).preparation["left_out"])
    assert read_meta(folder).preparation["documents"] == 200
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).touch()
        assert "it is empty, 0 bytes" in fails(capsys, "--source", tmp_path / name, "--out", tmp_path / "no")


def test_a_parquet_file_that_is_damaged_inside(tmp_path, source, capsys):
    """Its footer is whole, so the damage is found by a worker."""
    path = source / "train-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(3).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    base = ("--source", source, "--out", tmp_path / "out", *SMALL)
    for workers in (1, 2):
        message = fails(capsys, *base, "--workers", workers)
        assert "train-00001-of-00003.parquet cannot be read" in message and "what is finished stays" in message
    assert recorded_units(tmp_path / "out") > 3
    folder = run(source, tmp_path / "out", "--skip-bad")
    assert "train-00001-of-00003.parquet: 7 documents cannot be read" in capsys.readouterr().out
    meta = read_meta(folder)
    assert meta.preparation["documents"] == 300 and meta.preparation["documents_without_text"] == 7
    documents = texts(300)
    val = [place for place in val_documents(300, 0.1).tolist() if not 121 <= place < 128]
    assert read_back(folder)["val"] == [documents[place] for place in val]


def test_a_text_file_that_can_be_read_only_in_part(tmp_path, capsys, monkeypatch):
    """As on a disk with a bad sector: found before a piece of the document is encoded."""
    monkeypatch.setattr(long_documents, "LONG_DOCUMENT", 1000)
    (tmp_path / "source").mkdir()
    for place in range(8):
        (tmp_path / "source" / f"{place}.txt").write_text(f"{place} " + "word " * 1000)
    opened = text_files._open

    @contextlib.contextmanager
    def open_damaged(path):
        with opened(path) as stream:
            if path.name == "5.txt":
                read = stream.read

                class Damaged:
                    def read(self, size):
                        if stream.tell() > 3000:
                            raise OSError(5, "Input/output error")
                        return read(size)

                yield Damaged()
            else:
                yield stream

    monkeypatch.setattr(text_files, "_open", open_damaged)
    base = ("--source", tmp_path / "source", "--out", tmp_path / "out", *SMALL, "--workers", 1)
    message = fails(capsys, *base)
    assert "5.txt cannot be read: [Errno 5] Input/output error" in message and "With --skip-bad" in message
    assert main([*map(str, base), "--skip-bad"]) == 0
    assert "5.txt: 1 documents cannot be read" in capsys.readouterr().out
    found = read_back(tmp_path / "out")
    assert sorted(text[:2] for text in found["train"] + found["val"]) == [
        f"{place} " for place in range(8) if place != 5
    ]


def test_rows_that_are_not_text(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in texts(40)]
    lines[20] = '{"text": 3}'
    lines[30] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    base = ("--source", tmp_path / "a.jsonl", "--out", tmp_path / "out", *SMALL, "--tokenizer", "gpt2")
    message = fails(capsys, *base)
    assert "a.jsonl, line 21: the field 'text' must be a string, not int" in message
    assert main([*map(str, base), "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "line 21" in printed and "line 31: cannot be read as JSON" in printed
    assert read_meta(tmp_path / "out").preparation["documents_without_text"] == 2


def test_mixed_folders(tmp_path, source, capsys):
    base = ("--source", source, "--out", tmp_path / "out")
    pq.write_table(pa.table({"content": ["x"]}), source / "x.parquet")
    pq.write_table(pa.table({"text": [1]}), source / "y.parquet")
    message = fails(capsys, *base)
    assert "mixed schemas; in 3 of 5 files" in message
    assert re.search(r"x\.parquet has no column 'text'; its columns are content", message)
    assert re.search(r"y\.parquet: the column 'text' holds int64, not text", message)
    (source / "z.jsonl").write_text('{"text": "x"}')
    assert "holds .jsonl and .parquet files" in fails(capsys, *base)


def test_bad_options(tmp_path, source, capsys):
    base = ("--source", source, "--out", tmp_path / "out")
    assert "--val-fraction 1.5 of 300 documents leaves" in fails(capsys, *base, "--val-fraction", 1.5)
    assert "--workers must be at least 1" in fails(capsys, *base, "--workers", 0)
    assert "--tokens-per-shard must be at least 1" in fails(capsys, *base, "--tokens-per-shard", 0)
    assert "--revision main has no effect on --source" in fails(capsys, *base, "--revision", "main")
    assert "is neither a folder" in fails(capsys, "--source", "no where", "--out", tmp_path / "out")
    write_parquet(tmp_path / "none.parquet", pa.array([], pa.string()))
    message = fails(capsys, "--source", tmp_path / "none.parquet", "--out", tmp_path / "o")
    assert "none.parquet holds no documents. Give another." in message
    write_parquet(tmp_path / "one.parquet", ["one"])
    assert "All the text is one document" in fails(
        capsys, "--source", tmp_path / "one.parquet", "--out", tmp_path / "o"
    )


# ------------------------------------------------------------------------------------------ progress and summary


def test_progress_line(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(openwebtext.time, "perf_counter", lambda: now[0])
    earlier, new = Tally(missing=10), Tally(missing=5)
    earlier.counts["train"].documents, earlier.counts["train"].tokens = 90, 500_000
    new.counts["train"].documents, new.counts["val"].documents = 190, 5
    new.counts["train"].tokens, new.counts["val"].tokens = 2_900_000, 100_000
    new.counts["train"].bytes, new.counts["val"].bytes = 7_500_000, 500_000
    progress = openwebtext.Progress(400)
    progress.start(earlier)
    now[0] += 2
    progress.update(new)
    assert progress.close().tokens == 3_000_000
    line = capsys.readouterr().err.split("\r")[-1]
    # 300 of 400 documents; the rates are those of this run, the tokens are all.
    assert " 75% " in line and "300/400 documents, 3.5 M tokens, 1.50 M tokens/s, 4.0 MB/s, " in line
    assert line.strip().endswith("left")


def test_length_distribution():
    tally = Tally()
    for tokens in (0, 1, 2, 3, 4, 1000, 1023, 1024):
        tally.add_length(tokens)
    lines = openwebtext.length_table(tally)
    shares = {line.split("  ")[0].strip() or line.strip()[:20].strip(): line.split() for line in lines[2:-2]}
    assert "2 to 3" in str(lines) and "512 to 1,023" in str(lines) and "1,024 to 2,047" in str(lines)
    (row,) = [line.split() for line in lines if "512 to 1,023" in line]
    assert row[3:6] == ["2", "25.0%", f"{2023 / 3057:.1%}"]
    assert "longest 1,024 tokens" in lines[-2] and shares


# ----------------------------------------------------------------------------------------------------------- hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What data_prep needs of the Hugging Face hub, over HTTP: one data set, one revision that may move.

    `refused` files are not given, of `cut` ones only the first half at the first time, and `down` is the hub.
    """

    files: ClassVar[dict[str, bytes]] = {}
    commit = "a" * 40
    asked: ClassVar[list[str]] = []
    refused: ClassVar[set[str]] = set()
    cut: ClassVar[set[str]] = set()
    down = False

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if self.down:
            return self.send(503, {}, b"", body)
        path = self.path.replace("%2F", "/")
        known = re.fullmatch(r"/api/datasets/Skylion007/openwebtext/revision/(.+?)(\?.*)?", path)
        commits = {"refs/pr/20": self.commit, "a" * 40: "a" * 40, PINNED: PINNED}
        if known and known[1] in commits:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": "Skylion007/openwebtext", "sha": commits[known[1]], "siblings": siblings, "tags": []}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)
        if known:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        match = re.fullmatch(rf"/datasets/Skylion007/openwebtext/resolve/({'|'.join(commits)})/(.+)", path)
        if not match:
            return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        commit, name = commits[match[1]], match[2]
        if body and name in self.refused:
            return self.send(403, {}, b"", body)
        content = self.files[name]
        headers = {"ETag": f'"{Path(name).name}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if body and name in self.cut:
            self.cut.remove(name)
            self.close_connection = True
            return self.send(200, headers | {"Content-Length": str(len(content))}, content[: len(content) // 2], body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(206, headers, content[start:], body)
        return self.send(200, headers, content, body)

    def send(self, status, headers, content, body):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_address[1], tmp_path / "cache")
    monkeypatch.setattr(openwebtext, "REVISION", "refs/pr/20")  # one that may move
    for name, value in (("files", {}), ("asked", []), ("refused", set()), ("cut", set())):
        monkeypatch.setattr(Hub, name, value)
    yield Hub
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, port, cache):
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", f"http://127.0.0.1:{port}"),
        ("HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
        ("HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def test_from_the_hub(tmp_path, source, hub, capsys):
    for path in sorted(source.iterdir(), reverse=True):  # the order of the listing does not matter
        hub.files[f"plain_text/{path.name}"] = path.read_bytes()
    hub.files["README.md"] = b"x"
    assert main(["--out", str(tmp_path / "out"), *SMALL]) == 0
    meta = read_meta(tmp_path / "out")
    assert (meta.source, meta.source_revision) == ("Skylion007/openwebtext", "a" * 40)
    expected = streams(run(source, tmp_path / "local"))
    found = streams(tmp_path / "out")
    for split in SPLITS:
        assert np.array_equal(found[split], expected[split])
    downloads = [line for line in hub.asked if line.startswith("GET") and "resolve" in line]
    assert len(downloads) == 3 and "README" not in str(hub.asked)
    hub.asked.clear()
    assert main(["--out", str(tmp_path / "again"), *SMALL]) == 0  # from the cache
    assert not [line for line in hub.asked if line.startswith("GET") and "resolve" in line]


@pytest.fixture
def on_hub(source, hub):
    """A hub that holds the files of `source`."""
    hub.files.update({f"plain_text/{path.name}": path.read_bytes() for path in source.iterdir()})
    return hub


def test_the_default_revision_is_a_commit_which_cannot_move(tmp_path, on_hub, monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}", PINNED)
    monkeypatch.setattr(openwebtext, "REVISION", PINNED)
    meta = read_meta(run("Skylion007/openwebtext", tmp_path / "out"))
    assert meta.source_revision == PINNED and all(PINNED in line for line in on_hub.asked)


def downloads(hub):
    return sorted(line.split()[1].rpartition("/")[2] for line in hub.asked if re.match("GET .*/resolve/", line))


def test_a_download_that_was_interrupted_goes_on(tmp_path, on_hub, capsys):
    third = "train-00002-of-00003.parquet"
    on_hub.refused.add(f"plain_text/{third}")
    message = fails(capsys, "--out", tmp_path / "out", *SMALL)
    assert "The download of Skylion007/openwebtext was interrupted (HfHubHTTPError: " in message
    assert "The same command goes on with it. Alternatives: " in message and "--source openwebtext" in message
    assert not (tmp_path / "out").exists()
    on_hub.refused.clear()
    on_hub.asked.clear()
    assert main(["--out", str(tmp_path / "out"), *SMALL]) == 0
    assert downloads(on_hub) == [third]


def test_a_connection_that_breaks_goes_on_in_the_file(tmp_path, source, on_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    third = "train-00002-of-00003.parquet"
    on_hub.cut.add(f"plain_text/{third}")
    folder = run("Skylion007/openwebtext", tmp_path / "out")
    assert downloads(on_hub).count(third) == 2
    assert f"bytes={(source / third).stat().st_size // 2 // 1000 * 1000}-" in str(on_hub.asked)
    expected = streams(run(source, tmp_path / "local"))
    assert all(np.array_equal(streams(folder)[split], expected[split]) for split in SPLITS)


def test_ctrl_c_does_not_wait_for_downloads():
    """Neither the message, nor the end of the process: no thread keeps it that is no daemon."""
    going_on = threading.Event()
    started = []

    def fetch(name):
        started.append(name)
        if len(started) == openwebtext.DOWNLOADS:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        going_on.wait(60)
        return Path(name)

    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            openwebtext._all_at_once(fetch, [str(number) for number in range(20)])
        assert time.perf_counter() - start < 5
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    finally:
        signal.signal(signal.SIGINT, handler)
        going_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert len(started) == openwebtext.DOWNLOADS  # and none of the others began


def test_a_preparation_goes_on_with_its_commit_and_without_the_hub(tmp_path, source, on_hub, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupted_run(out, monkeypatch)
    monkeypatch.setattr(on_hub, "commit", "b" * 40)  # the pull request has moved
    message = fails(capsys, "--out", out, *SMALL, "--revision", "a" * 40)
    asked = "another data set on the hub: 'Skylion007/openwebtext at refs/pr/20', now 'Skylion007/openwebtext at aaaa"
    assert asked in message
    assert "'Skylion007/openwebtext at refs/pr/20', now None" in fails(capsys, "--out", out, "--source", source, *SMALL)
    on_hub.asked.clear()
    assert main(["--out", str(out), *SMALL]) == 0
    assert not on_hub.asked
    assert read_meta(out).source_revision == "a" * 40
    whole = run("Skylion007/openwebtext", tmp_path / "whole", "--revision", "a" * 40)
    assert contents(out) == contents(whole)


def test_a_preparation_goes_on_with_its_commit_when_the_cache_has_lost_a_file(tmp_path, on_hub, monkeypatch, capsys):
    out = tmp_path / "out"
    interrupted_run(out, monkeypatch)
    monkeypatch.setattr(on_hub, "commit", "b" * 40)
    third = "train-00002-of-00003.parquet"
    (blob,) = (tmp_path / "cache").rglob(f"blobs/{third}")
    blob.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fails(capsys, "--out", out, *SMALL)
    assert "does not hold all Parquet files" in message and f"--revision {'a' * 40}" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    on_hub.asked.clear()
    assert main(["--out", str(out), *SMALL]) == 0
    assert downloads(on_hub) == [third] and read_meta(out).source_revision == "a" * 40


def test_offline_the_cache_is_enough_when_it_is_complete(tmp_path, source, on_hub, monkeypatch, capsys):
    on_hub.refused.add("plain_text/train-00002-of-00003.parquet")
    fails(capsys, "--out", tmp_path / "out", *SMALL)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in ((), ("--revision", "a" * 40)):
        message = fails(capsys, "--out", tmp_path / "out", *SMALL, *revision)
        assert "HF_HUB_OFFLINE is set" in message and "does not hold all Parquet files" in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    on_hub.refused.clear()
    whole = contents(run("Skylion007/openwebtext", tmp_path / "whole"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    on_hub.asked.clear()
    for number, revision in enumerate(((), ("--revision", "a" * 40))):
        assert contents(run("Skylion007/openwebtext", tmp_path / str(number), *revision)) == whole
    assert not on_hub.asked


def test_a_hub_that_answers_with_an_error(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setattr(hub, "down", True)
    message = fails(capsys, "--out", tmp_path / "out")
    assert "The Hugging Face hub answers with an error: " in message and "503" in message
    assert "--source openwebtext" in message and not (tmp_path / "out").exists()


def test_a_download_that_does_not_fit_is_refused(tmp_path, source, hub, capsys, monkeypatch):
    hub.files["a.parquet"] = (source / "train-00000-of-00003.parquet").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "are to be downloaded to" in fails(capsys, "--out", tmp_path / "out")


def test_a_revision_or_data_set_that_does_not_exist(tmp_path, hub, capsys):
    message = fails(capsys, "--out", tmp_path / "out", "--revision", "refs/pr/999")
    assert "--revision refs/pr/999 does not exist in Skylion007/openwebtext" in message and "refs/pr/20" in message
    message = fails(capsys, "--out", tmp_path / "out", "--source", "Skylion007/openwebtxt")
    assert "no folder on this machine, and no data set on the hub" in message
    hub.files["openwebtext.py"] = b"x"
    assert "holds no Parquet files at revision" in fails(capsys, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["refused", "silent", "offline"])
def test_no_network_is_an_error_within_seconds_that_names_the_local_alternative(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(openwebtext, "HUB_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        point_to(monkeypatch, server.getsockname()[1], tmp_path / "cache")
        if kind == "refused":
            server.close()
        if kind == "offline":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        start = time.perf_counter()
        message = fails(capsys, "--out", tmp_path / "out")
        assert time.perf_counter() - start < 5
    assert "--source openwebtext" in message and "hf download Skylion007/openwebtext" in message
    assert not (tmp_path / "out").exists()
