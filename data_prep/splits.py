"""The split of documents into training and validation.

A split chooses a document's side, "train" or "val", by its text or by its index in the source:

    HashSplit    by the words of the document, for your own text
    IndexSplit   by the index of the document, for OpenWebText: nanoGPT's validation documents
"""

import hashlib
from dataclasses import dataclass
from math import ceil

import numpy as np

from hgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HashSplit:
    """The side depends only on the seed and on the words of the document.

        hash = BLAKE2b(words joined by single spaces; key = seed) / 2^64 ∈ [0, 1)
        val ⟺ hash < val_fraction

    So the split depends neither on the order of the documents nor on the tokenizer, and an added document does not
    change the others' sides. Texts that differ only in white space are on the same side: val holds no copy of a
    training document.
    """

    seed: int = 0
    val_fraction: float = 0.01

    def hash(self, text: str) -> float:
        words = " ".join(text.split()).encode(errors="surrogatepass")
        digest = hashlib.blake2b(words, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") / 2.0**64

    def side(self, index: int, text: str) -> str:
        return "val" if self.hash(text) < self.val_fraction else "train"


@dataclass(frozen=True, kw_only=True)
class IndexSplit:
    """The documents with the indices `val` (sorted) are for validation."""

    val: np.ndarray

    def side(self, index: int, text: str) -> str:
        found = np.searchsorted(self.val, index)
        return "val" if found < len(self.val) and self.val[found] == index else "train"


Split = HashSplit | IndexSplit


def nanogpt_indices(documents: int, val_fraction: float, seed: int) -> np.ndarray:
    """The sorted indices of the validation documents, as Hugging Face's datasets draws them.

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
