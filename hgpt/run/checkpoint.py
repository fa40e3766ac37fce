"""The run folder and its checkpoints: find, resume and save them.

    runs/<name>/checkpoints/step_0000500/
      model/                    the exported Hugging Face model: float32 weights, tokenizer, model card
      optimizer.safetensors     optimiser state by parameter name: "exp_avg/transformer.wte.weight", ...
      rng_00000.safetensors     random-number generators of process 0, one such file per process
      state.json                step, tokens, validation loss, settings, data, package versions
      manifest.json             size and SHA-256 of every file above; written last

A checkpoint is written under a temporary name and renamed, so it is complete or absent. The weights are stored once: a
run resumes from the exported model. Any engine with any number of processes can resume a checkpoint. All files are
safetensors and JSON, so reading them executes no code. RUN_FOLDER/latest links to the newest checkpoint, if the file
system has links. Resuming an earlier checkpoint moves the later ones to RUN_FOLDER/abandoned.
"""

import copy
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hgpt.data.shards import TokenShards, same_data
from hgpt.data.tokenizer import hf_tokenizer, tokenizer_file
from hgpt.durable import clean_up, folder_lock, read_json, remove_folder, sha256, whole_file, whole_folder, writing
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmonized import model_class
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import HEAD as HEAD_SETTINGS
from hgpt.run.config import MODEL as MODEL_SETTINGS
from hgpt.run.config import CheckpointConfig, RunConfig
from hgpt.run.engines import Engine, FullState, OptimizerState, package_versions
from hgpt.run.evaluation import Validation
from hgpt.run.model_card import model_card
from hgpt.run.settings import CONFIG_FILE, check_resume, flatten, settings, write_toml

CHECKPOINTS = "checkpoints"
LATEST = "latest"
ABANDONED = "abandoned"  # checkpoints later than a resumed one
MODEL = "model"
LOCK = ".lock"  # locked by the process that trains in the folder
PREEMPTED = "preempted"  # marks a run that a cluster stopped, because launchers do not pass on exit codes
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM_STATE = "rng_{:05d}.safetensors"
# Fields of HGPTConfig that must be equal in the checkpoint and the run.
COMPARED = {*MODEL_SETTINGS, *HEAD_SETTINGS, "head", "vocab_size", "n_positions", "backbone", "lift"}
ESSENTIAL = {STATE, OPTIMIZER, f"{MODEL}/config.json"}  # every checkpoint has these, and weights


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """state.json: what a run needs besides tensors to resume, and a description for readers.

    `step` counts finished optimiser steps, `tokens` their training tokens; `validation_loss` was measured at
    `validation_step`. `settings` are the resolved settings by dotted name; `data` identifies the token shards
    (`hgpt.data.shards.fingerprint`), `teacher` the model of train.distill_from (`Engine.learn_from`). Raises UserError
    for a value of another type or out of range.
    """

    step: int
    tokens: int
    validation_loss: float | None
    validation_step: int | None
    settings: dict[str, Any]
    data: str
    world_size: int
    teacher: str | None = None
    packages: dict[str, str] = field(default_factory=package_versions)

    def __post_init__(self) -> None:
        loss, at = self.validation_loss, self.validation_step
        valid = {
            **{name: _is_count(getattr(self, name)) for name in ("step", "tokens", "world_size")},
            "validation_loss": loss is None or (type(loss) in (int, float) and abs(loss) < float("inf")),
            "validation_step": at is None or _is_count(at),
            "data": isinstance(self.data, str),
            "teacher": self.teacher is None or isinstance(self.teacher, str),
            **{name: isinstance(getattr(self, name), dict) for name in ("settings", "packages")},
        }
        if wrong := [name for name, holds in valid.items() if not holds]:
            raise UserError(f"{wrong[0]} cannot be {getattr(self, wrong[0])!r:.100}")

    @property
    def validation(self) -> Validation | None:
        """The last evaluation before the checkpoint."""
        if self.validation_loss is None or self.validation_step is None:
            return None
        return Validation(self.validation_step, {"loss": self.validation_loss})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


class Checkpoints:
    """The run folder of a training run.

    Attributes:
        resumed: the checkpoint that the run resumes, None for a new run; set by `to_resume`.
        writer: writes the checkpoints.
    """

    def __init__(self, config: RunConfig, shards: TokenShards, data: str, engine: Engine) -> None:
        """`data`: the fingerprint of the data."""
        self.config, self.engine = config, engine
        self.shards, self.data = shards, data
        self.resumed: Checkpoint | None = None
        self.writer = Writer(config.checkpoint.background)

    def to_resume(self) -> "Checkpoint | None":
        """The checkpoint that `resume` asks for, None for a new run. Nothing is written. Collective.

        The main process chooses and verifies it; the others compare its manifest, and the first process of each node
        verifies the files. All raise UserError if a run folder would be overwritten, if the checkpoint is damaged,
        differs between processes or was trained on other data or by another teacher, if an essential setting differs,
        or if train.steps is less than the checkpoint's step.
        """
        engine = self.engine
        path = engine.from_main(lambda: find_checkpoint(self.config, engine.say))
        if path is None:
            return None
        manifest = path / MANIFEST
        seen = engine.together(lambda: sha256(manifest) if manifest.is_file() else None)
        engine.compare({f"the SHA-256 of {manifest}": seen})
        verify = engine.is_local_main and not engine.is_main
        self.resumed, differences = engine.together(lambda: self._check(path, verify))
        engine.say(f"resuming from {path}" + "".join(f"\n  {line}" for line in differences))
        return self.resumed

    def _check(self, path: Path, verify: bool) -> "tuple[Checkpoint, list[str]]":
        """The checkpoint in `path` and its differing settings. Raises UserError if this run cannot resume it."""
        if verify and (fault := damage(path)):
            raise UserError(f"{path} is damaged: {fault}; copy it again from the machine that wrote it")
        found, steps = Checkpoint(path), self.config.train.steps
        differences = check_resume(found.state.settings, self.config, path)
        if not same_data(found.state.data, self.data):
            raise UserError(
                f"cannot resume {path}: the data in {self.config.data.path} is not the data it was trained on (the "
                "checksums of the shards differ). Point data.path at that data, or give the run another name."
            )
        teacher = self.engine.teacher_fingerprint
        if None not in (teacher, found.state.teacher) and teacher != found.state.teacher:
            raise UserError(
                f"cannot resume {path}: train.distill_from = {self.config.train.distill_from} has changed: it is "
                f"{teacher} and was {found.state.teacher}. Name that teacher, or give the run another name."
            )
        if found.state.step > steps:
            raise UserError(
                f"cannot resume {path}: train.steps = {steps} is less than its {found.state.step} "
                f"steps. Set train.steps to {found.state.step} or more, or resume an earlier checkpoint."
            )
        return found, differences

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Create the run folder and hold its lock; on exit, wait for the checkpoint that is being written.

        Enter after all input was checked. Collective. Raises UserError if another process trains in the folder, or if
        the folder cannot be written.
        """
        with ExitStack() as stack:
            self.engine.together(lambda: self._claim(stack) if self.engine.is_main else None)
            yield

    def _claim(self, stack: ExitStack) -> None:
        folder, config, resumed = self.config.run_folder, self.config, self.resumed
        branch = resumed is not None and not _is_of_run(resumed.path, folder)
        if resumed is not None and branch:  # until the first checkpoint, only config.toml names the origin
            config = replace(config, resume=str(resumed.path.resolve()))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            busy = f"another process is training in {folder}: wait for it, or end it, or choose another --name"
            stack.enter_context(folder_lock(folder / LOCK, busy))
            clean_up(folder / CHECKPOINTS)
            if resumed is not None and not branch:
                for path in checkpoints(folder):
                    if checkpoint_step(path) > resumed.state.step:
                        moved = set_aside(folder, path)
                        self.engine.say(f"{path} is later than the resumed checkpoint: moved to {moved}")
                point_latest(folder, resumed.path)  # a crash may have come before the link was made
            write_toml(config, folder / CONFIG_FILE)
            (folder / PREEMPTED).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error}; choose another --runs_dir") from error
        stack.enter_context(self.writer)

    def due(self, step: int, *, last: bool = False, stopping: bool = False) -> bool:
        """Whether to save after `step` steps; not at the resumed checkpoint's step."""
        if self.resumed is not None and step == self.resumed.state.step:
            return False
        return last or stopping or self.config.checkpoint.due(step)

    def save(self, step: int, validation: Validation | None) -> None:
        """Save the model and everything a run needs to resume. Collective; the main process writes."""
        self.writer.wait()  # before collecting: otherwise two copies of the state are in memory
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
                teacher=self.engine.teacher_fingerprint,
            )
            self.writer.submit(lambda: self._write(full, random_states, state))

    def _write(self, full: FullState, random_states: list[dict[str, Tensor]], state: TrainState) -> None:
        """Write a checkpoint; if the run folder was renamed or deleted during training, into a new one."""
        run_folder = self.config.run_folder
        config_file = run_folder / CONFIG_FILE
        try:
            if config_file.exists():
                return self._write_folder(full, random_states, state)
        except UserError:
            if config_file.exists():
                raise
        _warn(f"{run_folder} was renamed or deleted: checkpoints go to a new folder of this name")
        with writing(config_file):
            run_folder.mkdir(parents=True, exist_ok=True)
            write_toml(self.config, config_file)
        self._write_folder(full, random_states, state)

    def _write_folder(self, full: FullState, random_states: list[dict[str, Tensor]], state: TrainState) -> None:
        """Write the checkpoint folder, point `latest` at it, and delete old checkpoints."""
        run, config, target = self.config, full.config, checkpoint_folder(self.config.run_folder, state.step)
        with whole_folder(target) as folder:
            save_training_state(folder, full, random_states, state)
            save_model(folder / MODEL, config, full.weights)
            if (tokenizer := tokenizer_file(Path(run.data.path))) is not None:  # foreign shards may have none
                hf_tokenizer(tokenizer, config.n_positions, self.shards.end_of_text).save_pretrained(folder / MODEL)
            facts = {
                "data": run.data.path if self.shards.meta is None else self.shards.meta.source,
                "training tokens": f"{state.tokens:,} in {state.step:,} steps",
                **({} if run.train.distill_from is None else {"distilled from": run.train.distill_from}),
                "validation loss": "not measured"
                if state.validation is None
                else f"{state.validation_loss:.4f} nats per token, unsmoothed, at step {state.validation_step:,}",
            }
            card = model_card(config, full.weights, name=run.name, facts=facts)
            (folder / MODEL / "README.md").write_text(card, encoding="utf-8")
            write_manifest(folder)
        point_latest(run.run_folder, target)
        remove_old(run.run_folder, run.checkpoint)

    def mark_preempted(self) -> None:
        """Create the file that marks the run as stopped by a cluster."""
        if self.engine.is_main:
            with suppress(OSError):  # the exit code also says that the run was preempted
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
    """The first fault of a checkpoint, or None. Checks size and SHA-256 of every file in the manifest.

    `beginning`: check only files whose names begin with this.
    """
    try:
        manifest = read_json(checkpoint / MANIFEST, "")["files"]
        entries = [(n, entry["bytes"], entry["sha256"]) for n, entry in manifest.items() if n.startswith(beginning)]
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    missing = sorted(ESSENTIAL - manifest.keys())
    if not any(name.startswith(f"{MODEL}/") and name.endswith(".safetensors") for name in manifest):
        missing.append("the weights")
    if missing:
        return f"{MANIFEST} does not list {', '.join(missing)}"
    try:
        for name, size, checksum in entries:
            path = checkpoint / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{MANIFEST} lists {name!r}, which lies outside the checkpoint"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if sha256(path) != checksum:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def newest_checkpoint(run_folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run, or None; damaged ones are reported to `warn` and skipped."""
    for checkpoint in reversed(checkpoints(run_folder)):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"{checkpoint} is damaged and skipped: {fault}")
    return None


def find_checkpoint(config: RunConfig, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` asks for, None for a new run. UserError if a run folder would be overwritten."""
    run_folder = config.run_folder
    try:
        occupied = run_folder.exists() and any(run_folder.iterdir())
        if config.resume == "never":
            if occupied:
                raise UserError(
                    f"{run_folder} already exists and is never overwritten: resume it with --resume auto, or choose "
                    "another --name"
                )
            return None
        if config.resume == "auto":
            newest = newest_checkpoint(run_folder, warn)
            if newest is None and checkpoints(run_folder):
                raise UserError(f"every checkpoint of {run_folder} is damaged: choose another --name to start again")
            return newest or _origin(run_folder)
        checkpoint = Path(config.resume)
        if not checkpoint.is_dir():
            raise UserError(f'resume = {config.resume!r}: it must be "never", "auto" or the folder of a checkpoint')
        if checkpoint.is_symlink():  # latest
            checkpoint = checkpoint.resolve()
    except OSError as error:
        raise UserError(
            f"the run folder {run_folder} or resume = {config.resume!r} cannot be read: {error.strerror}; choose "
            "another --name, --runs_dir or --resume"
        ) from error
    if fault := damage(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {fault}; choose another one, or --resume auto")
    if occupied and not _is_of_run(checkpoint, run_folder) and checkpoint.resolve() != _origin(run_folder):
        raise UserError(f"{run_folder} already exists and {checkpoint} is not its checkpoint: choose another --name")
    return checkpoint


def _is_of_run(checkpoint: Path, run_folder: Path) -> bool:
    return checkpoint.resolve().parent == (run_folder / CHECKPOINTS).resolve()


def _origin(run_folder: Path) -> Path | None:
    """For a run that has saved nothing yet: the checkpoint of another run that it resumed, or None."""
    try:
        origin = tomllib.loads((run_folder / CONFIG_FILE).read_text(encoding="utf-8")).get("resume")
    except (OSError, ValueError, RecursionError):
        return None
    if checkpoints(run_folder) or not isinstance(origin, str) or origin in ("never", "auto"):
        return None
    if fault := damage(Path(origin)):
        raise UserError(
            f"{run_folder} resumed from {origin}, which is damaged or missing: {fault}. Resume another checkpoint "
            "under another --name"
        )
    return Path(origin)


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
        model = model_class(config)(copy.deepcopy(config))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def write_manifest(folder: Path) -> None:
    """Write manifest.json: size and SHA-256 of every file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1))


def random_state() -> dict[str, Tensor]:
    """State of this process's generators: "torch" and the GPU's under its device type; uint8 tensors."""
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
        """Wait for the submitted write and raise its error. `only_look`: return at once if it is not finished."""
        if self._pending is not None and not (only_look and not self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the submitted write. Raises its UserError unless another error ends the run."""
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown()


def point_latest(run_folder: Path, checkpoint: Path) -> None:
    """Make run_folder/latest a link to `checkpoint`, atomically. Without links in the file system, only warns."""
    link = run_folder / LATEST
    try:
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links
            set_aside(run_folder, link)
        with whole_file(link) as partial:
            partial.symlink_to(os.path.relpath(checkpoint.resolve(), run_folder.resolve()))
    except (OSError, NotImplementedError) as error:
        _warn(f"no link {link} could be made ({error}): use {checkpoint.parent}")


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint that `latest` links to; without a link the newest complete one; None if there is none."""
    link = run_folder / LATEST
    if link.is_symlink() and (link / MODEL).is_dir():
        return link
    return newest_checkpoint(run_folder, _warn)


def set_aside(run_folder: Path, path: Path) -> Path:
    """Move a folder into run_folder/abandoned, under a free name; returns its new path."""
    target, number = run_folder / ABANDONED / path.name, 1
    while target.exists():
        target, number = target.with_name(f"{path.name}.{number}"), number + 1
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)
    return target


def remove_old(run_folder: Path, config: CheckpointConfig) -> None:
    """Delete all checkpoints but the newest `keep_last` and those kept for good."""
    for checkpoint in checkpoints(run_folder)[: -config.keep_last] if config.keep_last else ():
        if not config.for_good(checkpoint_step(checkpoint)):
            try:
                remove_folder(checkpoint)
            except OSError as error:
                _warn(f"{checkpoint} could not be deleted ({error})")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------
# Resuming


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of reading `path` into a UserError: wrong content may have a right checksum."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # libraries may raise anything for wrong content
        what = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        raise UserError(
            f"{path} cannot be used: {what:.1000}. It is damaged, or another version of hgpt wrote it: resume an "
            f"earlier checkpoint (--resume FOLDER), or start a run with model.init_from = {path.parent}"
        ) from error


class Checkpoint:
    """A checkpoint to resume. Raises UserError if state.json is damaged or has the fields of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path / STATE):
            self.state = TrainState(**json.loads((path / STATE).read_bytes()))
            if path.name.startswith("step_") and path.name != checkpoint_folder(Path(), self.state.step).name:
                raise UserError(f"step = {self.state.step} is not the step in the name {path.name}")

    def load_model(self, expected: HGPTConfig) -> HGPTForCausalLM:
        """The model, in float32. Raises UserError unless it has the configuration `expected` and all weights.

        Weights are copied out of the memory-mapped file, where they are aligned to 4 bytes only: some small matrix
        products round differently at addresses that are no multiple of 16 (measured: MKL, 320 × 32 times 32 × 4), and
        the run would not resume bit for bit.
        """
        with _reading(self.path / MODEL):
            config = type(expected).from_pretrained(self.path / MODEL)
            before, asked = flatten(config.to_dict()), flatten(expected.to_dict())
            for name in sorted(before.keys() | asked.keys()):
                saved, now = before.get(name), asked.get(name)
                if name.split(".")[0] in COMPARED and saved != now:
                    raise UserError(f"its config.json says {name} = {saved!r}, but the run {now!r}")
            load: Any = model_class(config).from_pretrained  # with output_loading_info it returns a pair
            model, loading = load(self.path / MODEL, config=config, dtype=torch.float32, output_loading_info=True)
            if missing := loading["missing_keys"]:
                raise UserError(f"the weights are incomplete, without {', '.join(sorted(missing))}")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def load_optimizer(self, model: HGPTForCausalLM, optimizer: torch.optim.Optimizer) -> OptimizerState:
        """The optimiser state; empty if it was saved before the first step.

        Raises UserError unless it has `optimizer`'s tensors of each trained parameter, with the same shapes and dtypes.
        """
        muon = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
        due: dict[str, torch.Size] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shape = parameter.shape
                kinds = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
                kinds = {"momentum_buffer": shape} if id(parameter) in muon else kinds
                due |= {f"{kind}/{name}": size for kind, size in kinds.items()}
        file = self.path / OPTIMIZER
        with _reading(file):
            tensors = load_file(file)
            reshaped = sorted(
                name for name in due.keys() & tensors.keys()
                if tensors[name].shape != due[name] or tensors[name].dtype != torch.float32
            )  # fmt: skip
            if tensors and (tensors.keys() != due.keys() or reshaped):
                raise UserError(
                    f"it belongs to another model: not in the model {sorted(tensors.keys() - due.keys())}, not in the "
                    f"file {sorted(due.keys() - tensors.keys())}, of another shape or dtype {reshaped}"
                )
            steps = [float(value) for name, value in tensors.items() if name.startswith("step/")]
            if not all(0 <= step < 2**53 for step in steps):
                raise UserError(f"its steps cannot be {min(steps):g} to {max(steps):g}")
        saved: OptimizerState = {}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            saved.setdefault(name, {})[kind] = value
        return saved

    def load_random_state(self, rank: int) -> bool:
        """Set this process's generators; False if fewer processes saved the checkpoint, so it has none for `rank`."""
        path = self.path / RANDOM_STATE.format(rank)
        if not path.exists():
            return False
        with _reading(path):
            tensors = load_file(path)
            torch.set_rng_state(tensors["torch"])
            gpu = torch.accelerator.current_accelerator(check_available=True)
            if gpu is not None and gpu.type in tensors:
                torch.get_device_module(gpu).set_rng_state(tensors[gpu.type])
        return True
