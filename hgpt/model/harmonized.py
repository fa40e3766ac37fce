"""An hgpt head on any causal or masked language model of transformers: `harmonize(model, exponent=...)`.

Only the model's output embedding changes: it becomes an identity, so `backbone(...).logits` are the hidden states h
(B, T, D). The head's x is g ⊙ h with a learned gain g, because the scale of h does not fit HarMax; models made by
`hgpt.convert` have x = L h + b in D + 1 dimensions instead.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .configuration_hgpt import HGPTConfig, InvalidSetting
from .modeling_hgpt import CACHE, Gain, HGPTForCausalLM, named_cache

HEAD_VERSION = 1  # changes when the meaning of HarmonizedConfig's fields or of the head's weights changes
# Fields of HGPTConfig that the backbone's own configuration sets.
FROM_BACKBONE = (
    *("n_positions", "n_embd", "n_layer", "n_head", "bias", "dropout", "activation_function", "layer_norm_epsilon"),
    *("scale_attn_by_inverse_layer_idx", "initializer_range", "final_norm"),
)


class HarmonizedConfig(HGPTConfig):
    """Configuration of a backbone with an hgpt head; HGPTConfig describes the head's fields.

    Args:
        backbone: the configuration of the language model whose output embedding the head replaces, as an object or as
            a dictionary with its model_type. Its vocab_size is the number of rows of the embedding.
        task: "causal_lm" or "masked_lm": the backbone's kind.
        lift: whether x = L h + b in D + 1 dimensions, instead of x = g ⊙ h.
        head_version: HEAD_VERSION of the code that made the head.

    Raises:
        InvalidSetting: a value out of range; a `head_version` that this code does not know; an encoder-decoder.
    """

    model_type = "hgpt_harmonized"
    has_no_defaults_at_init = True
    backbone: Any = None
    task: Literal["causal_lm", "masked_lm"] = "causal_lm"
    lift: bool = False
    head_version: int = HEAD_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_version not in range(1, HEAD_VERSION + 1):
            raise InvalidSetting(
                "head_version",
                f"head_version = {self.head_version}: another version of hgpt made this head, and this one knows 1 to "
                f"{HEAD_VERSION}; load it with the version that made it (pip install --upgrade hgpt)",
            )
        self.backbone = _configuration(self.backbone)
        self.backbone.tie_word_embeddings = False  # its output embedding is gone; our setting ties the head
        self.backbone.dtype = None  # the whole model's
        text = self.get_text_config()
        self.n_embd = text.hidden_size + self.lift
        self.n_layer, self.n_head = text.num_hidden_layers, 1  # 1 passes the check of D % n_head, no rule for backbones
        self.n_positions = getattr(text, "max_position_embeddings", None) or 2**20  # relative positions: no limit
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(text, name, None))
        super().__post_init__(**kwargs)
        self.n_head = text.num_attention_heads

    def _check_ranges(self) -> None:
        super()._check_ranges()
        rows = self.padded_vocab_size
        self._require("task", self.task in ("causal_lm", "masked_lm"), "must be one of causal_lm, masked_lm")
        for name, needed in (("tie_word_embeddings", False), ("radius", "learned")):
            if self.lift and getattr(self, name) != needed:
                raise InvalidSetting(name, f"a lifted head needs {name} = {needed!r}; got {getattr(self, name)!r}")
        self._require("vocab_size", self.vocab_size <= rows, f"exceeds the backbone's {rows} rows")

    @property
    def padded_vocab_size(self) -> int:
        text = self.get_text_config()
        return text.padded_vocab_size if isinstance(text, HGPTConfig) else text.vocab_size

    @property
    def trunk_in_words(self) -> str:
        return f"{self.backbone.model_type} backbone"

    @property
    def trunk_width(self) -> int:
        return self.get_text_config().hidden_size

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The text configuration of the backbone, from which transformers makes caches."""
        return self.backbone.get_text_config(decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in FROM_BACKBONE}


def _configuration(backbone: Any) -> Any:
    """A configuration from its dictionary. Raises InvalidSetting."""
    if isinstance(backbone, dict):
        values = {name: value for name, value in backbone.items() if name != "auto_map"}
        kind = values.pop("model_type", None)
        try:
            backbone = HGPTConfig(**values) if kind == HGPTConfig.model_type else AutoConfig.for_model(kind, **values)
        except Exception as error:  # configurations may raise anything for wrong values
            reason = " ".join(str(error).split())[:300]
            raise InvalidSetting("backbone", f"it is no configuration of transformers: {reason}") from error
    if backbone is None or backbone.is_encoder_decoder:
        raise InvalidSetting("backbone", "it must be the configuration of a causal or a masked language model")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(getattr(backbone.get_text_config(), name, None), int):
            raise InvalidSetting("backbone", f"a {backbone.model_type} configuration has no {name}, which hgpt needs")
    return backbone


class PassThrough(nn.Identity):
    """The identity that replaces the backbone's output embedding."""

    weight = bias = None


class Backbone(nn.Module):
    """A language model of transformers whose output embedding is a `PassThrough`, followed by the gain or the lift.

    Its attributes have the names of `HGPTModel`: `wte`, `h` (the blocks), `ln_f` (the gain or the lift).
    """

    def __init__(self, config: HarmonizedConfig, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        width = config.get_text_config().hidden_size
        self.ln_f: nn.Module = nn.Linear(width, config.n_embd) if config.lift else Gain(width)

    @property
    def wte(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def h(self) -> nn.ModuleList:
        """The blocks: the largest list of modules that have matrices."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=nn.ModuleList())

    @property
    def norm(self) -> nn.Module:
        """The backbone's final norm; an `nn.Identity` if there is none, as in BERT."""
        names = ("norm", "ln_f", "final_layer_norm", "final_norm")
        outside = ((name.split("."), module) for name, module in self.model.named_modules())
        found = [module for name, module in outside if name[-1] in names and not any(map(str.isdigit, name))]
        return found[0] if found else nn.Identity()

    def set_output_embedding(self, head: nn.Module) -> None:
        """Replace the `PassThrough` by an output embedding."""
        name = next(name for name, module in self.model.named_modules() if isinstance(module, PassThrough))
        self.model.set_submodule(name, head)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self, input_ids: Tensor | None = None, *, cache: Any = None, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """The head's x, (B, T, D). Arguments are the backbone's; None is not passed on."""
        given = {"input_ids": input_ids, CACHE: cache, **kwargs}
        output = self.model(**{name: value for name, value in given.items() if value is not None}, return_dict=True)
        x = self.ln_f(output.logits.to(self.ln_f.weight.dtype))
        hidden = output.get("hidden_states")
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            **named_cache(output.get(CACHE)),
            hidden_states=None if hidden is None else (*hidden[:-1], x),
            attentions=output.get("attentions"),
        )


class HarmonizedForCausalLM(HGPTForCausalLM):
    """A causal language model of transformers with an hgpt head. `forward` and the loss are HGPTForCausalLM's."""

    config_class = HarmonizedConfig
    config: HarmonizedConfig
    task: Literal["causal_lm", "masked_lm"] = "causal_lm"
    auto_class: Any = AutoModelForCausalLM
    trunk_class = None  # AutoModel does not know the backbone's gain
    _can_compile_fullgraph = False

    def _new_trunk(self) -> nn.Module:
        config = self.config
        if config.task != self.task:
            raise ValueError(f'{type(self).__name__} does not fit task = "{config.task}" of the configuration')
        # With the default, transformers chooses.
        attention = config._attn_implementation
        attention = None if attention == "sdpa" else attention
        options = {"dtype": torch.get_default_dtype(), "attn_implementation": attention}
        make = self.auto_class.from_config
        if isinstance(config.backbone, HGPTConfig):
            make = HGPTForCausalLM._from_config
        try:
            model: Any = make(config.backbone, **options)
        except Exception as error:  # not for this task, or its sizes do not fit: models raise anything
            reason = " ".join(str(error).split())[:200]
            raise InvalidSetting("backbone", f"transformers makes no {self.task} model of it: {reason}") from error
        _remove_output_embedding(model)
        embedding: Any = model.get_input_embeddings()
        if config.tie_word_embeddings:
            nn.init.normal_(embedding.weight, std=config.centre_init_std)
        self._no_split_modules = list(model._no_split_modules or ())
        path = next(name for name, module in model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"transformer.model.{path}.weight"}
        return Backbone(config, model)


class HarmonizedForMaskedLM(HarmonizedForCausalLM):
    """A masked language model of transformers with an hgpt head: `labels` are not shifted."""

    task = "masked_lm"
    auto_class = AutoModelForMaskedLM

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def forward(  # type: ignore[override]  # without a cache, as in transformers' masked models
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits (B, T, vocab_size) and, with labels, the mean −log p_y over labels that are not −100."""
        found: Any = super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            shift_labels=labels,
            return_dict=True,
            **kwargs,
        )
        output = MaskedLMOutput(
            loss=found.loss, logits=found.logits, hidden_states=found.hidden_states, attentions=found.attentions
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def harmonize(
    model: PreTrainedModel, exponent: float | str = "2*sqrt_dim", *, vocab_size: int | None = None, **settings: Any
) -> HarmonizedForCausalLM:
    """`model` with a harmonic head instead of its output embedding, and equally tied. Changes `model` in place.

    The centres start as the rows of the output embedding. A trained softmax model loses its predictions; `python -m
    hgpt.convert` keeps them.

    Args:
        model: a causal or masked language model of transformers (GPT-2, Llama, Qwen, BERT, …).
        exponent: n on d, as in HGPTConfig.
        vocab_size: the number of tokens, if the last rows of the embedding are padding.
        settings: further fields of HGPTConfig that concern the head: radius, distance, final_norm_gain, …

    Raises:
        ValueError: `model` already has an hgpt head, is no causal or masked language model, has hidden states that are
            not (B, T, D), or caps or scales its logits.
    """
    if isinstance(model, HarmonizedForCausalLM) or getattr(model.config, "head", None) == "harmonic":
        raise ValueError("the model already has a head of hgpt, which cannot be replaced")
    masked = type(model).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    kind = HarmonizedForMaskedLM if masked else HarmonizedForCausalLM
    head = output_embedding(model)
    check_backbone(model, head, causal=not masked)
    tied = model.get_input_embeddings().weight is head.weight and not settings.get("lift")
    config = HarmonizedConfig(
        backbone=model.config.to_dict(),
        task=kind.task,
        vocab_size=vocab_size or (model.config.vocab_size if isinstance(model, HGPTForCausalLM) else len(head.weight)),
        pad_vocab_to_multiple_of=getattr(model.config, "pad_vocab_to_multiple_of", 1),
        tie_word_embeddings=tied,
        exponent=exponent,
        **settings,
    )
    with torch.device("meta"):
        whole = kind(config)
    if type(whole.transformer.model) is not type(model):
        made = type(whole.transformer.model).__name__
        raise ValueError(
            f"transformers makes a {made} of this configuration, but the model is a {type(model).__name__}"
        )
    model.config.tie_word_embeddings = False
    _remove_output_embedding(model)
    whole.transformer.model, config.backbone = model, model.config
    with torch.device(head.weight.device):
        whole.lm_head, ln_f = whole._new_head(len(head.weight)).to(head.weight.dtype), whole.transformer.ln_f
        whole.transformer.ln_f = ln_f.to_empty(device=head.weight.device).to(head.weight.dtype)
    whole._init_weights(whole.transformer.ln_f)
    if not config.lift:
        whole.lm_head.weight = head.weight
    if not masked:
        whole.generation_config = model.generation_config
    whole.config.dtype = model.dtype
    return whole.train(model.training)


def model_class(config: HGPTConfig) -> type[HGPTForCausalLM]:
    """The causal language model class of `config`."""
    return HarmonizedForCausalLM if isinstance(config, HarmonizedConfig) else HGPTForCausalLM


def load(folder: str, **options: Any) -> Any:
    """The model of a folder (of hgpt or transformers) or of an id on the hub; `options` of `from_pretrained`."""
    config = AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, **options)


def auto_class(config: Any) -> Any:
    """AutoModelForMaskedLM or AutoModelForCausalLM, as the configuration says."""
    masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    return AutoModelForMaskedLM if masked or getattr(config, "task", None) == "masked_lm" else AutoModelForCausalLM


def output_embedding(model: PreTrainedModel) -> Any:
    """The output embedding of a language model. Raises ValueError if it has none."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None or head.weight.ndim != 2:
        raise ValueError(f"a {type(model).__name__} has no output embedding: give a causal or masked language model")
    return head


@torch.no_grad()
def check_backbone(model: PreTrainedModel, end: nn.Module, *, causal: bool) -> None:
    """Run `model` on four tokens, and raise ValueError unless an hgpt head can replace `end`."""
    width, rows = model.config.get_text_config().hidden_size, model.config.get_text_config().vocab_size
    seen: list[tuple[Tensor, Tensor]] = []
    hook = end.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    was_training = model.training
    try:
        model.eval()
        logits = model(input_ids=torch.tensor([[0, 1], [0, 2]], device=model.device) % rows, return_dict=True).logits
    finally:
        hook.remove()
        model.train(was_training)
    name = type(model).__name__
    if len(seen) != 1 or seen[0][0].shape != (2, 2, width):
        shapes = ", ".join(str(tuple(hidden.shape)) for hidden, _ in seen) or "none"
        raise ValueError(
            f"the output embedding of a {name} must get hidden states (B, T, D) = (2, 2, {width}); it got {shapes}"
        )
    hidden, output = seen[0]
    if not torch.equal(logits.float(), output.float()):
        raise ValueError(
            f"a {name} caps or scales its logits, which would change hidden states here: turn it off in the "
            "configuration first (final_logit_softcapping = null, logits_scaling = 1, logit_scale = 1). The cap or the "
            "scale is lost then: a harmonic head has its exponent instead"
        )
    if causal and not torch.allclose(hidden[0, 0], hidden[1, 0], rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"a {name} of this configuration sees later tokens: it is not a causal language model (for BERT use "
            "...ForMaskedLM, or set is_decoder = true)"
        )


def _remove_output_embedding(model: Any) -> None:
    """Replace the output embedding by a `PassThrough`, and remove its separate bias."""
    head: Any = output_embedding(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is head:
                setattr(module, name, PassThrough())
                bias = getattr(module, "bias", None)  # as in BERT and RoBERTa
                if isinstance(bias, nn.Parameter) and bias.shape == head.weight.shape[:1]:
                    module.register_parameter("bias", None)
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}
