"""HGPTConfig: every setting that decides what the model computes, as a Hugging Face configuration."""

from dataclasses import field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .distances import distance_names, make_distance
from .harmax import resolve_exponent

HEADS = ("harmonic", "softmax")


class InvalidSetting(ValueError):
    """A value that HGPTConfig refuses. `setting` is the name of the field."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


class HGPTConfig(PreTrainedConfig):
    """Configuration of a GPT-2 with a harmonic or a softmax unembedding.

    GPT-2's own settings have the names of `transformers.GPT2Config`; `bias` and `dropout` are nanoGPT's.

    Args:
        vocab_size: number of classes. The embedding has `padded_vocab_size` rows.
        n_positions: context length.
        n_embd: width D.
        n_layer: number of blocks.
        n_head: attention heads.
        bias: whether linear layers and layer norms have biases.
        dropout: dropout probability, after the embedding, in attention and after each block's projections.
        activation_function: "gelu" as in nanoGPT, "gelu_pytorch_tanh" as in GPT-2 (there "gelu_new"), or another that
            transformers knows.
        layer_norm_epsilon: ε of the layer norms.
        scale_attn_by_inverse_layer_idx: divide the attention scores of block i (from 0) by i + 1.
        initializer_range: standard deviation of initial weights, divided by √(2 · n_layer) for the projections that add
            to the residual stream.
        pad_vocab_to_multiple_of: round the embedding's rows up to a multiple of this, for speed; padding has no
            probability.
        tie_word_embeddings: whether the rows of the head (centres, or softmax weights) are the token embedding.
        head: "harmonic" (logits −n log d) or "softmax" (logits w · x).
        distance: d of the harmonic head: "euclidean", "cosine" or "mahalanobis"; or, many times slower (hgpt.plan
            estimates the time), "manhattan", "minkowski", "chebyshev", "canberra", "bray_curtis" or "hamming".
        distance_options: p of "minkowski" (required, 1 or more); temperature of "hamming" (default 1); of "mahalanobis"
            metric, "diagonal", "low_rank" or "full", and rank of "low_rank" (required, at most n_embd).
        exponent: n on the distance d of the harmonic head: a number, "sqrt_dim" (√D), "dim" or a multiple such as
            "2*sqrt_dim"; stored as a number.
        learn_exponent: whether n is trained, starting from `exponent`. The learned n is in the head's weights.
        radius: "none", or "learned": each token has a log-weight a_i that is added to its logit, so with the harmonic
            head p_i ∝ (d_i / ρ_i)^(−n) with a radius ρ_i = exp(a_i / n); with softmax a_i is the bias.
        final_norm: "layer_norm", or "none": the head's x is the last block's output h times a learned gain g per
            coordinate, x = g ⊙ h, so that the norm of x is free.
        final_norm_gain: initial weight of the final norm (g of "none"), which sets the norm of the hidden states.
            Default: 1 with softmax; with the harmonic head 0.05, and 0.4 with final_norm "none".
        centre_init_std: initial standard deviation of the centres (of the token embedding, where tied).
        use_cache: whether generation keeps keys and values.
        bos_token_id: token at the beginning of a text.
        eos_token_id: token at the end of a text.
        pad_token_id: token that fills up a batch.

    Raises:
        InvalidSetting: a value out of range.
    """

    model_type = "hgpt"
    # A list, because transformers' Trainer adds a list to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012 (transformers' own declaration)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    bias: bool = False
    dropout: float = 0.0
    activation_function: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    pad_vocab_to_multiple_of: int = 64
    tie_word_embeddings: bool = True
    head: Literal["harmonic", "softmax"] = "harmonic"
    distance: str = "euclidean"
    distance_options: dict[str, Any] = field(default_factory=dict)
    exponent: float | str = "2*sqrt_dim"
    learn_exponent: bool = False
    radius: Literal["none", "learned"] = "none"
    final_norm: Literal["layer_norm", "none"] = "layer_norm"
    final_norm_gain: float = None  # type: ignore[assignment]  # until __post_init__ chooses a default
    centre_init_std: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.final_norm_gain is None:
            harmonic = 0.05 if self.final_norm == "layer_norm" else 0.4
            self.final_norm_gain = harmonic if self.head == "harmonic" else 1.0
        self._check_ranges()
        try:
            with torch.device("meta"):
                distance = make_distance(self.distance, self.n_embd, **(self.distance_options or {}))
        except ValueError as error:
            known = self.distance in distance_names()
            raise InvalidSetting("distance_options" if known else "distance", str(error)) from error
        self.distance_options = distance.options
        try:
            self.exponent = resolve_exponent(self.exponent, self.trunk_width)
        except ValueError as error:
            raise InvalidSetting("exponent", str(error)) from error
        super().__post_init__(**kwargs)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InvalidSetting(name, f"{name} {rule}; got {getattr(self, name)!r}")

    def _check_ranges(self) -> None:
        require = self._require
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "pad_vocab_to_multiple_of"):
            require(name, getattr(self, name) >= 1, "must be at least 1")
        require("n_embd", self.n_embd % self.n_head == 0, f"must be divisible by n_head = {self.n_head}")
        choices = {"head": HEADS, "radius": ("none", "learned"), "final_norm": ("layer_norm", "none")}
        for name, known in choices.items():
            require(name, getattr(self, name) in known, f"must be one of {', '.join(known)}")
        if self.head == "softmax":
            for name, default in (("distance", "euclidean"), ("learn_exponent", False)):
                require(name, getattr(self, name) == default, 'has no effect with head = "softmax": remove it')
        in_transformers = self.activation_function in ACT2FN
        require("activation_function", in_transformers, "must be one that transformers knows, such as gelu")
        require("dropout", 0 <= self.dropout < 1, "must lie in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range", "final_norm_gain", "centre_init_std"):
            require(name, getattr(self, name) > 0, "must be positive")

    @property
    def head_in_words(self) -> str:
        """The head for a reader: "harmonic head (cosine), n = 35.07, learned radii"."""
        if self.head == "softmax":
            return "softmax head" + (", learned bias" if self.radius == "learned" else "")
        n = f"n {'learned from' if self.learn_exponent else '='} {self.exponent:.4g}"
        return f"harmonic head ({self.distance}), {n}" + (", learned radii" if self.radius == "learned" else "")

    @property
    def trunk_in_words(self) -> str:
        """The trunk's name for a reader."""
        return "GPT-2"

    @property
    def trunk_width(self) -> int:
        """D of the hidden states, and of "sqrt_dim"."""
        return self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head: `vocab_size` rounded up."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of
