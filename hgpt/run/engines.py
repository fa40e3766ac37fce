"""The engines that train a model: one process, DDP, DeepSpeed's ZeRO stages 1 to 3, FSDP2.

train.py calls `Engine` for all of them. A checkpoint does not depend on the engine: `collect` gathers sharded weights
and optimiser state into whole float32 tensors by parameter name, and `prepare` shards them again. So a run may resume
under another engine and with another number of processes.
"""

import copy
import hashlib
import operator
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import unset_hf_deepspeed_config

from hgpt.errors import UserError, first_line
from hgpt.hardware import installed_versions
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM, HGPTModel
from hgpt.run.config import RunConfig, read_backbone
from hgpt.run.settings import settings

SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP")  # Accelerate's distributed types
_PACKAGES = ("hgpt", "torch", "transformers", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy")
_ADAM = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides its step count

Result = TypeVar("Result")

# By parameter name, for AdamW {"step": (), "exp_avg": like the parameter, "exp_avg_sq": like the parameter}.
OptimizerState = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class FullState:
    """The configuration of the model, and whole float32 tensors on the CPU, by parameter name.

    A tied weight is listed under its first name only.
    """

    config: HGPTConfig
    weights: dict[str, Tensor]
    optimizer: OptimizerState


class Engine:
    """The processes of a run, and the engine that trains the model in them.

    Every method whose docstring says "collective" must be called by every process.

    Attributes:
        rank, world_size, device: of this process.
        is_main, is_local_main: whether this process is the first of the run, and of its node.
        model_config, num_parameters: of the model; known after `prepare`.
        teacher, teacher_fingerprint: the model of train.distill_from and what identifies it; None without one.
    """

    model_config: HGPTConfig
    num_parameters: int
    teacher: nn.Module | None = None
    teacher_fingerprint: str | None = None

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main, self.is_local_main = accelerator.is_main_process, accelerator.is_local_main_process
        self.device = accelerator.device

    @classmethod
    def start(cls, config: RunConfig) -> "Engine":
        """Join the processes that the launcher started. Collective.

        Raises UserError when the launcher asks for another precision or for an engine that is not supported or not
        installed, when the other processes do not answer, and when their settings, packages, code or engines differ.
        """
        check_environment()
        try:
            engine = cls(config, build_accelerator(config.train.precision, config.train.hang_timeout))
        except ValueError as error:
            given = sorted(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")))
            raise UserError(
                f"the launcher's settings cannot be used: {error}. They come from the environment variables "
                f"{', '.join(given) or 'WORLD_SIZE, RANK and LOCAL_RANK'}"
            ) from error
        mine = settings(config) | package_versions() | {"the code of hgpt (SHA-256)": code_fingerprint()}
        mine |= {"the engine": engine.name, "the precision": engine.precision, "the device": engine.device.type}
        file = config.model.head.distance_file
        mine["the content of model.head.distance_file"] = file and hashlib.sha256(Path(file).read_bytes()).hexdigest()
        mine["the content of model.backbone"] = config.model.backbone and read_backbone(config.model.backbone)
        engine.compare(mine)
        return engine

    def compare(self, mine: dict[str, Any], same: Callable[[Any, Any], bool] = operator.eq) -> None:
        """If `mine` differs between processes, raise UserError with the differing values everywhere. Collective."""
        everywhere = self.gather_objects(mine)
        lines = [
            f"  {name}: {everywhere[0].get(name)!r} on process 0, {theirs.get(name)!r} on process {rank}"
            for rank, theirs in enumerate(everywhere)
            for name in sorted(everywhere[0].keys() | theirs.keys())
            if not same(everywhere[0].get(name), theirs.get(name))
        ]
        if lines:
            raise UserError(
                "the processes of this run differ:\n" + "\n".join(lines) + "\nStart every node with the same "
                "configuration, the same checkout, the same environment, and the same files."
            )

    def together(self, work: Callable[[], Result]) -> Result:
        """This process's result of `work`. If `work` fails on any process, all raise a UserError. Collective.

        Otherwise the others would wait for the failed process in their next collective.
        """
        result, fault = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            fault = str(error)
        faults = self.gather_objects(fault)
        first = next((rank for rank, message in enumerate(faults) if message is not None), None)
        if first is not None:
            everywhere = all(message == faults[first] for message in faults)
            raise UserError(faults[first] if everywhere else f"process {first}: {faults[first]}")
        return result  # type: ignore[return-value]  # Result may be None

    def from_main(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which only the main process runs; errors as in `together`. Collective."""
        return self.gather_objects(self.together(lambda: work() if self.is_main else None))[0]

    @property
    def name(self) -> str:
        """The engine for a reader: one process, DDP, FSDP2 or DeepSpeed ZeRO-2."""
        if (plugin := self.accelerator.deepspeed_plugin) is not None:
            return f"DeepSpeed ZeRO-{plugin.deepspeed_config['zero_optimization']['stage']}"
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return "FSDP2"
        return "DDP" if self.world_size > 1 else "one process"

    @property
    def precision(self) -> str:
        """ "fp32" or "bf16"."""
        return "fp32" if self.accelerator.mixed_precision == "no" else self.accelerator.mixed_precision

    def configure(self, accumulation: int) -> None:
        """Give the engine the run's settings and `accumulation`, the micro-batches per step, before `prepare`.

        Raises UserError if the launcher's DeepSpeed file contradicts a setting, or if the engine does not support one.
        """
        self.accelerator.gradient_accumulation_steps = accumulation
        train, optim, plugin = self.config.train, self.config.optim, self.accelerator.deepspeed_plugin
        sharded = plugin is not None or self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and optim.algorithm == "muon":
            raise UserError(
                f'optim.algorithm = "muon" does not work under {self.name}, which shards the matrices that Muon needs '
                'whole: set it to "adamw", or launch DDP'
            )
        if sharded and train.skip_non_finite:
            raise UserError(
                f"train.skip_non_finite = {train.skip_non_finite} has no effect under {self.name}: set it to 0, or "
                "launch DDP"
            )
        if plugin is not None:
            if train.compile and plugin.deepspeed_config["zero_optimization"]["stage"] == 3:
                raise UserError(
                    "train.compile = true does not work with DeepSpeed's ZeRO-3, which gathers parameters in hooks "
                    "that compiled code does not call: set train.compile to false, or launch with zero2.yaml"
                )
            ours: dict[str, tuple[float, str]] = {
                "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
                "gradient_accumulation_steps": (accumulation, "train.global_batch / (train.micro_batch · processes)"),
                "train_batch_size": (train.global_batch, "train.global_batch"),
                "gradient_clipping": (optim.grad_clip, "optim.grad_clip"),
            }
            _configure_deepspeed(plugin.deepspeed_config, ours)

    def set_up_blocks(self, model: HGPTForCausalLM) -> None:
        """Activation checkpointing and torch.compile of the blocks, if the settings ask for them, before `prepare`."""
        train = self.config.train
        if train.activation_checkpointing:
            # Early versions of transformers 5 have the second name only.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if train.compile:
            alone = self.accelerator.distributed_type == DistributedType.NO
            compile_blocks(model, together=alone and not train.activation_checkpointing)

    def prepare(
        self, model: HGPTForCausalLM, optimizer: torch.optim.Optimizer, states: OptimizerState
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap model and optimiser for the engine, and load the optimiser state. Collective.

        Args:
            states: the optimiser state of a checkpoint, on every process; empty for an optimiser before its first step.
        """
        self.plain_model, self.plain_optimizer = model, optimizer
        # Copied before `accelerator.prepare`: ZeRO-3 empties the parameters.
        self.model_config, self.num_parameters = copy.deepcopy(model.config), model.num_parameters()
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        # Under bf16 DeepSpeed makes its float32 master weights from bf16 weights: keep the exact ones for `_fill_zero`.
        weights = {name: _copy(parameter) for name, parameter in model.named_parameters()} if deepspeed else {}
        prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        if deepspeed:
            _fill_zero(self.optimizer.optimizer, model, weights, states)
        elif states:
            for name, parameter in model.named_parameters():
                state = {kind: _sharded_like(value, parameter) for kind, value in states[name].items()}
                self.optimizer.state[parameter] = state
        return prepared, self.optimizer

    def learn_from(self, teacher: Any) -> None:
        """Set the teacher (train.distill_from; or None), which is neither trained nor saved. Collective.

        Raises UserError if processes have different teachers.
        """
        if teacher is not None:
            head = getattr(teacher.config, "head_in_words", teacher.config.model_type)  # n is no weight
            self.teacher_fingerprint = f"{head}, SHA-256 of the weights {weights_fingerprint(teacher)}"
            self.teacher = teacher.eval().requires_grad_(False).to(self.device)
        self.compare({"the model of train.distill_from": self.teacher_fingerprint})

    def set_exponent(self, step: int) -> None:
        """Set the n of `step` (train.exponent_start) in the head and in the saved configuration."""
        if self.config.train.exponent_steps:
            n = self._last_exponent * self.config.train.exponent_factor(step)
            self.plain_model.lm_head.initial_exponent = n
            self.plain_model.config.exponent = self.model_config.exponent = n

    @cached_property
    def _last_exponent(self) -> float:
        return float(self.config.model.to_hf(vocab_size=1, seq_len=1).exponent)

    def clip(self, model: nn.Module) -> Tensor:
        """Clip the gradient to a global norm of optim.grad_clip (0: not at all). Collective.

        Returns the norm before clipping, a scalar on the device. With train.skip_non_finite the optimiser skips the
        step if the norm is not finite: fused AdamW and Muon check found_inf on the device, without a sync.
        """
        limit = self.config.optim.grad_clip or float("inf")
        norm = _whole(torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), limit)))
        if self.config.train.skip_non_finite:
            self.plain_optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        return norm

    def collect(self) -> FullState | None:
        """A copy of the weights and the optimiser state, on the main process; None on the others. Collective."""
        engine = self.accelerator.distributed_type
        if not self.is_main and engine not in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            return None  # nothing is sharded: the main process has all
        full = FullState(config=copy.deepcopy(self.model_config), weights={}, optimizer={})
        for name, parameter in self.plain_model.named_parameters():  # gather one at a time on the device
            if engine == DistributedType.DEEPSPEED:
                weight, state = _gather_zero(parameter, self.optimizer.optimizer)
            else:
                weight = _whole(parameter)
                state = {kind: _whole(value) for kind, value in self.optimizer.state[parameter].items()}
            if self.is_main:
                full.weights[name] = _copy(weight)
                full.optimizer[name] = {kind: _copy(value) for kind, value in state.items()}
        return full if self.is_main else None

    def say(self, line: str) -> None:
        """Print on the first process of each node, at once also into a file or a pipe."""
        self.accelerator.print(line, flush=True)

    def gather_objects(self, mine: Any) -> list[Any]:
        """`mine` of every process, by rank. Collective."""
        return gather_object([mine])

    def end(self) -> None:
        """Wait for every process and destroy the process group. Collective."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


# --------------------------------------------------------------------------------------------------------------
# Starting


def check_environment() -> None:
    """Raise UserError unless the variables by which a launcher numbers the processes are usable numbers."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    size = environment.get("WORLD_SIZE", "1")
    below = {"MASTER_PORT": "65536"}
    if "WORLD_SIZE" in environment:
        below |= {"RANK": size, "LOCAL_RANK": size}
    for name, value in environment.items():
        least = 0 if "RANK" in name else 1
        limit = below.get(name, "1000000")
        if not (value.isascii() and value.isdigit() and len(value) < 9 and least <= int(value) < int(limit)):
            raise UserError(
                f"the environment variable {name} must be a whole number from {least} to {int(limit) - 1}; got "
                f"{value!r}: a launcher sets it (accelerate launch, torchrun); unset it to train in one process"
            )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size != "1" and missing:
        raise UserError(
            f"the environment variable WORLD_SIZE is {size}, and {' and '.join(missing)} is not set: start with a "
            "launcher (accelerate launch, torchrun), or unset WORLD_SIZE to train in one process"
        )


def build_accelerator(precision: str, hang_timeout: float) -> Accelerator:
    """The Accelerator for the processes that the launcher started.

    Args:
        precision: "fp32", "bf16" or "auto" (bf16 on GPUs that have it).
        hang_timeout: train.hang_timeout. Collectives time out after 1.5 times as long, so that the watchdog comes
            first: its message names the late processes.

    Raises UserError as `Engine.start` does.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # `check_environment` has checked it
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not on_gpu:
        raise UserError(
            "the launcher asks for FSDP, which Accelerate runs on GPUs only: use configs/accelerate/multi_cpu.yaml or "
            "zero2.yaml on CPUs"
        )
    mixed_precision, timeout = _mixed_precision(precision, on_gpu), 1.5 * hang_timeout
    group: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it guesses "cpu"
    plugin = _deepspeed_plugin(mixed_precision) if deepspeed else None
    if deepspeed and not on_gpu:
        # With ACCELERATE_USE_CPU Accelerate does not start DeepSpeed: unset it and choose the backend here.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["DS_ACCELERATOR"] = "cpu"
        group["backend"] = "gloo"
    # Without views DDP holds every gradient twice: in the parameter and in the bucket.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if processes > 1 or deepspeed:
        handlers.append(InitProcessGroupKwargs(**group))
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # torchrun does not set ACCELERATE_USE_CPU.
            cpu=processes > 1 and not (on_gpu or deepspeed or torch.xpu.is_available()),
            # `Engine.configure` sets the real num_steps; Accelerate's data loader is not used.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise UserError(
            f"the {processes} processes of this run did not find each other within {timeout:g} s at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {first_line(error)}. Check "
            "that every node was started, with the same main_process_ip and main_process_port and its own machine_rank "
            "(train.hang_timeout sets how long they wait)"
        ) from error
    unset_hf_deepspeed_config()  # otherwise from_pretrained shards under ZeRO-3, a collective
    if accelerator.distributed_type.value not in SUPPORTED:
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported; launch one process, "
            "DDP (accelerate's MULTI_GPU or MULTI_CPU), DEEPSPEED or FSDP"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError(
                "the launcher asks for the first version of FSDP, which cannot tie the embedding to the head: set "
                "fsdp_version to 2, as configs/accelerate/fsdp2.yaml does"
            )
        if (policy := plugin.mixed_precision_policy) is not None:  # reductions in float32, as under other engines
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    return accelerator


def _mixed_precision(precision: str, on_gpu: bool) -> str:
    """Accelerate's name of the run's precision, "no" or "bf16"; UserError if the launcher asks for another one."""
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise UserError(
            f"the launcher asks for mixed precision {launcher}, but train.precision is {precision}: only the run's "
            "configuration sets it; set mixed_precision to no in the launcher's file"
        )
    return "no" if precision == "fp32" else precision


def _deepspeed_plugin(mixed_precision: str) -> DeepSpeedPlugin:
    """The launcher's DeepSpeed settings, from the environment variables that `accelerate launch` sets."""
    if find_spec("deepspeed") is None:
        way_out = 'pip install "hgpt[deepspeed]"' if sys.platform == "linux" else "it exists for Linux only"
        raise UserError(
            f"the launcher asks for DeepSpeed, which is not installed: {way_out}; or launch DDP, "
            "configs/accelerate/multi_gpu.yaml"
        )
    # DeepSpeed compiles its CPU operators with ninja, which pip installs next to python, in a folder that is
    # not in PATH unless the environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    plugin = DeepSpeedPlugin()
    for name in ("fp16", "bf16"):
        enabled = plugin.deepspeed_config.get(name, {}).get("enabled", "auto")
        if enabled not in ("auto", name == mixed_precision):
            raise UserError(
                f"the launcher's DeepSpeed settings say {name}.enabled = {str(enabled).lower()}, and the run trains in "
                f"{'fp32' if mixed_precision == 'no' else mixed_precision} (train.precision): remove it there or set "
                'it to "auto"'
            )
    return plugin


def _configure_deepspeed(config: dict[str, Any], ours: dict[str, tuple[float, str]]) -> None:
    """Set `ours`, DeepSpeed's name → (value, our setting), in `config`; UserError if `config` contradicts them."""
    for name, (value, setting) in ours.items():
        asked = config.get(name, "auto")
        if asked not in ("auto", value):
            raise UserError(
                f"the launcher's DeepSpeed settings say {name} = {asked}, and the run's configuration says {value} "
                f'({setting}): remove it there or set it to "auto"'
            )
        config[name] = value
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise UserError(
                f"the launcher's DeepSpeed settings contain a section {name!r}: optimiser and schedule come from "
                "[optim] of the run's configuration; remove it"
            )
    # By default DeepSpeed sums bf16 gradients in bf16 over micro-batches and processes.
    config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    config.setdefault("communication_data_type", "fp32")


def compile_blocks(model: HGPTForCausalLM, together: bool = False) -> None:
    """torch.compile the blocks in place, so that parameters keep their names.

    Args:
        together: compile all blocks as one function, which launches fewer kernels: launches limit small micro-batches.
            But its backward pass returns all gradients at its end, so processes cannot exchange gradients during it,
            and an engine's hooks on single blocks are not called.
    """
    if together and isinstance(model.transformer, HGPTModel):
        return model.transformer.h.compile()
    # Blocks share one compilation, unless each scales attention by its own constant. A backbone's blocks are a plain
    # list, which is never called.
    apart, blocks = model.config.scale_attn_by_inverse_layer_idx, model.transformer.h
    for block in blocks:
        try:
            block.compile(isolate_recompiles=apart)
        except TypeError:  # torch 2.11 does not know it: the compilations of all blocks count against one limit
            block.compile()
            if apart:  # each block in training and in evaluation, with static and with dynamic shapes
                limit = torch._dynamo.config.recompile_limit
                torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's results."""
    return {"python": platform.python_version(), **installed_versions(*_PACKAGES)}


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the parameters' values."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_fingerprint(package: Path = Path(__file__).parents[1]) -> str:
    """The first 16 digits of the SHA-256 of the package's source files, which may differ within one version."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------
# Whole tensors


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Yield a parameter, gathered if it is sharded; for reading only. Collective."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield _whole(parameter)


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP2 shards (collective); returns any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy of a whole tensor on the device of `parameter` and sharded like it; scalars are not sharded."""
    copied = value.to(parameter.device, copy=True)  # `value` may be memory-mapped from a file
    if value.ndim and isinstance(parameter, DTensor):
        return distribute_tensor(copied, parameter.device_mesh, parameter.placements)
    return copied


def _partitions(zero: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """The flat float32 shards that this process updates, each with its optimiser state."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):  # ZeRO-3; ZeRO-1 and 2; ZeRO-1 under bf16
            return [(flat, zero.optimizer.state[flat]) for flat in getattr(zero, name)]
    raise UserError(
        f"DeepSpeed trains with {type(zero).__name__}, whose state cannot be saved: use ZeRO stage 1, 2 or 3"
    )


def _fill_zero(zero: Any, model: nn.Module, weights: dict[str, Tensor], states: OptimizerState) -> None:
    """Write this process's shards of the float32 weights and optimiser states into DeepSpeed's `zero`. Collective."""
    # A new optimiser gets a state of zeros too: if there is none before the first step, DeepSpeed links the state only
    # to the parameters of the first group.
    step = float(next(iter(states.values()))["step"]) if states else 0.0
    on_cpu = type(zero.optimizer).__module__.startswith("deepspeed.")  # DeepSpeedCPUAdam counts steps in an int
    for flat, state in _partitions(zero):
        state["step"] = int(step) if on_cpu else torch.tensor(step, device=flat.device)
        state.update({kind: torch.zeros_like(flat) for kind in _ADAM})
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in model.named_parameters():
        _scatter_zero(parameter, weights[name], None)
        for kind in _ADAM if states else ():
            _scatter_zero(parameter, states[name][kind], kind)


def _gather_zero(parameter: nn.Parameter, zero: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The float32 weight and Adam's state of a parameter from the shards of DeepSpeed's optimiser. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weight = safe_get_full_fp32_param(parameter)
    state = {kind: safe_get_full_optimizer_state(parameter, kind).reshape(weight.shape) for kind in _ADAM}
    return weight, {"step": torch.tensor(float(_partitions(zero)[0][1]["step"])), **state}


def _scatter_zero(parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
    """Write this process's shard of a whole tensor into DeepSpeed's optimiser: state `kind`, or the float32 weight."""
    import deepspeed.utils as ds

    if hasattr(parameter, "ds_id"):
        # ZeRO-3's setter of whole tensors fails unless the world size divides their number of elements.
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
        mine = value.flatten()[rank * size : (rank + 1) * size]
        value = torch.zeros(size)
        value[: mine.numel()] = mine
        set_weight, set_state = ds.safe_set_local_fp32_param, ds.safe_set_local_optimizer_state
    else:
        set_weight, set_state = ds.safe_set_full_fp32_param, ds.safe_set_full_optimizer_state
    if kind is None:
        set_weight(parameter, value)
    else:
        set_state(parameter, value, kind)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
