"""Models to be measured (harmonic, softmax, or a GPT-2 of transformers), all with one interface."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hgpt.data.tokenizer import encode, piece_bytes, token_bytes
from hgpt.errors import UserError
from hgpt.hardware import enough_memory
from hgpt.model.harmax import squared_distances
from hgpt.model.harmonized import Backbone, HarmonizedConfig
from hgpt.model.heads import HarmonicHead
from hgpt.run.checkpoint import MODEL, checkpoint_step, checkpoints
from hgpt.source import GPT2_KINDS, Source, find_source

WORKING_BYTES = 1_000_000_000  # besides the weights: blocks of logits, float64 copies of vectors, figures


def find_sources(names: list[str]) -> list[Source]:
    """The models of these names, with distinct labels. Raises UserError for an unknown or repeated model."""
    found = [find_source(name) for name in names]
    folders, labels = [source.folder for source in found], [source.label for source in found]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice; name each model once")
    return [
        source if labels.count(source.label) == 1 else replace(source, label=f"{source.label} ({name.rstrip('/')})")
        for source, name in zip(found, names, strict=True)
    ]


def run_checkpoints(source: Source) -> list[Source]:
    """The checkpoints kept by the run of `source` up to the step of `source`, by rising step; none without a run."""
    if source.run is None or source.step is None:
        return []
    return [
        replace(find_source(str(folder)), label=f"{source.label} step {checkpoint_step(folder)}")
        for folder in checkpoints(source.run)
        if checkpoint_step(folder) <= source.step and (folder / MODEL / "config.json").is_file()
    ]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model without its weights: its context, its number of tokens, and `words`, its tokenizer's (token, id)."""

    source: Source
    context: int
    vocab_size: int
    words: frozenset[tuple[str, int]]


def outlines(sources: Sequence[Source]) -> list[Outline]:
    """The outline of each source; models with equal vocabularies share one set of words.

    Raises UserError for a model that is neither hgpt's nor a GPT-2, or has no tokenizer.
    """
    known: dict[frozenset[tuple[str, int]], frozenset[tuple[str, int]]] = {}
    found = []
    for source in tqdm(sources, desc="configurations", unit="model", disable=None, leave=False):
        config, words = read_config(source), frozenset(source.load_tokenizer().get_vocab().items())
        context, vocab_size = int(config.n_positions), int(config.vocab_size)
        words = known.setdefault(words, words)
        found.append(Outline(source=source, context=context, vocab_size=vocab_size, words=words))
    return found


class LoadedModel:
    """A model in memory: `model`, in evaluation mode, and `tokenizer` of transformers."""

    # Any: transformers' annotations name every kind of model and tokenizer at once.
    def __init__(self, source: Source, model: Any, tokenizer: Any, device: torch.device) -> None:
        _check_kind(source, model.config.model_type, type(model).__name__)
        self.source = source
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self._head = model.get_output_embeddings()
        self._trunk = model.base_model
        self.harmonic = isinstance(self._head, HarmonicHead)  # logits are −n log d
        with torch.no_grad():
            self.exponent = float(self._head.exponent) if self.harmonic else None  # n on d
        self.vocab_size = int(self.model.config.vocab_size)  # without rows of padding
        self.context = int(self.model.config.n_positions)
        embedding = self.model.get_input_embeddings()
        self.tied = embedding.weight.data_ptr() == self._head.weight.data_ptr()

    @property
    def log_weight(self) -> Tensor | None:
        """The learned a_i of the tokens, (V,), float32; None without them."""
        a = getattr(self._head, "log_weight", None)
        return None if a is None else a[: self.vocab_size].detach().float()

    @property
    def parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def description(self) -> str:
        """The head in words: "harmonic (euclidean), n = 33.9, radii, untied"."""
        tied = "tied" if self.tied else "untied"
        weighted = self.log_weight is not None
        if self.harmonic:
            return f"harmonic ({self._head.distance}), n = {self.exponent:.4g}, {'radii, ' if weighted else ''}{tied}"
        return f"softmax, {'bias, ' if weighted else ''}{tied}"

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text, add_special_tokens=False).input_ids

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens of a text, (N,), and the byte of its UTF-8 at which each token ends, (N,).

        The ends are None if the tokenizer has no offsets.
        """
        if not self.tokenizer.is_fast:
            return np.array(self.encode(text), dtype=np.int64), None
        found = encode(self.tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
        bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])  # of each character
        ends = np.array([end for _, end in found.offset_mapping], dtype=np.int64)
        return np.array(found.input_ids, dtype=np.int64), bytes_before[ends]

    def embedding_rows(self) -> np.ndarray:
        """Rows of the input embedding, (V, D), float32."""
        return self.model.get_input_embeddings().weight[: self.vocab_size].detach().float().cpu().numpy()

    def centre_rows(self) -> np.ndarray:
        """The centres, which are the rows of the unembedding, (V, D), float32."""
        return self._head.weight[: self.vocab_size].detach().float().cpu().numpy()

    @torch.inference_mode()
    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Hidden states after the embedding and each block, layers + 1 of (B, T, D); the last after the final norm.

        With a lift the last one has D + 1 coordinates, and the others are padded with a 0.
        """
        output = self._trunk(tokens.to(self.device), output_hidden_states=True, use_cache=False)
        width = output.hidden_states[-1].shape[-1]
        return tuple(torch.nn.functional.pad(h, (0, width - h.shape[-1])) for h in output.hidden_states)

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The final norm of a block's output: the input of the head."""
        if isinstance(self._trunk, Backbone):
            gain: Any = self._trunk.ln_f
            hidden = self._trunk.norm(hidden[..., : gain.weight.shape[-1]])
        return self._trunk.ln_f(hidden)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits of hidden states after the final norm, (N, D) → (N, V), float32."""
        return self._head(x)[..., : self.vocab_size].float()

    @torch.inference_mode()
    def log_distances(self, x: Tensor, logits: Tensor) -> Tensor:
        """log d_i to every centre, (N, D) and (N, V) → (N, V), float32.

        With a harmonic head (a − z)/n, whatever its metric. A softmax head has no metric: the Euclidean one is used.
        """
        if self.exponent is not None:
            return (-logits if self.log_weight is None else self.log_weight - logits) / self.exponent
        w = self._head.weight[: self.vocab_size]
        return 0.5 * squared_distances(x.to(w.dtype), w).log().float()

    @torch.inference_mode()
    def distances_from_centres(self, tokens: Tensor) -> Tensor:
        """From the centres of tokens (T,) to all, (T, V): d by a harmonic head's metric, 1 − cosine for softmax."""
        w = self._head.weight[: self.vocab_size].float()
        if self.harmonic:
            return self._head.distances(w[tokens])[:, : self.vocab_size]
        w = torch.nn.functional.normalize(w)
        return 1 - w[tokens] @ w.T

    def token_text(self, token: int) -> str:
        return token_text(self.tokenizer, token)

    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes of each token, (V,), int64, as `hgpt.data.tokenizer.token_bytes`."""
        return token_bytes(self.tokenizer.backend_tokenizer, self.vocab_size) if self.tokenizer.is_fast else None


def token_text(tokenizer: Any, token: int) -> str:
    r"""The text of a token; bytes that are not a whole character are written as \xe2."""
    text, name = tokenizer.decode([token], clean_up_tokenization_spaces=False), tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" in text and (piece := piece_bytes(name)) is not None:
        return piece.decode("utf-8", "backslashreplace")
    # SentencePiece takes the space from the first word of a text.
    return f" {text}" if (name or "").startswith("▁") and not text.startswith(" ") else text


@contextmanager
def loaded(source: Source, device: torch.device) -> Iterator[LoadedModel]:
    """Load the model of `source` for the duration of the block.

    Raises UserError for a folder without a model or a tokenizer, and when memory runs out, also inside the block.
    """
    read_config(source)
    way_out = "close other programs, lower --tokens, use --device cpu, or a machine with more memory"
    with enough_memory(device, f"{source.folder} and its measures need more; {way_out}"):
        model = source.load_model(torch.float32, WORKING_BYTES)
        yield LoadedModel(source, model, source.load_tokenizer(), device)


def read_config(source: Source) -> Any:
    """The configuration of `source`. Raises UserError unless it can be read and is one of hgpt or GPT-2."""
    config = source.load_config()
    _check_kind(source, config.model_type, (config.architectures or [config.model_type])[0])
    return config


def _check_kind(source: Source, model_type: str, name: str) -> None:
    # GPT-Neo, Bloom and Falcon also have an ln_f, but other blocks, heads and settings.
    if model_type not in (*GPT2_KINDS, HarmonizedConfig.model_type) or name.endswith("ForMaskedLM"):
        raise UserError(
            f"{source.folder} is a {name}; hgpt.interpret reads models of hgpt and GPT-2 models of transformers"
        )
