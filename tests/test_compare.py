"""hgpt/compare.py: the grid, what is trained and what is not, and the table; with a trainer that only pretends."""

import csv
import json
import re
import tomllib
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from scipy import stats
from small_models import byte_pairs, prepare

from hgpt import compare
from hgpt.cli import run
from hgpt.compare import (
    Axis,
    add_differences,
    at_the_edge,
    build_arms,
    parse_axis,
    readability_table,
    t_interval,
)
from hgpt.errors import UserError

main = partial(run, compare.main)

CONFIG = """
name = "{name}"
data = {{path = "data", seq_len = 16}}
train = {{steps = 20, global_batch = 4, micro_batch = 4}}
optim = {{lr = 2e-3, min_lr = 2e-4}}
[model]
n_layer = 1
n_head = 2
n_embd = 16
head = {{type = "{name}", {head}}}
"""


def pretended_training(command, env, stdout, stderr) -> CompletedProcess:
    """In the place of train.py: the loss is smallest at lr = 3e-3 and softmax is better by 0.1; lr = 1 fails."""
    file = Path(command[command.index("--config") + 1])
    config = tomllib.loads(file.read_text())
    folder = Path(config["runs_dir"]) / config["name"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(file.read_text())
    with open(folder.parent / "trained", "a") as log:  # counts how often each run is trained
        log.write(config["name"] + "\n")
    lr, seed = config["optim"]["lr"], config["train"]["seed"]
    softmax = config["model"]["head"]["type"] == "softmax"
    loss = abs(lr - 3e-3) * 100 + 4 + 0.01 * (seed - 1337) - 0.1 * softmax
    lines = [{"kind": "train", "step": 1, "loss": 9.0}]
    if lr >= 1:
        lines.append({"kind": "diverged", "step": 2, "message": "the loss of step 2 is nan"})
    else:
        gpu, threads = int(env.get("CUDA_VISIBLE_DEVICES") or -1), int(env.get("OMP_NUM_THREADS") or 0)
        measured = {"loss": loss, "accuracy": 0.25, "gpu": gpu, "threads": threads}
        assert env["TORCHINDUCTOR_CACHE_DIR"] == str(folder.parents[1] / "compiled")
        lines.append({"kind": "eval", "step": config["train"]["steps"], "time": 0, **measured})
        (folder / "checkpoints" / f"step_{config['train']['steps']:07d}").mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return CompletedProcess(command, 2 if lr >= 1 else 0)


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[str]:
    """Two configurations in the working directory, and their data."""
    monkeypatch.chdir(tmp_path)
    prepare(Path("data"), byte_pairs(300))
    heads = {"harmonic": 'exponent = "2*sqrt_dim", final_norm_gain = 0.05', "softmax": "final_norm_gain = 3.0"}
    for name, head in heads.items():
        Path(f"{name}.toml").write_text(CONFIG.format(name=name, head=head))
    compare.configured.cache_clear()  # of files with the same names in other folders
    return ["--config", "harmonic.toml", "softmax.toml"]


@pytest.fixture
def arms(files, monkeypatch) -> list[str]:
    """The same, and training is only pretended."""
    monkeypatch.setattr(compare.subprocess, "run", pretended_training)
    return files


def trained(out: Path) -> list[str]:
    file = out / "runs" / "trained"
    return file.read_text().split() if file.exists() else []


def run(*argv: str) -> dict:
    assert main([*argv, "--no-report"]) == 0
    return json.loads((Path(argv[argv.index("--out") + 1]) / "comparison.json").read_text())


SWEEP = ["--sweep", "optim.lr=1e-3,3e-3,9e-3"]


def test_each_arm_is_tuned_and_then_repeated(arms, capsys):
    command = [*arms, *SWEEP, "--seeds", "3", "--out", "out"]
    result = run(*command)
    before = trained(Path("out"))
    assert len(before) == 2 * (3 + 2)
    harmonic, softmax = result["arms"]
    for arm in (harmonic, softmax):
        assert arm["best"] == {"optim.lr": "3e-3"} and arm["at_the_edge"] == [] and len(arm["tried"]) == 3
        assert arm["sd"] == pytest.approx(0.01)
        assert arm["diagnostics"]["accuracy"] == 0.25
    assert harmonic["losses"] == pytest.approx([4, 4.01, 4.02])
    assert softmax["mean"] == pytest.approx(3.91)
    assert softmax["difference"] == pytest.approx(-0.1)
    # The seeds shift both arms alike: paired, the difference has no spread at all.
    assert softmax["difference_interval"] == pytest.approx((-0.1, -0.1))
    assert "| softmax | lr 3e-3 | 3.9100 |" in capsys.readouterr().out
    assert Path("out/table.csv").read_text().count("\n") == 3
    # The minimum moves with the learning rate.
    config = tomllib.loads(Path("out/configs/harmonic-lr9e-3-seed0.toml").read_text())
    assert config["optim"]["lr"] == 0.009 and config["optim"]["min_lr"] == pytest.approx(0.0009)
    assert config["train"]["seed"] == 1337
    # The same command goes on where it stopped.
    Path("out/runs/harmonic-lr3e-3-seed1/metrics.jsonl").write_text('{"kind": "train", "step": 3}\n{"kin')
    assert run(*command) == result and trained(Path("out")) == [*before, "harmonic-lr3e-3-seed1"]
    # A run that finished with other settings is not taken for the wanted one, unless they change nothing measured.
    capsys.readouterr()
    assert main([*command, "--set", "optim.weight_decay=0.2", "--no-report"]) == 2
    assert "optim.weight_decay: 0.1 there, 0.2 wanted" in capsys.readouterr().err
    assert main([*command, "--set", "train.micro_batch=2", "--no-report"]) == 0


def test_one_sweep_after_the_other(arms):
    # The pretended loss does not depend on the gain: of equals the first is the best.
    command = [*arms, "--search", "coordinate", "--sweep", "optim.lr=1e-3,2e-3,9e-3,3e-3"]
    command += ["--sweep", "softmax:model.head.final_norm_gain=1,2,3", "--seeds", "2", "--out", "out"]
    harmonic, softmax = run(*command)["arms"]
    assert harmonic["best"] == {"optim.lr": "3e-3"} and softmax["best"]["optim.lr"] == "3e-3"
    assert [entry["point"] for entry in softmax["tried"]] == [
        {"optim.lr": lr, "model.head.final_norm_gain": gain}
        for lr, gain in [("1e-3", "2"), ("2e-3", "2"), ("9e-3", "2"), ("3e-3", "1"), ("3e-3", "2"), ("3e-3", "3")]
    ]
    assert softmax["best"]["model.head.final_norm_gain"] == "1" and len(softmax["losses"]) == 2
    assert softmax["at_the_edge"] == ["model.head.final_norm_gain"]
    # 4 learning rates of each, 2 more gains of one, 1 more seed of each.
    assert len(trained(Path("out"))) == len(set(trained(Path("out")))) == 8 + 2 + 2
    # What is there serves the whole grid, too.
    grid = [option for option in command if option not in ("--search", "coordinate")]
    assert len(run(*grid)["arms"][1]["tried"]) == 12
    assert len(trained(Path("out"))) == 4 + 12 + 2
    # Without sweeps: one run of each arm and seed.
    run(*arms, "--search", "coordinate", "--seeds", "2", "--out", "other")
    assert len(trained(Path("other"))) == 4


def test_columns_for_what_some_runs_have_logged(arms, capsys):
    command = [*arms, *SWEEP, "--seeds", "2", "--out", "out"]
    assert run(*command)["arms"][0]["joules_per_token"] is None
    printed = capsys.readouterr().out
    assert "J per token" not in printed and "tokens/s" not in printed
    # The second half is the steps 12, 16 and 20: mean 2, standard deviation 1.
    lines = [(4, 90.0, 1.0), (8, 50.0, 700.0), (12, 1.0, 900.0), (16, 2.0, 800.0), (20, 3.0, 1000.0)]
    steps = [
        {"kind": "train", "step": step, "grad_norm": norm, "tokens_per_second": rate} for step, norm, rate in lines
    ]
    steps.append({"kind": "train", "step": 20, "grad_norm": "x", "tokens_per_second": None})  # no numbers
    for seed, rates in ((0, (1.0, 100.0, "x")), (1, (50.0,))):  # the last number of energy counts
        energy = [{"kind": "energy", "step": 20, "tokens_per_joule": rate} for rate in rates]
        metrics = Path(f"out/runs/harmonic-lr3e-3-seed{seed}/metrics.jsonl")
        metrics.write_text("".join(json.dumps(r) + "\n" for r in [*steps, *energy]) + metrics.read_text())
    harmonic, softmax = run(*command)["arms"]
    measured = ("gradient_norm_spread", "tokens_per_second", "joules_per_token")
    assert [harmonic[name] for name in measured] == pytest.approx([0.5, 850.0, 0.015])  # without each first speed
    assert [softmax[name] for name in measured] == [None] * 3
    header, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.endswith("| gradient norm, sd / mean | tokens/s | J per token |")
    assert first.endswith("| 0.50 | 850 | 0.015 |") and second.endswith("|  |  |  |")


def test_a_run_that_diverges_is_not_the_best_and_not_repeated(arms, capsys):
    command = [*arms, "--sweep", "optim.lr=3e-3,1", "--seeds", "1", "--out", "out"]
    result = run(*command)
    assert result["arms"][0]["best"] == {"optim.lr": "3e-3"}
    assert result["arms"][0]["tried"][1]["loss"] is None
    assert result["runs"]["harmonic-lr1-seed0"]["message"] == "the loss of step 2 is nan"
    before = len(trained(Path("out")))
    run(*command)
    assert len(trained(Path("out"))) == before
    assert "Failed, because the loss was not finite: harmonic-lr1-seed0, softmax-lr1-seed0." in capsys.readouterr().out
    # An arm of which every run diverges is shown as failed, and the others go on.
    result = run(*arms, "--sweep", "softmax:optim.lr=1,2", "--seeds", "2", "--out", "one")
    assert [arm["mean"] for arm in result["arms"]] == [pytest.approx(4.105), None]
    assert "| softmax | lr 1 | failed |  |  | failed, failed |  |  |" in capsys.readouterr().out
    assert main([*arms, "--sweep", "optim.lr=1,2", "--seeds", "1", "--out", "other", "--no-report"]) == 2
    assert "every run diverged" in capsys.readouterr().err


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    cells = ["=1+1", "@x", "+a", "-x", "\t=1", "-0.5 (-1 to 2)", "+3", "a=1", 2, None]
    compare.write_csv(tmp_path / "table.csv", [cells])
    (found,) = csv.reader((tmp_path / "table.csv").open(newline=""))
    assert found == ["'=1+1", "'@x", "'+a", "'-x", "'\t=1", "-0.5 (-1 to 2)", "+3", "a=1", "2", ""]


def test_runs_are_spread_over_gpus_or_share_the_cpu(arms, monkeypatch):
    result = run(*arms, *SWEEP, "--seeds", "1", "--gpus", "3", "5", "--out", "out")
    assert {entry["evaluation"]["gpu"] for entry in result["runs"].values()} <= {3, 5}
    assert len(trained(Path("out"))) == 6
    monkeypatch.setattr(compare.torch, "get_num_threads", lambda: 7)
    result = run(*arms, *SWEEP, "--seeds", "2", "--jobs", "2", "--out", "cpu")
    evaluations = [entry["evaluation"] for entry in result["runs"].values()]
    assert {(found["gpu"], found["threads"]) for found in evaluations} == {(-1, 3)}
    assert len(trained(Path("cpu"))) == 8


def test_varied_settings_make_arms(arms):
    vary = ["--vary", "model.tie_word_embeddings=true,false", "--vary", "harmonic:model.head.exponent=sqrt_dim,dim"]
    sweep = ["--sweep", "softmax:model.head.final_norm_gain=3,6"]
    result = run(*arms, *vary, *sweep, "--seeds", "1", "--out", "out")
    assert [(arm["arm"], len(arm["tried"])) for arm in result["arms"]] == [
        ("harmonic-tie_word_embeddingstrue-exponentsqrt_dim", 1),
        ("harmonic-tie_word_embeddingstrue-exponentdim", 1),
        ("harmonic-tie_word_embeddingsfalse-exponentsqrt_dim", 1),
        ("harmonic-tie_word_embeddingsfalse-exponentdim", 1),
        ("softmax-tie_word_embeddingstrue", 2),
        ("softmax-tie_word_embeddingsfalse", 2),
    ]


def test_a_trainer_that_breaks_is_an_error_and_tried_again(files, tmp_path, monkeypatch, capsys):
    """In a real process; only a loss that is not finite is a result."""
    trainer = tmp_path / "train.py"
    command = [*files, "--seeds", "1", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(compare, "TRAIN", trainer)
        assert main([*command, "--no-report"]) == 2
        assert f"there is no {trainer}" in capsys.readouterr().err
        trainer.write_text("import sys\nprint('error: the disk is full')\nsys.exit(2)\n")
        Path("out/runs/harmonic-seed0").mkdir(parents=True)
        Path("out/runs/harmonic-seed0/metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 9.0}\n')
        assert main([*command, "--no-report"]) == 2
    error = capsys.readouterr().err  # names both runs of the stage
    assert f"harmonic-seed0 stopped with status 2: error: the disk is full (the whole output: {tmp_path}/out/" in error
    assert "softmax-seed0 stopped" in error and "2 of 2 runs failed; the same command tries them again" in error
    monkeypatch.setattr(compare.subprocess, "run", pretended_training)
    assert run(*command)["arms"][0]["mean"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sweep optim.lr", r"--sweep takes \[ARM:\]KEY=V1,V2"),
        ("--sweep optim.lr=1,1", "the values must be different"),
        ("--sweep nobody:optim.lr=1,2", "there is no arm nobody; the arms are harmonic, softmax"),
        ("--sweep optim.lr=1,2 --vary optim.lr=1,2", "optim.lr is varied and swept"),
        ("--sweep optim.rl=1,2", "optim.rl"),
        ("--vary name=a,b", "names the runs itself"),
        ("--sweep train.seed=1,2", "--seeds"),
        ("--sweep softmax:train.steps=20,40", "train.steps is 20 in .*, 40 in softmax-steps40-seed0"),
        ("--set optim.lr=1,2", "--set takes one KEY=VALUE"),
        ("--seeds 0", "--seeds: must be at least 1; got 0"),
        ("--jobs 0", "--jobs: must be at least 1; got 0"),
        ("--jobs 2 --gpus 0", "--jobs .* --gpus"),
        ("--relations x", "--relations has no effect with --no-report"),
        # Nothing is trained when the last run of all could not be.
        ("--sweep harmonic:model.head.exponent=dim,wide", "model.head.exponent.*wide"),
        ("--vary harmonic:model.head.distance=cosine,cosines", "distance must be one of"),
        ("--vary softmax:model.head.final_norm_gain=1,x", "final_norm_gain"),
        ("--vary softmax:train.micro_batch=4,3", "micro_batch3-seed0: train.global_batch = 4 cannot be reached"),
        ("--vary softmax:model.init_from=none/x", "none/x"),
        ("--vary softmax:train.distill_from=none/x", "train.distill_from = none/x"),
        ("--set data.path=nowhere", "nowhere"),
    ],
)
def test_bad_input(arms, capsys, options, message):
    assert main([*arms, "--out", "out", "--no-report", *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert trained(Path("out")) == []


def test_arms_take_the_names_of_their_files():
    with pytest.raises(UserError, match="which must differ; got a, a"):
        build_arms(["a.toml", "x/a.toml"], [], [], [])
    assert parse_axis("a:b.c=1, 2", "--vary") == Axis(arm="a", key="b.c", values=("1", "2"))


def test_edges_and_students_intervals():
    assert at_the_edge(["1e-3", "3e-3", "6e-3"], "6e-3") and not at_the_edge(["1e-3", "6e-3", "3e-3"], "3e-3")
    assert not at_the_edge(["3e-3"], "3e-3") and not at_the_edge(["sqrt_dim", "dim"], "dim")  # nothing was tuned
    values = [4.0, 4.1, 4.4]
    assert t_interval(values) == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    assert t_interval([4.0]) is None


def test_differences_are_paired_and_corrected():
    table = [{"losses": [4.0, 4.2, 4.1]}, {"losses": [4.1, 4.35, 4.2]}, {"losses": [4.0, None, 4.3]}]
    add_differences(table)
    expected = stats.ttest_rel([4.1, 4.35, 4.2], [4.0, 4.2, 4.1]).pvalue
    other = stats.ttest_rel([4.0, 4.3], [4.0, 4.1]).pvalue
    assert table[1]["difference"] == pytest.approx(0.35 / 3)
    assert table[1]["difference_p_holm"] == pytest.approx(2 * expected)
    assert table[2]["difference_p_holm"] == pytest.approx(max(other, 2 * expected))
    assert table[2]["difference"] == pytest.approx(0.1)


def test_readability_table():
    runs = [("a", 0, 4.0), ("a", 1, 4.2), ("b", 1, 5.0), ("c", 0, 5.0), ("c", 1, 5.4)]
    rows = [dict.fromkeys(compare.READABILITY) | {"arm": arm, "seed": seed, "loss": loss} for arm, seed, loss in runs]
    rows[0]["ece"], rows[3]["ece"] = 0.01, 0.02
    lines = readability_table(rows).splitlines()
    assert lines[0] == "| measure | a | b | c |"
    assert lines[2] == "| validation loss | 4.100 ± 0.141 | 5.000 | 5.200 ± 0.283 |"
    assert "| minus a | b | c |" in lines
    # c minus a: 1.0 and 1.2, whose interval is 1.1 ± 12.706 · 0.1.
    assert "| validation loss | +0.8000 | +1.1000 (-0.1706 to +2.3706) |" in lines
    assert "| expected calibration error |  | +0.0100 |" in lines


@pytest.mark.slow
def test_the_whole_experiment_with_the_real_trainer(files, tmp_path):
    from data_prep.python_docs import main as prepare

    prepare(["--out", str(tmp_path / "data"), "--tokenizer", "bpe:400"])  # where the configurations look for it
    out = tmp_path / "out"
    assert main([*files, "--sweep", "optim.lr=1e-3,3e-3", "--seeds", "2", "--out", str(out)]) == 0
    assert (out / "report" / "index.html").is_file() and (out / "readability.png").is_file()
    assert (out / "readability.csv").read_text().count("\n") == 5
    assert "validation loss" in (out / "readability.md").read_text()
