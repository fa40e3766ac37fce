"""Token shards on disk: write, open, read.

A data folder, as written by `data_prep`:

    train_000000.bin ...   shards in the format of llm.c: 256 int32 of header (magic number, version, token
    val_000000.bin ...     count), then the tokens, uint16 for a vocabulary of at most 65,535, else uint32
    tokenizer.json         the tokenizer, as Hugging Face's `tokenizers` reads it
    meta.json              `DataMeta`; a folder without it was never finished
    train_counts.json      how often each token occurs; made again if it is missing (hgpt/data/baselines.py)

Two other kinds of folder can be read: nanoGPT's (`train.bin` and `val.bin`, tokens without header), and shards of other
tools with llm.c's header and the split in their names (`fineweb_train_000001.bin`, `tiny_shakespeare_val.bin`). Their
vocabulary comes from a `tokenizer.json` or nanoGPT's `meta.pkl` in the folder, or the caller must state its size.
"""

import hashlib
import json
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, get_args, get_origin

import numpy as np

from hgpt.data.tokenizer import (
    CHARACTERS_FILE,
    TOKENIZER_FILE,
    check_tokenizer_file,
    check_vocab_size,
    token_ids,
    tokenizer_file,
)
from hgpt.durable import partial_name, publish, read_json, sha256, sync, whole_file
from hgpt.errors import UserError

HEADER_BYTES = 256 * 4
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
# Type of the tokens → magic number and version, as llm.c's dev/data/data_common.py writes GPT-2's and Llama 3's.
HEADERS: dict[np.dtype, tuple[int, int]] = {UINT16: (20240520, 1), UINT32: (20240801, 7)}
SPLITS = ("train", "val")
BARE = {f"{split}.bin" for split in SPLITS}  # of nanoGPT
META_FILE = "meta.json"
META_VERSION = 1
PART_FILE = "part.json"  # instead of meta.json, in a part of a preparation shared by several machines
UNFINISHED_FOLDER = ".preparation"  # in a data folder whose preparation is not finished; see data_prep/state.py
TOKENS_PER_SHARD = 100_000_000  # 200 MB of uint16 a file, as llm.c's data scripts write
MAX_OPEN_FILES = 128

# data_prep is not in the wheel.
_WHERE = "" if Path(__file__).parents[2].joinpath("data_prep").is_dir() else " (in a checkout of hgpt)"
PREPARE_AGAIN = f"Prepare the data again into another folder (python -m data_prep.documents --help{_WHERE})."
# The first bytes of files that other tools write.
FORMATS = {
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"PK": "a zip file, such as one of torch.save or np.savez",
    b"\x80": "a pickle",
    b"MMIDIDX": "an index of Megatron",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip file",
}


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of the tokens in the shards of a vocabulary."""
    return UINT16 if vocab_size <= 0xFFFF else UINT32


# ------------------------------------------------------------------------------------------------------------
# meta.json


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard: file name, number of tokens, SHA-256 of the file as `sha256sum` prints it."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """One split: tokens (one end-of-text per document included), documents, bytes of UTF-8 text, shards."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True, kw_only=True)
class DataMeta:
    """The content of `meta.json`.

    `source` is the origin of the text and `source_revision` its version, None if it has none. `preparation` (seed,
    validation fraction, ...) and `packages` (versions) determine the content of the shards: with the source they
    reproduce the folder. `tokenizer_sha256` is the checksum of tokenizer.json and `end_of_text_token` its token
    `end_of_text`; None in folders of earlier versions.
    """

    tokenizer: str
    vocab_size: int
    end_of_text: int
    splits: dict[str, SplitMeta]
    source: str
    source_revision: str | None = None
    end_of_text_token: str | None = None
    tokenizer_sha256: str | None = None
    preparation: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)


def write_meta(folder: str | Path, meta: DataMeta) -> None:
    """Write `meta.json` atomically. Call it last: with it the data folder counts as complete."""
    check_vocab_size(meta.vocab_size, f"tokenizer {meta.tokenizer}")
    content = json.dumps({"format_version": META_VERSION, **asdict(meta)}, indent=2, ensure_ascii=False) + "\n"
    with whole_file(Path(folder) / META_FILE) as path:
        path.write_bytes(content.encode(errors="backslashreplace"))  # names of files that are not UTF-8


def read_meta(folder: str | Path) -> DataMeta:
    """Read and check `meta.json`. Raises UserError if it or a key in it is missing or broken."""
    path = Path(folder) / META_FILE
    try:
        content = read_json(path, PREPARE_AGAIN)
    except FileNotFoundError:
        if path.with_name(UNFINISHED_FOLDER).is_dir():
            raise UserError(
                f"{path} is missing: the preparation of this data folder has not finished. Run the command that "
                "began it again: it resumes."
            ) from None
        if path.with_name(PART_FILE).exists():
            raise UserError(
                f"{path} is missing: this folder is one part of a preparation that several machines share. Put all "
                f"parts into one folder and join them: python -m data_prep.openwebtext --out {path.parent.parent} "
                "--merge"
            ) from None
        raise UserError(
            f"{path} is missing, so the preparation of this data folder was never finished. {PREPARE_AGAIN}"
        ) from None
    version = from_json(dict[str, Any], content, str(path)).get("format_version")
    if from_json(int, version, f"{path}: format_version") != META_VERSION:
        raise UserError(
            f"{path}: format_version is {version}, this version of hgpt reads {META_VERSION}. "
            "Use the version of hgpt that wrote the folder, or prepare the data again."
        )
    meta = from_json(DataMeta, content, str(path))
    for name, split in meta.splits.items():
        _check_split(split, f"{path}: splits.{name}")
    check_vocab_size(meta.vocab_size, f"{path}: vocab_size")
    if not 0 <= meta.end_of_text < meta.vocab_size:
        raise UserError(
            f"{path}: end_of_text must be a token of the vocabulary, 0 to {meta.vocab_size - 1}, "
            f"not {meta.end_of_text}. {PREPARE_AGAIN}"
        )
    return meta


def _check_split(split: SplitMeta, where: str) -> None:
    names = [record.file for record in split.shards]
    for name in names:
        # A file name only: meta.json may come from elsewhere and must not point outside its folder.
        if Path(name).name != name:
            raise UserError(f"{where}: the shard {name!r} is not a plain file name. {PREPARE_AGAIN}")
        if names.count(name) > 1:
            raise UserError(f"{where}: the shard {name!r} is named twice. {PREPARE_AGAIN}")
    in_shards = sum(record.tokens for record in split.shards)
    if split.tokens != in_shards:
        raise UserError(f"{where}: tokens is {split.tokens}, but its shards sum to {in_shards}. {PREPARE_AGAIN}")


_KINDS = {int: "an integer", str: "a string", dict: "a table", list: "a list"}


def from_json(kind: Any, value: Any, where: str, way_out: str = PREPARE_AGAIN) -> Any:
    """`value`, read from JSON, as `kind`: int ≥ 0, str, optional, tuple, list, dict, or a dataclass of these.

    Raises UserError for another value; `where` names its place.
    """
    arguments = get_args(kind)
    if type(None) in arguments:
        return None if value is None else from_json(arguments[0], value, where, way_out)
    if kind is Any:
        return value
    made = get_origin(kind) or kind
    wanted = dict if is_dataclass(kind) else list if made is tuple else made
    if not isinstance(value, wanted) or isinstance(value, bool):
        found = "missing" if value is None else repr(value)
        raise UserError(f"{where} must be {_KINDS[wanted]}, but is {found}. {way_out}")
    if isinstance(value, int) and value < 0:
        raise UserError(f"{where} must not be negative, but is {value}. {way_out}")
    if isinstance(value, str):
        return value.encode(errors="replace").decode()  # without lone surrogates, which no file takes
    if isinstance(value, list):
        return made(from_json(arguments[0], part, where, way_out) for part in value)
    if isinstance(value, dict) and arguments:
        return {name: from_json(arguments[1], part, f"{where}.{name}", way_out) for name, part in value.items()}
    if isinstance(value, dict):
        named = ((part.name, part.type) for part in fields(kind))
        return kind(**{name: from_json(of, value.get(name), f"{where}: {name}", way_out) for name, of in named})
    return value


# ------------------------------------------------------------------------------------------------------------
# Writing


def shard_name(split: str, number: int) -> str:
    """The file name of a shard that `ShardWriter` writes; `number` counts from 0 in each split."""
    return f"{split}_{number:06d}.bin"


class ShardWriter:
    """Writes one split as shards of `tokens_per_shard` tokens of type `dtype`, the last one shorter.

    A shard is written under a temporary name, flushed to the disk and renamed, so a file with a shard's name is
    complete. If the context ends by an exception, the temporary file stays.

    To resume, pass as `finished` the records of the complete shards, in order, and as `unfinished` the number of tokens
    to keep of the next one. Later tokens and later shards are deleted.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        tokens_per_shard: int = TOKENS_PER_SHARD,
        finished: Sequence[ShardRecord] = (),
        unfinished: int = 0,
        dtype: np.dtype = UINT16,
    ) -> None:
        if tokens_per_shard < 1:
            raise UserError(f"tokens_per_shard must be at least 1, not {tokens_per_shard}.")
        self.folder = Path(folder)
        self.split = split
        self.tokens_per_shard = tokens_per_shard
        self.records = list(finished)
        self.unfinished = unfinished
        self.dtype = dtype
        self._file: BinaryIO | None = None
        if finished or unfinished:
            self._reopen_shard()

    @property
    def tokens(self) -> int:
        return sum(record.tokens for record in self.records) + self.unfinished

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with suppress(OSError):  # on a full disk the buffer cannot be written
                self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Append `tokens`, a one-dimensional integer array with values that fit `dtype`."""
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be a 1-D integer array, not {tokens.ndim}-D of dtype {tokens.dtype}")
        if (
            tokens.dtype != self.dtype
            and tokens.size
            and not 0 <= tokens.min() <= tokens.max() <= np.iinfo(self.dtype).max
        ):
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}")
        tokens = np.ascontiguousarray(tokens, dtype=self.dtype)
        while tokens.size:
            if self._file is None:
                self._file = open(partial_name(self._path()), "wb")  # noqa: SIM115
                self._file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [self.tokens_per_shard - self.unfinished])
            self._file.write(part.data)
            self.unfinished += part.size
            if self.unfinished == self.tokens_per_shard:
                self._finish_shard()

    def flush(self) -> None:
        """Flush all written tokens to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            sync(self.folder)

    def close(self) -> tuple[ShardRecord, ...]:
        """Finish the last shard; returns the records of all shards, for `SplitMeta.shards`. Idempotent."""
        if self._file is not None:
            self._finish_shard()
        return tuple(self.records)

    def _path(self) -> Path:
        return self.folder / shard_name(self.split, len(self.records))

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(shard_header(self.unfinished, self.dtype))
        self._file.close()
        self._file = None
        path = self._path()
        # The header, which holds the number of tokens, is written last: compute the checksum from the file.
        record = ShardRecord(file=path.name, tokens=self.unfinished, sha256=sha256(partial_name(path)))
        publish(partial_name(path), path)
        self.records.append(record)
        self.unfinished = 0

    def _reopen_shard(self) -> None:
        for record in self.records:
            check_shard(self.folder / record.file, record.tokens, self.dtype)
        if self.unfinished:
            partial = partial_name(self._path())
            if self._path().exists():  # it was finished after `unfinished` was saved
                os.replace(self._path(), partial)
            size = HEADER_BYTES + self.unfinished * self.dtype.itemsize
            if not partial.exists() or partial.stat().st_size < size:
                raise UserError(f"{partial} is missing or cut short. {PREPARE_AGAIN}")
            os.truncate(partial, size)
            self._file = open(partial, "r+b")  # noqa: SIM115
            self._file.seek(size)
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if path.name not in {record.file for record in self.records}:
                path.unlink()


def shard_header(tokens: int, dtype: np.dtype = UINT16) -> bytes:
    """The first 1024 bytes of a shard of `tokens` tokens."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = *HEADERS[dtype], tokens
    return header.tobytes()


# ------------------------------------------------------------------------------------------------------------
# Reading


class ShardFile(NamedTuple):
    """A shard on disk: bytes of its header, number and type of its tokens."""

    path: Path
    header: int
    tokens: int
    dtype: np.dtype


class TokenShards:
    """The tokens of one split as one stream, the concatenation of its shards, read from disk on demand.

    `len(shards)` is the number of tokens, `read(start, stop)` a slice of the stream. Make it by `open`. It may be
    pickled, forked, and read by several threads; each process opens the files itself.

    Tokens are read by `pread`. A memory map is no faster, its pages count as resident memory (after an epoch the whole
    data set), and a file that is truncated under a map kills the process by SIGBUS.
    """

    def __init__(
        self, folder: Path, split: str, files: list[ShardFile], vocab_size: int, meta: DataMeta | None
    ) -> None:
        """`files`: the shards in order. Use `open`, which checks them."""
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        self.meta = meta
        self.end_of_text = None if meta is None else meta.end_of_text
        self.files = files
        self._starts = [0]  # position in the stream where each shard starts, and the length of the stream
        for file in files:
            self._starts.append(self._starts[-1] + file.tokens)
        self._open_files: dict[int, BinaryIO] = {}

    @classmethod
    def open(cls, folder: str | Path, split: str, vocab_size: int | None = None) -> "TokenShards":
        """Open a split after cheap checks: header, file size and `meta.json` of every shard must agree.

        `vocab_size` is required for a folder with neither `meta.json` nor a tokenizer; otherwise it may be None and
        must not differ from that of `meta.json` or `meta.pkl`. Without `meta.json`, `end_of_text` and `meta` are None.
        `verify` reads every byte. Raises UserError with the file, the rule and the way out.
        """
        folder = Path(folder)
        if vocab_size is not None:
            check_vocab_size(vocab_size, "vocab_size")
        source = None if os.path.isfile(folder / META_FILE) else tokenizer_file(folder)
        if source is not None:
            known = max(token_ids(source).values()) + 1
            if source.name == CHARACTERS_FILE and vocab_size not in (None, known):
                raise UserError(
                    f"vocab_size {vocab_size} does not match {source}, which has {known} characters. Leave the setting "
                    f"out, or rename {CHARACTERS_FILE} if the tokens are not those characters."
                )
            vocab_size = vocab_size or known
        meta, files = _locate(folder, split, token_dtype(vocab_size or 1))
        if meta is not None and vocab_size not in (None, meta.vocab_size):
            raise UserError(
                f"vocab_size {vocab_size} does not match {folder / META_FILE}, whose tokenizer "
                f"{meta.tokenizer} has {meta.vocab_size} tokens. Leave the setting out, or use data prepared "
                "with the tokenizer it was meant for."
            )
        vocab_size = vocab_size if meta is None else meta.vocab_size
        if vocab_size is None:
            raise UserError(
                f"{folder} has no {META_FILE} (a bare nanoGPT folder, or shards of other tools), so its vocabulary "
                "size is unknown: state vocab_size (50257 for GPT-2's tokenizer), or put the tokenizer's "
                f"{TOKENIZER_FILE} (of nanoGPT's characters, {CHARACTERS_FILE}) into the folder."
            )
        return cls(folder, split, files, vocab_size, meta)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """tokens[start:stop] of the logical stream as int64, 0 ≤ start ≤ stop ≤ len.

        Raises UserError, with file and position, for a token outside the vocabulary, which would be an illegal memory
        access on a GPU.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens[{start}:{stop}] of a stream of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < out.size:
            first = start + done - self._starts[shard]
            part = self._read_shard(shard, first, min(self.files[shard].tokens - first, out.size - done))
            if part.max() >= self.vocab_size:
                raise UserError(beyond_vocabulary(self.files[shard].path, part, first, self.vocab_size))
            out[done : done + part.size] = part
            done += part.size
            shard += 1
        return out

    def chunks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """The whole stream in order, as int64 arrays of at most `size` tokens."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def _read_shard(self, shard: int, first: int, count: int) -> np.ndarray:
        """`count` tokens of shard number `shard` from token `first` on, in the type of the file."""
        path, header, _, dtype = self.files[shard]
        file = self._open_files.get(shard)
        try:
            if file is None:
                # A data set may have more shards than a process may hold open: drop the oldest file object, which
                # closes its file once no thread reads from it.
                for oldest in list(self._open_files)[: -MAX_OPEN_FILES + 1]:
                    self._open_files.pop(oldest, None)
                file = self._open_files.setdefault(shard, open(path, "rb", buffering=0))  # noqa: SIM115
            content = os.pread(file.fileno(), count * dtype.itemsize, header + first * dtype.itemsize)
        except OSError as error:
            raise UserError(f"{path} can no longer be read: {error.strerror}. Copy it again.") from error
        if len(content) < count * dtype.itemsize:
            raise UserError(
                f"{path} ends before token {first + count}: it was cut short after it was opened. Copy it again from "
                "its origin."
            )
        return np.frombuffer(content, dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}


def fingerprint(splits: Sequence[TokenShards], *, whole: bool) -> str:
    """Identifies data, as words: `same_data` compares the words that two fingerprints share.

    With meta.json: the SHA-256 of the shards' checksums and, if there is a tokenizer, that of its checksum with the
    vocabulary's size and end-of-text. Other folders have no checksums: the SHA-256 of the splits' lengths, that of 256
    blocks of 4 KB from each shard, and, if `whole`, that of the shards.
    """
    parts = [len(s) if s.meta is None else [record.sha256 for record in s.meta.splits[s.split].shards] for s in splits]
    words = [hashlib.sha256(json.dumps(parts).encode())]
    metas = [s.meta for s in splits if s.meta is not None and s.meta.tokenizer_sha256 is not None]
    if metas:
        tokenizers = [[meta.tokenizer_sha256, meta.vocab_size, meta.end_of_text] for meta in metas]
        words.append(hashlib.sha256(json.dumps(tokenizers).encode()))
    files = [file.path for shards in splits if shards.meta is None for file in shards.files]
    if files:
        words.append(hashlib.sha256())
        for path in files:
            with open(path, "rb") as file:
                last = max(0, path.stat().st_size - 4096)
                for number in range(256):
                    file.seek(last * number // 255)
                    words[-1].update(file.read(4096))
    if files and whole:
        words.append(hashlib.sha256("".join(map(sha256, files)).encode()))
    return " ".join(word.hexdigest() for word in words)


def same_data(one: str, other: str) -> bool:
    """Whether two fingerprints agree in their common words: earlier versions and other checks give fewer words."""
    return all(a == b for a, b in zip(one.split(), other.split(), strict=False))


def beyond_vocabulary(path: Path, part: np.ndarray, start: int, vocab_size: int) -> str:
    """The message about the first token of `part` ≥ vocab_size; `part` starts at token `start` of `path`."""
    index = int(np.argmax(part >= vocab_size))
    return (
        f"{path}: token {int(part[index])} at position {start + index} is beyond the vocabulary of "
        f"{vocab_size}. The file is damaged or was written with another tokenizer: use the vocabulary of "
        "that tokenizer, or prepare the data again."
    )


def _locate(folder: Path, split: str, of_bare: np.dtype) -> tuple[DataMeta | None, list[ShardFile]]:
    """The content of `meta.json` (None if there is none), and the shards. `of_bare`: type of tokens without header."""
    present = _names_in(folder)
    if META_FILE in present:
        meta = read_meta(folder)
        return meta, _shards_of_meta(folder, split, meta, present)
    bare = folder / f"{split}.bin"
    if bare.name in present:
        return None, [_bare_shard(bare, of_bare)]
    # PREFIX_SPLIT.bin or PREFIX_SPLIT_NUMBER.bin. Shards of `ShardWriter` have no prefix.
    matches = [re.fullmatch(rf"[^.].*_({'|'.join(SPLITS)})(_\d+)?\.bin", name) for name in sorted(present)]
    others = [(match[1], folder / match[0]) for match in matches if match]
    if others:
        return None, _foreign_shards(folder, split, others)
    if present & BARE:
        raise UserError(
            f"data folder {folder} has no {bare.name}. A nanoGPT folder has train.bin and val.bin: "
            "put the missing one next to the other."
        )
    ours = rf"({'|'.join(SPLITS)})_\d+\.bin|{PART_FILE}|{re.escape(UNFINISHED_FOLDER)}"
    if any(re.fullmatch(ours, name) for name in present):
        read_meta(folder)  # raises UserError: meta.json is missing
    raise UserError(
        f"data folder {folder} holds no token shards (train_*.bin and val_*.bin, or nanoGPT's train.bin "
        f"and val.bin). {_prepare(folder) if present else _prepare(None, folder)}"
    )


def _names_in(folder: Path) -> set[str]:
    try:
        if not folder.exists():
            raise UserError(
                f"data folder {folder} does not exist. {_prepare(None, folder)}, or, for the corpus of the quickstart, "
                f"python -m data_prep.python_docs --out {folder}"
            )
        if not folder.is_dir():
            raise UserError(f"data folder {folder} is not a folder. {_prepare(folder)}")
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"data folder {folder} cannot be read: {error.strerror}. Change its permissions.") from error


def _shards_of_meta(folder: Path, split: str, meta: DataMeta, present: set[str]) -> list[ShardFile]:
    """The shards that meta.json names. Raises UserError with a line for each damaged one."""
    if meta.tokenizer_sha256 is not None or (folder / TOKENIZER_FILE).exists():
        check_tokenizer_file(
            folder / TOKENIZER_FILE, meta.vocab_size, meta.end_of_text_token, meta.end_of_text, meta.tokenizer_sha256
        )
    records = meta.splits[split].shards if split in meta.splits else ()
    if not records:
        raise UserError(
            f"data folder {folder} has no shards of the split {split!r}; {META_FILE} names "
            f"{', '.join(sorted(meta.splits)) or 'none'}. {PREPARE_AGAIN}"
        )
    strangers = {name for name in present if name.startswith(f"{split}_") and name.endswith(".bin")}
    strangers -= {record.file for record in records}
    damage = []
    if strangers:
        damage.append(
            f"{folder} holds {', '.join(sorted(strangers))}, which {META_FILE} does not name: files of two "
            f"data sets are mixed up. Remove the ones that do not belong. Otherwise: {PREPARE_AGAIN}"
        )
    files = []
    for record in records:
        try:
            files.append(check_shard(folder / record.file, record.tokens, token_dtype(meta.vocab_size)))
        except UserError as error:
            damage.append(str(error))
    if damage:
        raise UserError("\n".join(damage))
    return files


def _foreign_shards(folder: Path, split: str, found: list[tuple[str, Path]]) -> list[ShardFile]:
    """The shards of `split` among the shards of other tools, (split, path)."""
    splits = dict.fromkeys(side for side, _ in found)
    if split not in splits:
        raise UserError(
            f"data folder {folder} holds shards of the split {' and '.join(splits)} only, and none with {split!r} "
            f"in its name (like fineweb_{split}_000000.bin). Put them next to the others."
        )
    files = [(side, check_shard(path)) for side, path in found]
    types = {file.dtype: f"{file.path.name} of {file.dtype.name}" for _, file in files}
    if len(types) > 1:
        raise UserError(
            f"data folder {folder} mixes shards of two types, {' and '.join(types.values())}: they come from "
            "different tokenizers. Give the shards of each tokenizer their own folder."
        )
    return [file for side, file in files if side == split]


def _prepare(text: Path | None, out: Path | str = "NEW_FOLDER") -> str:
    """Advice to prepare the files in `text` into `out`, which must be new or empty."""
    return f"Prepare data{_WHERE} with: python -m data_prep.documents --out {out} --tokenizer gpt2 {text or 'FILES...'}"


def check_shard(path: Path, tokens: int | None = None, dtype: np.dtype | None = None) -> ShardFile:
    """Check a shard with a header.

    `tokens`, `dtype`: from meta.json; None for a shard of another tool, which hgpt cannot prepare again.
    """
    way_out = f"Copy it again, or: {PREPARE_AGAIN}"
    if tokens is None:
        way_out = "Convert it to llm.c's format, or prepare its text with data_prep.documents."
    size, content = _beginning(path, way_out)
    header = np.frombuffer(content[:HEADER_BYTES].ljust(12, b"\0"), dtype="<i4", count=3)
    magic, version, count = (int(value) for value in header)
    known = {number: (kind, latest) for kind, (number, latest) in HEADERS.items()}
    if magic not in known:
        like = next((f", as {name} does" for start, name in FORMATS.items() if content.startswith(start)), "")
        raise UserError(
            f"{path} is no token shard: it starts with {magic}{like}, not with the magic number "
            f"{' or '.join(f'{number} ({kind.name})' for kind, (number, _) in HEADERS.items())}. {way_out}"
        )
    found, latest = known[magic]
    if dtype not in (None, found):
        raise UserError(
            f"{path} holds {found.name} tokens, and the vocabulary of its data takes {dtype}: they belong to different "
            f"preparations. {way_out}"
        )
    if size < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size} bytes, less than the header's {HEADER_BYTES}. {way_out}")
    if version != latest:
        raise UserError(
            f"{path} has version {version} of the shard format, this version of hgpt reads {latest}. {way_out}"
        )
    if count < 1:
        raise UserError(f"{path}: its header says {count} tokens; a shard holds at least one. {way_out}")
    if tokens is not None and count != tokens:
        raise UserError(
            f"{path}: its header says {count} tokens, {META_FILE} says {tokens}: they belong to different "
            f"preparations. {way_out}"
        )
    expected = HEADER_BYTES + count * found.itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(f"{path} is {state}: {size} bytes, where {count} tokens take {expected}. {way_out}")
    return ShardFile(path, HEADER_BYTES, count, found)


def _beginning(path: Path, way_out: str) -> tuple[int, bytes]:
    """The size of a file, and its first bytes."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # opening a FIFO would block
            raise UserError(f"{path} is not a file. {way_out}")
        with open(path, "rb") as file:
            return state.st_size, file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, but {META_FILE} names it. {way_out}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Change its permissions, or: {way_out}") from error


def _bare_shard(path: Path, dtype: np.dtype) -> ShardFile:
    """nanoGPT's train.bin or val.bin, tokens without a header."""
    size, content = _beginning(path, "Copy it again from its origin.")
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f"{path} is {'empty' if size == 0 else 'truncated'}: {size} bytes, where {dtype.name} tokens take a "
            f"multiple of {dtype.itemsize}. Copy it again from its origin."
        )
    if content.startswith(tuple(magic.to_bytes(4, "little") for magic, _ in HEADERS.values())):
        raise UserError(
            f"{path} has llm.c's header, which nanoGPT's {path.name} does not have. Shards of other tools are "
            f"recognised by a prefix: rename it to data_{path.stem}_000000.bin."
        )
    return ShardFile(path, 0, size // dtype.itemsize, dtype)
