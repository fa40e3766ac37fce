"""A corpus without a download: Python's own documentation.

    python -m data_prep.python_docs --out data/python_docs

The documents are the topics of the language reference that `help()` shows (`pydoc_data.topics`) and the docstrings of
the standard library, read from its source with `ast`, not imported. The corpus depends only on the Python version, not
on the order of the file system or installed packages.
"""

import ast
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.documents import Documents
from data_prep.encoding import Tally
from data_prep.engine import INTERRUPTED, prepare
from data_prep.parts import Record
from data_prep.recipe import Source, add_options
from data_prep.state import Preparation
from hgpt.cli import Parser, run
from hgpt.data.baselines import unigram_loss
from hgpt.data.shards import SPLITS, TokenShards

# Folders of the standard library that are left out: tests, installed packages, vendored code.
EXCLUDED = {"__pycache__", "_bundled", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_docs() -> list[str]:
    """The documents, in a fixed order: the topics, then one for each module and for each of its classes.

    A document of a module or class begins with its name. Each docstring is indented under its signature, as `help()`
    prints it:

        class textwrap.TextWrapper

            Object for wrapping/filling text. ...

        textwrap.TextWrapper.wrap(self, text)

            Reformat the single paragraph in 'text' so it fits in lines of ...

    Docstrings that are not prose or repeat another (as in overriding methods) are left out.
    """
    from pydoc_data.topics import topics

    documents = list(dict.fromkeys(topics[name].strip() + "\n" for name in sorted(topics)))
    seen: set[str] = set()
    for name, path in _modules(Path(sysconfig.get_path("stdlib"))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escape sequences in the library's own strings
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates and samples, not modules
                continue
        documents += _documents_of(tree, f"module {name}", name, seen)
    return documents


def _modules(stdlib: Path) -> list[tuple[str, Path]]:
    """(dotted name, path) of each module, public ones first: of two equal docstrings the public module's is kept."""
    modules = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED]
        for file in files:
            # The build writes the files _sysconfigdata*, which differ between machines.
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                parts = path.relative_to(stdlib).with_suffix("").parts
                modules.append((".".join(part for part in parts if part != "__init__"), path))
    return sorted(modules, key=lambda module: (module[0].startswith("_"), module[0]))


def _documents_of(node: ast.Module | ast.ClassDef, heading: str, name: str, seen: set[str]) -> Iterator[str]:
    """The document of a module or class, with its functions; then those of the classes inside it."""
    sections = [_section(heading, node, seen)]
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{name}.{child.name}({ast.unparse(child.args)})"
            sections.append(_section(signature, child, seen))
    text = "\n".join(section for section in sections if section)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documents_of(child, f"class {name}.{child.name}", f"{name}.{child.name}", seen)


def _section(heading: str, node: Documented, seen: set[str]) -> str | None:
    docstring = ast.get_docstring(node)
    if docstring is None or not _is_prose(docstring):
        return None
    words = " ".join(docstring.split())
    if words in seen:
        return None
    seen.add(words)
    return f"{heading}\n\n{textwrap.indent(docstring.strip(), '    ')}\n"


def _is_prose(docstring: str) -> bool:
    """Whether a docstring has at least four words and is mostly letters: no table and no code."""
    letters = sum(character.isalpha() or character.isspace() for character in docstring)
    return len(re.findall(r"[A-Za-z]{2,}", docstring)) >= 4 and letters >= 0.7 * len(docstring)


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Documents):
    """The documents of `python_docs`, in a temporary file."""

    @property
    def source_name(self) -> str:
        return "documentation of Python: pydoc_data.topics and the docstrings of the standard library"

    def find_source(self, preparation: Preparation) -> Source:
        return replace(super().find_source(preparation), revision=f"Python {platform.python_version()}")

    def describe(self, record: Record, tally: Tally) -> dict[str, Any]:
        described = super().describe(record, tally)
        return {name: value for name, value in described.items() if name not in ("text_column", "separator")}


def main(arguments: Sequence[str]) -> str:
    parser = Parser("python -m data_prep.python_docs", __doc__)
    parser.add_argument(
        "--out",
        default="data/python_docs",
        type=Path,
        metavar="FOLDER",
        help="data folder to write, new or empty (default: %(default)s)",
    )
    add_options(parser, tokenizer="bpe:2048", val_fraction=0.05)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "python_docs.jsonl")
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in python_docs()))
        summary = prepare(options.out, PythonDocs.of(options, files=[str(file)]), workers=options.workers)
    train, val = (TokenShards.open(options.out, split) for split in SPLITS)
    return f"{summary}\nunigram model     {unigram_loss(train, val):.4f} nats/token on val: a baseline for models"


if __name__ == "__main__":
    sys.exit(run(main, interrupted=INTERRUPTED))
