"""The wheel, and the extras that what it contains needs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from small_models import byte_pairs, export

from hgpt import cli

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def packages(extra: str) -> set[str]:
    """The packages that an extra brings, by the names of their modules."""
    found = set()
    for requirement in EXTRAS[extra]:
        nested = re.fullmatch(r"hgpt\[(.+)\]", requirement)
        names = [re.match(r"[\w-]+", requirement)[0].replace("-", "_")]
        found.update(*map(packages, nested[1].split(",")) if nested else [names])
    return found


def test_what_needs_an_extra_names_one_that_brings_its_packages():
    files = [*(ROOT / "hgpt").rglob("__init__.py"), ROOT / "data_prep" / "__init__.py"]
    calls = [call for file in files for call in re.findall(r"^needs\(([^)]*)\)", file.read_text(), re.MULTILINE)]
    assert len(calls) == 4
    for call in calls:
        extra, *needed = re.findall(r'"(\w+)"', call)
        assert set(needed) <= packages(extra), extra


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    cli.needs("train", "accelerate")
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package must be installed: pip install "hgpt\[train\]"'):
        cli.needs("train", "accelerate", "no_such_package")
    monkeypatch.setattr(cli, "COMMAND", True)
    with pytest.raises(SystemExit) as ended:
        cli.needs("data", "no_such_package")
    assert ended.value.code == 2 and "hgpt[data]" in capsys.readouterr().err


# With the packages of the extras blocked: what loads a model and uses the head works, and the rest names its extra.
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import torch
import hgpt
from transformers import AutoModelForCausalLM, AutoTokenizer

assert hgpt.__file__.startswith({site!r}), hgpt.__file__
model = AutoModelForCausalLM.from_pretrained({model!r})
assert type(model) is hgpt.HGPTForCausalLM
prompt = AutoTokenizer.from_pretrained({model!r})("the cat", return_tensors="pt").input_ids
assert model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, prompt.shape[1] + 5)

head = hgpt.HarmonicHead(8, 3, exponent=4.0)
torch.nn.functional.cross_entropy(head(torch.randn(5, 8)), torch.arange(5) % 3).backward()
assert head.weight.grad.abs().sum() > 0

for module, extra in (("hgpt.run", "train"), ("hgpt.data", "train"), ("hgpt.interpret", "interpret")):
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        assert f"hgpt[{{extra}}]" in str(error), error
    else:
        raise AssertionError(module)
print("done")
"""


@pytest.mark.slow
def test_the_wheel_without_extras(tmp_path):
    source, site, model = tmp_path / "source", tmp_path / "site", tmp_path / "model"
    shutil.copytree(ROOT / "hgpt", source / "hgpt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data_prep", source / "data_prep", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True, timeout=300
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hgpt"}
    assert {str(file.relative_to(source)) for file in (source / "hgpt").rglob("*") if file.is_file()} <= set(names)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)

    export(model, byte_pairs(300), "harmonic")
    blocked = sorted(set().union(*map(packages, ("train", "data", "interpret", "energy", "deepspeed", "wandb"))))
    program = WITHOUT_EXTRAS.format(blocked=blocked, site=str(site), model=str(model))
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.stdout == "done\n", ended.stderr
