"""Every setting of a run, as frozen dataclasses. A setting that would have no effect is an error."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hgpt.durable import read_json
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig, InvalidSetting
from hgpt.model.distances import load_distances, make_distance
from hgpt.model.harmonized import HarmonizedConfig, model_class

# The settings of [model] and [model.head] that are fields of HGPTConfig, with its types, defaults and descriptions.
MODEL = (
    *("n_layer", "n_head", "n_embd", "bias", "dropout", "activation_function", "scale_attn_by_inverse_layer_idx"),
    *("tie_word_embeddings", "final_norm"),
)
HEAD = (
    *("type", "exponent", "learn_exponent", "distance", "distance_options", "radius", "final_norm_gain"),
    "centre_init_std",
)
# An error with a softmax head if they are set. Their default is None (learn_exponent: False), which means not set.
HARMONIC_ONLY = ("exponent", "learn_exponent", "distance", "distance_file", "distance_options")


def _fields_of_hgpt_config(names: tuple[str, ...]) -> type:
    """A dataclass with these fields of HGPTConfig, as the base class of a section."""
    known = {entry.name: entry for entry in fields(HGPTConfig)}
    known["type"] = known["head"]  # [model.head] type
    specification: list[Any] = []
    for name in names:
        kind: Any = known[name].type
        default = known[name].default
        if default is None or (name in HARMONIC_ONLY and kind is not bool):
            kind, default = kind | None, None
        specification.append((name, kind, field(default=default)))
    return make_dataclass("FieldsOfHGPTConfig", specification, frozen=True, kw_only=True)


def _require(section: str, config: Any, names: str, holds: Callable[[Any], bool], rule: str) -> None:
    """Raise UserError for the first of these settings whose value breaks the rule."""
    for name in names.split():
        if not holds(getattr(config, name)):
            raise UserError(f"{section}.{name} must {rule}; got {getattr(config, name)}")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


# Bounds far above every use catch mistyped numbers that would train or allocate for hours.
MOST = 1_000_000
YEAR = 31_536_000.0  # seconds


@dataclass(frozen=True, kw_only=True)
class HeadConfig(_fields_of_hgpt_config(HEAD)):  # type: ignore[misc]  # a base class made at run time
    """The unembedding. HGPTConfig describes the fields in HEAD.

    Args:
        type: "harmonic" (logits −n log d) or "softmax" (logits w · x).
        radius_init: initial log-weights a_i with radius "learned": "unigram", the logarithms of the tokens' frequencies
            in the training split, or "zero". Default: those of model.init_from if it has any, otherwise "unigram".
        distance_file: a Python file, which is executed, that registers your own distance (hgpt.register_distance).
    """

    radius_init: Literal["unigram", "zero"] | None = None
    distance_file: str | None = None

    def __post_init__(self) -> None:
        if self.radius_init is not None and self.radius == "none":
            raise UserError(
                f'model.head.radius_init = "{self.radius_init}" has no effect with model.head.radius = "none": remove '
                'it, or set model.head.radius to "learned"'
            )
        if self.type == "softmax":
            for name in HARMONIC_ONLY:
                value = getattr(self, name)
                if value not in (None, False):
                    raise UserError(
                        f'model.head.{name} = {value!r} has no effect with model.head.type = "softmax": remove it (on '
                        f"the command line: --model.head.{name} {'false' if value is True else 'null'})"
                    )
        elif self.exponent is None:
            raise UserError(
                'model.head.exponent is required with model.head.type = "harmonic": n on the distance d, for example '
                '"2*sqrt_dim"'
            )
        if self.distance_file is not None:
            try:
                load_distances(self.distance_file)
            except ValueError as error:
                raise UserError(f"model.head.distance_file: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_fields_of_hgpt_config(MODEL)):  # type: ignore[misc]  # a base class made at run time
    """The model. HGPTConfig describes the fields in MODEL; vocabulary and context length come from [data].

    Args:
        init_from: initial weights: a Hugging Face GPT-2 (folder or id), an hgpt model folder, or a nanoGPT checkpoint
            (.pt file). Random if not set.
        backbone: a config.json of transformers, or its folder: train this causal language model (Llama, Qwen, …) with
            an hgpt head, instead of our GPT-2. The folder may come from hgpt.convert or `harmonize`; init_from with the
            same folder loads its weights.
    """

    init_from: str | None = None
    backbone: str | None = None
    head: HeadConfig

    def __post_init__(self) -> None:
        config = self.to_hf(vocab_size=1, seq_len=1)  # only for its checks, which do not depend on the data
        if self.backbone is not None:
            try:
                with torch.device("meta"):
                    model_class(config)(config)
            except InvalidSetting as error:
                raise UserError(f"model.backbone = {self.backbone}: {error}") from error
            if self.init_from is not None and read_backbone(self.backbone)["model_type"] != HarmonizedConfig.model_type:
                raise UserError(
                    f"model.init_from = {self.init_from}: its weights cannot be loaded into model.backbone = "
                    f"{self.backbone}, which has no head of hgpt: remove one, or set both to a folder of hgpt.convert"
                )
            known = {entry.name: entry.default for entry in fields(HGPTConfig)}
            for name in set(MODEL) - {"tie_word_embeddings"}:
                inner = getattr(config.get_text_config(), name, None)  # a lift adds 1 to n_embd
                if (value := getattr(self, name)) not in (known[name], getattr(config, name), inner):
                    raise UserError(
                        f"model.{name} = {value!r} has no effect with model.backbone = {self.backbone}: remove it, and "
                        "change the backbone's file"
                    )
        _require("model", self, "n_layer n_embd", lambda value: value <= MOST // 10, f"be at most {MOST // 10:,}")

    def to_hf(self, *, vocab_size: int, seq_len: int, end_of_text: int | None = None) -> HGPTConfig:
        """The Hugging Face configuration of this model for a vocabulary and a context length. Raises UserError."""
        values = {name: getattr(self.head, name) for name in HEAD}
        values |= {"head": values.pop("type"), "vocab_size": vocab_size}
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
        try:
            if self.backbone is None:
                values |= {name: getattr(self, name) for name in MODEL} | {"n_positions": seq_len}
                return HGPTConfig(**{name: value for name, value in values.items() if value is not None})
            backbone = read_backbone(self.backbone)
            if backbone["model_type"] == HarmonizedConfig.model_type:  # keeps its rows and positions
                values |= {name: backbone[name] for name in ("lift", "head_version") if name in backbone}
                backbone = backbone["backbone"]
            else:
                rows = HGPTConfig(vocab_size=vocab_size).padded_vocab_size
                backbone |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
                backbone |= {"vocab_size": rows, "max_position_embeddings": seq_len}
            backbone |= {"pad_token_id": None}  # otherwise nn.Embedding would never train its row
            values |= {"tie_word_embeddings": self.tie_word_embeddings, "backbone": backbone}
            config = HarmonizedConfig(**{name: value for name, value in values.items() if value is not None})
            if seq_len > config.n_positions:
                raise InvalidSetting("backbone", f"data.seq_len = {seq_len} exceeds its {config.n_positions} positions")
            return config
        except InvalidSetting as error:
            named = f"model.head.{error.setting}" if error.setting in HEAD else f"model.{error.setting}"
            if self.backbone is not None and error.setting not in (*HEAD, *MODEL):
                named = f"model.backbone = {self.backbone}"
            raise UserError(f"{named}: {error}") from error


def read_backbone(path: str) -> dict[str, Any]:
    """A config.json of transformers, by its path or that of its folder. Raises UserError."""
    file = Path(path) / "config.json" if os.path.isdir(path) else Path(path)
    way_out = "Give a config.json of transformers, or a folder that holds one"
    try:
        found = read_json(file, way_out)
    except FileNotFoundError as error:
        raise UserError(f"model.backbone = {path}: there is no such file. {way_out}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise UserError(f"model.backbone = {path}: it has no model_type. {way_out}")
    harmonized = found["model_type"] == HarmonizedConfig.model_type
    if found["model_type"] == HGPTConfig.model_type or (harmonized and not isinstance(found.get("backbone"), dict)):
        raise UserError(
            f"model.backbone = {path}: a model of hgpt is no backbone, unless hgpt.convert made it. {way_out}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data.

    Args:
        path: a folder that data_prep wrote, a nanoGPT folder (train.bin, val.bin, meta.pkl if there is one), or a
            folder of shards with llm.c's header.
        seq_len: tokens per sequence T, and the context length of the model.
        vocab_size: number of classes; needed if the folder has neither meta.json nor a tokenizer.
        verify: at the start, check the checksums and the range of all tokens: about a second per GB.
    """

    path: str
    seq_len: int = 1024
    vocab_size: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        _require("data", self, "seq_len", lambda value: value >= 1, "be at least 1 token")
        _require("data", self, "vocab_size", lambda value: value is None or value >= 1, "be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimiser steps.
        global_batch: sequences per optimiser step, over all processes; tokens per step = global_batch · seq_len.
        micro_batch: sequences per forward pass and process; accumulation follows from the number of processes.
        seed: seed of the initial weights, the order of the data and dropout.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on GPUs that support it, fp32 elsewhere.
        compile: torch.compile the blocks.
        activation_checkpointing: keep only the inputs of blocks and recompute the rest in the backward pass.
        label_smoothing: ε of the training loss −Σ_i q_i log p_i with q_i = (1 − ε) 1[i = target] + ε / vocab_size.
            Logged training losses contain it, validation losses do not.
        distill_from: a teacher, i.e. a run, checkpoint, exported model or id on the Hugging Face hub, with the
            tokenizer of the data. The training loss is then (1 − w) · cross-entropy + w · T² · KL(teacher ‖ model),
            with both models' logits divided by T in the KL. Validation losses do not contain the KL.
        distill_weight: w of the KL.
        distill_temperature: T of the KL.
        exponent_start: n at the first step, as a multiple of model.head.exponent.
        exponent_steps: steps in which n goes from exponent_start to model.head.exponent, by the same factor each.
        skip_non_finite: number of steps with a non-finite gradient that are skipped before the run stops; 0 stops at
            the first. non_finite.jsonl lists the data of these steps. Not with DeepSpeed and FSDP2.
        hang_timeout: seconds without progress after which a process exits and names the processes it waits for.
            Must be longer than the checks at the start, the longest evaluation and the saving of a checkpoint.
    """

    steps: int
    global_batch: int
    micro_batch: int
    seed: int = 1337
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    label_smoothing: float = 0.0
    distill_from: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    exponent_start: float = 1.0
    exponent_steps: int = 0
    skip_non_finite: int = 0
    hang_timeout: float = 1800.0

    def __post_init__(self) -> None:
        _require("train", self, "steps", lambda value: value >= 1, "be at least 1")
        _require("train", self, "global_batch micro_batch", lambda value: 1 <= value <= MOST, f"be 1 to {MOST:,}")
        _require("train", self, "label_smoothing", lambda value: 0 <= value < 1, "lie in [0, 1)")
        _require("train", self, "distill_weight", lambda value: 0 <= value <= 1, "lie in [0, 1]")
        _require("train", self, "distill_temperature exponent_start", _positive, "be a positive number")
        _require("train", self, "exponent_steps", lambda value: 0 <= value <= self.steps, "be 0 to train.steps")
        for name in ("distill_weight", "distill_temperature"):
            if self.distill_from is None and (value := getattr(self, name)) != getattr(TrainConfig, name):
                raise UserError(f"train.{name} = {value} has no effect without train.distill_from: remove it")
        if (self.exponent_start != 1) != (self.exponent_steps > 0):
            raise UserError(
                f"train.exponent_start = {self.exponent_start} and train.exponent_steps = {self.exponent_steps}: n "
                "changes only if the first is not 1 and the second is more than 0; set both, or neither"
            )
        _require("train", self, "skip_non_finite", lambda value: value >= 0, "be 0 (none) or more steps")
        _require("train", self, "hang_timeout", lambda value: 1 <= value <= YEAR, "be 1 second to a year, 31,536,000 s")
        # NumPy's generators take 32 bits, and each process adds its rank.
        _require("train", self, "seed", lambda value: 0 <= value < 2**31, "lie between 0 and 2^31 - 1")

    def exponent_factor(self, step: int) -> float:
        """n / model.head.exponent after `step` steps: exponent_start at 0, 1 from exponent_steps on."""
        left = 1 - step / self.exponent_steps if step < self.exponent_steps else 0.0
        return self.exponent_start**left


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation: the algorithm and the learning-rate schedule.

    Args:
        algorithm: "adamw", or "muon": torch.optim.Muon for the matrices in the blocks, AdamW for the rest. Muon's steps
            have AdamW's root mean square (arXiv:2502.16982), so one learning rate and one weight decay serve both. Not
            with DeepSpeed and FSDP2.
        lr: peak learning rate, reached after the warm-up.
        min_lr: learning rate at the last step, unless the schedule is "constant".
        warmup_steps: steps of linear warm-up.
        schedule: from the end of the warm-up to the last step: "cosine", "linear", "constant", or "trapezoidal":
            constant, then linear over the last fifth of all steps.
        betas: AdamW's β₁ and β₂.
        eps: AdamW's ε.
        weight_decay: decoupled weight decay of matrices; vectors (norms, biases) never decay.
        grad_clip: largest global norm of the gradient; 0: no clipping.
        centre_lr_multiplier: factor on the learning rate of the centres (of the token embedding, where tied).
        final_norm_lr_multiplier: factor on the learning rate of the final layer norm.
        metric_lr_multiplier: factor on the learning rate of the parameters of the head's distance ("mahalanobis"). They
            never decay, because the scale of a distance has no effect.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4
    min_lr: float = 6e-5
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant", "trapezoidal"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    centre_lr_multiplier: float = 1.0
    final_norm_lr_multiplier: float = 1.0
    metric_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        positive = "lr eps centre_lr_multiplier final_norm_lr_multiplier metric_lr_multiplier"
        _require("optim", self, positive, _positive, "be a positive number")
        not_negative = "min_lr weight_decay grad_clip warmup_steps"
        _require("optim", self, not_negative, lambda value: 0 <= value < math.inf, "be 0 or more")
        _require("optim", self, "betas", lambda betas: all(0 <= beta < 1 for beta in betas), "lie in [0, 1)")
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise UserError(f"optim.min_lr must not exceed optim.lr = {self.lr}; got {self.min_lr}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation, on the whole validation set.

    Args:
        every: steps between evaluations; the last step is always evaluated.
        micro_batch: sequences per forward pass and process.
        diagnostic_windows: sequences of the validation set, evenly spaced, for the diagnostics of the head.
        unigram_baseline: print the validation loss of a unigram model. Reads the whole training set once: for small
            corpora.
    """

    every: int = 250
    micro_batch: int = 8
    diagnostic_windows: int = 16
    unigram_baseline: bool = False

    def __post_init__(self) -> None:
        _require("eval", self, "every", lambda value: value >= 1, "be at least 1")
        _require("eval", self, "micro_batch diagnostic_windows", lambda value: 1 <= value <= MOST, f"be 1 to {MOST:,}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between checkpoints; the last step is always saved.
        keep_last: number of newest checkpoints to keep; 0: all.
        keep_every: never delete checkpoints at multiples of this many steps; 0: none.
        log_spaced_until: also save at the steps 0, 1, 2, 4, 8, … up to this one, and never delete these, to study how a
            model learns; 0: none.
        background: write while training continues, from a copy in the main process's memory (weights and optimiser
            state, 12 bytes a parameter). The next checkpoint and the end of the run wait for it.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    log_spaced_until: int = 0
    background: bool = True

    def __post_init__(self) -> None:
        _require("checkpoint", self, "every", lambda value: value >= 1, "be at least 1 step")
        _require("checkpoint", self, "keep_last", lambda value: value >= 0, "be 0 (keep all) or more")
        _require("checkpoint", self, "keep_every log_spaced_until", lambda value: value >= 0, "be 0 (none) or more")
        if self.keep_every and not self.keep_last:
            raise UserError(
                f"checkpoint.keep_every = {self.keep_every} has no effect with checkpoint.keep_last = 0, which keeps "
                "all: set keep_last, or remove keep_every"
            )
        if self.keep_every % self.every:
            raise UserError(
                f"checkpoint.keep_every = {self.keep_every} must be a multiple of checkpoint.every = {self.every}: "
                "other steps are not saved"
            )

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps; every run also saves after its last step."""
        return (step > 0 and step % self.every == 0) or self._log_spaced(step)

    def for_good(self, step: int) -> bool:
        """Whether the checkpoint of `step` is never deleted."""
        return (self.keep_every > 0 and step % self.keep_every == 0) or self._log_spaced(step)

    def _log_spaced(self, step: int) -> bool:
        return 0 < self.log_spaced_until >= step and step & (step - 1) == 0


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Reporting.

    Args:
        every: steps between logged training losses.
        trackers: list of "tensorboard" (files in the run folder) and "wandb" (project: WANDB_PROJECT, default "hgpt").
        energy_country: measure energy, and emissions for the electricity of this country, as ISO 3166-1 alpha-3:
            "DEU", "USA" (pip install "hgpt[energy]", no network). metrics.jsonl gets the totals at every evaluation
            and checkpoint.
    """

    every: int = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    energy_country: str | None = None

    def __post_init__(self) -> None:
        _require("log", self, "every", lambda value: value >= 1, "be at least 1 step")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Args:
        name: the run folder is runs_dir/name.
        runs_dir: folder of all runs.
        resume: "never" refuses a run folder that is not empty; "auto" resumes the newest complete checkpoint of the
            run folder, or starts a new run if there is none; the path of a checkpoint folder resumes that one.
    """

    name: str
    runs_dir: str = "runs"
    resume: str = "never"
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name in ("", "..") or len(os.fsencode(self.name)) > 200:
            raise UserError(
                "name must be a plain folder name of at most 200 bytes, the run folder under runs_dir; got "
                f"{self.name!r}"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} must be fewer than train.steps = {self.train.steps}: "
                "lower the first or raise the second"
            )
        model = self.model.to_hf(vocab_size=1, seq_len=1)
        if self.train.exponent_steps and (model.head == "softmax" or model.learn_exponent):
            why = "a softmax head has no exponent" if model.head == "softmax" else "n is learned"
            raise UserError(f"train.exponent_steps = {self.train.exponent_steps} has no effect, as {why}: remove it")
        with torch.device("meta"):
            distance = make_distance(model.distance, model.n_embd, **model.distance_options)
        if self.optim.metric_lr_multiplier != 1 and not list(distance.parameters()):
            softmax = model.head == "softmax"
            head = 'model.head.type = "softmax"' if softmax else f'model.head.distance = "{model.distance}"'
            raise UserError(
                f"optim.metric_lr_multiplier = {self.optim.metric_lr_multiplier} has no effect with {head}, which "
                "learns no distance: remove it"
            )

    @property
    def run_folder(self) -> Path:
        return Path(self.runs_dir) / self.name
