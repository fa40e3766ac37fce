"""The style of all figures: one look per model, legends, intervals, labels that do not overlap, files."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from hgpt.interpret.measure import Drawing, ModelResult
from hgpt.interpret.statistics import Estimate

# Okabe & Ito's colours, distinct for colour-blind readers, without yellow, which is faint on white. Line styles and
# markers differ too, for print in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # matplotlib's, and on the page
WIDTH = 8.0  # inches
DPI = 120
GREY = "0.45"
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a label from its point

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "hgpt",  # the same report gives the same file
    "svg.fonttype": "none",  # text stays text: sharp, and it can be selected
    "axes.facecolor": "none",  # the background is the figure's, which `inline_svg` removes
    "figure.dpi": DPI,
}


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of model number `index` in every figure.

    With index = 7 r + c: colour c, style (c + r) mod 4, marker (c + 2 r) mod 7. Any two of the first 28 models differ
    in colour, or in both line style and marker, because some figures have only lines and others only markers.
    """
    again, colour = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": STYLES[(colour + again) % len(STYLES)],
        "marker": list(MARKERS)[(colour + 2 * again) % len(MARKERS)],
    }


def line_look(index: int) -> dict[str, Any]:
    """`look` without the marker."""
    return {name: value for name, value in look(index).items() if name != "marker"}


def swatch(index: int) -> Markup:
    """The coloured marker of a model, for the page."""
    style = look(index)
    return Markup('<span class="swatch" style="color:{}">{}</span>').format(style["color"], MARKERS[style["marker"]])


def headings(models: Sequence[ModelResult]) -> list[Markup]:
    """Swatch and label of each model, for the heads of tables."""
    return [swatch(index) + model.label for index, model in enumerate(models)]


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.4, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, (rows, columns); `height` includes a line of legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def grid(count: int, columns: int, *, row_height: float, extra: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """`new_figure` for `count` panels in at most `columns` columns; surplus panels are hidden."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = new_figure(rows, columns, height=extra + row_height * rows, **options)
    for panel in list(axes.flat)[count:]:
        panel.set_visible(False)
    return figure, axes


def label_edges(axes: np.ndarray, below: str, left: str) -> None:
    """One axis label below each column of panels, and one next to each row."""
    for panel in axes[-1]:
        panel.set_xlabel(below)
    for panel in axes[:, 0]:
        panel.set_ylabel(left)


def finish(
    figure: Figure,
    name: str,
    title: str,
    *,
    caption: str,
    source: str,
    remarks: Iterable[str] = (),
) -> Drawing:
    """The figure with a legend above it. Only the page has title and captions.

    Args:
        source: what was measured.
        remarks: sentences on omissions, for the end of the caption.
    """
    legend(figure)
    return Drawing(name=name, title=title, caption=" ".join([caption, *remarks]), source=source, figure=figure)


def legend(figure: Figure) -> None:
    """One legend above all panels, with every label once; the figure grows with the lines of the legend."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    # A line of the legend fits about 125 characters; handle and gaps take the space of 13.
    columns = max(1, min(3, 125 // (max(map(len, handles)) + 13)))
    _grow(figure, 0.17 * (-(-len(handles) // columns) - 1))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=columns, fontsize=8, handlelength=4.2
    )


def write_below(figure: Figure, text: str) -> None:
    lines = textwrap.wrap(text, int(WIDTH * 18))
    _grow(figure, 0.11 * (len(lines) - 2))
    figure.supxlabel("\n".join(lines), fontsize=6.5, color=GREY, x=0.01, ha="left")


def _grow(figure: Figure, inches: float) -> None:
    figure.set_figheight(figure.get_figheight() + max(0.0, inches))


def draw_intervals(
    panel: Axes, found: Sequence[Estimate], places: np.ndarray, index: int, label: str, *, across: bool = True
) -> None:
    """A marker at each value and a line over its interval, in the look of model `index`.

    A percentile interval may exclude its value, which `Axes.errorbar` cannot draw.
    """
    values = np.array([[estimate.value, estimate.low, estimate.high] for estimate in found])
    known = np.isfinite(values).all(axis=1)
    style = look(index)
    lines = panel.hlines if across else panel.vlines
    lines(places[known], values[known, 1], values[known, 2], color=style["color"], linewidth=1.2)
    x, y = (values[:, 0], places) if across else (places, values[:, 0])
    panel.plot(x, y, linestyle="none", marker=style["marker"], color=style["color"], markersize=4, label=label)


def rows_of_intervals(
    names: Sequence[str], found: Sequence[tuple[int, str, dict[str, Estimate]]]
) -> tuple[Figure, Axes, list[np.ndarray]]:
    """A row per name, with the estimates of several models below one another.

    Args:
        found: number of a model, its label, and its estimates by name.

    Returns the figure, its panel, and the heights at which each model's estimates are drawn.
    """
    figure, axes = new_figure(height=1.5 + 0.26 * len(names) * max(1, len(found) / 2))
    panel: Axes = axes[0, 0]
    heights = []
    for place, (index, label, estimates) in enumerate(found):
        rows = np.array([names.index(name) for name in estimates])
        heights.append(rows - 0.4 + 0.8 * (place + 0.5) / len(found))
        draw_intervals(panel, list(estimates.values()), heights[-1], index, label)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    return figure, panel, heights


def listed(sentence: str, labels: Sequence[str]) -> list[str]:
    """[`sentence: a, b.`], or [] without labels."""
    return [f"{sentence}: {', '.join(labels)}."] if labels else []


def write_labels(panel: Axes, pairs: np.ndarray, labels: Sequence[tuple[str, str]]) -> None:
    """Label both ends of each line, (pairs, 2, 2), the second in bold; labels without a free place are left out.

    A label covers no point and no other label, and crosses few lines. A point of several lines is labelled once. The
    layout of the figure must be final.
    """
    figure = panel.get_figure(root=True)
    assert figure is not None
    renderer, unit = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72  # pixels of a point
    ends = {(*end, label, side): end for line, names in zip(pairs, labels, strict=True)
            for side, (end, label) in enumerate(zip(line, names, strict=True))}  # fmt: skip
    crossed = panel.transData.transform(np.linspace(pairs[:, 0], pairs[:, 1], 25).reshape(-1, 2))
    room, taken = panel.get_window_extent(renderer), []
    for x, y in panel.transData.transform(pairs.reshape(-1, 2)):
        taken.append(Bbox.from_bounds(x - 2 * unit, y - 2 * unit, 4 * unit, 4 * unit))
    for (*_, label, side), end in ends.items():
        text = panel.annotate(label, end, (0, 0), textcoords="offset points", fontsize=6.5, parse_math=False,
                              ha="left", va="bottom", weight=("normal", "bold")[side])  # fmt: skip
        width, height = text.get_window_extent(renderer).size
        x, y = panel.transData.transform(end)
        places = []
        for gap, (across, up) in itertools.product((3 * unit, 6 * unit), DIRECTIONS):
            left, low = x + across * (width / 2 + gap) - width / 2, y + up * (height / 2 + gap) - height / 2
            places.append(Bbox.from_bounds(left, low, width, height))
        free = [p for p in places if room.count_contains(p.corners()) == 4 and not p.count_overlaps(taken)]
        if not free:
            text.remove()
            continue
        best = min(free, key=lambda place: place.count_contains(crossed))
        text.set_position(((best.x0 - x) / unit, (best.y0 - y) / unit))
        taken.append(best)


def save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write NAME.png and NAME.svg into `folder`; returns the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        figure.set_layout_engine("none")  # keep the layout: recomputing it takes most of the time
        figure.savefig(folder / f"{name}.svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return folder / f"{name}.png"


def inline_svg(file: Path, title: str) -> Markup:
    """A figure's SVG for a page: as wide as its place, transparent, ids prefixed by the figure's name."""
    whole = file.read_text(encoding="utf-8")
    whole = whole[whole.index("<svg") :].replace("fill: #ffffff", "fill: none", 1)  # the first is the background
    head, body = re.sub("<style.*?</style>", "", whole, flags=re.DOTALL).split(">", 1)  # it would style the page
    own_ids = re.compile(r'(\bid="|href="#|url\(#)')
    body = re.sub("<[^>]+>", lambda tag: own_ids.sub(rf"\g<1>{file.stem}-", tag[0]), body)
    size = re.search('viewBox="[^"]*"', head)
    assert size is not None
    return Markup('<svg role="img" aria-label="{}" {}>{}').format(title, Markup(size[0]), Markup(body))


def measure_against_loss(rows: Sequence[dict[str, Any]], measures: dict[str, str], source: str) -> Figure:
    """Each measure of readability over the validation loss: a point per run, a colour and marker per arm.

    Args:
        rows: {"arm", "loss", and each measure}; a measure that is None is left out. If a row has an "exponent" that
            is not None, the legend shows the n of its arm.
        measures: key → axis label.
        source: a text about the runs, shown below the figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(measures), 3, row_height=2.4, extra=1.6)
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for panel, (key, label) in zip(axes.flat, measures.items(), strict=False):
            for index, arm in enumerate(arms):
                own = [row for row in rows if row["arm"] == arm]
                points = [(row["loss"], row[key]) for row in own if row[key] is not None]
                style = look(index)
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, style["marker"], color=style["color"], markersize=5, alpha=0.8,
                           label=arm + _exponent_text([row.get("exponent") for row in own]))  # fmt: skip
            panel.set(xlabel="validation loss (nats)", ylabel=textwrap.fill(label, 32))
        legend(figure)
        write_below(figure, source)
    return figure


def _exponent_text(exponents: Sequence[float | None]) -> str:
    """`, n = 33.9`, or the range if n is learned and differs between runs; nothing for a softmax head."""
    known = sorted({f"{n:.4g}" for n in exponents if n is not None}, key=float)
    return f", n = {' to '.join(dict.fromkeys((known[0], known[-1])))}" if known else ""
