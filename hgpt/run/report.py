"""What a run reports: tokens/s, model FLOPs utilisation, metrics.jsonl and the trackers."""

import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from hgpt.durable import whole_file
from hgpt.errors import UserError
from hgpt.hardware import device_name, memory_in_use, peak_flops  # noqa: F401 - train.py imports them from here
from hgpt.history import METRICS_FILE, records
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.run.config import LogConfig


def flops_per_token(config: HGPTConfig, seq_len: int) -> float:
    """Forward and backward FLOPs per token: 6 · (weights in matrix products) + 12 · L · D · T for attention.

    The convention of PaLM (arXiv:2204.02311, appendix B) and nanoGPT: embeddings are look-ups and count only as
    the unembedding; of a harmonic head the same product is counted and nothing of its pointwise work. Attention counts
    all T · T scores, though causal kernels skip the half that is masked.
    """
    weights = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * seq_len


class PhaseTimes:
    """Seconds spent in each phase of the steps since the last reading.

        with phases("forward"):
            ...

    On a CUDA device the phases are timed by events in its stream, which are read only when asked for: work is queued,
    so that a clock on the host would measure nothing, and waiting for it would slow it down. Phases that are the
    host's own ("data", "save", "evaluation") are timed by the host's clock everywhere.
    """

    HOST = ("data", "save", "evaluation")

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
        """Seconds by phase since the last call (or since construction), and start anew."""
        if self._recorded:
            self._recorded[-1][2].synchronize()
        for phase, start, end in self._recorded:
            self._add(phase, start.elapsed_time(end) / 1000)
        seconds, self._seconds, self._recorded = self._seconds, {}, []
        return seconds

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


class LossSpikes:
    """Counts losses more than `deviations` standard deviations above their running mean.

    Mean and variance are exponential averages over about 100 steps, a spike itself left out, and nothing counts in the
    first 100: μ ← μ + (l − μ)/100, σ² ← σ² + ((l − μ)² − σ²)/100.
    """

    _STEPS = 100

    def __init__(self, deviations: float = 6.0) -> None:
        self.deviations = deviations
        self.count = 0
        self._seen = 0
        self._mean = self._variance = 0.0

    def add(self, loss: float) -> bool:
        """Take in the loss of one step; whether it is a spike."""
        self._seen += 1
        away = loss - self._mean
        if self._seen > self._STEPS and away > self.deviations * self._variance**0.5:
            self.count += 1
            return True
        weight = max(1 / self._seen, 1 / self._STEPS)  # a plain mean of the first hundred
        self._mean += weight * away
        self._variance += weight * (away * (loss - self._mean) - self._variance)
        return False


class Throughput:
    """Tokens per second since the last reading, with pauses (evaluations, checkpoints) taken out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._tokens = 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._paused += seconds

    def read(self) -> float:
        """Tokens per second since the last call (or since construction), and start anew."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start - self._paused, 1e-9)
        self._start, self._paused, self._tokens = now, 0.0, 0
        return rate


class MetricsLog:
    """`metrics.jsonl`, one object per line, and beside it whatever trackers the run asked for.

    The file is the run's own record: a resumed run drops the lines after the step it goes on from, so every step stands
    once in it. Values that are not finite are written as null, since JSON has no NaN.
    """

    def __init__(
        self, run_folder: Path, trackers: list[GeneralTracker], settings: Mapping[str, Any], step: int
    ) -> None:
        self._path = run_folder / METRICS_FILE
        self._trackers = trackers
        if self._path.exists():
            kept = [record for record in records(self._path) if _is_before(record, step)]
            with whole_file(self._path) as path:
                path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", buffering=1)
        plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items()}
        for tracker in trackers:
            tracker.start()
            tracker.store_init_configuration(plain)

    def write(self, kind: str, step: int, values: Mapping[str, float], **words: str) -> None:
        """One line {"kind", "step", "time", values…, words…}; the trackers get the values as kind/name."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write_line({"kind": kind, "step": step, "time": time.time(), **finite, **words})
        for tracker in self._trackers:
            tracker.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def write_processes(self, step: int, values: Mapping[str, list[float]]) -> None:
        """One line {"kind": "processes", …}, a list over the processes for each value; not for the trackers."""
        self._write_line({"kind": "processes", "step": step, "time": time.time(), **values})

    def _write_line(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f"could not write {self._path}: {error}; make room, then go on with --resume auto"
            ) from error

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def _is_before(record: Mapping[str, Any], step: int) -> bool:
    """Whether a record belongs to the run up to `step`, from which it is resumed."""
    # An evaluation at step s is made before step s is trained, and repeated by the run that is resumed there.
    return record["step"] < step or (record["kind"] != "eval" and record["step"] == step)


def build_trackers(config: LogConfig, run_folder: Path, run_name: str, step: int = 0) -> list[GeneralTracker]:
    """Accelerate's trackers for `log.trackers`, of a run that starts or goes on at `step`.

    Raises UserError when the package of one is not installed.
    """
    trackers: list[GeneralTracker] = []
    for name in config.trackers:
        if name == "tensorboard":
            # TensorBoard drops what a run that broke off had written beyond the checkpoint.
            trackers.append(TensorBoardTracker("tensorboard", run_folder, purge_step=step + 1))
        else:
            try:
                import wandb  # noqa: F401
            except ImportError as error:
                raise UserError(
                    'log.trackers names "wandb", which is not installed: pip install wandb, '
                    'or set log.trackers = ["tensorboard"]'
                ) from error
            wandb_id = run_folder / "wandb_id"  # under which a resumed run is continued there
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
