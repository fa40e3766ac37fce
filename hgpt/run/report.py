"""Reports of a run: progress bar, metrics.jsonl, trackers, phases, loss spikes, non-finite losses, energy."""

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from torch import Tensor
from tqdm import tqdm

from hgpt.data.batches import TrainingBatches
from hgpt.durable import whole_file, writing
from hgpt.errors import UserError
from hgpt.hardware import device_name, memory_in_use, peak_flops
from hgpt.history import DIVERGED, METRICS_FILE, records
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmonized import HarmonizedConfig, model_class
from hgpt.run.checkpoint import LATEST, MODEL, Checkpoints, checkpoint_folder, checkpoints
from hgpt.run.config import LogConfig, RunConfig
from hgpt.run.energy import RunEnergy, in_words, last_record
from hgpt.run.engines import Engine
from hgpt.run.evaluation import Validation
from hgpt.run.settings import settings

NON_FINITE_FILE = "non_finite.jsonl"
EXPLANATION = (
    "Distances are from the hidden state to a token's centre, divided by the median over all tokens. In training the\n"
    "correct token, the target, comes nearer."
)


def flops_per_token(config: HGPTConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token: 6 · (weights in matrix products) + 12 · L · D · T for attention.

    The convention of PaLM (arXiv:2204.02311, appendix B) and nanoGPT. Embeddings are look-ups and not counted; the
    unembedding is, as one matrix product with either head, without pointwise operations. Attention counts all T · T
    scores, although causal kernels skip the masked half.
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    if isinstance(config, HarmonizedConfig):  # count the backbone's own blocks
        with torch.device("meta"):
            blocks = model_class(config)(config).transformer.h
        weights = config.padded_vocab_size * config.n_embd + sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * seq_len


class Recent(NamedTuple):
    """Loss and gradient norm of the last step, mean over processes; spikes and skipped steps since the last `read`."""

    loss: float
    grad_norm: float
    spikes: int
    skipped: int


class Speed(NamedTuple):
    """Speed of the steps since the last log line.

    `seconds`: of this process, by phase. `own` and `memory` are lists by rank. `own`: seconds outside collectives
    (data and forward): the rank with the most is the one the others wait for. `memory`: peak since the start, in GiB.
    """

    tokens_per_second: float
    mfu: float | None
    seconds: dict[str, float]
    own: list[float]
    memory: list[float]


class Report:
    """Logs and prints a run, and times it: `with report.phase("forward"):` times a phase of the step."""

    def __init__(self, config: RunConfig, engine: Engine, checkpoints: Checkpoints) -> None:
        self.config, self.engine, self.checkpoints = config, engine, checkpoints
        self.phase = PhaseTimes(engine.device)
        resumed = checkpoints.resumed
        self.first_step = 0 if resumed is None else resumed.state.step
        self.tokens_per_step = config.train.global_batch * config.data.seq_len
        self._flops_per_token = flops_per_token(engine.model_config, config.data.seq_len)
        self._pending: list[Tensor] = []  # (loss, gradient norm) of the steps since the last reading, on the device
        self._spikes = LossSpikes()
        self._skipped = 0
        self._explained = False
        self._log: MetricsLog | None = None
        self._energy: RunEnergy | None = None
        self._spent: dict[str, float] | None = None
        if config.log.energy_country is not None:
            self._energy = RunEnergy(
                config.log.energy_country,
                engine,
                tokens=self.first_step * self.tokens_per_step,
                before=None if resumed is None else last_record(resumed.path.parent.parent, self.first_step),
            )

    def __enter__(self) -> "Report":
        """Collective."""
        config = self.config
        with ExitStack() as stack:
            if self.engine.is_main:
                trackers = build_trackers(config.log, config.run_folder, config.name, self.first_step)
                self._log = MetricsLog(config.run_folder, trackers, settings(config), self.first_step)
                stack.callback(self._log.close)
            # disable=None: no bar unless standard error is a terminal; `log` prints lines instead.
            self._bar = tqdm(
                total=config.train.steps,
                initial=self.first_step,
                unit="step",
                disable=None if self.engine.is_main else True,
                dynamic_ncols=True,
                smoothing=0.05,
            )
            stack.enter_context(self._bar)
            if self._energy is not None:
                stack.enter_context(self._energy)
                self._write_line(f"energy: {self._energy.method}")
            self._stack = stack.pop_all()
        self._since, self._steps = time.perf_counter(), 0
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _write_line(self, line: str) -> None:
        """Print above the bar, on the main process."""
        if self.engine.is_main:
            self._bar.write(line)

    # ------------------------------------------------------------------------------------------------------------
    # Evaluations

    def evaluated(self, validation: Validation) -> None:
        """Log an evaluation. Raises UserError if its loss is not finite."""
        step, values = validation
        if not math.isfinite(validation.loss):
            raise self._not_finite(step, f"the validation loss after step {step} is {validation.loss}")
        if self._log is not None:
            self._log.write("eval", step, values)
        line = f"step {step:>6}  validation loss {validation.loss:.4f}"
        if "bits_per_byte" in values:
            line += f"  bits per byte {values['bits_per_byte']:.3f}"
        line += f"  accuracy {values['accuracy']:.1%}"
        if "target_over_median_distance" in values:
            line += (
                f"  distance to the target {values['target_over_median_distance']:.2f}, "
                f"to the nearest centre {values['nearest_over_median_distance']:.2f} of the median"
            )
            if not self._explained:
                self._write_line(EXPLANATION)
                self._explained = True
        self._write_line(line)

    def energy(self, step: int) -> None:
        """Log the energy spent so far, if it is measured. Collective."""
        if self._energy is None or (step == self.first_step and self.checkpoints.resumed is not None):
            return  # a resumed run counts from the record of its checkpoint
        with self.phase("energy"):
            self._spent = self._energy.read(step * self.tokens_per_step)
        if self._log is not None and self._spent is not None:
            self._log.write("energy", step, self._spent, method=self._energy.method)

    # ------------------------------------------------------------------------------------------------------------
    # Steps

    def stepped(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Count a step. Its loss and gradient norm stay on the device until `read`."""
        self._pending.append(torch.stack((loss, grad_norm.to(loss))))
        self._steps += 1
        self._bar.update()

    def due(self, step: int) -> bool:
        """Whether to log after `step` steps."""
        return step % self.config.log.every == 0 or step in (self.first_step + 1, self.config.train.steps)

    def read(self, step: int, lr: float, batches: TrainingBatches) -> Recent:
        """Read the steps since the last call; a sync with the device. Collective.

        Writes each step with a non-finite loss or gradient norm to non_finite.jsonl, with its windows, so that it can
        be replayed. Raises UserError when there are more such steps than train.skip_non_finite.
        """
        recent = self.engine.accelerator.reduce(torch.stack(self._pending), reduction="mean").tolist()
        self._pending.clear()
        first = step - len(recent) + 1
        bad = [(at, loss, norm) for at, (loss, norm) in enumerate(recent, first) if not math.isfinite(loss + norm)]
        self._skipped += len(bad)
        for at, loss, norm in bad if self.engine.is_main else ():
            record = {"step": at, "loss": str(loss), "grad_norm": str(norm), "windows": batches.windows_of_step(at - 1)}
            path = self.config.run_folder / NON_FINITE_FILE
            with writing(path), path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        if bad and self._skipped > self.config.train.skip_non_finite:
            at, loss, norm = bad[0]
            raise self._not_finite(
                step,
                f"step {at} has loss {loss} and gradient norm {norm} (learning rate {lr:.3g}; {self._skipped} such "
                f"steps, train.skip_non_finite = {self.config.train.skip_non_finite})",
            )
        spikes = sum(self._spikes.add(loss) for loss, norm in recent if math.isfinite(loss + norm))
        loss, grad_norm = recent[-1]
        return Recent(loss, grad_norm, spikes, len(bad))

    def speed(self) -> Speed:
        """Speed since the last call, without evaluations, checkpoints and energy readings. Collective."""
        now, seconds, engine = time.perf_counter(), self.phase.read(), self.engine
        pauses = sum(seconds.get(phase, 0.0) for phase in PhaseTimes.PAUSES)
        rate = self._steps * self.tokens_per_step / max(now - self._since - pauses, 1e-9)
        self._since, self._steps = now, 0
        own = seconds.get("data", 0.0) + seconds.get("forward", 0.0)
        mine = torch.tensor([[own, memory_in_use(engine.device)]], dtype=torch.float32, device=engine.device)
        own_by_rank, memory = zip(*engine.accelerator.gather(mine).tolist(), strict=True)
        peak = peak_flops(device_name(engine.device)) if engine.precision == "bf16" else None
        mfu = None if peak is None else rate * self._flops_per_token / (peak * engine.world_size)
        return Speed(rate, mfu, seconds, list(own_by_rank), list(memory))

    def log(self, step: int, values: Mapping[str, float | None], speed: Speed) -> None:
        """Write a log line; values that are None are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        if self._log is not None:
            self._log.write("train", step, known)
            if self.engine.world_size > 1:
                lists = {"seconds_data_forward": speed.own, "memory_gib": speed.memory}
                self._log.write("processes", step, lists, track=False)
        shown = {"loss": f"{known['loss']:.3f}", "tok/s": f"{speed.tokens_per_second:,.0f}"}
        if speed.mfu is not None:
            shown["mfu"] = f"{speed.mfu:.1%}"
        self._bar.set_postfix(shown)
        if self._bar.disable:
            steps = self.config.train.steps
            left = timedelta(seconds=round((steps - step) * self.tokens_per_step / speed.tokens_per_second))
            said = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.engine.say(f"step {step:>6}/{steps}  {said}  {left} left")

    # ------------------------------------------------------------------------------------------------------------
    # The end

    def finished(self, validation: Validation, unigram: float | None) -> None:
        """Print the result. `unigram`: the validation loss of a unigram model; None if it was not computed."""
        self._bar.close()
        say = self.engine.say
        baseline = "" if unigram is None else f", of a unigram model {unigram:.4f}"
        say(f"\nvalidation loss {validation.loss:.4f}{baseline}")
        if self._energy is not None and self._spent is not None:
            say(in_words(self._spent, self._energy.method))
        run_folder = self.config.run_folder
        link, last = run_folder / LATEST, checkpoint_folder(run_folder, validation.step)
        say(f"the model is in {(link if link.is_dir() else last) / MODEL}; python sample.py --checkpoint {run_folder}")

    def _not_finite(self, step: int, what: str) -> UserError:
        self.checkpoints.writer.wait()  # the message names the checkpoint that is being written
        if self._log is not None:
            self._log.write(DIVERGED, step, {}, track=False, message=what)
        last = checkpoints(self.config.run_folder)[-1:]
        return UserError(
            f"{what}. Nothing was saved after it; last checkpoint: {last[0] if last else 'none'}. Lower optim.lr or "
            "lengthen optim.warmup_steps, then resume with --resume auto or start under another name."
        )


class PhaseTimes:
    """Seconds spent in each phase since the last `read`.

        with phases("forward"):
            ...

    On CUDA, phases outside HOST are timed by events in the stream, which only `read` waits for: kernels are queued, so
    the host's clock does not measure them, and a sync in each phase would slow training down.
    """

    PAUSES = ("save", "evaluation", "energy")
    HOST = ("data", *PAUSES)  # timed by the host's clock everywhere

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._recorded: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._events and phase not in self.HOST:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._recorded.append((phase, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - begin)

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last call (or since construction)."""
        if self._recorded:
            self._recorded[-1][2].synchronize()
        for phase, start, end in self._recorded:
            self._add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._recorded = self._seconds, {}, []
        return seconds

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


class LossSpikes:
    """Finds losses more than 6 standard deviations above their running mean.

    Mean and variance are exponential averages over about 100 steps, μ′ = μ + (l − μ)/100 and
    σ² ← σ² + ((l − μ)(l − μ′) − σ²)/100, without the spikes. None of the first 100 losses is a spike.
    """

    _STEPS, _DEVIATIONS = 100, 6.0

    def __init__(self) -> None:
        self._seen = 0
        self._mean = self._variance = 0.0

    def add(self, loss: float) -> bool:
        """Add the finite loss of one step; returns whether it is a spike."""
        self._seen += 1
        away = loss - self._mean
        if self._seen > self._STEPS and away > self._DEVIATIONS * self._variance**0.5:
            return True
        weight = max(1 / self._seen, 1 / self._STEPS)  # the plain mean of the first 100
        self._mean += weight * away
        self._variance += weight * (away * (loss - self._mean) - self._variance)
        return False


class MetricsLog:
    """Writes `metrics.jsonl`, one object per line, and to the trackers of the run.

    A resumed run first drops the lines after the step of its checkpoint, so that each step is in the file once. Values
    that are not finite are written as null: JSON has no NaN.
    """

    def __init__(
        self, run_folder: Path, trackers: list[GeneralTracker], settings: Mapping[str, Any], step: int
    ) -> None:
        self._path = run_folder / METRICS_FILE
        self._trackers = list(trackers)
        with writing(self._path):
            if self._path.exists():
                # A run that resumes at step s evaluates there again, if an evaluation is due at s.
                found, again = records(self._path), ("eval", DIVERGED)
                kept = [r for r in found if r["step"] < step or (r["step"] == step and r["kind"] not in again)]
                with whole_file(self._path) as partial:
                    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", buffering=1)
        plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items()}
        self._track(lambda tracker: tracker.start())
        self._track(lambda tracker: _store_settings(tracker, plain))

    def write(self, kind: str, step: int, values: Mapping[str, Any], *, track: bool = True, **words: str) -> None:
        """One line {"kind", "step", "time", values…, words…}; the trackers get the values as kind/name if `track`."""
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        with writing(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **finite, **words}) + "\n")
        if track:
            # Groups are sorted by name: train_seconds/forward comes after train/loss.
            named = {f"{kind}/{name}".replace("/seconds_", "_seconds/"): value for name, value in values.items()}
            self._track(lambda tracker: tracker.log(named, step=step))

    def close(self) -> None:
        with suppress(OSError):  # every line is written already, or `write` has raised the error
            self._file.close()
        self._track(lambda tracker: tracker.finish())

    def _track(self, call: Callable[[GeneralTracker], Any]) -> None:
        """Call each tracker. One that fails (a full disk, no network) is removed with a warning; the run goes on."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                print(f"\nwarning: the tracker {tracker.name} failed and is left out: {error}", file=sys.stderr)


def _store_settings(tracker: GeneralTracker, settings: dict[str, Any]) -> None:
    """Settings as text for TensorBoard: hyper-parameters would appear as a second run without a loss."""
    if isinstance(tracker, TensorBoardTracker):
        table = "".join(f"    {name} = {value}\n" for name, value in settings.items())
        tracker.writer.add_text("settings", table)
    else:
        tracker.store_init_configuration(settings)


def build_trackers(config: LogConfig, run_folder: Path, run_name: str, step: int = 0) -> list[GeneralTracker]:
    """Accelerate's trackers for `log.trackers` of a run that starts or resumes at `step`.

    Raises UserError if a tracker is not installed.
    """
    trackers: list[GeneralTracker] = []
    for name in config.trackers:
        if find_spec(name) is None:
            extra = "wandb" if name == "wandb" else "train"
            others = [other for other in config.trackers if other != name]
            raise UserError(
                f'log.trackers names "{name}", which is not installed: pip install "hgpt[{extra}]", or set '
                f"log.trackers = {json.dumps(others)}"
            )
        if name == "tensorboard":
            # purge_step: TensorBoard drops what was logged after the checkpoint.
            trackers.append(TensorBoardTracker("tensorboard", run_folder, purge_step=step + 1))
            continue
        wandb_id = run_folder / "wandb_id"  # a resumed run continues this one on wandb
        with writing(wandb_id):
            if not wandb_id.exists():
                wandb_id.write_text(secrets.token_hex(8))
        trackers.append(
            WandBTracker(
                os.environ.get("WANDB_PROJECT", "hgpt"),
                name=run_name,
                dir=str(run_folder),
                id=wandb_id.read_text(),
                resume="allow",
            )
        )
    return trackers
