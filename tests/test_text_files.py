"""data_prep/text_files.py: every kind of file gives its documents, whole or in sections, and bad ones are named."""

import gzip
import json
import os
import random
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_texts import json_lines, refused, texts, write_parquet

from data_prep import text_files
from data_prep.text_files import Fields, find_files, find_sections, read_section
from hgpt.errors import UserError

TEXTS = texts(300)


def read(path, fields=Fields(), **options):  # noqa: B008
    """The documents of all sections, and the sections."""
    sections, _ = find_sections([path], fields)
    return [document for section in sections for document in read_section(section, fields, **options)], sections


def decoded(path, fields=Fields()):  # noqa: B008
    return [document.decode() for document in read(path, fields)[0]]


# ------------------------------------------------------------------------------------------------------ finding


def found(folder, *paths):
    return [path.relative_to(folder).as_posix() for path in find_files(paths)[0]]


def test_folders_are_searched_in_sorted_order_and_files_taken_once(tmp_path):
    """Links are followed, also in a circle. Files that lie beside data count where there are no others."""
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.ndjson", "README.md", "load.py", ".hidden/x.txt", "b/.y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    paths = [tmp_path / "c.ndjson", tmp_path, tmp_path / "b"]
    assert found(tmp_path, *paths) == ["a.txt", "b/10.txt", "b/2.txt", "c.ndjson"]
    assert [path.name for path in find_files(paths)[1]] == ["README.md", "load.py"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "other")
    assert "other/linked/2.txt" in found(tmp_path, tmp_path / "other")
    (tmp_path / "other" / "linked").unlink()
    for name in ("README.md", "info.json", "load.py"):
        (tmp_path / "other" / name).write_text("x")
    assert found(tmp_path / "other", tmp_path / "other") == ["README.md", "info.json", "load.py"]


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.parquet.gz").touch()
    (tmp_path / "empty").mkdir()
    for name in ("a.pdf", "a.parquet.gz", "nowhere.txt", "empty"):
        refused(name, find_files, [tmp_path / name])


# ------------------------------------------------------------------------------------------------------ reading

LINES = json_lines(TEXTS, id=1)
SEPARATED = "\n\n".join(TEXTS).encode()
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def parquet(**options):
    column = options.pop("column", pa.array(TEXTS))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(300), "text": column}), sink, use_dictionary=False, **options)
    return sink.getvalue().to_pybytes()


def arrow(new):
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=150)
    return sink.getvalue().to_pybytes()


# name → content, and the separator that its documents have
KINDS = {
    "a.jsonl": (b"\xef\xbb\xbf\n" + LINES.replace(b"\n", b"\r\n\n"), None),
    "b.jsonl.gz": (gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]), None),
    "c.JSONL.zst": (zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:]), None),
    "d.txt": (b"\xef\xbb\xbf" + SEPARATED, "\n\n"),
    "e.txt": (SEPARATED.replace(b"\n", b"\r\n"), "\n\n"),  # line breaks of Windows
    "f.txt.gz": (gzip.compress(SEPARATED), "\n\n"),
    "g.txt": ("<END>".join(TEXTS).encode(), "<END>"),
    "h.ndjson": (LINES, None),
    "i.json": (LINES, None),
    "j.json": (json.dumps(ROWS, indent=2).encode(), None),
    "k.json.gz": (gzip.compress(b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode()), None),
    "l.parquet": (parquet(), None),
    "m.parquet": (parquet(row_group_size=7), None),
    "n.parquet": (parquet(column=pa.array(TEXTS, pa.large_string())), None),
    "o.parquet": (parquet(column=pa.array(TEXTS).dictionary_encode()), None),
    "p.arrow": (arrow(pa.ipc.new_stream), None),
    "q.arrow": (arrow(pa.ipc.new_file), None),
}


@pytest.mark.parametrize(("section", "block"), [(4 << 20, 1 << 20), (3000, 1 << 20), (3000, 100)])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch, section, block, name):
    for setting, value in (("SECTION_BYTES", section), ("LARGEST_SECTION", section), ("BLOCK", block)):
        monkeypatch.setattr(text_files, setting, value)
    content, separator = KINDS[name]
    (tmp_path / name).write_bytes(content)
    found, sections = read(tmp_path / name, Fields(separator=separator))
    assert [document.decode() for document in found] == TEXTS
    assert name == "m.parquet" or (len(sections) > 5) == (section == 3000)
    assert all(part.bytes <= 2 * section for part in sections)


def test_a_text_file_is_one_document(tmp_path):
    for name in ("a.txt", "a.txt.gz", "a.md", "a.py", "empty.txt"):
        content = b"" if name == "empty.txt" else b"one\n\ntwo"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert decoded(tmp_path / name) == [content.decode()]
    (tmp_path / "d.txt").write_text("\n\na\n\n\n\n")
    assert decoded(tmp_path / "d.txt", Fields(separator="\n\n")) == ["", "a", "", ""]  # as str.split


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_process_decompresses_a_file_once_for_all_its_sections(tmp_path, monkeypatch, suffix, compress):
    monkeypatch.setattr(text_files, "LARGEST_SECTION", 1000)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    sections, _ = find_sections([path], Fields())
    opened = []
    open_file = text_files._open
    monkeypatch.setattr(text_files, "_open", lambda path: opened.append(path) or open_file(path))

    def documents(sections):
        return [document.decode() for section in sections for document in read_section(section, Fields())]

    assert documents(sections) == TEXTS and len(opened) == 1
    behind = sum(section.documents for section in sections[:-2])
    assert documents(sections[-2:]) == TEXTS[behind:]
    assert len(opened) == 2  # what lies before the place of the reader is not reached again
    path.write_bytes(compress(json_lines(TEXTS[::-1])))
    assert documents(sections[:1])[0] == TEXTS[-1]  # and not out of the file that was there before


def test_invalid_utf8_and_surrogates_are_left_to_whoever_decodes(tmp_path):
    lines = [b'{"text": "b\xfe\xfe"}', b'{"text": "lone \\ud800 \xff \\udcff"}', b'{"text": "pair \\ud83d\\ude00"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    expected = [b"b\xfe\xfe", b"lone \xed\xa0\x80 \xff \xff", "pair 😀".encode()]
    assert read(tmp_path / "a.jsonl")[0] == expected
    column = pa.array([b"par\xc3quet", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == [b"par\xc3quet", None]


def test_one_document_is_held_at_a_time(tmp_path):
    """However many large rows stand together between small ones, of which the average knows nothing."""
    documents = ["x" * 500_000] * 20 + ["x"] * 200
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", use_dictionary=False)
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    for path in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        try:
            sections, _ = find_sections([path], Fields())
            lengths = [len(document) for section in sections for document in read_section(section, Fields())]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert lengths == [len(document) for document in documents] and peak < 5_000_000, path


# ------------------------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "cannot be read as JSON"),
        (b'{"text": "a"} x', "cannot be read as JSON"),
        (b'{"text": ' + b"[" * 200_000, "nested too deep"),
        (b'["text"]', "no JSON object with a field 'text', but another value"),
        (b'{"body": "x", "id": 1}', "but an object with the keys body, id"),
        (b'{"text": 3}', "the field 'text' must be a string, not int"),
        (b'{"text": "' + b"x" * 3000 + b'"}', "a document of more than 0 MiB"),
    ],
)
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(text_files, "BLOCK", 500)
    if b"xxx" in line:
        monkeypatch.setattr(text_files, "LARGEST_DOCUMENT", 2000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    refused(("a.jsonl, line 3: ", message), read, tmp_path / "a.jsonl")
    bad = []
    assert read(tmp_path / "a.jsonl", on_bad=bad.append)[0] == [b"a", None, b"b"]
    assert len(bad) == 1 and message in bad[0]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.parquet"])
def test_a_document_that_is_too_large_is_named_and_can_be_left_out(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "LARGEST_DOCUMENT", 2000)
    monkeypatch.setattr(text_files, "BLOCK", 500)
    path, fields = tmp_path / name, Fields(separator="||")
    documents = ["x" * 2000, "y" * 2001, "z"]
    content = "||".join(documents).encode()
    write_parquet(path, documents)
    if name != "a.parquet":
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert "--separator" in refused(name, read, path, fields)
    bad = []
    assert read(path, fields, on_bad=bad.append)[0] == [b"x" * 2000, None, b"z"] and len(bad) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS), mtime=0)[:-500], "cannot be read"),
        ("a.txt.zst", b"no zstd", "cannot be read"),
        ("a.txt.zst", zstandard.compress(random.Random(0).randbytes(99999))[:-2000], "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.arrow", b"ARROW1 and nothing", "cannot be read"),
        ("a.arrow", b"no stream", "cannot be read"),
        ("a.arrow", b"", "cannot be read"),
        ("a.json", b'[{"text": "x"}', "cannot be read: it is not valid JSON"),
        ("a.json", b"[" * 100_000, "cannot be read: it is not valid JSON"),
        ("a.txt", gzip.compress(b"x", mtime=0), "is no text; .*.txt.gz"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINES), mtime=0), "is no text; .*.jsonl.gz"),  # twice
        ("a.md", zstandard.compress(b"x"), "is no text; .*.txt.zst"),
        ("a.jsonl", b"PAR1\x15", "is no text; .*.parquet"),
        ("a.json", b"ARROW1\0\0", "is no text; .*.arrow"),
        ("a.py", b"PK\x03\x04", "is no text; .*unpack"),
        ("a.txt", b"%PDF-1.7", "is no text; .*convert"),
    ],
)
def test_a_damaged_file_is_named_and_can_be_left_out(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} {message}.*--skip-bad"):
        read(tmp_path / name)
    sections, bad = find_sections([tmp_path / name], Fields(), skip_bad=True)
    assert sections == [] and len(bad) == 1 and name in bad[0]


def test_utf_16_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\x00")
    refused("a.txt is UTF-16", read, tmp_path / "a.txt", Fields(separator="x"))
    for number, encoding in enumerate(("utf-16-le", "utf-16-be", "utf-32-le", "utf-8")):
        (tmp_path / f"{number}.txt").write_bytes(f"document {number}".encode(encoding))
        read(tmp_path / f"{number}.txt")  # without a mark it may be anything
    assert re.findall(r"(\d).txt is full of NUL", capsys.readouterr().err) == ["0", "1", "2"]


def test_a_file_without_the_separator_is_named(tmp_path, capsys):
    (tmp_path / "with.txt").write_text("one\r\n\r\ntwo")
    (tmp_path / "without.txt").write_text("a file\rof an old Macintosh\r\rin one piece")
    for name in ("with.txt", "without.txt"):
        read(tmp_path / name, Fields(separator="\n\n"))
    said = capsys.readouterr().err
    assert f"1 files, each one document: {tmp_path / 'without.txt'}" in said and "with.txt" not in said


def test_empty_files_are_refused_where_they_mean_damage(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).touch()
        message = f"{name} cannot be read: it is empty, 0 bytes"
        refused(message, find_sections, [tmp_path / name], Fields(), refuse_empty=True)


def test_a_file_that_changed_meanwhile_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    (section,), _ = find_sections([path], Fields())
    path.write_bytes(json_lines(TEXTS[:10]))
    refused("10 documents instead of 300: it was changed meanwhile", lambda: list(read_section(section, Fields())))
    os.truncate(path, 5)
    bad = []
    assert list(read_section(section, Fields(), bad.append)) == [None] * 300 and len(bad) == 2


def test_parquet_without_the_text_column(tmp_path):
    for number, column in enumerate((pa.array([None, None]), pa.array([], pa.null()), pa.array(TEXTS))):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        assert len(read(tmp_path / f"{number}.parquet")[0]) == len(column)
    for name, columns in (("a", {"content": ["x"]}), ("b", {"text": [1], "n": [2]})):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    words = ("3 of 5 files", "--text-column", "a.parquet has no column 'text'", "content", "b.parquet", "int64")
    refused(words, find_sections, sorted(tmp_path.iterdir()), Fields())
    pq.write_table(pa.Table.from_arrays(2 * [pa.array(TEXTS)], names=["text", "text"]), tmp_path / "c.parquet")
    refused("c.parquet has 2 columns 'text'", read, tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"id": 1, "body": "x", "meta": {"title": "y", "tags": ["z"]}}, "Text is in: body, meta.title."),
        ({"id": 1, "turns": [{"content": "x"}]}, 'Nothing in it is text: write each document as {"text": "..."}'),
    ],
)
def test_the_fields_that_hold_text_are_named(tmp_path, row, advice):
    """No advice to name a field where none is text."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table = pa.Table.from_pylist([row])
    pq.write_table(table, tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        for column in ("text", *row, "meta.tags"):
            if column != "body":
                refused(advice, read, path, Fields(column=column))


def test_datasets_own_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    (path,) = find_files([tmp_path / "saved"])[0]
    assert decoded(path) == TEXTS


def test_fields_in_fields(tmp_path):
    rows = [{"text": {"author": "me", "body": {"id": "1", "en": text}}} for text in TEXTS[:20]]
    rows += [{"text": {"author": "me", "body": None}}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text.body.en": "dots", "text": {"body": {"en": "nested"}}}))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write(table)
    fields = Fields(column="text.body.en")
    assert decoded(tmp_path / "a.jsonl", fields) == TEXTS[:20]
    assert decoded(tmp_path / "b.jsonl", fields) == ["dots"]
    for name in ("a.parquet", "a.arrow"):
        assert read(tmp_path / name, fields)[0] == [*(text.encode() for text in TEXTS[:20]), None, None]
    for column in ("text.title", "x.y"):
        refused(f"no column '{column}'", read, tmp_path / "a.parquet", Fields(column=column))
    refused("struct", read, tmp_path / "a.parquet", Fields(column="text.body"))
