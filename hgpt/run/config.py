"""Every setting of a run, as frozen dataclasses. A setting that cannot take effect is an error."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.distances import Distance, load_distances, make_distance

DISTANCE_OPTIONS = ("p", "temperature", "metric", "rank")
OWN_OPTIONS = "model.head.distance_options"  # the one table whose keys are the user's


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The unembedding.

    Args:
        type: "harmonic" (logits −n log d) or "softmax" (logits w · x).
        exponent: n on the distance d: a number, "sqrt_dim" (√D), "dim" or a multiple such as "2*sqrt_dim".
            Harmonic only, and there required. On a CPU even numbers are fastest: they need no logarithms.
        learn_exponent: n is trained, starting from `exponent`. Harmonic only.
        distance: what d is: "euclidean" (the default), "cosine", "mahalanobis", which go through matrix products, or
            "manhattan", "minkowski", "chebyshev", "canberra", "bray_curtis", "hamming", which take many times as long
            (python -m hgpt.plan). Harmonic only, as are its options.
        distance_file: a Python file that registers a distance of your own (hgpt.register_distance); it is executed.
        distance_options: options of a distance of your own by their names, a table [model.head.distance_options] or
            --model.head.distance_options.NAME VALUE.
        p: of "minkowski", 1 or more; there required.
        temperature: of "hamming", in the unit of the hidden states; default 1.
        metric: of "mahalanobis", "diagonal" (the default), "low_rank" or "full".
        rank: of a "low_rank" metric, at most n_embd; there required.
        final_norm_gain: initial weight of the final layer norm, which sets the norm of the hidden states;
            default 0.05 with the harmonic head, 1 with softmax.
        centre_init_std: initial standard deviation of the centres (of the token embedding, where tied).
    """

    type: Literal["harmonic", "softmax"] = "harmonic"
    exponent: float | str | None = None
    learn_exponent: bool = False
    distance: str | None = None
    distance_file: str | None = None
    distance_options: dict[str, bool | int | float | str] | None = None
    p: float | None = None
    temperature: float | None = None
    metric: str | None = None
    rank: int | None = None
    final_norm_gain: float | None = None
    centre_init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.type == "softmax":
            distance = ("distance", "distance_file", "distance_options", *DISTANCE_OPTIONS)
            for name in ("exponent", "learn_exponent", *distance):
                if getattr(self, name) not in (None, False):
                    raise UserError(
                        f'model.head.{name} = {getattr(self, name)!r} has no effect with model.head.type = "softmax": '
                        f"remove it (on the command line: --model.head.{name} null), or set model.head.type = "
                        '"harmonic"'
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
        for name in DISTANCE_OPTIONS:
            if name in (self.distance_options or {}):
                raise UserError(f"{OWN_OPTIONS}.{name}: this is a setting of its own, model.head.{name}")

    def make_distance(self, dim: int) -> Distance:
        """The distance for vectors of width `dim`, without memory for its weights. Raises ValueError."""
        with torch.device("meta"):
            return make_distance(self.distance or "euclidean", dim, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the distance, whether settings of their own or in `distance_options`."""
        options = {name: getattr(self, name) for name in DISTANCE_OPTIONS} | (self.distance_options or {})
        return {name: value for name, value in options.items() if value is not None}

    def section_of(self, message: str) -> str:
        """The section of the setting that an error of the distance begins with."""
        name = message.split()[0]
        missing = not hasattr(self, name) and message.startswith(f"{name} is required")
        own = missing or name in (self.distance_options or {})
        return f"{OWN_OPTIONS}." if own else "model.head."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model; the vocabulary comes from the data, the context length is data.seq_len.

    Args:
        n_layer: blocks.
        n_head: attention heads.
        n_embd: width D.
        bias: whether linear layers and layer norms have biases.
        dropout: after the embedding, in attention and after each block's projections.
        activation_function: "gelu" as in nanoGPT, "gelu_pytorch_tanh" as in GPT-2.
        scale_attn_by_inverse_layer_idx: divide the attention scores of block i (from 0) by i + 1.
        initializer_range: standard deviation of initial weights.
        tie_word_embeddings: the centres are the token embedding.
        pad_vocab_to_multiple_of: rows of the embedding are rounded up to a multiple of this, for speed.
        init_from: where the weights come from: a Hugging Face GPT-2 (folder or id), an hgpt model folder, or a nanoGPT
            checkpoint (a .pt file). Nothing: random initialisation.
        head: the unembedding.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False
    dropout: float = 0.0
    activation_function: str = "gelu"
    scale_attn_by_inverse_layer_idx: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_vocab_to_multiple_of: int = 64
    init_from: str | None = None
    head: HeadConfig

    def __post_init__(self) -> None:
        try:
            self.head.make_distance(self.n_embd)
        except ValueError as error:
            raise UserError(f"{self.head.section_of(str(error))}{error}") from error

    def to_hf(self, *, vocab_size: int, seq_len: int, end_of_text: int | None = None) -> HGPTConfig:
        """The Hugging Face configuration of this model for a vocabulary and a context length."""
        head = self.head
        shared: dict[str, Any] = asdict(self)
        del shared["init_from"], shared["head"]
        if head.exponent is not None:
            shared["exponent"] = head.exponent
        try:
            return HGPTConfig(
                vocab_size=vocab_size,
                n_positions=seq_len,
                head=head.type,
                distance=head.distance or "euclidean",
                distance_options=head.options,
                learn_exponent=head.learn_exponent,
                final_norm_gain=head.final_norm_gain,
                centre_init_std=head.centre_init_std,
                bos_token_id=end_of_text,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
                **shared,
            )
        except ValueError as error:
            setting = str(error).split()[0]
            section = "model.head." if hasattr(head, setting) else "model." if hasattr(self, setting) else ""
            raise UserError(f"{section}{error}") from error


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data.

    Args:
        path: a folder written by data_prep, a bare nanoGPT folder with train.bin and val.bin, or a folder of shards of
            others with llm.c's header.
        seq_len: tokens per sequence T, and the context length of the model.
        vocab_size: only where the folder has no meta.json, so that nothing else says it.
        verify: read all of it once at the start and check checksums and tokens, about a second per GB.
    """

    path: str
    seq_len: int = 1024
    vocab_size: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1 token; got {self.seq_len}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"data.vocab_size must be at least 1; got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        steps: optimiser steps.
        global_batch: sequences per optimiser step, over all processes; tokens per step = global_batch · seq_len.
        micro_batch: sequences per forward pass and process; accumulation follows from the number of processes.
        seed: of the initial weights, the order of the data and dropout.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on GPUs that have it, fp32 elsewhere.
        compile: torch.compile each block.
        activation_checkpointing: keep only the inputs of blocks and recompute the rest in the backward pass.
        label_smoothing: ε of the training loss −Σ_i q_i log p_i, q = (1 − ε) 1[i = y] + ε / vocabulary. The training
            losses that are logged contain it, validation losses never do.
        skip_non_finite: how many steps with a gradient that is not finite are left out before the run stops; the
            windows of each are written to non_finite.jsonl. 0 stops at the first. Not with DeepSpeed.
        loss_chunk: positions whose products with all centres the head's loss computes at a time, 64 or more: less
            memory against fewer, larger products. Default: as many as take about 75 MiB on a CPU and 500 on a GPU.
        compile_loss: torch.compile what the head's loss does with these products. No faster on a CPU. On a GPU it
            should save most passes over the scores, which eagerly take longer than the products by arithmetic; not yet
            measured there (python -m benchmarks.head_loss --device cuda times both).
        distance_memory: MiB that a distance which is no matrix product may work with, beside operands and gradients.
            Default: 64 on a CPU, 512 on a GPU.
        hang_timeout: seconds without progress after which a process of several gives up, naming those it waits for.
            To be longer than the longest evaluation.
    """

    steps: int
    global_batch: int
    micro_batch: int
    seed: int = 1337
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    label_smoothing: float = 0.0
    skip_non_finite: int = 0
    loss_chunk: int | None = None
    compile_loss: bool = False
    distance_memory: float | None = None
    hang_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"train.label_smoothing must lie in [0, 1); got {self.label_smoothing}")
        if self.skip_non_finite < 0:
            raise UserError(f"train.skip_non_finite must be 0 (none) or more steps; got {self.skip_non_finite}")
        if self.loss_chunk is not None and self.loss_chunk < 64:
            raise UserError(f"train.loss_chunk must be at least 64 positions; got {self.loss_chunk}")
        if self.distance_memory is not None and not 0 < self.distance_memory < math.inf:
            raise UserError(f"train.distance_memory must be a positive number of MiB; got {self.distance_memory}")
        if not 0 < self.hang_timeout < math.inf:
            raise UserError(f"train.hang_timeout must be a positive number of seconds; got {self.hang_timeout}")
        if not 0 <= self.seed < 2**31:  # NumPy's generators take 32 bits, and each process adds its number
            raise UserError(f"train.seed must lie between 0 and 2^31 - 1; got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation: the algorithm and the learning-rate schedule.

    Args:
        algorithm: "adamw", or "muon": momentum made orthogonal (torch.optim.Muon, Newton-Schulz) for the matrices in
            the blocks and AdamW for all else. Muon's steps are scaled to AdamW's root mean square (arXiv:2502.16982),
            so that one learning rate and one decay serve both. On a CPU they are computed in float32, and not in
            bfloat16. Not with DeepSpeed and FSDP2.
        lr: peak learning rate, reached after the warm-up.
        min_lr: learning rate at the last step, of the schedules that fall.
        warmup_steps: steps of linear warm-up.
        schedule: from the end of the warm-up to the last step: "cosine", "linear", "constant" at `lr`, or
            "trapezoidal": constant, and linear over the last `decay_fraction` of all steps.
        decay_fraction: of the trapezoidal schedule; default 0.2.
        betas: AdamW's β₁ and β₂.
        muon_momentum: Muon's (Nesterov) momentum; default 0.95.
        eps: AdamW's ε.
        weight_decay: decay of matrices (never of norms and biases), in AdamW's decoupled form.
        grad_clip: largest global norm of the gradient; 0 turns clipping off.
        centre_lr_multiplier: factor on the learning rate of the centres (of the token embedding, where tied).
        final_norm_lr_multiplier: factor on the learning rate of the final layer norm.
        metric_lr_multiplier: factor on the learning rate of what is learnt of the head's distance ("mahalanobis"),
            which never decays: its scale means nothing.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4
    min_lr: float = 6e-5
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant", "trapezoidal"] = "cosine"
    decay_fraction: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    muon_momentum: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    centre_lr_multiplier: float = 1.0
    final_norm_lr_multiplier: float = 1.0
    metric_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "centre_lr_multiplier", "final_norm_lr_multiplier", "metric_lr_multiplier"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"optim.{name} must be a positive number; got {value}")
        for name in ("min_lr", "weight_decay", "grad_clip", "warmup_steps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"optim.{name} must be 0 or more; got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must lie in [0, 1); got {list(self.betas)}")
        for name, needs, chosen in (
            ("decay_fraction", "trapezoidal", self.schedule),
            ("muon_momentum", "muon", self.algorithm),
        ):
            value = getattr(self, name)
            if value is not None and chosen != needs:
                setting = "schedule" if needs == "trapezoidal" else "algorithm"
                raise UserError(
                    f'optim.{name} = {value} has no effect with optim.{setting} = "{chosen}": remove it, or set '
                    f'optim.{setting} = "{needs}"'
                )
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise UserError(f"optim.decay_fraction must lie in (0, 1]; got {self.decay_fraction}")
        if self.muon_momentum is not None and not 0 <= self.muon_momentum < 1:
            raise UserError(f"optim.muon_momentum must lie in [0, 1); got {self.muon_momentum}")
        if self.schedule != "constant" and self.min_lr > self.lr:
            raise UserError(f"optim.min_lr must not exceed optim.lr = {self.lr}; got {self.min_lr}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation, on the whole validation set.

    Args:
        every: steps between evaluations; the last step is always evaluated.
        micro_batch: sequences per forward pass and process.
        diagnostic_windows: sequences, taken evenly from the validation set, for the diagnostics of the head.
        unigram_baseline: print the loss of a unigram model of the training set at the start and beside the last
            validation loss. Reads the whole training set once: meant for small corpora.
    """

    every: int = 250
    micro_batch: int = 8
    diagnostic_windows: int = 16
    unigram_baseline: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "micro_batch", "diagnostic_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between checkpoints; the last step is always saved.
        keep_last: newest checkpoints that are kept; 0 keeps all.
        keep_every: a checkpoint at a multiple of this many steps is kept for good; 0: none is.
        log_spaced_until: besides, save at the steps 0, 1, 2, 4, 8, … up to this one, for good: for those who study how
            a model learns. 0: none.
        on_interrupt: on Ctrl-C, finish the step and save a checkpoint before stopping. A cluster's SIGTERM or SIGUSR1
            always does.
        background: write to disk while training goes on, from a copy in the main process's memory (weights and
            optimiser state, 12 bytes a parameter). A run still ends, and a next checkpoint begins, only when the last
            one is on the disk.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    log_spaced_until: int = 0
    on_interrupt: bool = True
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"checkpoint.every must be at least 1 step; got {self.every}")
        for name, otherwise in (("keep_last", "keep all"), ("keep_every", "none"), ("log_spaced_until", "none")):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name} must be 0 ({otherwise}) or more; got {getattr(self, name)}")
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
        """Whether a checkpoint belongs after `step` steps (the last step's belongs to every run)."""
        return (step > 0 and step % self.every == 0) or self._log_spaced(step)

    def for_good(self, step: int) -> bool:
        """Whether the checkpoint of `step` is never removed."""
        return (self.keep_every > 0 and step % self.keep_every == 0) or self._log_spaced(step)

    def _log_spaced(self, step: int) -> bool:
        return 0 < self.log_spaced_until >= step and step & (step - 1) == 0


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Reporting.

    Args:
        every: steps between logged training losses.
        trackers: "tensorboard" (files in the run folder), "wandb", or both; none for an empty list.
        wandb_project: project name for Weights & Biases, "hgpt" if not set.
        energy: measure energy and emissions, with codecarbon and without a network (pip install "hgpt[energy]"); a line
            of metrics.jsonl at every evaluation and checkpoint, cumulative. What the figures come from is printed.
        energy_country: whose electricity the run uses, as ISO 3166-1 alpha-3: "DEU", "USA". Required with log.energy.
    """

    every: int = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    wandb_project: str | None = None
    energy: bool = False
    energy_country: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"log.every must be at least 1 step; got {self.every}")
        if self.wandb_project is not None and "wandb" not in self.trackers:
            raise UserError(
                f'log.wandb_project = {self.wandb_project!r} has no effect without "wandb" in log.trackers: '
                'set log.trackers = ["wandb"], or remove it'
            )
        if self.energy and self.energy_country is None:
            raise UserError(
                "log.energy = true needs log.energy_country, the country whose electricity the run uses, as three "
                'letters of ISO 3166-1: set log.energy_country = "DEU", say, or log.energy = false'
            )
        if self.energy_country is not None and not self.energy:
            raise UserError(
                f"log.energy_country = {self.energy_country!r} has no effect without log.energy: set log.energy = "
                "true, or remove it"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Args:
        name: the run folder is runs_dir/name.
        runs_dir: folder of all runs.
        resume: "never" refuses a run folder that exists; "auto" goes on from its newest complete checkpoint, or starts
            if there is none; a checkpoint's path goes on from that one.
        model: the model.
        data: the data.
        train: the loop.
        optim: the optimiser.
        eval: evaluation.
        checkpoint: checkpoints.
        log: reporting.
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
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise UserError(f"name must be a plain folder name, the run folder under runs_dir; got {self.name!r}")
        if self.optim.warmup_steps >= self.train.steps:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} must be fewer than train.steps = {self.train.steps}: "
                "lower the one or raise the other"
            )
        distance = self.model.head.make_distance(self.model.n_embd)
        what = f'model.head.distance = "{self.model.head.distance or "euclidean"}"'
        if self.model.head.type == "softmax":
            what = 'model.head.type = "softmax"'
        if self.optim.metric_lr_multiplier != 1 and not list(distance.parameters()):
            raise UserError(
                f"optim.metric_lr_multiplier = {self.optim.metric_lr_multiplier} has no effect with {what}, where no "
                "distance is learnt: remove it"
            )
        for name in ("loss_chunk", "compile_loss"):
            if getattr(self.train, name) and distance.power is None:
                raise UserError(
                    f"train.{name} = {getattr(self.train, name)} has no effect with {what}, which goes through no "
                    f"matrix products: remove it"
                )
        if self.train.distance_memory is not None and distance.power is not None:
            raise UserError(
                f"train.distance_memory = {self.train.distance_memory} has no effect with {what}, which goes through "
                "matrix products: remove it"
            )

    @property
    def run_folder(self) -> Path:
        return Path(self.runs_dir) / self.name
