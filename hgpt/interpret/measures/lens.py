"""The logit lens: loss, accuracy and distance of the target if the head is applied to the output of each block.

nostalgebraist, *interpreting GPT: the logit lens* (2020); the distances are an addition.
"""

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hgpt.interpret.drawing import finish, look, new_figure
from hgpt.interpret.measure import Analysis, Block, ModelResult, states_text
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import measure_states, sampled_positions
from hgpt.interpret.subject import Subject

TITLE = "Logit lens"
LENS_POSITIONS = 512


def result_of(model: ModelResult) -> list[dict[str, float]]:
    """Per layer, the embedding first: "loss", "accuracy", "target_ratio", and standard errors "loss_error", …"""
    return model.found.get("lens") or []


def logit_lens(loaded: LoadedModel, states: np.ndarray, targets: np.ndarray) -> list[dict[str, float]]:
    """Loss, accuracy and d_target / d_median after each layer.

    Args:
        states: hidden states, (layers + 1, S ≥ 2, D), those of the last layer after the final norm.
        targets: (S,) token ids.
    """
    lens = []
    y = torch.from_numpy(targets.astype(np.int64)).to(loaded.device)
    bar = tqdm(states, desc=f"{loaded.source.label}: logit lens", unit="layer", disable=None, leave=False)
    for layer, layer_states in enumerate(bar):
        x = torch.from_numpy(layer_states).to(loaded.device)
        measured = measure_states(loaded, x if layer == len(states) - 1 else loaded.final_norm(x), y)
        row: dict[str, float] = {"layer": layer, "accuracy": float(measured["correct"].mean())}
        for name in ("loss", "target_ratio"):  # the normal interval does not suit a proportion
            values = torch.from_numpy(measured[name]).double()
            row |= {name: float(values.mean()), f"{name}_error": float(values.std() / len(values) ** 0.5)}
        lens.append(row)
    return lens


def compute(subject: Subject) -> list[dict[str, float]] | None:
    if subject.read is None:
        return None
    text = subject.read.measures
    chosen = sampled_positions(len(text.positions.target), LENS_POSITIONS, subject.settings.seed)
    inside = np.isin(text.sample_at, chosen)
    return logit_lens(subject.model, text.sample[:, inside], text.positions.target[text.sample_at[inside]])


def section(analysis: Analysis) -> list[Block]:
    models = analysis.having(result_of)
    if not models:
        return []
    figure, axes = new_figure(1, 3, height=3.3)
    labels = {"loss": "loss (nats per token)", "accuracy": "accuracy",
              "target_ratio": "distance to the target's centre\nover the median distance"}  # fmt: skip
    for panel, (name, label) in zip(axes[0], labels.items(), strict=True):
        for index, model in models:
            values = [layer[name] for layer in result_of(model)]
            errors = [1.96 * layer[f"{name}_error"] for layer in result_of(model) if f"{name}_error" in layer]
            panel.errorbar(range(len(values)), values, yerr=errors or None, **look(index), markersize=4,
                           label=model.label)  # fmt: skip
        panel.set(xlabel="after block (0: embedding)", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    shown = [model for _, model in models]
    return [
        finish(
            figure,
            "layers",
            "Logit lens with distances",
            caption="The final norm and the head are applied to the output of each block. Bars: 95 % intervals of the "
            "mean, as if positions were independent; the accuracy has none.",
            source=f"On {states_text(shown, LENS_POSITIONS)} sampled validation positions of: {analysis.data_source}. "
            "Distances: a harmonic head's own, Euclidean for softmax.",
        )
    ]


def rows(model: ModelResult) -> dict[str, Any]:
    return {"logit_lens": result_of(model)}
