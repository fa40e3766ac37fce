"""data_prep/jsonl.py: long lines, taken apart while they are read, against json.loads of the whole."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from full_disk import file_size_limit

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
        row = random_object(rng, ["\ud83d", "\ude00", "\ud800", "\udfff", "\udc80", "\\", "\\ud83d", "a", '"', "é"])
        line = json.dumps(row).encode()
        for _ in range(rng.randint(0, 2)):  # and invalid bytes beside them
            line = line.replace(rng.choice([b"a", b"\\ud83d", b"\\ude00"]), rng.choice([b"\xff", b"\xf0\x9f"]), 1)
        assert in_pieces(line, monkeypatch, rng.choice([1, 2, 3, 7, 30])) == whole(line), line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'  \t ["text"', "this one is none"),
        (b'{"text": "a", "text": "b"}', "the field 'text' comes twice"),
        (b'{"text": "a"]', "unexpected ]"),
        (b'{"text": "a', "unterminated string"),
        (b'{"text": "a", "n": [1, 2}', "unexpected }"),
        (b'{"text": "a", "n": [1, 2', "cannot be read as JSON"),
        (b'{"text": "a"} "b"', "a string outside the object"),
        (b'{"text": "a", "n": ' + b"[" * 100_000, "nested more than 1,000 deep"),
        (b'{"text": "a", "n": 1' + b"0" * 2_000_000 + b"}", "keys, numbers and spaces take more than 1,048,576 bytes"),
        (b'{"text": "a", "n' + b"n" * 2_000_000, "keys, numbers and spaces take more than 1,048,576 bytes"),
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


def test_a_line_that_is_nested_too_deep():
    with pytest.raises(BadLine, match=r"line 7: cannot be read as JSON \(nested too deep\)"):
        text_of_line(b'{"text": ' + b"[" * 200_000, PATH, 7, "text")


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


@pytest.mark.parametrize(
    ("start", "repeated"),
    [(b"", b"[1, "), (b'"', b"a\\n"), (b" ", b"  "), (b'{"', b"key"), (b'{"text": ', b"1"), (b"{} ", b'"b" ')],
)
def test_memory_does_not_grow_with_a_line_that_is_no_document(start, repeated):
    line = start + repeated * (30_000_000 // len(repeated))
    stream = io.BytesIO(line)
    tracemalloc.start()
    try:
        with pytest.raises(BadLine):
            text_of_long_line(pieces_of_line(stream), PATH, 1, "text", None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 15_000_000 and not stream.read()


def test_a_copy_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"is kept in .*gone while it is encoded, and that cannot be written: No such"):
        spool(iter([b"x" * 600_000] * 3), tmp_path / "gone")
    assert spool(iter([b"x"] * 3), tmp_path / "gone") == b"xxx"


@pytest.mark.parametrize("too_much", [1, 1000, 500_000])
def test_a_disk_that_fills_while_a_copy_is_written(tmp_path, too_much):
    """Also where it is found only when what is buffered is written at the end."""
    size = 2 * long_documents.LONG_DOCUMENT
    with file_size_limit(size), pytest.raises(UserError, match=r"cannot be written: File too large. Free space there"):
        spool(iter([b"x" * size, b"y" * too_much]), tmp_path)
