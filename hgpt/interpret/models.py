"""Any checkpoint as an object to be measured: harmonic, softmax, or a plain Hugging Face GPT-2."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.utils.logging
import numpy as np
import psutil
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hgpt  # noqa: F401  (registers the model with transformers)
from hgpt.checkpoint import LATEST, MODEL, STATE, checkpoint_step, checkpoints, model_folder
from hgpt.errors import UserError
from hgpt.harmax import squared_distances
from hgpt.heads import HarmonicHead

# Working memory beside the weights: chunks of logits, the vectors of a vocabulary, figures.
WORKING_BYTES = 1_000_000_000


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
        self.source = source
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self._head = model.get_output_embeddings()
        self._trunk = model.base_model
        if self._head is None or not hasattr(self._trunk, "ln_f"):
            raise UserError(
                f"{source.folder} is a {type(model).__name__}; hgpt.interpret reads models of hgpt and GPT-2 models "
                "of transformers"
            )
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
        if "\ufffd" in text and (piece := self._piece_bytes(token)) is not None:
            return piece.decode("utf-8", "backslashreplace")
        return text

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 that each token stands for, (V,), int64; 0 for special tokens, which are no text."""
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

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@contextmanager
def loaded(source: Source, device: torch.device) -> Iterator[LoadedModel]:
    """The model of `source`, in memory while the block lasts.

    Raises UserError for a folder that holds no model or no tokenizer, and when it would not fit into memory.
    """
    check_memory(source)
    load: Any = AutoModelForCausalLM.from_pretrained  # with output_loading_info it returns a pair
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        model, loading = load(source.folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"no model can be loaded from {source.folder}: {_first_line(error)}") from error
    if loading["missing_keys"]:
        raise UserError(
            f"the weights in {source.folder} are incomplete, without {', '.join(sorted(loading['missing_keys']))}; "
            "copy or export the model again"
        )
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
    try:
        yield LoadedModel(source, model, tokenizer, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{device} ran out of memory with {source.folder}; use --device cpu") from error


def check_memory(source: Source) -> None:
    """Raises UserError when the weights in float32, and room to work, are more than the memory that is free."""
    stored = sum(path.stat().st_size for path in Path(source.folder).glob("*.safetensors"))
    stored = stored or sum(path.stat().st_size for path in Path(source.folder).glob("pytorch_model*.bin"))
    needed = stored * _growth(Path(source.folder)) + WORKING_BYTES
    available = psutil.virtual_memory().available
    if stored and needed > available:
        raise UserError(
            f"{source.folder} needs about {needed / 1e9:.1f} GB of memory (its weights in float32 and "
            f"{WORKING_BYTES / 1e9:.0f} GB to work with), and {available / 1e9:.1f} GB are free: close other programs, "
            "or use a machine with more memory"
        )


def _growth(folder: Path) -> int:
    """How much larger the weights become in float32 than they are saved."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return 1
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return 2 if dtype in ("bfloat16", "float16") else 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
