"""What an earlier version left behind still works: settings, checkpoints and exported models of tests/fixtures."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from remote_code import run_without_hgpt
from small_run import losses, records
from transformers import AutoModelForCausalLM

import sample
import train
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.run.settings import load_run_config

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
VERSION = "commit_65a6f1a"
EXPECTED = json.loads((FIXTURES / f"{VERSION}.json").read_text())
MODEL = "checkpoints/step_0000004/model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp(VERSION)
    with tarfile.open(FIXTURES / f"{VERSION}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_resumes_to_the_losses_of_the_uninterrupted_run(folder, tmp_path, name):
    shutil.copytree(folder / "runs" / name, tmp_path / name)
    config = tmp_path / name / "config.toml"
    places = ["--runs_dir", str(tmp_path), "--data.path", str(folder / "data")]
    train.main(load_run_config(["--config", str(config), *places, "--resume", "auto"]))
    assert losses(tmp_path / name) == pytest.approx(EXPECTED[name]["losses"], rel=1e-6)
    validation = [record["loss"] for record in records(tmp_path / name, "eval")]
    assert validation == pytest.approx(EXPECTED[name]["validation"], rel=1e-6)
    load_run_config(["--config", str(config)])  # the new run wrote its own


def assert_as_recorded(logits: torch.Tensor, tokens: list[int], name: str) -> None:
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[name]["logits"]), rtol=0, atol=1e-6)
    assert tokens == EXPECTED[name]["greedy"]


@pytest.mark.parametrize("name", EXPECTED)
def test_an_exported_model_computes_the_same(folder, name):
    path = folder / "runs" / name / MODEL
    written = json.loads((path / "config.json").read_text())
    again = HGPTConfig.from_pretrained(path).to_diff_dict()
    newer = {"radius": "none", "final_norm": "layer_norm"}  # settings that this version did not have
    assert again | {key: written[key] for key in ("auto_map", "transformers_version")} == written | newer
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert type(model).__module__ == "hgpt.model.modeling_hgpt"
    ids = torch.tensor([EXPECTED[name]["prompt"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -2:, :300]
    assert_as_recorded(logits, model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist(), name)


def test_exported_models_run_with_their_own_code_where_hgpt_is_not_installed(folder, tmp_path):
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for name, (path, prompt) in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[0, -2:, :300].tolist()
    # Without a cache: the code in these exports knows only transformers' name for it before 5.24.
    generated = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    found[name] = logits, generated[0].tolist()
print(json.dumps(found))
"""
    models = {name: (str(folder / "runs" / name / MODEL), expected["prompt"]) for name, expected in EXPECTED.items()}
    printed = run_without_hgpt(script, [json.dumps(models)], tmp_path)
    for name, (logits, tokens) in json.loads(printed.splitlines()[-1]).items():
        assert_as_recorded(torch.tensor(logits), tokens, name)


@pytest.mark.parametrize("name", ["harmonic", "softmax"])
def test_sample_py_reads_a_checkpoint(folder, capsys, name):
    checkpoint = str(folder / "runs" / name / MODEL)
    assert not sample.main(["--checkpoint", checkpoint, "--prompt", "centre", "--greedy", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith("centre")
