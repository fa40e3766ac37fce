"""Text browser and centres: p, rank and d / d_min of a position, and contexts, by direct computation."""

import numpy as np
import pytest
import torch
from small_models import TEXT, byte_pairs, export

from hgpt.interpret.measures.centres import nearest_contexts
from hgpt.interpret.measures.reading import read_text
from hgpt.interpret.models import find_sources, loaded

VOCAB, K = 300, 4


@pytest.fixture(scope="module", params=["harmonic", "radii", "softmax", "gpt2"])
def model(request, tmp_path_factory):
    folder, head = tmp_path_factory.mktemp("centres") / request.param, request.param.replace("radii", "harmonic")
    settings = {"radius": "learned", "final_norm": "none"} if request.param == "radii" else {}
    export(folder, byte_pairs(VOCAB), head, **settings)
    with loaded(find_sources([str(folder)])[0], torch.device("cpu")) as model:
        yield model


def exact(model, states):
    """log p and, for a harmonic head, d of every token, (S, V), float64, from the weights."""
    w = model.model.lm_head.weight[:VOCAB].detach().double()
    x = torch.as_tensor(states).double()
    if not model.harmonic:
        return (x @ w.T).log_softmax(-1), None
    d = torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist")
    a = model.model.lm_head.log_weight
    assert ("radii" in model.description) == (a is not None)
    return (-model.exponent * d.log() + (0 if a is None else a[:VOCAB].detach())).log_softmax(-1), d


def test_a_text_as_the_centres_see_it(model):
    tokens = np.array(model.encode(TEXT)[:21])
    inputs, targets = tokens[:-1], tokens[1:]
    with torch.no_grad():
        x = model.model.transformer(torch.from_numpy(inputs)[None]).last_hidden_state[0]
    log_p, d = exact(model, x)
    found = read_text(model, inputs, targets, K)
    for row, target, position, reading in zip(log_p, targets, range(20), found, strict=True):
        best = row.argsort(descending=True)[:K].tolist()
        assert (reading.token, reading.p) == (
            model.tokenizer.decode([target]),
            pytest.approx(float(row[target].exp()), rel=1e-3),
        )
        assert reading.rank == 1 + sum(value > row[target] + 1e-5 for value in row.tolist())
        names, p, ratios = zip(*reading.nearest, strict=True)
        assert list(names) == [model.token_text(token) for token in best]
        assert list(p) == pytest.approx(row[best].exp().tolist(), rel=1e-3)
        if d is None:
            assert {reading.ratio, *ratios} == {None}
        else:
            expected = (d[position] / d[position].min())[[target, *best]].tolist()
            assert [reading.ratio, *ratios] == pytest.approx(expected, rel=1e-4)
            assert d[position].argsort()[:K].tolist() == best or model.log_weight is not None
    assert len({reading.rank for reading in found}) > 5  # targets are not the best at every position


def test_contexts_that_are_nearest_to_a_centre(model, monkeypatch):
    monkeypatch.setattr("hgpt.interpret.measures.centres.CHUNK", 7)
    states = np.random.default_rng(0).normal(size=(30, 32)) * np.linspace(0.2, 3, 30)[:, None]
    states = states.astype(np.float32)
    log_p, d = exact(model, states)
    tokens = np.array([5, 290])
    for token, indices, values in zip(tokens, *nearest_contexts(model, states, tokens, 6), strict=True):
        if d is None:  # by the logit and not by the probability, which is what is shown
            logits = states.astype(np.float64) @ model.centre_rows()[token].astype(np.float64)
            assert indices.tolist() == np.argsort(-logits)[:6].tolist()
            assert values.tolist() == pytest.approx(log_p[indices, token].exp().tolist(), rel=1e-3)
        else:
            assert indices.tolist() == d[:, token].argsort()[:6].tolist()
            assert values.tolist() == pytest.approx((d[:, token] / d.amin(1))[indices].tolist(), rel=1e-4)
