"""benchmarks.softmax_first: which runs it makes, and its table of runs whose losses are given."""

import json
from pathlib import Path

from benchmarks import softmax_first


def test_the_runs_and_the_table(tmp_path: Path, monkeypatch, capsys) -> None:
    losses = {"first": 4.0, "softmax": 3.6, "softmax_untied": 3.59, "harmonic_4xsqrt_dim": 3.58}
    commands = []

    def call(*words: object) -> None:
        """Stands for train.py and hgpt.convert: writes only the last record."""
        words = [str(word) for word in words]
        commands.append(words)
        given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        if "name" not in given:
            return Path(words[-1]).mkdir()
        arm, seed = given["name"].rsplit("_", 1)
        seed = int(seed) - softmax_first.SEED
        record = {
            "kind": "eval",
            "step": int(given["train.steps"]),
            "loss": losses[arm] + seed * (0.1 if arm[0] == "s" else 0.12),
        }
        if arm.startswith("harmonic"):
            record["target_over_median_distance"] = 0.8
        (tmp_path / given["name"]).mkdir()
        (tmp_path / given["name"] / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(softmax_first, "call", call)
    words = ["--out", str(tmp_path), "--seeds", "2", "--exponents", "4*sqrt_dim", "--first", "6", "--second", "2"]
    table = softmax_first.main(words)
    assert len(commands) == 2 * 5  # two seeds: first part, three endings, one conversion
    lift = str(tmp_path / "converted_4xsqrt_dim_1337")
    convert = next(words for words in commands if "hgpt.convert" in words)
    assert convert[2:4] == [str(tmp_path / "first_1337"), "--exponent"] and convert[-1] == lift
    assert any({f"--model.init_from={lift}", f"--model.backbone={lift}"} <= set(words) for words in commands)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[1:3] for row in rows] == [
        ["3.6500", "3.6000, 3.7000"], ["3.6400", "3.5900, 3.6900"], ["3.6400", "3.5800, 3.7000"],
    ]  # fmt: skip
    assert [row[4] for row in rows] == ["", "", "0.800"]
    assert rows[2][3].startswith("-0.0100 (-0.137")  # −0.02 and 0.00: mean −0.01, half width 12.706 · 0.01414 / √2
    assert softmax_first.main(words) == table and len(commands) == 10  # nothing is trained again
