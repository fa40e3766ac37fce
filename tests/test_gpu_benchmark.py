"""benchmarks/gpu.py: its parts on a CPU, its time limits, and what it reports of parts that fail."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks import gpu, head_loss
from hgpt import cli

WITHOUT_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
PARTIAL = {"card": "a card", "shape": [1, 2, 3], "dtype": "float32", "losses": {}, "skipped": {"Liger": "not here"}}


def test_time_goes_to_the_parts_in_proportion_and_the_last_are_left_out_first(monkeypatch):
    parts = {"a": (60, 30), "b": (120, 50), "c": (20, 15)}
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(print, *seconds) for name, seconds in parts.items()})
    assert gpu.time_limits(["a", "b", "c"], 400) == {"a": 120, "b": 240, "c": 40}
    assert gpu.time_limits(["a", "b", "c"], 120) == {"a": 40, "b": 80}  # c would get 12 s
    assert gpu.time_limits(["a", "b", "c"], 60) == {"a": 60}
    assert gpu.time_limits(["a", "b", "c"], 29) == {}
    assert gpu.time_limits(["c"], 29) == {"c": 29}  # when its turn comes


@pytest.mark.parametrize("name", ["head", "step", "generate"])
def test_a_part_on_the_cpu(name, tmp_path):
    saved: list[dict] = []
    gpu.PARTS[name].run(gpu.Job("cpu", time.monotonic() + 100, tmp_path, saved.append))
    lines = gpu.TABLES[name](json.loads(json.dumps(saved[-1])))
    assert max(map(len, lines)) <= 100
    if name == "head":
        losses = saved[-1]["losses"]
        assert {"harmonic", "softmax", "F.cross_entropy", "dense harmonic"} <= set(losses)
        assert saved[-1]["skipped"].keys() >= {"Liger", "Apple CCE", "quack", "F.cross_entropy, compiled"}
        assert all(0 <= error < 1e-5 for row in losses.values() for error in row["errors"])
        assert losses["harmonic"]["harmonic / this"] == 1 and losses["softmax"]["ms"] > 0
    elif name == "step":
        assert list(saved[-1]["micro_batches"]) == ["32", "16", "64", "8"]
        assert all(row["plain"]["tokens_per_second"] > 0 for row in saved[-1]["micro_batches"].values())
    else:
        assert [(row["head"], row["batch"]) for row in saved[-1]["rows"]] == [
            (head, batch) for batch in (1, 2) for head in ("harmonic", "softmax")
        ]


def test_a_part_that_fails_or_hangs_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """`head` hangs after it has saved something, `train` fails, `tests` is no longer possible, `energy` is done."""
    seconds = {"head": (1, 1), "train": (3, 1), "tests": (50, 50), "energy": (4, 1)}
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(print, *both) for name, both in seconds.items()})
    monkeypatch.setattr(gpu, "MARGIN", 0)

    def command(name: str, device: str, limit: float, work: Path) -> list[str]:
        (work / "head.json").write_text(json.dumps(PARTIAL))
        code = {"head": "import time; time.sleep(60)", "train": "1 / 0", "energy": "print('done')"}[name]
        return [sys.executable, "-c", code]

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    out, begin = tmp_path / "out", time.monotonic()
    assert cli.run(gpu.main, ["--device", "cpu", "--minutes", "0.14", "--out", str(out)]) == 0
    assert time.monotonic() - begin < 8.4
    report = json.loads((out / "gpu.json").read_text())
    parts = report["parts"]
    assert [record["status"] for record in parts.values()] == ["stopped", "failed", "left out", "done"]
    assert parts["head"]["result"] == PARTIAL and "reached its limit" in parts["head"]["reason"]
    assert parts["train"]["reason"] == "ZeroDivisionError: division by zero" and parts["energy"]["reason"] is None
    assert "needs 50" in parts["tests"]["reason"]
    assert report["card"] == "a card" and report["versions"]["transformers"] == transformers.__version__
    assert len(report["commit"]) == 40 or report["commit"] == "unknown"
    printed = capsys.readouterr().out
    assert "left out unless an earlier part ends early: tests" in printed
    assert "skipped: Liger (not here)" in (text := (out / "gpu.txt").read_text()) and text in printed
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--minutes 0.5 --device cpu", "--minutes is too few for any part"),
        ("--minutes 0.5 --device cpu --parts step", "step need at least 75 s"),
        ("--device nonsense", "--device nonsense cannot be used here"),
        pytest.param("", "there is no GPU here", marks=WITHOUT_GPU),
        ("--device cpu", "has the gpu.json of another call"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    monkeypatch.setattr(gpu, "MARGIN", 25)
    assert cli.run(gpu.main, [*arguments.split(), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "gpu.json").read_text() == "{}"


def test_the_goals_are_ratios_of_one_run():
    harmonic, ratios = {"tokens_per_second": 500, "mfu": 0.5}, {"harmonic / softmax": 0.99, "harmonic / plain": 1.1}
    liger, extra = {"harmonic / this": 0.9, "softmax / this": 0.8}, {"harmonic": 30, "dense harmonic": 1000}
    alone = {"head": "harmonic", "batch": 1, "tokens_per_second": 1000, "share_of_head": 0.07}
    results = {
        "head": {"losses": {"Liger": liger, **{name: {"extra_bytes": size} for name, size in extra.items()}}},
        "step": {"micro_batches": {"32": {"harmonic": harmonic, **ratios}}},
        "train": {"tokens_per_second": 490},
        "generate": {"rows": [alone | {"head": "softmax", "tokens_per_second": 7}, alone]},
    }
    assert [value for _, _, value, _ in gpu.goals(results)] == [0.9, 0.8, 0.03, 0.99, 1.1, 0.5, 0.98, 1000, 0.07]
    assert {value for _, _, value, _ in gpu.goals({"head": {}})} == {None}


def test_a_missing_library_is_named(monkeypatch):
    def fails() -> None:
        raise ImportError("no module of that name")

    settings = head_loss.Settings(8, 4, 16, torch.float32, "meta", 1)
    monkeypatch.setattr(head_loss, "LIBRARIES", {"Liger": fails, "quack": lambda: print})
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)  # torch 2.11 does not have it
    found = head_loss.all_variants(settings)
    assert found["Liger"] == "ImportError: no module of that name" and found["quack"] is print
    assert found["F.linear_cross_entropy"] == f"torch {torch.__version__} does not have it"
    assert not {"Liger", "F.linear_cross_entropy"} & set(head_loss.variants(settings))


def test_the_tests_of_other_machines_are_not_collected(tmp_path, monkeypatch):
    """On a GPU only the files with tests for it: others may need packages that are not there."""
    asked: list[str] = []
    fake = SimpleNamespace(main=lambda arguments, plugins: asked.extend(arguments) or 0, ExitCode=SimpleNamespace(OK=0))
    monkeypatch.setitem(sys.modules, "pytest", fake)
    gpu.tests(gpu.Job("cuda", 0, tmp_path, print))
    files = {Path(name).name for name in asked if name.endswith(".py")}
    assert {"test_gpu.py", "test_batches.py"} <= files and "test_modeling.py" not in files


@pytest.mark.slow
def test_every_part_on_the_cpu(tmp_path):
    assert cli.run(gpu.main, ["--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: record["status"] for name, record in report["parts"].items()} == dict.fromkeys(gpu.PARTS, "done")
    trained = report["parts"]["train"]["result"]
    assert trained["tokens_per_second"] > 0 and trained["steps"] == 6 and 0 < trained["warm_up"] < trained["whole"]
    assert {entry["outcome"] for entry in report["parts"]["tests"]["result"]["tests"].values()} == {"passed"}
    assert report["parts"]["energy"]["result"]["seconds"] > 0
