"""The data of the map: packed numbers, positions, neighbours, contexts, text and relations, against float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import TEXT, byte_pairs, export, prepare, relation_set, unpack

from hgpt.interpret.measures import explorer
from hgpt.interpret.models import find_sources, loaded
from hgpt.interpret.packing import pack_integers, pack_numbers
from hgpt.interpret.report import analyse
from hgpt.interpret.subject import AnalysisSettings

VOCAB = 300


def test_packed_numbers():
    """Floats are rounded to the nearest step; integers take 32 bits only if one needs them."""
    for values in (
        [*np.random.default_rng(0).normal(size=1000) * 1e4],
        [np.nan, -1.5, 3.0, 2.0],
        [7.0, 7.0],
        [np.nan],
        [],
    ):
        packed = pack_numbers(np.array(values))
        step = (packed["high"] - packed["low"]) / 65534
        np.testing.assert_allclose(unpack(packed), values, rtol=0, atol=0.5001 * step)
    for values, bits in (([0, 3, 65_535], 16), ([0, 3, 65_536], 32), ([], 16)):
        packed = pack_integers(np.array(values))
        assert packed["bits"] == bits and unpack(packed).tolist() == values


def test_the_text_consists_of_pieces(monkeypatch):
    """Three windows of 30 targets, of which the first 40 and those before two samples are kept."""
    monkeypatch.setattr(explorer, "TEXT_TOKENS", 40)
    tokens = np.arange(1000, 1091)
    windows = [(tokens[start : start + 30], tokens[start + 1 : start + 31]) for start in (0, 30, 60)]
    positions = SimpleNamespace(target=tokens[1:], loss=np.arange(1, 91) / 10, window=np.repeat([0, 1, 2], 30))
    measures = SimpleNamespace(positions=positions, sample_at=np.array([5, 58, 88]))
    text, places = explorer._text(SimpleNamespace(measures=measures, passages=SimpleNamespace(windows=windows)))
    ids, losses = unpack(text["ids"]), unpack(text["losses"])
    assert ids[places].tolist() == [1006, 1059, 1089]
    # Pieces begin with the input before the targets 0, 30 (a window), 43 = 58 - 15 and 73 = 88 - 15.
    assert ids[np.isnan(losses)].tolist() == [1000, 1030, 1043, 1073]
    assert ids[~np.isnan(losses)].tolist() == [*range(1001, 1041), *range(1044, 1060), *range(1074, 1090)]
    np.testing.assert_allclose(losses[~np.isnan(losses)], (ids[~np.isnan(losses)] - 1000) / 10, atol=1e-3)


@pytest.mark.parametrize("kind", ["radii", "softmax"])
def test_the_data_of_the_page(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "MOST", 50)
    monkeypatch.setattr("hgpt.interpret.measures.centres.CHUNK", 7)
    settings = {"radius": "learned", "final_norm": "none"} if kind == "radii" else {}
    folder = export(tmp_path / "model", byte_pairs(VOCAB), kind.replace("radii", "harmonic"), **settings)
    relations = relation_set(tmp_path / "relations", [("with", "the"), ("zebra", "the"), ("on", "with")])
    data = str(prepare(tmp_path / "data", byte_pairs(VOCAB)))
    analysis = analyse([str(folder)], AnalysisSettings(data=data, relations=relations, bootstrap=100))
    assert "Neighbours and contexts are those of the 50 most frequent tokens" in explorer.section(analysis)[0]
    data = explorer.data_of(analysis)
    (about,), (vocabulary,) = data["models"], data["vocabularies"]
    with loaded(find_sources([str(folder)])[0], torch.device("cpu")) as model:
        head = {name: value.double().numpy() for name, value in model.model.lm_head.state_dict().items()}
    w = head["weight"][:VOCAB]
    u, sizes, _ = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
    for axis, packed in enumerate(about["points"]):
        point = unpack(packed)
        np.testing.assert_allclose(np.abs(point), np.abs(u[:, axis] * sizes[axis]), atol=2e-3 * np.ptp(point))
    assert about["shares"] == pytest.approx(sizes[:3] ** 2 / np.sum(sizes**2), rel=1e-3)
    np.testing.assert_allclose(unpack(about["length"]), np.linalg.norm(w, axis=1), atol=1e-4)
    if kind == "radii":
        radii = np.exp(head["log_weight"][:VOCAB] / model.exponent)
        np.testing.assert_allclose(unpack(about["radius"]), radii, rtol=1e-2)
    else:
        assert about["radius"] is None

    ids = np.array(byte_pairs(VOCAB).encode(TEXT).ids)
    counts = np.bincount(ids, minlength=VOCAB)
    assert unpack(vocabulary["counts"]).tolist() == counts.tolist() and vocabulary["counted"] == "training data"
    tokens = unpack(about["tokens"])
    assert len(tokens) == 50 and counts[tokens].tolist() == sorted(counts, reverse=True)[:50]
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    distances = np.linalg.norm(w[tokens, None] - w, axis=-1) if kind == "radii" else 1 - unit[tokens] @ unit.T
    distances[np.arange(50), tokens] = np.inf
    near, values = (unpack(about["neighbours"][name]).reshape(50, explorer.NEIGHBOURS) for name in ("items", "values"))
    assert near.tolist() == distances.argsort(axis=1)[:, : explorer.NEIGHBOURS].tolist()
    np.testing.assert_allclose(values, np.sort(distances)[:, : explorer.NEIGHBOURS], atol=1e-3)
    places = unpack(about["contexts"]["items"])
    assert not np.isnan(unpack(about["text"]["losses"])[places]).any() and len(places) == 50 * explorer.CONTEXTS

    assert vocabulary["texts"] == [model.token_text(token) for token in range(VOCAB)]
    (relation,) = vocabulary["relations"]
    pairs = [[vocabulary["texts"][token].strip() for token in pair] for pair in relation["ids"]]
    assert pairs == [["with", "the"], ["with", "the"], ["on", "with"]]  # with a space before each, and without
    assert pairs == [list(words) for words in relation["words"]]
