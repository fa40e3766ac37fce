"""hgpt/interpret/corpus.py: whose tokens the data is in, and that every model reads the same text."""

import numpy as np
import pytest
import torch
from small_models import TEXT, bare, byte_pairs, encode, export, prepare, unigrams, word_pieces

from hgpt.data.tokenizer import END_OF_TEXT
from hgpt.errors import UserError
from hgpt.interpret.corpus import Corpus
from hgpt.interpret.measure import Analysis
from hgpt.interpret.models import find_sources, loaded
from hgpt.interpret.subject import AnalysisSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data in bytes, in word pieces and in unigrams, and a model of each tokenizer."""
    root = tmp_path_factory.mktemp("corpus")
    kinds = {"bytes": byte_pairs(320), "pieces": word_pieces(300), "unigrams": unigrams(300), "other": byte_pairs(270)}
    return {name: (prepare(root / f"{name}_data", b), export(root / name, b, context=16)) for name, b in kinds.items()}


def opened(folders, model_name):
    return loaded(find_sources([str(folders[model_name][1])])[0], CPU)


def tokens_of(windows):
    """Each window as one array, inputs and the last target, after checking that targets are the next inputs."""
    for inputs, targets in windows:
        assert inputs[1:].tolist() == targets[:-1].tolist()
    return [np.append(inputs[:1], targets) for inputs, targets in windows]


@pytest.mark.parametrize("name", ["bytes", "pieces", "unigrams"])
def test_data_fits_the_models_of_its_tokenizer(folders, name):
    corpus = Corpus.open(str(folders[name][0]))
    for other in folders:
        with opened(folders, other) as model:
            assert corpus.fits(model) == (other == name)


def test_text_that_takes_more_tokens_than_a_model_reads_is_cut_and_not_dropped(folders):
    corpus = Corpus.open(str(folders["bytes"][0]))
    with opened(folders, "other") as model:
        read = corpus.read(model, 40, 0)
        parts = [
            corpus.val.read(start, min(start + 41, len(corpus.val))) for start in range(0, len(corpus.val) - 1, 40)
        ]
        assert len(read.windows) >= 3 * (len(parts) - 1)  # 40 tokens and more, 16 at a time
        pieces = iter(zip(tokens_of(read.windows), read.text_bytes, strict=True))
        for part in parts:
            text = corpus.tokenizer.decode(part.tolist())
            expected = model.encode(text)
            found, size = [], 0
            while len(found) < len(expected):
                tokens, text_bytes = next(pieces)
                assert len(tokens) <= model.context + 1
                assert not found or tokens[0] == found[-1]  # what was the last target is the first input
                found += tokens.tolist()[bool(found) :]
                size += text_bytes
            assert found == expected
            assert size == len(text.encode()) - len(model.tokenizer.decode(expected[:1]).encode())
        assert next(pieces, None) is None
        lengths = [len(targets) for _, targets in read.windows]
        assert max(lengths) == 16 and min(lengths[:-3]) > 8  # no piece is a remnant of a few tokens
        assert max(len(targets) for _, targets in corpus.read(model, 40, 0, longest=5).windows) == 5


@pytest.mark.parametrize("tokens", [0, 100, 4000])
def test_the_share_of_the_split_that_is_read(folders, tokens):
    corpus = Corpus.open(str(folders["bytes"][0]))
    with opened(folders, "bytes") as model:
        targets = sum(len(targets) for _, targets in corpus.read(model, 40, tokens).windows)
    share = corpus.share(40, tokens)
    assert share == targets / (len(corpus.val) - 1) and (share == 1) == (tokens in (0, 4000))
    part = Analysis(settings=AnalysisSettings(), models=[], data="d", share=share).part
    assert part == ("the whole validation text" if share == 1 else f"{100 * share:.3g} % of the validation text")


def test_the_bytes_of_word_pieces_are_those_of_the_text_they_were_made_from(folders):
    """By where the first word piece of each window ends in its text: spaces and capitals count, "##" does not."""
    corpus = Corpus.open(str(folders["bytes"][0]))
    with opened(folders, "pieces") as model:
        read = corpus.read(model, 60, 0)
        total = first_words = 0
        for start in range(0, len(corpus.val) - 1, 60):
            text = corpus.tokenizer.decode(corpus.val.read(start, min(start + 61, len(corpus.val))).tolist())
            first = model.tokenizer.convert_ids_to_tokens(model.encode(text)[0])
            first_words += text.lower().index(first) + len(first)
            total += len(text.rstrip().encode())
        assert read.text_bytes.sum() == total - first_words
        table = np.array([len(model.tokenizer.decode([token])) for token in range(model.vocab_size)])
        one_by_one = sum(table[targets].sum() for _, targets in read.windows)
        assert abs(one_by_one / read.text_bytes.sum() - 1) > 0.05  # token by token it is another number


@pytest.mark.parametrize("name", ["pieces", "unigrams"])
def test_bytes_of_data_that_is_not_in_bytes_are_those_of_its_preparation(folders, name):
    corpus = Corpus.open(str(folders[name][0]))
    with opened(folders, name) as model:
        read = corpus.read(model, 16, 0)
        share = (len(corpus.val) - 1) / len(corpus.val)  # the first token is no target
        assert read.text_bytes.sum() == pytest.approx(len(TEXT.encode()) * share)
        assert read.text_bytes[0] == pytest.approx(16 * len(TEXT.encode()) / len(corpus.val))


def test_ends_of_documents_are_the_models_own(tmp_path):
    first = byte_pairs(300)
    data = prepare(tmp_path / "data", first, f"with a{END_OF_TEXT}while b{END_OF_TEXT}")
    other = word_pieces(290)
    corpus = Corpus.open(str(data))
    with loaded(find_sources([str(export(tmp_path / "other", other))])[0], CPU) as model:
        read = corpus.read(model, 1000, 0)
        end = model.tokenizer.eos_token_id
        expected = [*model.encode("with a"), end, *model.encode("while b"), end]
        assert [tokens.tolist() for tokens in tokens_of(read.windows)] == [expected]
        first_token = model.tokenizer.decode(expected[:1])
        assert read.text_bytes.tolist() == [len("with awhile b") - len(first_token)]


def test_halves_of_characters_at_the_edges_are_left_out(tmp_path):
    backend = byte_pairs(257)  # a token for each byte
    data = prepare(tmp_path / "data", backend, "日本語")
    with loaded(find_sources([str(export(tmp_path / "other", byte_pairs(262)))])[0], CPU) as model:
        # Five bytes: one character, and two of the three bytes of the next.
        inputs, targets = Corpus.open(str(data)).read(model, 4, 0).windows[0]
        assert model.tokenizer.decode([inputs[0], *targets]) == "日"


def test_without_a_tokenizer_data_fits_models_of_its_vocabulary_size(folders, tmp_path):
    backend = byte_pairs(320)
    (prepare(tmp_path / "data", backend) / "tokenizer.json").unlink()
    corpus = Corpus.open(str(tmp_path / "data"))
    assert corpus.vocabulary is None
    for name in ("bytes", "pieces", "other"):
        with opened(folders, name) as model:
            assert corpus.fits(model) == (name == "bytes")
    padded = export(tmp_path / "padded", backend, rows=384)
    with loaded(find_sources([str(padded)])[0], CPU) as model:
        assert corpus.fits(model)


def test_the_tokenizer_of_a_run_stands_in_for_that_of_its_data(folders, tmp_path):
    folder = bare(tmp_path / "bare", encode(byte_pairs(320), TEXT))
    file = folders["bytes"][1] / "tokenizer.json"
    corpus = Corpus.open(str(folder), vocab_sizes=[320], tokenizer_files=[tmp_path / "none.json", file])
    with opened(folders, "bytes") as same, opened(folders, "other") as other:
        assert corpus.fits(same) and not corpus.fits(other)
        assert len(corpus.read(other, 16, 0).windows) > 0


def test_the_vocabulary_of_a_bare_folder_is_the_smallest_that_holds_its_tokens(tmp_path):
    folder = str(bare(tmp_path / "bare", np.array([5, 299, 7, 9])))
    assert Corpus.open(folder, vocab_sizes=[320, 300, 299]).val.vocab_size == 300
    assert Corpus.open(folder, vocab_sizes=[50257]).val.vocab_size == 50257
    corpus = Corpus.open(folder, vocab_sizes=[100, 200])
    with pytest.raises(UserError, match="token 299 at position 1 is beyond the vocabulary of 200"):
        corpus.val.read(0, 4)
    with pytest.raises(UserError, match=r"state vocab_size"):
        Corpus.open(folder)
