"""Commands, Python blocks, settings, paths and links of README.md, RESULTS.md and docs/ are what they say."""

import argparse
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import byte_pairs, export

from hgpt.data.tokenizer import TOKENIZER_FILE, hf_tokenizer
from hgpt.model import distances
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmonized import HarmonizedConfig
from hgpt.run.config import RunConfig
from hgpt.run.settings import known_settings, load_run_config
from hgpt.source import find_source

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "RESULTS.md")
}
KNOWN = known_settings(RunConfig)
OPTIONS = "model.head.distance_options."  # their names are the distance's

# Commands that `make test-all` does not run, by words that occur in them.
NOT_RUN = {
    "make ": "minutes; a test runs what `make quickstart` runs",
    "multi_gpu.yaml": "needs GPUs",
    "data_prep.openwebtext": "needs a download",
    "data/openwebtext": "needs a download",
    "init_from gpt2": "needs a download",
    "hgpt.compare": "trains dozens of runs",
    "comparisons/": "needs such runs",
    " FOLDER": "reads texts of the reader's",
    "benchmarks.": "minutes",
    "papers.": "minutes",
    "--text my_texts/0.txt --json": "needs a download",
    "lm_eval ": "tests/test_evaluate.py runs its task file",
    "hf ": "needs an account",
    "docs/loss_curves.png": "needs runs of 800 steps",
}
TINY = "--model.n_layer 1 --model.n_head 2 --model.n_embd 32"


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of every fenced block of a language."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        (page, content) for page, text in PAGES.items() for name, content in fenced.findall(text) if name == language
    ]


# A backslash at the end of a line continues it. A command that occurs twice is tested once.
BASH = "".join(block for _, block in blocks("bash")).replace("\\\n", " ")
COMMANDS = list(dict.fromkeys(line for line in BASH.splitlines() if line.strip()))


class Parsed(BaseException):
    """A command's parser has read the arguments; `args[0]` are those that it does not know."""


def unknown_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start `python FILE …` or `python -m MODULE …` in this process, up to the end of its parsing."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *arguments: object) -> None:
        raise Parsed(parse(parser, *arguments)[1])

    module = words[1] == "-m"
    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", words[2:] if module else words[1:])
        if module:
            runpy.run_module(words[2], run_name="__main__")
        else:
            runpy.run_path(words[1], run_name="__main__")
    return parsed.value.args[0]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_options_and_settings_that_exist(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if "converted" in words and "train.py" in words:  # what an earlier command has made
        twin = HGPTConfig(n_layer=4, n_head=4, n_embd=128, head="softmax")
        HarmonizedConfig(backbone=twin, lift=True, radius="learned", tie_word_embeddings=False).save_pretrained(
            tmp_path
        )
        words = [str(tmp_path) if word == "converted" else word for word in words]
    for key in re.findall(r'--(?:set|sweep|vary) "?(?:\w+:)?([\w.]+)=', command):
        assert key in KNOWN or key.startswith(OPTIONS), key
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", words[1]], check=True, capture_output=True)
    elif words[0] in ("lm_eval", "hf"):
        assert any(words[0] in name for name in NOT_RUN)  # of other packages
    elif words[0] == "accelerate":
        assert Path(words[words.index("--config_file") + 1]).is_file()
        load_run_config(words[words.index("train.py") + 1 :])
    elif words[:2] == ["python", "train.py"]:
        load_run_config(words[2:])
    else:
        unknown = unknown_arguments(words, monkeypatch)
        if "hgpt.plan" in words and "--table" not in words:
            load_run_config(unknown)
        else:
            assert unknown == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs/quickstart/latest/model is a harmonic model."""
    folder = tmp_path_factory.mktemp("exported")
    model = export(folder / "runs" / "quickstart" / "latest" / "model", byte_pairs(300), "harmonic", context=64)
    hf_tokenizer(model / TOKENIZER_FILE, 64).save_pretrained(model)  # as a run saves it
    return folder


PYTHON = [
    pytest.param(page, block, marks=[pytest.mark.slow] if "Trainer(" in block else [])
    for page, block in blocks("python")
]


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_python_blocks_run(page, block, exported, monkeypatch):
    monkeypatch.chdir(exported)
    monkeypatch.setattr(distances, "_REGISTRY", dict(distances._REGISTRY))  # a page registers one of its own
    for package in re.findall(r"^(?:import|from) (trl|peft)\b", block, re.MULTILINE):
        pytest.importorskip(package)
    if "TrainableTokensWrapper" in block:  # of which the page replaces a method
        wrapper = sys.modules["peft"].utils.other.TrainableTokensWrapper
        monkeypatch.setattr(wrapper, "_forward_wrapped", wrapper._forward_wrapped)
    if "trust_remote_code=True)" not in block:  # tests/test_modeling.py loads models where hgpt is not installed
        exec(compile(block, page, "exec"), names := {"__name__": "block"})
    if "TrainingArguments(" in block:  # the export that it leaves has learnt the texts
        (trained,) = set(re.findall(r'"(runs/\w+/model)"', block))
        batch = names["collator"]([names["tokenizer"](text) for text in names["texts"]])
        before, after = (find_source(name).load()[0](**batch).loss for name in (names["folder"], trained))
        assert after < before - 0.01


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(exported, monkeypatch, capsys):
    """Its code cells, in their order, in docs/ beside runs/."""
    (exported / "docs").mkdir()
    monkeypatch.chdir(exported / "docs")
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert "300 tokens" in out and len(names["plane"]) == len(names["tokens"]) >= 6
    # The nearest token is the most probable one; a centre's nearest neighbour by torch.cdist.
    assert names["ratios"].argmin() == names["p"].argmax() and re.search(r"1\.000$", out, re.M)
    with torch.no_grad():
        distances = torch.cdist(names["centres"], names["centres"]).fill_diagonal_(torch.inf)
    own = names["tokenizer"](" is").input_ids[-1]
    assert names["neighbours"](" is")[0] == names["tokenizer"].decode(distances[own].argmin())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="this notebook draws: pip install matplotlib"):
        exec(code[0], {})


@pytest.mark.parametrize("page", PAGES)
def test_paths_settings_and_links_exist(page):
    text = PAGES[page]
    assert "@@" not in text
    for path in re.findall(r"\b(?:hgpt|data_prep|benchmarks|configs|docs|tests)/[\w/.*-]*\w", text):
        assert list(ROOT.glob(path)), path
    for name in re.findall(r"\b(?:hgpt|data_prep|benchmarks)(?:\.[a-zA-Z_]\w*)+", text):
        pkgutil.resolve_name(name)
    for name in re.findall(r"`(?:--)?((?:model|data|train|optim|eval|checkpoint|log)\.[a-z_.]+)", text):
        assert name in KNOWN or name.startswith(OPTIONS) or name.endswith((".py", ".bin", ".sbatch")), name
    for target, anchor in re.findall(r"\]\((?!https:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = (ROOT / page).parent / target if target else ROOT / page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8") if anchor else "", re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_readme_is_short_and_its_layout_exists():
    assert len(PAGES["README.md"].splitlines()) <= 170
    layout = next(content for page, content in blocks("") if page == "README.md" and content.startswith("train.py"))
    assert all((ROOT / line.split()[0]).exists() for line in layout.splitlines())


@pytest.mark.slow
def test_commands_run(tmp_path):
    parts = ("train.py", "sample.py", "configs", "data_prep", "hgpt")
    subprocess.run(["cp", "-r", *(ROOT / part for part in parts), tmp_path], check=True)
    (tmp_path / "my_texts").mkdir()
    for number in range(60):
        lines = [f"Sentence {n} of my text number {number} says that {n * number} is a number." for n in range(80)]
        (tmp_path / "my_texts" / f"{number}.txt").write_text("\n".join(lines))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    data = next(command for command in COMMANDS if "python_docs --out" in command)
    train = "python train.py --config configs/{}.toml --train.steps 200"
    runs = [train.format("quickstart"), train.format("quickstart_softmax")]
    commands = [command for command in COMMANDS if not any(words in command for words in NOT_RUN)]
    commands = [command for command in commands if "train.py" not in command or "--train.steps 200" in command]
    assert len(commands) >= 15
    for command in dict.fromkeys([data, *runs, *commands]):
        # Two steps of a tiny model show whether a run works; a resumed run gets a third.
        steps = f"--train.steps {3 if '--resume' in command else 2} --optim.warmup_steps 1"
        command = command.replace("--train.steps 200", f"{steps} {TINY}")
        result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
