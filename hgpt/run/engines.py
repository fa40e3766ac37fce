"""What differs between the engines that train a model: one process, DDP, DeepSpeed's ZeRO stages 1 to 3, FSDP2.

`train.py` reads the same for all of them. Here is what it would otherwise have to ask about: the launcher's file
against the run's configuration, and weights and optimiser state in a form that belongs to no engine: whole float32
tensors by parameter name, collected from whatever pieces there are (`collect_state`) and handed out to whatever pieces
there will be (`restore_state`). A run may therefore go on under another engine and with another number of processes.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import unset_hf_deepspeed_config

from hgpt.errors import UserError

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


# What AdamW keeps for each parameter, besides its step count.
_ADAM = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class FullState:
    """Whole float32 tensors on the CPU, by parameter name; a tied weight stands under its first name only.

    `optimizer` maps a parameter's name to AdamW's state of it: {"step": (), "exp_avg": like it, "exp_avg_sq": like it}.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


# --------------------------------------------------------------------------------------------------------------
# Starting


def build_accelerator(precision: str, hang_timeout: float) -> Accelerator:
    """Accelerate's view of the processes that the launcher started, in the precision that the run asks for.

    Args:
        precision: "fp32", "bf16" or "auto" (bf16 on GPUs that have it).
        hang_timeout: `train.hang_timeout`. Operations of the group wait one and a half times as long: the watchdog
            comes first, which knows for whom they wait.

    Raises UserError when the launcher asks for another precision or an engine that is not supported or not installed,
    and when the other processes do not answer.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not on_gpu:
        raise UserError(
            "the launcher asks for FSDP, which Accelerate runs on GPUs alone: use configs/accelerate/multi_cpu.yaml or "
            "zero2.yaml on CPUs"
        )
    mixed_precision = _mixed_precision(precision)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, warns that it guesses so
    plugin = None
    timeout = 1.5 * hang_timeout
    group: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if deepspeed:
        plugin = _deepspeed_plugin(mixed_precision)
        if not on_gpu:
            # Accelerate knows DeepSpeed on GPUs only and would see one process: it has to be told the backend, and must
            # not be told that this is a CPU.
            os.environ.pop("ACCELERATE_USE_CPU", None)
            os.environ["DS_ACCELERATOR"] = "cpu"
            group["backend"] = "gloo"
    # Otherwise DDP holds every gradient twice, in the parameter and in the bucket that is sent.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if processes > 1 or deepspeed:
        handlers.append(InitProcessGroupKwargs(**group))
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # torchrun starts as many processes as it is told to, but does not say that they are to use the CPU.
            cpu=processes > 1 and not (on_gpu or deepspeed or torch.xpu.is_available()),
            # Accumulation follows from the batch settings; the loader is ours and knows no end.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise UserError(
            f"the {processes} processes of this run did not find each other within {timeout:g} s at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0]}. Check "
            "that every node was started, with the same main_process_ip and main_process_port and its own machine_rank "
            "(train.hang_timeout sets how long they wait)"
        ) from error
    # Under ZeRO-3 from_pretrained would partition what it loads: it would wait for every process.
    unset_hf_deepspeed_config()
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}, which is not supported; launch one process, "
            "DDP (accelerate's MULTI_GPU or MULTI_CPU), DEEPSPEED or FSDP"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)
    return accelerator


def _check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """UserError for FSDP's first version; reductions in float32, as under every other engine."""
    if plugin.fsdp_version != 2:
        raise UserError(
            "the launcher asks for the first version of FSDP, which cannot share the embedding with the head: set "
            "fsdp_version to 2, as configs/accelerate/fsdp2.yaml does"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def _mixed_precision(precision: str) -> str:
    """Accelerate's name of the precision of a run; UserError when the launcher asks for another one."""
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", precision):
        raise UserError(
            f"the launcher asks for mixed precision {launcher}, and train.precision is {precision}: it comes from the "
            "run's configuration alone; set mixed_precision to no in the launcher's"
        )
    return "no" if precision == "fp32" else precision


def _deepspeed_plugin(mixed_precision: str) -> DeepSpeedPlugin:
    """The launcher's DeepSpeed settings, read from the environment that `accelerate launch` sets."""
    if find_spec("deepspeed") is None:
        way_out = 'pip install "hgpt[deepspeed]"' if sys.platform == "linux" else "it exists for Linux only"
        raise UserError(
            f"the launcher asks for DeepSpeed, which is not installed: {way_out}; or launch DDP, "
            "configs/accelerate/multi_gpu.yaml"
        )
    # DeepSpeed compiles what it needs on the CPU with ninja, which pip puts beside Python: not on the path of those who
    # call .venv/bin/python.
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


def configure_engine(
    accelerator: Accelerator,
    *,
    micro_batch: int,
    accumulation: int,
    grad_clip: float,
    compiled: bool,
    skips: int,
    muon: bool,
) -> None:
    """Enter what the run's configuration decides into DeepSpeed's; to be called before `accelerator.prepare`.

    Raises UserError when the launcher's file already says something else, since a value stands in one place only, and
    when the engine cannot do what the run asks for.
    """
    plugin = accelerator.deepspeed_plugin
    in_pieces = plugin is not None or accelerator.distributed_type == DistributedType.FSDP
    if muon and in_pieces:
        raise UserError(
            f'optim.algorithm = "muon" does not work under {engine_name(accelerator)}, which keeps pieces of matrices '
            'where Muon needs them whole: set it to "adamw", or launch DDP'
        )
    if skips and in_pieces:
        raise UserError(
            f"train.skip_non_finite = {skips} has no effect under {engine_name(accelerator)}: set it to 0, or launch "
            "DDP"
        )
    if plugin is None:
        return
    config = plugin.deepspeed_config
    stage = config["zero_optimization"]["stage"]
    if stage == 3 and compiled:
        raise UserError(
            "train.compile = true does not work with DeepSpeed's ZeRO-3, which collects parameters in hooks that "
            "compiled code does not call: set train.compile to false, or launch with zero2.yaml"
        )
    processes = accelerator.num_processes
    ours: dict[str, tuple[float, str]] = {
        "train_micro_batch_size_per_gpu": (micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch / (train.micro_batch · processes)"),
        "train_batch_size": (micro_batch * accumulation * processes, "train.global_batch"),
        "gradient_clipping": (grad_clip, "optim.grad_clip"),
    }
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
    # Otherwise bf16 gradients are added up in bf16 over micro-batches and processes.
    config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    config.setdefault("communication_data_type", "fp32")


def engine_name(accelerator: Accelerator) -> str:
    """The engine in words for people: one process, DDP, DeepSpeed ZeRO-2."""
    if accelerator.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{accelerator.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def check_same_everywhere(accelerator: Accelerator, mine: Mapping[str, Any]) -> None:
    """Raise UserError on every process when they do not all have the same settings, package versions and code.

    Args:
        mine: what this process has, by name; the code of hgpt is added.
    """
    if accelerator.num_processes == 1:
        return
    everywhere = gather_object([{**mine, "the code of hgpt (SHA-256)": _code_fingerprint()}])
    for rank, theirs in enumerate(everywhere):
        names = sorted(everywhere[0].keys() | theirs.keys())
        lines = [
            f"  {name}: {everywhere[0].get(name)!r} on process 0, {theirs.get(name)!r} on process {rank}"
            for name in names
            if everywhere[0].get(name) != theirs.get(name)
        ]
        if lines:
            raise UserError(
                "the processes of this run differ:\n" + "\n".join(lines) + "\nStart every node with the same "
                "configuration, the same checkout and the same environment."
            )


def _code_fingerprint() -> str:
    """SHA-256 of the package's source files, which two checkouts of one version need not share."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------
# Whole tensors


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The whole of a parameter, to be read inside; every process has to enter."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield _whole(parameter)


def _whole(tensor: Tensor) -> Tensor:
    """FSDP2's pieces put together, which every process has to ask for; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> FullState | None:
    """A copy of weights and optimiser state, on the main process; None on the others, which all have to call it.

    Args:
        model: the plain model, before or after `accelerator.prepare`.
        optimizer: what `accelerator.prepare` returned of the optimiser.
    """
    zero = _zero_optimizer(optimizer, accelerator)
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    if zero is None:
        if not accelerator.is_main_process and accelerator.distributed_type != DistributedType.FSDP:
            return None
        for name, parameter in model.named_parameters():
            # One tensor at a time is whole on the device; only the main process keeps it.
            weight = _whole(parameter)
            state = {kind: _whole(value) for kind, value in optimizer.state[parameter].items()}
            if accelerator.is_main_process:
                weights[name] = _copy(weight)
                states[name] = {kind: _copy(value) for kind, value in state.items()}
        return FullState(weights=weights, optimizer=states) if accelerator.is_main_process else None

    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    step = torch.tensor(float(_partitions(zero)[0][1]["step"]))
    for name, parameter in model.named_parameters():
        weight = safe_get_full_fp32_param(parameter)
        state = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _ADAM}
        if accelerator.is_main_process:
            weights[name] = _copy(weight)
            states[name] = {kind: _copy(value.reshape(weight.shape)) for kind, value in state.items()}
            states[name]["step"] = step.clone()
    return FullState(weights=weights, optimizer=states) if accelerator.is_main_process else None


def model_weights(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor] | None:
    """The weights of a model that is not prepared yet, where `restore_state` needs them: under DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return {name: _copy(parameter) for name, parameter in model.named_parameters()}


def restore_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    weights: dict[str, Tensor] | None,
    states: dict[str, dict[str, Tensor]] | None,
) -> None:
    """Give weights and optimiser state to a prepared model; the arguments as of `collect_state`, on every process.

    `weights`, of `model_weights`, matter to DeepSpeed alone, which under bf16 makes its float32 masters out of the
    rounded weights: they become what they were. `states` are None for an optimiser that has not made a step.
    """
    zero = _zero_optimizer(optimizer, accelerator)
    if zero is None:
        if states is not None:
            for name, parameter in model.named_parameters():
                optimizer.state[parameter] = {kind: _like(value, parameter) for kind, value in states[name].items()}
        return
    # Made here even for a new optimiser: DeepSpeed finds the pieces of a state by itself only for the first of several
    # parameter groups, because it looks for them when that one has made its first step.
    step = float(next(iter(states.values()))["step"]) if states else 0.0
    for flat, state in _partitions(zero):
        state["step"] = int(step) if _is_cpu_adam(zero.optimizer) else torch.tensor(step, device=flat.device)
        state.update({kind: torch.zeros_like(flat) for kind in _ADAM})
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in model.named_parameters():
        if weights is not None:
            _hand_out(parameter, weights[name], None)
        if states:
            for kind in _ADAM:
                _hand_out(parameter, states[name][kind], kind)


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy of a whole tensor, where `parameter` is, and in pieces if that is; a scalar stays whole."""
    copied = value.to(parameter.device, copy=True)  # what was read may be mapped from a file
    if value.ndim and isinstance(parameter, DTensor):
        return distribute_tensor(copied, parameter.device_mesh, parameter.placements)
    return copied


def _hand_out(parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
    """This process's piece of a whole tensor into DeepSpeed's optimiser: its state `kind`, or the float32 weight."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):
        # ZeRO-3's own setter of whole tensors fails where the number of processes does not divide their size.
        piece = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        rank = torch.distributed.get_rank()
        flat = torch.zeros(piece)
        mine = value.flatten()[rank * piece : (rank + 1) * piece]
        flat[: mine.numel()] = mine
        if kind is None:
            safe_set_local_fp32_param(parameter, flat)
        else:
            safe_set_local_optimizer_state(parameter, flat, kind)
    elif kind is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _zero_optimizer(optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Any:
    """DeepSpeed's optimiser inside the prepared one; None where DeepSpeed does not train."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return optimizer.optimizer  # type: ignore[attr-defined]


def _partitions(zero: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """The flat float32 pieces of the parameters that this process updates, with the optimiser's state of each."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):  # ZeRO-3; ZeRO-1 and 2; ZeRO-1 under bf16
            return [(flat, zero.optimizer.state[flat]) for flat in getattr(zero, name)]
    raise UserError(
        f"DeepSpeed trains with {type(zero).__name__}, whose state cannot be saved: use ZeRO stage 1, 2 or 3"
    )


def _is_cpu_adam(optimizer: torch.optim.Optimizer) -> bool:
    """DeepSpeed's own Adam on the CPU, for offloaded states, counts its steps in a Python integer."""
    return type(optimizer).__module__.startswith("deepspeed.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
