"""The logit lens: what each block's output would predict, and how far the target's centre is from it.

nostalgebraist, *interpreting GPT: the logit lens* (2020); here with distances too.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hgpt.interpret.drawing import look, new_figure, sign
from hgpt.interpret.measure import Analysis, Block, Measure, ModelResult, counts_text, states_sampled
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import CHUNK, measure_states, sampled_positions
from hgpt.interpret.subject import Subject

NAME = "lens"
LENS_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class LayerLens:
    """One layer's means over a sample of positions, and their standard errors; layer 0 is the embedding."""

    layer: int
    loss: float
    loss_error: float
    accuracy: float
    target_ratio: float
    target_ratio_error: float


def of(model: ModelResult) -> list[LayerLens]:
    return model.found.get(NAME) or []


def logit_lens(loaded: LoadedModel, states: np.ndarray, targets: np.ndarray) -> list[LayerLens]:
    """Loss, accuracy and d_target / d_median of each layer's states, (layers + 1, S ≥ 2, D), read by the final norm
    and the head.

    The last layer's states are after the final norm already.
    """
    lens = []
    y = torch.from_numpy(targets.astype(np.int64)).to(loaded.device)
    bar = tqdm(states, desc=f"{loaded.source.label}: logit lens", unit="layer", disable=None, leave=False)
    for layer, layer_states in enumerate(bar):
        parts: dict[str, list[Tensor]] = {"loss": [], "correct": [], "target_ratio": []}
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            x = torch.from_numpy(layer_states[part]).to(loaded.device)
            if layer < len(states) - 1:
                x = loaded.final_norm(x)
            measured = measure_states(loaded, x, y[part])
            for name, values in parts.items():
                values.append(measured[name].double())
        whole = {name: torch.cat(values) for name, values in parts.items()}
        means = {name: float(values.mean()) for name, values in whole.items()}
        errors = {name: float(values.std() / len(values) ** 0.5) for name, values in whole.items()}
        lens.append(
            LayerLens(
                layer=layer,
                loss=means["loss"],
                loss_error=errors["loss"],
                accuracy=means["correct"],
                target_ratio=means["target_ratio"],
                target_ratio_error=errors["target_ratio"],
            )
        )
    return lens


def compute(subject: Subject) -> list[LayerLens] | None:
    if subject.read is None:
        return None
    text = subject.read.measures
    chosen = sampled_positions(len(text.positions.target), LENS_POSITIONS, subject.settings.seed)
    inside = np.isin(text.sample_at, chosen)
    return logit_lens(subject.model, text.sample[:, inside], text.positions.target[text.sample_at[inside]])


# ------------------------------------------------------------------------------------------------------------
# The page


def section(analysis: Analysis) -> list[Block]:
    models = [(index, model) for index, model in enumerate(analysis.models) if of(model)]
    if not models:
        return []
    figure, axes = new_figure(1, 3, height=3.3)
    for index, model in models:
        lens = of(model)
        depth = [layer.layer for layer in lens]
        for panel, values, errors in (
            (axes[0, 0], [layer.loss for layer in lens], [layer.loss_error for layer in lens]),
            (axes[0, 1], [layer.accuracy for layer in lens], None),
            (axes[0, 2], [layer.target_ratio for layer in lens], [layer.target_ratio_error for layer in lens]),
        ):
            bars = None if errors is None else 1.96 * np.array(errors)
            panel.errorbar(depth, values, yerr=bars, **look(index), markersize=4, label=model.label)
    labels = ("loss (nats per token)", "accuracy", "distance to the target's centre\nover the median distance")
    for panel, label in zip(axes[0], labels, strict=True):
        panel.set(xlabel="after block (0: embedding)", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    shown = [model for _, model in models]
    sampled = {label: min(LENS_POSITIONS, count) for label, count in states_sampled(shown).items()}
    return [
        sign(
            figure,
            name="layers",
            title="Logit lens with distances",
            caption="Each block's output read by the final norm and the head. Bars: 95 % intervals of the mean, as if "
            "positions were independent; the accuracy has none.",
            models=shown,
            source=f"On a sample of {counts_text(sampled)} validation positions of: {analysis.data_source}. Distances "
            "by the metric of a harmonic head, Euclidean for softmax.",
        )
    ]


MEASURE = Measure(
    name=NAME,
    title="Logit lens",
    compute=compute,
    rows=lambda model: {"logit_lens": [asdict(layer) for layer in of(model)]},
    section=section,
)
