"""The benchmark of the whole step runs."""

import pytest

from benchmarks import train_step


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "1", "--heads", "2", "--dim", "16", "--seq-len", "8", "--micro-batch", "2", "--vocab", "50"]
    train_step.main([*sizes, "--rounds", "2", "--threads", "1"])
    out = capsys.readouterr().out
    assert "16 tokens per step" in out and "harmonic / softmax, tokens/s:" in out
