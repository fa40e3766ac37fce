"""Checkpoints: saved atomically, found again, and the Hugging Face model inside each.

    runs/<name>/checkpoints/step_0000500/
      model/                    the exported Hugging Face model: float32 weights, tokenizer, model card
      optimizer.safetensors     AdamW's state by parameter name: "exp_avg/transformer.wte.weight", ...
      rng_00000.safetensors     random-number generators of process 0, one such file per process
      state.json                step, tokens, validation loss, settings, data, package versions
      manifest.json             size and SHA-256 of every file above; written last

A checkpoint is written under another name and renamed, so it is complete or absent. The weights are kept once: the
exported model is what a run goes on from. Nothing in it depends on the engine or the number of processes that wrote it,
and no file of it can run code when it is read (safetensors and JSON).
"""

import copy
import hashlib
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hgpt.data.shards import TokenShards
from hgpt.durable import remove_folder, sha256, whole_file
from hgpt.durable import whole_folder as atomic_folder  # noqa: F401 - train.py calls it by this name
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import CheckpointConfig
from hgpt.run.engines import FullState

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MODEL = "model"
LOCK = ".lock"  # held by the process that trains in the folder
PREEMPTED = "preempted"  # in the folder of a run that a cluster stopped: launchers do not pass on exit codes
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"

_PACKAGES = ("hgpt", "torch", "transformers", "accelerate", "deepspeed", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs besides tensors to go on, and what a reader wants to know of a checkpoint.

    `step` counts finished optimiser steps, `tokens` the training tokens they saw; `validation_loss` was measured at
    `validation_step`. `settings` are the resolved settings by dotted name; `data` identifies the token shards
    (`data_fingerprint`).
    """

    step: int
    tokens: int
    validation_loss: float | None
    validation_step: int | None
    settings: dict[str, Any]
    data: str
    world_size: int
    packages: dict[str, str] = field(default_factory=lambda: package_versions())


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a source checkout on the path
            versions[package] = "not installed"
    return versions


def data_fingerprint(*splits: TokenShards) -> str:
    """SHA-256 of the checksums in meta.json of these splits; of their lengths for a bare nanoGPT folder."""
    parts: list[Any] = []
    for shards in splits:
        meta = shards.meta
        parts.append(len(shards) if meta is None else [record.sha256 for record in meta.splits[shards.split].shards])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------
# Finding


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name, step_0000500."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoint folders by rising step."""
    found = [path for path in (run_folder / CHECKPOINTS).glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is: every file of the manifest, its size and its SHA-256."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())["files"]
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size, checksum in entries:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256(path) != checksum:
            return f"{name} does not match its checksum"
    return None


def newest_checkpoint(run_folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one is named through `warn` and passed over."""
    for checkpoint in reversed(checkpoints(run_folder)):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"{checkpoint} is damaged and passed over: {fault}")
    return None


# --------------------------------------------------------------------------------------------------------------
# Saving


def write_manifest(folder: Path) -> None:
    """Enter size and SHA-256 of every file of `folder` into its manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))


def save_training_state(
    folder: Path, full: FullState, random_states: list[dict[str, Tensor]], state: TrainState
) -> None:
    """Optimiser state by parameter name, each process's random-number generators and state.json into `folder`."""
    tensors = {f"{kind}/{name}": value for name, kinds in full.optimizer.items() for kind, value in kinds.items()}
    save_file(tensors, folder / OPTIMIZER)
    for rank, generators in enumerate(random_states):
        save_file(generators, _random_state_file(folder, rank))
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1))


def save_model(folder: Path, config: HGPTConfig, weights: dict[str, Tensor]) -> None:
    """The Hugging Face model of these weights, by `save_pretrained`."""
    with torch.device("meta"):
        model = HGPTForCausalLM(copy.deepcopy(config))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def random_state() -> dict[str, Tensor]:
    """This process's generators that training draws from (dropout)."""
    generators = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return generators


class Writer:
    """Writes one checkpoint at a time, beside the training or in line with it.

    `seconds` is the time that `submit` and `wait` held up their caller.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None
        self.seconds = 0.0

    def submit(self, write: Callable[[], None]) -> None:
        """Start `write` when the one before it has ended; raises what that one raised."""
        self.wait()
        if self._pool is None:
            start = time.perf_counter()
            write()
            self.seconds += time.perf_counter() - start
        else:
            self._pending = self._pool.submit(write)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ends the run, what was submitted is finished; its own failure counts if nothing else went wrong."""
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def wait(self, *, only_look: bool = False) -> None:
        """Until what was submitted is on the disk; raises what it raised. `only_look`: not while it is at work."""
        start = time.perf_counter()
        if self._pending is not None and not (only_look and not self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()
        self.seconds += time.perf_counter() - start


def point_latest(run_folder: Path, checkpoint: Path) -> None:
    """Make run_folder/latest a link to `checkpoint`, in one step."""
    with whole_file(run_folder / LATEST) as link:
        link.symlink_to(checkpoint.relative_to(run_folder))


def remove_old(run_folder: Path, config: CheckpointConfig) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `latest`, and those that are kept for good.

    Later ones, from before the run was set back to an older checkpoint, are none of the newest.
    """
    if config.keep_last:
        latest = checkpoint_step((run_folder / LATEST).resolve())
        older = [path for path in checkpoints(run_folder) if checkpoint_step(path) <= latest][: -config.keep_last]
        for checkpoint in older:
            if not config.for_good(checkpoint_step(checkpoint)):
                remove_folder(checkpoint)


# --------------------------------------------------------------------------------------------------------------
# Resuming


def load_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint. UserError if another version of hgpt wrote other fields."""
    try:
        return TrainState(**json.loads((checkpoint / STATE).read_text()))
    except TypeError as error:
        raise UserError(
            f"{checkpoint / STATE} was written by another version of hgpt ({error}); go on with that version, or start "
            f"a run with model.init_from = {checkpoint}"
        ) from error


def load_model(checkpoint: Path) -> HGPTForCausalLM:
    """The model of a checkpoint, in float32.

    Weights are moved out of the file's mapping, where they lie at addresses that are multiples of 4: some small matrix
    products round differently there (measured: MKL, 320 × 32 times 32 × 4, at other than multiples of 16), and a run
    would not go on bit for bit.
    """
    model = HGPTForCausalLM.from_pretrained(checkpoint / MODEL, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def load_optimizer(checkpoint: Path, model: HGPTForCausalLM) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter name; empty if no step had been made when it was saved.

    Raises UserError if the names or the shapes are not those of the model's parameters.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        kind, name = key.split("/", 1)
        saved.setdefault(name, {})[kind] = value
    reshaped = {
        name
        for name in saved.keys() & parameters.keys()
        # Adam's step count is a scalar.
        if any(value.ndim and value.shape != parameters[name].shape for value in saved[name].values())
    }
    if saved and (saved.keys() != parameters.keys() or reshaped):
        raise UserError(
            f"{checkpoint / OPTIMIZER} belongs to another model: not in the model "
            f"{sorted(saved.keys() - parameters.keys())}, not in the file {sorted(parameters.keys() - saved.keys())}, "
            f"of another shape {sorted(reshaped)}"
        )
    return saved


def load_random_state(checkpoint: Path, rank: int) -> bool:
    """Set this process's generators; False if the checkpoint has none for this rank (another number of processes)."""
    path = _random_state_file(checkpoint, rank)
    if not path.exists():
        return False
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    return True


def _random_state_file(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.safetensors"
