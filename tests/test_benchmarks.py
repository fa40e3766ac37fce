"""benchmarks/: each runs, prints its figures, and measures what it says; tests/test_gpu_benchmark.py has the GPU's."""

import random
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_texts import refused
from torch.nn import functional as F

from benchmarks import data_prep, expressivity, head_loss, head_scaling, sampling, train_step
from hgpt.convert import Softmax
from hgpt.data.shards import TokenShards
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM

# ---------------------------------------------------------------------------------------------------- data_prep

TEXTS = [" ".join(random.Random(n).choices(["distance", "centre", "日本", "loss"], k=n % 40 + 1)) for n in range(300)]


def documents(stream):
    return sorted(tuple(part) for part in np.split(stream, np.flatnonzero(stream == 50256) + 1) if len(part))


@pytest.mark.slow
def test_nanogpts_way_gives_the_same_documents_on_both_sides(tmp_path):
    (tmp_path / "source").mkdir()
    files = [tmp_path / "source" / f"{number}.parquet" for number in range(2)]
    for file, texts in zip(files, (TEXTS[:150], TEXTS[150:]), strict=True):
        pq.write_table(pa.table({"text": texts}), file)
    timings = [way(files, tmp_path, 1) for way in data_prep.WAYS.values()]
    assert all(timing.seconds > 0 for timing in timings)
    lengths = []
    for ours, theirs in (("train", "train"), ("val", "test")):
        shards = TokenShards.open(tmp_path / "ours", ours)
        lengths.append(len(shards))
        expected = np.fromfile(tmp_path / f"{theirs}.bin", dtype=np.uint16)
        assert documents(shards.read(0, len(shards))) == documents(expected.astype(np.int64))
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
    assert "reading of 0.002 billion tokens, 3 shards" in printed and "read ahead, on cpu" in printed
    assert float(re.search(r"a window of 129 tokens\s+([\d.]+) us", printed)[1]) > 0
    assert len(TokenShards.open(tmp_path, "train")) == 2_000_000


# ------------------------------------------------------------------------------------------------- expressivity


@pytest.fixture
def softmax():
    """A layer made by hand."""
    return Softmax(w=torch.randn(30, 8), b=torch.randn(30), h=torch.randn(200, 8))


@pytest.mark.parametrize("radius", [False, True])
def test_before_the_fit_the_order_of_tokens_is_softmaxs(softmax, radius):
    x, centres, log_weight = expressivity.start(softmax, expressivity.balance(softmax), 1e4, radius)
    scores = log_weight.double() - 1e4 * torch.cdist(x.double(), centres.double()).log()
    assert (scores.argmax(1) == softmax.logits(softmax.h).argmax(1)).double().mean() > 0.98


def test_a_fit_lowers_the_divergence_and_a_large_exponent_allows_a_smaller_one(softmax):
    targets = softmax.logits(softmax.h).argmax(1)
    begun, small, large = (
        expressivity.fit(softmax, n, True, False, targets, steps) for n, steps in ((2.0, 1), (2.0, 150), (60.0, 150))
    )
    assert large[0] < small[0] < begun[0]
    assert large[2] == pytest.approx(float(F.cross_entropy(softmax.logits(softmax.h), targets)), abs=0.02)
    assert small[1] < large[1] < 1  # the smaller n, the nearer the target


# ------------------------------------------------------------------------------------ head_loss and head_scaling

SETTINGS = head_loss.Settings(256, 256, 8192, torch.float32, "cpu", 1, 64)


def table(capsys, *arguments):
    """Loss → its cells in the table that the benchmark prints of a small problem; no errors may be large."""
    head_loss.main(["--shape", "64x16x200", "--rounds", "2", "--threads", "1", "--skip", "memory", *arguments])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines[2:]}
    assert all(0 <= float(error) < 1e-4 for cells in rows.values() for error in cells[-1].split(","))
    return rows


def test_the_table_of_losses(capsys):
    uncompiled = [name for name in head_loss.variants(SETTINGS) if "compiled" not in name]
    rows = table(capsys, "--only", *uncompiled)
    assert set(rows) == set(uncompiled) >= {"dense harmonic", "fused harmonic", "F.cross_entropy(x @ W.T)"}
    assert ("F.linear_cross_entropy" in rows) == hasattr(torch.nn.functional, "linear_cross_entropy")
    assert rows["F.cross_entropy(x @ W.T)"][1] == "1.000"
    names = ["cosine", "mahalanobis:metric=low_rank,rank=4", "manhattan", "minkowski:p=3"]
    rows = table(capsys, "--distances", *names, "--only", "fused harmonic")
    assert set(rows) == {"fused harmonic", *(f"harmonic, {name}" for name in names)}
    assert rows["fused harmonic"][1] == "1.000" and all(float(cells[1]) > 0 for cells in rows.values())
    refused("three sizes", head_loss.main, ["--shape", "3x4"])
    refused("no variant ['magic'] here; there are", head_loss.main, ["--only", "magic"])
    refused("--distances: p is required", head_loss.main, ["--distances", "minkowski"])


@pytest.mark.slow
def test_memory_is_that_of_the_gradients_at_least():
    times, memory = head_loss.in_own_process("fused harmonic", SETTINGS, 2)
    assert len(times) == 2 and min(times) > 0
    _, dense = head_loss.in_own_process("dense harmonic", SETTINGS)
    gradient, matrix = 8192 * 256 * 4, 256 * 8192 * 4
    assert gradient < memory < dense
    assert 3 * matrix < dense < 20 * matrix
    with_cosine = replace(SETTINGS, distances=("cosine",))
    _, distance = head_loss.in_own_process("harmonic, cosine", with_cosine)
    assert memory < distance < dense  # normalised centres beside the gradient


def test_the_scaling_figure(tmp_path, capsys, monkeypatch):
    measured = []

    def point(name, settings, passes):
        measured.append((name, settings.positions, settings.rows))  # a process of its own takes seconds to start
        return [settings.positions * settings.rows / 1e4] * passes, 2**20

    monkeypatch.setattr(head_scaling, "in_own_process", point)
    options = "--first 64 --max-positions 256 --max-rows 128 --positions 64 --rows 64 --dim 8 --rounds 1 --threads 1"
    out = tmp_path / "scaling.svg"
    head_scaling.main(["--out", str(out), *options.split(), "--limit", "0", "--patience", "1.2"])
    printed = capsys.readouterr().out
    assert out.exists() and "positions      64  fused harmonic" in printed and "rows     128  fused harmonic" in printed
    assert "dense harmonic" not in printed  # it does not fit into 0 GiB
    # 0.41 and 0.82 s; the next would be 1.64 s.
    assert [size for name, size, rows in measured if name == "fused harmonic" and rows == 64] == [64, 128, 64]
    assert len(measured) == 2 * (2 + 2)


# ------------------------------------------------------------------------------------------ sampling, train_step


def test_sampling_prints_a_row_for_each_head_and_batch(capsys):
    sizes = "--layers 1 --heads 2 --dim 16 --vocab 50 --prompt 4 --new-tokens 6 --batch 1 3 --rounds 1 --threads 1"
    sampling.main(sizes.split())
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [tuple(row[:2]) for row in rows] == [(f"| {head}", n) for n in "13" for head in ("harmonic", "softmax")]
    for row in rows:
        assert float(row[2].replace(",", "")) > 0 and 0 < float(row[-1].rstrip("% |")) < 100
    assert float(rows[0][4]) > 0 and rows[2][4] == ""


def test_the_report_of_a_step(capsys):
    sizes = "--layers 1 --heads 2 --dim 16 --seq-len 8 --micro-batch 2 --vocab 50 --threads 1"
    train_step.main([*sizes.split(), "--rounds", "2"])
    out = capsys.readouterr().out
    for words in ("16 tokens per step", "harmonic / softmax, tokens/s:", "harmonic / plain, tokens/s:"):
        assert words in out
    refused("--rounds: must be at least 2, for quartiles; got 1", train_step.main, ["--rounds", "1"])


def test_the_plain_model_is_the_softmax_twin():
    """It computes what it is compared with: the same loss from the same weights."""
    sizes = {"vocab_size": 50, "n_positions": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
    config = HGPTConfig(**sizes, head="softmax", pad_vocab_to_multiple_of=1)
    ours, plain = HGPTForCausalLM(config).train(), train_step.PlainGPT(config)
    names = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
    inner = {"norms.0": "ln_1", "norms.1": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    inner |= {"wide": "mlp.c_fc", "narrow": "mlp.c_proj"}
    for block in range(2):
        names |= {f"blocks.{block}.{name}": f"h.{block}.{theirs}" for name, theirs in inner.items()}
    weights = ours.state_dict()
    plain.load_state_dict({f"{name}.weight": weights[f"transformer.{theirs}.weight"] for name, theirs in names.items()})
    tokens = torch.randint(50, (3, 9))
    expected = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    torch.testing.assert_close(plain(tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-5, atol=1e-6)
