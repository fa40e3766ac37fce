"""The tokens of a relation as points in a plane, with an arrow from the first to the second token of each pair."""

import textwrap
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from hgpt.interpret.drawing import label_edges, listed, look, new_figure, write_labels
from hgpt.interpret.measure import Analysis, Block, Details, Drawing, ModelResult, paragraph
from hgpt.interpret.relations import distinct
from hgpt.interpret.subject import Subject
from hgpt.interpret.token_distances import visible
from hgpt.interpret.vectors import Projection, ScoreSettings, project

TITLE = "Relations in a plane"
MODELS, RELATIONS, PAIRS = 3, 4, 8  # more would make labels illegible

PlaneOf = Literal["relation", "vocabulary"]
Tokens = tuple[tuple[str, str], ...]
# Whose principal components → first part of the names of the figures
FIGURES: dict[PlaneOf, str] = {"relation": "plane_of_relation", "vocabulary": "plane_of_vocabulary"}


def result_of(model: ModelResult) -> dict[str, tuple[Tokens, dict[PlaneOf, Projection]]]:
    """Relation → its pairs of tokens, each pair once, and their vectors in each plane."""
    return model.found.get("planes", {})


def compute(subject: Subject) -> dict[str, tuple[Tokens, dict[PlaneOf, Projection]]]:
    found: dict[str, tuple[Tokens, dict[PlaneOf, Projection]]] = {}
    for name, pairs in subject.scored.items():
        ids = distinct(pairs).ids
        if len(ids):
            names = [visible(subject.model.tokenizer, token) for token in ids.ravel().tolist()]
            tokens = tuple(zip(names[::2], names[1::2], strict=True))
            found[name] = tokens, {plane: project(subject.input, ids, ScoreSettings(plane=plane)) for plane in FIGURES}
    return found


def well_apart(points: np.ndarray, count: int) -> list[int]:
    """Indices of up to `count` pairs, (pairs, 2, 2), chosen greedily so that both ends lie far from the others.

    So their labels have room; pairs may share a token.
    """
    chosen = [0]
    while len(chosen) < min(count, len(points)):
        distances = np.linalg.norm(points[:, None] - points[chosen], axis=-1)  # (pairs, chosen, 2)
        nearest = distances.min(axis=(1, 2))
        if nearest.max() == 0:
            break
        chosen.append(int(nearest.argmax()))
    return chosen


def section(analysis: Analysis) -> list[Block]:
    """Both planes, for the first models that share a relation."""
    models: list[tuple[int, ModelResult]] = []
    shared: list[str] = []
    for index, model in analysis.having(result_of):
        common = [name for name in result_of(model) if name in shared or not models]
        if common and len(models) < MODELS:
            models.append((index, model))
            shared = common
    if not models:
        return []
    labels = [model.label for _, model in models]
    names, more = shared[:RELATIONS], shared[RELATIONS:]
    left_out = [model.label for model in analysis.models if model.label not in labels]
    remarks = [
        *listed(f"The first {len(names)} of {len(shared)} relations are drawn. Not drawn", more),
        *listed(f"At most {MODELS} models are drawn, and only models that share a relation. Not drawn", left_out),
    ]
    figures = {plane: [draw(models, name, plane, n) for n, name in enumerate(names, start=1)] for plane in FIGURES}
    return [
        paragraph(
            "An arrow goes from the first to the second token of a pair; the second is bold. Parallel arrows of equal "
            "length are parallelograms. The plane is fitted to the relation's tokens, so the arrows look as regular as "
            "possible; note the plane's share of the variance. A word of several tokens is represented by its last "
            f"one, as in the scores. At most {PAIRS} pairs of a relation are drawn, those that lie far apart. A label "
            "that would cover another one is left out."
        ),
        paragraph(" ".join([f"Input embedding. Relations: {analysis.relations}.", *remarks]), quiet=True),
        *figures["relation"],
        Details(
            title="The same relations in the plane of the vocabulary",
            blocks=[
                paragraph(
                    "The plane of the first two components of the whole vocabulary, in which the score baek2025 is "
                    "computed."
                ),
                *figures["vocabulary"],
            ],
        ),
    ]


def draw(models: list[tuple[int, ModelResult]], name: str, plane: PlaneOf, number: int) -> Drawing:
    """The relation `name` in the plane of each of `models`."""
    figure, axes = new_figure(1, len(models), height=3.2)
    arrows = []
    for panel, (index, model) in zip(axes[0], models, strict=True):
        labels, planes = result_of(model)[name]
        found = planes[plane]
        points = np.stack([found.inputs, found.outputs], axis=1)  # (pairs, 2, 2)
        shown = well_apart(points, PAIRS)
        _draw_arrows(panel, points[shown], look(index)["color"])
        arrows.append((points[shown], [labels[pair] for pair in shown]))
        of_all, of_words = found.plane_variance, found.plane_variance_of_words
        variance = f"variance: {of_all:.0%} of the vocabulary's, {of_words:.0%} of the relation's"
        title = (f"{model.label} · {len(shown)} of {len(labels)} pairs", variance)
        panel.set_title("\n".join(textwrap.fill(line, 120 // len(models)) for line in title), fontsize=7)
    label_edges(axes, "component 1", "component 2")
    figure.draw_without_rendering()  # the labels need the final layout
    figure.set_layout_engine("none")
    for panel, (pairs, tokens) in zip(axes[0], arrows, strict=True):
        write_labels(panel, pairs, tokens)
    return Drawing(name=f"{FIGURES[plane]}_{number}", title=name, figure=figure)


def _draw_arrows(panel: Axes, pairs: np.ndarray, colour: str) -> None:
    """An arrow for each pair, (pairs, 2, 2)."""
    for start, end in pairs:
        panel.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.9, "alpha": 0.8})
    for side, marker in enumerate("os"):
        panel.plot(*pairs[:, side].T, marker, color=colour, markersize=3)
    panel.margins(0.12)
    panel.tick_params(labelsize=6)
