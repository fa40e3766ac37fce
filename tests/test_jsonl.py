"""data_prep/jsonl.py: long lines, taken apart while they are read, against json.loads of the whole."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from data_prep import long_documents
from data_prep.jsonl import BadLine, pieces_of_line, text_of_line, text_of_long_line
from data_prep.long_documents import LongDocument, spool
from hgpt.errors import UserError

PATH = Path("a.jsonl")
CHARACTERS = ["a", " ", '"', "\\", "\\\\", "\n", "\x01", "/", "u12", "é", "日", "😀", *"{}[]:,"]


def random_object(rng, characters):
    text = "".join(rng.choices(characters, k=rng.randint(0, 30)))
    fields = [("text", rng.choice([text] * 6 + [None, 3, [text]])), ('k"ey', -1e9), ("title", text[::-1]), ("n", None)]
    rng.shuffle(fields)
    return dict(fields[: rng.randint(1, 4)])


def whole(line):
    try:
        return text_of_line(line, PATH, 1, "text")
    except BadLine:
        return "bad"


def in_pieces(line, monkeypatch, size):
    """The same by pieces of `size` bytes; what follows the line must be next in the file."""
    stream = io.BytesIO(line + b"\n" + b"next")
    with monkeypatch.context() as patch:
        patch.setattr(long_documents, "LONG_DOCUMENT", size)
        try:
            found = text_of_long_line(pieces_of_line(stream), PATH, 1, "text", None)
        except BadLine:
            found = "bad"
        if isinstance(found, LongDocument):
            found = b"".join(found.pieces())
    assert stream.read() == b"next"
    return found


def test_lines(monkeypatch):
    rng = random.Random(0)
    texts = 0
    for _ in range(1500):
        row = random_object(rng, CHARACTERS)
        row |= rng.choice([{}, {"deep": {"text": ["a]", {"}": [1, 2.5, True, {}]}]}}])
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()
        expected = whole(line)
        texts += isinstance(expected, bytes) and len(expected) > 5
        assert in_pieces(line, monkeypatch, rng.choice([1, 2, 3, 7, 30, 1000])) == expected, line
    assert texts > 300


def test_damaged_lines(monkeypatch):
    rng = random.Random(1)
    outcomes = []
    for _ in range(3000):
        line = json.dumps(random_object(rng, CHARACTERS[:-7]), ensure_ascii=rng.random() < 0.5).encode()
        place = rng.randrange(len(line))
        damage = rng.choice([b"", *b'"}]{,:\\', *[b"\xff", b"\x80", b"\xe6"] * 4, b"\\u", b"\x00"])
        damage = bytes([damage]) if isinstance(damage, int) else damage
        line = line[:place] + damage + line[place + rng.randint(0, 1) :]
        if b"[" in line or line.count(b"{") > 1:
            continue  # inside a list or an object only brackets are checked
        expected = whole(line)
        outcomes.append(expected)
        assert in_pieces(line, monkeypatch, rng.choice([1, 2, 3, 7, 30])) == expected, line
    bad = outcomes.count("bad")
    assert (
        bad > 500
        and len(outcomes) - bad > 200
        and any(b"\xff" in (found or b"") for found in outcomes if found != "bad")
    )


def test_surrogates(monkeypatch):
    """Pairs are joined as json joins them, and no others, wherever the pieces end."""
    rng = random.Random(2)
    for _ in range(1500):
        row = random_object(rng, ["\ud83d", "\ude00", "\ud800", "\udfff", "\\", "\\ud83d", "a", '"', "é"])
        line = json.dumps(row).encode()
        assert in_pieces(line, monkeypatch, rng.choice([1, 2, 3, 7, 30])) == whole(line), line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "text": "b"}', "the field 'text' comes twice"),
        (b'{"text": "a"]', "unexpected ]"),
        (b'{"text": "a', "unterminated string"),
        (b'{"text": "a", "n": [1, 2}', "unexpected }"),
        (b'{"text": "a", "n": [1, 2', "not a JSON value"),
        (b'{"text": "\\q"}', "Invalid \\escape"),
        (b'{"title": "a", "n": [{"text": "b"}]}', "this one has the keys n, title"),
        (b'["text", {"text": "a"}]', "this one is none"),
        (b'"text"', "this one is none"),
        (b'{"text": ["a"]}', "must be a string, not list"),
    ],
)
def test_what_is_wrong_is_said(line, message, tmp_path):
    with pytest.raises(BadLine) as error:
        text_of_long_line(iter([line[:5], line[5:]]), PATH, 7, "text", tmp_path)
    assert message in str(error.value) and "a.jsonl, line 7" in str(error.value)


@pytest.mark.parametrize(
    "before", ["", ', "tokens": [' + "1234, " * 2_000_000 + "0]", ', "deep": [' + '"a\\n", ' * 300_000 + '""]']
)
def test_memory_does_not_grow_with_a_line(before, tmp_path):
    text = "plain English and one 😀, " * 300_000
    line = ('{"title": "t"' + before + ', "text": "' + text + '"}').encode()
    stream = io.BytesIO(line)
    tracemalloc.start()
    try:
        found = text_of_long_line(pieces_of_line(stream), PATH, 1, "text", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert b"".join(found.pieces()) == text.encode() and peak < 25_000_000
    assert not list(tmp_path.iterdir())


def test_a_copy_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"is kept in .*gone while it is encoded, and that cannot be written: No such"):
        spool(iter([b"x" * 600_000] * 3), tmp_path / "gone")
    assert spool(iter([b"x"] * 3), tmp_path / "gone") == b"xxx"


def test_a_file_that_can_no_longer_be_read():
    class Broken:
        name = "texts/a.txt"

        def read(self, size):
            raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match=r"texts/a.txt cannot be read: Input/output error. The same command goes on"):
        list(LongDocument(Broken()).texts())
