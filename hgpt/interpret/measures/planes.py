"""The words of a relation as points in a plane, with an arrow from the first to the second word of each pair."""

import textwrap
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from hgpt.interpret.drawing import finished, label_edges, listed, look, new_figure
from hgpt.interpret.measure import Analysis, Block, Drawing, ModelResult
from hgpt.interpret.subject import Subject
from hgpt.interpret.vectors import Projection, RelationVectors, ScoreSettings, project

TITLE = "Words in a plane"
MODELS, RELATIONS, PAIRS = 3, 4, 8  # as many as leave the words legible

PlaneOf = Literal["relation", "vocabulary"]
Words = tuple[tuple[str, str], ...]
# Whose principal components → name, title and caption of the figure, and words for its axes.
FIGURES: dict[PlaneOf, tuple[str, str, str, str]] = {
    "relation": (
        "planes_of_relations",
        "Words in the plane of their relation",
        "Arrows go from the first to the second word of a pair. Parallel arrows of equal length are parallelograms. "
        "The plane is fitted to the relation's words, so it looks as regular as possible; note its share of the "
        "variance. Each word is drawn at its last token, which several words may share.",
        "the relation's words",
    ),
    "vocabulary": (
        "plane_of_the_vocabulary",
        "The same words in the plane of the vocabulary",
        "The first two components of the whole vocabulary; baek2025, the score of Baek et al., is computed in this "
        "plane.",
        "the whole vocabulary",
    ),
}


def result_of(model: ModelResult) -> dict[str, tuple[Words, dict[PlaneOf, Projection]]]:
    """Relation → its words, and their vectors in each plane."""
    return model.found.get("planes", {})


def compute(subject: Subject) -> dict[str, tuple[Words, dict[PlaneOf, Projection]]]:
    found: dict[str, tuple[Words, dict[PlaneOf, Projection]]] = {}
    for name, pairs in subject.scored.items():
        vectors = RelationVectors(subject.input, pairs.ids)
        found[name] = pairs.words, {plane: project(vectors, ScoreSettings(plane=plane)) for plane in FIGURES}
    return found


def well_apart(points: np.ndarray, count: int) -> list[int]:
    """Indices of up to `count` pairs, (pairs, 2, 2), chosen greedily so that both ends of each lie far from the others.

    Their labels then overlap little; many words may share one token.
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
    return [draw(analysis, models, shared, plane) for plane in FIGURES] if models else []


def draw(analysis: Analysis, models: list[tuple[int, ModelResult]], shared: list[str], plane: PlaneOf) -> Drawing:
    """The first relations of `shared`, a row each, in each of `models`, a column each."""
    file, title, caption, axes_of = FIGURES[plane]
    names, more = shared[:RELATIONS], shared[RELATIONS:]
    figure, axes = new_figure(len(names), len(models), height=0.9 + 2.7 * len(names))
    for row, name in zip(axes, names, strict=True):
        for panel, (index, model) in zip(row, models, strict=True):
            words, planes = result_of(model)[name]
            found = planes[plane]
            shown = _draw_arrows(panel, words, found, look(index)["color"])
            lines = textwrap.wrap(f"{name} · {model.label} · {shown} of {len(words)} pairs", 120 // len(models))
            of_words = found.plane_variance_of_words
            lines.append(f"variance: {found.plane_variance:.0%} of vocabulary's, {of_words:.0%} of words'")
            panel.set_title("\n".join(lines), fontsize=7)
    label_edges(axes, "component 1", "component 2")
    labels = [model.label for _, model in models]
    left_out = [model.label for model in analysis.models if model.label not in labels]
    return finished(
        figure,
        file,
        title,
        caption=f"{caption} At most {PAIRS} pairs of a relation are drawn, those that lie far apart.",
        models=[model for _, model in models],
        source=f"First 2 components of {axes_of}, input embedding. Relations: {analysis.relations}.",
        remarks=[
            *listed(f"The first {len(names)} of {len(shared)} relations are drawn. Not drawn", more),
            *listed(f"At most {MODELS} models are drawn, and only models that share a relation. Not drawn", left_out),
        ],
    )


def _draw_arrows(panel: Axes, words: Words, found: Projection, colour: str) -> int:
    """Draw up to PAIRS pairs; returns how many."""
    points = np.stack([found.inputs, found.outputs], axis=1)  # (pairs, 2, 2)
    shown = well_apart(points, PAIRS)
    for pair in shown:
        start, end = points[pair]
        panel.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.9, "alpha": 0.8})
        for (x, y), word, weight in zip((start, end), words[pair], ("normal", "bold"), strict=True):
            panel.text(x, y, word, fontsize=6.5, weight=weight, ha="center", va="bottom")
    for side, marker in enumerate("os"):
        panel.plot(*points[shown, side].T, marker, color=colour, markersize=3)
    panel.margins(0.12)
    panel.tick_params(labelsize=6)
    return len(shown)
