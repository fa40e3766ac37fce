"""Files that are damaged or somebody else's: each reader refuses them with the name of the file and a way out."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from small_models import byte_pairs, export, run_of
from small_run import flip_a_bit
from small_texts import SMALL, fails, json_lines, prepared, read_back, refused, status, texts, write_parquet

import sample
from data_prep import documents, openwebtext
from data_prep import verify as verify_command
from data_prep.parts import Record
from data_prep.text_files import find_files
from hgpt.data.shards import TokenShards, fingerprint, read_meta, write_meta
from hgpt.data.tokenizer import load_tokenizer
from hgpt.data.verify import verify
from hgpt.interpret.corpus import Corpus, data_settings
from hgpt.interpret.relations import load_relations, read_relation
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import write_manifest
from hgpt.source import find_source, initialize_from, shape_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("whole") / "data", texts(60))


@pytest.fixture
def data(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


@pytest.fixture
def run(tmp_path):
    """A run with one checkpoint and its manifest."""
    run_of(tmp_path / "run", "", byte_pairs(300), {5: 16}, "harmonic")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000005"
    (checkpoint / "optimizer.safetensors").write_bytes(b"any")
    write_manifest(checkpoint)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------ JSON of any kind

READERS = {
    "meta.json": lambda path: read_meta(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(str(path)),
    "tokenizer_config.json": lambda path: load_tokenizer(str(path.parent)),
    "part.json": lambda path: Record.read(path.parent),
    "relation.json": read_relation,
    "config.json": lambda path: find_source(str(path.parent)).load_model(),
    "model/config.json": lambda path: find_source(str(path.parents[1])).load_config(),
    "state.json": lambda path: find_source(str(path.parent)),
    "manifest.json": lambda path: find_source(str(path.parent)).load_config(),
    "model/tokenizer.json": lambda path: find_source(str(path.parents[1])).load_tokenizer(),
}
CONTENTS = {
    "deep lists": b"[" * 200_000,
    "deep tables": b'{"a":' * 200_000,
    "nothing": b"",
    "half": b'{"model": ',
    "a list": b"[]",
    "text": b'"x"',
    "not UTF-8": b"\xff\xfe\xff",
    "a pickle": b"\x80\x04K\x01.",
    "a huge number": b'{"format_version": 1' + b"0" * 5000 + b"}",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_json_that_is_none(tmp_path, name, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "hgpt"}')
    if name == "tokenizer_config.json":
        byte_pairs(300).save(str(tmp_path / "tokenizer.json"))
        if content == "a huge number":
            return
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    if (name, content) == ("relation.json", "a list"):  # a relation without pairs
        assert read_relation(path).pairs == ()
        return
    message = refused(tmp_path, READERS[name], path)
    assert Path(name).name in message or Path(name).parent.name in message or name == "config.json"


def test_fifos_are_not_waited_for(data, tmp_path):
    for name in ("meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"):
        (data / name).rename(tmp_path / "away")
        os.mkfifo(data / name)
        refused(data / name, TokenShards.open, data, "val" if name.startswith("val") else "train")
        (tmp_path / "away").rename(data / name)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.txt", "relation.json", "val.bin", "fineweb_train_1.bin", "config.json"):
        os.mkfifo(other / name)
    refused("a.txt", find_files, [other / "a.txt"])
    refused("holds no text to read", find_files, [other])
    refused("relation.json", read_relation, other / "relation.json")
    refused("val.bin", TokenShards.open, other, "val", 300)
    refused("fineweb_train_1.bin", TokenShards.open, other, "train", 300)
    refused(other, find_source, str(other))


# ------------------------------------------------------------------------------------------------ a data folder


def changed(path, change):
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def of_train(**changes):
    return lambda meta: meta["splits"]["train"].update(changes)


META = [
    (lambda meta: meta.pop("vocab_size"), "vocab_size must be an integer, but is missing"),
    (lambda meta: meta.update(vocab_size="300"), "vocab_size must be an integer, but is '300'"),
    (lambda meta: meta.update(vocab_size=2**24 + 1), "16,777,216, not 16,777,217"),
    (lambda meta: meta.update(vocab_size=0), "must be at least 1"),
    (lambda meta: meta.update(vocab_size=301), "vocab_size 301"),
    (lambda meta: meta.update(end_of_text=300), "0 to 299, not 300"),
    (lambda meta: meta.update(end_of_text=298), "end_of_text 298"),
    (lambda meta: meta.update(format_version=2), "format_version is 2, this version of hgpt reads 1"),
    (lambda meta: meta["splits"].update(train=3), "splits.train must be a table, but is 3"),
    (lambda meta: meta["splits"].pop("train"), "no shards of the split 'train'; meta.json names val"),
    (of_train(tokens=9), "tokens is 9, but its shards sum to"),
    (of_train(documents=-1), "documents must not be negative"),
    (lambda meta: meta["splits"]["train"]["shards"][0].update(file="../x.bin"), "not a plain file name"),
    (lambda meta: meta["splits"]["train"].update(shards=2 * meta["splits"]["train"]["shards"]), "is named twice"),
]
OF_TOKENIZER = [
    (lambda meta: meta.update(end_of_text_token="the"), "end_of_text"),
    (lambda meta: meta.update(tokenizer_sha256="0" * 64), "checksum"),
    (lambda meta: meta.update(tokenizer_sha256=7), "tokenizer_sha256"),
]


@pytest.mark.parametrize(("change", "word"), META + OF_TOKENIZER, ids=[word for _, word in META + OF_TOKENIZER])
def test_meta_that_does_not_fit_its_folder(data, change, word):
    """Also that of an earlier version, which does not describe the tokenizer."""
    content = json.loads((data / "meta.json").read_bytes())
    earlier = {name: value for name, value in content.items() if name not in ("tokenizer_sha256", "end_of_text_token")}
    for meta in (content, earlier) if (change, word) in META else (content,):
        (data / "meta.json").write_text(json.dumps(meta))
        TokenShards.open(data, "train")
        changed(data / "meta.json", change)
        refused(("meta.json", word), TokenShards.open, data, "train")
        refused(("meta.json", word), verify, data)


TOKENIZERS = {
    "an id of 4 billion": lambda content: content["model"]["vocab"].update(a=4 * 10**9),
    "an id twice": lambda content: content["model"]["vocab"].update(a=content["model"]["vocab"]["b"]),
    "a negative id": lambda content: content["model"]["vocab"].update(a=-1),
    "an id that is a text": lambda content: content["model"]["vocab"].update(a="1"),
    "no vocabulary": lambda content: content["model"].pop("vocab"),
    "an unknown model": lambda content: content["model"].update(type="XXX"),
    "merges that are none": lambda content: content["model"].update(merges=[["qq", "zz"]]),
    "another token for an id": lambda content: content["added_tokens"][0].update(content="<x>"),
    "a token less": lambda content: [content["model"]["vocab"].pop("<|endoftext|>"), content["added_tokens"].clear()],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_read_when_data_are_opened(data, name):
    """Also without the checksum, which earlier versions did not write."""
    changed(data / "tokenizer.json", TOKENIZERS[name])
    for _ in range(2):
        refused(data / "tokenizer.json", TokenShards.open, data, "train")
        refused(data / "tokenizer.json", verify, data)
        changed(data / "meta.json", lambda meta: meta.pop("tokenizer_sha256", None))


def test_the_fingerprint_knows_the_tokenizer(data):
    def current():
        return fingerprint([TokenShards.open(data, split) for split in ("train", "val")], whole=False)

    meta, first = read_meta(data), current()
    assert meta.tokenizer_sha256 == hashlib.sha256((data / "tokenizer.json").read_bytes()).hexdigest()
    assert meta.end_of_text_token == "<|endoftext|>"
    changed(data / "tokenizer.json", lambda content: content.update(decoder=None))
    write_meta(data, replace(meta, tokenizer_sha256=hashlib.sha256((data / "tokenizer.json").read_bytes()).hexdigest()))
    assert current() != first
    (data / "tokenizer.json").unlink()
    refused(data / "tokenizer.json", current)


# ------------------------------------------------------------------------------------------------ names

NAMES = {"300 characters": "x" * 300, "NUL": "a\0b", "not UTF-8": "caf\udce9", "nowhere": "no/where"}
TAKE_A_NAME = {
    "checkpoint": lambda name: find_source("./" + name),
    "hub": lambda name: find_source(name).load_model() if len(name) > 99 else find_source("./" + name),
    "sample": lambda name: sample.main(["--checkpoint", "./" + name]),
    "prompt file": lambda name: sample.main(["--checkpoint", "x", "--prompt-file", name]),
    "init_from": lambda name: shape_of("./" + name),
    "data": lambda name: TokenShards.open(name, "train"),
    "data of a report": Corpus.open,
    "tokenizer": load_tokenizer,
    "relations": load_relations,
    "files": lambda name: find_files([name]),
    "source": lambda name: openwebtext.main(["--source", name, "--out", "/nowhere/x"]),
    "out": lambda name: documents.main(["--out", "/dev/null/" + name, __file__.replace(".py", ".txt")]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", TAKE_A_NAME)
def test_names_that_no_file_can_have(where, name):
    refused((), TAKE_A_NAME[where], NAMES[name])


@pytest.mark.parametrize("where", ["checkpoint", "init_from", "data", "tokenizer", "files", "sample"])
def test_folders_that_may_not_be_entered(monkeypatch, where):
    def stat(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    refused(("closed/folder", "Permission denied"), TAKE_A_NAME[where], "closed/folder")


# ------------------------------------------------------------------------------------------------ models


READ = [("load_model", "model.safetensors"), ("load_model", "config.json"), ("load_config", "config.json"),
        ("load_tokenizer", "tokenizer.json"), ("load_tokenizer", "tokenizer_config.json")]  # fmt: skip


@pytest.mark.parametrize(("load", "file"), READ)
def test_a_checkpoint_is_compared_with_its_manifest(run, load, file):
    checkpoint = run / "checkpoints" / "step_0000005"
    find_source(str(run)).load()
    flip_a_bit(checkpoint / "model" / file)
    for name in (run, checkpoint, checkpoint / "model"):
        refused((f"model/{file}", checkpoint), getattr(find_source(str(name)), load))
    refused(f"model/{file}", sample.main, ["--checkpoint", str(run)])
    if load == "load_model":
        refused(f"model/{file}", initialize_from, HGPTForCausalLM(HGPTConfig()), str(run))
    if load == "load_config":
        refused(f"model/{file}", shape_of, str(run))
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    refused("manifest.json", getattr(find_source(str(run)), load))


SETTINGS = [{"n_layer": 10**9}, {"n_embd": 10**6, "n_head": 1}, {"n_positions": 10**12}, {"vocab_size": 10**13},
            {"n_layer": "x"}, {"n_embd": -4}, {"n_head": 0}, {"head": ["harmonic"]}, {"distance_options": 3},
            {"model_type": "bert"}, {"model_type": "unknown"}, {"dtype": "x"}]  # fmt: skip


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_configurations_that_no_model_can_have(tmp_path, change):
    export(tmp_path, byte_pairs(300), "harmonic")
    changed(tmp_path / "config.json", lambda content: content.update(change))
    refused(tmp_path, find_source(str(tmp_path)).load_model)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    source = find_source(str(export(tmp_path, byte_pairs(300), "harmonic", rows=20_000)))
    size = 4 * source.load_model().num_parameters()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
    source.load_model()
    (tmp_path / "model.safetensors").unlink()
    refused(("memory", tmp_path), source.load_model, working_bytes=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
    refused(("memory", tmp_path), source.load_model)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"PK\x03\x04", b"", b"x" * 99], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_none(tmp_path, name, content):
    export(tmp_path, byte_pairs(300), "harmonic")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, find_source(str(tmp_path)).load_model)


def test_nobody_is_asked_whether_to_run_a_strangers_code(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    export(tmp_path, byte_pairs(300), "harmonic")
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "code.X")}
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    changed(tmp_path / "config.json", lambda content: content.update(code, model_type="strange"))
    changed(tmp_path / "tokenizer_config.json", lambda content: content.update(code, tokenizer_class="X"))
    source = find_source(str(tmp_path))
    for load in (source.load_config, source.load_model, source.load_tokenizer):
        refused(tmp_path, load)
    refused(tmp_path, shape_of, str(tmp_path))


# ------------------------------------------------------------------------------------------------ preparation


@pytest.mark.parametrize("main", [documents.main, openwebtext.main], ids=["documents", "openwebtext"])
def test_what_a_folder_holds_is_read_or_named(tmp_path, capsys, main):
    corpus, other, out = (tmp_path / name for name in ("corpus", "other", "out"))
    for folder in (corpus, other):
        folder.mkdir()
        for i in range(20):
            (folder / f"{i}.txt").write_text(f"{folder.name} {i} about files")
    for name, target in (("more", other), ("again", other), ("loop", corpus), ("dangling.txt", "nowhere")):
        (corpus / name).symlink_to(target)
    os.mkfifo(corpus / "pipe.txt")
    source = (corpus,) if main is documents.main else ("--source", corpus)
    for _ in range(2):  # repeating a finished preparation is no error
        assert status(main, "--out", out, *SMALL, *source) == 0
    printed = capsys.readouterr()
    assert sum(map(len, read_back(out).values())) == 40
    assert "dangling.txt" in printed.err and "pipe.txt" in printed.err and "was already prepared" in printed.out


def test_names_that_are_not_utf_8(tmp_path):
    (folder := tmp_path / "d\udce9").mkdir()
    (folder / "caf\udce9.jsonl").write_bytes(json_lines(texts(40)))
    write_parquet(tmp_path / "a.parquet", texts(20, seed=2))
    (tmp_path / "a.parquet").rename(folder / "\udce9.parquet")
    for _ in range(2):
        assert status(documents.main, "--out", tmp_path / "out", *SMALL, folder) == 0
    assert "caf\ufffd.jsonl" in read_meta(tmp_path / "out").source
    TokenShards.open(tmp_path / "out", "val")


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        *((main, ("--val-fraction", value), f"--val-fraction must lie between 0 and 1, not {float(value)}")
          for main in (documents.main, openwebtext.main) for value in ("0", "1.5", "nan", "inf")),
        *((main, ("--seed", value), f"--seed must be from 0 to 2^64 - 1, not {value}")
          for main in (documents.main, openwebtext.main) for value in ("-1", str(2**64))),
        (documents.main, ("--tokens-per-shard", str(2**31)), "--tokens-per-shard must be at least 1 and below 2^31"),
        (documents.main, ("--tokens-per-shard", "0"), "--tokens-per-shard must be at least 1"),
        (documents.main, ("--workers", "0"), "--workers must be at least 1"),
        (documents.main, ("--tokenizer", "bpe:7"), "'bpe:7': bpe:N takes"),
        (documents.main, ("--separator", "x"), "--separator has no effect"),
        (documents.main, ("--separator", ""), "--separator: must not be empty"),
        (documents.main, ("--separator", "\udcff"), "--separator"),
        (documents.main, ("--separator", r"\x"), "--separator"),
        (documents.main, ("--text-column", "body"), "no JSON object with a field 'body'"),
        (openwebtext.main, ("--revision", "main"), "--revision main has no effect on --source"),
        (openwebtext.main, ("--part", "0/2"), "must be I/K"),
        (openwebtext.main, ("--source", "no where"), "is neither a folder"),
        (verify_command.main, ("--decode", str(10**30)), "--decode must be at least 0"),
        (verify_command.main, ("--decode", "-1"), "--decode must be at least 0"),
        (verify_command.main, ("--vocab-size", str(10**30)), "vocab_size"),
        (sample.main, ("--num-samples", str(10**9)), "num"),
        (sample.main, ("--num-samples", str(10**30)), "num"),
    ],
    ids=lambda value: value.__module__ if callable(value) else str(value),
)  # fmt: skip
def test_options_out_of_range(whole, tmp_path, command, option, message, capsys):
    source = whole.with_name("data.jsonl")
    words = {
        documents.main: ("--out", tmp_path / "out", source, "--tokenizer", "bpe:300"),
        openwebtext.main: ("--out", tmp_path / "out", "--source", source),
        verify_command.main: (whole,),
        sample.main: ("--checkpoint", whole),
    }
    assert message in fails(capsys, command, *words[command], *option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[" * 9999, "x = ", "data = 3", "[data]\npath = 3", '[data]\nvocab_size = "x"'])
def test_a_configuration_of_a_run_that_is_none(run, content):
    (run / "config.toml").write_text(content)
    refused(run / "config.toml", data_settings, find_source(str(run)))


def test_memory_that_runs_out_while_sampling(run, monkeypatch):
    for name in ("to", "generate"):
        with monkeypatch.context() as patch:
            patch.setattr(HGPTForCausalLM, name, lambda *_, **__: torch.empty(10**16))
            refused("cpu ran out of memory", sample.main, ["--checkpoint", str(run), "--prompt", "with"])


@pytest.mark.slow
def test_tqdm_can_be_disabled(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts(40)))
    command = [sys.executable, "-m", "data_prep.documents", "--out", str(tmp_path / "out"), *SMALL, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"written to        {tmp_path / 'out'}", done.stderr
    assert len(np.unique(TokenShards.open(tmp_path / "out", "train").read(0, 20))) > 5
