"""Data of other kinds from end to end: prepared or copied, trained on, evaluated, sampled."""

import json
import math
import pickle
import random

import numpy as np
import pytest
from small_run import make_config, records
from small_texts import Trap, fails, json_lines, refused, status, streams
from transformers import AutoTokenizer

import sample
import train
from data_prep import documents
from data_prep import verify as verify_command
from hgpt import evaluate
from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import load_tokenizer, token_ids

FEW = {"optim": {"warmup_steps": 0}, "train": {"steps": 2}, "eval": {"every": 2}, "checkpoint": {"every": 2}}


def trained_and_sampled(data, folder, capsys, prompt):
    """A run of two steps; its evaluation, and what sample.py continues `prompt` with."""
    config = make_config(data, folder, **FEW)
    train.main(config)
    capsys.readouterr()
    evaluated = json.loads(evaluate.main([str(config.run_folder), "--json", "--device", "cpu"]))["models"][0]
    assert evaluated["loss"] == pytest.approx(records(config.run_folder, "eval")[-1]["loss"], rel=1e-5)
    sample.main([str(config.run_folder), "--prompt", prompt, "--max-new-tokens", "9", "--device", "cpu", "--seed", "1"])
    return config.run_folder, evaluated, capsys.readouterr().out


def test_a_vocabulary_over_65535(tmp_path, capsys):
    words = [f"w{number}" for number in range(69_998)]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<|endoftext|>", *words])}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}}
    content |= {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    texts = [" ".join(random.Random(number).choices(words[-2000:], k=40)) for number in range(60)]
    (tmp_path / "texts.jsonl").write_bytes(json_lines(texts))
    data = tmp_path / "data"
    options = ("--tokenizer", tmp_path, "--val-fraction", "0.3", "--workers", "1", "--tokens-per-shard", "1000")
    assert status(documents.main, "--out", data, *options, tmp_path / "texts.jsonl") == 0
    assert status(verify_command.main, data) == 0
    stream = {split: np.array(tokens) for split, tokens in streams(data).items()}
    found = [[words[token - 2] for token in part[part != 1]] for part in stream.values()]
    assert sorted(found[0] + found[1]) == sorted(" ".join(texts).split()) and stream["train"].max() > 0xFFFF
    _, evaluated, text = trained_and_sampled(data, tmp_path, capsys, "w69990 w69991")
    assert evaluated["tokens"] == len(stream["val"]) - 1 and text.startswith("w69990 w69991 ")


# ------------------------------------------------------------------------------------- nanoGPT's character data

TEXT = "Straße, 日本 and a 👩‍👩‍👧 e\u0301:\r\n\tSpeak, speak.\n\u2028" * 40
CHARACTERS = sorted(set(TEXT))
META = {
    "vocab_size": len(CHARACTERS),
    "itos": dict(enumerate(CHARACTERS)),
    "stoi": {character: token for token, character in enumerate(CHARACTERS)},
}


@pytest.fixture
def nanogpt(tmp_path):
    """As nanoGPT's data/shakespeare_char/prepare.py writes it."""
    folder = tmp_path / "characters"
    folder.mkdir()
    for split, text in (("train", TEXT[:1400]), ("val", TEXT[1400:])):
        np.array([META["stoi"][character] for character in text], dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps(META))
    return folder


def test_characters_of_nanogpt(nanogpt, tmp_path, capsys):
    run, evaluated, text = trained_and_sampled(nanogpt, tmp_path, capsys, "日本\n")
    assert text.startswith("日本\n") and len(text) == len("日本\n") + 9 + 1
    # Bits per byte, from the loss in nats per character.
    size = len(TEXT[1401:].encode())
    expected = evaluated["loss"] * len(TEXT[1401:]) / math.log(2) / size
    assert evaluated["bits_per_byte"] == pytest.approx(expected) and evaluated["bytes"] == size
    assert records(run, "eval")[-1]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "a.txt").write_text("Speak\n")
    of_text = evaluate.main([str(run), "--json", "--text", str(tmp_path / "a.txt")])
    assert json.loads(of_text)["models"][0]["bytes"] == len("peak\n")  # nothing comes before the first character

    tokenizer = AutoTokenizer.from_pretrained(run / "latest" / "model", trust_remote_code=False)
    assert tokenizer.get_vocab() == META["stoi"] and tokenizer.eos_token is None
    for part in (TEXT, "\n\r\n ", "👩👩e"):
        ids = tokenizer(part).input_ids
        assert ids == [META["stoi"][character] for character in part] and tokenizer.decode(ids) == part
    sample.main([str(run), "--max-new-tokens", "3", "--device", "cpu"])  # without a prompt, at a line break
    assert capsys.readouterr().out.startswith("\n")
    refused(("no tokens for some of the text", "'Üä'"), sample.main, [str(run), "--prompt", "Üä and a"])


def test_what_does_not_go_with_characters(nanogpt, tmp_path, capsys):
    words = ("vocab_size 65 does not match", f"meta.pkl, which has {len(CHARACTERS)}")
    refused(words, TokenShards.open, nanogpt, "train", 65)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one text", "another text"]))
    for tokenizer in (nanogpt, nanogpt / "meta.pkl"):
        arguments = ("--out", tmp_path / "out", "--tokenizer", tokenizer, tmp_path / "a.jsonl")
        assert "have no end-of-text" in fails(capsys, documents.main, *arguments)
    (nanogpt / "meta.pkl").rename(nanogpt / "meta.old")
    assert TokenShards.open(nanogpt, "train", 65).vocab_size == 65  # the way out of every message
    refused(("state vocab_size", "tokenizer.json", "meta.pkl"), TokenShards.open, nanogpt, "train")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_characters_in_every_protocol(tmp_path, protocol):
    many = [chr(code) for code in range(0x4E00, 0x4E00 + 500)]  # more than a byte counts
    for meta in (META, {"vocab_size": 500, "itos": dict(enumerate(many)), "stoi": {c: i for i, c in enumerate(many)}}):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta | {"dropout": 0.1, "name": "x"}, protocol))
        assert token_ids(tmp_path / "meta.pkl") == meta["stoi"]
        tokenizer = load_tokenizer(str(tmp_path))
        assert [part.tolist() for part in tokenizer.encode_batch([meta["itos"][3] * 2, ""])] == [[3, 3], []]


def changed(**entries):
    return pickle.dumps(META | entries)


PICKLES = {
    "code": (changed(note=Trap("sprung")), "more than dictionaries, texts and numbers"),
    "code of protocol 0": (b"cos\nmkdir\n(Vsprung\ntR.", "GLOBAL"),
    "an object by its name": (b"(i__main__\nX\n.", "INST"),
    "a persistent object": (b"Px\n.", "PERSID"),
    "an extension": (b"\x82\x01.", "EXT1"),
    "an index of 2 billion": (b"\x80\x04}r\xff\xff\xff\x7f.", "LONG_BINPUT 2147483647"),
    "a length of 2^40": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "meta.pkl"),
    "16 MiB": (b"\x80\x04" + bytes(1 << 24), "larger than 16 MiB"),
    "nothing": (b"", "meta.pkl"),
    "a half": (changed()[: len(changed()) // 2], "meta.pkl"),
    "a number": (pickle.dumps(3), "TypeError"),
    "no stoi": (pickle.dumps({"vocab_size": 3, "itos": {}}), "'stoi'"),
    "words": (changed(stoi={"ab": 0}, itos={0: "ab"}, vocab_size=1), "single characters"),
    "half a character": (changed(stoi={"\ud800": 0}, itos={0: "\ud800"}, vocab_size=1), "surrogates"),
    "no characters": (changed(stoi={}, itos={}, vocab_size=0), "0 ids"),
    "another size": (changed(vocab_size=65), "vocab_size is 65"),
    "a size of another type": (changed(vocab_size="x"), "vocab_size is 'x'"),
    "an id twice": (changed(stoi={"a": 0, "b": 0}, itos={0: "b"}, vocab_size=2), "2 ids"),
    "an id left out": (changed(stoi={"a": 0, "b": 2}, itos={0: "a", 2: "b"}, vocab_size=2), "2 ids"),
    "another inverse": (changed(itos={**META["itos"], 0: "x"}), "inverse"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_are_refused_and_not_executed(nanogpt, monkeypatch, name):
    monkeypatch.chdir(nanogpt)
    content, words = PICKLES[name]
    (nanogpt / "meta.pkl").write_bytes(content)
    refused((words, "rename it and state data.vocab_size"), TokenShards.open, nanogpt, "train")
    assert not (nanogpt / "sprung").exists()
    if name.startswith("code"):
        pickle.loads(content)  # the trap is one
        assert (nanogpt / "sprung").exists()
