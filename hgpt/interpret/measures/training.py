"""What a run logged, and how the other measures change over its checkpoints."""

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from hgpt.history import records
from hgpt.interpret.blocks import Block, Drawing, paragraph
from hgpt.interpret.drawing import grid, listed, look, new_figure, sign
from hgpt.interpret.measure import Analysis, Curve, ModelResult, Quantity
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
    """What the training up to this step spent, as hgpt.run.energy logged it; None where it did not."""
    return next((record for record in reversed(history(model)) if record["kind"] == "energy"), None)


def series(model: ModelResult, kind: str, name: str) -> np.ndarray:
    """(step, value) of the records of one kind, (N, 2)."""
    points = [(r["step"], r[name]) for r in history(model) if r["kind"] == kind and r.get(name) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def over_steps(model: ModelResult, curve: Curve) -> tuple[np.ndarray, bool]:
    """(step, value) from the run's evaluations, or from its checkpoints where these are more, and whether they are."""
    points = series(model, "eval", curve.logged) if curve.logged is not None else np.empty((0, 2))
    kept = [(row["step"], row[curve.key]) for row in model.checkpoints if row.get(curve.key) is not None]
    return (points, False) if len(points) >= len(kept) else (np.array(kept, dtype=np.float64), True)


def loss_curves(analysis: Analysis) -> Drawing | None:
    models = [model for _, model in analysis.having(history)]
    if not models:
        return None
    figure, axes = new_figure()
    panel = axes[0, 0]
    for index, model in enumerate(analysis.models):
        style = look(index)
        train, validation = series(model, "train", "loss"), series(model, "eval", "loss")
        if len(train):
            label = None if len(validation) else model.label
            panel.plot(*train.T, color=style["color"], alpha=0.3, linewidth=0.8, label=label)
        if len(validation):
            panel.plot(*validation.T, **style, markersize=4, label=f"{model.label}, last {validation[-1, 1]:.3f}")
    panel.set(xlabel="optimiser step", ylabel="loss (nats per token)")
    return sign(
        figure,
        "loss_curves",
        "Loss over training",
        caption="Faint: training batches. Marked: validation loss as logged, unsmoothed, over the whole validation "
        "set.",
        models=models,
        source="From each run's metrics.jsonl.",
        remarks=listed("Left out, without a metrics.jsonl", [m.label for m in analysis.models if not history(m)]),
    )


def over_training(analysis: Analysis) -> Drawing | None:
    """A panel for each curve that is known of at least one model at several steps."""
    known: list[tuple[Curve, list[tuple[int, np.ndarray]]]] = []
    # Averages over text: how much text it is depends on where they are from.
    on_text: dict[bool, dict[str, None]] = {True: {}, False: {}}  # from checkpoints → labels
    for curve in analysis.curves:
        found = []
        for index, model in enumerate(analysis.models):
            points, from_checkpoints = over_steps(model, curve)
            if len(points) > 1:
                found.append((index, points))
                on_text[from_checkpoints] |= {model.label: None} if curve.on_text else {}
        if found:
            known.append((curve, found))
    if not known:
        return None
    figure, axes = grid(len(known), 3, row_height=2.3, extra=1)
    for panel, (curve, found) in zip(axes.flat, known, strict=False):
        for index, points in found:
            panel.plot(*points.T, **look(index), markersize=4, label=analysis.models[index].label)
        panel.set(
            xlabel="optimiser step", ylabel=textwrap.fill(curve.axis, 32), yscale="log" if curve.log_scale else "linear"
        )
    shown = sorted({index for _, found in known for index, _ in found})
    return sign(
        figure,
        "over_training",
        "Norms, distances and ranks over training",
        caption="From the run's own evaluations where it logged them, and from the checkpoints that it kept.",
        models=[analysis.models[index] for index in shown],
        source="From metrics.jsonl and the checkpoints in each run folder.",
        remarks=[
            *listed(
                "Hidden states and distances are averages over a part of the validation text: where a run's "
                "evaluations logged them, over the eval.diagnostic_windows of its configuration (16 unless set)",
                list(on_text[False]),
            ),
            *listed(
                f"Measured on a checkpoint, distances are averages over about {CHECKPOINT_TOKENS:,} validation tokens "
                f"in windows of at most {CHECKPOINT_WINDOW}, norms of hidden states over {CHECKPOINT_SAMPLE} of these; "
                "it is not the text of the other figures",
                list(on_text[True]),
            ),
        ],
    )


def section(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = [d for d in (loss_curves(analysis), over_training(analysis)) if d is not None]
    for model in analysis.models:
        if (spent := energy(model)) is not None:
            method = f"Energy of {model.label}, by whole machines: {spent['method']}."
            blocks.append(paragraph(f"{method} Estimates compare runs on one machine only.", quiet=True))
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
