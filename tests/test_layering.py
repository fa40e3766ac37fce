"""The allowed edges between modules (DESIGN.md, §3), read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = {"train", "sample", "data_prep", "benchmarks", "tests"}
ENTRY_MODULES = {"hgpt.compare", "hgpt.interpret.__main__", "hgpt.plan", "hgpt.runs"}

# These are copied beside an exported checkpoint by transformers, which follows relative imports only.
MODEL = {
    "harmax": set(),
    "distances": set(),
    "fused_loss": {"harmax"},
    "pairwise_loss": {"distances", "fused_loss"},
    "heads": {"distances", "fused_loss", "harmax", "pairwise_loss"},
    "configuration_hgpt": {"distances", "harmax"},
    "modeling_hgpt": {"configuration_hgpt", "distances", "heads"},
}
# The composition of a run's configuration, above every leaf and below the entry points.
COMPOSITION = {"run_config"}


def modules() -> dict[str, Path]:
    """Dotted name → file, of everything that is ours."""
    files = [
        *ROOT.glob("*.py"),
        *(path for folder in ("hgpt", "data_prep", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


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


ALL = modules()


def own(found: set[str]) -> set[str]:
    """Of imported names, our modules."""
    return found & set(ALL)


@pytest.mark.parametrize("name", MODEL)
def test_model_files_import_each_other_relatively_and_nothing_else_of_ours(name: str) -> None:
    path = ALL[f"hgpt.{name}"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(not alias.name.startswith("hgpt") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or not (node.module or "").startswith("hgpt")
    edges = {module.removeprefix("hgpt.") for module in own(imports(f"hgpt.{name}", path)) - {"hgpt"}}
    assert edges <= MODEL[name], f"{name} may import {sorted(MODEL[name])} only"


@pytest.mark.parametrize("name", MODEL)
def test_model_files_need_torch_and_transformers_only(name: str) -> None:
    """Anything else would become a requirement of every exported checkpoint."""
    roots = {module.split(".")[0] for module in imports(f"hgpt.{name}", ALL[f"hgpt.{name}"])}
    assert roots <= {"hgpt", "torch", "transformers"} | sys.stdlib_module_names


def test_nothing_imports_an_entry_point() -> None:
    for name, path in ALL.items():
        for module in imports(name, path) - {name}:
            root = module.split(".")[0]
            same_folder = root == name.split(".")[0] and root in {"data_prep", "benchmarks"}
            measured = name.startswith("benchmarks.") and root == "data_prep"
            assert root not in ENTRY_POINTS or same_folder or measured, f"{name} imports the entry point {module}"
            assert module not in ENTRY_MODULES, f"{name} imports the entry point {module}"


def test_only_entry_points_import_the_composed_configuration() -> None:
    for name, path in ALL.items():
        if name.startswith("hgpt.") and name not in ENTRY_MODULES:
            wrong = {f"hgpt.{module}" for module in COMPOSITION} & (imports(name, path) - {name})
            assert not wrong, f"{name} imports {wrong}: leaf modules lie below the run's configuration"


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name: own(imports(name, path)) - {name, "hgpt"} for name, path in ALL.items()}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail, name])
        if name not in done:
            for module in graph[name]:
                visit(module, (*trail, name))
            done.add(name)

    done: set[str] = set()
    for name in graph:
        visit(name, ())


def test_no_drawers_for_odds_and_ends() -> None:
    for name in ALL:
        assert name.split(".")[-1] not in {"utils", "util", "common", "helpers", "misc"}, name


def test_the_rules_see_what_they_forbid(tmp_path: Path) -> None:
    source = "from .heads import HarmonicHead\nfrom hgpt import shards\ndef f():\n    import train\n"
    path = tmp_path / "evaluation.py"
    path.write_text(source)
    found = imports("hgpt.evaluation", path)
    assert {"hgpt.heads", "hgpt.shards", "train"} <= found
