"""data_prep.documents and data_prep.python_docs: files to shards and back, the split, and every bad input."""

import json
import os
import random
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_texts import SMALL, contents, fails, json_lines, prepared, read_back, small_units, status, texts

from data_prep import python_docs as python_docs_module
from data_prep.documents import main
from data_prep.splits import HashSplit
from hgpt.data.shards import SPLITS, TokenShards, read_meta
from hgpt.data.tokenizer import load_tokenizer
from hgpt.data.verify import verify

TEXTS = texts(300)


def refused(capsys, tmp_path, documents, *options):
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    message = fails(capsys, main, "--out", tmp_path / "out", *SMALL, *options, tmp_path / "a.jsonl")
    assert not (tmp_path / "out").exists()
    return message


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
def test_shards_decode_to_the_documents_in_order(tmp_path, tokenizer):
    folder = prepared(tmp_path / "data", TEXTS, "--tokenizer", tokenizer, "--tokens-per-shard", 1000)
    verify(folder)
    found = read_back(folder)
    split = HashSplit(val_fraction=0.2)
    meta = read_meta(folder)
    assert len(meta.splits["train"].shards) > 1
    for side in SPLITS:
        assert found[side] == [text for text in TEXTS if split.side(0, text) == side]
        assert meta.splits[side].documents == len(found[side])
        assert meta.splits[side].bytes == sum(len(text.encode()) for text in found[side])
        assert meta.splits[side].tokens == len(TokenShards.open(folder, side))
    assert (meta.tokenizer, meta.source) == (tokenizer, "data.jsonl")
    assert meta.preparation["val_fraction"] == 0.2 and {"hgpt", "tiktoken"} <= meta.packages.keys()
    # A tokenizer is trained on the train side alone.
    expected = load_tokenizer(tokenizer, lambda: found["train"]).save(tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == expected.read_bytes()


def test_split_never_leaks(tmp_path):
    copies = [text.replace(" ", "\n  ") + "\n" for text in TEXTS]  # other white space
    documents = TEXTS + copies + TEXTS
    random.Random(1).shuffle(documents)
    found = read_back(prepared(tmp_path / "data", documents))
    train, val = ({" ".join(text.split()) for text in found[side]} for side in SPLITS)
    assert not train & val and len(train | val) == 300
    assert 30 < len(val) < 90  # 60 expected, standard deviation 7


def test_split_depends_on_the_seed_and_on_the_document_alone():
    # Pinned: another split would validate on what was trained on before.
    assert HashSplit(seed=3).hash("a  b\n") == HashSplit(seed=3).hash("a b") == 0.6560062447162456
    split, other = HashSplit(val_fraction=0.1), HashSplit(val_fraction=0.1, seed=1)
    assert [split.side(place, text) for place, text in enumerate(TEXTS)] == [split.side(0, text) for text in TEXTS]
    assert [split.side(0, text) for text in TEXTS] != [other.side(0, text) for text in TEXTS]


def test_a_split_that_leaves_a_side_empty_says_what_helps(tmp_path, capsys):
    documents = texts(5)
    for fraction, side, way in (("1e-6", "val", "raise it to "), ("0.999999", "train", "lower it to ")):
        message = refused(capsys, tmp_path, documents, "--val-fraction", fraction)
        assert f"None of the 5 documents fell on the {side} side" in message
        helps = message.split(way)[1].split()[0]
        assert len(read_back(prepared(tmp_path / side, documents, "--val-fraction", helps))[side]) == 1
    assert "All the text is one document" in refused(capsys, tmp_path, ["one"])
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").touch()
    out = ("--out", tmp_path / "out", "--separator", "###")
    assert "error: --separator '###' does not occur. All" in fails(capsys, main, *out, tmp_path / "a.txt")
    assert "b.txt holds no documents" in fails(capsys, main, *out, tmp_path / "b.txt")
    assert "All the text is one document" in refused(capsys, tmp_path, ["one", " "])
    assert "There is no text: 2 empty documents" in refused(capsys, tmp_path, ["", " \n"])
    for fraction in ("1e-6", "0.999999"):
        message = refused(capsys, tmp_path, ["one text", "one\ntext", "one text"], "--val-fraction", fraction)
        assert "All 3 documents have the same words" in message and "raise" not in message and "lower" not in message


def test_a_vocabulary_that_is_too_large(tmp_path, capsys):
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1, "a": 1 << 24}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "the id of token 'a' is 16777216" in refused(capsys, tmp_path, TEXTS, "--tokenizer", tmp_path)


def test_files_of_every_kind_are_taken_together(tmp_path, capsys):
    (source := tmp_path / "source").mkdir()
    pq.write_table(pa.table({"content": [*TEXTS[:100], "", None, "  "]}), source / "a.parquet")
    (source / "b.jsonl").write_bytes(json_lines(TEXTS[100:200]).replace(b'"text": ', b'"content": '))
    (source / "c.txt").write_text("\n---\n".join(TEXTS[200:]))
    for name in ("d.txt", "README.md"):
        (source / name).touch()
    options = [*SMALL, "--text-column", "content", "--separator", r"\n---\n", "--workers", "2"]
    assert status(main, "--out", tmp_path / "out", *options, source) == 0
    printed = capsys.readouterr()
    rows = {line.split("  ")[0]: line for line in printed.out.splitlines()}
    assert rows["documents"].split()[-1] == "300" and "4 documents" in rows["skipped, empty"]
    assert "documents/s" in printed.out and "tokens/s" in printed.out and "MB/s" in printed.out
    assert "left out 1 files of other kinds: README.md" in printed.err
    described = read_meta(tmp_path / "out").preparation
    assert described["skipped_empty_documents"] == 4 and described["text_column"] == "content"
    assert read_back(tmp_path / "out") == read_back(prepared(tmp_path / "data", TEXTS))


def test_invalid_utf8_is_replaced_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"bro\xffken")
    lines = [b'{"text": "also \xfe\xfe broken"}', b'{"text": "lone \\ud800 surrogate"}', '{"text": "fine \ufffd"}']
    (tmp_path / "b.jsonl").write_bytes(b"\n\n".join([*lines[:2], lines[2].encode()]))
    column = pa.array([b"par\xc3quet"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    assert status(main, "--out", tmp_path / "d", *SMALL, "--val-fraction", "0.5", "--seed", "3", tmp_path) == 0
    assert "invalid UTF-8     4 documents" in capsys.readouterr().out
    assert read_meta(tmp_path / "d").preparation["documents_with_replaced_utf8"] == 4
    found = read_back(tmp_path / "d")
    expected = {"bro\ufffdken", "also \ufffd\ufffd broken", "lone \ufffd\ufffd\ufffd surrogate", "fine \ufffd"}
    assert {*found["train"], *found["val"]} == expected | {"par\ufffdquet"}
    total = sum(read_meta(tmp_path / "d").splits[side].bytes for side in SPLITS)
    assert total == sum(len(text.encode()) for text in found["train"] + found["val"])


def test_what_cannot_be_used_is_left_out_and_named_if_asked(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b'{"text": 3}\n')
    arguments = ["--out", tmp_path / "out", *SMALL, tmp_path / "a.jsonl"]
    assert "a.jsonl, line 301" in fails(capsys, main, *arguments)
    (tmp_path / "b.jsonl").write_text("plain text\nof two lines")
    message = fails(capsys, main, *arguments[:-1], "--skip-bad", tmp_path / "b.jsonl")
    assert "There is no text" in message and "name the file .txt if it is plain text" in message
    assert status(main, *arguments, "--skip-bad") == 0
    assert "a.jsonl, line 301" in capsys.readouterr().out
    assert "line 301" in str(read_meta(tmp_path / "out").preparation["left_out"])


# -------------------------------------------------------------------------------------------- the embedded corpus


@pytest.fixture(scope="module")
def corpus():
    return python_docs_module.python_docs()


def test_python_docs_are_documentation(corpus):
    assert len(corpus) > 1000 and sum(map(len, corpus)) > 1_500_000
    assert len(set(corpus)) == len(corpus)
    (wrapper,) = [text for text in corpus if text.startswith("class textwrap.TextWrapper\n\n    Object for")]
    assert "\n\ntextwrap.TextWrapper.wrap(self, text)\n\n    wrap(text : string) -> [string]\n" in wrapper
    assert any(text.startswith("module textwrap\n\n    Text wrapping and filling.\n") for text in corpus)
    assert any(text.startswith('The "assert" statement\n****') for text in corpus)
    headings = [text.split("\n")[0] for text in corpus]
    for excluded in ("test.", "idlelib.idle_test", "site-packages", "pip."):
        assert not any(heading.startswith((f"module {excluded}", f"class {excluded}")) for heading in headings)


def test_python_docs_do_not_depend_on_the_order_of_the_file_system(monkeypatch):
    stdlib = Path(sysconfig.get_path("stdlib"))
    modules = python_docs_module._modules(stdlib)
    walk = os.walk

    def shuffled(top):
        for folder, subfolders, files in walk(top):
            random.shuffle(subfolders)
            random.shuffle(files)
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", shuffled)
    assert python_docs_module._modules(stdlib) == modules


def test_python_docs_command_line(tmp_path, capsys, corpus, monkeypatch):
    monkeypatch.setattr(python_docs_module, "python_docs", lambda: corpus[::4])
    small_units(monkeypatch)
    assert status(python_docs_module.main, "--out", tmp_path / "data", "--tokenizer", "bpe:500", "--workers", 1) == 0
    printed = capsys.readouterr().out
    verify(tmp_path / "data")
    meta = read_meta(tmp_path / "data")
    assert (meta.vocab_size, meta.end_of_text, meta.tokenizer) == (500, 499, "bpe:500")
    assert meta.source_revision.startswith("Python 3.") and "text_column" not in meta.preparation
    assert sum(split.documents for split in meta.splits.values()) == len(corpus[::4])
    (line,) = [line for line in printed.splitlines() if line.startswith("unigram model")]
    assert 4 < float(line.split()[2]) < np.log(500)
    before = contents(tmp_path / "data")
    assert status(python_docs_module.main, "--out", tmp_path / "data", "--tokenizer", "bpe:500") == 0
    assert "was already prepared" in capsys.readouterr().out and contents(tmp_path / "data") == before
