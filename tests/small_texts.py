"""Small corpora of generated documents, and what a data folder that was prepared from them holds."""

import json
import os
import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import encoding, engine, text_files
from data_prep.documents import main as prepare_documents
from data_prep.splits import nanogpt_indices
from hgpt.cli import run
from hgpt.data.shards import SPLITS, TokenShards, read_meta
from hgpt.data.tokenizer import load_tokenizer
from hgpt.errors import UserError

WORDS = ["distance", "centre", "token", "model", "exponent", "<|endoftext|>", "naïve", "日本", "loss", "norm"]
SMALL = ("--tokenizer", "bpe:300", "--val-fraction", "0.2", "--workers", "1")


def texts(number, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for i in range(number)]


def json_lines(documents, **others):
    return "".join(json.dumps({**others, "text": text}) + "\n" for text in documents).encode()


def write_parquet(path, documents, row_group_size=7):
    """Without a dictionary, repeated documents take the room of documents that differ."""
    pq.write_table(pa.table({"text": documents}), path, row_group_size=row_group_size, use_dictionary=False)


def small_units(patch):
    """Units of a few documents, progress saved after each, worker processes for however little text."""
    for module in (text_files, encoding):
        patch.setattr(module, "SECTION_BYTES", 3000)
    patch.setattr(engine, "SAVE_SECONDS", 0)
    patch.setattr(encoding, "FEW_BYTES", 0)


def status(main, *arguments):
    """The exit status of a command."""
    return run(main, [str(argument) for argument in arguments], interrupted=engine.INTERRUPTED)


def fails(capsys, main, *arguments):
    """The message of a command that must fail with exit status 2."""
    assert status(main, *arguments) == 2
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message[message.index("error: ") :]


class Trap:
    """Its pickle makes a folder when it is loaded as code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(words, call, *arguments, **options):
    """The message of the UserError that `call` must raise, which holds `words`: one text, or several."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    for word in words if isinstance(words, tuple) else (words,):
        assert str(word) in str(error.value)
    return str(error.value)


def prepared(folder, documents, *options):
    """The data folder of documents, which lie beside it in one file."""
    source = folder.with_name(f"{folder.name}.jsonl")
    source.write_bytes(json_lines(documents))
    assert status(prepare_documents, source, "--out", folder, *SMALL, *options) == 0
    return folder


def as_nanogpt(documents, val_fraction=0.1):
    """{split: documents} as data_prep.openwebtext splits them; None has a place and is no document."""
    val = set(nanogpt_indices(len(documents), val_fraction, 2357).tolist())
    places = {split: [n for n in range(len(documents)) if (n in val) == (split == "val")] for split in SPLITS}
    return {split: [documents[n] for n in found if documents[n] is not None] for split, found in places.items()}


def overwrite(path, position, content):
    """Write bytes into a file."""
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


def contents(folder):
    """The bytes of each file, none of which is hidden."""
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def streams(folder):
    found = {}
    for split in SPLITS:
        shards = TokenShards.open(folder, split)
        found[split] = shards.read(0, len(shards)).tolist()
    return found


def read_back(folder):
    """{split: documents} of a data folder, decoded from its shards with its own tokenizer.json."""
    tokenizer = load_tokenizer(str(folder))
    end_of_text = read_meta(folder).end_of_text
    found = {}
    for split, stream in streams(folder).items():
        assert stream[-1] == end_of_text, "each document ends with end-of-text"
        ends = np.flatnonzero(np.array(stream) == end_of_text).tolist()
        found[split] = [tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise([-1, *ends])]
    return found
