"""The blocks that sections of the page are made of; page/report.html has a macro for each kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure

from hgpt.interpret.statistics import Estimate

Cell = Estimate | float | str | None


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A paragraph, or a list where there are several items. `quiet` is small print."""

    kind: ClassVar[str] = "prose"
    items: Sequence[str]
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows are a heading and cells; numbers get `digits` behind the point."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    digits: int = 3


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with its file name, heading, what to see in it (and what was left out), and what it was measured on."""

    kind: ClassVar[str] = "drawing"
    name: str
    title: str
    caption: str
    source: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that are folded away under `title`."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: "Sequence[Block]"
    open: bool = False


@dataclass(frozen=True, kw_only=True)
class Html:
    """A piece of page of the measure's own: a Jinja template with its values, which are escaped."""

    kind: ClassVar[str] = "html"
    template: str
    values: dict[str, Any]


Block = Prose | Table | Drawing | Details | Html


def paragraph(text: str, *, quiet: bool = False) -> Prose:
    return Prose(items=[text], quiet=quiet)


def bold(label: str) -> Markup:
    return Markup("<b>{}</b>").format(label)
