"""data_prep: files → documents → shards and back, the split, and every bad input."""

import gzip
import json
import os
import random
import re
import sysconfig
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import documents as documents_module
from data_prep import python_docs as python_docs_module
from data_prep.documents import SplitRule, find_files, prepare, read_documents
from hgpt.cli import run
from hgpt.data.shards import SPLITS, TokenShards, read_meta, verify
from hgpt.data.tokenizer import load_tokenizer
from hgpt.errors import UserError

main = partial(run, documents_module.main)

WORDS = ["distance", "centre", "token", "model", "exponent", "<|endoftext|>", "naïve", "日本", "loss", "norm"]


def texts(number, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(number)]


def read_back(folder):
    """{split: documents} of a data folder, decoded from its shards with its own tokenizer.json."""
    tokenizer = load_tokenizer(str(folder))
    found = {}
    for split in SPLITS:
        shards = TokenShards.open(folder, split)
        stream = shards.read(0, len(shards))
        ends = np.flatnonzero(stream == shards.end_of_text)
        assert ends[-1] == len(stream) - 1, "each document ends with end-of-text"
        found[split] = [tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise([-1, *ends])]
    return found


def prepared(folder, documents, **settings):
    settings = {"tokenizer": "bpe:300", "split": SplitRule(val_fraction=0.2), "source": "test", **settings}
    prepare(lambda: (text.encode() for text in documents), folder, **settings)
    return folder


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=7)


def fails(capsys, *arguments, main=main):
    """The message of a run that must fail with exit status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message[message.index("error: ") :]


# -------------------------------------------------------------------------------------------------- the core


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:300"])
def test_shards_decode_to_the_documents_in_order(tmp_path, tokenizer):
    documents = texts(200)
    folder = prepared(tmp_path / "new" / "data", documents, tokenizer=tokenizer, tokens_per_shard=1000)
    verify(folder)
    found = read_back(folder)
    rule = SplitRule(val_fraction=0.2)
    for split in SPLITS:
        assert found[split] == [text for text in documents if rule.side(rule.place(text)) == split]
    meta = read_meta(folder)
    assert len(meta.splits["train"].shards) > 1
    for split in SPLITS:
        assert meta.splits[split].documents == len(found[split])
        assert meta.splits[split].bytes == sum(len(text.encode()) for text in found[split])
        assert meta.splits[split].tokens == len(TokenShards.open(folder, split))
    assert (meta.tokenizer, meta.source) == (tokenizer, "test")
    assert meta.preparation["val_fraction"] == 0.2 and {"hgpt", "tiktoken"} <= meta.packages.keys()


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "FEW_BATCHES", 0)  # even this little text goes to the workers
    monkeypatch.setattr(documents_module, "BATCH_BYTES", 2000)
    documents = texts(300)
    for workers in (1, 2):
        prepared(tmp_path / str(workers), documents, workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_split_never_leaks(tmp_path):
    originals = texts(300)
    copies = [text.replace(" ", "\n  ") + "\n" for text in originals]  # other white space
    documents = originals + copies + originals
    random.Random(1).shuffle(documents)
    found = read_back(prepared(tmp_path / "data", documents))
    train, val = ({" ".join(text.split()) for text in found[split]} for split in SPLITS)
    assert not train & val and len(train | val) == 300
    assert 30 < len(val) < 90  # 60 expected, standard deviation 7


def test_split_depends_on_the_seed_and_on_the_document_alone(tmp_path):
    documents = texts(300)

    def val(name, documents, **rule):
        folder = prepared(tmp_path / name, documents, split=SplitRule(val_fraction=0.1, **rule))
        return set(read_back(folder)["val"])

    first = val("first", documents)
    assert val("reversed", documents[::-1]) == first
    assert val("more", documents + texts(50, seed=9)) >= first
    assert val("seed", documents, seed=1) != first


def test_tokenizer_is_trained_on_the_train_side_alone(tmp_path):
    documents = texts(300)
    rule = SplitRule(val_fraction=0.2)
    train = [text for text in documents if rule.side(rule.place(text)) == "train"]
    folder = prepared(tmp_path / "data", documents, split=rule)
    expected = load_tokenizer("bpe:300", lambda: train).save(tmp_path)
    assert (folder / "tokenizer.json").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("error", [UserError("broken"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_nothing_is_left_of_a_preparation_that_fails(tmp_path, error):
    def broken():
        for text in texts(3000):
            yield text.encode()
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    settings = {"tokenizer": "gpt2", "split": SplitRule(), "source": "test", "tokens_per_shard": 1000}
    with pytest.raises(expected):
        prepare(broken, tmp_path / "a" / "b", **settings)
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(expected):
        prepare(broken, tmp_path / "empty", **settings)
    assert not list((tmp_path / "empty").iterdir())


def test_ctrl_c_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(encoder, batches, workers):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(documents_module, "_encode_in_order", interrupted)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    assert main(["--out", str(tmp_path / "out"), str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_killed_worker_is_reported(tmp_path, monkeypatch):
    def killed(encoder, batches, workers):
        raise documents_module.BrokenProcessPool
        yield

    monkeypatch.setattr(documents_module, "_encode_in_order", killed)
    with pytest.raises(UserError, match=r"memory ran out.*fewer --workers"):
        prepared(tmp_path / "data", texts(9), tokenizer="gpt2")


def test_out_is_never_overwritten(tmp_path):
    folder = prepared(tmp_path / "data", texts(50))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds a prepared data set already"):
        prepared(folder, texts(50))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"not empty \(it holds tokenizer\.json, \.\.\.\).*killed"):
        prepared(folder, texts(50))
    with pytest.raises(UserError, match="is a file"):
        prepared(folder / "tokenizer.json", texts(50))


def test_a_split_that_leaves_a_side_empty_says_what_helps(tmp_path):
    documents = texts(5)
    with pytest.raises(UserError, match=r"None of the 5 .* val side .* raise it to 0\.\d+") as caught:
        prepared(tmp_path / "data", documents, split=SplitRule(val_fraction=1e-6))
    helps = float(str(caught.value).split("raise it to ")[1].split()[0])
    assert len(read_back(prepared(tmp_path / "up", documents, split=SplitRule(val_fraction=helps)))["val"]) == 1
    with pytest.raises(UserError, match=r"train side .* lower it to 0\.\d+") as caught:
        prepared(tmp_path / "data", documents, split=SplitRule(val_fraction=1 - 1e-6))
    helps = float(str(caught.value).split("lower it to ")[1].split()[0])
    assert len(read_back(prepared(tmp_path / "lo", documents, split=SplitRule(val_fraction=helps)))["train"]) == 1
    with pytest.raises(UserError, match="All the text is one document"):
        prepared(tmp_path / "data", ["one"])
    with pytest.raises(UserError, match="There is no text: 2 empty documents"):
        prepared(tmp_path / "data", ["", " \n"])
    assert not (tmp_path / "data").exists()


def test_vocabulary_that_does_not_fit_is_refused(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(65_534)}}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}})
    )
    with pytest.raises(UserError, match=r"65,536 tokens does not fit the shard format.*until a uint32 version"):
        prepared(tmp_path / "data", texts(9), tokenizer=str(tmp_path))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("rule", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"seed": -1}])
def test_bad_split_rules(rule):
    with pytest.raises(UserError, match=f"--{next(iter(rule)).replace('_', '-')}"):
        SplitRule(**rule)


# ------------------------------------------------------------------------------------------- files and documents


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    documents = texts(40)
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in documents).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))
    frames = zstandard.compress(lines[:999]) + zstandard.compress(lines[999:])
    (tmp_path / "c.JSONL.zst").write_bytes(frames)
    write_parquet(tmp_path / "d.parquet", id=range(40), text=documents)
    write_parquet(tmp_path / "e.parquet", text=pa.array(documents, pa.large_string()))
    write_parquet(tmp_path / "f.parquet", text=pa.array(documents).dictionary_encode())
    for name in ("a.jsonl", "b.jsonl.gz", "c.JSONL.zst", "d.parquet", "e.parquet", "f.parquet"):
        assert [text.decode() for text in read_documents([tmp_path / name])] == documents, name
    text = documents[0].encode()
    (tmp_path / "g.txt").write_bytes(b"\xef\xbb\xbf" + text)  # a byte order mark is no text
    (tmp_path / "h.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "i.txt.zst").write_bytes(zstandard.compress(text))
    for name in ("g.txt", "h.txt.gz", "i.txt.zst"):
        assert list(read_documents([tmp_path / name])) == [text], name


def test_folders_are_searched_in_sorted_order_and_files_taken_once(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.jsonl", "README.md", ".hidden/x.txt", "b/.y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, ignored = find_files([tmp_path / "c.jsonl", tmp_path, tmp_path / "b"])
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a.txt", "b/10.txt", "b/2.txt", "c.jsonl"]
    assert [path.name for path in ignored] == ["README.md"]


def test_command_line(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", content=[*texts(300), "", None, "  "])
    arguments = ["--tokenizer", "bpe:300", "--text-column", "content", "--val-fraction", "0.1", "--workers", "2"]
    assert main(["--out", str(tmp_path / "data"), *arguments, str(tmp_path)]) == 0
    table = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in table.splitlines()}
    assert rows["documents"].split()[-1] == "300" and rows["skipped, empty"].split()[-1] == "3"
    assert "documents/s" in table and "tokens/s" in table and "MB/s" in table
    found = read_back(tmp_path / "data")
    assert sorted(found["train"] + found["val"]) == sorted(texts(300))


def test_invalid_utf8_is_replaced_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"bro\xffken")
    lines = [b'{"text": "also \xfe\xfe broken"}', b'{"text": "lone \\ud800 surrogate"}', b'{"text": "fine"}']
    (tmp_path / "b.jsonl").write_bytes(b"\n\n".join(lines))
    column = pa.array([b"par\xc3quet"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    assert main(["--out", str(tmp_path / "d"), "--val-fraction", "0.5", "--seed", "3", str(tmp_path)]) == 0
    assert "invalid UTF-8     4 documents" in capsys.readouterr().out
    assert read_meta(tmp_path / "d").preparation["documents_with_replaced_utf8"] == 4
    found = read_back(tmp_path / "d")
    expected = {"bro\ufffdken", "also \ufffd\ufffd broken", "lone \ufffd\ufffd\ufffd surrogate", "fine"}
    assert {*found["train"], *found["val"]} == expected | {"par\ufffdquet"}
    total = sum(read_meta(tmp_path / "d").splits[split].bytes for split in SPLITS)
    assert total == sum(len(text.encode()) for text in found["train"] + found["val"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: cannot be read as JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]\n', r"line 2: no JSON object with a field 'text'"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1: .* has the keys body, id.*--text-column"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' must be a string, not int"),
        ("a.txt", b"\xff\xfea\x00", "UTF-16.*iconv"),
        ("a.pdf", b"x", r"cannot tell from its name.*\.txt, \.jsonl, \.parquet"),
        ("a.parquet.gz", b"x", "cannot tell from its name"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-12], r"a\.txt\.gz cannot be read"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst cannot be read"),
        ("a.txt.zst", zstandard.compress(random.Random(0).randbytes(99999))[:-2000], r"zst cannot be read.*run"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read"),
    ],
)
def test_bad_files(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(f"(?s){message}", fails(capsys, "--out", tmp_path / "out", tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_parquet_without_the_text_column(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", content=["x"], number=[1])
    message = fails(capsys, "--out", tmp_path / "out", tmp_path)
    assert "no column 'text'; its columns are content, number" in message and "--text-column" in message
    message = fails(capsys, "--out", tmp_path / "out", "--text-column", "number", tmp_path)
    assert "the column 'number' holds int64, not text" in message


def test_bad_command_lines(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "nowhere does not exist" in fails(capsys, *out, tmp_path / "nowhere")
    assert "holds no text to read" in fails(capsys, *out, tmp_path)
    write_parquet(tmp_path / "a.parquet", text=texts(30))
    assert "'bpe:7': bpe:N takes" in fails(capsys, *out, "--tokenizer", "bpe:7", tmp_path)
    assert "--workers must be at least 1" in fails(capsys, *out, "--workers", "0", tmp_path)
    assert "tokens_per_shard must be at least 1" in fails(capsys, *out, "--tokens-per-shard", "0", tmp_path)
    assert "--val-fraction must lie" in fails(capsys, *out, "--val-fraction", "2", tmp_path)
    assert not (tmp_path / "out").exists()


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
    monkeypatch.setattr(python_docs_module, "python_docs", lambda: corpus)
    assert run(python_docs_module.main, ["--out", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    verify(tmp_path / "data")
    meta = read_meta(tmp_path / "data")
    assert (meta.vocab_size, meta.end_of_text, meta.tokenizer) == (2048, 2047, "bpe:2048")
    assert meta.source_revision.startswith("Python 3.")
    assert meta.splits["val"].tokens > 20_000 and meta.splits["train"].tokens > 400_000
    (line,) = [line for line in printed.splitlines() if line.startswith("unigram model")]
    assert 5.5 < float(line.split()[2]) < np.log(2048)
    message = fails(capsys, "--out", tmp_path / "data", main=partial(run, python_docs_module.main))
    assert "holds a prepared data set already" in message


def test_separator_cuts_a_text_file_into_documents(tmp_path, capsys):
    plays = [f"Scene {number}.\nEnter the king, number {number}, and speaks.\n" for number in range(40)]
    file = tmp_path / "input.txt"
    file.write_text("\n".join(plays), encoding="utf-8")
    assert main(["--out", str(tmp_path / "one"), "--tokenizer", "bpe:300", str(file)]) == 2
    assert r"--separator '\n\n'" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()

    out = tmp_path / "out"
    arguments = [
        "--out",
        str(out),
        "--tokenizer",
        "bpe:300",
        "--val-fraction",
        "0.2",
        "--separator",
        r"\n\n",
        str(file),
    ]
    assert main(arguments) == 0
    meta = read_meta(out)
    assert sum(split.documents for split in meta.splits.values()) == len(plays)
    tokenizer = load_tokenizer(str(out))
    text = "".join(
        tokenizer.decode(TokenShards.open(out, split).read(0, meta.splits[split].tokens)) for split in SPLITS
    )
    documents = text.split("<|endoftext|>")[:-1]
    assert sorted(document.strip() for document in documents) == sorted(play.strip() for play in plays)

    table = tmp_path / "table.jsonl"
    table.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert main(["--out", str(tmp_path / "no"), "--separator", "x", str(table)]) == 2
    assert "--separator has no effect" in capsys.readouterr().err
