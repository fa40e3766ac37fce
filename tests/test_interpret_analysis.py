"""`analyse`: from weights and text to numbers, recomputed here from the files alone."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TEXT, bare, byte_pairs, encode, export, prepare, relation_set, run_of, word_pieces

from hgpt.interpret import positions, subject
from hgpt.interpret.measures import analogies, parallelograms, predictions
from hgpt.interpret.measures.parallelograms import BAEK2025, SHUFFLES, VARIANTS
from hgpt.interpret.report import analyse
from hgpt.interpret.subject import CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, AnalysisSettings

FEW = AnalysisSettings(bootstrap=100)


@pytest.fixture(autouse=True)
def _one_relation(tmp_path, monkeypatch):
    """In place of the sets that ship, which would take most of the time."""
    pairs = [("with", "while"), ("the", "suite"), ("item", "value"), ("class", "name"), ("test", "list")]
    monkeypatch.setattr("hgpt.interpret.relations.SHIPPED", Path(relation_set(tmp_path / "shipped", pairs)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A harmonic model whose centres hold a relation that its input embedding does not: folder, ids, relations."""
    root = tmp_path_factory.mktemp("planted")
    backend = byte_pairs(320)
    folder = export(root / "model", backend, "harmonic")
    words = [word for word, token in backend.get_vocab().items() if word.isalpha() and word.isascii() and token > 255]
    words = sorted(word for word in words if len(encode(backend, word)) == 1)[:24]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    ids = np.array([[backend.token_to_id(word) for word in pair] for pair in pairs])
    assert len(np.unique(ids)) == 24
    weights = load_file(folder / "model.safetensors")
    centres = weights["lm_head.weight"]
    centres[ids[:, 1]] = centres[ids[:, 0]] + torch.randn(32) + 0.05 * torch.randn(12, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, ids, relation_set(root / "relations", pairs)


@pytest.fixture(scope="module")
def planted_result(planted):
    folder, _, relations = planted
    return analyse([str(folder)], replace(FEW, relations=relations)).models[0]


def in_plane(rows: np.ndarray, components: int | None) -> np.ndarray:
    """All rows in their first principal components, by singular values."""
    centred = rows - rows.mean(axis=0)
    if components is None:
        return centred
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:components].T


def mean_score(located: np.ndarray, ids: np.ndarray) -> float:
    scale = np.square(located).sum(axis=1).mean()
    four = [
        np.square(located[a] + located[d] - located[b] - located[c]).sum()
        for (a, b), (c, d) in itertools.permutations(ids, 2)
    ]
    return float(np.mean(four) / scale)


def test_scores_are_those_of_the_weights(planted, planted_result):
    (folder, ids, _), model = planted, planted_result
    weights = load_file(folder / "model.safetensors")
    rows = {"input": weights["transformer.wte.weight"], "centres": weights["lm_head.weight"]}
    rows = {name: matrix[:320].double().numpy() for name, matrix in rows.items()}
    expected = {
        BAEK2025: mean_score(in_plane(rows["input"], 2), ids),
        "centres": mean_score(in_plane(rows["centres"], 2), ids),
        "5 components": mean_score(in_plane(rows["input"], 5), ids),
        "full space": mean_score(in_plane(rows["input"], None), ids),
    }
    found = {variant: parallelograms.result_of(model)[variant]["planted"] for variant in expected}
    assert {variant: result.score.value for variant, result in found.items()} == pytest.approx(expected, rel=1e-4)
    assert found["centres"].score.high < found[BAEK2025].score.low
    # With centred words the mean over all pairings is 2 (Σ|a|² + Σ|b|²) / ((n − 1) scale).
    for variant, matrix, components in (
        (BAEK2025, "input", 2),
        ("centres", "centres", 2),
        ("full space", "input", None),
    ):
        located = in_plane(rows[matrix], components)
        spread = sum(np.square(located[side] - located[side].mean(axis=0)).sum() for side in ids.T)
        mean = 2 * spread / (11 * np.square(located).sum(axis=1).mean())
        assert found[variant].shuffled == pytest.approx(mean, rel=0.04)
    assert found["centres"].p_shuffled == 1 / (1 + SHUFFLES) < 0.01 < found["full space"].p_shuffled
    assert "100 components" not in parallelograms.result_of(model) and set(parallelograms.result_of(model)) <= set(
        VARIANTS
    )
    assert "100 components: the model has only 32 dimensions" in model.skipped


def test_words_are_measured_in_the_matrix_that_they_are_named_by(planted, planted_result):
    (folder, ids, _), model = planted, planted_result
    weights = load_file(folder / "model.safetensors")
    for name, key in (("input", "transformer.wte.weight"), ("centres", "lm_head.weight")):
        rows = weights[key][:320].double().numpy()
        offsets = rows[ids[:, 1]] - rows[ids[:, 0]]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.permutations(offsets, 2)]
        measures = analogies.result_of(model, name)["planted"]
        assert measures.consistency.value == pytest.approx(np.mean(cosines), abs=1e-6)
        assert measures.questions == analogies.QUESTIONS
    assert analogies.result_of(model, "centres")["planted"].accuracy["3CosAdd"].value > 0.7
    assert analogies.result_of(model, "input")["planted"].accuracy["3CosAdd"].value < 0.2


def test_words_that_a_tokenizer_does_not_know_are_left_out_and_counted(tmp_path):
    folder = export(tmp_path / "model", word_pieces(300), "harmonic")
    known = [("with", "while"), ("the", "suite"), ("item", "value"), ("class", "name"), ("test", "list")]
    strange = [("with", "日本"), ("Ω", "the")]
    relation_set(tmp_path / "relations", known + strange, "mixed")
    relations = relation_set(tmp_path / "relations", known[:3] + strange, "mostly strange")
    model = analyse([str(folder)], replace(FEW, relations=relations)).models[0]
    found = parallelograms.baek2025_scores(model)
    assert {name: (r.pairs, r.dropped) for name, r in found.items()} == {"mixed": (5, 2)}
    assert f"{BAEK2025}: fewer than 4 pairs can be used of mostly strange (3 of 5)" in model.skipped


def test_a_run_on_a_folder_of_nanogpt_says_itself_how_large_its_vocabulary_is(tmp_path):
    backend = byte_pairs(300)
    data = bare(tmp_path / "data", encode(backend, TEXT))
    run = run_of(tmp_path / "run", f'path = "{data}"\nvocab_size = 300', backend, {10: 24})
    same_size = export(tmp_path / "twin", backend, "gpt2")
    foreign = export(tmp_path / "foreign", word_pieces(280))
    found = analyse([str(run), str(same_size), str(foreign)], replace(FEW, tokens=200))
    losses = [predictions.result_of(model)["quality"]["loss"].value for model in found.models]
    assert losses == pytest.approx([np.log(300)] * 2 + [np.log(280)], rel=0.3)  # random weights
    assert found.data == str(data)
    assert any("foreign has another tokenizer than" in note and "Bits per byte are" in note for note in found.notes)
    # Without the run nothing says whose tokens they are; what does not fit by its size is not measured.
    found = analyse([str(same_size), str(foreign)], replace(FEW, tokens=200, data=str(data)))
    assert [model.text is None for model in found.models] == [False, True]
    assert predictions.result_of(found.models[1])["quality"] == {} and "similarity" not in found.compared
    assert any("it is assumed that its tokens are those of twin" in note for note in found.notes)
    assert any(
        f"foreign predicts 280 tokens, and the vocabulary of {data} has 300: nothing was measured on text" in note
        for note in found.notes
    )


def test_bits_per_byte_are_left_out_where_nothing_says_how_many_bytes_there_are(tmp_path):
    backend = word_pieces(300)
    data = bare(tmp_path / "data", encode(backend, TEXT))
    run = run_of(tmp_path / "run", f'path = "{data}"\nvocab_size = 300', backend, {10: 24})
    found = analyse([str(run)], replace(FEW, tokens=200))
    quality = predictions.result_of(found.models[0])["quality"]
    assert "bits_per_byte" not in quality and "loss" in quality
    assert any(note.startswith("run has no bits per byte") for note in found.notes)


def test_bits_per_byte_of_word_pieces(tmp_path):
    """On their own data, and on data in bytes: both by the text, whose bytes are counted here."""
    pieces, data = word_pieces(300), {}
    folder = export(tmp_path / "model", pieces, context=200)  # long windows: their first words are no targets
    for name, backend in (("own", pieces), ("bytes", byte_pairs(320))):
        data[name] = prepare(tmp_path / name, backend)
        model = analyse([str(folder)], replace(FEW, tokens=0, data=str(data[name]))).models[0]
        loss, tokens = predictions.result_of(model)["quality"]["loss"].value, len(model.text.positions.loss)
        rate = predictions.result_of(model)["quality"]["bits_per_byte"]
        assert rate.value == pytest.approx(loss * tokens / np.log(2) / len(TEXT.encode()), rel=0.02)
        assert rate.low < rate.value < rate.high


def on_the_hub(cache: Path, name: str, folder: Path) -> None:
    """Put a model where huggingface_hub keeps what it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_models_of_the_hub_and_of_this_disk_read_the_same_windows(tmp_path, monkeypatch):
    backend = byte_pairs(300)
    data = prepare(tmp_path / "data", backend)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    on_the_hub(tmp_path / "cache", "somebody/short", export(tmp_path / "short", backend, "gpt2", context=16))
    names = ["somebody/short", str(export(tmp_path / "long", backend, "harmonic", context=40))]
    names += [str(export(tmp_path / "foreign", byte_pairs(270), context=12))]
    found = analyse(names, replace(FEW, data=str(data), tokens=400))
    first, second, foreign = found.models
    assert first.text.positions.target.tolist() == second.text.positions.target.tolist()
    assert first.text.sample_at.tolist() == second.text.sample_at.tolist()
    assert np.bincount(first.text.positions.window.astype(int)).max() == 16
    assert set(found.compared["similarity"]) == {second.label}
    assert [note for note in found.notes if "read windows of" in note] == [
        "long read windows of 16 tokens, not of its whole context of 40: models with the same tokenizer read the same "
        "windows, and the context of somebody/short is no longer."
    ]
    assert np.bincount(foreign.text.positions.window.astype(int)).max() <= 12
    alone = analyse(names[1:2], replace(FEW, data=str(data), tokens=400))
    assert np.bincount(alone.models[0].text.positions.window.astype(int)).max() == 40 and alone.notes == []


def test_checkpoints_are_measured_on_the_whole_split(tmp_path, monkeypatch):
    backend = byte_pairs(300)
    data = prepare(tmp_path / "data", backend, TEXT * 4)
    run = run_of(tmp_path / "run", f'path = "{data}"', backend, {10: 600, 20: 600}, "harmonic")
    seen = []

    def recorded(model, windows, **options):
        seen.append((model.source.step, windows))
        return positions.measure_text(model, windows, **options)

    monkeypatch.setattr(subject, "measure_text", recorded)
    model = analyse([str(run)], replace(FEW, tokens=600)).models[0]
    tokens = encode(backend, TEXT * 4)
    assert len(tokens) > 8 * 600
    steps = dict(seen[1:])  # the first is the model itself
    assert list(steps) == [10, 20] == [row["step"] for row in model.checkpoints]
    for windows in steps.values():
        inputs = np.concatenate([inputs for inputs, _ in windows])
        assert len(windows) == 8 and len(inputs) == CHECKPOINT_TOKENS and len(windows[0][0]) == CHECKPOINT_WINDOW
        places = [256 * (number * -(-(len(tokens) - 1) // 256) // 8) for number in range(8)]  # every eighth of all
        assert places[-1] > 0.8 * len(tokens)
        for (window, _), place in zip(windows, places, strict=True):
            assert window.tolist() == tokens[place : place + 256].tolist()
