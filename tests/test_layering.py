"""Which module may import which, read from the source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a module may import those of its own floor and of the floors below. A folder is one floor; the
# modules that lie in hgpt/ itself are named.
FLOORS = (
    ("hgpt.model",),  # what travels with an export
    ("hgpt.errors", "hgpt.durable", "hgpt.history", "hgpt.hardware", "hgpt.cli"),
    ("hgpt.data",),
    ("hgpt.run",),
    ("hgpt.source", "hgpt.decoding"),
    ("hgpt.interpret",),
    ("hgpt.compare", "hgpt.convert", "hgpt.evaluate", "hgpt.plan", "hgpt.runs", "data_prep"),  # commands
    ("train", "sample", "benchmarks", "papers"),
)
COMMANDS = {f"hgpt.{name}" for name in ("compare", "convert", "evaluate", "plan", "runs", "interpret.__main__")}
COMMANDS |= {"train", "sample"}

# Dotted name → file, of everything that is ours.
FILES = [
    *ROOT.glob("*.py"),
    *(path for room in ("hgpt", "data_prep", "benchmarks", "papers") for path in (ROOT / room).rglob("*.py")),
]
ALL = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
# The row kernels stay at home: an exported model runs without them (hgpt/model/loss.py).
MODEL = [name for name in ALL if name.startswith("hgpt.model.") and name != "hgpt.model.row_kernels"]


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, relative imports resolved, inside functions too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            found |= {parent} | {f"{parent}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    """The number of a module's floor; hgpt/__init__.py gives out the model, and begins with hgpt.cli."""
    if name == "hgpt":
        return 1
    found = [i for i, rooms in enumerate(FLOORS) for room in rooms if name == room or name.startswith(room + ".")]
    assert len(found) == 1, f"{name} lies on no floor: enter it in FLOORS"
    return found[0]


@pytest.mark.parametrize("name", MODEL)
def test_what_travels_with_an_export_imports_its_neighbours_relatively(name: str) -> None:
    """transformers copies what a module imports relatively from its own folder, and nothing else."""
    for node in ast.walk(ast.parse(ALL[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(not alias.name.startswith("hgpt") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or not (node.module or "").startswith("hgpt")
    roots = {module.split(".")[0] for module in imports(name, ALL[name])}
    assert roots <= {"hgpt", "torch", "transformers"} | sys.stdlib_module_names, "a requirement of every export"


def test_a_handful_of_folders_and_modules_and_no_drawers_for_odds_and_ends() -> None:
    """A new module needs a reason: the house is to stay small enough to know."""
    packages = {name for name, path in ALL.items() if name.startswith("hgpt.") and path.name == "__init__.py"}
    assert {name.split(".")[1] for name in packages} == {"data", "interpret", "model", "run"}
    ours = {name for name in ALL if name.startswith("hgpt.") and not name.startswith("hgpt.interpret")} - packages
    assert len(ours) <= 35
    assert not {name.split(".")[-1] for name in ALL} & {"utils", "util", "common", "helpers", "misc"}


def test_imports_go_down_and_not_round_in_a_circle() -> None:
    graph = {name: (imports(name, path) & set(ALL)) - {name} for name, path in ALL.items()}
    for name, modules in graph.items():
        for module in modules:
            assert floor(module) <= floor(name), f"{name} imports {module}, which lies above it"
            if not name.startswith("benchmarks."):  # these may measure what a command is made of
                assert module not in COMMANDS, f"{name} imports the command {module}"
    assert "hgpt.run.config" in graph["train"] and "hgpt.model.harmax" in graph["hgpt.model.heads"]
    TopologicalSorter({name: modules - {"hgpt"} for name, modules in graph.items()}).prepare()  # raises CycleError
