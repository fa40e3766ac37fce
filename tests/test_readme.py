"""Every command and every Python block of the README runs as written, but for those that need a GPU or a network."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hgpt.run.settings import load_run_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Why a command is not run here, by the words that tell it.
NOT_RUN = {
    "make quickstart": "takes minutes; its commands are those of `Train`, which run",
    "make test": "is running",
    "multi_gpu.yaml": "needs GPUs",
    "-m hgpt.compare": "trains dozens of runs; tests/test_compare.py trains small ones",
    "data/openwebtext": "needs a download",
    "--model.init_from gpt2": "needs a download",
}


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [content for name, content in FENCED if name == language]


# A backslash at the end of a line takes the next one along.
COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line]


def reason_not_to_run(command: str) -> str | None:
    return next((reason for words, reason in NOT_RUN.items() if words in command), None)


TINY = "--model.n_layer 1 --model.n_head 2 --model.n_embd 32"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with somebody's own texts in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "data_prep", "hgpt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    texts = folder / "my_texts"
    texts.mkdir()
    for number in range(60):
        words = [f"Sentence {n} of my text number {number} says that {n * number} is a number." for n in range(80)]
        (texts / f"{number}.txt").write_text("\n".join(words))
    return folder


def test_commands_run(checkout):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for command in COMMANDS:
        if reason_not_to_run(command):
            continue
        # Two steps of a tiny model tell whether it runs; a resumed run gets a third.
        steps = 3 if "--resume" in command else 2
        command = command.replace("--train.steps 200", f"--train.steps {steps} --optim.warmup_steps 1 {TINY}")
        result = subprocess.run(command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        ran += 1
    assert ran >= 8
    for block in blocks("python"):
        result = subprocess.run([sys.executable, "-c", block], cwd=checkout, capture_output=True, text=True)
        assert result.returncode == 0, f"{block}\n{result.stderr[-3000:]}"


def test_commands_that_are_not_run_have_settings_that_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in filter(reason_not_to_run, COMMANDS):
        words = shlex.split(command)
        if "train.py" in words:
            load_run_config(words[words.index("train.py") + 1 :])
        elif words[0] == "make":
            dry = subprocess.run(["make", "--dry-run", words[1]], cwd=ROOT, capture_output=True, text=True)
            assert dry.returncode == 0, dry.stderr


def test_files_and_links_exist():
    assert "@@" not in README
    tree = next(block for block in blocks("") if block.startswith("train.py"))
    # A name at the start of a line is at the top, one that is indented lies in the folder above it.
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        assert (ROOT / name if not line.startswith(" ") else folder / name).exists(), name
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
