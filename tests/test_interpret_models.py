"""hgpt/interpret/models.py: what it refuses before memory and time are spent on it, and the text of tokens."""

import numpy as np
import pytest
import torch
from small_models import byte_pairs, export, unigrams, word_pieces
from small_texts import refused
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from hgpt.errors import UserError
from hgpt.interpret.models import LoadedModel, find_sources, loaded, outlines
from hgpt.source import Source

CPU = torch.device("cpu")
TOKENIZERS = {"bytes": byte_pairs, "word pieces": word_pieces, "unigrams": unigrams}


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request, tmp_path_factory):
    folder = export(tmp_path_factory.mktemp("models") / "model", TOKENIZERS[request.param](300))
    with loaded(find_sources([str(folder)])[0], CPU) as model:
        yield model


def test_gpt_neo_is_refused_though_it_has_the_same_parts(tmp_path):
    config = GPTNeoConfig(
        vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=8,
    )  # fmt: skip
    neo = GPTNeoForCausalLM(config)
    assert hasattr(neo.base_model, "ln_f")
    message = "is a GPTNeoForCausalLM; hgpt.interpret reads models of hgpt and GPT-2 models of transformers"
    refused(message, LoadedModel, Source(label="neo", folder="neo"), neo, None, CPU)
    config.architectures = ["GPTNeoForCausalLM"]
    config.save_pretrained(tmp_path / "neo")  # config.json is enough to refuse it
    source = find_sources([str(tmp_path / "neo")])[0]
    refused(message, outlines, [source])
    refused(message, loaded(source, CPU).__enter__)


def test_memory_that_runs_out_while_a_model_is_loaded_or_measured(tmp_path, monkeypatch):
    source = find_sources([str(export(tmp_path / "model", byte_pairs(300)))])[0]
    for allocate in (torch.empty, np.empty):
        with pytest.raises(UserError, match=r"cpu ran out of memory: .*/model .* lower --tokens"), loaded(source, CPU):
            allocate(10**16)  # what an operating system really says
    with pytest.raises(RuntimeError, match="something else"), loaded(source, CPU):
        raise RuntimeError("something else")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(10**16))
    refused("ran out of memory with", loaded(source, CPU).__enter__)


def test_outlines_know_what_the_models_know(tmp_path):
    folders = [export(tmp_path / name, byte_pairs(300), head, context=n, rows=rows) for name, head, n, rows in
               (("a", "gpt2", 16, 320), ("b", "harmonic", 8, 300))]  # fmt: skip
    found = outlines(find_sources([str(folder) for folder in folders]))
    assert [(o.context, o.vocab_size) for o in found] == [(16, 320), (8, 300)]
    assert found[0].words is found[1].words
    for outline in found:
        with loaded(outline.source, CPU) as model:
            assert outline.words == frozenset(model.tokenizer.get_vocab().items())
            assert (outline.context, outline.vocab_size) == (model.context, model.vocab_size)


def test_tokens_their_text_and_their_bytes(model):
    texts = {token: model.token_text(number) for token, number in model.tokenizer.get_vocab().items()}
    assert "�" not in "".join(texts.values())
    table = model.token_bytes()
    if "Ġthe" in texts:
        assert (texts["Ġthe"], texts["Ã"]) == (" the", r"\xc3")
        assert table[model.encode("with é")].sum() == len("with é".encode())
    else:
        assert table is None
        assert "▁the" not in texts or (texts["▁the"], texts["▁"], texts["s"]) == (" the", " ", "s")
    text = "While “with” é, it's 日本 — the\n\n  suite  "
    ids, ends = model.encode_with_ends(text)
    assert ids.tolist() == model.encode(text)
    whole = model.tokenizer._tokenizer.encode(text, add_special_tokens=False)
    assert ends.tolist() == [len(text[:end].encode()) for _, end in whole.offsets]
    assert (np.diff(ends) >= 0).all() and ends[-1] <= len(text.encode())
    assert [len(found) for found in model.encode_with_ends("")] == [0, 0]
