"""Initial weights from elsewhere: a Hugging Face GPT-2, an hgpt model, or a nanoGPT checkpoint."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hgpt.errors import UserError
from hgpt.modeling_hgpt import HGPTForCausalLM

# GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in).
_CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Causal masks that older checkpoints of both kinds hold as buffers.
_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # one function, three names
_EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")
_POSITIONS = "transformer.wpe.weight"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A checkpoint in this model's names and layouts, and what is known of the model it came from."""

    weights: dict[str, Tensor]
    shape: dict[str, int]  # must be the same: n_layer, n_head, n_embd
    behaviour: dict[str, Any]  # should be the same: what the model computes with those weights


def initialize_from(model: HGPTForCausalLM, source: str) -> list[str]:
    """Copy the weights of `source` into `model`.

    Args:
        model: freshly initialised; what the source does not hold keeps its initial value.
        source: a Hugging Face id or folder of a GPT-2, an exported hgpt model, or nanoGPT's ckpt.pt. Pickled files are
            loaded with weights_only=True.

    Returns:
        Lines for the user: every parameter that did not fit, on either side, and every setting in which the run
        differs from the source. Vocabulary padding is not a difference, and a longer context is cropped.

    Raises:
        UserError: an unreadable source, or another n_layer, n_head, n_embd, a smaller vocabulary or context.
    """
    path = Path(source)
    found = _nanogpt(path) if path.is_file() else _hugging_face(source)
    config = model.config
    wrong = [
        f"model.{name} = {getattr(config, name)}, the checkpoint has {value}"
        for name, value in found.shape.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise UserError(f"model.init_from = {source}: the model has another shape; set {'; '.join(wrong)}")

    weights = dict(found.weights)
    parameters = dict(model.named_parameters())
    notes = [
        f"model.{name} is {getattr(config, name)!r}, the checkpoint was trained with {value!r}"
        for name, value in found.behaviour.items()
        if getattr(config, name) != value
    ]
    if "lm_head.weight" not in parameters and "lm_head.weight" in weights:  # tied: named once, as the embedding
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights["transformer.wte.weight"]):
            notes.append("not used from the checkpoint: lm_head.weight (its embeddings are not tied, the run's are)")
    elif "lm_head.weight" in parameters:
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])

    unfit = []
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in weights:
                continue
            value = weights[name]
            # Padding rows and positions beyond the run's context are not needed; everything else is.
            needed = {_POSITIONS: config.n_positions} | dict.fromkeys(_EMBEDDINGS, config.vocab_size)
            rows = min(len(value), len(parameter)) if name in needed else len(parameter)
            if value.shape[1:] != parameter.shape[1:] or not needed.get(name, rows) <= rows <= len(value):
                unfit.append(f"{name}: {tuple(value.shape)} in the checkpoint, {tuple(parameter.shape)} in the model")
            else:
                parameter[:rows] = value[:rows]
    if unfit:
        raise UserError(
            f"model.init_from = {source}: these parameters do not fit\n  " + "\n  ".join(unfit) + "\nUse data with the "
            "checkpoint's tokenizer, and a data.seq_len no longer than its context."
        )
    if missing := sorted(parameters.keys() - weights.keys()):
        notes.append("not in the checkpoint, kept as initialised: " + ", ".join(missing))
    if unused := sorted(weights.keys() - parameters.keys()):
        notes.append("not used from the checkpoint: " + ", ".join(unused))
    return notes


def _hugging_face(source: str) -> _Source:
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in ("gpt2", "hgpt"):
            raise UserError(f"model.init_from = {source} is a {config.model_type} model; it must be a gpt2 or an hgpt")
        weights = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_from = {source} cannot be loaded: {' '.join(str(error).split())}") from error
    behaviour = {
        "activation_function": _ACTIVATIONS.get(config.activation_function, config.activation_function),
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
    if config.model_type == "gpt2":
        weights = {name: value.T if _CONV1D.search(name) else value for name, value in weights.items()}
        behaviour |= {"bias": True, "head": "softmax"}
    else:
        behaviour |= {"bias": config.bias, "head": config.head}
        if config.head == "harmonic":
            behaviour |= {"exponent": config.exponent, "distance": config.distance}
    return _Source(
        weights=_clean(weights), shape=_shape(config.n_layer, config.n_head, config.n_embd), behaviour=behaviour
    )


def _nanogpt(path: Path) -> _Source:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"model.init_from = {path} is no checkpoint of tensors and plain values, which is all that is loaded "
            f"(weights_only=True): {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"model.init_from = {path}: nanoGPT's ckpt.pt holds 'model' and 'model_args'; this holds {keys}"
        )
    arguments = content["model_args"]
    # nanoGPT's block is fixed; a fork of it may have recorded more.
    behaviour = {
        "bias": arguments.get("bias", True),
        "activation_function": "gelu",
        "scale_attn_by_inverse_layer_idx": arguments.get("scale_attn_by_inverse_layer_idx", False),
    }
    return _Source(
        weights=_clean(content["model"]),
        shape=_shape(arguments["n_layer"], arguments["n_head"], arguments["n_embd"]),
        behaviour=behaviour,
    )


def _shape(n_layer: int, n_head: int, n_embd: int) -> dict[str, int]:
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}


def _clean(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that torch.compile and DDP add, and without mask buffers."""
    cleaned = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): value for name, value in weights.items()}
    return {name: value for name, value in cleaned.items() if not _MASKS.search(name)}
