"""data_prep/openwebtext.py: nanoGPT's split, shards in parallel, killed and resumed runs, parts, the hub, bad input."""

import contextlib
import gzip
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import openwebtext, sharding, text_files
from data_prep.openwebtext import main, val_documents
from data_prep.sharding import Preparation, Tally
from data_prep.worker_pool import start_imports
from hgpt.errors import UserError
from hgpt.shards import SPLITS, TokenShards, read_meta, verify
from hgpt.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
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
    verify(folder)
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


# --------------------------------------------------------------------------------------- workers, order, memory


def test_workers_change_nothing(tmp_path, source):
    one = contents(run(source, tmp_path / "1"))
    assert len(one) > 6
    for workers in (2, 3):
        assert contents(run(source, tmp_path / str(workers), "--workers", workers)) == one


def test_every_kind_of_source_gives_the_same_shards(tmp_path, source):
    expected = streams(run(source, tmp_path / "parquet"))
    jsonl = tmp_path / "jsonl"
    jsonl.mkdir()
    lines = [json.dumps({"text": text}) + "\n\n" for text in texts(300)]
    (jsonl / "a.jsonl").write_text("".join(lines[:250]))
    (jsonl / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[250:270]).encode()))
    (jsonl / "c.jsonl.zst").write_bytes(zstandard.compress("".join(lines[270:]).encode()))
    whole = tmp_path / "whole"
    whole.mkdir()
    write_parquet(whole / "one_row_group.parquet", texts(300), row_group_size=300)
    text = tmp_path / "text"
    text.mkdir()
    for number, document in enumerate(texts(300)):
        (text / f"{number:05}.txt").write_text(document)
    for folder in (jsonl, whole, text):
        found = streams(run(folder, tmp_path / f"{folder.name}_out"))
        for split in SPLITS:
            assert np.array_equal(found[split], expected[split]), folder


LONG = " " + " ".join(texts(300))  # ends with a letter and begins with a space: between copies there is a boundary


def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "LONG_DOCUMENT", 1000)
    documents = [LONG * 20, *texts(20), LONG, "no boundary: " + "^" * 1_000_000, " " * 1_000_000]
    write_parquet(tmp_path / "long.parquet", documents)
    assert main(["--source", str(tmp_path / "long.parquet"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    found = streams(tmp_path / "out")
    val = val_documents(len(documents)).tolist()
    fast = load_tokenizer("gpt2")._fast
    expected = [t for n, text in enumerate(documents) if n not in val for t in [*fast.encode_ordinary(text), 50256]]
    assert found["train"].tolist() == expected
    meta = read_meta(tmp_path / "out")
    assert sum(meta.splits[split].bytes for split in SPLITS) == sum(len(text.encode()) for text in documents)
    assert meta.preparation["documents_with_replaced_utf8"] == 0


@pytest.mark.slow
def test_a_document_of_200_mb_is_encoded_in_bounded_memory(tmp_path):
    copies = 200_000_000 // len(LONG.encode())
    source = tmp_path / "long.parquet"
    write_parquet(source, [LONG * copies, "short", "shorter"])
    script = (
        "from data_prep.openwebtext import main\n"
        "from hgpt.tokenizer import load_tokenizer\n"
        "load_tokenizer('gpt2')\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line)\n"
        "before = peak()\n"
        f"assert main(['--source', {str(source)!r}, '--out', {str(tmp_path / 'out')!r}, '--workers', '1']) == 0\n"
        "print('grown', peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    grown = int(re.search(r"grown (\d+)", result.stdout)[1]) / 1e3  # MB
    # pyarrow takes three times the size of the document to read it, and Python holds it once. What encoding adds, which
    # as a whole would be another 200 MB of text and 200 of tokens, is small beside it.
    assert grown < 4 * 200 + 120
    tokens = len(load_tokenizer("gpt2")._fast.encode_ordinary(LONG))
    assert read_meta(tmp_path / "out").splits["train"].tokens >= copies * tokens


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


def test_ctrl_c_keeps_what_is_finished(tmp_path, source, monkeypatch, capsys):
    encode = sharding.UnitEncoder.__call__

    def interrupted(self, unit):
        if unit.number == 9:
            raise KeyboardInterrupt
        return encode(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(sharding.UnitEncoder, "__call__", interrupted)
        assert main(["--source", str(source), "--out", str(tmp_path / "out"), *SMALL]) == 130
    assert capsys.readouterr().err.endswith("interrupted: what is finished stays, the same command goes on\n")
    assert recorded_units(tmp_path / "out") == 9
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
        openwebtext.check_disk_space(tmp_path, 4e9, 10**8)
        with pytest.raises(UserError, match=r"will need about 9\.38 GB, and 9\.00 GB are free"):
            openwebtext.check_disk_space(tmp_path, 4.5e9, 10**8)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=40_000))
        assert "0.00 GB are free" in fails(capsys, "--source", source, "--out", tmp_path / "out", *SMALL)
    estimate = []
    monkeypatch.setattr(openwebtext, "check_disk_space", lambda out, tokens, size: estimate.append(tokens))
    run(source, tmp_path / "out")
    assert tokens < estimate[0] < 1.5 * tokens  # Parquet adds to row groups as small as these


LIMIT = 30_000  # bytes of a file: more than the tokenizer and the units have, less than a shard


def limited_run(source, out, limit, workers):
    for module in (text_files, sharding):
        module.SECTION_BYTES = 3000
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stderr = open(out.parent / "stderr", "w")  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    options = [*SMALL, "--tokens-per-shard", "100000", "--workers", str(workers)]
    sys.exit(main(["--source", str(source), "--out", str(out), *options]))


def test_a_write_that_fails_is_a_clean_error_and_can_be_gone_on_with(tmp_path, source):
    process = start_imports().Process(target=limited_run, args=(source, tmp_path / "out", LIMIT, 1))
    process.start()
    process.join()
    message = (tmp_path / "stderr").read_text()
    assert process.exitcode == 2 and "Traceback" not in message
    assert "failed: File too large. Mend that (a full disk: free space)" in message
    assert not list((tmp_path / "out").glob("*.bin")) and recorded_units(tmp_path / "out") > 10
    options = ("--tokens-per-shard", 100_000)
    expected = contents(run(source, tmp_path / "whole", *options))
    assert contents(run(source, tmp_path / "out", *options)) == expected


def test_a_folder_that_cannot_be_written(source, capsys):
    # Not even root may make a folder there.
    assert "cannot be written" in fails(capsys, "--source", source, "--out", "/sys/hgpt")
    (source.parent / "file").touch()
    assert "is a file" in fails(capsys, "--source", source, "--out", source.parent / "file")


# ------------------------------------------------------------------------------------------------------- parts


def test_parts_are_merged_into_the_same_streams(tmp_path, source, capsys):
    whole = run(source, tmp_path / "whole")
    out = tmp_path / "out"
    for part in (3, 1):
        run(source, out, "--part", f"{part}/3")
    assert "of 3 parts in" in (message := fails(capsys, "--out", out, "--merge")) and "2/3 is missing" in message
    run(source, out, "--part", "2/3")
    assert main(["--out", str(out), "--merge"]) == 0
    verify(out)
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
    verify(out)
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--part", "0/2"])
    assert "--part 400/1000: there is nothing left" in fails(
        capsys, "--source", source, "--out", tmp_path / "many", "--part", "400/1000", *SMALL
    )


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
        monkeypatch.setattr(sharding, "LONG_DOCUMENT", long)
        assert (
            read_meta(run(tmp_path / "a.jsonl", tmp_path / f"1_{long}")).preparation["documents_with_replaced_utf8"]
            == 1
        )
        folder = run(tmp_path / "b", tmp_path / f"2_{long}")
        assert read_meta(folder).preparation["documents_with_replaced_utf8"] == 1
        found = read_back(folder)
        assert {text[:8] for text in found["train"] + found["val"]} == {"par\ufffdquet"[:8], "\ufffd valid ", "x"}
        assert sum(s.bytes for s in read_meta(folder).splits.values()) == len(LONG.encode()) * 2 + 10 + 9 + 5
    assert contents(tmp_path / "1_10") == contents(tmp_path / f"1_{1 << 20}")


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
    assert "line 21" in printed and "line 31: not a JSON value" in printed
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
    write_parquet(tmp_path / "one.parquet", ["one"])
    assert "All the text is one document" in fails(
        capsys, "--source", tmp_path / "one.parquet", "--out", tmp_path / "o"
    )


# ------------------------------------------------------------------------------------------------------- summary


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
    """What data_prep needs of the Hugging Face hub, over HTTP: one data set, one revision."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "a" * 40
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        known = re.fullmatch(r"/api/datasets/Skylion007/openwebtext/revision/(.+?)(\?.*)?", self.path)
        if known and known[1] in ("refs%2Fpr%2F20", "refs/pr/20"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": "Skylion007/openwebtext", "sha": self.commit, "siblings": siblings, "tags": []}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)
        if known:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        match = re.fullmatch(rf"/datasets/Skylion007/openwebtext/resolve/{self.commit}/(.+)", self.path)
        if not match:
            return self.send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        content = self.files[match[1]]
        headers = {"ETag": f'"{match[1]}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.send(206, headers, content[start:], body)
        return self.send(200, headers, content, body)

    def send(self, status, headers, content, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
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
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
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
