"""Initial weights from elsewhere: a Hugging Face GPT-2, an hgpt model, or a nanoGPT checkpoint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hgpt.errors import UserError
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import model_folder

# GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in).
_CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Causal masks that older checkpoints of both kinds hold as buffers.
_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # one function, three names
_TOKENS, _HEAD, _POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
_EXPONENT, _METRIC = "lm_head.log_exponent", "lm_head.metric."
_HEAD_SETTINGS = ("exponent", "learn_exponent", "distance", "distance_options")
_MOST_PADDING = 127  # rows that a checkpoint's embedding may have beyond the vocabulary: multiples of up to 128


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
        source: a Hugging Face id or folder of a GPT-2, an hgpt model (also a run or a checkpoint folder), or nanoGPT's
            ckpt.pt. Pickled files are loaded with weights_only=True.

    Returns:
        Lines for the user: every parameter that did not fit, on either side, and every setting in which the run
        differs from the source. Vocabulary padding is not a difference, and a longer context is cropped.

    Raises:
        UserError: an unreadable source, another n_layer, n_head or n_embd, another vocabulary, a shorter context.
    """
    path = Path(source)
    found = _nanogpt(path) if path.is_file() else _hugging_face(str(model_folder(path)) if path.is_dir() else source)
    config = model.config
    wrong = [
        f"model.{name} = {value} (it is {getattr(config, name)})"
        for name, value in found.shape.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise UserError(f"model.init_from = {source} has another shape than the model: set {', '.join(wrong)}")
    weights, parameters, notes = dict(found.weights), dict(model.named_parameters()), _differences(found, config)
    if _HEAD in parameters and _TOKENS in weights:
        weights.setdefault(_HEAD, weights[_TOKENS])
    elif _HEAD in weights:  # the model's is tied: named once, as the embedding
        head = weights.pop(_HEAD)
        if not torch.equal(head, weights.get(_TOKENS, head)):
            notes.append(f"not used from the checkpoint: {_HEAD} (its embeddings are not tied, the run's are)")

    same_distance = all(found.behaviour.get(name) == getattr(config, name) for name in ("distance", "distance_options"))
    shared = sorted(
        name for name in parameters.keys() & weights.keys() if same_distance or not name.startswith(_METRIC)
    )
    unfit = [
        f"{name}: {tuple(weights[name].shape)} in the checkpoint, {tuple(parameters[name].shape)} in the model"
        for name in shared
        if not _fits(name, weights[name], parameters[name], config.vocab_size)
    ]
    if unfit:
        raise UserError(
            f"model.init_from = {source}: these parameters do not fit\n  " + "\n  ".join(unfit) + "\nUse data "
            "with the checkpoint's tokenizer, and a data.seq_len no longer than its context."
        )
    with torch.no_grad():
        for name in shared:
            rows = min(len(weights[name]), len(parameters[name]))
            parameters[name][:rows] = weights[name][:rows]
    if missing := sorted(parameters.keys() - shared):
        notes.append("not in the checkpoint, kept as initialised: " + ", ".join(missing))
    if unused := sorted(weights.keys() - shared):
        notes.append("not used from the checkpoint: " + ", ".join(unused))
    return notes


def _fits(name: str, value: Tensor, parameter: Tensor, vocab_size: int) -> bool:
    """Whether all of `parameter` that is ever used can be taken from `value`."""
    if value.ndim != parameter.ndim or value.shape[1:] != parameter.shape[1:]:
        return False
    if name == _POSITIONS:
        return len(value) >= len(parameter)
    if name in (_TOKENS, _HEAD):  # far more rows would mean another tokenizer
        return vocab_size <= len(value) <= vocab_size + _MOST_PADDING
    return len(value) == len(parameter)


def _differences(found: _Source, config: Any) -> list[str]:
    """A line for each setting in which the run computes something else than the checkpoint's model did."""
    now = {name: getattr(config, name) for name in found.behaviour}
    if now.get("learn_exponent") and _EXPONENT in found.weights:
        now["exponent"] = found.behaviour["exponent"]  # which is taken over
    return [
        f"model.{'head.' if name in _HEAD_SETTINGS else ''}{name} is {now[name]!r}, the checkpoint was "
        f"trained with {value!r}"
        for name, value in found.behaviour.items()
        if now[name] != value and not (now[name] in _TANH_GELUS and value in _TANH_GELUS)
    ]


def _hugging_face(source: str) -> _Source:
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in ("gpt2", "hgpt"):
            raise UserError(f"model.init_from = {source} is a {config.model_type} model; it must be a gpt2 or an hgpt")
        weights = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"model.init_from = {source} cannot be loaded; it must be a folder that exists, the id of a model on the "
            f"Hugging Face hub, or nanoGPT's ckpt.pt: {' '.join(str(error).split())}"
        ) from error
    behaviour = {
        "activation_function": config.activation_function,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
    if config.model_type == "gpt2":
        weights = {name: value.T if _CONV1D.search(name) else value for name, value in weights.items()}
        behaviour |= {"bias": True, "head": "softmax"}
    else:
        behaviour |= {"bias": config.bias, "head": config.head}
        if config.head == "harmonic":
            behaviour |= {name: getattr(config, name) for name in _HEAD_SETTINGS}
            if _EXPONENT in weights:
                behaviour["exponent"] = float(weights[_EXPONENT].exp())
    return _Source(
        weights=_clean(weights), shape=_shape(config.n_layer, config.n_head, config.n_embd), behaviour=behaviour
    )


def _nanogpt(path: Path) -> _Source:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle breaks the unpickler in every way there is
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
    if absent := {"n_layer", "n_head", "n_embd"} - arguments.keys():
        raise UserError(f"model.init_from = {path}: its model_args lack {', '.join(sorted(absent))}")
    # nanoGPT's block is fixed, but for the bias. The code of the first harmonic paper comes from an older nanoGPT, with
    # GPT-2's GELU, and records one setting more.
    older = "scale_attn_by_inverse_layer_idx" in arguments
    behaviour = {
        "bias": arguments.get("bias", True),
        "activation_function": "gelu_pytorch_tanh" if older else "gelu",
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
