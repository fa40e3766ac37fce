"""Chosen tokens: the centres nearest to the token's centre, and the contexts whose hidden states are nearest to it."""

from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from hgpt.errors import UserError
from hgpt.interpret.measure import Analysis, Block, Details, ModelResult, Table, bold, paragraph, states_text
from hgpt.interpret.models import LoadedModel
from hgpt.interpret.positions import CHUNK
from hgpt.interpret.subject import Read, Subject

TITLE = "Centres and their neighbours"
NEIGHBOURS, CONTEXTS = 10, 5
WORDS = 12
CONTEXT_TOKENS = 12


def result_of(model: ModelResult) -> list[dict[str, Any]]:
    """[{"token", "neighbours": [(token, distance)], "contexts": [{"before", "next", "value"}]}]"""
    return model.found.get("centres") or []


def neighbours(loaded: LoadedModel, token: int, k: int) -> list[tuple[str, float]]:
    """The `k` centres nearest to the centre of `token`, without itself, and their distances.

    By the metric of a harmonic head. By 1 − cosine for a softmax head, whose rows vary in length with the frequency of
    the token.
    """
    values, tokens = loaded.distances_from_centre(token).topk(min(k + 1, loaded.vocab_size), largest=False)
    found = zip(tokens.tolist(), values.tolist(), strict=True)
    return [(loaded.token_text(other), distance) for other, distance in found if other != token][:k]


@torch.inference_mode()
def nearest_contexts(loaded: LoadedModel, states: np.ndarray, token: int, k: int) -> list[tuple[int, float]]:
    """The `k` of the hidden states (S, D) that are nearest to the centre of `token`: index and d / d_min.

    For a softmax head the `k` states with the largest logit of the token: index and probability.
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
    for token in _chosen_tokens(subject):
        contexts = []
        if read is not None:
            at, states = read.measures.sample_at, read.measures.sample[-1]
            nearest = nearest_contexts(model, states, token, CONTEXTS)
            contexts = [_context_at(model, read, int(at[index]), value) for index, value in nearest]
        near = neighbours(model, token, NEIGHBOURS)
        found.append({"token": model.token_text(token), "neighbours": near, "contexts": contexts})
    return found


def _chosen_tokens(subject: Subject) -> list[int]:
    """The last token of each of --words, by default the text's most frequent tokens that are words of 4 letters."""
    model, words = subject.model, subject.settings.words
    if words:
        tokens = [(word, model.encode(word)) for word in words]
        if empty := [word for word, ids in tokens if not ids]:
            raise UserError(f"--words {empty[0]!r} has no token; leave it out")
        subject.notes += [
            f"--words {word} is {len(ids)} tokens in the vocabulary of {model.vocab_size:,}: "
            f"{' · '.join(map(model.token_text, ids))}. The last one is shown."
            for word, ids in tokens
            if len(ids) > 1
        ]
        return list(dict.fromkeys(ids[-1] for _, ids in tokens))
    if subject.read is None:
        return []
    targets = subject.read.measures.positions.target
    frequent = np.argsort(-np.bincount(targets, minlength=model.vocab_size), kind="stable")[:2000].tolist()
    names = ((token, model.token_text(token).strip()) for token in frequent)
    return [token for token, text in names if len(text) >= 4 and text.isalpha()][:WORDS]


def _context_at(model: LoadedModel, read: Read, at: int, value: float) -> dict[str, Any]:
    """The text before a position, the next token, and `value`."""
    starts = np.cumsum([0, *(len(inputs) for inputs, _ in read.passages.windows)])
    window = int(np.searchsorted(starts, at, side="right") - 1)
    inputs, targets = read.passages.windows[window]
    inside = at - int(starts[window])
    before = inputs[max(0, inside - CONTEXT_TOKENS + 1) : inside + 1]
    return {
        "before": model.tokenizer.decode(before.tolist()),
        "next": model.token_text(int(targets[inside])),
        "value": value,
    }


def section(analysis: Analysis) -> list[Block]:
    models = [model for model in analysis.models if result_of(model)]
    if not models:
        return []
    chosen = "the last token of each of --words" if analysis.settings.words else "frequent words of the text"
    introduction = f"Tokens: {chosen}. Each token is shown with the centres nearest to its own"
    if analysis.data is not None:
        introduction += (
            f", and with the contexts, among {states_text(models)} sampled positions, whose hidden states are nearest "
            "to its centre (softmax head: with the largest logit)"
        )
    blocks: list[Block] = [paragraph(f"{introduction}.")]
    for model in models:
        blocks.append(paragraph(bold(model.label)))
        blocks += [_details(model, word, first=number == 0) for number, word in enumerate(result_of(model))]
    return blocks


def _details(model: ModelResult, word: dict[str, Any], first: bool) -> Details:
    unit = "d" if model.harmonic else "1 − cosine"
    near = Markup(", ").join(visible(token) + f" {distance:.2f}" for token, distance in word["neighbours"])
    blocks: list[Block] = [paragraph(Markup(f"Nearest centres ({unit}): ") + near)]
    if word["contexts"]:
        contexts = "contexts nearest to the centre" if model.harmonic else "contexts with the largest logit"
        head = [contexts, "next token", "d / d_min" if model.harmonic else "p"]
        rows = [(visible(f"…{c['before']}"), [visible(c["next"]), c["value"]]) for c in word["contexts"]]
        blocks.append(Table(head=head, rows=rows))
    return Details(title=visible(word["token"]), blocks=blocks, open=first)


def visible(token: str) -> Markup:
    """A token as code, with visible spaces and line breaks."""
    return Markup("<code>{}</code>").format(token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))


def rows(model: ModelResult) -> dict[str, Any]:
    return {"centres": result_of(model)}
