"""The run folder and its checkpoints: find, resume and save them.

    runs/<name>/checkpoints/step_0000500/
      model/                    the exported Hugging Face model: float32 weights, tokenizer, model card
      optimizer.safetensors     optimiser state by parameter name: "exp_avg/transformer.wte.weight", ...
      rng_00000.safetensors     random-number generators of process 0, one such file per process
      state.json                step, tokens, validation loss, settings, data, package versions
      manifest.json             size and SHA-256 of every file above; written last

A checkpoint is written under a temporary name and renamed, so it is complete or absent. The weights are stored once: a
run resumes from the exported model. Any engine with any number of processes can resume a checkpoint. Its files are
safetensors and JSON, so that reading them executes no code.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hgpt.data.shards import TokenShards
from hgpt.data.tokenizer import hf_tokenizer
from hgpt.durable import folder_lock, remove_folder, sha256, whole_file, whole_folder
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import CheckpointConfig, RunConfig
from hgpt.run.engines import Engine, FullState, OptimizerState, package_versions
from hgpt.run.evaluation import Validation
from hgpt.run.model_card import model_card
from hgpt.run.settings import CONFIG_FILE, check_resume, settings, write_toml

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MODEL = "model"
LOCK = ".lock"  # locked by the process that trains in the folder
PREEMPTED = "preempted"  # marks a run that a cluster stopped, because launchers do not pass on exit codes
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM_STATE = "rng_{:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """state.json: what a run needs besides tensors to resume, and what describes a checkpoint to a reader.

    `step` counts finished optimiser steps, `tokens` their training tokens; `validation_loss` was measured at
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
    packages: dict[str, str] = field(default_factory=package_versions)

    @property
    def validation(self) -> Validation | None:
        """The last evaluation before the checkpoint."""
        if self.validation_loss is None or self.validation_step is None:
            return None
        return Validation(self.validation_step, {"loss": self.validation_loss})


def data_fingerprint(*splits: TokenShards) -> str:
    """SHA-256 of the checksums in meta.json and of end-of-text; of the splits' lengths where there is no meta.json."""
    parts: list[Any] = []
    for shards in splits:
        meta = shards.meta
        parts.append(len(shards) if meta is None else [record.sha256 for record in meta.splits[shards.split].shards])
        if meta is not None and meta.tokenizer_sha256 is not None:  # earlier versions did not write it
            parts.append([meta.tokenizer_sha256, meta.vocab_size, meta.end_of_text])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Checkpoints:
    """The run folder of a training run.

    Attributes:
        resumed: the checkpoint that the run resumes, None for a new run; set by `to_resume`.
    """

    def __init__(self, config: RunConfig, train_shards: TokenShards, val_shards: TokenShards, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.shards = train_shards
        self.data = data_fingerprint(train_shards, val_shards)
        self.resumed: Checkpoint | None = None
        self._writer = Writer(config.checkpoint.background)

    def to_resume(self) -> "Checkpoint | None":
        """The checkpoint that `resume` asks for, None for a new run. Nothing is written.

        Raises UserError if a run folder would be overwritten, if the checkpoint is damaged or was trained on other
        data, if a setting differs that must not, and if train.steps is less than the checkpoint's step.
        """
        path = find_checkpoint(self.config, self.engine.say)
        if path is None:
            return None
        found = Checkpoint(path)
        differences = check_resume(found.state.settings, self.config, path)
        if found.state.data != self.data:
            raise UserError(
                f"cannot resume {path}: the data in {self.config.data.path} is not the data it was trained on (the "
                "checksums of the shards differ). Point data.path at that data, or give the run another name."
            )
        if found.state.step > self.config.train.steps:
            raise UserError(
                f"cannot resume {path}: train.steps = {self.config.train.steps} is less than its {found.state.step} "
                f"steps. Set train.steps to {found.state.step} or more, or resume an earlier checkpoint."
            )
        self.engine.say(f"resuming from {path}" + "".join(f"\n  {line}" for line in differences))
        self.resumed = found
        return found

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Create the run folder and hold its lock; on exit, wait for the checkpoint that is being written.

        Enter it only after all input was checked. Collective. Raises UserError if another process trains in the folder,
        or if the folder cannot be written.
        """
        self.engine.accelerator.wait_for_everyone()  # every process has looked whether the folder exists
        folder = self.config.run_folder
        with ExitStack() as held:
            if self.engine.is_main:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    busy = f"another process is training in {folder}: wait for it, or end it, or choose another --name"
                    held.enter_context(folder_lock(folder / LOCK, busy))
                    write_toml(self.config, folder / CONFIG_FILE)
                    (folder / PREEMPTED).unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(
                        f"the run folder {folder} cannot be written: {error}; choose another --runs_dir"
                    ) from error
                if self.resumed is not None and self.resumed.path.parent == folder / CHECKPOINTS:
                    point_latest(folder, self.resumed.path)  # a crash may have come before the link was made
                held.enter_context(self._writer)
            yield

    def due(self, step: int, *, last: bool = False, stopping: bool = False) -> bool:
        """Whether to save after `step` steps; not at the step of the resumed checkpoint, which exists."""
        if self.resumed is not None and step == self.resumed.state.step:
            return False
        return last or stopping or self.config.checkpoint.due(step)

    def save(self, step: int, validation: Validation | None) -> None:
        """Save the model and everything a run needs to resume. Collective; the main process writes."""
        self._writer.wait()  # before collecting: otherwise two copies of the state are in memory
        full = self.engine.collect()
        random_states = self.engine.gather_objects(random_state())
        if full is not None:
            state = TrainState(
                step=step,
                tokens=step * self.config.train.global_batch * self.config.data.seq_len,
                validation_loss=None if validation is None else validation.loss,
                validation_step=None if validation is None else validation.step,
                settings=settings(self.config),
                data=self.data,
                world_size=self.engine.world_size,
            )
            self._writer.submit(lambda: self._write(full, random_states, state))

    def _write(self, full: FullState, random_states: list[dict[str, Tensor]], state: TrainState) -> None:
        """Write the checkpoint folder, point `latest` at it, and delete old checkpoints."""
        run_folder, config = self.config.run_folder, self.engine.model_config
        target = checkpoint_folder(run_folder, state.step)
        with whole_folder(target) as folder:
            save_training_state(folder, full, random_states, state)
            save_model(folder / MODEL, config, full.weights)
            tokenizer = Path(self.config.data.path) / "tokenizer.json"
            if tokenizer.exists():  # a bare nanoGPT folder has none
                hf_tokenizer(tokenizer, config.n_positions, self.shards.end_of_text).save_pretrained(folder / MODEL)
            source = self.config.data.path if self.shards.meta is None else self.shards.meta.source
            card = model_card(
                config,
                full.weights,
                name=self.config.name,
                data=source,
                steps=state.step,
                tokens=state.tokens,
                validation=state.validation,
            )
            (folder / MODEL / "README.md").write_text(card, encoding="utf-8")
            write_manifest(folder)
        point_latest(run_folder, target)
        remove_old(run_folder, self.config.checkpoint)

    def check(self) -> None:
        """Raise the error of a finished write, if it had one; does not wait."""
        self._writer.wait(only_look=True)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises the error of writing it."""
        self._writer.wait()

    def mark_preempted(self) -> None:
        """Create the file that marks the run as stopped by a cluster."""
        if self.engine.is_main:
            (self.config.run_folder / PREEMPTED).touch()


# --------------------------------------------------------------------------------------------------------------
# Finding


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`, RUN_FOLDER/checkpoints/step_0000500."""
    return run_folder / CHECKPOINTS / f"step_{step:07d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name, step_0000500."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(run_folder: Path) -> list[Path]:
    """The run's checkpoint folders by rising step."""
    found = [path for path in (run_folder / CHECKPOINTS).glob("step_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def damage(checkpoint: Path, beginning: str = "") -> str | None:
    """The first fault of a checkpoint, None if it has none. Checks size and SHA-256 of every file in the manifest.

    `beginning`: only of the files whose names begin so.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())["files"]
        entries = [(n, entry["bytes"], entry["sha256"]) for n, entry in manifest.items() if n.startswith(beginning)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if not manifest:
        return f"{MANIFEST} names no files"
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
    """The newest complete checkpoint of a run, or None; each damaged one is reported to `warn` and skipped."""
    for checkpoint in reversed(checkpoints(run_folder)):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"{checkpoint} is damaged and passed over: {fault}")
    return None


def find_checkpoint(config: RunConfig, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` asks for, None for a new run. UserError rather than overwrite a run folder."""
    run_folder = config.run_folder
    occupied = run_folder.exists() and any(run_folder.iterdir())
    if config.resume == "never":
        if occupied:
            raise UserError(
                f"{run_folder} exists already and is never overwritten: resume it with --resume auto, or choose "
                "another --name"
            )
        return None
    if config.resume == "auto":
        newest = newest_checkpoint(run_folder, warn)
        if newest is None and checkpoints(run_folder):
            raise UserError(f"every checkpoint of {run_folder} is damaged: choose another --name to start anew")
        return newest
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(f'resume = {config.resume!r}: it must be "never", "auto" or the folder of a checkpoint')
    if fault := damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {fault}; choose another one, or --resume auto")
    mine = checkpoint.resolve().parent == (run_folder / CHECKPOINTS).resolve()
    if occupied and not mine:
        raise UserError(f"{run_folder} exists already and {checkpoint} is not its checkpoint: choose another --name")
    return checkpoint


# --------------------------------------------------------------------------------------------------------------
# Saving


def save_training_state(
    folder: Path, full: FullState, random_states: list[dict[str, Tensor]], state: TrainState
) -> None:
    """Write the optimiser state, the random-number generators of each process and state.json into `folder`."""
    tensors = {f"{kind}/{name}": value for name, kinds in full.optimizer.items() for kind, value in kinds.items()}
    save_file(tensors, folder / OPTIMIZER)
    for rank, generators in enumerate(random_states):
        save_file(generators, folder / RANDOM_STATE.format(rank))
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1))


def save_model(folder: Path, config: HGPTConfig, weights: dict[str, Tensor]) -> None:
    """Write the Hugging Face model with these weights into `folder`, by `save_pretrained`."""
    with torch.device("meta"):
        model = HGPTForCausalLM(copy.deepcopy(config))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))


def random_state() -> dict[str, Tensor]:
    """State of this process's generators that dropout draws from: "torch" and the GPU's by its type; uint8 tensors."""
    generators = {"torch": torch.get_rng_state()}
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if gpu is not None:
        generators[gpu.type] = torch.get_device_module(gpu).get_rng_state()
    return generators


class Writer:
    """Writes one checkpoint at a time in a thread. Without `background`, `submit` waits for it."""

    def __init__(self, background: bool) -> None:
        self._background = background
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the previous write and raise its error, then start `write`."""
        self.wait()
        self._pending = self._pool.submit(write)
        if not self._background:
            self.wait()

    def wait(self, *, only_look: bool = False) -> None:
        """Wait for the submitted write and raise its error. `only_look`: return at once if it has not finished."""
        if self._pending is not None and not (only_look and not self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the submitted write, however the run ends. Raises its UserError unless another error ends the run."""
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown()


def point_latest(run_folder: Path, checkpoint: Path) -> None:
    """Make run_folder/latest a link to `checkpoint`, atomically."""
    with whole_file(run_folder / LATEST) as link:
        link.symlink_to(checkpoint.relative_to(run_folder))


def remove_old(run_folder: Path, config: CheckpointConfig) -> None:
    """Delete checkpoints up to `latest`, but not the newest `keep_last` of them nor those that are kept for good.

    A run that resumed from an earlier checkpoint leaves later ones after `latest`: they are kept and not counted.
    """
    if config.keep_last:
        latest = checkpoint_step((run_folder / LATEST).resolve())
        older = [path for path in checkpoints(run_folder) if checkpoint_step(path) <= latest][: -config.keep_last]
        for checkpoint in older:
            if not config.for_good(checkpoint_step(checkpoint)):
                remove_folder(checkpoint)


# --------------------------------------------------------------------------------------------------------------
# Resuming


class Checkpoint:
    """A checkpoint to resume. Raises UserError if another version of hgpt wrote other fields into its state.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state = TrainState(**json.loads((path / STATE).read_text()))
        except TypeError as error:
            raise UserError(
                f"{path / STATE} was written by another version of hgpt ({error}); resume with that version, or start "
                f"a run with model.init_from = {path}"
            ) from error

    def load_model(self) -> HGPTForCausalLM:
        """The model, in float32.

        Weights are copied out of the memory-mapped file, where they are aligned to 4 bytes only: some small matrix
        products round differently at addresses that are no multiple of 16 (measured: MKL, 320 × 32 times 32 × 4), so
        the run would not resume bit for bit.
        """
        model = HGPTForCausalLM.from_pretrained(self.path / MODEL, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def load_optimizer(self, model: HGPTForCausalLM) -> OptimizerState:
        """The optimiser state; empty if it was saved before the first step.

        Raises UserError if the names or the shapes are not those of the model's parameters.
        """
        file = self.path / OPTIMIZER
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        saved: OptimizerState = {}
        for key, value in load_file(file).items():
            kind, name = key.split("/", 1)
            saved.setdefault(name, {})[kind] = value
        # Scalars are not compared: AdamW's step count is one.
        reshaped = {
            name
            for name in saved.keys() & parameters.keys()
            if any(value.ndim and value.shape != parameters[name].shape for value in saved[name].values())
        }
        if saved and (saved.keys() != parameters.keys() or reshaped):
            raise UserError(
                f"{file} belongs to another model: not in the model {sorted(saved.keys() - parameters.keys())}, not in "
                f"the file {sorted(parameters.keys() - saved.keys())}, of another shape {sorted(reshaped)}"
            )
        return saved

    def load_random_state(self, rank: int) -> bool:
        """Set this process's generators; False if the checkpoint has none for `rank`, saved by fewer processes."""
        path = self.path / RANDOM_STATE.format(rank)
        if not path.exists():
            return False
        tensors = load_file(path)
        torch.set_rng_state(tensors["torch"])
        gpu = torch.accelerator.current_accelerator(check_available=True)
        if gpu is not None and gpu.type in tensors:
            torch.get_device_module(gpu).set_rng_state(tensors[gpu.type])
        return True
