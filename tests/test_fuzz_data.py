"""150 damaged files of an exported model and of a data folder: each is used as before, or refused with a UserError."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_models import byte_pairs, export
from small_texts import status, texts

import sample
from data_prep import documents
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.data.tokenizer import hf_tokenizer, load_tokenizer
from hgpt.data.verify import find_damage
from hgpt.errors import UserError

ODD = (None, True, -1, 0, 3, 2**31, 4 * 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), "", "x", "\ud800", "../x", [],
       {}, [1], {"x": 1})  # fmt: skip


def use_model(folder: Path) -> None:
    sample.main(["--checkpoint", str(folder), "--prompt", "with", "--greedy", "--max-new-tokens", "2", "--no-stream"])


def use_data(folder: Path) -> None:
    for split in SPLITS:
        list(find_damage(folder, split, documents=True))
        shards = TokenShards.open(folder, split)
        list(shards.chunks())
        load_tokenizer(str(folder)).encode_batch(["with a file"])
        hf_tokenizer(folder / "tokenizer.json", 16, shards.end_of_text)("with a file")


def bent(content: bytes, rng: random.Random) -> bytes:
    """Another content: bits, ranges, digits or values changed."""
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    way = rng.randrange(7)
    if way == 0:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if way == 1:
        return content[:start]
    if way == 2:
        return content[:start] + content[end:]
    if way == 3:
        return content[:start] + rng.randbytes(rng.randint(1, 9)) + content[start:]
    if way == 4:
        return rng.choice([b"", b"[" * 100_000, b'{"a":' * 100_000, b"\x80\x04K\x01.", b"null", b"[]", b"\xff\xfe{}"])
    digits = [place for place, byte in enumerate(content[:4000]) if byte in b"0123456789"]
    if way == 5 and digits:
        place = rng.choice(digits)
        return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]
    try:
        tree = json.loads(content)
    except ValueError:
        return content[:start] + bytes(end - start) + content[end:]
    node = tree
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            node[key] = rng.choice(ODD)
            return json.dumps(tree).encode()
        node = node[key]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    options = ("--tokenizer", "bpe:300", "--val-fraction", 0.2, "--workers", 1)
    assert status(documents.main, "--out", folder / "data", *options, folder / "a.jsonl") == 0
    export(folder / "model", byte_pairs(300), "harmonic")
    export(folder / "gpt2", byte_pairs(300), "gpt2")
    return {"data": folder / "data", "model": folder / "model", "gpt2": folder / "gpt2"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tries"), [("model", 50), ("gpt2", 25), ("data", 75)])
def test_damaged_files(whole: dict[str, Path], tmp_path: Path, kind: str, tries: int) -> None:
    use: Callable[[Path], None] = use_data if kind == "data" else use_model
    refused = 0
    for seed in range(tries):
        rng = random.Random(f"{kind} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(whole[kind], folder)
        file = rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".bin", ".safetensors")))
        file.write_bytes(bent(file.read_bytes(), rng))
        try:
            use(folder)
        except UserError as error:
            refused += str(error) != ""
        except BaseException as error:  # the tokenizers library panics with one
            raise AssertionError(f"{kind} {seed}: {file.name}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    assert refused > tries / 3
