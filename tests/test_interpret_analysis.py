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
from hgpt.interpret.measures import analogies, parallelograms
from hgpt.interpret.measures.parallelograms import BAEK2025, SHUFFLES, VARIANTS
from hgpt.interpret.report import analyse
from hgpt.interpret.subject import CHECKPOINT_TOKENS, CHECKPOINT_WINDOW, AnalysisSettings

FEW = AnalysisSettings(bootstrap=100)
PAIRS = [("with", "while"), ("the", "suite"), ("item", "value"), ("class", "name"), ("test", "list")]


@pytest.fixture(autouse=True)
def _one_relation(tmp_path, monkeypatch):
    """In place of the sets that ship, which would take most of the time."""
    monkeypatch.setattr("hgpt.interpret.relations.SHIPPED", Path(relation_set(tmp_path / "shipped", PAIRS)))


def quality(model):
    return model.found["predictions"]["quality"]


def in_plane(rows: np.ndarray, components: int | None) -> np.ndarray:
    """All rows in their first principal components, by singular values."""
    centred = rows - rows.mean(axis=0)
    if components is None:
        return centred
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:components].T


def test_scores_are_those_of_the_weights(tmp_path):
    """A harmonic model whose centres hold a relation that its input embedding does not."""
    backend = byte_pairs(320)
    folder = export(tmp_path / "model", backend, "harmonic")
    words = [word for word, token in backend.get_vocab().items() if word.isalpha() and word.isascii() and token > 255]
    words = sorted(word for word in words if len(encode(backend, word)) == 1)[:24]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    ids = np.array([[backend.token_to_id(word) for word in pair] for pair in pairs])
    assert len(np.unique(ids)) == 24
    weights = load_file(folder / "model.safetensors")
    centres = weights["lm_head.weight"]
    centres[ids[:, 1]] = centres[ids[:, 0]] + torch.randn(32) + 0.05 * torch.randn(12, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = analyse([str(folder)], replace(FEW, relations=relation_set(tmp_path / "relations", pairs))).models[0]

    rows = {"input": weights["transformer.wte.weight"], "centres": centres}
    rows = {name: matrix[:320].double().numpy() for name, matrix in rows.items()}
    found = {variant: scores["planted"] for variant, scores in parallelograms.result_of(model).items()}
    for variant, matrix, components in (
        (BAEK2025, "input", 2),
        ("centres", "centres", 2),
        ("5 components", "input", 5),
        ("full space", "input", None),
    ):
        located = in_plane(rows[matrix], components)
        scale = np.square(located).sum(axis=1).mean()
        four = [np.square(located[a] + located[d] - located[b] - located[c]).sum()
                for (a, b), (c, d) in itertools.permutations(ids, 2)]  # fmt: skip
        assert found[variant].score.value == pytest.approx(np.mean(four) / scale, rel=1e-4)
        # With centred words the mean over all pairings is 2 (Σ|a|² + Σ|b|²) / ((n − 1) scale).
        spread = sum(np.square(located[side] - located[side].mean(axis=0)).sum() for side in ids.T)
        assert found[variant].shuffled == pytest.approx(2 * spread / (11 * scale), rel=0.04)
    assert found["centres"].score.high < found[BAEK2025].score.low
    assert found["centres"].p_shuffled == 1 / (1 + SHUFFLES) < 0.01 < found["full space"].p_shuffled
    assert found.keys() < VARIANTS.keys() and "100 components: the model has only 32 dimensions" in model.skipped
    for name, matrix in rows.items():
        offsets = matrix[ids[:, 1]] - matrix[ids[:, 0]]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.permutations(offsets, 2)]
        measures = analogies.result_of(model, name)["planted"]
        assert measures.consistency.value == pytest.approx(np.mean(cosines), abs=1e-6)
        assert measures.questions == analogies.QUESTIONS
    accuracy = {name: analogies.result_of(model, name)["planted"].accuracy["3CosAdd"].value for name in rows}
    assert accuracy["centres"] > 0.7 and accuracy["input"] < 0.2


def test_a_tokenizer_with_unknown_words_and_an_unknown_number_of_bytes(tmp_path):
    backend = word_pieces(300)
    data = bare(tmp_path / "data", encode(backend, TEXT))
    run = run_of(tmp_path / "run", f'path = "{data}"\nvocab_size = 300', backend, {10: 24}, "harmonic")
    strange = [("with", "日本"), ("Ω", "the")]
    relation_set(tmp_path / "relations", PAIRS + strange, "mixed")
    relations = relation_set(tmp_path / "relations", PAIRS[:3] + strange, "mostly strange")
    found = analyse([str(run)], replace(FEW, relations=relations, tokens=200))
    (model,) = found.models
    scores = parallelograms.baek2025_scores(model)
    assert {name: (r.pairs, r.dropped) for name, r in scores.items()} == {"mixed": (5, 2)}
    assert f"{BAEK2025}: fewer than 4 pairs can be used of mostly strange (3 of 5)" in model.skipped
    assert "bits_per_byte" not in quality(model) and "loss" in quality(model)
    assert any(note.startswith("run has no bits per byte") for note in found.notes)


def test_a_run_on_a_folder_of_nanogpt_says_itself_how_large_its_vocabulary_is(tmp_path):
    backend = byte_pairs(300)
    data = bare(tmp_path / "data", encode(backend, TEXT))
    run = run_of(tmp_path / "run", f'path = "{data}"\nvocab_size = 300', backend, {10: 24})
    same_size = export(tmp_path / "twin", backend, "gpt2")
    foreign = export(tmp_path / "foreign", word_pieces(280))
    found = analyse([str(run), str(same_size), str(foreign)], replace(FEW, tokens=200))
    losses = [quality(model)["loss"].value for model in found.models]
    assert losses == pytest.approx([np.log(300)] * 2 + [np.log(280)], rel=0.3)  # random weights
    assert found.data == str(data)
    assert any("foreign has another tokenizer than" in note and "Bits per byte are" in note for note in found.notes)
    # Without the run nothing says whose tokens they are; what does not fit by its size is not measured.
    found = analyse([str(same_size), str(foreign)], replace(FEW, tokens=200, data=str(data)))
    assert [model.text is None for model in found.models] == [False, True]
    assert "predictions" not in found.models[1].found and "similarity" not in found.compared
    assert any("that of twin, so the same tokens are assumed" in note for note in found.notes)
    unread = f"foreign predicts 280 tokens, and the vocabulary of {data} has 300: nothing was measured on text"
    assert any(unread in note for note in found.notes)


def test_models_of_the_hub_and_of_this_disk_read_the_same_windows(tmp_path, monkeypatch):
    backend = byte_pairs(300)
    data = prepare(tmp_path / "data", backend)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--somebody--short"  # where huggingface_hub keeps downloads
    shutil.copytree(export(tmp_path / "short", backend, "gpt2", context=16), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    names = ["somebody/short", str(export(tmp_path / "long", backend, "harmonic", context=40))]
    names += [str(export(tmp_path / "foreign", byte_pairs(270), context=12))]
    found = analyse(names, replace(FEW, data=str(data), tokens=400))
    first, second, foreign = found.models
    assert first.text.positions.target.tolist() == second.text.positions.target.tolist()
    assert first.text.sample_at.tolist() == second.text.sample_at.tolist()
    assert [np.bincount(model.text.positions.window).max() for model in (first, foreign)] == [16, 12]
    assert set(found.compared["similarity"]) == {second.label}
    (note,) = (note for note in found.notes if "read windows of" in note)
    assert note.startswith("long read windows of 16 tokens, not of its whole context of 40: ")
    assert "somebody/short has the shortest context" in note
    alone = analyse(names[1:2], replace(FEW, data=str(data), tokens=400))
    assert np.bincount(alone.models[0].text.positions.window).max() == 40 and alone.notes == []


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
    steps = dict(seen[1:])  # the first is the model itself
    assert list(steps) == [10, 20] == [row["step"] for row in model.checkpoints]
    places = [256 * (number * -(-(len(tokens) - 1) // 256) // 8) for number in range(8)]  # every eighth of all
    assert 8 * 600 < len(tokens) < places[-1] / 0.8
    for windows in steps.values():
        assert [window.tolist() for window, _ in windows] == [tokens[at : at + 256].tolist() for at in places]
        assert 8 * CHECKPOINT_WINDOW == CHECKPOINT_TOKENS
