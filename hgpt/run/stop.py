"""How a run stops early: signals, a watchdog for processes that hang, exit codes and their messages."""

import json
import os
import signal
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from hgpt.errors import UserError
from hgpt.run.checkpoint import Checkpoints, checkpoint_folder
from hgpt.run.engines import Engine

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(Exception):
    """The run was stopped by SIGTERM or SIGUSR1, as clusters send them, after a checkpoint was saved."""


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of a run that did not finish; an unexpected error is raised again."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"error: {first_line} Lower train.micro_batch (and eval.micro_batch), or set "
            "train.activation_checkpointing = true; neither changes what is computed."
        ), 2
    if isinstance(error, Preempted):
        return str(error), EXIT_PREEMPTED
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return (
            f"error: process {os.environ.get('RANK', '0')} lost contact with another one: {first_line} The cause is in "
            "the output of the process that ended first. Resume with --resume auto."
        ), EXIT_HUNG
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; resume the last checkpoint with --resume auto", 130
    raise error


class StopSignals:
    """Handles SIGINT (Ctrl-C), SIGTERM and SIGUSR1: finish the step, save a checkpoint, stop; stop at once if repeated.

        with StopSignals(engine) as signals:
            ...

    Attributes:
        seen: the number of the signal that was received before the last `ask`; 0 for none.
    """

    def __init__(self, engine: Engine) -> None:
        self.seen = 0
        self._engine = engine
        self._received, self._when = 0, 0.0

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self._received:
            self._received, self._when = number, time.monotonic()
            os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")
        elif time.monotonic() - self._when > 2:  # within 2 s: one signal, passed on twice by cluster and launcher
            raise KeyboardInterrupt

    def ask(self, *, together: bool) -> int:
        """Update `seen` and return it. Collective if `together`.

        Processes receive a signal at different moments but must stop after the same step: with several processes `seen`
        changes only if they ask together.
        """
        if self._engine.world_size == 1:
            self.seen = self._received
        elif together:
            received = torch.tensor([self._received], device=self._engine.device)
            self.seen = int(self._engine.accelerator.gather(received).max())
        return self.seen

    def leave_if_seen(self, step: int, checkpoints: Checkpoints) -> None:
        """If a signal was seen, wait for the checkpoint and raise KeyboardInterrupt (SIGINT) or Preempted."""
        if not self.seen:
            return
        checkpoints.wait()
        saved = checkpoint_folder(checkpoints.config.run_folder, step)
        message = f"after step {step}, saved {saved}; resume with --resume auto"
        if self.seen == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted {message}")
        checkpoints.mark_preempted()
        raise Preempted(f"stopped by {signal.Signals(self.seen).name} {message}")


class Watchdog:
    """Ends a process with exit code 70 after `timeout` seconds without progress, and names those it waits for.

    A process that hangs in a collective cannot report it, so a thread does. Each process writes its step to the
    key-value store of the process group. The message on standard error names the step, and the processes that are
    behind or silent. A single process is not watched.

        with Watchdog(timeout=1800) as watchdog:
            for step in range(steps):
                watchdog.beat(step, "training")
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._interval = min(5.0, timeout / 10)
        self._beat = (0, "starting", time.time())
        self._end = threading.Event()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._store = dist.PrefixStore("hgpt_watchdog", dist.distributed_c10d._get_default_store()) if several else None

    def beat(self, step: int, doing: str) -> None:
        """Record progress: this process begins `doing` ("training", "evaluation", ...) in `step`."""
        self._beat = (step, doing, time.time())

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            threading.Thread(target=self._watch, args=(self._store,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _watch(self, store: dist.Store) -> None:
        while not self._end.is_set():
            step, doing, since = self._beat
            with suppress(RuntimeError):  # rank 0, which holds the store, has ended
                store.set(str(self._rank), json.dumps([step, doing, time.time()]))
            if time.time() - since > self.timeout:
                lines = [f"process {self._rank} has waited for {self.timeout:g} s in step {step} ({doing})"]
                lines += self._others(store, step)
                os.write(2, ("\nerror: " + "; ".join(lines) + ". Resume with --resume auto.\n").encode())
                os._exit(EXIT_HUNG)  # the main thread would never return from the collective
            self._end.wait(self._interval)

    def _others(self, store: dist.Store, step: int) -> list[str]:
        """One phrase for each process that is behind or silent."""
        phrases = []
        for rank in set(range(self._world_size)) - {self._rank}:
            try:
                known = store.check([str(rank)])
                their_step, doing, heard = json.loads(store.get(str(rank))) if known else (0, "", 0.0)
            except RuntimeError as error:
                return [f"the other processes cannot be asked ({str(error).splitlines()[0]})"]
            silent = time.time() - heard
            if not known:
                phrases.append(f"process {rank} was never heard of")
            elif silent > 3 * self._interval:
                phrases.append(f"process {rank} has been silent for {silent:.0f} s, since step {their_step} ({doing})")
            elif their_step < step:
                phrases.append(f"process {rank} is still in step {their_step} ({doing})")
        return phrases or ["every other process is in the same step"]
