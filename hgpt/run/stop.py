"""How a run stops early: signals, a watchdog for processes that hang, exit codes and their messages."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

from hgpt.errors import UserError, first_line
from hgpt.hardware import out_of_memory
from hgpt.run.checkpoint import Checkpoints, checkpoint_folder
from hgpt.run.engines import Engine

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again


class Preempted(Exception):
    """A signal of a cluster or a closed terminal (SIGTERM, SIGUSR1, SIGHUP) stopped the run; nothing was lost."""


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of a run that did not finish; an unexpected error is raised again."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if out_of_memory(error):
        return (
            f"error: out of memory: {first_line(error)} Lower train.micro_batch (and eval.micro_batch), or set "
            "train.activation_checkpointing = true; neither changes what is computed. If that is not enough, the model "
            "is too large for this machine: python -m hgpt.plan says what it needs."
        ), 2
    if isinstance(error, Preempted):
        return str(error), EXIT_PREEMPTED
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return (
            f"error: process {os.environ.get('RANK', '0')} lost contact with another one: {first_line(error)} The "
            "cause is in the output of the process that ended first. Resume with --resume auto."
        ), EXIT_HUNG
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; resume the last checkpoint with --resume auto", 130
    raise error


class StopSignals:
    """Handles SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP: finish the step, save a checkpoint, stop.

        with StopSignals(engine) as signals:
            ...                     # a signal ends the run at once: there is nothing to save
            signals.training = True
            ...                     # `seen` says that a signal came; a second signal stops at once

    Signals that are ignored stay ignored (nohup: SIGHUP). A thread other than the main one handles no signals.

    Attributes:
        seen: the number of the signal that was received before the last `update`; 0 for none.
    """

    def __init__(self, engine: Engine) -> None:
        self.seen, self.training = 0, False
        self._engine = engine
        self._received, self._when = 0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # Windows has neither SIGUSR1 nor SIGHUP.
            numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")]
            for number in numbers:
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self.training:
            self._raise(number, "before the first step; nothing is lost, start it again with --resume auto")
        if not self._received:
            self._received, self._when = number, time.monotonic()
            with suppress(OSError):  # the terminal may be closed
                os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")
        elif time.monotonic() - self._when > 2:  # within 2 s: one signal, passed on twice by cluster and launcher
            raise KeyboardInterrupt

    @staticmethod
    def _raise(number: int, when: str) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted {when}")
        raise Preempted(f"stopped by {signal.Signals(number).name} {when}")

    def update(self, *, together: bool) -> int:
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
        checkpoints.writer.wait()
        saved = checkpoint_folder(checkpoints.config.run_folder, step)
        if self.seen != signal.SIGINT:
            checkpoints.mark_preempted()
        self._raise(self.seen, f"after step {step}, saved {saved}; resume with --resume auto")


class Watchdog:
    """Ends a process with exit code 70 after `timeout` seconds without progress, and names those it waits for.

    A process that hangs in a collective cannot report it, so a thread does. Each process writes its step to the
    key-value store of the process group. The message on standard error names the step, and the processes that are
    behind or silent. A single process is not watched.

    If process 0, which holds the store, hangs, the store does not answer: only threads that nothing waits for use it.

        with Watchdog(timeout=1800) as watchdog:
            for step in range(steps):
                watchdog.beat(step, "training")
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._interval = min(5.0, timeout / 10)
        self._beat = (0, "starting", time.monotonic())
        self._end = threading.Event()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._store = dist.PrefixStore("hgpt_watchdog", dist.distributed_c10d._get_default_store()) if several else None

    def beat(self, step: int, doing: str) -> None:
        """Record progress: this process begins `doing` ("training", "evaluation", ...) in `step`."""
        self._beat = (step, doing, time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self._store is not None:
            for work in (self._publish, self._watch):
                threading.Thread(target=work, args=(self._store,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _publish(self, store: dist.Store) -> None:
        """Write this process's step, and a number that grows as long as the process runs, into the store."""
        alive = 0
        while not self._end.is_set():
            alive += 1
            with suppress(RuntimeError):  # rank 0, which holds the store, has ended
                store.set(str(self._rank), json.dumps([*self._beat[:2], alive]))
            self._end.wait(self._interval)

    def _watch(self, store: dist.Store) -> None:
        while not self._end.wait(self._interval):
            step, doing, since = self._beat
            if time.monotonic() - since > self.timeout:
                others: list[str] = []
                asking = threading.Thread(target=self._ask, args=(store, step, others), daemon=True)
                asking.start()
                asking.join(3 * self._interval)  # collectives time out after 1.5 · timeout
                others = others or ["process 0, which holds the list of the others' steps, does not answer"]
                message = f"process {self._rank} has waited for {self.timeout:g} s in step {step} ({doing})"
                with suppress(OSError):
                    os.write(2, f"\nerror: {'; '.join([message, *others])}. Resume with --resume auto.\n".encode())
                os._exit(EXIT_HUNG)  # the main thread would never return from the collective

    def _ask(self, store: dist.Store, step: int, phrases: list[str]) -> None:
        """Append a phrase for each process that is behind or silent. Looks twice, because clocks of machines differ."""
        ranks = sorted(set(range(self._world_size)) - {self._rank})
        try:
            before = self._read(store, ranks)
            time.sleep(2 * self._interval)
            now = self._read(store, ranks)
        except RuntimeError as error:
            phrases.append(f"the other processes cannot be asked ({first_line(error)})")
            return
        for rank in ranks:
            their_step, doing, alive = now.get(rank, (0, "", 0))
            if rank not in now:
                phrases.append(f"process {rank} never reported a step")
            elif alive == before.get(rank, (0, "", 0))[2]:
                silent = f"has been silent for {2 * self._interval:g} s"
                phrases.append(f"process {rank} {silent}, since step {their_step} ({doing})")
            elif their_step < step:
                phrases.append(f"process {rank} is still in step {their_step} ({doing})")
        if not phrases:
            phrases.append("every other process is in the same step")

    @staticmethod
    def _read(store: dist.Store, ranks: list[int]) -> dict[int, tuple[int, str, int]]:
        """(step, doing, alive) of the processes that have written into the store."""
        return {rank: tuple(json.loads(store.get(str(rank)))) for rank in ranks if store.check([str(rank)])}


class LastingOutput:
    """Standard output or error that survives a closed pipe (`| head`) or terminal.

    After the first write error all output goes to os.devnull, also from C++.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
