"""GPT-2 as in nanoGPT (pre-norm blocks, learned positions), as a transformers model with either head.

The trunk computes the same as `transformers.GPT2Model` (a test compares them), with nanoGPT's parameter names and
layouts.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hgpt import HGPTConfig
from .distances import Distance
from .heads import HarmonicHead, SoftmaxHead

# transformers 5.24 renamed past_key_values to cache, as an argument of `forward` and as a field of its outputs.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# The versions that the test suite passes with (the bounds in pyproject.toml); written into an export's config.json.
TRANSFORMERS_TESTED = ">=5.17,<5.25"

# Keywords that transformers 5.17 to 5.24 passes to a text decoder besides the parameters of `forward`. Any other
# keyword is an error, because ignoring it may change the result.
FOR_ATTENTION = {  # passed on to the attention function
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # rows packed for FlashAttention
    *("max_seqlen_q", "max_seqlen_k"),  # the same in `generate_batch` of transformers 5.17
    *("block_table", "read_index", "write_index"),  # places of keys and values in the cache of `generate_batch`
    "is_causal",
}
WITHOUT_EFFECT = {
    "cache_position",  # redundant: the cache and position_ids contain it
    "seq_idx",  # of packed rows, for state-space layers; attention reads position_ids
    *("logits_indices", "logits_processor_args"),  # `generate_batch` uses them after the forward pass
}


def attention_keywords(keywords: dict[str, Any], attention_mask: Any) -> dict[str, Any]:
    """The keywords for the attention function, out of `forward`'s **kwargs.

    Raises:
        ValueError: `is_causal=False` without a 4-dimensional mask.
        TypeError: a keyword in neither FOR_ATTENTION nor WITHOUT_EFFECT, unless its value is None or False.
    """
    known = FOR_ATTENTION | WITHOUT_EFFECT
    unknown = sorted(k for k, value in keywords.items() if k not in known and value is not None and value is not False)
    if unknown:
        raise TypeError(
            f"HGPT's forward does not know {', '.join(unknown)}, which may change the result: do not pass it. If "
            "transformers passes it, use a version that this code was tested with (config.json: transformers_tested)"
        )
    if keywords.get("is_causal") is False and (attention_mask is None or attention_mask.ndim != 4):
        raise ValueError("is_causal=False needs a 4-dimensional attention_mask: this is a causal language model")
    return {name: value for name, value in keywords.items() if name in FOR_ATTENTION}


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, given under either of its two names; ValueError if under both."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: pass one of them")
    return past_key_values if cache is None else cache


def named_cache(cache: Any) -> dict[str, Any]:
    """The cache under its name in the installed transformers, as a keyword argument."""
    return {CACHE: cache}


def count_attended(attention_mask: Tensor | None, past: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Positions, (B, T) or (1, T) int64, of T = `length` tokens after `past` earlier ones; padding is not counted."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    return (torch.arange(length, device=device) + past)[None]


def packed(position_ids: Tensor | None, past: int | Tensor, n_positions: int) -> bool:
    """Whether a row longer than the context may be several packed texts: no position exceeds the context."""
    if position_ids is None or not isinstance(past, int) or past > 0:
        return False
    if torch.compiler.is_compiling() or (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True  # the positions cannot be read now
    return int(position_ids.max()) < n_positions


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q kᵀ + mask) v, (B, H, T, D/H) → (B, T, H, D/H), and the weights (B, H, T, S)."""
    scores = scaling * query @ key.transpose(-1, -2)  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class ResidualProjection(nn.Linear):
    """A projection that adds to the residual stream; a model has 2 · n_layer of them."""


class HGPTAttention(nn.Module):
    """Causal multi-head self-attention through transformers' attention interface."""

    is_causal = True

    def __init__(self, config: HGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = ResidualProjection(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        B, T, D = hidden.shape
        heads = (B, T, -1, self.head_dim)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(hidden).split(D, dim=2))
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        elif cache is not None:  # of `generate_batch`; before 5.24 the attention function updates it
            kwargs["cache"] = cache
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        out = self.c_proj(mixed.reshape(B, T, D))
        return F.dropout(out, self.config.dropout, self.training), weights


class HGPTMLP(nn.Module):
    """The MLP of a block: linear D → 4 D, activation function, linear 4 D → D, dropout."""

    def __init__(self, config: HGPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = ResidualProjection(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.act(self.c_fc(hidden))), self.dropout, self.training)


class HGPTBlock(GradientCheckpointingLayer):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: HGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = HGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = HGPTMLP(config)

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attn(self.ln_1(hidden), attention_mask, cache, **kwargs)
        hidden = hidden + mixed
        return hidden + self.mlp(self.ln_2(hidden)), weights


class Gain(nn.Module):
    """x = g ⊙ h with a learned g (D,): replaces the final norm with final_norm = "none"."""

    bias = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


class HGPTBlocks(nn.ModuleList):
    """The blocks, one after the other; a module of its own, so that torch.compile can compile all of them at once."""

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        output_hidden_states: bool | None = False,
        output_attentions: bool | None = False,
        n_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
        """The last hidden states and, if requested, those before each block and each block's attention weights.

        `n_layer`: run only the first `n_layer` blocks.
        """
        all_hidden: tuple[Tensor, ...] = ()
        all_weights: tuple[Any, ...] = ()  # None where the attention implementation gives none
        for block in islice(self, n_layer):
            if output_hidden_states:
                all_hidden += (hidden,)
            hidden, weights = block(hidden, attention_mask, cache, **kwargs)
            if output_attentions:
                all_weights += (weights,)
        return hidden, all_hidden, all_weights


class HGPTPreTrainedModel(PreTrainedModel):
    """Initialisation and transformers' declarations, shared by the trunk and the language model."""

    config_class = HGPTConfig
    config: HGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HGPTBlock"]  # noqa: RUF012 (transformers' own declaration)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    trunk_class: str | None = "modeling_hgpt.HGPTModel"  # what AutoModel makes of an export

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initial values (its paper, §2.3) for the parameters that `module` itself owns.

        The configuration has separate settings for the centres and for the gain of the final norm. transformers' `init`
        functions do not change parameters that were loaded from a file.

        Raises:
            TypeError: a module whose parameters have no initialisation here.
        """
        config, trunk = self.config, self.base_model
        if isinstance(module, nn.Linear | nn.Embedding | HarmonicHead | SoftmaxHead):
            std = config.initializer_range
            if isinstance(module, ResidualProjection):
                std /= math.sqrt(2 * config.n_layer)
            elif isinstance(module, HarmonicHead | SoftmaxHead) or (module is trunk.wte and config.tie_word_embeddings):
                std = config.centre_init_std
            init.normal_(module.weight, std=std)
            if isinstance(module, HarmonicHead) and module.log_exponent is not None:
                init.constant_(module.log_exponent, math.log(module.initial_exponent))
            if isinstance(module, HarmonicHead | SoftmaxHead) and module.log_weight is not None:
                init.zeros_(module.log_weight)
        elif isinstance(module, Distance):
            module.reset_parameters()  # transformers guards torch.nn.init in the same way
        elif isinstance(module, nn.LayerNorm | Gain):
            init.constant_(module.weight, config.final_norm_gain if module is trunk.ln_f else 1.0)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no initialisation is defined for the parameters of {type(module).__name__}")
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        self.config.transformers_tested = TRANSFORMERS_TESTED
        # transformers enters only the saved class; AutoModel needs an entry for the trunk.
        trunk = {"AutoModel": self.trunk_class} if self.trunk_class else {}
        self.config.auto_map = trunk | (getattr(self.config, "auto_map", None) or {})
        super().save_pretrained(save_directory, *args, **kwargs)


class HGPTModel(HGPTPreTrainedModel):
    """The trunk: token and position embeddings, blocks, final norm or gain."""

    def __init__(self, config: HGPTConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = HGPTBlocks([HGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        if config.final_norm == "none":
            self.ln_f: nn.Module = Gain(config.n_embd)
        else:
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.gradient_checkpointing = False
        self.post_init()

    # As many parameters as transformers' decoders have: its callers pass them by these names and places.
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states after the final norm, (B, T, D).

        Without `position_ids`, positions count attended tokens, so that left padding does not shift them. `cache` is
        the name of `past_key_values` since transformers 5.24. The other arguments are as in any transformers decoder.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; `cache` and `past_key_values` together; a
                sequence longer than `n_positions`; `is_causal=False` without a 4-dimensional `attention_mask`.
            TypeError: an unknown keyword.
        """
        config = self.config
        cache = one_cache(past_key_values, cache)
        kwargs = attention_keywords(kwargs, attention_mask)
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None  # a recomputed block would write to the cache twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=config)

        T = inputs_embeds.shape[1]
        past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        length = past + T if isinstance(past, int) else T  # a static cache counts on the device
        if length > config.n_positions and not packed(position_ids, past, config.n_positions):
            raise ValueError(
                f"the model has {config.n_positions} positions (n_positions), and the sequence has {length} "
                "tokens: shorten the prompt or generate fewer tokens"
            )
        # Before the default positions: with positions but no mask, transformers looks for packed sequences, a sync.
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache(cache if isinstance(cache, Cache) or CACHE == "cache" else None),
        )
        if position_ids is None:
            position_ids = count_attended(attention_mask, past, T, inputs_embeds.device)
        hidden = inputs_embeds + self.wpe(position_ids)  # (B, T, D)
        hidden = F.dropout(hidden, config.dropout, self.training)
        # assistant_early_exit temporarily lowers config.n_layer to draft with the first blocks.
        hidden, all_hidden, all_weights = self.h(
            hidden, mask, cache, output_hidden_states, output_attentions, config.n_layer, **kwargs
        )
        hidden = self.ln_f(hidden)

        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            **named_cache(cache if use_cache else None),
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
            attentions=all_weights if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


@torch.no_grad()
def like_the_first_rows(weight: Tensor, rows: int) -> None:
    """Redraw the rows after the first `rows`, with the mean and the covariance of the first."""
    old = weight[:rows].float()
    mean = old.mean(0)
    noise = torch.randn(max(0, len(weight) - rows), len(old), device=weight.device) / len(old) ** 0.5
    weight[rows:] = (mean + noise @ (old - mean)).to(weight.dtype)


class HGPTForCausalLM(HGPTPreTrainedModel, GenerationMixin):
    """The language model: trunk and head.

    `logits` are the head's over the `vocab_size` tokens, without padding, in float32. With the harmonic head they are
    −n log d_i (plus the learned log-weights, if any), so softmax(logits) is HarMax, and sampling and losses for logits
    work unchanged.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: HGPTConfig) -> None:
        super().__init__(config)
        self.transformer = self._new_trunk()
        self.lm_head = self._new_head(config.padded_vocab_size)
        self.post_init()

    def _new_trunk(self) -> Any:
        return HGPTModel(self.config)

    def _new_head(self, rows: int) -> HarmonicHead | SoftmaxHead:
        config = self.config
        shape: dict[str, Any] = {
            "in_features": config.n_embd,
            "num_classes": min(config.vocab_size, rows),
            "rows": rows,
            "radius": config.radius == "learned",
        }
        if config.head == "softmax":
            return SoftmaxHead(**shape, init_std=config.centre_init_std)
        return HarmonicHead(
            **shape,
            exponent=config.exponent,
            learn_exponent=config.learn_exponent,
            distance=config.distance,
            init_std=config.centre_init_std,
            **config.distance_options,
        )

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if not isinstance(new_embeddings, HarmonicHead | SoftmaxHead):
            raise TypeError(
                f"the output embedding must be a HarmonicHead or a SoftmaxHead, not {type(new_embeddings).__name__}: "
                "a linear layer would compute other logits than this model was trained with"
            )
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As in transformers, but `vocab_size` is the number of tokens, and the rows are padded.

        New centres of a harmonic head are drawn from the normal distribution with the mean and covariance of the old
        ones, whatever `mean_resizing` is. transformers draws them near the mean or near 0, which is near every hidden
        state: they would take much of the probability. New tokens get the smallest existing log-weight.
        """
        if new_num_tokens is None:
            return self.transformer.wte
        if pad_to_multiple_of is not None:
            self.config.pad_vocab_to_multiple_of = pad_to_multiple_of
        old, classes = self.lm_head.log_weight, self.lm_head.num_classes
        embedding = super().resize_token_embeddings(new_num_tokens, self.config.pad_vocab_to_multiple_of, mean_resizing)
        self.config.vocab_size = self.vocab_size = self.lm_head.num_classes = new_num_tokens
        if isinstance(self.lm_head, HarmonicHead):
            like_the_first_rows(self.lm_head.weight, classes)
        if old is not None:
            a = old[:classes].min().detach().repeat(embedding.num_embeddings)
            kept = min(classes, new_num_tokens)
            a[:kept] = old[:kept].detach()
            self.lm_head.log_weight = nn.Parameter(a, requires_grad=old.requires_grad)
        return embedding

    def _get_resized_lm_head(
        self,
        old_lm_head: Any,
        new_num_tokens: int | None = None,
        transposed: bool = False,
        mean_resizing: bool = True,
    ) -> Any:
        rows = nn.Embedding.from_pretrained(old_lm_head.weight.data)
        rows = self._get_resized_embeddings(rows, new_num_tokens, mean_resizing=mean_resizing)
        head = self._new_head(rows.num_embeddings)
        head.weight = nn.Parameter(rows.weight.data)
        head._is_hf_initialized = True  # type: ignore[assignment]  # post_init draws no new weights
        # Take over what does not depend on the number of rows.
        head.label_smoothing = old_lm_head.label_smoothing
        if isinstance(head, HarmonicHead):
            head.metric, head.log_exponent = old_lm_head.metric, old_lm_head.log_exponent
        return head

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but the harmonic head transforms its centres once, not for every token."""
        with self.lm_head.unchanged_centres() if isinstance(self.lm_head, HarmonicHead) else nullcontext():
            return super().generate(*args, **kwargs)

    # As many parameters as transformers' language models have: its callers pass them by these names and places.
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        num_items_in_batch: Tensor | int | None = None,
        loss_only: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, vocab_size) and, with labels, the loss −log p_y.

        Args:
            labels: (B, T), shifted inside: position t is scored on label t + 1. −100 is ignored.
            shift_labels: (B, T), already shifted labels, instead of `labels`. Not a named parameter: transformers'
                Trainer expects parameters with "label" in their name in every evaluation batch.
            num_items_in_batch: divisor of the summed loss; default: the number of labels that are not ignored.
            loss_only: with labels, compute no logits (they are None), so that no (B · T, vocab_size) tensor is
                allocated. Default: true in training mode.
            logits_to_keep: compute logits only of the last `logits_to_keep` positions or of an index tensor; 0: of all.

        The other arguments and the errors are those of `HGPTModel.forward`.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        shift_labels = kwargs.pop("shift_labels", None)
        trunk = self.transformer(
            input_ids,
            cache=one_cache(past_key_values, cache),
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = trunk.last_hidden_state  # (B, T, D)
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = logits = None
        if shift_labels is not None:
            loss = self.lm_head(hidden, shift_labels.to(hidden.device), num_items=num_items_in_batch)
        if loss is None or not (self.training if loss_only is None else loss_only):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])  # (B, T, V)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **named_cache(trunk.get(CACHE)),
            hidden_states=trunk.hidden_states,
            attentions=trunk.attentions,
        )
        return output if return_dict else output.to_tuple()
