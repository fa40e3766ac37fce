"""Relations between words: JSON files in the format of function vectors, and the token pairs of their words.

A file holds one relation, a list of `{"input": "France", "output": "Paris"}`, and has the relation's name (Todd et al.,
*Function Vectors in Large Language Models*, arXiv:2310.15213). The sets in `relation_sets/` were written for this
project and are the default.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hgpt.durable import read_json
from hgpt.errors import UserError

SHIPPED = Path(__file__).parent / "relation_sets"
SMALLEST_RELATION = 4  # pairs: the fewest that give two disjoint pairs of pairs

# The token that represents a word: its last one, as in arXiv:2502.01628, or its only one, without or with a space
# before the word. Under the "single" forms a word of several tokens has no token.
WordForm = Literal["last", "single", "single_after_space"]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A name and its pairs of words (a, b), each pair once."""

    name: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class TokenPairs:
    """The usable pairs of a relation: their words, their tokens `ids`, (pairs, 2) int64, and how many were dropped."""

    words: tuple[tuple[str, str], ...]
    ids: np.ndarray
    dropped: int


def load_relations(folder: str | Path | None = None) -> list[Relation]:
    """Every `*.json` of `folder` (default: the shipped sets), by name. Raises UserError if none or one is invalid."""
    folder = SHIPPED if folder is None else Path(folder)
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except (OSError, ValueError) as error:
        reason = "there is no such folder" if isinstance(error, FileNotFoundError | NotADirectoryError) else error
        raise UserError(f"--relations {folder}: {reason}; leave it out to use the shipped sets") from error
    if not files:
        raise UserError(
            f'--relations {folder} holds no .json file; each is one relation, a list of {{"input": ..., "output": ...}}'
        )
    return [read_relation(file) for file in files]


def read_relation(path: Path) -> Relation:
    """The relation in one file. Raises UserError that names the first entry that is not a pair of texts."""
    rule = 'a relation is a list of {"input": "text", "output": "text"}'
    try:
        content = read_json(path, f"{rule}.")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {rule}") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: {rule}; got {json.dumps(content, ensure_ascii=False):.60}")
    pairs: dict[tuple[str, str], None] = {}
    for number, entry in enumerate(content, start=1):
        pair = (entry.get("input"), entry.get("output")) if isinstance(entry, dict) else (None, None)
        if not all(isinstance(word, str) and word.strip() for word in pair):
            raise UserError(
                f"{path}: {rule}; entry {number} is {json.dumps(entry, ensure_ascii=False):.60}. Correct or remove it"
            )
        pairs[pair[0].strip(), pair[1].strip()] = None  # type: ignore[union-attr]
    return Relation(name=path.stem, pairs=tuple(pairs))


def token_pairs(
    relation: Relation, encode: Callable[[str], Sequence[int]], form: WordForm, unknown: int | None = None
) -> TokenPairs:
    """The tokens of a relation's words; a pair with a word that has no token is dropped.

    Args:
        encode: text → token ids, without special tokens. Raises UserError for text that has no tokens.
        unknown: the tokenizer's unknown token, if any; a word that contains it has no token.
    """
    words, ids = [], []
    for pair in relation.pairs:
        tokens = [word_token(word, encode, form, unknown) for word in pair]
        if None not in tokens:
            words.append(pair)
            ids.append(tokens)
    return TokenPairs(
        words=tuple(words), ids=np.array(ids, dtype=np.int64).reshape(-1, 2), dropped=len(relation.pairs) - len(words)
    )


def distinct(pairs: TokenPairs) -> TokenPairs:
    """Drop pairs of two equal tokens, and all but the first of equal pairs of tokens."""
    first = np.sort(np.unique(pairs.ids, axis=0, return_index=True)[1])
    kept = first[pairs.ids[first, 0] != pairs.ids[first, 1]]
    words = tuple(pairs.words[index] for index in kept)
    return TokenPairs(words=words, ids=pairs.ids[kept], dropped=pairs.dropped + len(pairs.ids) - len(kept))


def word_token(word: str, encode: Callable[[str], Sequence[int]], form: WordForm, unknown: int | None) -> int | None:
    """The token that represents a word, None if there is none."""
    try:
        tokens = encode(f" {word}" if form == "single_after_space" else word)
    except UserError:
        return None
    if not len(tokens) or unknown in tokens or (form != "last" and len(tokens) > 1):
        return None
    return int(tokens[-1])
