"""hgpt/interpret/relations.py: the shipped sets, the format, and which words have a token."""

import json

import numpy as np
import pytest
from small_texts import refused

from hgpt.interpret.relations import (
    SHIPPED,
    Relation,
    TokenPairs,
    distinct,
    load_relations,
    read_relation,
    token_pairs,
    word_token,
)

# A tokenizer of the words "a" 1, "b" 2, "cd" → 3 4, " a" 5; everything else is unknown, 0, and "" has no token.
TOKENS = {"a": [1], "b": [2], "cd": [3, 4], " a": [5], " b": [6], "": []}


def encode(text: str) -> list[int]:
    return TOKENS.get(text, [0])


def test_shipped_sets_are_large_and_clean():
    relations = load_relations()
    assert len(relations) >= 8
    for relation in relations:
        assert len(relation.pairs) >= 40, relation.name
        content = json.loads((SHIPPED / f"{relation.name}.json").read_text(encoding="utf-8"))
        assert len(content) == len(relation.pairs), f"{relation.name} holds a pair twice"
        assert all(set(entry) == {"input", "output"} for entry in content)
        # Nearly a function: an input has one output.
        assert len({first for first, _ in relation.pairs}) >= 0.9 * len(relation.pairs)


@pytest.mark.parametrize(
    "content, found",
    [
        ('{"input": "a"}', 'got {"input": "a"}'),
        ('[["a", "b"]]', 'entry 1 is ["a", "b"]'),
        ('[{"input": "a", "output": "b"}, {"input": "a", "output": 3}]', "entry 2 is"),
        ('[{"input": "a"}]', "entry 1 is"),
        ('[{"input": "", "output": "b"}]', "entry 1 is"),
    ],
)
def test_wrong_shapes_are_named(tmp_path, content, found):
    (path := tmp_path / "broken.json").write_text(content)
    refused(("broken.json", found), read_relation, path)


def test_files_and_folders(tmp_path):
    refused("holds no .json file", load_relations, tmp_path)
    refused("there is no such folder; leave it out", load_relations, tmp_path / "none")
    path = tmp_path / "x.json"
    path.write_text('[{"input": " a", "output": "b"}, {"input": "a", "output": "b "}, {"input": "b", "output": "a"}]')
    assert load_relations(tmp_path) == [Relation(name="x", pairs=(("a", "b"), ("b", "a")))]


def test_the_tokens_of_words():
    """Under the forms "last", "single" and "single_after_space"."""
    words = {"a": (1, 1, 5), "cd": (4, None, None), "zebra": (None, None, None), "": (None, None, None)}
    for word, expected in words.items():
        found = [word_token(word, encode, form, unknown=0) for form in ("last", "single", "single_after_space")]
        assert tuple(found) == expected, word
    relation = Relation(name="x", pairs=(("a", "b"), ("a", "zebra"), ("cd", "a")))
    last, single = (token_pairs(relation, encode, form, unknown=0) for form in ("last", "single"))
    assert (last.ids.tolist(), last.words, last.dropped) == ([[1, 2], [4, 1]], (("a", "b"), ("cd", "a")), 1)
    assert (single.ids.tolist(), single.dropped) == ([[1, 2]], 2)
    assert token_pairs(Relation(name="y", pairs=(("x", "y"),)), encode, "last", 0).ids.shape == (0, 2)


def test_distinct_pairs():
    ids = np.array([[3, 4], [1, 1], [3, 4], [4, 3], [1, 2]])
    pairs = TokenPairs(words=tuple((f"in{i}", f"out{i}") for i in range(5)), ids=ids, dropped=2)
    found = distinct(pairs)
    assert found.ids.tolist() == [[3, 4], [4, 3], [1, 2]]
    assert (found.words, found.dropped) == ((pairs.words[0], pairs.words[3], pairs.words[4]), 4)
