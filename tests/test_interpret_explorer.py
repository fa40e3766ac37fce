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


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=1000).astype(np.float32) * 1e4,
        np.array([np.nan, -1.5, 3.0, np.nan, 2.0]),
        np.array([7.0, 7.0]),
        np.array([np.nan]),
        np.array([]),
    ],
)
def test_numbers_are_packed_to_the_nearest_step(values):
    packed = pack_numbers(values)
    step = (packed["high"] - packed["low"]) / 65534
    np.testing.assert_allclose(unpack(packed), values, rtol=0, atol=0.5001 * step)


@pytest.mark.parametrize("most, bits", [(65_535, 16), (65_536, 32)])
def test_integers_take_32_bits_only_if_one_needs_them(most, bits):
    packed = pack_integers(values := np.array([0, 3, most]))
    assert packed["bits"] == bits and unpack(packed).tolist() == values.tolist()
    assert unpack(pack_integers(values[:0])).tolist() == []


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


@pytest.fixture(scope="module", params=["radii", "softmax"])
def found(request, tmp_path_factory):
    """A model's weights, the data of the page, and the introduction; 50 tokens have neighbours."""
    root = tmp_path_factory.mktemp("explorer")
    settings = {"radius": "learned", "final_norm": "none"} if request.param == "radii" else {}
    folder = export(root / "model", byte_pairs(VOCAB), request.param.replace("radii", "harmonic"), **settings)
    relations = relation_set(root / "relations", [("with", "the"), ("zebra", "the"), ("on", "with")])
    data = str(prepare(root / "data", byte_pairs(VOCAB)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "MOST", 50)
        analysis = analyse([str(folder)], AnalysisSettings(data=data, relations=relations, bootstrap=100))
        introduction = explorer.section(analysis)[0].items[0]
    (source,) = find_sources([str(folder)])
    with loaded(source, torch.device("cpu")) as model:
        head = {name: value.double().numpy() for name, value in model.model.lm_head.state_dict().items()}
        yield head, explorer.page_data(analysis), introduction, model


def test_the_data_of_the_page(found):
    head, data, introduction, model = found
    (about,), (vocabulary,) = data["models"], data["vocabularies"]
    assert "Neighbours and contexts are those of the 50 most frequent tokens" in introduction
    w = head["weight"][:VOCAB]
    u, sizes, _ = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
    for axis, packed in enumerate(about["points"]):
        point = unpack(packed)
        np.testing.assert_allclose(np.abs(point), np.abs(u[:, axis] * sizes[axis]), atol=2e-3 * np.ptp(point))
    assert about["shares"] == pytest.approx(sizes[:3] ** 2 / np.sum(sizes**2), rel=1e-3)
    np.testing.assert_allclose(unpack(about["length"]), np.linalg.norm(w, axis=1), atol=1e-4)
    if model.harmonic:
        np.testing.assert_allclose(
            unpack(about["radius"]), np.exp(head["log_weight"][:VOCAB] / model.exponent), rtol=1e-2
        )
    else:
        assert about["radius"] is None

    ids = np.array(byte_pairs(VOCAB).encode(TEXT).ids)
    counts = np.bincount(ids, minlength=VOCAB)
    assert unpack(vocabulary["counts"]).tolist() == counts.tolist() and vocabulary["counted"] == "training data"
    tokens = unpack(about["tokens"])
    assert len(tokens) == 50 and counts[tokens].tolist() == sorted(counts, reverse=True)[:50]
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    distances = np.linalg.norm(w[tokens, None] - w, axis=-1) if model.harmonic else 1 - unit[tokens] @ unit.T
    distances[np.arange(50), tokens] = np.inf
    near = unpack(about["neighbours"]["items"]).reshape(50, -1)
    assert near.tolist() == distances.argsort(axis=1)[:, : explorer.NEIGHBOURS].tolist()
    np.testing.assert_allclose(
        unpack(about["neighbours"]["values"]).reshape(50, -1), np.sort(distances)[:, : explorer.NEIGHBOURS], atol=1e-3
    )
    places = unpack(about["contexts"]["items"])
    assert not np.isnan(unpack(about["text"]["losses"])[places]).any() and len(places) == 50 * explorer.CONTEXTS

    assert vocabulary["texts"] == [model.token_text(token) for token in range(VOCAB)]
    (relation,) = vocabulary["relations"]
    pairs = [[vocabulary["texts"][token].strip() for token in pair] for pair in relation["ids"]]
    assert pairs == [["with", "the"], ["with", "the"], ["on", "with"]]  # with a space before each, and without
    assert pairs == [list(words) for words in relation["words"]]
