"""The benchmark of the heads runs, and measures what it says."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import head_loss, head_scaling


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    head_loss.main(["--shape", "64x16x200", "--rounds", "2", "--threads", "1", "--skip", "memory"])
    out = capsys.readouterr().out
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(split, out.splitlines()) if cells}
    assert {"dense harmonic", "fused harmonic", "F.cross_entropy(x @ W.T)", "F.linear_cross_entropy"} <= set(rows)
    assert rows["F.cross_entropy(x @ W.T)"][1] == "1.000"
    for name in set(rows) - {"loss"}:
        if "---" not in name:
            assert all(0 <= float(error) < 1e-4 for error in rows[name][-1].split(","))


def test_other_distances(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["cosine", "mahalanobis:metric=low_rank,rank=4", "manhattan", "minkowski:p=3"]
    only = ["--only", "fused harmonic", "--skip", "memory", "--rounds", "1", "--threads", "1"]
    head_loss.main(["--shape", "64x16x200", "--distances", *names, *only])
    table = filter(None, map(split, capsys.readouterr().out.splitlines()))
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in table}
    for name in ("fused harmonic", *(f"harmonic, {name}" for name in names)):
        assert float(rows[name][1]) > 0 and all(0 <= float(error) < 1e-4 for error in rows[name][-1].split(","))
    assert rows["fused harmonic"][1] == "1.000"


def split(line: str) -> list[str]:
    return line.split("|") if line.startswith("|") else []


def test_memory_is_that_of_the_gradients_at_least() -> None:
    settings = head_loss.Settings(256, 256, 8192, torch.float32, "cpu", 1, 64, "2*sqrt_dim")
    memory = head_loss.in_a_process_of_its_own("fused harmonic", settings)
    dense = head_loss.in_a_process_of_its_own("dense harmonic", settings)
    gradient, matrix = 8192 * 256 * 4, 256 * 8192 * 4
    assert gradient < memory < dense
    assert 3 * matrix < dense < 20 * matrix


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--shape", "3x4"], "three sizes"),
        (["--only", "magic"], "no variant .'magic'. here; there are"),
        (["--distances", "minkowski"], "--distances: p is required"),
    ):
        with pytest.raises(SystemExit):
            head_loss.main(arguments)
        assert re.search(message, capsys.readouterr().err)


def test_the_scaling_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        head_scaling, "in_a_process_of_its_own", lambda name, settings: 2**20
    )  # its start takes seconds
    out = tmp_path / "scaling.svg"
    sizes = ["--first", "64", "--max-positions", "64", "--max-rows", "64", "--positions", "64", "--rows", "64"]
    head_scaling.main(["--out", str(out), *sizes, "--dim", "8", "--rounds", "1", "--threads", "1", "--limit", "0"])
    printed = capsys.readouterr().out
    assert out.exists() and "positions      64  fused harmonic" in printed and "rows      64  fused harmonic" in printed
    assert "dense harmonic" not in printed  # it does not fit into 0 GiB
