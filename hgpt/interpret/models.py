"""Any checkpoint as an object to be measured: harmonic, softmax, or a plain Hugging Face GPT-2."""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub.utils.logging
import numpy as np
import psutil
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hgpt  # noqa: F401  (registers the model with transformers)
from hgpt.errors import UserError
from hgpt.model.harmax import squared_distances
from hgpt.model.heads import HarmonicHead
from hgpt.run.checkpoint import LATEST, MODEL, STATE, checkpoint_step, checkpoints, model_folder

# Working memory beside the weights: chunks of logits, the vectors of a vocabulary, figures.
WORKING_BYTES = 1_000_000_000
# Others have an ln_f too (GPT-Neo, Bloom, Falcon), and other trunks, heads and names for the same settings.
MODEL_TYPES = ("gpt2", "hgpt")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is, and what its report calls it.

    `folder` is the exported model, or the id of one on the hub; `run` the run folder it belongs to and `step` its step,
    where they are known.
    """

    label: str
    folder: str
    run: Path | None = None
    step: int | None = None
    tokens_seen: int | None = None


def find_sources(paths: list[str]) -> list[Source]:
    """The models that the arguments of the command line name, each with a label of its own.

    Raises UserError for a path that is no model and for one that is named twice.
    """
    found = [_find(path) for path in paths]
    folders = [source.folder for source in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice; name each model once")
    labels = [source.label for source in found]
    return [
        source
        if labels.count(source.label) == 1
        else Source(**{**source.__dict__, "label": f"{source.label} ({path.rstrip('/')})"})
        for source, path in zip(found, paths, strict=True)
    ]


def _find(path: str) -> Source:
    owner = path.split("/")[0]
    # A name on the hub is owner/name or name. runs/ is where train.py writes: a mistyped run must not become the
    # download of a stranger's model.
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and owner != "runs" and not Path(owner).exists():
        return Source(label=path, folder=path)
    folder = model_folder(path)
    inside = folder.resolve()
    run = inside.parents[2] if inside.name == MODEL and inside.parent.name.startswith("step_") else None
    state = _state(inside.parent)
    name = run.name if run is not None else inside.name
    is_run = run is not None and Path(path).resolve() in (run, run / LATEST, (run / LATEST).resolve())
    return Source(
        label=name if is_run or run is None else f"{name} step {checkpoint_step(inside.parent)}",
        folder=str(folder),
        run=run,
        step=state.get("step"),
        tokens_seen=state.get("tokens"),
    )


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE).read_bytes())
    except (OSError, ValueError):
        return {}


def run_checkpoints(source: Source) -> list[Source]:
    """The checkpoints that the run of `source` has kept up to its own step, by rising step; none without a run."""
    if source.run is None or source.step is None:
        return []
    return [
        Source(
            label=f"{source.label} step {checkpoint_step(folder)}",
            folder=str(folder / MODEL),
            run=source.run,
            step=checkpoint_step(folder),
            tokens_seen=_state(folder).get("tokens"),
        )
        for folder in checkpoints(source.run)
        if checkpoint_step(folder) <= source.step and (folder / MODEL / "config.json").is_file()
    ]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a model without its weights: the longest sequence, and the tokens that can be predicted.

    `words` are the (token, id) of its tokenizer.
    """

    source: Source
    context: int
    vocab_size: int
    words: frozenset[tuple[str, int]]


def outlines(sources: Sequence[Source]) -> list[Outline]:
    """The outline of each source; equal vocabularies are one object.

    Raises UserError for what is no model of hgpt or GPT-2, or has no tokenizer.
    """
    known: dict[frozenset[tuple[str, int]], frozenset[tuple[str, int]]] = {}
    found = []
    for source in tqdm(sources, desc="configurations", unit="model", disable=None, leave=False):
        config = read_config(source)
        words = frozenset(read_tokenizer(source).get_vocab().items())
        found.append(
            Outline(
                source=source,
                context=int(config.n_positions),
                vocab_size=int(config.vocab_size),
                words=known.setdefault(words, words),
            )
        )
    return found


class LoadedModel:
    """A model in memory, asked in the same way whatever its head.

    Attributes:
        source: where it came from.
        model, tokenizer: of transformers; the model in evaluation mode.
        harmonic: whether its logits are −n log d with a metric of the head's own.
        exponent: n on d, None for a softmax head.
        vocab_size: tokens that can be predicted; rows of padding are never among them.
        context: the longest sequence.
        tied: whether the centres are the rows of the input embedding.
    """

    # Any: transformers' annotations name every kind of model and tokenizer at once.
    def __init__(self, source: Source, model: Any, tokenizer: Any, device: torch.device) -> None:
        _check_kind(source, model.config.model_type, type(model).__name__)
        self.source = source
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self._head = model.get_output_embeddings()
        self._trunk = model.base_model
        self.harmonic = isinstance(self._head, HarmonicHead)
        with torch.no_grad():
            self.exponent = float(self._head.exponent) if isinstance(self._head, HarmonicHead) else None
        self.vocab_size = int(self.model.config.vocab_size)
        self.context = int(self.model.config.n_positions)
        embedding = self.model.get_input_embeddings()
        self.tied = embedding.weight.data_ptr() == self._head.weight.data_ptr()

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def description(self) -> str:
        """The head in words: "harmonic (euclidean), n = 33.9, untied"."""
        tied = "tied" if self.tied else "untied"
        if self.harmonic:
            return f"harmonic ({self._head.distance}), n = {self.exponent:.4g}, {tied}"
        return f"softmax, {tied}"

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_each(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """The tokens of each of many short texts: one call takes a tenth of the time of many."""
        texts = list(dict.fromkeys(texts))
        found = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        return dict(zip(texts, found, strict=True))

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens of a text, (N,), and where each ends in its UTF-8, (N,), in bytes; None if the tokenizer does not
        say."""
        if not self.tokenizer.is_fast:
            return np.array(self.encode(text), dtype=np.int64), None
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(sizes)])  # of each character of the text
        ends = np.array([end for _, end in found.offset_mapping], dtype=np.int64)
        return np.array(found.input_ids, dtype=np.int64), bytes_before[ends]

    def embedding_rows(self) -> np.ndarray:
        """Rows of the input embedding, (V, D), float32."""
        return self.model.get_input_embeddings().weight[: self.vocab_size].detach().float().cpu().numpy()

    def centre_rows(self) -> np.ndarray:
        """The centres, or rows of the unembedding, (V, D), float32."""
        return self._head.weight[: self.vocab_size].detach().float().cpu().numpy()

    @torch.inference_mode()
    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """After the embedding and after each block, the last one after the final norm: layers + 1 of (B, T, D)."""
        output = self._trunk(tokens.to(self.device), output_hidden_states=True, use_cache=False)
        return output.hidden_states

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final layer norm: what makes of a block's output something that the head reads."""
        return self._trunk.ln_f(hidden)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Scores of the tokens, (N, D) → (N, V), float32; x after the final norm."""
        return self._head(x)[..., : self.vocab_size].float()

    @torch.inference_mode()
    def log_distances(self, x: Tensor, logits: Tensor) -> Tensor:
        """log d_i to every centre, (N, D) and (N, V) → (N, V), float32.

        Of a harmonic head −z/n, whatever its metric. A softmax head has no metric; Euclid's is measured for it.
        """
        if self.exponent is not None:
            return -logits / self.exponent
        w = self._head.weight[: self.vocab_size]
        return 0.5 * squared_distances(x.to(w.dtype), w).log().float()

    @torch.inference_mode()
    def distances_from_centre(self, token: int) -> Tensor:
        """From one centre to all of them, (V,): d by the metric of a harmonic head, 1 − cosine for a softmax head."""
        w = self._head.weight[: self.vocab_size].float()
        if isinstance(self._head, HarmonicHead):
            return self._head.distances(w[token : token + 1])[0]
        return 1 - torch.nn.functional.cosine_similarity(w, w[token : token + 1], dim=-1)

    def token_text(self, token: int) -> str:
        """A token as it reads in text, bytes that are no character of their own escaped."""
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" in text and self.byte_level and (piece := self._piece_bytes(token)) is not None:
            return piece.decode("utf-8", "backslashreplace")
        return text

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are pieces of UTF-8, one after the other, as GPT-2's are.

        Those of WordPiece ("##ing") and SentencePiece ("▁the") are not: what a token stands for depends on its place.
        """
        if not self.tokenizer.is_fast:
            return False
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        return "ByteLevel" in [decoder.get("type"), *(part["type"] for part in decoder.get("decoders", []))]

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of UTF-8 that each token stands for, (V,), int64; 0 for special tokens, which are no text.

        None unless the tokenizer is `byte_level`.
        """
        if not self.byte_level:
            return None
        special = set(self.tokenizer.all_special_ids)
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(min(self.vocab_size, len(self.tokenizer))):
            if token not in special:
                piece = self._piece_bytes(token)
                sizes[token] = len(piece if piece is not None else self.tokenizer.decode([token]).encode())
        return sizes

    def _piece_bytes(self, token: int) -> bytes | None:
        """The bytes of a token whose vocabulary is written in GPT-2's way, a character for each byte."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None or not all(character in _BYTE_OF for character in piece):
            return None
        return bytes(_BYTE_OF[character] for character in piece)

    @property
    def unknown(self) -> int | None:
        return self.tokenizer.unk_token_id

    @property
    def end_of_text(self) -> int | None:
        return self.tokenizer.eos_token_id

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@contextmanager
def loaded(source: Source, device: torch.device) -> Iterator[LoadedModel]:
    """The model of `source`, in memory while the block lasts.

    Raises UserError for a folder that holds no model or no tokenizer, and when the memory is not enough: before the
    weights are loaded where that can be foreseen, otherwise when it runs out, inside the block too.
    """
    check_memory(source, read_config(source))
    try:
        model = _read_model(source)
        yield LoadedModel(source, model, read_tokenizer(source), device)
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not _out_of_memory(error):
            raise
        if device.type == "cpu":
            raise UserError(
                f"this machine ran out of memory with {source.folder}: close other programs, lower --tokens, or use a "
                "machine with more memory"
            ) from error
        raise UserError(f"{device} ran out of memory with {source.folder}; use --device cpu") from error


def read_config(source: Source) -> Any:
    """The configuration of `source`; from the hub it is a small download. Raises UserError unless it can be read."""
    _quieten()
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise UserError(f"no model can be loaded from {source.folder}: {_first_line(error)}") from error
    _check_kind(source, config.model_type, (config.architectures or [config.model_type])[0])
    return config


def read_tokenizer(source: Source) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        known = tokenizer.vocab_size > 0  # some classes start empty where they find no file
    except (OSError, ValueError, RuntimeError):
        known = False
    if not known:
        raise UserError(
            f"no tokenizer can be loaded from {source.folder}; put the tokenizer.json and tokenizer_config.json that "
            "the model was trained with beside its config.json"
        )
    return tokenizer


def _read_model(source: Source) -> Any:
    _quieten()
    load: Any = AutoModelForCausalLM.from_pretrained  # with output_loading_info it returns a pair
    try:
        model, loading = load(source.folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if _out_of_memory(error):
            raise
        raise UserError(f"no model can be loaded from {source.folder}: {_first_line(error)}") from error
    if loading["missing_keys"]:
        raise UserError(
            f"the weights in {source.folder} are incomplete, without {', '.join(sorted(loading['missing_keys']))}; "
            "copy or export the model again"
        )
    return model


def _quieten() -> None:
    """transformers' own messages and progress bars, which would break into ours."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def _check_kind(source: Source, model_type: str, name: str) -> None:
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{source.folder} is a {name}; hgpt.interpret reads models of hgpt and GPT-2 models of transformers"
        )


def check_memory(source: Source, config: Any) -> None:
    """Raises UserError when the weights in float32, and room to work, are more than the memory that is free.

    By `config`, so that a model on the hub is refused before it is downloaded.
    """
    make: Any = AutoModelForCausalLM.from_config  # it writes into the configuration
    try:
        with torch.device("meta"):
            weights = 4 * make(copy.deepcopy(config), trust_remote_code=False).num_parameters()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"no model can be loaded from {source.folder}: {_first_line(error)}") from error
    needed = weights + WORKING_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{source.folder} needs about {needed / 1e9:.1f} GB of memory (its weights in float32 and "
            f"{WORKING_BYTES / 1e9:.0f} GB to work with), and {available / 1e9:.1f} GB are free: close other programs, "
            "or use a machine with more memory"
        )


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. On a CPU torch says so in a plain RuntimeError, numpy in a MemoryError."""
    words = r"out of memory|not enough memory|(can't|cannot) allocate memory"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(words, str(error), re.I) is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
