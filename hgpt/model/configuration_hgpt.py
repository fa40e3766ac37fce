"""HGPTConfig: everything that decides what the model computes, as a Hugging Face configuration."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .distances import make_distance
from .harmax import resolve_exponent

HEADS = ("harmonic", "softmax")


class HGPTConfig(PreTrainedConfig):
    """Configuration of a GPT-2 with a harmonic or a softmax unembedding.

    GPT-2's own settings have the names of `transformers.GPT2Config`; `bias` and `dropout` are nanoGPT's.

    Args:
        vocab_size: classes that can be predicted. The embedding has `padded_vocab_size` rows.
        pad_vocab_to_multiple_of: rows are rounded up to a multiple of this; padding rows get no probability.
        n_positions, n_embd, n_layer, n_head: context length, width D, blocks, heads.
        bias: whether linear layers and layer norms have biases.
        dropout: probability after the embedding, in attention and after each block's projections.
        activation_function: a name known to transformers. GPT-2's is "gelu_pytorch_tanh" (there called
            "gelu_new"), nanoGPT's "gelu".
        scale_attn_by_inverse_layer_idx: divide the attention scores of block i (from 0) by i + 1.
        initializer_range: standard deviation of initial weights; projections back into the residual stream
            have it divided by √(2 · n_layer).
        tie_word_embeddings: centres (or unembedding rows) are the token embedding.
        head: "harmonic" or "softmax".
        distance: metric of the harmonic head, by default "euclidean"; `hgpt.model.distances` has the list.
        distance_options: options of the distance, such as {"p": 3.0} of "minkowski"; stored with its defaults.
        exponent: n on d of the harmonic head; a number, or "sqrt_dim", "dim", "2*sqrt_dim", … which is stored
            as the number that it stands for.
        learn_exponent: n is trained, starting from `exponent`; what it has become is in the head's weights.
        final_norm_gain: initial value of the final layer norm's weight, which sets the norm of the hidden
            states that the head sees. Default: 0.05 with the harmonic head, 1 with the softmax head.
        centre_init_std: initial standard deviation of the centres (of the token embedding, where tied).

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    model_type = "hgpt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (a list: transformers' Trainer adds one to it)
    attribute_map = {  # noqa: RUF012 (transformers' own declaration)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation_function: str = "gelu",
        layer_norm_epsilon: float = 1e-5,
        scale_attn_by_inverse_layer_idx: bool = False,
        initializer_range: float = 0.02,
        pad_vocab_to_multiple_of: int = 64,
        tie_word_embeddings: bool = True,
        head: str = "harmonic",
        distance: str = "euclidean",
        distance_options: dict[str, Any] | None = None,
        exponent: float | str = "2*sqrt_dim",
        learn_exponent: bool = False,
        final_norm_gain: float | None = None,
        centre_init_std: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("vocab_size", vocab_size),
            ("n_positions", n_positions),
            ("n_embd", n_embd),
            ("n_layer", n_layer),
            ("n_head", n_head),
            ("pad_vocab_to_multiple_of", pad_vocab_to_multiple_of),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if n_embd % n_head:
            raise ValueError(f"n_embd must be divisible by n_head; got n_embd = {n_embd}, n_head = {n_head}")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}")
        with torch.device("meta"):
            metric = make_distance(distance, n_embd, **(distance_options or {}))
        if head == "softmax":
            if distance != "euclidean":
                raise ValueError(f'distance = "{distance}" has no effect with head = "softmax": remove it')
            if learn_exponent:
                raise ValueError('learn_exponent has no effect with head = "softmax": remove it')
        if activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function must be one that transformers knows, such as gelu; got {activation_function!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
        if final_norm_gain is None:
            final_norm_gain = 0.05 if head == "harmonic" else 1.0
        for name, scale in (
            ("layer_norm_epsilon", layer_norm_epsilon),
            ("initializer_range", initializer_range),
            ("final_norm_gain", final_norm_gain),
            ("centre_init_std", centre_init_std),
        ):
            if not scale > 0:
                raise ValueError(f"{name} must be positive; got {scale}")
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.bias = bias
        self.dropout = dropout
        self.activation_function = activation_function
        self.layer_norm_epsilon = layer_norm_epsilon
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.initializer_range = initializer_range
        self.pad_vocab_to_multiple_of = pad_vocab_to_multiple_of
        self.head = head
        self.distance = distance
        self.distance_options = metric.options
        self.exponent = resolve_exponent(exponent, n_embd)
        self.learn_exponent = learn_exponent
        self.final_norm_gain = final_norm_gain
        self.centre_init_std = centre_init_std
        self.use_cache = use_cache
        kwargs |= {
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        super().__init__(**kwargs)

    @property
    def head_in_words(self) -> str:
        """What programs print of the head: "harmonic head (cosine), n = 35.07"."""
        if self.head == "softmax":
            return "softmax head"
        return f"harmonic head ({self.distance}), n {'learnt from' if self.learn_exponent else '='} {self.exponent:.4g}"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head: `vocab_size` rounded up."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of
