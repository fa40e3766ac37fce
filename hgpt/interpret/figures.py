"""The figures of a report. Each says below itself which models, steps, tokens and settings it came from."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from hgpt.interpret.analysis import CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, LENS_POSITIONS
from hgpt.interpret.parallelograms import EXPECTED_AT_RANDOM, PRESET
from hgpt.interpret.results import Analysis, Estimate, ModelResult, RelationResult, difference_over_relations
from hgpt.interpret.statistics import wilson_interval

# Okabe & Ito's colours, which colour-blind readers can tell apart, without the yellow, which is faint on white; line
# styles and markers differ as well, for print in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 8.0  # inches
DPI = 120
GREY = "0.45"
# Planes with labels can be read for a few models and relations; the numbers are there for all.
PLANE_MODELS = 3
PLANE_RELATIONS = 4
PLANE_PAIRS = 8
SCORE_AXIS = 100.0  # where the axis of the score's distribution ends: a few scores are thousands

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "svg.hashsalt": "hgpt",  # the same report is the same file
    "figure.dpi": DPI,
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a drawing function returns: the figure, the models in it, and sentences about what is not in it."""

    figure: Figure
    models: Sequence[ModelResult]
    remarks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with its file name, heading, what to see in it (and what was left out), and what it was measured on."""

    name: str
    title: str
    caption: str
    source: str
    figure: Figure


def draw_all(analysis: Analysis) -> list[Drawing]:
    """Every figure that the analysis has numbers for, in the order of the report."""
    drawings = []
    with matplotlib.rc_context(STYLE):
        for name, title, caption, draw, source in FIGURES:
            drawn = draw(analysis)
            if drawn is None:
                continue
            facts = _facts(analysis, drawn.models)
            origins = "; ".join(model.provenance for model in drawn.models)
            drawing = Drawing(
                name=name,
                title=title,
                caption=" ".join([caption.format(**facts), *drawn.remarks]),
                source=f"{origins}. {source.format(**facts)}",
                figure=drawn.figure,
            )
            _sign(drawing.figure, drawing.source)
            drawings.append(drawing)
    return drawings


def save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write NAME.png and NAME.svg into `folder`; returns the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        figure.set_layout_engine("none")  # the places are found; finding them again takes most of the time
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return folder / f"{name}.png"


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the model with this number, the same in every figure.

    With index = 7 r + c: colour c, style (c + r) mod 4, marker (c + 2 r) mod 7. Any two of the first 28 differ in
    their colour, or else in line style and in marker: some figures have lines only, others markers only.
    """
    again, colour = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[colour],
        "linestyle": STYLES[(colour + again) % len(STYLES)],
        "marker": MARKERS[(colour + 2 * again) % len(MARKERS)],
    }


def swatch(index: int) -> str:
    """Line and marker of `look(index)` as SVG for the page: what the legends of the figures show."""
    style = look(index)
    marker = MarkerStyle(style["marker"])
    # To the middle of a box of 360 × 120, upright: y points down in SVG.
    placed = marker.get_transform() + Affine2D().scale(80, -80).translate(180, 60)
    outlines = marker.get_path().to_polygons(placed)
    shapes = "".join(
        f'<polygon points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in np.asarray(outline))}" fill="{style["color"]}"/>'
        for outline in outlines
    )
    defaults = matplotlib.rcParams
    patterns = {
        "--": defaults["lines.dashed_pattern"],
        "-.": defaults["lines.dashdot_pattern"],
        ":": defaults["lines.dotted_pattern"],
    }
    pattern = " ".join(f"{16 * length:.0f}" for length in patterns.get(style["linestyle"], ()))
    dasharray = f' stroke-dasharray="{pattern}"' if pattern else ""
    return (
        f'<svg class="swatch" viewBox="0 0 360 120" aria-hidden="true"><line x1="0" y1="60" x2="360" y2="60" '
        f'stroke="{style["color"]}" stroke-width="16"{dasharray}/>{shapes}</svg>'
    )


def counts_text(counts: dict[str, int]) -> str:
    """`8,192` where all labels have the same count, otherwise `8,192 (a, b), 7,900 (c)`; "no" without any."""
    labels: dict[int, list[str]] = {}
    for label, count in counts.items():
        labels.setdefault(count, []).append(label)
    if len(labels) < 2:
        return f"{next(iter(labels)):,}" if labels else "no"
    return ", ".join(f"{count:,} ({', '.join(named)})" for count, named in labels.items())


def tokens_read(models: Sequence[ModelResult]) -> dict[str, int]:
    """How many validation tokens each of the models predicted that were measured on text."""
    return {model.label: len(model.text.positions.loss) for model in models if model.text is not None}


def duplicate_variants(models: Sequence[ModelResult]) -> dict[str, str]:
    """The variants that give each of `models` the very numbers of an earlier variant, and which that is.

    Such as the centres of tied models, which are their input embedding: one way to measure, not two.
    """
    variants = list(dict.fromkeys(variant for model in models for variant in model.relations))
    same: dict[str, str] = {}
    for number, variant in enumerate(variants):
        for earlier in variants[:number]:
            if earlier not in same and all(
                _same_scores(model.relations.get(variant, {}), model.relations.get(earlier, {})) for model in models
            ):
                same[variant] = earlier
                break
    return same


def _same_scores(one: dict[str, RelationResult], other: dict[str, RelationResult]) -> bool:
    return one.keys() == other.keys() and all(
        np.isclose(one[name].score.value, other[name].score.value, rtol=1e-9, atol=0)
        and np.allclose(one[name].replicates, other[name].replicates, rtol=1e-9, atol=0, equal_nan=True)
        for name in one
    )


def _facts(analysis: Analysis, models: Sequence[ModelResult]) -> dict[str, Any]:
    """What captions and sources say of the models that are shown: the counts are those that were measured."""
    sampled = {model.label: len(model.text.sample_at) for model in models if model.text is not None}
    quadruples = {
        model.label: len(result.sampled) for model in models for result in model.relations.get(PRESET, {}).values()
    }
    data = analysis.data_source or "no text"
    hidden = f"; hidden states: a sample of {counts_text(sampled)} validation positions of: {data}" if sampled else ""
    return {
        "tokens": counts_text(tokens_read(models)),
        "data": data,
        "of_hidden_states": hidden,
        "bootstrap": f"{analysis.settings.bootstrap:,}",
        "relations": analysis.settings.relations or "the relation sets that ship with hgpt",
        "quadruples": counts_text(quadruples),
        "sampled": counts_text(sampled),
        "lens": counts_text({label: min(LENS_POSITIONS, count) for label, count in sampled.items()}),
    }


def _new(rows: int = 1, columns: int = 1, height: float = 3.4, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its panels; `height` leaves room for one line of legend and two below the figure."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def _legend(figure: Figure) -> None:
    """One legend above all panels, of every model that is in one of them; its lines make the figure higher."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # About 125 characters fit beside one another; the line, long enough for its style to be seen, and gaps take 13.
    columns = max(1, min(3, 125 // (max(map(len, handles), default=0) + 13)))
    _grow(figure, 0.17 * (-(-len(handles) // columns) - 1))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=columns, fontsize=8, handlelength=4.2
    )


def _sign(figure: Figure, source: str) -> None:
    """Models, steps, tokens and settings, below the figure."""
    lines = textwrap.wrap(source, int(WIDTH * 18))
    _grow(figure, 0.11 * (len(lines) - 2))
    figure.supxlabel("\n".join(lines), fontsize=6.5, color=GREY, x=0.01, ha="left")


def _grow(figure: Figure, inches: float) -> None:
    figure.set_figheight(figure.get_figheight() + max(0.0, inches))


def _intervals(
    panel: Axes, values: np.ndarray, places: np.ndarray, style: dict[str, Any], label: str, *, across: bool = True
) -> None:
    """A marker at each value and a line over its interval, (n, 3): value, low, high.

    The line is drawn where the interval is. A percentile interval need not hold its value, which the bars of
    `Axes.errorbar`, lengths from the value, cannot show.
    """
    known = np.isfinite(values).all(axis=1)
    lines = panel.hlines if across else panel.vlines
    lines(places[known], values[known, 1], values[known, 2], color=style["color"], linewidth=1.2)
    x, y = (values[:, 0], places) if across else (places, values[:, 0])
    panel.plot(x, y, linestyle="none", marker=style["marker"], color=style["color"], markersize=4, label=label)


def _estimates(found: Sequence[Estimate]) -> np.ndarray:
    return np.array([[estimate.value, estimate.low, estimate.high] for estimate in found])


def _listed(sentence: str, labels: Sequence[str]) -> list[str]:
    """`sentence: a, b.` as the only entry, nothing where there are no labels."""
    return [f"{sentence}: {', '.join(labels)}."] if labels else []


def _without_relations(analysis: Analysis) -> list[str]:
    labels = [model.label for model in analysis.models if not model.relations.get(PRESET)]
    return _listed("Left out, since no relation has enough pairs that they can use", labels)


# ------------------------------------------------------------------------------------------------------------
# Training


def loss_curves(analysis: Analysis) -> Drawn | None:
    models = [model for model in analysis.models if model.history]
    if not models:
        return None
    figure, axes = _new()
    panel: Axes = axes[0, 0]
    for index, model in enumerate(analysis.models):
        style = look(index)
        train = _series(model.history, "train", "loss")
        validation = _series(model.history, "eval", "loss")
        if len(train):
            label = None if len(validation) else model.label
            panel.plot(train[:, 0], train[:, 1], color=style["color"], alpha=0.3, linewidth=0.8, label=label)
        if len(validation):
            last = f", last {validation[-1, 1]:.3f}"
            panel.plot(validation[:, 0], validation[:, 1], **style, markersize=4, label=f"{model.label}{last}")
    panel.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    _legend(figure)
    left_out = [model.label for model in analysis.models if not model.history]
    return Drawn(figure=figure, models=models, remarks=_listed("Left out, without a metrics.jsonl", left_out))


def _series(history: list[dict[str, Any]], kind: str, name: str) -> np.ndarray:
    points = [(r["step"], r[name]) for r in history if r["kind"] == kind and r.get(name) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def over_training(analysis: Analysis) -> Drawn | None:
    """A panel for each quantity that is known of at least one model at several steps."""
    quantities = [
        ("w_norm_mean", "centre_norm", "mean norm of the centres"),
        ("x_norm_mean", "hidden_norm", "mean norm of hidden states"),
        ("target_over_median_distance", "target_ratio", "distance to the target's centre\nover the median distance"),
        (None, "centre_effective_rank", "effective rank of the centres"),
        (None, "centre_participation_ratio", "participation ratio\nof the centres"),
        (None, "parallelogram_score", f"parallelogram score ({PRESET}),\nmean over relations"),
    ]
    known = []
    # What is averaged over text is averaged over little of it, and over how much depends on where it is from.
    logged_on_text: dict[str, None] = {}
    kept_on_text: dict[str, None] = {}
    for logged, kept, label in quantities:
        curves = []
        for index, model in enumerate(analysis.models):
            points, from_checkpoints = _over_steps(model, logged, kept)
            if len(points) < 2:
                continue
            curves.append((index, points))
            if kept in ("hidden_norm", "target_ratio"):
                (kept_on_text if from_checkpoints else logged_on_text)[model.label] = None
        if curves:
            known.append((label, curves))
    if not known:
        return None
    columns = min(3, len(known))
    rows = -(-len(known) // columns)
    figure, axes = _new(rows, columns, height=1 + 2.3 * rows)
    for panel, (label, curves) in zip(axes.flat, known, strict=False):
        for index, points in curves:
            panel.plot(points[:, 0], points[:, 1], **look(index), markersize=4, label=analysis.models[index].label)
        panel.set(xlabel="optimiser step", ylabel=label)
        if "norm" in label:
            panel.set_yscale("log")  # heads differ by orders of magnitude
    for panel in list(axes.flat)[len(known) :]:
        panel.set_visible(False)
    _legend(figure)
    shown = {index for _, curves in known for index, _ in curves}
    remarks = _listed(
        "Hidden states and distances are averages over a part of the validation text: where a run's evaluations logged "
        "them, over the eval.diagnostic_windows of its configuration (16 unless set)",
        list(logged_on_text),
    ) + _listed(
        f"Measured on a checkpoint, distances are averages over about {CHECKPOINT_TOKENS:,} validation tokens in "
        f"windows of at most {CHECKPOINT_WINDOW}, norms of hidden states over {LENS_POSITIONS} of these; it is not the "
        "text of the other figures",
        list(kept_on_text),
    )
    return Drawn(figure=figure, models=[analysis.models[index] for index in sorted(shown)], remarks=remarks)


def _over_steps(model: ModelResult, logged: str | None, kept: str) -> tuple[np.ndarray, bool]:
    """(step, value) from the run's evaluations, or from its checkpoints where these are more, and whether they are."""
    points = _series(model.history, "eval", logged) if logged is not None else np.empty((0, 2))
    checkpoints = [(row["step"], row[kept]) for row in model.checkpoints if row.get(kept) is not None]
    if len(points) >= len(checkpoints):
        return points, False
    return np.array(checkpoints, dtype=np.float64), True


# ------------------------------------------------------------------------------------------------------------
# Parallelograms


def scores_by_relation(analysis: Analysis) -> Drawn | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.relations.get(PRESET)]
    names = sorted({name for _, model in models for name in model.relations[PRESET]})
    if not names:
        return None
    figure, axes = _new(height=1.5 + 0.26 * len(names) * max(1, len(models) / 2))
    panel: Axes = axes[0, 0]
    step = 0.8 / len(models)
    for place, (index, model) in enumerate(models):
        by_relation = model.relations[PRESET]
        rows = [i for i, name in enumerate(names) if name in by_relation]
        found = [by_relation[names[i]] for i in rows]
        y = np.array(rows) - 0.4 + step * (place + 0.5)
        style = look(index)
        _intervals(panel, _estimates([result.score for result in found]), y, style, model.label)
        shuffled = [result.shuffled for result in found]
        panel.plot(shuffled, y, "|", color=style["color"], markersize=9, markeredgewidth=1.5)
    panel.axvline(EXPECTED_AT_RANDOM, color=GREY, linestyle=":", linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("mean parallelogram score (dotted: four random tokens; |: same words, random pairs)")
    panel.set_xlim(left=0)
    _legend(figure)
    return Drawn(figure=figure, models=[model for _, model in models], remarks=_without_relations(analysis))


def score_cdfs(analysis: Analysis) -> Drawn | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.relations.get(PRESET)]
    names = sorted({name for _, model in models for name in model.relations[PRESET]})
    if not names:
        return None
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = _new(rows, columns, height=1.2 + 1.7 * rows, sharex=True, sharey=True)
    beyond: dict[tuple[str, str], float] = {}
    for panel, name in zip(axes.flat, names, strict=False):
        for index, model in models:
            result = model.relations[PRESET].get(name)
            if result is not None:
                scores = np.quantile(result.sampled, np.linspace(0, 1, 201))
                style = look(index)
                panel.plot(scores, np.linspace(0, 1, 201), color=style["color"], linestyle=style["linestyle"],
                           label=model.label)  # fmt: skip
                beyond[name, model.label] = float(np.mean(result.sampled > SCORE_AXIS))
        panel.set_title(name)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(0, SCORE_AXIS)
        panel.set_xticks([0, 0.1, 1, 10, SCORE_AXIS], ["0", ".1", "1", "10", f"{SCORE_AXIS:g}"])
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel("score")
    for panel in axes[:, 0]:
        panel.set_ylabel("share of pairs\nof pairs below")
    _legend(figure)
    remarks = _without_relations(analysis)
    (relation, label), most = max(beyond.items(), key=lambda entry: entry[1])
    if most > 0:
        remarks.append(
            f"The axis ends at {SCORE_AXIS:g}. Scores beyond it are not drawn: at most {most:.2%} of a curve "
            f"({relation}, {label})."
        )
    return Drawn(figure=figure, models=[model for _, model in models], remarks=remarks)


def variants(analysis: Analysis) -> Drawn | None:
    if len(analysis.models) < 2:
        return None
    first = analysis.models[0]
    points: list[tuple[int, ModelResult, dict[str, Estimate]]] = []
    drawn_once: dict[str, list[str]] = {}
    for index, other in enumerate(analysis.models[1:], start=1):
        if other.vocabulary != first.vocabulary:
            continue
        same = duplicate_variants([first, other])
        estimates = {
            name: estimate
            for name, results in first.relations.items()
            if name not in same
            and (estimate := difference_over_relations(other.relations.get(name, {}), results)) is not None
        }
        if estimates:
            points.append((index, other, estimates))
            for variant, earlier in same.items():
                drawn_once.setdefault(f"“{variant}” and “{earlier}”", []).append(other.label)
    if not points:
        return None
    names = [name for name in first.relations if any(name in estimates for _, _, estimates in points)]
    figure, axes = _new(height=1.4 + 0.24 * len(names) * max(1, len(points) / 2))
    panel: Axes = axes[0, 0]
    step = 0.8 / len(points)
    for place, (index, other, estimates) in enumerate(points):
        rows = np.array([names.index(name) for name in estimates])
        _intervals(
            panel,
            _estimates(list(estimates.values())),
            rows - 0.4 + step * (place + 0.5),
            look(index),
            f"{other.label} minus {first.label}",
        )
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel(f"difference of the mean score (below 0: better than {first.label})")
    _legend(figure)
    shown = [other.label for _, other, _ in points]
    left_out = [model.label for model in analysis.models[1:] if model.label not in shown]
    remarks = _listed(f"Left out, with no relation that can be compared with {first.label}", left_out)
    if drawn_once:
        same_numbers = "; ".join(f"{text} ({', '.join(labels)})" for text, labels in drawn_once.items())
        remarks.append(f"Drawn once, since the numbers are the same: {same_numbers}.")
    return Drawn(figure=figure, models=[first, *(other for _, other, _ in points)], remarks=remarks)


def planes_of_relations(analysis: Analysis) -> Drawn | None:
    return _planes(analysis, "relation")


def plane_of_the_vocabulary(analysis: Analysis) -> Drawn | None:
    return _planes(analysis, "vocabulary")


def _planes(analysis: Analysis, plane: str) -> Drawn | None:
    models: list[tuple[int, ModelResult]] = []
    shared: list[str] = []
    for index, model in enumerate(analysis.models):
        common = [name for name in model.planes if name in shared or not models]
        if common and len(models) < PLANE_MODELS:
            models.append((index, model))
            shared = common
    if not models:
        return None
    names, more = shared[:PLANE_RELATIONS], shared[PLANE_RELATIONS:]
    figure, axes = _new(len(names), len(models), height=0.9 + 2.7 * len(names))
    for row, name in zip(axes, names, strict=True):
        for panel, (index, model) in zip(row, models, strict=True):
            drawn = model.planes[name]
            points, words = drawn[plane], drawn["words"]  # (pairs, 2, 2)
            colour = look(index)["color"]
            shown = _well_apart(points, PLANE_PAIRS)
            for pair in shown:
                start, end = points[pair]
                panel.annotate(
                    "", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.9, "alpha": 0.8}
                )
                for (x, y), word, weight in ((start, words[pair][0], "normal"), (end, words[pair][1], "bold")):
                    panel.text(x, y, word, fontsize=6.5, weight=weight, ha="center", va="bottom")
            panel.plot(points[shown, 0, 0], points[shown, 0, 1], "o", color=colour, markersize=3)
            panel.plot(points[shown, 1, 0], points[shown, 1, 1], "s", color=colour, markersize=3)
            share, own = drawn[f"{plane}_variance"], drawn[f"{plane}_variance_of_words"]
            heading = f"{name} · {model.label} · {len(shown)} of {len(points)} pairs"
            lines = textwrap.wrap(heading, 120 // len(models))
            lines.append(f"variance: {share:.0%} of vocabulary's, {own:.0%} of words'")
            panel.set_title("\n".join(lines), fontsize=7)
            panel.margins(0.12)
            panel.tick_params(labelsize=6)
    for panel in axes[-1]:
        panel.set_xlabel("component 1")
    for panel in axes[:, 0]:
        panel.set_ylabel("component 2")
    labels = [model.label for _, model in models]
    left_out = [model.label for model in analysis.models if model.label not in labels]
    remarks = _listed(
        f"Drawn are the first {len(names)} of {len(shared)} relations by name, so that words can be read. Not drawn",
        more,
    ) + _listed(f"Drawn are at most {PLANE_MODELS} models, and such that share a relation. Not drawn", left_out)
    return Drawn(figure=figure, models=[model for _, model in models], remarks=remarks)


def _well_apart(points: np.ndarray, count: int) -> list[int]:
    """Indices of up to `count` pairs, (pairs, 2, 2), both ends of each as far as possible from those of the others.

    So that labels can be read: many words may share one token.
    """
    chosen = [0]
    while len(chosen) < min(count, len(points)):
        distances = np.linalg.norm(points[:, None] - points[chosen], axis=-1)  # (pairs, chosen, 2)
        nearest = distances.min(axis=(1, 2))
        if nearest.max() == 0:
            break
        chosen.append(int(nearest.argmax()))
    return chosen


# ------------------------------------------------------------------------------------------------------------
# Geometry


def explained_variance(analysis: Analysis) -> Drawn | None:
    matrices = [("input", "input embedding"), ("centres", "centres"), ("hidden", "hidden states at the head")]
    matrices = [entry for entry in matrices if any(entry[0] in model.geometry for model in analysis.models)]
    figure, axes = _new(1, len(matrices), height=3.3, sharey=True)
    for panel, (matrix, title) in zip(axes[0], matrices, strict=True):
        for index, model in enumerate(analysis.models):
            if matrix in model.geometry:
                shares = model.geometry[matrix]["explained_variance"]
                style = look(index)
                panel.plot(range(1, len(shares) + 1), shares, color=style["color"], linestyle=style["linestyle"],
                           label=model.label)  # fmt: skip
        panel.set_xscale("log")
        panel.set(xlabel="principal components", title=title, ylim=(0, 1))
    axes[0, 0].set_ylabel("cumulated share of the variance")
    _legend(figure)
    return Drawn(figure=figure, models=analysis.models)


def layers(analysis: Analysis) -> Drawn | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.text is not None]
    if not models:
        return None
    figure, axes = _new(1, 3, height=3.3)
    labels = ("loss (nats per token)", "accuracy", "distance to the target's centre\nover the median distance")
    for index, model in models:
        assert model.text is not None
        lens = model.text.lens
        depth = [layer.layer for layer in lens]
        for panel, values, errors in (
            (axes[0, 0], [layer.loss for layer in lens], [layer.loss_error for layer in lens]),
            (axes[0, 1], [layer.accuracy for layer in lens], None),
            (axes[0, 2], [layer.target_ratio for layer in lens], [layer.target_ratio_error for layer in lens]),
        ):
            bars = None if errors is None else 1.96 * np.array(errors)
            panel.errorbar(depth, values, yerr=bars, **look(index), markersize=4, label=model.label)
    for panel, label in zip(axes[0], labels, strict=True):
        panel.set(xlabel="after block (0: embedding)", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure)
    return Drawn(figure=figure, models=[model for _, model in models])


def similarity(analysis: Analysis) -> Drawn | None:
    if not analysis.cka:
        return None
    tables = list(analysis.cka.items())
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = _new(rows, columns, height=0.8 + 2.9 * rows)
    for panel, (label, table) in zip(axes.flat, tables, strict=False):
        image = panel.imshow(table, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        panel.set(xlabel=f"{label}: block", ylabel=f"{analysis.models[0].label}: block")
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set_fontsize(7)
            axis.get_major_locator().set_params(integer=True)
        if max(table.shape) <= 13:
            for (y, x), value in np.ndenumerate(table):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6,
                           color="white" if value < 0.6 else "black")  # fmt: skip
    for panel in list(axes.flat)[len(tables) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=axes, label="debiased linear CKA", shrink=0.8, aspect=20 * rows)
    compared = [model for model in analysis.models[1:] if model.label in analysis.cka]
    return Drawn(figure=figure, models=[analysis.models[0], *compared])


# ------------------------------------------------------------------------------------------------------------
# Calibration


def reliability(analysis: Analysis) -> Drawn | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.reliability is not None]
    if not models:
        return None
    figure, axes = _new(2, 1, height=4.6, sharex=True, height_ratios=(3, 1))
    curve_panel, count_panel = axes[:, 0]
    for index, model in models:
        curve = model.reliability
        assert curve is not None
        style = look(index)
        # A bin of a few positions says little, also where all of them are right or all wrong.
        low, high = wilson_interval(curve.accuracy, curve.count)
        curve_panel.vlines(curve.confidence, low, high, color=style["color"], linewidth=1)
        label = f"{model.label}, ECE {model.quality['ece'].text}"
        curve_panel.plot(curve.confidence, curve.accuracy, **style, markersize=4, label=label)
        count_panel.plot(curve.confidence, curve.count, **style, markersize=3)
    curve_panel.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    curve_panel.set_ylabel("accuracy")
    curve_panel.set_ylim(0, 1)
    count_panel.set(xlabel="confidence: probability of the predicted token", ylabel="positions", xlim=(0, 1))
    count_panel.set_yscale("log")
    _legend(figure)
    return Drawn(figure=figure, models=[model for _, model in models])


def frequency_bands(analysis: Analysis) -> Drawn | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.bands]
    if not models:
        return None
    figure, axes = _new(1, 3, height=3.4)
    names = [band["band"] for band in models[0][1].bands]
    step = 0.6 / len(models)
    panels = (("loss", "loss (nats per token)"), ("correct", "accuracy"), ("entropy", "entropy (nats)"))
    for panel, (name, label) in zip(axes[0], panels, strict=True):
        for place, (index, model) in enumerate(models):
            bands = [band for band in model.bands if band["band"] in names]
            places = np.array([names.index(band["band"]) for band in bands]) - 0.3 + step * (place + 0.5)
            values = _estimates([band[name] for band in bands])
            _intervals(panel, values, places, look(index), model.label, across=False)
        panel.set_xticks(range(len(names)), [name.replace("rank ", "") for name in names], rotation=30, ha="right")
        panel.set(xlabel="frequency rank of the target", ylabel=label)
    _legend(figure)
    return Drawn(figure=figure, models=[model for _, model in models])


# ------------------------------------------------------------------------------------------------------------
# Comparisons of many runs


def measure_against_loss(rows: Sequence[dict[str, Any]], measures: dict[str, str], source: str) -> Figure:
    """Each measure of readability against the validation loss, a point for each run, an arm by colour and marker.

    Args:
        rows: {"arm", "loss", and each measure}; a measure that is None is left out. With an "exponent" that is not
            None in a row, the legend says the n of its arm.
        measures: key → axis label.
        source: what the runs were, to stand below the figure.
    """
    with matplotlib.rc_context(STYLE):
        columns = 3
        lines = -(-len(measures) // columns)
        figure, axes = _new(lines, columns, height=1.6 + 2.4 * lines)
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for panel, (key, label) in zip(axes.flat, measures.items(), strict=False):
            for index, arm in enumerate(arms):
                own = [row for row in rows if row["arm"] == arm]
                points = [(row["loss"], row[key]) for row in own if row[key] is not None]
                style = look(index)
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, style["marker"], color=style["color"], markersize=5, alpha=0.8,
                           label=arm + _exponent_text([row.get("exponent") for row in own]))  # fmt: skip
            panel.set(xlabel="validation loss (nats)", ylabel=label)
        for panel in list(axes.flat)[len(measures) :]:
            panel.set_visible(False)
        _legend(figure)
        _sign(figure, source)
    return figure


def _exponent_text(exponents: Sequence[float | None]) -> str:
    """`, n = 33.9`, or the range where the runs of an arm differ (n is learnt); nothing for a softmax head."""
    known = sorted({f"{n:.4g}" for n in exponents if n is not None}, key=float)
    return f", n = {' to '.join(dict.fromkeys((known[0], known[-1])))}" if known else ""


Draw = Callable[[Analysis], Drawn | None]
_ON_TEXT = "Measured on {tokens} validation tokens of: {data}."
_ON_WORDS = "Relations: {relations}. Input embedding. Intervals: 95 %, {bootstrap} resamples of the pairs."

FIGURES: tuple[tuple[str, str, str, Draw, str], ...] = (
    (
        "loss_curves",
        "Loss over training",
        "Faint: training batches. Marked: validation loss as logged, unsmoothed, over the whole validation set.",
        loss_curves,
        "From each run's metrics.jsonl.",
    ),
    (
        "scores_by_relation",
        "Parallelogram score of each relation",
        "Lower is better. The vertical bars show what the same words score when they are paired at random: a score "
        "that is low, but no lower than its bar, says where the words lie and nothing about the relation.",
        scores_by_relation,
        f"Preset {PRESET}: plane of the first 2 components of the vocabulary. " + _ON_WORDS,
    ),
    (
        "score_cdfs",
        "Distribution of the parallelogram score",
        "Each curve is the share of {quadruples} random pairs of pairs, drawn with replacement, that score below. "
        "Further left is better.",
        score_cdfs,
        f"Preset {PRESET}, {{quadruples}} random pairs of pairs a relation. Relations: {{relations}}. Input embedding.",
    ),
    (
        "variants",
        "Does the difference survive other ways to measure it?",
        "The mean difference over relations under each variant of the score, with intervals over pairs. A difference "
        "that changes its sign with the plane, the scale or the tokens is one of the method. Variants have different "
        "scales: compare signs and intervals, not lengths.",
        variants,
        _ON_WORDS,
    ),
    (
        "planes_of_relations",
        "Words in the plane of their relation",
        "Arrows go from input to output; parallel arrows of one length are parallelograms. The plane is fitted to the "
        "relation's words, which makes it look as regular as it can; mind the share of the variance. Each word stands "
        "where its last token does, which several words may share. Of each relation pairs that lie far apart are "
        f"drawn, at most {PLANE_PAIRS}.",
        planes_of_relations,
        "First 2 components of the relation's words, input embedding. Relations: {relations}.",
    ),
    (
        "plane_of_the_vocabulary",
        "The same words in the plane of the preset",
        f"The plane in which the preset {PRESET} scores: the first two components of the whole vocabulary. Of each "
        f"relation pairs that lie far apart are drawn, at most {PLANE_PAIRS}.",
        plane_of_the_vocabulary,
        "First 2 components of the whole vocabulary, input embedding. Relations: {relations}.",
    ),
    (
        "explained_variance",
        "Explained variance",
        "The share of the variance in the first components. A curve that rises early means few directions in use.",
        explained_variance,
        "Principal components of all rows{of_hidden_states}.",
    ),
    (
        "over_training",
        "Norms, distances and ranks over training",
        "From the run's own evaluations where it logged them, and from the checkpoints that it kept.",
        over_training,
        "From metrics.jsonl and the checkpoints in each run folder.",
    ),
    (
        "layers",
        "Logit lens with distances",
        "Each block's output read by the final norm and the head. Bars: 95 % intervals of the mean, as if positions "
        "were independent; the accuracy has none.",
        layers,
        "On a sample of {lens} validation positions of: {data}. Distances by the metric of a harmonic head, Euclidean "
        "for softmax.",
    ),
    (
        "cka",
        "Similarity of hidden states",
        "Debiased linear CKA between the layers of the first model and those of each other one on the same text: 1 "
        "means the same representation up to rotation and scale, 0 an unrelated one.",
        similarity,
        "On a sample of {sampled} validation positions of: {data}.",
    ),
    (
        "reliability",
        "Reliability",
        "Accuracy against confidence in 15 bins of equal width; on the diagonal confidence can be taken at its word. "
        "Bars: Wilson's 95 % interval of a share, as if the positions of a bin were independent. Those of one window "
        "are not, so the bars are rather too short; the interval of the ECE is over windows.",
        reliability,
        _ON_TEXT + " ECE with 95 % interval over windows, {bootstrap} resamples.",
    ),
    (
        "frequency_bands",
        "By frequency of the target",
        "Targets grouped by how often they occur in the training data, the most frequent on the left.",
        frequency_bands,
        _ON_TEXT + " 95 % intervals, {bootstrap} resamples of windows.",
    ),
)
