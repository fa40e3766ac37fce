"""The map of all centres, and the cards of tokens: neighbours, contexts, occurrences and relations."""

from typing import Any

import numpy as np
from markupsafe import Markup

from hgpt.interpret.measure import Analysis, Block, ModelResult, page_data, paragraph
from hgpt.interpret.measures.centres import nearest_centres, nearest_contexts
from hgpt.interpret.measures.centres import result_of as chosen_tokens
from hgpt.interpret.packing import pack_integers, pack_numbers
from hgpt.interpret.subject import Read, Subject

TITLE = "Map of all centres"
MOST = 10_000  # tokens whose neighbours and contexts the page holds, for its size
NEIGHBOURS, CONTEXTS = 10, 5
TEXT_TOKENS = 65_536  # of the text in which the page shows a token's occurrences
BEFORE = 16  # tokens up to a sampled position
PINS = 5


def result_of(model: ModelResult) -> dict[str, Any] | None:
    """{"vocabulary": ..., "model": ...}, packed for the page."""
    return model.found.get("explorer")


def compute(subject: Subject) -> dict[str, Any]:
    model, read = subject.model, subject.read
    counts, counted = subject.training_counts, "training data"
    if counts is None and read is not None:
        counts, counted = np.bincount(read.measures.positions.target, minlength=model.vocab_size), "text"
    tokens = np.arange(model.vocab_size) if counts is None else np.argsort(-counts, kind="stable")
    tokens = tokens[:MOST]
    near, distances = nearest_centres(model, tokens, NEIGHBOURS)
    rows, principal = subject.centres.rows, subject.centres.principal
    points = (rows - subject.centres.covariance.mean) @ principal.axes[:, :3]  # (V, 3)
    a = model.log_weight
    found: dict[str, Any] = {
        "harmonic": model.harmonic,
        "points": [pack_numbers(column) for column in points.T],
        "shares": (principal.variances[:3] / principal.variances.sum()).tolist(),
        "length": pack_numbers(np.linalg.norm(rows, axis=1)),
        # ρ_i = exp(a_i / n); the a_i of a softmax head are biases
        "radius": pack_numbers(np.exp(a.cpu().numpy() / model.exponent)) if a is not None and model.exponent else None,
        "tokens": pack_integers(tokens),
        "neighbours": _nearest(near, distances),
        "contexts": None,
        "text": None,
    }
    if read is not None:
        text, places = _text(read)
        contexts, values = nearest_contexts(model, read.measures.sample[-1], tokens, CONTEXTS)
        found |= {"text": text, "contexts": _nearest(places[contexts], values)}
    vocabulary = {
        "texts": [model.token_text(token) or f"<{token}>" for token in range(model.vocab_size)],
        "counts": None if counts is None else pack_integers(counts),
        "counted": counted,
        "relations": _relations(subject),
    }
    return {"vocabulary": vocabulary, "model": found}


def _nearest(items: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Items and values, (tokens, k) each."""
    return {"k": items.shape[1], "items": pack_integers(items), "values": pack_numbers(values)}


def _text(read: Read) -> tuple[dict[str, Any], np.ndarray]:
    """The page's text as token ids and losses, and the index in it of each sampled position, (S,).

    The first TEXT_TOKENS targets, and BEFORE targets up to each sampled one. Each piece of consecutive targets begins
    with a token that was not predicted, whose loss is nan.
    """
    positions, sample_at = read.measures.positions, read.measures.sample_at
    inputs = np.concatenate([inputs for inputs, _ in read.passages.windows])
    kept = np.arange(len(inputs)) < TEXT_TOKENS
    kept[np.maximum(sample_at[:, None] - np.arange(BEFORE), 0)] = True
    at = np.flatnonzero(kept)
    begins = np.diff(at, prepend=-2) > 1
    begins |= np.diff(positions.window[at], prepend=-1) != 0
    first = np.flatnonzero(begins)
    ids = np.insert(positions.target[at], first, inputs[at[first]])
    losses = np.insert(positions.loss[at], first, np.nan)
    places = np.cumsum(begins) + np.arange(len(at))
    text = {"ids": pack_integers(ids), "losses": pack_numbers(losses)}
    return text, places[np.searchsorted(at, sample_at)]


def _relations(subject: Subject) -> list[dict[str, Any]]:
    """Each relation's pairs of one-token words, without or with a space before them."""
    forms = [subject.pairs("single_after_space"), subject.pairs("single")]
    return [
        {
            "name": relation.name,
            "words": [words for pairs in forms for words in pairs[relation.name].words],
            "ids": [ids for pairs in forms for ids in pairs[relation.name].ids.tolist()],
        }
        for relation in subject.relations
    ]


def data_of(analysis: Analysis) -> dict[str, Any]:
    """Models with equal vocabularies share one; a model's `vocabulary` is its index."""
    vocabularies: list[dict[str, Any]] = []
    models = []
    for result in filter(None, map(result_of, analysis.models)):
        if result["vocabulary"] not in vocabularies:
            vocabularies.append(result["vocabulary"])
        models.append(result["model"] | {"vocabulary": vocabularies.index(result["vocabulary"])})
    pins = [word["token"] for word in chosen_tokens(analysis.models[0])][:PINS]
    return {"models": models, "vocabularies": vocabularies, "pins": pins}


CONTROLS = """
<div class="controls">
<div class="search"><label>search <input id="search" type="search" autocomplete="off" placeholder="a token"
  role="combobox" aria-controls="matches" aria-expanded="false" aria-autocomplete="list"></label>
<ul id="matches" role="listbox"></ul></div>
<label>map and cards of <select class="pick" data-side="a"></select></label>
<label>beside it <select class="pick" data-side="b"></select></label>
<label>components <select id="components"><option>2</option><option>3</option></select></label>
<label>colour <select id="colour"></select></label>
<label>scale <select id="map-scale"></select></label>
<label>show <select id="part"></select></label>
</div>
<div class="explore">
<div>
<div class="stage"><canvas id="map" tabindex="0" role="img" aria-label="Map of all centres. Arrow keys move it, plus and
 minus zoom. The search reaches every token."></canvas><div id="hover" role="status" hidden></div>
<div class="zoom"><button type="button" data-zoom="1.5" aria-label="zoom in">+</button><button type="button"
  data-zoom="0.667" aria-label="zoom out">−</button>
<button type="button" data-zoom="" aria-label="show all">⤢</button></div>
</div>
<p class="legend quiet" id="map-legend"></p>
<p class="quiet" id="share"></p>
<p class="quiet screen">Drag to move the map; with three components, drag to turn it (Shift: move).
Zoom with the buttons, + and −, two fingers, or the wheel after a click on the map. Click a point for its card. A pinned
card stays below the map, and its point is labelled.</p>
<p class="quiet print">To search and to see cards, open the page in a browser.</p>
</div>
<div id="card" aria-live="polite"></div>
</div>
<div id="pins"></div>
"""


def section(analysis: Analysis) -> list[Block]:
    data = data_of(analysis)
    introduction = (
        "The centre of every token, projected on the first principal components of all centres. Points that are close "
        "on the map may be far apart in the whole space: a token's card lists its true neighbours, by the harmonic "
        "head's own distance (softmax: 1 − cosine)."
    )
    if any(len(vocabulary["texts"]) > MOST for vocabulary in data["vocabularies"]):
        introduction += f" Neighbours and contexts are those of the {MOST:,} most frequent tokens."
    return [paragraph(introduction), Markup(CONTROLS), page_data("explorer-data", data)]
