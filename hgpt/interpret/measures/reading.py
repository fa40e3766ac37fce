"""The text browser: the models' predictions for each token of a text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgpt.errors import UserError
from hgpt.interpret.measure import Analysis, Block, Html, ModelResult, paragraph
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.subject import Subject

TITLE = "Text browser"
NEAREST = 5
POSITIONS = 160


@dataclass(frozen=True)
class Reading:
    """The prediction at a position of a text.

    `token` is the target, `p` its probability, `rank` 1 if it is the most probable token, `ratio` d / d_min of its
    centre; `nearest` holds (token, p, d / d_min) of the most probable tokens. A softmax head has no d / d_min: None.
    """

    token: str
    p: float
    rank: int
    ratio: float | None
    nearest: tuple[tuple[str, float, float | None], ...]


def result_of(model: ModelResult) -> list[Reading]:
    return model.found.get("reading") or []


@torch.inference_mode()
def read_text(loaded: LoadedModel, inputs: np.ndarray, targets: np.ndarray, k: int) -> list[Reading]:
    """The target and the `k` most probable tokens at each position, (T,) inputs and targets.

    With a harmonic head without radii the most probable tokens are those with the nearest centres.
    """
    x = loaded.hidden_states(torch.from_numpy(inputs.astype(np.int64))[None])[-1][0]
    y = torch.from_numpy(targets.astype(np.int64)).to(loaded.device)
    readings = []
    for position in range(len(inputs)):
        logits = loaded.logits(x[position : position + 1])[0]  # (V,): one row at a time, there are few
        log_p, ratios = logits.log_softmax(-1), _ratios(loaded, x[position : position + 1], logits[None])
        own = log_p[y[position]]
        best, tokens = log_p.topk(min(k, len(log_p)))
        nearest = tuple(
            (loaded.token_text(token), p, None if ratios is None else float(ratios[token]))
            for token, p in zip(tokens.tolist(), best.exp().tolist(), strict=True)
        )
        rank, ratio = int((log_p > own).sum()) + 1, None if ratios is None else float(ratios[y[position]])
        readings.append(Reading(loaded.token_text(int(y[position])), float(own.exp()), rank, ratio, nearest))
    return readings


def _ratios(loaded: LoadedModel, x: Tensor, logits: Tensor) -> Tensor | None:
    """d / d_min of every token, (1, D) and (1, V) → (V,); None without a metric."""
    if loaded.exponent is None:
        return None
    log_d = loaded.log_distances(x, logits)[0]
    return torch.exp(log_d - log_d.min())


def compute(subject: Subject) -> list[Reading] | None:
    passage = _passage(subject)
    return None if passage is None else read_text(subject.model, *passage, NEAREST)


def _passage(subject: Subject) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and targets from --text, or else from the start of the validation text; None without either."""
    file, longest = subject.settings.text, min(POSITIONS, subject.model.context)
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file} cannot be read as UTF-8: {error}") from error
        tokens = np.array(subject.model.encode(text)[: longest + 1], dtype=np.int64)
        if len(tokens) < 2:
            raise UserError(f"--text {file} has {len(tokens)} tokens, but at least 2 are needed to predict one")
        return tokens[:-1], tokens[1:]
    if subject.read is None:
        return None
    inputs, targets = subject.read.passages.windows[0]
    return inputs[:longest], targets[:longest]


# The panel stays at the bottom of the window while its own text is visible.
TEMPLATE = """
{% for group in groups %}
<div class="reading">
<p class="quiet">The darker a token, the higher its probability under {{ group.models[0].label }}
{%- if groups|length > 1 %}. Tokens of {{ group.models|map(attribute="label")|join(", ") }}{% endif %}.</p>
<div class="text" id="text-{{ loop.index0 }}">
{%- for seen in group.models[0].reading -%}
<span tabindex="0" data-position="{{ loop.index0 }}" style="background:rgba(86,180,233,{{ "%.2f"|format(seen.p) }})">
{{- seen.token }}</span>
{%- endfor -%}
</div>
<div class="panel" id="panel-{{ loop.index0 }}"></div>
</div>
{% endfor %}
<script type="application/json" id="readings">{{ groups|tojson }}</script>
"""


def reading_groups(models: Sequence[ModelResult]) -> list[dict[str, Any]]:
    """Models that read the same tokens together, [{"tokens", "models": [{"label", "number", "reading"}]}].

    `number` is the model's place in the report.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, model in enumerate(models):
        if found := result_of(model):
            tokens = tuple(reading.token for reading in found)
            group = groups.setdefault(tokens, {"tokens": list(tokens), "models": []})
            reading = [asdict(seen) for seen in found]
            group["models"].append({"label": model.label, "number": number, "reading": reading})
    return list(groups.values())


def section(analysis: Analysis) -> list[Block]:
    groups = reading_groups(analysis.models)
    if not groups:
        return []
    source = analysis.settings.text or "the start of the first window of validation text"
    return [
        paragraph(
            "Point at a token, tap it or reach it with Tab: what each model thought before it came, the most probable "
            "tokens first. Of a harmonic head these are the nearest centres (with radii ρ, those with the smallest "
            "d / ρ), with d / d_min; the list of a softmax head is by probability alone."
        ),
        paragraph(f"Text: {source}.", quiet=True),
        Html(template=TEMPLATE, values={"groups": groups}),
    ]


def rows(model: ModelResult) -> dict[str, Any]:
    return {"reading": result_of(model)}
