"""Centres to read: what is near a position, near a centre, and which contexts are nearest to a centre."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import CHUNK


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A position of a text as its hidden state sees the centres.

    `token` is the target, `p` its probability, `rank` 1 where it is the most probable; `ratio` is d / d_min of its
    centre and `nearest` holds (token, p, d / d_min) of the most probable tokens. Ratios are None for a softmax head.
    """

    token: str
    p: float
    rank: int
    ratio: float | None
    nearest: tuple[tuple[str, float, float | None], ...]


@torch.inference_mode()
def read_text(loaded: LoadedModel, inputs: np.ndarray, targets: np.ndarray, k: int) -> list[Reading]:
    """For each position of `inputs`, (T,), its target and its `k` most probable tokens with their distance ratios.

    With a harmonic head the most probable tokens are those with the nearest centres, and
    d_i / d_min = exp((z_max − z_i) / n), in any metric.
    """
    x = loaded.hidden_states(torch.from_numpy(inputs.astype(np.int64))[None])[-1][0]
    y = torch.from_numpy(targets.astype(np.int64)).to(loaded.device)
    readings = []
    for position in range(len(inputs)):
        logits = loaded.logits(x[position : position + 1])[0]  # (V,): one row at a time, there are few
        log_p = logits.log_softmax(-1)
        own = log_p[y[position]]
        best, tokens = log_p.topk(min(k, len(log_p)))
        nearest = tuple(
            (loaded.token_text(token), p, _ratio(loaded, best[0] - log_probability))
            for token, p, log_probability in zip(tokens.tolist(), best.exp().tolist(), best, strict=True)
        )
        readings.append(
            Reading(
                token=loaded.token_text(int(y[position])),
                p=float(own.exp()),
                rank=int((log_p > own).sum()) + 1,
                ratio=_ratio(loaded, best[0] - own),
                nearest=nearest,
            )
        )
    return readings


def _ratio(loaded: LoadedModel, difference: Tensor) -> float | None:
    """d / d_min from log p_max − log p; None without a metric."""
    return None if loaded.exponent is None else float(torch.exp(difference / loaded.exponent))


def neighbours(loaded: LoadedModel, token: int, k: int) -> list[tuple[str, float]]:
    """The `k` centres nearest to the centre of `token`, itself left out, with their distances.

    By the metric of a harmonic head; by 1 − cosine for a softmax head, whose rows differ in length for reasons of
    frequency.
    """
    values, tokens = loaded.distances_from_centre(token).topk(min(k + 1, loaded.vocab_size), largest=False)
    found = zip(tokens.tolist(), values.tolist(), strict=True)
    return [(loaded.token_text(other), distance) for other, distance in found if other != token][:k]


@torch.inference_mode()
def nearest_contexts(loaded: LoadedModel, states: np.ndarray, token: int, k: int) -> list[tuple[int, float]]:
    """Of hidden states (S, D), the `k` that are nearest to the centre of `token`: indices and d / d_min of the state.

    Of a softmax head, the `k` states that give the token the largest logit, with its probability there.
    """
    scores, shown = [], []
    for start in range(0, len(states), CHUNK):
        logits = loaded.logits(torch.from_numpy(states[start : start + CHUNK]).to(loaded.device))
        if loaded.exponent is None:
            scores.append(-logits[:, token])
            shown.append(logits.log_softmax(-1)[:, token].exp())
        else:
            scores.append(-logits[:, token] / loaded.exponent)  # log d: the scale counts, so the nearest of all states
            shown.append(torch.exp((logits.amax(-1) - logits[:, token]) / loaded.exponent))
    values = torch.cat(shown)
    order = torch.cat(scores).argsort()[:k]
    return [(int(index), float(values[index])) for index in order]


def as_json(readings: list[Reading]) -> list[dict[str, Any]]:
    return [asdict(reading) for reading in readings]
