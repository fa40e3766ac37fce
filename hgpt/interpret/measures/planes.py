"""Words of a relation as points in a plane: an arrow for each pair."""

import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from hgpt.interpret.blocks import Block, Drawing
from hgpt.interpret.drawing import label_edges, listed, look, new_figure, sign
from hgpt.interpret.measure import Analysis, ModelResult
from hgpt.interpret.measures.parallelograms import PRESET
from hgpt.interpret.subject import Subject
from hgpt.interpret.vectors import RelationVectors, ScoreSettings, project

TITLE = "Words in a plane"
# Labels can be read for a few models and relations; the numbers are there for all.
MODELS, RELATIONS, PAIRS = 3, 4, 8

PlaneOf = Literal["relation", "vocabulary"]
FIGURES: dict[PlaneOf, dict[str, str]] = {
    "relation": {
        "name": "planes_of_relations",
        "title": "Words in the plane of their relation",
        "caption": "Arrows go from input to output; parallel arrows of one length are parallelograms. The plane is "
        "fitted to the relation's words, so it looks as regular as possible; mind the share of the variance. "
        "Each word stands where its last token does, which several words may share. Of each relation pairs that lie "
        f"far apart are drawn, at most {PAIRS}.",
        "axes": "the relation's words",
    },
    "vocabulary": {
        "name": "plane_of_the_vocabulary",
        "title": "The same words in the plane of the preset",
        "caption": f"The plane in which the preset {PRESET} scores: the first two components of the whole vocabulary. "
        f"Of each relation pairs that lie far apart are drawn, at most {PAIRS}.",
        "axes": "the whole vocabulary",
    },
}


@dataclass(frozen=True)
class Plane:
    """A relation's pairs in a plane: `points`, (pairs, 2, 2), and the plane's shares of the variance."""

    words: tuple[tuple[str, str], ...]
    points: np.ndarray
    variance: float
    variance_of_words: float


def of(model: ModelResult) -> dict[str, dict[PlaneOf, Plane]]:
    """Relation → whose plane → the pairs in it."""
    return model.found.get("planes", {})


def compute(subject: Subject) -> dict[str, dict[PlaneOf, Plane]]:
    found: dict[str, dict[PlaneOf, Plane]] = {}
    for name, pairs in subject.scored.items():
        located = RelationVectors(subject.input, pairs.ids)
        found[name] = {}
        for plane in FIGURES:
            projected = project(located, ScoreSettings(plane=plane))
            points = np.stack([projected.inputs, projected.outputs], axis=1)
            shares = projected.plane_variance, projected.plane_variance_of_words
            found[name][plane] = Plane(pairs.words, points, *shares)
    return found


def well_apart(points: np.ndarray, count: int) -> list[int]:
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


def section(analysis: Analysis) -> list[Block]:
    """Both planes, of the first models that share a relation."""
    models: list[tuple[int, ModelResult]] = []
    shared: list[str] = []
    for index, model in analysis.having(of):
        common = [name for name in of(model) if name in shared or not models]
        if common and len(models) < MODELS:
            models.append((index, model))
            shared = common
    return [draw(analysis, models, shared, plane) for plane in FIGURES] if models else []


def draw(analysis: Analysis, models: list[tuple[int, ModelResult]], shared: list[str], plane: PlaneOf) -> Drawing:
    """The first relations of `shared`, a row each, in each of `models`, a column each."""
    names, more = shared[:RELATIONS], shared[RELATIONS:]
    figure, axes = new_figure(len(names), len(models), height=0.9 + 2.7 * len(names))
    for row, name in zip(axes, names, strict=True):
        for panel, (index, model) in zip(row, models, strict=True):
            found = of(model)[name][plane]
            shown = well_apart(found.points, PAIRS)
            _draw_arrows(panel, found, shown, look(index)["color"])
            heading = f"{name} · {model.label} · {len(shown)} of {len(found.points)} pairs"
            lines = textwrap.wrap(heading, 120 // len(models))
            lines.append(f"variance: {found.variance:.0%} of vocabulary's, {found.variance_of_words:.0%} of words'")
            panel.set_title("\n".join(lines), fontsize=7)
    label_edges(axes, "component 1", "component 2")
    labels = [model.label for _, model in models]
    left_out = [model.label for model in analysis.models if model.label not in labels]
    words = FIGURES[plane]
    return sign(
        figure,
        name=words["name"],
        title=words["title"],
        caption=words["caption"],
        models=[model for _, model in models],
        source=f"First 2 components of {words['axes']}, input embedding. Relations: {analysis.relations}.",
        remarks=[
            *listed(f"Drawn are the first {len(names)} of {len(shared)} relations by name. Not drawn", more),
            *listed(f"Drawn are at most {MODELS} models, and such that share a relation. Not drawn", left_out),
        ],
    )


def _draw_arrows(panel: Axes, found: Plane, shown: list[int], colour: str) -> None:
    for pair in shown:
        start, end = found.points[pair]
        panel.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.9, "alpha": 0.8})
        for (x, y), word, weight in zip((start, end), found.words[pair], ("normal", "bold"), strict=True):
            panel.text(x, y, word, fontsize=6.5, weight=weight, ha="center", va="bottom")
    for side, marker in enumerate("os"):
        panel.plot(*found.points[shown, side].T, marker, color=colour, markersize=3)
    panel.margins(0.12)
    panel.tick_params(labelsize=6)
