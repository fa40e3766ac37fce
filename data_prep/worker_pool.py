"""Processes that encode: started safely beside threads, and gone when the process that started them is."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import TypeVar

State = TypeVar("State")


def start_imports() -> BaseContext:
    """Begin to import, in the background, what workers need: some seconds that a caller may use for something else."""
    # Not a plain fork: tokenizers and pyarrow have threads by now, whose locks a forked child would inherit.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once and not by every worker. Not the caller's module: it may be __main__, and would come twice.
    context.set_forkserver_preload(["hgpt.tokenizer", "pyarrow.parquet", "tqdm"])
    forkserver.ensure_running()
    return context


@contextmanager
def worker_pool(workers: int, start: Callable[[State], None], state: State) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, each of which begins with `start(state)`; `state` is pickled.

    Leaving the context by an exception ends the workers at once, in the middle of their work. They also end when this
    process is killed, and ignore Ctrl-C, which is this process's to handle.
    """
    context = start_imports()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(start, state))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


def _start(start: Callable[[State], None], state: State) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(state)


def _end_with_parent() -> None:
    """A worker would otherwise wait for ever for work from a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
