"""The distances of each generated token: the table of sample.py --show-distances."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hgpt.interpret.models import token_text
from hgpt.model.harmax import relative_distances
from hgpt.model.heads import HarmonicHead

TOKEN_WIDTH = 16  # columns of the terminal; longer tokens are shortened

LEGEND = """\
p        the model's own probability of the token: HarMax with n = {exponent:.4g}
         at temperature 1, without top-k, top-p and min-p
d/d_min  {distance} distance from the hidden state to the token's centre,
         divided by the distance to the nearest centre: (p_max / p)^(1/n)
rank     1 if the token's own centre is the nearest"""

LEGEND_WITH_RADII = """\
p        the model's own probability of the token: HarMax with n = {exponent:.4g}
         and radii, at temperature 1, without top-k, top-p and min-p
d/d_min  {distance} distance d from the hidden state to the token's centre,
         divided by the distance to the nearest centre
ρ/ρ_max  the token's radius ρ, divided by the largest radius
d/ρ      divided by the smallest d/ρ of all centres: (p_max / p)^(1/n)
rank     1 if the token's own d/ρ is the smallest"""


@dataclass(frozen=True, kw_only=True)
class TokenDistances:
    """A generated token and its distances from the hidden state before it.

    `probability` is HarMax's, `ratio` d/d_min of the token's centre, `rank` 1 + the number of nearer centres; `nearest`
    holds pairs of token and d/d_min, the nearest first. With radii ρ, `radius` is ρ/ρ_max, and `scaled` is d/ρ divided
    by its smallest value; it replaces the distance in `rank` and `nearest`.
    """

    token: int
    probability: float
    ratio: float
    rank: int
    nearest: list[tuple[int, float]]
    radius: float | None = None
    scaled: float | None = None


@torch.inference_mode()
def measure(model: PreTrainedModel, prompt_ids: list[int], new_ids: list[int], nearest: int) -> list[TokenDistances]:
    """p, d_i/d_min and the `nearest` centres for each of `new_ids`, by one pass over the text of a harmonic model."""
    ids = torch.tensor([prompt_ids + new_ids[:-1]], device=model.device)
    head = model.get_output_embeddings()
    assert isinstance(head, HarmonicHead)
    logits = model(ids, use_cache=False, logits_to_keep=len(new_ids)).logits[0]  # (T, V): −n log d + a
    log_p = logits.float().cpu().log_softmax(-1)
    n, a = float(head.exponent), head.log_weight
    scaled = relative_distances(log_p, n)  # d_i/ρ_i over the smallest
    ratios = scaled if a is None else relative_distances(log_p, n, a[: head.num_classes].float().cpu())
    radii = None if a is None else (head.radii / head.radii.max()).tolist()
    near = scaled.topk(min(nearest, scaled.shape[-1]), largest=False)  # (T, nearest)
    return [
        TokenDistances(
            token=token,
            probability=log_p[t, token].exp().item(),
            ratio=ratios[t, token].item(),
            rank=1 + int((log_p[t] > log_p[t, token]).sum()),
            nearest=list(zip(near.indices[t].tolist(), near.values[t].tolist(), strict=True)),
            radius=None if radii is None else radii[token],
            scaled=None if radii is None else scaled[t, token].item(),
        )
        for t, token in enumerate(new_ids)
    ]


def distance_table(
    tokens: Sequence[TokenDistances], tokenizer: PreTrainedTokenizerBase, exponent: float, columns: int | None = None
) -> str:
    """A line per token. With `columns`, only as many of the nearest centres as fit into that width."""
    # Enough decimals to distinguish centres whose probabilities differ by a few percent.
    decimals = max(3, 1 + math.ceil(math.log10(exponent)))
    probabilities = [f"{p:.4f}" if p >= 1e-3 else f"{p:.1e}" for p in (token.probability for token in tokens)]
    radii = [token for token in tokens if token.radius is not None]
    parts = [
        aligned(["", *map(str, range(1, len(tokens) + 1))]),
        aligned(["token", *(visible(tokenizer, token.token) for token in tokens)], left=True),
        aligned(["p", *probabilities]),
        aligned(["d/d_min", *(f"{token.ratio:.{decimals}f}" for token in tokens)]),
        *([aligned(["ρ/ρ_max", *(f"{token.radius:.{decimals}f}" for token in radii)])] if radii else []),
        *([aligned(["d/ρ", *(f"{token.scaled:.{decimals}f}" for token in radii)])] if radii else []),
        aligned(["rank", *(str(token.rank) for token in tokens)]),
    ]
    head, *lines = ("  ".join(cells) for cells in zip(*parts, strict=True))
    for centres in zip(*(token.nearest for token in tokens), strict=True):  # all nearest, then all second nearest, ...
        names = aligned([visible(tokenizer, token) for token, _ in centres], left=True)
        ratios = aligned([f"{ratio:.{decimals}f}" for _, ratio in centres])
        longer = [f"{line}  {name} {ratio}" for line, name, ratio in zip(lines, names, ratios, strict=True)]
        if columns is not None and width(longer[0]) > columns:
            break
        lines = longer
    return "\n".join([f"{head}  {'smallest d/ρ' if radii else 'nearest centres and their d/d_min'}", *lines])


def aligned(cells: list[str], left: bool = False) -> list[str]:
    """The cells of a column, padded to equal width."""
    widest = max(map(width, cells))
    padding = [" " * (widest - width(cell)) for cell in cells]
    return [cell + pad if left else pad + cell for cell, pad in zip(cells, padding, strict=True)]


def visible(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token on one line: spaces as ␣, runs of a character counted, control characters and broken UTF-8 escaped."""
    text = token_text(tokenizer, token)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    text = re.sub(r"(.)\1{4,}", lambda run: f"{run[1]}×{len(run[0])}", text).replace(" ", "␣")
    if width(text) <= TOKEN_WIDTH:
        return text
    while width(text) >= TOKEN_WIDTH:
        text = text[:-1]
    return text + "…"


def width(text: str) -> int:
    """The number of terminal columns of `text`."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
