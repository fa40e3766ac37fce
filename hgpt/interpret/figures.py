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

from hgpt.interpret.analysis import CKA_POSITIONS, LENS_POSITIONS, PRESET_QUADRUPLES
from hgpt.interpret.parallelograms import EXPECTED_AT_RANDOM, PRESET
from hgpt.interpret.results import Analysis, Estimate, ModelResult, difference_over_relations

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
class Drawing:
    """A figure with its file name, heading and what to see in it."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw_all(analysis: Analysis) -> list[Drawing]:
    """Every figure that the analysis has numbers for, in the order of the report."""
    drawings = []
    with matplotlib.rc_context(STYLE):
        for name, title, caption, draw, source in FIGURES:
            figure = draw(analysis)
            if figure is not None:
                _sign(figure, analysis, source)
                drawings.append(Drawing(name=name, title=title, caption=caption, figure=figure))
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
    """Colour, line style and marker of the model with this number, the same in every figure."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[(index // len(COLOURS) + index) % len(STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _sign(figure: Figure, analysis: Analysis, source: str) -> None:
    """Models, steps, tokens and settings, below the figure."""
    models = "; ".join(model.provenance for model in analysis.models)
    text = f"{models}. {source.format(**_facts(analysis))}"
    columns = int(figure.get_figwidth() * 18)
    figure.supxlabel("\n".join(textwrap.wrap(text, columns)), fontsize=6.5, color=GREY, x=0.01, ha="left")


def _facts(analysis: Analysis) -> dict[str, Any]:
    return {
        "tokens": f"{analysis.evaluated_tokens:,}",
        "data": analysis.data_source or "no text",
        "bootstrap": f"{analysis.settings.bootstrap:,}",
        "relations": analysis.settings.relations or "the relation sets that ship with hgpt",
        "quadruples": f"{PRESET_QUADRUPLES:,}",
        "lens": f"{LENS_POSITIONS:,}",
        "cka": f"{CKA_POSITIONS:,}",
    }


def _new(rows: int = 1, columns: int = 1, height: float = 3.4, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """One legend above all panels; it takes its room from them."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 45 else 2
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


# ------------------------------------------------------------------------------------------------------------
# Training


def loss_curves(analysis: Analysis) -> Figure | None:
    if not any(model.history for model in analysis.models):
        return None
    figure, axes = _new()
    panel: Axes = axes[0, 0]
    for index, model in enumerate(analysis.models):
        style = look(index)
        train = _series(model.history, "train", "loss")
        validation = _series(model.history, "eval", "loss")
        if len(train):
            panel.plot(train[:, 0], train[:, 1], color=style["color"], alpha=0.3, linewidth=0.8)
        if len(validation):
            last = f", last {validation[-1, 1]:.3f}"
            panel.plot(validation[:, 0], validation[:, 1], **style, markersize=4, label=f"{model.label}{last}")
    panel.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    _legend(figure, panel)
    return figure


def _series(history: list[dict[str, Any]], kind: str, name: str) -> np.ndarray:
    points = [(r["step"], r[name]) for r in history if r["kind"] == kind and r.get(name) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def over_training(analysis: Analysis) -> Figure | None:
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
    for logged, kept, label in quantities:
        curves = [(index, _over_steps(model, logged, kept)) for index, model in enumerate(analysis.models)]
        curves = [(index, points) for index, points in curves if len(points) > 1]
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
    _legend(figure, axes[0, 0])
    return figure


def _over_steps(model: ModelResult, logged: str | None, kept: str) -> np.ndarray:
    """(step, value) from the run's evaluations, or from its checkpoints where these are more."""
    points = _series(model.history, "eval", logged) if logged is not None else np.empty((0, 2))
    checkpoints = [(row["step"], row[kept]) for row in model.checkpoints if row.get(kept) is not None]
    return points if len(points) >= len(checkpoints) else np.array(checkpoints, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------------
# Parallelograms


def scores_by_relation(analysis: Analysis) -> Figure | None:
    results = [model.relations.get(PRESET, {}) for model in analysis.models]
    names = sorted({name for by_relation in results for name in by_relation})
    if not names:
        return None
    figure, axes = _new(height=1.5 + 0.26 * len(names) * max(1, len(results) / 2))
    panel: Axes = axes[0, 0]
    step = 0.8 / len(results)
    for index, (model, by_relation) in enumerate(zip(analysis.models, results, strict=True)):
        rows = [i for i, name in enumerate(names) if name in by_relation]
        found = [by_relation[names[i]] for i in rows]
        y = np.array(rows) - 0.4 + step * (index + 0.5)
        values = np.array([[r.score.value, r.score.low, r.score.high, r.shuffled] for r in found])
        style = look(index)
        panel.errorbar(
            values[:, 0],
            y,
            xerr=np.abs(values[:, 1:3].T - values[:, 0]),
            fmt=style["marker"],
            color=style["color"],
            markersize=4,
            label=model.label,
        )
        panel.plot(values[:, 3], y, "|", color=style["color"], markersize=9, markeredgewidth=1.5)
    panel.axvline(EXPECTED_AT_RANDOM, color=GREY, linestyle=":", linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("mean parallelogram score (dotted: four random tokens; |: same words, random pairs)")
    panel.set_xlim(left=0)
    _legend(figure, panel)
    return figure


def score_cdfs(analysis: Analysis) -> Figure | None:
    names = sorted({name for model in analysis.models for name in model.relations.get(PRESET, {})})
    if not names:
        return None
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = _new(rows, columns, height=1.2 + 1.7 * rows, sharex=True, sharey=True)
    for panel, name in zip(axes.flat, names, strict=False):
        for index, model in enumerate(analysis.models):
            result = model.relations.get(PRESET, {}).get(name)
            if result is not None:
                scores = np.quantile(result.sampled, np.linspace(0, 1, 201))
                style = look(index)
                panel.plot(scores, np.linspace(0, 1, 201), color=style["color"], linestyle=style["linestyle"],
                           label=model.label)  # fmt: skip
        panel.set_title(name)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(0, 100)
        panel.set_xticks([0, 0.1, 1, 10, 100], ["0", ".1", "1", "10", "100"])
    for panel in list(axes.flat)[len(names) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel("score")
    for panel in axes[:, 0]:
        panel.set_ylabel("share of pairs\nof pairs below")
    _legend(figure, axes[0, 0])
    return figure


def variants(analysis: Analysis) -> Figure | None:
    if len(analysis.models) < 2:
        return None
    first, others = analysis.models[0], analysis.models[1:]
    others = [model for model in others if model.vocabulary == first.vocabulary]
    names = [name for name in first.relations if any(name in other.relations for other in others)]
    if not names:
        return None
    figure, axes = _new(height=1.4 + 0.24 * len(names) * max(1, len(others) / 2))
    panel: Axes = axes[0, 0]
    step = 0.8 / len(others)
    for index, other in enumerate(others):
        estimates = [difference_over_relations(other.relations.get(n, {}), first.relations[n]) for n in names]
        found = [(i, estimate) for i, estimate in enumerate(estimates) if estimate is not None]
        style = look(analysis.models.index(other))
        values = np.array([[e.value, e.low, e.high] for _, e in found])
        panel.errorbar(
            values[:, 0],
            np.array([i for i, _ in found]) - 0.4 + step * (index + 0.5),
            xerr=np.abs(values[:, 1:].T - values[:, 0]),
            fmt=style["marker"],
            color=style["color"],
            markersize=4,
            label=f"{other.label} minus {first.label}",
        )
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("difference of the mean score (below 0: better than the first model)")
    _legend(figure, panel)
    return figure


def planes_of_relations(analysis: Analysis) -> Figure | None:
    return _planes(analysis, "relation")


def plane_of_the_vocabulary(analysis: Analysis) -> Figure | None:
    return _planes(analysis, "vocabulary")


def _planes(analysis: Analysis, plane: str) -> Figure | None:
    models = [model for model in analysis.models if model.planes][:PLANE_MODELS]
    if not models:
        return None
    names = [name for name in models[0].planes if all(name in model.planes for model in models)][:PLANE_RELATIONS]
    figure, axes = _new(len(names), len(models), height=0.9 + 2.7 * len(names))
    for row, name in zip(axes, names, strict=True):
        for panel, model in zip(row, models, strict=True):
            drawn = model.planes[name]
            points, words = drawn[plane], drawn["words"]  # (pairs, 2, 2)
            colour = look(analysis.models.index(model))["color"]
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
            lines = textwrap.wrap(f"{name} · {model.label}", 120 // len(models))
            lines.append(f"variance: {share:.0%} of vocabulary's, {own:.0%} of words'")
            panel.set_title("\n".join(lines), fontsize=7)
            panel.margins(0.12)
            panel.tick_params(labelsize=6)
    for panel in axes[-1]:
        panel.set_xlabel("component 1")
    for panel in axes[:, 0]:
        panel.set_ylabel("component 2")
    return figure


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


def explained_variance(analysis: Analysis) -> Figure | None:
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
    _legend(figure, axes[0, 0])
    return figure


def layers(analysis: Analysis) -> Figure | None:
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
    _legend(figure, axes[0, 0])
    return figure


def similarity(analysis: Analysis) -> Figure | None:
    if not analysis.cka:
        return None
    tables = list(analysis.cka.items())
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    figure, axes = _new(rows, columns, height=0.8 + 2.9 * rows)
    for panel, (label, table) in zip(axes.flat, tables, strict=False):
        image = panel.imshow(table, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        panel.set(xlabel=f"{label}: block", ylabel=f"{analysis.models[0].label}: block")
        panel.xaxis.label.set_fontsize(7)
        panel.yaxis.label.set_fontsize(7)
        if max(table.shape) <= 13:
            for (y, x), value in np.ndenumerate(table):
                panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6,
                           color="white" if value < 0.6 else "black")  # fmt: skip
    for panel in list(axes.flat)[len(tables) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=axes, label="debiased linear CKA", shrink=0.8)
    return figure


# ------------------------------------------------------------------------------------------------------------
# Calibration


def reliability(analysis: Analysis) -> Figure | None:
    models = [(index, model) for index, model in enumerate(analysis.models) if model.reliability is not None]
    if not models:
        return None
    figure, axes = _new(2, 1, height=4.6, sharex=True, height_ratios=(3, 1))
    curve_panel, count_panel = axes[:, 0]
    for index, model in models:
        curve = model.reliability
        assert curve is not None
        # The interval of a share, normal approximation: a bin of a few positions says little.
        error = 1.96 * np.sqrt(curve.accuracy * (1 - curve.accuracy) / curve.count)
        ece: Estimate = model.quality["ece"]
        curve_panel.errorbar(curve.confidence, curve.accuracy, yerr=error, **look(index), markersize=4,
                             label=f"{model.label}, ECE {ece.text}")  # fmt: skip
        count_panel.plot(curve.confidence, curve.count, **look(index), markersize=3)
    curve_panel.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    curve_panel.set_ylabel("accuracy")
    curve_panel.set_ylim(0, 1)
    count_panel.set(xlabel="confidence: probability of the predicted token", ylabel="positions", xlim=(0, 1))
    count_panel.set_yscale("log")
    _legend(figure, curve_panel)
    return figure


def frequency_bands(analysis: Analysis) -> Figure | None:
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
            values = np.array([[band[name].value, band[name].low, band[name].high] for band in bands])
            style = look(index)
            panel.errorbar(
                np.array([names.index(band["band"]) for band in bands]) - 0.3 + step * (place + 0.5),
                values[:, 0],
                yerr=np.abs(values[:, 1:].T - values[:, 0]),
                fmt=style["marker"],
                color=style["color"],
                markersize=4,
                label=model.label,
            )
        panel.set_xticks(range(len(names)), [name.replace("rank ", "") for name in names], rotation=30, ha="right")
        panel.set(xlabel="frequency rank of the target", ylabel=label)
    _legend(figure, axes[0, 0])
    return figure


# ------------------------------------------------------------------------------------------------------------
# Comparisons of many runs


def measure_against_loss(rows: Sequence[dict[str, Any]], measures: dict[str, str], source: str) -> Figure:
    """Each measure of readability against the validation loss, a point for each run, an arm by colour.

    Args:
        rows: {"arm", "loss", and each measure}; a measure that is None is left out.
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
                points = [(row["loss"], row[key]) for row in rows if row["arm"] == arm and row[key] is not None]
                style = look(index)
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, style["marker"], color=style["color"], markersize=5, alpha=0.8, label=arm)
            panel.set(xlabel="validation loss (nats)", ylabel=label)
        for panel in list(axes.flat)[len(measures) :]:
            panel.set_visible(False)
        _legend(figure, axes[0, 0])
        figure.supxlabel("\n".join(textwrap.wrap(source, int(WIDTH * 18))), fontsize=6.5, color=GREY, x=0.01, ha="left")
    return figure


Draw = Callable[[Analysis], Figure | None]
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
        "Each curve is the share of {quadruples} random pairs of pairs that score below. Further left is better.",
        score_cdfs,
        f"Preset {PRESET}, {{quadruples}} random pairs of pairs a relation. Relations: {{relations}}.",
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
        "where its last token does, which several words may share.",
        planes_of_relations,
        "First 2 components of the relation's words, input embedding.",
    ),
    (
        "plane_of_the_vocabulary",
        "The same words in the plane of the preset",
        f"The plane in which the preset {PRESET} scores: the first two components of the whole vocabulary.",
        plane_of_the_vocabulary,
        "First 2 components of the whole vocabulary, input embedding.",
    ),
    (
        "explained_variance",
        "Explained variance",
        "The share of the variance in the first components. A curve that rises early means few directions in use.",
        explained_variance,
        "Principal components of all rows; hidden states: a sample of {cka} positions of {data}.",
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
        "Each block's output read by the final norm and the head. Bars: 95 % of the mean over positions.",
        layers,
        "On {lens} validation positions of: {data}. Distances by the metric of a harmonic head, Euclidean for softmax.",
    ),
    (
        "cka",
        "Similarity of hidden states",
        "Debiased linear CKA between the layers of the first model and those of each other one on the same text: 1 "
        "means the same representation up to rotation and scale, 0 an unrelated one.",
        similarity,
        "On {cka} validation positions of: {data}.",
    ),
    (
        "reliability",
        "Reliability",
        "Accuracy against confidence in 15 bins of equal width; on the diagonal confidence can be taken at its word.",
        reliability,
        _ON_TEXT + " ECE with 95 % interval over windows.",
    ),
    (
        "frequency_bands",
        "By frequency of the target",
        "Targets grouped by how often they occur in the training data, the most frequent on the left.",
        frequency_bands,
        _ON_TEXT + " 95 % intervals, {bootstrap} resamples of windows.",
    ),
)


def caption(drawing: Drawing, analysis: Analysis) -> str:
    return drawing.caption.format(**_facts(analysis))


def legend_entries(models: Sequence[ModelResult]) -> list[tuple[str, str]]:
    """(label, colour) of each model, for the page."""
    return [(model.label, COLOURS[index % len(COLOURS)]) for index, model in enumerate(models)]
