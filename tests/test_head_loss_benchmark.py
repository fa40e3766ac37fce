"""The benchmark of the heads runs, and measures what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import head_loss, head_scaling
from hgpt.errors import UserError

SETTINGS = head_loss.Settings(256, 256, 8192, torch.float32, "cpu", 1, 64)


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Loss → its cells in the table that the benchmark prints of a small problem; no errors may be large."""
    head_loss.main(["--shape", "64x16x200", "--rounds", "2", "--threads", "1", "--skip", "memory", *arguments])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines[2:]}
    assert all(0 <= float(error) < 1e-4 for cells in rows.values() for error in cells[-1].split(","))
    return rows


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    uncompiled = [name for name in head_loss.variants(SETTINGS) if "compiled" not in name]
    rows = table(capsys, "--only", *uncompiled)
    assert set(rows) == set(uncompiled) >= {"dense harmonic", "fused harmonic", "F.cross_entropy(x @ W.T)"}
    assert ("F.linear_cross_entropy" in rows) == hasattr(torch.nn.functional, "linear_cross_entropy")
    assert rows["F.cross_entropy(x @ W.T)"][1] == "1.000"
    names = ["cosine", "mahalanobis:metric=low_rank,rank=4", "manhattan", "minkowski:p=3"]
    rows = table(capsys, "--distances", *names, "--only", "fused harmonic")
    assert set(rows) == {"fused harmonic", *(f"harmonic, {name}" for name in names)}
    assert rows["fused harmonic"][1] == "1.000" and all(float(cells[1]) > 0 for cells in rows.values())


@pytest.mark.slow
def test_memory_is_that_of_the_gradients_at_least() -> None:
    times, memory = head_loss.in_own_process("fused harmonic", SETTINGS, 2)
    assert len(times) == 2 and min(times) > 0
    _, dense = head_loss.in_own_process("dense harmonic", SETTINGS)
    gradient, matrix = 8192 * 256 * 4, 256 * 8192 * 4
    assert gradient < memory < dense
    assert 3 * matrix < dense < 20 * matrix
    with_cosine = replace(SETTINGS, distances=("cosine",))
    _, distance = head_loss.in_own_process("harmonic, cosine", with_cosine)
    assert memory < distance < dense  # normalised centres beside the gradient


def test_errors() -> None:
    for arguments, message in (
        (["--shape", "3x4"], "three sizes"),
        (["--only", "magic"], "no variant .'magic'. here; there are"),
        (["--distances", "minkowski"], "--distances: p is required"),
    ):
        with pytest.raises(UserError, match=message):
            head_loss.main(arguments)


def test_the_scaling_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def point(name: str, settings: head_loss.Settings, passes: int) -> tuple[list[float], int]:
        measured.append((name, settings.positions, settings.rows))  # a process of its own takes seconds to start
        return [settings.positions * settings.rows / 1e4] * passes, 2**20

    monkeypatch.setattr(head_scaling, "in_own_process", point)
    out = tmp_path / "scaling.svg"
    sizes = ["--first", "64", "--max-positions", "256", "--max-rows", "128", "--positions", "64", "--rows", "64"]
    few = ["--dim", "8", "--rounds", "1", "--threads", "1"]
    head_scaling.main(["--out", str(out), *sizes, *few, "--limit", "0", "--patience", "1.2"])
    printed = capsys.readouterr().out
    assert out.exists() and "positions      64  fused harmonic" in printed and "rows     128  fused harmonic" in printed
    assert "dense harmonic" not in printed  # it does not fit into 0 GiB
    # 0.41 and 0.82 s; the next would be 1.64 s.
    assert [size for name, size, rows in measured if name == "fused harmonic" and rows == 64] == [64, 128, 64]
    assert len(measured) == 2 * (2 + 2)
