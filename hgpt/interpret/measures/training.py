"""The energy that a run logged, and other measures over its evaluations and checkpoints."""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from hgpt.history import records
from hgpt.interpret.drawing import finish, grid, look
from hgpt.interpret.measure import Analysis, Block, Curve, ModelResult, Quantity, paragraph
from hgpt.interpret.subject import CHECKPOINT_SAMPLE, CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, Subject

TITLE = "Training"


def history(model: ModelResult) -> list[dict[str, Any]]:
    """The records of the run's metrics.jsonl up to the step of the model; none without a run."""
    return model.found.get("training") or []


def compute(subject: Subject) -> list[dict[str, Any]]:
    source = subject.model.source
    if source.run is None:
        return []
    return [record for record in records(source.run) if source.step is None or record["step"] <= source.step]


def energy(model: ModelResult) -> dict[str, Any] | None:
    """The logged energy of the training up to the model's step, or None."""
    return next((record for record in reversed(history(model)) if record["kind"] == "energy"), None)


def over_steps(model: ModelResult, curve: Curve) -> np.ndarray:
    """(step, value), (N, 2), from the run's evaluations, or from its checkpoints if there are more of them."""
    logged = [(record["step"], record.get(str(curve.logged))) for record in history(model) if record["kind"] == "eval"]
    kept = [(row["step"], row.get(curve.key)) for row in model.checkpoints]
    points = [[point for point in source if point[1] is not None] for source in (logged, kept)]
    return np.array(max(points, key=len), dtype=np.float64).reshape(-1, 2)


def section(analysis: Analysis) -> list[Block]:
    """A panel per curve with several steps of at least one model, and how each run's energy was measured."""
    known = []
    for curve in analysis.curves:
        points = {index: over_steps(model, curve) for index, model in enumerate(analysis.models)}
        if several := {index: steps for index, steps in points.items() if len(steps) > 1}:
            known.append((curve, several))
    blocks: list[Block] = []
    if known:
        figure, axes = grid(len(known), 3, row_height=2.3, extra=1)
        for panel, (curve, several) in zip(axes.flat, known, strict=False):
            for index, found in several.items():
                panel.plot(*found.T, **look(index), markersize=4, label=analysis.models[index].label)
            label, scale = textwrap.fill(curve.axis, 32), "log" if curve.log_scale else "linear"
            panel.set(xlabel="optimiser step", ylabel=label, yscale=scale)
        drawing = finish(
            figure,
            "over_training",
            "Norms, distances and ranks over training",
            caption="From the run's own evaluations, or from its kept checkpoints if these are more. Hidden states and "
            "distances are means over another part of the validation text than in other figures: in evaluations over "
            "eval.diagnostic_windows windows (16 unless set), for checkpoints over about "
            f"{CHECKPOINT_TOKENS:,} tokens in windows of at most {CHECKPOINT_WINDOW} (norms: {CHECKPOINT_SAMPLE} of "
            "them). python -m hgpt.runs shows the loss over training.",
            source="From metrics.jsonl and the checkpoints in each run folder.",
        )
        blocks.append(drawing)
    for model in analysis.models:
        if (spent := energy(model)) is not None:
            measured = f"Energy of {model.label}, including all other programs on its machines: {spent['method']}."
            blocks.append(paragraph(f"{measured} Compare estimates of the same machine only.", quiet=True))
    return blocks


def _energy(name: str) -> Callable[[ModelResult], str | None]:
    return lambda model: None if (found := (energy(model) or {}).get(name)) is None else f"{found:.3g}"


def rows(model: ModelResult) -> dict[str, Any]:
    return {"energy": energy(model), "checkpoints": model.checkpoints}


QUANTITIES = (
    Quantity("energy of the training, kWh", _energy("energy_kwh"), "lower"),
    Quantity("training tokens per joule", _energy("tokens_per_joule"), "higher"),
    Quantity("emissions of the training, kg CO2eq", _energy("emissions_kg"), "lower"),
)
