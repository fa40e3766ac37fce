"""Centres to read: which centres are near one, and which contexts of the text."""

from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from hgpt.errors import UserError
from hgpt.interpret.blocks import Block, Details, Html, Table, bold, paragraph
from hgpt.interpret.measure import Analysis, ModelResult, counts_text, states_sampled
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import CHUNK
from hgpt.interpret.subject import Read, Subject

TITLE = "Centres to read"
NEIGHBOURS, CONTEXTS = 10, 5
WORDS = 12
CONTEXT_TOKENS = 12


def of(model: ModelResult) -> list[dict[str, Any]]:
    """[{"token", "neighbours": [(token, distance)], "contexts": [{"before", "next", "value"}]}]"""
    return model.found.get("centres") or []


def neighbours(loaded: LoadedModel, token: int, k: int) -> list[tuple[str, float]]:
    """The `k` centres nearest to the centre of `token`, itself left out, with their distances.

    By the metric of a harmonic head; by 1 − cosine for a softmax head, in which the length of a row depends on the
    token's frequency.
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
        x = torch.from_numpy(states[start : start + CHUNK]).to(loaded.device)
        logits = loaded.logits(x)
        if loaded.exponent is None:
            scores.append(-logits[:, token])
            shown.append(logits.log_softmax(-1)[:, token].exp())
        else:
            log_d = loaded.log_distances(x, logits)
            scores.append(log_d[:, token])  # the scale counts, so the nearest of all states
            shown.append(torch.exp(log_d[:, token] - log_d.amin(-1)))
    values = torch.cat(shown)
    order = torch.cat(scores).argsort()[:k]
    return [(int(index), float(values[index])) for index in order]


def compute(subject: Subject) -> list[dict[str, Any]]:
    model, read, found = subject.model, subject.read, []
    for token in _words_to_read(subject):
        contexts = []
        if read is not None:
            at, states = read.measures.sample_at, read.measures.sample[-1]
            nearest = nearest_contexts(model, states, token, CONTEXTS)
            contexts = [_context_at(model, read, int(at[index]), value) for index, value in nearest]
        near = neighbours(model, token, NEIGHBOURS)
        found.append({"token": model.token_text(token), "neighbours": near, "contexts": contexts})
    return found


def _words_to_read(subject: Subject) -> list[int]:
    """The user's words (the last token of each), or the text's commonest tokens that are words of four letters."""
    model, words = subject.model, subject.settings.words
    if words:
        tokens = [(word, model.encode(word)) for word in words]
        if empty := [word for word, ids in tokens if not ids]:
            raise UserError(f"--words {empty[0]!r} has no token; leave it out")
        return list(dict.fromkeys(ids[-1] for _, ids in tokens))
    if subject.read is None:
        return []
    targets = subject.read.measures.positions.target
    commonest = np.argsort(-np.bincount(targets, minlength=model.vocab_size), kind="stable")
    names = ((int(token), model.token_text(int(token)).strip()) for token in commonest[:2000])
    return [token for token, text in names if len(text) >= 4 and text.isalpha()][:WORDS]


def _context_at(model: LoadedModel, read: Read, at: int, value: float) -> dict[str, Any]:
    """The text before a position of the whole text, and the token that came there."""
    starts = np.cumsum([0, *(len(inputs) for inputs, _ in read.windows)])
    window = int(np.searchsorted(starts, at, side="right") - 1)
    inputs, targets = read.windows[window]
    inside = at - int(starts[window])
    before = inputs[max(0, inside - CONTEXT_TOKENS + 1) : inside + 1]
    return {
        "before": model.tokenizer.decode(before.tolist()),
        "next": model.token_text(int(targets[inside])),
        "value": value,
    }


NEAR = """<p>Nearest centres ({{ unit }}):
{% for token, distance in near %}{{ token }} {{ "%.2f"|format(distance) }}
{%- if not loop.last %}, {% endif %}{% endfor %}</p>"""


def section(analysis: Analysis) -> list[Block]:
    models = [model for model in analysis.models if of(model)]
    if not models:
        return []
    chosen = (
        "The words that were asked for with --words, of each its last token"
        if analysis.settings.words
        else "The text's most frequent tokens that are words"
    )
    sampled = states_sampled(analysis.models)
    states = (
        f", and of a sample of {counts_text(sampled)} positions of the validation text the contexts whose hidden "
        "states are nearest to the centre (of a softmax head: that give the token the largest logit)"
    )
    blocks: list[Block] = [paragraph(f"{chosen}: the neighbours of their centres{states if sampled else ''}.")]
    for model in models:
        blocks.append(paragraph(bold(model.label)))
        blocks += [_details(model, word, first=number == 0) for number, word in enumerate(of(model))]
    return blocks


def _details(model: ModelResult, word: dict[str, Any], first: bool) -> Details:
    unit = "d" if model.harmonic else "1 − cosine"
    near = [(visible(token), distance) for token, distance in word["neighbours"]]
    blocks: list[Block] = [Html(template=NEAR, values={"unit": unit, "near": near})]
    if word["contexts"]:
        contexts = "contexts nearest to the centre" if model.harmonic else "contexts with the largest logit"
        head = [contexts, "what came", "d / d_min" if model.harmonic else "p"]
        rows = [(visible(f"…{c['before']}"), [visible(c["next"]), c["value"]]) for c in word["contexts"]]
        blocks.append(Table(head=head, rows=rows))
    return Details(title=visible(word["token"]), blocks=blocks, open=first)


def visible(token: str) -> Markup:
    """A token as code, with spaces and line breaks that can be seen."""
    return Markup("<code>{}</code>").format(token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))


def rows(model: ModelResult) -> dict[str, Any]:
    return {"centres": of(model)}
