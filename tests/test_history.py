"""hgpt/history.py: the records of a run, and lines that are none."""

import json

import pytest

from hgpt.history import METRICS_FILE, newest_first, records

RECORDS = [{"kind": kind, "step": step, "loss": 1.5} for step in range(1, 4) for kind in ("train", "eval")]
NO_RECORDS = [
    "", "what?", "[1, 2]", "5", "null", '{"a": 1}', '{"kind": 3, "step": 4}', '{"kind": "train", "step": "x"}',
    '{"kind": "train", "step": true}', '{"kind": "eval", "step": 1e999}', '{"kind": "eval", "step": -1}', "\0" * 5000,
    "[" * 20_000, '{"kind": "train", "step": 1' + "0" * 400 + "}", "\xff", '{"kind": "train", "st',
]  # fmt: skip


def lines(found) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in found).encode()


def test_records_of_a_folder_of_a_file_and_of_one_kind(tmp_path, capsys):
    assert records(tmp_path) == [] == list(newest_first(tmp_path))
    (tmp_path / METRICS_FILE).write_bytes(lines(RECORDS))
    assert records(tmp_path) == records(tmp_path / METRICS_FILE) == RECORDS
    assert records(tmp_path, "eval") == RECORDS[1::2]
    assert list(newest_first(tmp_path)) == RECORDS[::-1]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("damaged", NO_RECORDS, ids=range(len(NO_RECORDS)))
def test_a_damaged_line_is_dropped_and_named(tmp_path, capsys, damaged):
    path = tmp_path / METRICS_FILE
    path.write_bytes(lines(RECORDS[:3]) + damaged.encode("latin-1") + b"\n" + lines(RECORDS[3:]))
    assert records(path) == RECORDS and records(path, "train") == RECORDS[::2]
    assert list(newest_first(path)) == RECORDS[::-1]
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{path}, line 4: " in warning


def test_a_last_line_without_its_end_is_dropped_and_many_are_one_warning(tmp_path, capsys):
    for content, found, named in (
        (lines(RECORDS) + b'{"kind": "train", "step": 9}', RECORDS, "line 7: "),
        (lines(RECORDS) + b'{"kind"', RECORDS, None),  # a command warns once
        (b"?\n" * 9, [], "line 1, 2, 3, 4, 5 and 4 more: "),
    ):
        (tmp_path / METRICS_FILE).write_bytes(content)
        assert records(tmp_path) == found == list(newest_first(tmp_path))[::-1]
        warned = capsys.readouterr().err
        assert named in warned if named else not warned


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n\n"])
def test_files_without_records(tmp_path, content):
    (tmp_path / METRICS_FILE).write_bytes(content)
    assert records(tmp_path) == [] == list(newest_first(tmp_path))
