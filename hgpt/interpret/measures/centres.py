"""Chosen tokens: the centres and the contexts' hidden states that are nearest to the token's centre."""

from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

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


@torch.inference_mode()
def nearest_centres(loaded: LoadedModel, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` other centres nearest to the centre of each of `tokens`: their tokens and distances, (T, k) each.

    By a harmonic head's own distance; by 1 − cosine for a softmax head, whose row lengths depend on token frequency.
    """
    found = []
    for part in torch.from_numpy(tokens).to(loaded.device).split(CHUNK):
        distances = loaded.distances_from_centres(part).scatter(1, part[:, None], float("inf"))
        found.append(distances.topk(min(k, loaded.vocab_size - 1), largest=False))
    values, others = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return others, values


@torch.inference_mode()
def nearest_contexts(
    loaded: LoadedModel, states: np.ndarray, tokens: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` hidden states (S, D) nearest to the centre of each of `tokens`: indices, d / d_min, (T, k) each.

    For a softmax head the `k` states with the largest logit of the token: indices and the token's probability.
    """
    chosen = torch.from_numpy(tokens).to(loaded.device)
    best: tuple[Tensor, ...] = ()  # scores, values and indices of the best states so far, (k, T) each
    for start in range(0, len(states), CHUNK):
        x = torch.from_numpy(states[start : start + CHUNK]).to(loaded.device)
        logits = loaded.logits(x)
        if loaded.exponent is None:
            scores, values = -logits[:, chosen], logits.log_softmax(-1)[:, chosen].exp()
        else:
            log_d = loaded.log_distances(x, logits)
            scores = log_d[:, chosen]  # by d, not by d / d_min: the nearest of all states
            values = torch.exp(scores - log_d.amin(-1, keepdim=True))
        index = torch.arange(start, start + len(x), device=loaded.device)[:, None].expand_as(scores)
        parts: tuple[Tensor, ...] = (scores, values, index)
        if best:
            parts = tuple(torch.cat(pair) for pair in zip(best, parts, strict=True))
        order = parts[0].argsort(dim=0, stable=True)[:k]
        best = tuple(part.gather(0, order) for part in parts)
    return best[2].T.cpu().numpy(), best[1].T.cpu().numpy()


def compute(subject: Subject) -> list[dict[str, Any]]:
    model, read = subject.model, subject.read
    chosen = np.array(_chosen_tokens(subject), dtype=np.int64)
    if not len(chosen):
        return []
    found: list[dict[str, Any]] = [
        {
            "token": model.token_text(int(token)),
            "neighbours": [(model.token_text(int(other)), float(d)) for other, d in zip(*near, strict=True)],
            "contexts": [],
        }
        for token, *near in zip(chosen, *nearest_centres(model, chosen, NEIGHBOURS), strict=True)
    ]
    if read is not None:
        nearest = nearest_contexts(model, read.measures.sample[-1], chosen, CONTEXTS)
        for word, indices, values in zip(found, *nearest, strict=True):
            at = read.measures.sample_at[indices].tolist()
            pairs = zip(at, values.tolist(), strict=True)
            word["contexts"] = [_context_at(model, read, *pair) for pair in pairs]
    return found


def _chosen_tokens(subject: Subject) -> list[int]:
    """The last token of each of --words; by default the text's most frequent words of 4 letters and more."""
    model, words = subject.model, subject.settings.words
    if words:
        tokens = [(word, model.encode(word)) for word in words]
        if empty := [word for word, ids in tokens if not ids]:
            raise UserError(f"--words {empty[0]!r} has no token: leave it out")
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
    introduction = f"Tokens: {chosen}. Of each token: the centres nearest to its own"
    if analysis.data is not None:
        introduction += (
            f"; and, of {states_text(models)} sampled positions, those whose hidden state is nearest to its centre "
            "(softmax head: whose logit of the token is largest)"
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
