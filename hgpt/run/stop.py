"""Ends a run whose processes wait for each other, and says for whom they wait."""

import json
import os
import threading
import time
from contextlib import suppress

import torch.distributed as dist

EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h


class Watchdog:
    """Watches that this process goes on; when it has not for `timeout` seconds, ends it with exit code 70.

    A process that hangs is stuck in a collective operation and cannot look around itself, so a thread does. Every
    process tells the others, through the key-value store that started them, which step it is in; the message on
    standard error names the step, and the processes that are behind or silent.

        with Watchdog(timeout=1800) as watchdog:
            for step in range(steps):
                watchdog.beat(step, "training")

    Args:
        timeout: seconds without a beat.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._interval = min(5.0, timeout / 10)
        self._beat = (0, "starting", time.time())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if several else 0
        self._processes = dist.get_world_size() if several else 1
        self._store = dist.PrefixStore("hgpt_watchdog", dist.distributed_c10d._get_default_store()) if several else None

    def beat(self, step: int, doing: str) -> None:
        """This process goes on: it now does `doing` of `step`."""
        self._beat = (step, doing, time.time())

    def __enter__(self) -> "Watchdog":
        if self._store is not None:  # a process alone waits for nobody
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _watch(self) -> None:
        assert self._store is not None
        while not self._end.is_set():
            step, doing, since = self._beat
            with suppress(RuntimeError):  # the process that holds the store has gone: the others will be silent
                self._store.set(str(self._rank), json.dumps([step, doing, time.time()]))
            if time.time() - since > self.timeout:
                lines = [f"process {self._rank} has waited for {self.timeout:g} s in step {step} ({doing})"]
                lines += self._others(step)
                os.write(2, ("\nerror: " + "; ".join(lines) + ". Go on with --resume auto.\n").encode())
                os._exit(EXIT_HUNG)  # the main thread would never come back from the operation it waits in
            self._end.wait(self._interval)

    def _others(self, step: int) -> list[str]:
        """One phrase for each process that is behind or silent."""
        assert self._store is not None
        phrases = []
        for rank in range(self._processes):
            if rank == self._rank:
                continue
            try:
                known = self._store.check([str(rank)])
                their_step, doing, heard = json.loads(self._store.get(str(rank))) if known else (0, "", 0.0)
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
