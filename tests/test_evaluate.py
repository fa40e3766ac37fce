"""hgpt/evaluate.py against transformers in float64, against data of the model's own tokens, and against lm_eval."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import TEXT, bare, byte_pairs, encode, export, prepare, unigrams, word_pieces
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from hgpt import evaluate
from hgpt.cli import run
from hgpt.data.tokenizer import END_OF_TEXT
from hgpt.source import find_source

ROOT = Path(__file__).parent.parent
DOCUMENTS = [TEXT[:900], "naïve 日本\r\n", TEXT[900:1500]]
SPLIT = "".join(document + END_OF_TEXT for document in DOCUMENTS)
status = partial(run, evaluate.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a tokenizer, and models of this tokenizer and of others."""
    folder = tmp_path_factory.mktemp("evaluate")
    own = byte_pairs(300)
    for name, text in (("data", SPLIT), ("blank", " \n"), ("one", "a")):
        prepare(folder / name, own, text)
    export(folder / "harmonic", own, "harmonic", radius="learned")
    export(folder / "gpt2", own, "gpt2", context=50)
    for name, backend in {"bytes": byte_pairs(270), "words": word_pieces(200), "unigrams": unigrams(200)}.items():
        export(folder / name, backend)
        prepare(folder / f"data_of_{name}", backend, SPLIT)
    # For bad input.
    export(folder / "larger", byte_pairs(400))
    bare(folder / "bare", np.array([399, 1, 2]))
    export(folder / "bert", word_pieces(200))
    sizes = {"vocab_size": 200, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertLMHeadModel(BertConfig(**sizes, intermediate_size=8)).save_pretrained(folder / "bert")
    for name, content in {"long": TEXT.encode(), "empty": b"", "latin": b"na\xefve"}.items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


def evaluated(*arguments) -> dict:
    return json.loads(evaluate.main([*map(str, arguments), "--json"]))


def exactly(folder: Path, windows: list[tuple[np.ndarray, int]]) -> dict[str, float]:
    """Of windows of tokens, whose first `skip` targets do not count; by transformers in float64, a window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    losses, ranks, bins, n = [], [], {}, 0
    for tokens, skip in windows:
        with torch.no_grad():
            p = model(torch.from_numpy(tokens[None, :-1])).logits[0].softmax(-1)
        for row, target in list(zip(p, tokens[1:].tolist(), strict=True))[skip:]:
            losses.append(-math.log(row[target]))
            ranks.append(int((row > row[target]).sum()))
            bins.setdefault(math.ceil(15 * float(row.max())), []).append((ranks[-1] == 0) - float(row.max()))
            n += 1
    return {
        "tokens": n,
        "loss": sum(losses) / n,
        "perplexity": math.exp(sum(losses) / n),
        "accuracy": sum(rank == 0 for rank in ranks) / n,
        "top5_accuracy": sum(rank < 5 for rank in ranks) / n,
        "calibration_error": sum(abs(sum(gaps)) for gaps in bins.values()) / n,
    }


def test_the_whole_split(folder):
    rows = evaluated(folder / "harmonic", folder / "gpt2", "--data", folder / "data")["models"]
    tokens = encode(byte_pairs(300), SPLIT)
    first = len(byte_pairs(300).decode(tokens[:1]).encode())
    size = sum(len(document.encode()) for document in DOCUMENTS) - first
    for row, context in zip(rows, (24, 50), strict=True):
        windows = [(tokens[start : start + context + 1], 0) for start in range(0, len(tokens) - 1, context)]
        expected = exactly(folder / row["model"], windows)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5), name
        assert row["bytes"] == size
        assert row["bits_per_byte"] == pytest.approx(expected["loss"] * (len(tokens) - 1) / math.log(2) / size)
    shorter = evaluated(folder / "gpt2", "--data", folder / "data", "--seq-len", "24")["models"][0]
    assert shorter["window"] == 24 and shorter["loss"] != rows[1]["loss"]


@pytest.mark.parametrize("name", ["bytes", "words", "unigrams"])
def test_another_tokenizer_reads_the_same_text(folder, name, capsys):
    """As much as on a folder that was prepared with its own tokenizer."""
    known = evaluated(folder / name, "--data", folder / f"data_of_{name}")
    again = evaluated(folder / name, "--data", folder / "data")
    assert known["notes"] == [] and "another tokenizer" in again["notes"][0]
    assert "Compare bits per byte" in capsys.readouterr().err
    # Without tokens for naïve and 日本 a model has not predicted them.
    assert [note for note in again["notes"] if "unknown tokens" in note] == again["notes"][1:]
    assert len(again["notes"]) == (1 if name == "bytes" else 2)
    first, second = known["models"][0], again["models"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    start = tokenizer(DOCUMENTS[0], return_offsets_mapping=True).offset_mapping[0][1]
    size = sum(len(document.encode()) for document in DOCUMENTS) - len(DOCUMENTS[0][:start].encode())
    assert second.pop("bytes") == size
    assert second.pop("bits_per_byte") == pytest.approx(second["loss"] * second["tokens"] / math.log(2) / size)
    # For tokens that are not pieces of UTF-8 a folder's bytes are the mean over the split, by its meta.json.
    assert first.pop("bits_per_byte") == pytest.approx(second["loss"] * second["tokens"] / math.log(2) / size, rel=0.05)
    assert first.pop("bytes") == pytest.approx(size, abs=0 if name == "bytes" else 50)
    assert second == first


def test_a_text_follows_end_of_text(folder, tmp_path, capsys):
    """The last window is filled up with the tokens before it."""
    files = [tmp_path / "long.txt", tmp_path / "short.txt"]
    for file, text in zip(files, (TEXT[:700], "Naïve\r\n"), strict=True):
        file.write_bytes(text.encode())
    backend, windows = byte_pairs(300), []
    for file in files:
        text = file.read_bytes().decode()
        tokens = np.concatenate([[backend.token_to_id(END_OF_TEXT)], encode(backend, text)])
        whole = (len(tokens) - 1) // 24 * 24
        windows += [(tokens[start : start + 25], 0) for start in range(0, whole, 24)]
        start = max(0, len(tokens) - 25)
        windows.append((tokens[start:], whole - start))
    row, other = evaluated(folder / "harmonic", folder / "bytes", "--text", *files)["models"]
    assert other["bytes"] == row["bytes"] and other["tokens"] > row["tokens"]
    assert "note: the models have different tokenizers" in capsys.readouterr().err
    for name, value in exactly(folder / "harmonic", windows).items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    assert row["bytes"] == sum(file.stat().st_size for file in files)


def test_tokens_without_a_tokenizer(folder, tmp_path):
    tokens = encode(byte_pairs(300), TEXT)
    bare(tmp_path / "data", tokens)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "gpt2" / name).read_bytes())
    found = evaluated(tmp_path, folder / "gpt2", "--data", tmp_path / "data")
    nameless, named = found["models"]
    assert nameless["loss"] == named["loss"] and nameless["bits_per_byte"] is None
    assert named["bits_per_byte"] and "assumed to have the same tokens" in found["notes"][0]
    text = evaluate.main([str(tmp_path), "--data", str(tmp_path / "data")])
    assert text.splitlines()[1].split()[5] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("harmonic", "name a text to evaluate on: --data DIR"),
        ("harmonic --data none", "none"),
        ("none/x --text long.txt", "none/x"),
        ("harmonic harmonic --data data", "named twice"),
        ("harmonic --text empty.txt", "empty.txt holds no token that harmonic could predict"),
        ("words --data blank", "blank: its val split holds no token that words could predict"),
        ("harmonic --data one", "one: the val split has 1 tokens, and at least 2 are needed"),
        ("harmonic --text latin.txt", "latin.txt cannot be read as UTF-8"),
        ("harmonic larger --data bare", "harmonic predicts 300 tokens, and bare has a vocabulary of 400: with"),
        ("bert --text long.txt", "bert is no causal language model"),
        ("harmonic --data data --seq-len 25", "--seq-len 25 is more than the context of harmonic, 24 tokens"),
        ("harmonic --data data --seq-len 0", "--seq-len: must be at least 1"),
        ("harmonic --data data --text long.txt", "not allowed with"),
    ],
)
def test_bad_input(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert status(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lm_evaluation_harness_finds_the_same(folder, tmp_path, monkeypatch):
    """The task file of docs/models.md, on an export, as lm_eval's command runs it."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    Path("my.txt").write_text(TEXT)
    Path("my_text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (row,) = evaluated(folder / "harmonic", "--text", "my.txt")["models"]
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={find_source(str(folder / 'harmonic')).folder},trust_remote_code=True",
        tasks=["my_text"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(ROOT / "docs" / "lm_eval")),
        device="cpu",
        bootstrap_iters=0,
    )["results"]["my_text"]
    assert found["bits_per_byte,none"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(2 ** row["bits_per_byte"], rel=1e-5)
