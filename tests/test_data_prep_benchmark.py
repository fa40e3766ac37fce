"""benchmarks/data_prep.py: what it compares gives the same tokens, and what it measures is there."""

import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import data_prep
from hgpt.data.shards import TokenShards

TEXTS = [" ".join(random.Random(n).choices(["distance", "centre", "日本", "loss"], k=n % 40 + 1)) for n in range(300)]


def documents(stream):
    return sorted(tuple(part) for part in np.split(stream, np.flatnonzero(stream == 50256) + 1) if len(part))


@pytest.mark.slow
def test_nanogpts_way_gives_the_same_documents_on_both_sides(tmp_path):
    files = []
    (tmp_path / "source").mkdir()
    for number in range(2):
        files.append(tmp_path / "source" / f"{number}.parquet")
        pq.write_table(pa.table({"text": TEXTS[150 * number : 150 * (number + 1)]}), files[-1])
    timings = [way(files, tmp_path, 1) for way in data_prep.WAYS.values()]
    assert all(timing.seconds > 0 for timing in timings)
    for ours, theirs in (("train", "train"), ("val", "test")):
        shards = TokenShards.open(tmp_path / "ours", ours)
        expected = np.fromfile(tmp_path / f"{theirs}.bin", dtype=np.uint16)
        assert documents(shards.read(0, len(shards))) == documents(expected.astype(np.int64))
    lengths = [len(TokenShards.open(tmp_path / "ours", split)) for split in ("train", "val")]
    assert [timing.tokens for timing in timings] == [sum(lengths)] * len(timings)


@pytest.mark.slow
def test_every_copy_of_the_source_is_prepared(tmp_path, capsys):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "0.parquet")
    (tmp_path / "scratch").mkdir()
    source = str(tmp_path / "0.parquet")
    data_prep.measure_preparation(source, tmp_path / "scratch", workers=1, copies=3, rounds=1)
    printed = capsys.readouterr().out
    assert "in 3 files" in printed and "ours / nanoGPT's way" in printed


def test_reading_is_measured_on_a_sparse_data_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_prep, "OPENWEBTEXT_WINDOWS", 1000)
    monkeypatch.setattr(data_prep, "TOKENS_PER_SHARD", 700_000)
    data_prep.measure_reading(tmp_path, tokens=2_000_000, seq_len=128, micro_batch=4, device="cpu")
    printed = capsys.readouterr().out
    assert "reading of 0.002 billion tokens, 3 shards" in printed
    assert float(re.search(r"a window of 129 tokens\s+([\d.]+) us", printed)[1]) > 0
    assert "read ahead, on cpu" in printed
    assert len(TokenShards.open(tmp_path, "train")) == 2_000_000
