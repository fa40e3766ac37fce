"""Every distance in a model: trained, resumed bit for bit, exported, loaded with and without hgpt, sampled, read."""

import functools
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run as launch
from remote_code import assert_same_without_hgpt, write_expected
from safetensors.torch import load_file
from small_models import relation_set
from small_run import VOCAB, assert_same_checkpoint, losses, make_config, set_back
from transformers import AutoModelForCausalLM

import hgpt
import sample
import train
from hgpt import cli
from hgpt.interpret.__main__ import main as report
from hgpt.interpret.measures import centres
from hgpt.interpret.models import find_sources, loaded
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import HeadConfig, RunConfig
from hgpt.source import initialize_from

LORENTZIAN = str(Path(__file__).parent.parent / "configs" / "distances" / "lorentzian.py")
LOW_RANK = {"metric": "low_rank", "rank": 4}
CASES: dict[str, dict[str, Any]] = {
    "euclidean": {"learn_exponent": True},
    "cosine": {"learn_exponent": True},
    "diagonal": {"distance": "mahalanobis"},
    "low_rank": {"distance": "mahalanobis", "distance_options": LOW_RANK, "learn_exponent": True},
    "full": {"distance": "mahalanobis", "distance_options": {"metric": "full"}},
    "manhattan": {"learn_exponent": True},
    "minkowski": {"distance_options": {"p": 3.0}},
    "hamming": {"distance_options": {"temperature": 0.1}},
    "lorentzian": {"distance_file": LORENTZIAN, "distance_options": {"scale": 0.5}},
    **{name: {} for name in ("chebyshev", "canberra", "bray_curtis")},
}
QUICK = ("low_rank", "lorentzian")  # matrix products and blocks, either with parameters; the others are slow tests
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)


def configuration(data: Path, runs: Path, case: str) -> RunConfig:
    head = HeadConfig(**({"exponent": "2*sqrt_dim", "final_norm_gain": 0.05, "distance": case} | CASES[case]))
    train, evaluation = {"steps": 3, "global_batch": 4, "micro_batch": 2}, {"every": 100, "diagnostic_windows": 1}
    return make_config(data, runs, head, name=case, train=train, eval=evaluation, checkpoint={"every": 2})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunConfig, dict[str, float]]]:
    """A finished run with this head, made when it is first asked for, and its last evaluation."""
    runs = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(case: str) -> tuple[RunConfig, dict[str, float]]:
        config = configuration(data, runs, case)
        return config, train.main(config)

    return make


@EVERY
def test_a_run_goes_on_bit_for_bit(run, case, tmp_path):
    config, evaluation = run(case)
    again = set_back(config, 2, runs_dir=str(tmp_path))
    assert train.main(again) == evaluation
    assert_same_checkpoint(again.run_folder / "latest", config.run_folder / "latest")
    if config.model.head.learn_exponent:
        assert evaluation["exponent"] != pytest.approx(2 * 32**0.5, rel=1e-6)


@EVERY
def test_what_it_exports_is_what_it_trained(run, case):
    config, evaluation = run(case)
    model = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model")
    head, metric = model.lm_head, model.lm_head.metric
    assert head.distance == model.config.distance == (config.model.head.distance or "euclidean")
    assert metric.options == model.config.distance_options
    start = config.model.to_hf(vocab_size=VOCAB, seq_len=16)
    torch.manual_seed(config.train.seed)
    untrained = dict(HGPTForCausalLM(start).lm_head.named_parameters())
    for name, parameter in head.named_parameters():
        if name != "metric.right":  # whose gradient is 0 as long as that of `left` has not moved it
            assert not torch.equal(parameter, untrained[name]), name
    n = float(torch.as_tensor(head.exponent).detach())
    assert n == pytest.approx(evaluation.get("exponent", 2 * 32**0.5))
    card = (config.run_folder / "latest" / "model" / "README.md").read_text()
    assert f"n = {n:g}" in card and ("learned, from 11.3137" in card) == ("exponent" in evaluation)
    assert f"`{head.distance}`" in card or head.distance == "euclidean"


@EVERY
def test_sampling_shows_its_distances(run, case, capsys):
    config, _ = run(case)
    model = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model").eval()
    position = sample.measure(model, [1, 2, 3], [5], nearest=3)[0]
    with torch.no_grad():
        exponent = float(model.lm_head.exponent)
        d = model.lm_head.distances(model.transformer(torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1])
    assert position.ratio == pytest.approx(float(d[5] / d.min()), rel=1e-4)
    assert [token for token, _ in position.nearest] == d.topk(3, largest=False).indices.tolist()
    arguments = ["--checkpoint", str(config.run_folder), "--show-distances", "--max-new-tokens", "2", "--seed", "1"]
    assert cli.run(sample.main, arguments) == 0
    output = capsys.readouterr()
    assert f"{model.config.distance} distance from the hidden state" in output.out
    assert f"harmonic head, {model.config.distance}, n = {exponent:.4g}" in output.err


@EVERY
def test_reading_uses_the_heads_metric(run, case):
    config, _ = run(case)
    (source,) = find_sources([str(config.run_folder)])
    with loaded(source, torch.device("cpu")) as model:
        assert model.description.startswith(f"harmonic ({model.model.config.distance}), n = ")
        centre = torch.from_numpy(model.centre_rows()[7:8]).double()
        near, distances = centres.nearest_centres(model, np.array([7]), 3)
        by_metric = model.model.lm_head.double().distances(centre)[0].detach()
        by_metric[7] = torch.inf
        model.model.float()
        nearest = by_metric.topk(3, largest=False)
        assert near[0].tolist() == nearest.indices.tolist()
        assert distances[0] == pytest.approx(nearest.values.numpy(), rel=2e-2)
        x = model.hidden_states(torch.arange(10)[None])[-1][0].clone()
        indices, ratios = centres.nearest_contexts(model, x.numpy(), np.array([7]), 1)
        index, ratio = indices[0, 0], ratios[0, 0]
        with torch.inference_mode():
            d = model.model.lm_head.distances(x)
        assert index == int(d[:, 7].argmin())
        assert ratio == pytest.approx(float(d[index, 7] / d[index].min()), rel=1e-3)
        torch.testing.assert_close(model.log_distances(x, model.logits(x)), d.log(), rtol=1e-3, atol=1e-4)


LOADS_A_DISTANCE_THAT_NOBODY_KNOWS = """
try:
    AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
except ValueError as error:
    assert "distance must be one of euclidean, cosine" in str(error) and "got 'lorentzian'" in str(error), error
else:
    raise SystemExit("a distance that nobody knows was loaded")
"""


@pytest.mark.slow
def test_remote_code_where_hgpt_cannot_be_imported(run, tmp_path):
    folders = {case: tmp_path / f"{case}_model" for case in CASES}
    for case, folder in folders.items():
        shutil.copytree(run(case)[0].run_folder / "latest" / "model", folder)
        write_expected(AutoModelForCausalLM.from_pretrained(folder).eval(), folder, torch.arange(6)[None])
    unknown = str(folders.pop("lorentzian"))
    assert_same_without_hgpt(
        list(folders.values()), tmp_path, LOADS_A_DISTANCE_THAT_NOBODY_KNOWS.format(folder=unknown)
    )


# A checkpoint and another configuration


def test_a_distance_of_ones_own_needs_its_file(run, tmp_path, monkeypatch, capsys):
    folder = run("lorentzian")[0].run_folder
    with monkeypatch.context() as patch:
        patch.delitem(hgpt.model.distances._REGISTRY, "lorentzian")
        with pytest.raises(ValueError, match=r"distance must be one of .*got 'lorentzian'.*hgpt\.register_distance"):
            AutoModelForCausalLM.from_pretrained(folder / "latest" / "model")
    relations = relation_set(tmp_path / "relations", [("one", "two"), ("three", "four")])
    out = tmp_path / "out"
    sampling = ["--checkpoint", str(folder), "--max-new-tokens", "1"]
    reporting = [str(folder), "--out", str(out), "--bootstrap", "100", "--final-only", "--relations", relations]
    for command, arguments in ((sample.main, sampling), (report, reporting)):
        monkeypatch.delitem(hgpt.model.distances._REGISTRY, "lorentzian")
        hgpt.model.distances.load_distances.cache_clear()
        assert cli.run(command, arguments) == 2
        assert "got 'lorentzian'" in capsys.readouterr().err
        assert cli.run(command, [*arguments, "--distance-file", str(tmp_path / "none.py")]) == 2
        assert "none.py" in capsys.readouterr().err
        assert cli.run(command, [*arguments, "--distance-file", LORENTZIAN]) == 0
    assert (out / "index.html").exists()


def test_starting_from_a_model_with_another_distance(run):
    config, _ = run("low_rank")

    def start(**head: Any) -> tuple[HGPTForCausalLM, list[str]]:
        settings = {"distance_options": None, "learn_exponent": False, "distance": "euclidean"} | head
        model_config = replace(config.model, head=replace(config.model.head, **settings))
        model = HGPTForCausalLM(model_config.to_hf(vocab_size=VOCAB, seq_len=16))
        return model, initialize_from(model, str(config.run_folder))[1:]  # the first line says whose weights they are

    trained = AutoModelForCausalLM.from_pretrained(config.run_folder / "latest" / "model")
    same, notes = start(distance="mahalanobis", distance_options=LOW_RANK, learn_exponent=True)
    assert notes == []
    torch.testing.assert_close(same.state_dict(), trained.state_dict(), rtol=0, atol=0)
    learnt = float(trained.lm_head.exponent.detach())
    other, notes = start(distance="mahalanobis", distance_options={"metric": "low_rank", "rank": 3})
    assert other.lm_head.exponent == pytest.approx(2 * 32**0.5)
    assert notes == [
        f"model.head.exponent is {2 * 32**0.5!r}, the checkpoint was trained with {learnt!r}",
        "model.head.learn_exponent is False, the checkpoint was trained with True",
        "model.head.distance_options is {'metric': 'low_rank', 'rank': 3}, the checkpoint was trained with "
        "{'metric': 'low_rank', 'rank': 4}",
        "not in the checkpoint, kept as initialised: lm_head.metric.left, lm_head.metric.right",
        "not used from the checkpoint: lm_head.log_exponent, lm_head.metric.left, lm_head.metric.right",
    ]
    _, notes = start()
    assert "model.head.distance is 'euclidean', the checkpoint was trained with 'mahalanobis'" in notes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed exists for Linux")
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("case", ["low_rank", "manhattan"])
def test_engines_train_what_a_head_learns(data, tmp_path, engine, case):
    """Two processes under each engine end where one process does: exponent and metric, whole or in pieces."""
    config = configuration(data, tmp_path, case)
    changed = {"train": replace(config.train, steps=8), "checkpoint": replace(config.checkpoint, every=8)}
    config = replace(config, model=replace(config.model, dropout=0.0), resume="auto", **changed)
    parallel = replace(config, name=f"{case}_{engine}")
    launch(config, 1)
    launch(parallel, 2, engine)
    assert losses(parallel.run_folder) == pytest.approx(losses(config.run_folder), abs=1e-5)
    ours, theirs = (load_file(c.run_folder / "latest" / "model" / "model.safetensors") for c in (parallel, config))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)
