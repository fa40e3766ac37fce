"""The text browser: the models' predictions for each token of a text."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from hgpt.errors import UserError
from hgpt.interpret.measure import Analysis, Block, ModelResult, page_data, paragraph
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.subject import Subject

TITLE = "Text browser"
NEAREST = 5  # most probable tokens shown at each position
POSITIONS = 160  # of the validation text
OWN_POSITIONS = 512  # of --text


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


@dataclass(frozen=True)
class Readings:
    """A text as a model read it: the text before the first target, and a reading for each target."""

    before: str
    seen: list[Reading]


def result_of(model: ModelResult) -> list[Reading]:
    found = model.found.get("reading")
    return found.seen if found else []


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


def compute(subject: Subject) -> Readings | None:
    passage = _passage(subject)
    if passage is None:
        return None
    inputs, targets = passage
    seen: list[Reading] = []
    context = subject.model.context
    while len(seen) < len(inputs):  # in pieces, each with at least half a context before its first new target
        start = max(0, min(len(seen) - context // 2, len(inputs) - context))
        part = slice(start, start + context)
        seen += read_text(subject.model, inputs[part], targets[part], NEAREST)[len(seen) - start :]
    return Readings(subject.model.token_text(int(inputs[0])), seen)


def _passage(subject: Subject) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs and targets from --text, or else from the start of the validation text; None without either."""
    file = subject.settings.text
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file} cannot be read as UTF-8: {error}") from error
        tokens = np.array(subject.model.encode(text)[: OWN_POSITIONS + 1], dtype=np.int64)
        if len(tokens) < 2:
            raise UserError(f"--text {file} has {len(tokens)} tokens, but at least 2 are needed to predict one")
        return tokens[:-1], tokens[1:]
    if subject.read is None:
        return None
    inputs, targets = subject.read.passages.windows[0]
    return inputs[:POSITIONS], targets[:POSITIONS]


CONTROLS = """
<div class="controls">
<label>text as read by <select class="pick" data-side="a"></select></label>
<label>beside it <select class="pick" data-side="b"></select></label>
<label>colour <select id="quantity"></select></label>
<label>scale <select id="text-scale"></select></label>
</div>
<p class="legend quiet" id="text-legend"></p>
<div class="sides"><div class="side" data-side="a"></div><div class="side" data-side="b"></div></div>
"""


def section(analysis: Analysis) -> list[Block]:
    found = [model.found.get("reading") for model in analysis.models]
    if not any(found):
        return []
    readings = json.dumps([text and asdict(text) for text in found])
    four_digits = json.loads(readings, parse_float=lambda digits: float(f"{float(digits):.4g}"))
    own = analysis.settings.text
    source = f"{own}, at most {OWN_POSITIONS} tokens" if own else "the beginning of the validation text"
    return [
        paragraph(
            "Point at a token, or move with the arrow keys, to see the token's probability and the tokens that each "
            "model found most probable at its place. A click keeps the token. The most probable tokens of a harmonic "
            "head are those with the nearest centres (with radii ρ: the smallest d / ρ); d / d_min stands next to them."
        ),
        paragraph(f"Text: {source}.", quiet=True),
        Markup(CONTROLS),
        page_data("reading-data", four_digits),
    ]


def rows(model: ModelResult) -> dict[str, list[Reading]]:
    return {"reading": result_of(model)}
