"""Find and load a model by name, and initialise a run with its weights.

A name is a run folder (its latest checkpoint), a checkpoint folder, an exported model or an id on the Hugging Face hub:

    model, tokenizer = find_source("runs/quickstart").load()

Code in a model's folder is never executed (trust_remote_code=False), and pickles are loaded with weights_only=True.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub.utils.logging
import numpy as np
import psutil
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hgpt  # noqa: F401  (registers the model with transformers)
from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import TOKENIZER_FILE, hf_tokenizer, load_tokenizer, token_ids, tokenizer_file
from hgpt.durable import read_json
from hgpt.errors import UserError, first_line
from hgpt.hardware import out_of_memory
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.distances import load_distances
from hgpt.model.harmonized import Backbone, HarmonizedConfig, PassThrough, auto_class, check_backbone, model_class
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.checkpoint import CHECKPOINTS, LATEST, MANIFEST, MODEL, STATE, checkpoint_step, damage, latest_checkpoint
from hgpt.run.config import RunConfig

GPT2_KINDS = ("gpt2", HGPTConfig.model_type)  # the values of model_type that share GPT-2's blocks and their names
GPT2_TOKENS = 50_257


# ------------------------------------------------------------------------------------------------------------
# A model by name


@dataclass(frozen=True, kw_only=True)
class Source:
    """The location of a model, and its checkpoint's progress.

    Each method first compares the files that it reads with the checkpoint's manifest, if there is one.

    Attributes:
        label: its name in reports.
        folder: what transformers loads: the folder of the exported model, or the id on the hub.
        run: the run folder that the checkpoint belongs to, if any.
        step, tokens_seen: from the checkpoint's state.json; None without one.
    """

    label: str
    folder: str
    run: Path | None = None
    step: int | None = None
    tokens_seen: int | None = None

    # Any: transformers annotates these with unions of all its models and tokenizers.
    def load_config(self) -> Any:
        """The configuration (from the hub a small download). Raises UserError if it cannot be read."""
        self._check("config")
        with _loading(self.folder):
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)

    def load_model(self, dtype: str | torch.dtype = "auto", working_bytes: int = 0) -> Any:
        """The model. Raises UserError if it cannot be loaded or a weight is missing.

        Also, before reading or downloading weights, if they and `working_bytes` exceed the free memory.
        """
        config = self.load_config()
        with _loading(self.folder):
            needed = weight_bytes(config, dtype) + working_bytes
        if needed > (free := psutil.virtual_memory().available):
            raise UserError(
                f"{self.folder} needs about {needed / 1e9:.1f} GB of memory to load it and to work, and "
                f"{free / 1e9:.1f} GB are free: close other programs, or use a machine with more memory"
            )
        self._check("model")
        load: Any = auto_class(config).from_pretrained  # with output_loading_info it returns a pair
        with _loading(self.folder):
            model, loading = load(self.folder, dtype=dtype, trust_remote_code=False, output_loading_info=True)
        if missing := loading["missing_keys"]:
            raise UserError(
                f"the weights in {self.folder} are incomplete, without {', '.join(sorted(missing))}; copy or export "
                "the model again"
            )
        if unknown := [name for name in loading["unexpected_keys"] if name.startswith("lm_head.")]:
            # For example radii that config.json lacks: without them the predictions would change.
            raise UserError(
                f"the weights in {self.folder} hold {', '.join(sorted(unknown))}, which the head of its config.json "
                "does not have: copy or export the model again, or use the version of hgpt that wrote it"
            )
        return model

    def load(self, dtype: str | torch.dtype = "auto", working_bytes: int = 0) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises UserError if one cannot be loaded or they do not belong together."""
        model, tokenizer = self.load_model(dtype, working_bytes), self.load_tokenizer()
        tokens, vocab_size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
        # Unlike hgpt's, other models count padding rows in vocab_size.
        if tokens > vocab_size or (tokens < vocab_size and model.config.model_type == HGPTConfig.model_type):
            raise UserError(
                f"the tokenizer in {self.folder} has {tokens} tokens, but the model's vocab_size is {vocab_size}: they "
                "do not belong together. Put the tokenizer that the model was trained with (tokenizer.json of its data "
                "folder) next to the model"
            )
        return model, tokenizer

    def load_tokenizer(self) -> Any:
        """The tokenizer saved beside the model. Raises UserError if there is none."""
        self._check("tokenizer")
        if (file := Path(self.folder) / TOKENIZER_FILE).is_file():
            token_ids(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            found = tokenizer.vocab_size > 0  # some classes start empty where they find no file
        except Exception:  # transformers raises any error for files that are no tokenizer
            found = False
        if not found:
            raise UserError(
                f"no tokenizer can be loaded from {self.folder}; put the tokenizer.json and tokenizer_config.json that "
                "the model was trained with beside its config.json"
            )
        return tokenizer

    def _check(self, beginning: str) -> None:
        """Raise UserError if a model file whose name starts with `beginning` differs from the checkpoint's manifest."""
        folder = Path(self.folder).resolve()
        kept = folder.name == MODEL and (folder.parent / MANIFEST).exists()
        if kept and (fault := damage(folder.parent, f"{MODEL}/{beginning}")):
            raise UserError(f"{folder.parent} is damaged: {fault}. Copy the checkpoint again, or use another one")


def find_source(name: str) -> Source:
    """The model called `name`. Raises UserError for a path that is no model; does not look up a hub id."""
    try:
        return Source(label=name, folder=name) if is_hub_id(name) else _local_source(name)
    except (OSError, ValueError) as error:  # a too long name; a folder without permission; NUL in a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}. Give another path, or change its permissions") from error


def _local_source(name: str) -> Source:
    folder = model_folder(name)
    inside = folder.resolve()
    checkpoint = inside.parent
    run = checkpoint.parents[1] if inside.name == MODEL and checkpoint.name.startswith("step_") else None
    step, tokens = _progress(checkpoint / STATE)
    label = inside.name if run is None else run.name
    if run is not None and Path(name).resolve() not in (run, (run / LATEST).resolve()):
        label += f" step {checkpoint_step(checkpoint)}"
    return Source(label=label, folder=str(folder), run=run, step=step, tokens_seen=tokens)


def _progress(file: Path) -> list[int | None]:
    """Steps and training tokens in a checkpoint's state.json; None without such a file."""
    again = "Copy the checkpoint again"
    try:
        state = read_json(file, f"{again}.")
    except FileNotFoundError:
        return [None, None]
    found = [state.get(name) if isinstance(state, dict) else state for name in ("step", "tokens")]
    if any(value is not None and (type(value) is not int or value < 0) for value in found):
        raise UserError(f"{file} is damaged: step and tokens must be whole numbers, but are {found}. {again}")
    return found


def load_distance_file(file: str | None) -> None:
    """Execute the file that --distance-file names, if any. Raises UserError."""
    if file is not None:
        try:
            load_distances(file)
        except ValueError as error:
            raise UserError(f"--distance-file: {error}") from error


def is_hub_id(name: str) -> bool:
    """Whether `name` is an id on the hub: owner/name or name, and no path on this machine."""
    owner = name.split("/")[0]
    # Names that begin with runs/ are never ids: a mistyped run must not download somebody's model.
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and owner != "runs" and not Path(owner).exists()


def model_folder(path: str | Path) -> Path:
    """The exported model in a run folder, a checkpoint folder or its own folder. Raises UserError if there is none."""
    path = Path(path)
    for candidate in (path, path / MODEL, path / LATEST / MODEL):
        if (candidate / "config.json").is_file():
            return candidate
    if (path / CHECKPOINTS).is_dir() and (newest := latest_checkpoint(path)) is not None:  # no link on this file system
        return newest / MODEL
    if not path.exists():
        raise UserError(f"{path}: there is no such folder; give a run folder, a checkpoint folder or an exported model")
    if (path / "config.toml").is_file():
        raise UserError(f"{path}: the run has no checkpoint yet; wait for checkpoint.every steps, or resume the run")
    raise UserError(
        f"{path} is no model: a run folder holds {LATEST}/, a checkpoint folder {MODEL}/, an exported model config.json"
    )


@contextmanager
def _loading(folder: str) -> Iterator[None]:
    """Silence transformers, and turn its errors, as for a missing or damaged model, into UserErrors."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # transformers raises any error for invalid configurations or weights
        if out_of_memory(error):
            raise UserError(
                f"this machine ran out of memory with {folder}: close other programs, or use a machine with more memory"
            ) from error
        raise UserError(f"no model can be loaded from {folder}: {first_line(error)}") from error


def weight_bytes(config: Any, dtype: str | torch.dtype = "auto") -> int:
    """Size of a model's weights in memory, from its configuration alone; "auto": in the file's dtype."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None) or config.dtype or torch.float32
    text = config.get_text_config()
    # Very many layers need memory even on the meta device: do not build what cannot fit.
    layers, width = int(getattr(text, "num_hidden_layers", 0)), int(getattr(text, "hidden_size", 0))
    least = layers * (width**2 * dtype.itemsize + 100_000)
    if least > psutil.virtual_memory().available:
        return least
    make: Any = auto_class(config).from_config  # it writes into the configuration
    with torch.device("meta"):
        return int(make(copy.deepcopy(config), trust_remote_code=False).num_parameters()) * dtype.itemsize


# ------------------------------------------------------------------------------------------------------------
# The start of a run: model.init_from, which may also be nanoGPT's ckpt.pt

_SHAPE = ("n_layer", "n_head", "n_embd")
_HARMONIC_SETTINGS = ("exponent", "learn_exponent", "distance", "distance_options")
_HEAD_SETTINGS = (*_HARMONIC_SETTINGS, "radius")
_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # three names of one function
_TOKENS, _HEAD, _POSITIONS = "transformer.wte.weight", "lm_head.weight", "transformer.wpe.weight"
_EXPONENT, _LOG_WEIGHT, _METRIC = "lm_head.log_exponent", "lm_head.log_weight", "lm_head.metric."
_BACKBONE = "transformer.model."  # before the names of a backbone's weights
_MOST_PADDING = 127  # rows that an embedding may have beyond the vocabulary: it is padded to multiples of up to 128
# GPT-2's Conv1D stores (in, out) where nn.Linear stores (out, in).
_CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Causal masks, which are buffers in older checkpoints; prefixes that torch.compile and DDP add to names.
_MASKS, _PREFIXES = re.compile(r"\.attn\.(bias|masked_bias)$"), re.compile(r"^(_orig_mod\.|module\.)+")


def check_teacher(name: str, data: TokenShards, seq_len: int) -> tuple[Source, str]:
    """Check that the model of train.distill_from can predict windows of `seq_len` tokens of `data`.

    Returns:
        Its source, and a line for the user on its tokenizer, as `check_tokenizer`.

    Raises:
        UserError: there is no such model, it is no causal language model, its vocabulary or tokenizer differs, or its
            context is shorter.
    """
    try:
        source = find_source(name)
        config = source.load_config()
        vocab_size, own = getattr(config, "vocab_size", 0), config.model_type == HGPTConfig.model_type
        length = getattr(config.get_text_config(), "max_position_embeddings", None)
        if auto_class(config) is not AutoModelForCausalLM:
            raise UserError(f"it is a masked language model ({config.model_type}): name a causal one")
        # Unlike hgpt's, other models count padding rows in vocab_size.
        if vocab_size < data.vocab_size or (own and vocab_size != data.vocab_size):
            raise UserError(f"its vocab_size is {vocab_size}, and {data.folder} has {data.vocab_size} tokens")
        if length is not None and length < seq_len:
            raise UserError(f"its context has {length} tokens, and data.seq_len is {seq_len}: lower data.seq_len")
    except UserError as error:
        raise UserError(f"train.distill_from = {name}: {error}") from error
    return source, check_tokenizer(name, data, "train.distill_from")


def load_teacher(config: RunConfig, data: TokenShards, say: Callable[[str], None]) -> Any:
    """The model of train.distill_from in float32, on the CPU; None if the loss does not contain it.

    Gives `say` a line for the user. Raises UserError as `check_teacher`.
    """
    name = config.train.distill_from
    if name is None or config.train.distill_weight == 0:
        return None
    source, same_tokenizer = check_teacher(name, data, config.data.seq_len)
    say(f"train.distill_from = {name}: {same_tokenizer}")
    return source.load_model(torch.float32)


def shape_of(init_from: str, resume: str = "never", run_folder: Path | None = None) -> dict[str, int]:
    """n_layer, n_head and n_embd of the model that a run starts from. Raises UserError as `initialize_from` does.

    If the run resumes (`resume`), the shape comes from its checkpoint: `init_from` may be gone.
    """
    if resume not in ("never", "auto"):
        init_from = resume
    elif resume == "auto" and run_folder is not None and (run_folder / LATEST).exists():
        init_from = str(run_folder)
    if _is_file(init_from):
        return _nanogpt(Path(init_from)).shape
    with _naming_the_setting(init_from):
        return _shape(_gpt2_config(find_source(init_from)))


def check_tokenizer(init_from: str, data: TokenShards, setting: str = "model.init_from") -> str:
    """Compare the tokenizer of `init_from`, the value of `setting`, with the tokenizer of the data.

    They are the same if each token of the data has the same id in the model's vocabulary, and if both encode the
    concatenation of all tokens to the same ids. Their files may differ.

    Returns:
        A line for the user: the tokenizers are the same, or could not be compared, and why.

    Raises:
        UserError: they differ. The message contains the command that prepares data with the model's tokenizer.
    """
    if _is_file(init_from):
        return "nanoGPT's ckpt.pt holds no tokenizer to compare: make sure that the data has the model's tokens"
    with _naming_the_setting(init_from, setting):
        source = find_source(init_from)
        source.load_config()  # UserError for a missing model, which is not one without a tokenizer
        try:
            of_model = source.load_tokenizer()
        except UserError:
            if (Path(source.folder) / TOKENIZER_FILE).exists():
                raise
            return f"{source.folder} has no tokenizer to compare: make sure that the data has the model's tokens"
    of_data = _tokenizer_of(data)
    if of_data is None:
        return f"{data.folder} has no tokenizer to compare: make sure that its tokens are those of the model"
    difference = _difference(of_data, of_model)
    if difference is None:
        return "the model and the data have the same tokenizer"
    folder, save = source.folder, ""
    if not (Path(folder) / TOKENIZER_FILE).is_file():
        code = (
            f"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('tokenizer')"
        )
        folder, save = "tokenizer", f'python -c "{code}"\n  '
    raise UserError(
        f"{setting} = {init_from}: its tokenizer is not the tokenizer of {data.folder}: {difference}. Prepare "
        "the data with the model's tokenizer:\n  "
        f"{save}python -m data_prep.documents --tokenizer {folder} --out DIR FILES"
    )


def initialize_from(model: HGPTForCausalLM, init_from: str) -> list[str]:
    """Copy the weights of `init_from` into `model`.

    Args:
        model: a new model; parameters that `init_from` does not contain keep their initial values.
        init_from: a name as `find_source` takes it, of a GPT-2 or a model with a head of hgpt, or nanoGPT's ckpt.pt.

    Returns:
        Lines for the user: the origin of the weights; the parameters that only the model or only `init_from` has; the
        settings that differ. Padding of the vocabulary is no difference, and a longer context is cropped.

    Raises:
        UserError: `init_from` cannot be read, or has another n_layer, n_head, n_embd or vocabulary, or less context.
    """
    if _is_file(init_from):
        saved = _nanogpt(Path(init_from))
    else:
        with _naming_the_setting(init_from):
            saved = _gpt2(find_source(init_from))
    config = model.config
    if any(name.startswith(_BACKBONE) for name in saved.weights) != isinstance(config, HarmonizedConfig):
        raise UserError(
            f"model.init_from = {init_from}: set model.backbone to the same folder if hgpt.convert made it; otherwise "
            "model.backbone must not be set"
        )
    wrong = [
        f"model.{name} = {value} (it is {_shape(config)[name]})"
        for name, value in saved.shape.items()
        if _shape(config)[name] != value
    ]
    if wrong:
        raise UserError(f"model.init_from = {init_from} has another shape than the model: set {', '.join(wrong)}")
    weights, parameters = dict(saved.weights), dict(model.named_parameters())
    notes = [f"weights of {saved.origin}", *_differences(saved, config)]
    if _HEAD in parameters:
        weights = {_HEAD: weights[_TOKENS]} | weights if _TOKENS in weights else weights
    elif _HEAD in weights:  # the model is tied: its only name for these rows is the embedding's
        head = weights.pop(_HEAD)
        if not torch.equal(head, weights.get(_TOKENS, head)):
            notes.append(f"not used from the checkpoint: {_HEAD} (its embeddings are not tied, the run's are)")

    # The weights of a metric are used only for the same distance with the same options.
    same_distance = all(saved.behaviour.get(name) == getattr(config, name) for name in ("distance", "distance_options"))
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
            f"model.init_from = {init_from}: these parameters do not fit\n  " + "\n  ".join(unfit) + "\nUse data "
            "with the checkpoint's tokenizer, and a data.seq_len no longer than its context."
        )
    if other := sorted(name for name in parameters.keys() ^ weights.keys() if name.startswith(_BACKBONE)):
        raise UserError(f"model.init_from = {init_from} has another backbone than model.backbone: {', '.join(other)}")
    with torch.no_grad():
        for name in shared:
            rows = min(len(weights[name]), len(parameters[name]))
            parameters[name][:rows] = weights[name][:rows]
    if missing := sorted(parameters.keys() - shared):
        notes.append("not in the checkpoint, kept as initialised: " + ", ".join(missing))
    if unused := sorted(weights.keys() - shared):
        notes.append("not used from the checkpoint: " + ", ".join(unused))
    return notes


def new_model(config: HGPTConfig, backbone: str | None) -> HGPTForCausalLM:
    """A model with random weights. Raises UserError if the model of model.backbone cannot have an hgpt head."""
    model = model_class(config)(config)
    if isinstance(model.transformer, Backbone):
        inner = model.transformer.model
        end = next(module for module in inner.modules() if isinstance(module, PassThrough))
        try:
            check_backbone(inner, end, causal=True)
        except ValueError as error:
            raise UserError(f"model.backbone = {backbone}: {error}") from error
    return model


@torch.no_grad()
def initialize_radii(model: HGPTForCausalLM, radius_init: str | None, unigram: np.ndarray | None) -> None:
    """Set the log-weights of a new model by model.head.radius_init.

    Args:
        radius_init: None keeps log-weights that `initialize_from` loaded; without them it means "unigram".
        unigram: `unigram_log_p` of the training split; not read for "zero".
    """
    a = model.lm_head.log_weight
    if a is None or (radius_init is None and bool(a.any())):
        return
    if radius_init == "zero":
        a.zero_()
    else:
        log_p = torch.as_tensor(unigram)
        a.fill_(float(log_p.min()))  # the padding, which has no probability; a token added later is rare
        a[: len(log_p)] = log_p


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Weights with hgpt's names and layouts, and the settings of their model.

    `shape` must agree with the run. Differences in `behaviour` (settings that change what the weights compute) are only
    reported. `origin`: for messages.
    """

    origin: str
    weights: dict[str, Tensor]
    shape: dict[str, int]
    behaviour: dict[str, Any]


def _gpt2(source: Source) -> _Weights:
    """The weights of a GPT-2 of transformers, or of a model with a head of hgpt."""
    config = _gpt2_config(source)
    weights = source.load_model(torch.float32).state_dict()
    behaviour = {"bias": True, "head": "softmax", "radius": "none", "final_norm": "layer_norm"}
    names = ["activation_function", "scale_attn_by_inverse_layer_idx", "layer_norm_epsilon"]
    if config.model_type == "gpt2":
        weights = {name: value.T if _CONV1D.search(name) else value for name, value in weights.items()}
    else:
        names += ["bias", "head", "radius", "final_norm", *(_HARMONIC_SETTINGS if config.head == "harmonic" else ())]
    behaviour |= {name: getattr(config, name) for name in names}
    if _EXPONENT in weights:
        behaviour["exponent"] = float(weights[_EXPONENT].exp())
    step = "" if source.step is None else f", step {source.step:,}"
    origin = f"{source.folder} ({config.model_type}, {behaviour['head']} head{step})"
    return _Weights(origin=origin, weights=_clean(weights), shape=_shape(config), behaviour=behaviour)


def _gpt2_config(source: Source) -> Any:
    """The configuration of a GPT-2, or of a model with a head of hgpt. Raises UserError for another kind of model."""
    config = source.load_config()
    if config.model_type not in (*GPT2_KINDS, HarmonizedConfig.model_type):
        raise UserError(f"{source.folder} is a {config.model_type} model; it must be a gpt2 or an hgpt")
    return config


def _nanogpt(path: Path) -> _Weights:
    """The weights of nanoGPT's ckpt.pt. Raises UserError if it cannot be loaded or is another file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler may raise anything for a file that is no pickle
        raise UserError(
            f"model.init_from = {path} is no checkpoint of tensors and plain values, which is all that is loaded "
            f"(weights_only=True): {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"model.init_from = {path}: nanoGPT's ckpt.pt holds 'model' and 'model_args'; this holds {keys}"
        )
    arguments, weights = content["model_args"], content["model"]
    known = arguments if isinstance(arguments, dict) else {}
    if absent := [name for name in sorted(_SHAPE) if type(known.get(name)) is not int]:
        raise UserError(f"model.init_from = {path}: its model_args lack {', '.join(absent)} (whole numbers)")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point() and not value.is_sparse
        for name, value in weights.items()
    ):
        raise UserError(f"model.init_from = {path}: its 'model' must be a table of names and tensors of real numbers")
    # nanoGPT's blocks have one option, the bias. The code of arXiv:2502.01628 is based on an older nanoGPT with GPT-2's
    # tanh GELU, whose checkpoints also contain scale_attn_by_inverse_layer_idx.
    older = "scale_attn_by_inverse_layer_idx" in arguments
    behaviour = {
        "radius": "none",
        "final_norm": "layer_norm",
        "bias": arguments.get("bias", True),
        "activation_function": "gelu_pytorch_tanh" if older else "gelu",
        "scale_attn_by_inverse_layer_idx": arguments.get("scale_attn_by_inverse_layer_idx", False),
    }
    iteration = content.get("iter_num")
    origin = f"{path} (nanoGPT{f', iteration {iteration:,}' if isinstance(iteration, int) else ''})"
    shape = {name: arguments[name] for name in _SHAPE}
    return _Weights(origin=origin, weights=_clean(weights), shape=shape, behaviour=behaviour)


def _shape(config: Any) -> dict[str, int]:
    return {name: getattr(config, name) for name in _SHAPE} | {"n_embd": getattr(config, "trunk_width", config.n_embd)}


def _clean(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without mask buffers, with names without the prefixes of torch.compile and DDP."""
    return {_PREFIXES.sub("", name): value for name, value in weights.items() if not _MASKS.search(name)}


def _fits(name: str, value: Tensor, parameter: Tensor, vocab_size: int) -> bool:
    """Whether `value` has all used entries of `parameter`; extra positions and padding do not count."""
    if value.ndim != parameter.ndim or value.shape[1:] != parameter.shape[1:]:
        return False
    if name == _POSITIONS:
        return len(value) >= len(parameter)
    if name in (_TOKENS, _HEAD, _LOG_WEIGHT):  # more padding would mean another tokenizer
        return vocab_size <= len(value) <= vocab_size + _MOST_PADDING
    return len(value) == len(parameter)


def _differences(found: _Weights, config: Any) -> list[str]:
    """A line for each setting in `found.behaviour` that differs in the run."""
    now = {name: getattr(config, name) for name in found.behaviour}
    if now.get("learn_exponent") and _EXPONENT in found.weights:
        now["exponent"] = found.behaviour["exponent"]  # the learned value is loaded with the weights
    return [
        f"model.{'head.' if name in _HEAD_SETTINGS else ''}{name} is {now[name]!r}, the checkpoint was "
        f"trained with {value!r}"
        for name, value in found.behaviour.items()
        if now[name] != value and not (now[name] in _TANH_GELUS and value in _TANH_GELUS)
    ]


def _is_file(init_from: str) -> bool:
    try:
        return Path(init_from).is_file()
    except OSError as error:
        raise UserError(f"model.init_from = {init_from} cannot be read: {error.strerror}. Give another path") from error


@contextmanager
def _naming_the_setting(init_from: str, setting: str = "model.init_from") -> Iterator[None]:
    """Add the setting and its rule to the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{setting} = {init_from}: {error} (the setting takes the folder of a model, an id on the Hugging "
            "Face hub, or nanoGPT's ckpt.pt)"
        ) from error


def _tokenizer_of(data: TokenShards) -> Any:
    """The tokenizer of a data folder, None if it is not known.

    A folder (of nanoGPT or llm.c) without a tokenizer is assumed to have GPT-2's tokens if its size is GPT-2's.
    """
    file = tokenizer_file(data.folder)
    if file is not None:
        return hf_tokenizer(file, 1, data.end_of_text)
    if data.vocab_size != GPT2_TOKENS:
        return None
    try:
        with TemporaryDirectory() as folder:
            return hf_tokenizer(load_tokenizer("gpt2").save(folder), 1)
    except UserError:  # GPT-2's files are not on this machine and cannot be downloaded
        return None


def _difference(of_data: Any, of_model: Any) -> str | None:
    """A sentence on the first difference between two Hugging Face tokenizers, None if they are the same."""
    in_data, in_model = of_data.get_vocab(), of_model.get_vocab()
    for token, number in sorted(in_data.items(), key=lambda item: item[1]):
        if in_model.get(token) != number:
            return f"token {number} of the data is {token!r}, of the model {of_model.convert_ids_to_tokens(number)!r}"
    special = {*of_data.all_special_ids, *of_model.all_special_ids}
    probe = "".join(of_data.batch_decode([[number] for number in sorted(in_data.values()) if number not in special]))
    first, second = (tokenizer(probe, add_special_tokens=False).input_ids for tokenizer in (of_data, of_model))
    return None if first == second else "they share a vocabulary, but encode the same text differently"
