"""Files that are damaged or somebody else's: each reader refuses them with the name of the file and a way out."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from small_models import byte_pairs, export, run_of
from small_texts import fails, json_lines, read_back, status, texts
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

import sample
from data_prep import documents, openwebtext
from data_prep import verify as verify_command
from data_prep.parts import Record
from data_prep.text_files import find_files
from hgpt.data.shards import TokenShards, fingerprint, read_meta, write_meta
from hgpt.data.tokenizer import hf_tokenizer, load_tokenizer
from hgpt.data.verify import verify
from hgpt.errors import UserError
from hgpt.interpret.corpus import Corpus, data_settings
from hgpt.interpret.relations import load_relations, read_relation
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import write_manifest
from hgpt.source import find_source, initialize_from, shape_of

SMALL = ("--tokenizer", "bpe:300", "--val-fraction", "0.2", "--workers", "1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_bytes(json_lines(texts(60)))
    assert status(documents.main, "--out", folder / "data", *SMALL, folder / "a.jsonl") == 0
    return folder / "data"


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint and its manifest."""
    run_of(tmp_path / "run", "", byte_pairs(300), {5: 16}, "harmonic")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000005"
    (checkpoint / "optimizer.safetensors").write_bytes(b"any")
    write_manifest(checkpoint)
    return tmp_path / "run"


def refused(call: Callable[[], object], *words: object) -> str:
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert str(word) in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ JSON of any kind

READERS: dict[str, Callable[[Path], object]] = {
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
def test_json_that_is_none(tmp_path: Path, name: str, content: str) -> None:
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
    message = refused(lambda: READERS[name](path), tmp_path)
    assert Path(name).name in message or Path(name).parent.name in message or name == "config.json"


def test_fifos_are_not_waited_for(data: Path, tmp_path: Path) -> None:
    for name in ("meta.json", "tokenizer.json", "train_000000.bin", "val_000000.bin"):
        (data / name).rename(tmp_path / "away")
        os.mkfifo(data / name)
        split = "val" if name.startswith("val") else "train"
        refused(lambda split=split: TokenShards.open(data, split), data / name)
        (tmp_path / "away").rename(data / name)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.txt", "relation.json", "val.bin", "fineweb_train_1.bin", "config.json"):
        os.mkfifo(other / name)
    refused(lambda: find_files([other / "a.txt"]), "a.txt")
    refused(lambda: find_files([other]), "holds no text to read")
    refused(lambda: read_relation(other / "relation.json"), "relation.json")
    for split, name in (("val", "val.bin"), ("train", "fineweb_train_1.bin")):
        refused(lambda split=split: TokenShards.open(other, split, 300), name)
    refused(lambda: find_source(str(other)), other)


# ------------------------------------------------------------------------------------------------ a data folder


def changed(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


META: list[tuple[Callable[[Any], object], str]] = [
    (lambda meta: meta.update(end_of_text=298), "end_of_text 298"),
    (lambda meta: meta.update(vocab_size=301), "vocab_size 301"),
    (lambda meta: meta.update(end_of_text_token="the"), "end_of_text"),
    (lambda meta: meta.update(tokenizer_sha256="0" * 64), "checksum"),
    (lambda meta: meta.update(tokenizer_sha256=7), "tokenizer_sha256"),
    (lambda meta: meta["splits"]["train"].update(documents=-1), "documents"),
    (lambda meta: meta["splits"]["train"].update(shards=2 * meta["splits"]["train"]["shards"]), "train_000000.bin"),
]


@pytest.mark.parametrize(("change", "word"), META, ids=[word for _, word in META])
def test_meta_that_does_not_fit_its_folder(data: Path, change: Callable[[Any], object], word: str) -> None:
    """Also that of an earlier version, which does not describe the tokenizer."""
    content = json.loads((data / "meta.json").read_bytes())
    for left_out in ((), ("tokenizer_sha256", "end_of_text_token")):
        if left_out and ("sha256" in word or word in ("checksum", "end_of_text")):
            return
        meta = {name: value for name, value in content.items() if name not in left_out}
        (data / "meta.json").write_text(json.dumps(meta))
        TokenShards.open(data, "train")
        changed(data / "meta.json", change)
        refused(lambda: TokenShards.open(data, "train"), "meta.json", word)
        refused(lambda: verify(data), "meta.json", word)


TOKENIZERS: dict[str, Callable[[Any], object]] = {
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
def test_tokenizers_are_read_when_data_are_opened(data: Path, name: str) -> None:
    """Also without the checksum, which earlier versions did not write."""
    changed(data / "tokenizer.json", TOKENIZERS[name])
    for _ in range(2):
        refused(lambda: TokenShards.open(data, "train"), data / "tokenizer.json")
        refused(lambda: verify(data), data / "tokenizer.json")
        changed(data / "meta.json", lambda meta: meta.pop("tokenizer_sha256", None))


def test_the_fingerprint_knows_the_tokenizer(data: Path) -> None:
    def current() -> str:
        return fingerprint([TokenShards.open(data, split) for split in ("train", "val")], whole=False)

    meta, first = read_meta(data), current()
    assert meta.tokenizer_sha256 == hashlib.sha256((data / "tokenizer.json").read_bytes()).hexdigest()
    assert meta.end_of_text_token == "<|endoftext|>"
    changed(data / "tokenizer.json", lambda content: content.update(decoder=None))
    write_meta(data, replace(meta, tokenizer_sha256=hashlib.sha256((data / "tokenizer.json").read_bytes()).hexdigest()))
    assert current() != first
    (data / "tokenizer.json").unlink()
    refused(current, data / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\x93NUMPY\x01\x00v\x00", ".npy"),
        (b"PK\x03\x04", "zip"),
        ((20240801).to_bytes(4, "little") + (7).to_bytes(4, "little"), "says 0 tokens"),
        ((20240520).to_bytes(4, "little") + (2).to_bytes(4, "little"), "version 2"),
        (b"", "starts with 0"),
    ],
)
def test_shards_of_others_are_named_and_never_deleted(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "x_train_000001.bin").write_bytes(content.ljust(2000 if content else 0, b"\0"))
    assert "elete" not in refused(lambda: TokenShards.open(tmp_path, "train", 300), "x_train_000001.bin", word)
    (tmp_path / "x_train_000001.bin").rename(tmp_path / "pytorch_model.bin")
    assert "elete" not in refused(lambda: TokenShards.open(tmp_path, "train", 300), tmp_path, "no token shards")


# ------------------------------------------------------------------------------------------------ names

NAMES = {"300 characters": "x" * 300, "NUL": "a\0b", "not UTF-8": "caf\udce9", "nowhere": "no/where"}
TAKE_A_NAME: dict[str, Callable[[str], object]] = {
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
def test_names_that_no_file_can_have(where: str, name: str) -> None:
    refused(lambda: TAKE_A_NAME[where](NAMES[name]))


@pytest.mark.parametrize("where", ["checkpoint", "init_from", "data", "tokenizer", "files", "sample"])
def test_folders_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def stat(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    refused(lambda: TAKE_A_NAME[where]("closed/folder"), "closed/folder", "Permission denied")


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("model.safetensors", "load_model"),
        ("config.json", "load_config"),
        ("config.json", "load_model"),
        ("tokenizer.json", "load_tokenizer"),
        ("tokenizer_config.json", "load_tokenizer"),
    ],
)
def test_a_checkpoint_is_compared_with_its_manifest(run: Path, file: str, load: str) -> None:
    checkpoint = run / "checkpoints" / "step_0000005"
    find_source(str(run)).load()
    path = checkpoint / "model" / file
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    for name in (run, checkpoint, checkpoint / "model"):
        refused(getattr(find_source(str(name)), load), f"model/{file}", checkpoint)
    refused(lambda: sample.main(["--checkpoint", str(run)]), f"model/{file}")
    if load == "load_model":
        refused(lambda: initialize_from(HGPTForCausalLM(HGPTConfig()), str(run)), f"model/{file}")
    if load == "load_config":
        refused(lambda: shape_of(str(run)), f"model/{file}")
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    refused(getattr(find_source(str(run)), load), "manifest.json")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**6, "n_head": 1},
        {"n_positions": 10**12},
        {"vocab_size": 10**13},
        {"n_layer": "x"},
        {"n_embd": -4},
        {"n_head": 0},
        {"head": ["harmonic"]},
        {"distance_options": 3},
        {"model_type": "bert"},
        {"model_type": "unknown"},
        {"dtype": "x"},
    ],
    ids=str,
)
def test_configurations_that_no_model_can_have(tmp_path: Path, change: dict[str, Any]) -> None:
    export(tmp_path, byte_pairs(300), "harmonic")
    changed(tmp_path / "config.json", lambda content: content.update(change))
    refused(find_source(str(tmp_path)).load_model, tmp_path)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(str(export(tmp_path, byte_pairs(300), "harmonic", rows=20_000)))
    size = 4 * source.load_model().num_parameters()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
    source.load_model()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
    (tmp_path / "model.safetensors").unlink()
    refused(source.load_model, "memory", tmp_path)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", b"PK\x03\x04", b"", b"x" * 99], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_none(tmp_path: Path, name: str, content: bytes) -> None:
    export(tmp_path, byte_pairs(300), "harmonic")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    refused(find_source(str(tmp_path)).load_model, tmp_path)


def test_nobody_is_asked_whether_to_run_a_strangers_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    export(tmp_path, byte_pairs(300), "harmonic")
    code = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "code.X")}
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    changed(tmp_path / "config.json", lambda content: content.update(code, model_type="strange"))
    changed(tmp_path / "tokenizer_config.json", lambda content: content.update(code, tokenizer_class="X"))
    source = find_source(str(tmp_path))
    for call in (source.load_config, source.load_model, lambda: shape_of(str(tmp_path))):
        refused(call, tmp_path)
    refused(source.load_tokenizer, tmp_path)


SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}, "model_args": [1]},
        {"model": {}, "model_args": SHAPE | {"n_layer": "2"}},
        {"model": {}, "model_args": SHAPE | {"n_layer": True}},
        {"model": [1], "model_args": SHAPE},
        {"model": {"transformer.wte.weight": "x"}, "model_args": SHAPE},
        {"model": {3: torch.ones(2)}, "model_args": SHAPE},
        {"model": {"transformer.wte.weight": torch.ones(300, 32, dtype=torch.long)}, "model_args": SHAPE},
        {"model": {"transformer.wte.weight": torch.ones(300, 32).to_sparse()}, "model_args": SHAPE},
        {"model": {"transformer.wte.weight": torch.tensor(1.0)}, "model_args": SHAPE},
        {1: 2},
    ],
    ids=str,
)
def test_ckpt_pt_with_odd_contents(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    model = find_source(str(export(tmp_path / "model", byte_pairs(300), "harmonic"))).load_model()
    refused(lambda: initialize_from(model, str(tmp_path / "ckpt.pt")), "ckpt.pt")


# ------------------------------------------------------------------------------------------------ preparation


def prepare_files(folder: Path, *options: str, main: Any = documents.main) -> int:
    source = ("--source", folder) if main is openwebtext.main else (folder,)
    return status(main, "--out", folder.parent / "out", *(options or SMALL), *source)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


@pytest.mark.parametrize("main", [documents.main, openwebtext.main], ids=["documents", "openwebtext"])
def test_what_a_folder_holds_is_read_or_named(corpus: Path, capsys: pytest.CaptureFixture[str], main: Any) -> None:
    other = corpus.parent / "other"
    other.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"document {i} about files")
        (other / f"x{i}.txt").write_text(f"other text {i}")
    (corpus / "more").symlink_to(other)
    (corpus / "again").symlink_to(other)
    (corpus / "loop").symlink_to(corpus)
    (corpus / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(corpus / "pipe.txt")
    for _ in range(2):  # repeating a finished preparation is no error
        assert prepare_files(corpus, main=main) == 0
    printed = capsys.readouterr()
    assert sum(map(len, read_back(corpus.parent / "out").values())) == 40
    assert "dangling.txt" in printed.err and "pipe.txt" in printed.err and "was already prepared" in printed.out


def test_separators(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(10):
        end = "\r\n\r\n" if i % 2 else "\n\n"
        (corpus / f"{i}.txt").write_bytes("".join(f"text {j} of {i}{end}" for j in range(20)).encode())
    (corpus / "none.txt").write_text("a file\rof an old Macintosh\r\rin one piece")
    assert prepare_files(corpus, "--separator", r"\n\n", *SMALL) == 0
    assert sum(map(len, read_back(corpus.parent / "out").values())) == 201
    assert "none.txt" in capsys.readouterr().err


def test_utf_16_without_a_mark_is_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encodings = {3: "utf-16-le", 4: "utf-16-be", 5: "utf-32-le"}
    for i in range(20):
        (corpus / f"{i}.txt").write_bytes(f"document {i}".encode(encodings.get(i, "utf-8")))
    assert prepare_files(corpus) == 0
    assert re.findall(r"(\d).txt is full of NUL", capsys.readouterr().err) == ["3", "4", "5"]


def test_parquet_columns(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = pa.array([f"document {i}" for i in range(40)])
    pq.write_table(pa.table({"text": column}), corpus / "0.parquet")
    pq.write_table(pa.table({"text": pa.array([None, None])}), corpus / "1.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), corpus / "2.parquet")
    assert prepare_files(corpus) == 0
    assert sum(map(len, read_back(corpus.parent / "out").values())) == 40
    shutil.rmtree(corpus.parent / "out")
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), corpus / "3.parquet")
    assert prepare_files(corpus) == 2
    assert "3.parquet has 2 columns 'text'" in capsys.readouterr().err


def test_names_that_are_not_utf_8(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "caf\udce9.jsonl").write_bytes(json_lines(texts(40)))
    (corpus / "d\udce9").mkdir()
    (corpus / "d\udce9" / "b.jsonl").write_bytes(json_lines(texts(20, seed=1)))
    pq.write_table(pa.table({"text": texts(20, seed=2)}), corpus / "a.parquet")
    (corpus / "a.parquet").rename(corpus / "\udce9.parquet")
    for _ in range(2):
        assert prepare_files(corpus) == 0
    assert "caf\ufffd.jsonl" in read_meta(corpus.parent / "out").source
    TokenShards.open(corpus.parent / "out", "val")


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
def test_options_out_of_range(
    prepared: Path, tmp_path: Path, command: Any, option: Any, message: str, capsys: Any
) -> None:
    source = prepared.parent / "a.jsonl"
    words = {
        documents.main: ("--out", tmp_path / "out", source, "--tokenizer", "bpe:300"),
        openwebtext.main: ("--out", tmp_path / "out", "--source", source),
        verify_command.main: (prepared,),
        sample.main: ("--checkpoint", prepared),
    }
    assert message in fails(capsys, command, *words[command], *option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[" * 9999, "x = ", "data = 3", "[data]\npath = 3", '[data]\nvocab_size = "x"'])
def test_a_configuration_of_a_run_that_is_none(run: Path, content: str) -> None:
    (run / "config.toml").write_text(content)
    refused(lambda: data_settings(find_source(str(run))), run / "config.toml")


def test_memory_that_runs_out_while_sampling(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("to", "generate"):
        with monkeypatch.context() as patch:
            patch.setattr(HGPTForCausalLM, name, lambda *_, **__: torch.empty(10**16))
            refused(lambda: sample.main(["--checkpoint", str(run), "--prompt", "with"]), "cpu ran out of memory")


# ------------------------------------------------------------------------------------------------ tokenizers


def pieces(**model: Any) -> tokenizers.Tokenizer:
    """A BPE of ASCII letters, as SentencePiece has it."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[], **model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def saved(backend: tokenizers.Tokenizer, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return str(folder)


def test_characters_are_never_dropped_without_a_word(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(pieces(), tmp_path))
    assert tokenizer.decode(tokenizer.encode_batch(["a text"])[0]) == "a text"
    refused(lambda: tokenizer.encode_batch(["a caf\xe9"]), tmp_path, "'\xe9'")
    known = load_tokenizer(saved(pieces(unk_token="<unk>"), tmp_path))
    assert known.encode_batch(["caf\xe9"])[0][-1] == 0
    level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    words = load_tokenizer(saved(level, tmp_path))
    refused(lambda: words.encode_batch(["a b"]), tmp_path)


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_exported_tokenizers_add_nothing(tmp_path: Path, template: str, unknown: str | None) -> None:
    backend = pieces(**({"unk_token": unknown} if unknown else {}))
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", 2)])
    path = Path(saved(backend, tmp_path)) / "tokenizer.json"
    hf_tokenizer(path, 16, 2).save_pretrained(tmp_path / "model")
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported("some text").input_ids == load_tokenizer(str(tmp_path)).encode_batch(["some text"])[0].tolist()
    assert (exported.eos_token, exported.bos_token, exported.unk_token) == ("</s>", "</s>", "<unk>")


def test_training_a_tokenizer_on_one_long_text_is_training_on_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from hgpt.data import tokenizer as module

    text = " ".join(texts(200))
    whole = load_tokenizer("bpe:400", lambda: [text])
    monkeypatch.setattr(module, "TRAINING_PIECE", 300)
    given: list[int] = []
    original = module._pieces
    monkeypatch.setattr(module, "_pieces", lambda *a: (given.append(len(piece)) or piece for piece in original(*a)))
    cut = load_tokenizer("bpe:400", lambda: [text])
    assert max(given) <= 300 and cut._backend.to_str() == whole._backend.to_str()


@pytest.mark.slow
def test_tqdm_can_be_disabled(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i} about files and strings")
    command = [sys.executable, "-m", "data_prep.documents", "--out", str(tmp_path / "out"), *SMALL, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"written to        {tmp_path / 'out'}", done.stderr
    assert len(np.unique(TokenShards.open(tmp_path / "out", "train").read(0, 20))) > 5
