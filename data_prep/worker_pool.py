"""Processes that encode: started safely beside threads, and gone when the process that started them is."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TypeVar

State = TypeVar("State")


def start_imports() -> ForkServerContext | SpawnContext:
    """Begin to import, in the background, what workers need: some seconds that a caller may use for something else."""
    # Not a plain fork: tokenizers and pyarrow have threads by now, whose locks a forked child would inherit.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Imported once and not by every worker. Not the caller's module: it may be __main__, and would come twice.
    context.set_forkserver_preload(["hgpt.data.tokenizer", "pyarrow.parquet", "tqdm"])
    resource_tracker.ensure_running()  # it lets SIGINT through again at the end, so it comes before
    # Ctrl-C reaches every process of the terminal. Blocked from its first moment on in the server, and so in all that
    # it forks, it makes none of them print a traceback out of an import.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def finished_imports() -> Future[None]:
    """Done when what `start_imports` begins is: until then, the start of a process blocks for seconds."""
    finished: Future[None] = Future()

    def wait() -> None:
        try:
            start_imports().Process(target=_nothing).start()  # returns when the server has forked it
            finished.set_result(None)
        except BaseException as error:
            finished.set_exception(error)

    # A daemon: a main process that ends meanwhile (Ctrl-C) does not wait for it.
    threading.Thread(target=wait, daemon=True).start()
    return finished


def _nothing() -> None:
    pass


@contextmanager
def worker_pool(workers: int, start: Callable[[State], None], state: State) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, each of which begins with `start(state)`; `state` is pickled once.

    Leaving the context by an exception ends the workers at once, in the middle of their work. They also end when this
    process is killed, and ignore Ctrl-C, which is this process's to handle.
    """
    context = start_imports()
    others = set(multiprocessing.active_children())
    # As bytes: the start of a process blocks until that has read all of them, which making a tokenizer out of them in
    # between would hold up.
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(start, pickle.dumps(state)))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


def _start(start: Callable[[State], None], state: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(pickle.loads(state))


def _end_with_parent() -> None:
    """A worker would otherwise wait for ever for work from a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
