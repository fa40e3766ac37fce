"""hgpt/interpret/corpus.py: whose tokens the data is in, and that every model reads the same text."""

import numpy as np
import pytest
import torch
from small_models import TEXT, bare, byte_pairs, encode, export, prepare, unigrams, word_pieces
from small_texts import refused

from hgpt.data.tokenizer import END_OF_TEXT
from hgpt.interpret.corpus import Corpus
from hgpt.interpret.measure import Analysis
from hgpt.interpret.models import find_sources, loaded
from hgpt.interpret.subject import AnalysisSettings

TOKENIZERS = {"bytes": byte_pairs(320), "pieces": word_pieces(300), "unigrams": unigrams(300), "other": byte_pairs(270)}
SIZE = len(TEXT.encode())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data in bytes, in word pieces and in unigrams, and a model of each tokenizer."""
    root = tmp_path_factory.mktemp("corpus")
    return {name: (str(prepare(root / f"{name}_data", backend)), export(root / name, backend, context=16))
            for name, backend in TOKENIZERS.items()}  # fmt: skip


def opened(folder):
    return loaded(find_sources([str(folder)])[0], torch.device("cpu"))


def tokens_of(windows):
    """Each window as one array, inputs and the last target, after checking that targets are the next inputs."""
    for inputs, targets in windows:
        assert inputs[1:].tolist() == targets[:-1].tolist()
    return [np.append(inputs[:1], targets) for inputs, targets in windows]


def test_data_fits_the_models_of_its_tokenizer(places, tmp_path):
    padded = export(tmp_path / "padded", TOKENIZERS["bytes"], rows=384)
    unknown = prepare(tmp_path / "data", TOKENIZERS["bytes"])  # without a tokenizer: models of its vocabulary size
    (unknown / "tokenizer.json").unlink()
    bare_folder = bare(tmp_path / "bare", encode(TOKENIZERS["bytes"], TEXT))
    files = [tmp_path / "none.json", places["bytes"][1] / "tokenizer.json"]  # a run's stands in for its data's
    named = Corpus.open(str(bare_folder), vocab_sizes=[320], tokenizer_files=files)
    corpora = {name: Corpus.open(places[name][0]) for name in ("bytes", "pieces", "unigrams")}
    for model_name, (_, folder) in {**places, "bytes padded": (None, padded)}.items():
        with opened(folder) as model:
            fitting = {name for name, corpus in corpora.items() if corpus.fits(model)}
            assert fitting == {model_name.split()[0]} - {"other"}
            assert Corpus.open(str(unknown)).fits(model) == named.fits(model) == model_name.startswith("bytes")
            if model_name == "bytes padded":
                counts = corpora["bytes"].counts(model.vocab_size)
                assert counts.tolist() == np.bincount(encode(TOKENIZERS["bytes"], TEXT), minlength=384).tolist()
            assert len(named.read(model, 16, 0).windows) > 0


def test_text_that_takes_more_tokens_than_a_model_reads_is_cut_and_not_dropped(places):
    corpus = Corpus.open(places["bytes"][0])
    with opened(places["other"][1]) as model:
        read = corpus.read(model, 40, 0)
        pieces = iter(zip(tokens_of(read.windows), read.text_bytes, strict=True))
        for start in range(0, len(corpus.val) - 1, 40):
            text = corpus.tokenizer.decode(corpus.val.read(start, min(start + 41, len(corpus.val))).tolist())
            expected, found, size = model.encode(text), [], 0
            while len(found) < len(expected):
                tokens, text_bytes = next(pieces)
                assert not found or tokens[0] == found[-1]  # what was the last target is the first input
                found += tokens.tolist()[bool(found) :]
                size += text_bytes
            assert found == expected
            assert size == len(text.encode()) - len(model.tokenizer.decode(expected[:1]).encode())
        assert next(pieces, None) is None
        lengths = [len(targets) for _, targets in read.windows]
        assert max(lengths) == model.context == 16 and min(lengths[:-3]) > 8  # no remnant of a few tokens
        assert max(len(targets) for _, targets in corpus.read(model, 40, 0, longest=5).windows) == 5


@pytest.mark.parametrize("tokens", [0, 100, 4000])
def test_the_share_of_the_split_that_is_read(places, tokens):
    corpus = Corpus.open(places["bytes"][0])
    with opened(places["bytes"][1]) as model:
        targets = sum(len(targets) for _, targets in corpus.read(model, 40, tokens).windows)
    share = corpus.share(40, tokens)
    assert share == targets / (len(corpus.val) - 1) and (share == 1) == (tokens in (0, 4000))
    part = Analysis(settings=AnalysisSettings(), models=[], data="d", share=share).part
    assert part == ("the whole validation text" if share == 1 else f"{100 * share:.3g} % of the validation text")


def test_the_bytes_of_word_pieces_are_those_of_the_text_they_were_made_from(places):
    """By where the first word piece of each window ends in its text: spaces and capitals count, "##" does not."""
    corpus = Corpus.open(places["bytes"][0])
    with opened(places["pieces"][1]) as model:
        total = 0
        for start in range(0, len(corpus.val) - 1, 60):
            text = corpus.tokenizer.decode(corpus.val.read(start, min(start + 61, len(corpus.val))).tolist())
            first = model.tokenizer.convert_ids_to_tokens(model.encode(text)[0])
            total += len(text.rstrip().encode()) - text.lower().index(first) - len(first)
        assert corpus.read(model, 60, 0).text_bytes.sum() == total
    for name in ("pieces", "unigrams"):  # of data that is not in bytes: those that its preparation counted
        corpus = Corpus.open(places[name][0])
        with opened(places[name][1]) as model:
            text_bytes = corpus.read(model, 16, 0).text_bytes
        assert text_bytes.sum() == pytest.approx(SIZE * (1 - 1 / len(corpus.val)))  # the first token is no target
        assert text_bytes[0] == pytest.approx(16 * SIZE / len(corpus.val))


def test_documents_and_halves_of_characters(tmp_path):
    """The end of a document becomes the model's own; halves of characters at the edges are left out."""
    data = prepare(tmp_path / "data", byte_pairs(300), f"with a{END_OF_TEXT}while b{END_OF_TEXT}")
    with opened(export(tmp_path / "pieces", word_pieces(290))) as model:
        read = Corpus.open(str(data)).read(model, 1000, 0)
        end = model.tokenizer.eos_token_id
        expected = [*model.encode("with a"), end, *model.encode("while b"), end]
        assert [tokens.tolist() for tokens in tokens_of(read.windows)] == [expected]
        assert read.text_bytes.tolist() == [len("with awhile b") - len(model.tokenizer.decode(expected[:1]))]
    data = prepare(tmp_path / "japanese", byte_pairs(257), "日本語")  # a token for each byte
    with opened(export(tmp_path / "bytes", byte_pairs(262))) as model:
        # Five bytes: one character, and two of the three bytes of the next.
        inputs, targets = Corpus.open(str(data)).read(model, 4, 0).windows[0]
        assert model.tokenizer.decode([inputs[0], *targets]) == "日"


def test_the_vocabulary_of_a_bare_folder_is_the_smallest_that_holds_its_tokens(tmp_path):
    folder = str(bare(tmp_path / "bare", np.array([5, 299, 7, 9])))
    assert Corpus.open(folder, vocab_sizes=[320, 300, 299]).val.vocab_size == 300
    assert Corpus.open(folder, vocab_sizes=[50257]).val.vocab_size == 50257
    too_small = Corpus.open(folder, vocab_sizes=[100, 200])
    refused("token 299 at position 1 is beyond the vocabulary of 200", too_small.val.read, 0, 4)
    refused("state vocab_size", Corpus.open, folder)
