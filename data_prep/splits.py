"""Which documents are for training and which for validation.

A split decides between "train" and "val", the side of a document, by its text or by its place in the source (from 0):

    HashSplit    by the words of the document, for your own text
    PlaceSplit   by the place of the document, for OpenWebText: nanoGPT's validation documents
"""

import hashlib
from dataclasses import dataclass
from math import ceil

import numpy as np

from hgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HashSplit:
    """The side is a function of the seed and of the words of the document, and of nothing else.

        hash = BLAKE2b(words joined by single spaces; key = seed) / 2^64 ∈ [0, 1)
        val ⟺ hash < val_fraction

    So the split depends neither on the order of the documents nor on the tokenizer, and an added document does not
    change the side of the others. Texts that differ only in white space are on the same side: val holds no copy of a
    training document.
    """

    seed: int = 0
    val_fraction: float = 0.01

    def hash(self, text: str) -> float:
        words = " ".join(text.split()).encode(errors="surrogatepass")
        digest = hashlib.blake2b(words, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") / 2.0**64

    def side(self, place: int, text: str) -> str:
        return "val" if self.hash(text) < self.val_fraction else "train"


@dataclass(frozen=True, kw_only=True)
class PlaceSplit:
    """The documents at the places `val` (sorted) are for validation."""

    val: np.ndarray

    def side(self, place: int, text: str) -> str:
        index = np.searchsorted(self.val, place)
        return "val" if index < len(self.val) and self.val[index] == place else "train"


Split = HashSplit | PlaceSplit


def nanogpt_places(documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """The places of the validation documents, sorted, as the datasets library of Hugging Face draws them.

    `train_test_split(test_size=val_fraction, seed=seed, shuffle=True)` takes the first ⌈val_fraction · documents⌉ of
    `numpy.random.default_rng(seed).permutation(documents)`. A test compares the two. Raises UserError if one side
    would be empty.
    """
    val = ceil(val_fraction * documents)
    if val >= documents:
        raise UserError(
            f"--val-fraction {val_fraction} of {documents} documents leaves train empty: lower it. nanoGPT's is 0.0005."
        )
    return np.sort(np.random.default_rng(seed).permutation(documents)[:val])
