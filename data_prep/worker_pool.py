"""Worker processes: started safely in a process with threads, and ended when their parent ends."""

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
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def start_imports() -> ForkServerContext | SpawnContext:
    """Start a server process that imports the workers' modules (seconds) while the caller continues."""
    # Not a plain fork: a child would inherit locks that threads of tokenizers and pyarrow may hold.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports this module once for all workers. The command's own module is not preloaded: it is __main__ and
    # would be imported twice.
    context.set_forkserver_preload(["data_prep.encoding"])
    resource_tracker.ensure_running()  # unblocks SIGINT when it starts, so it must start before the mask is set
    # Ctrl-C reaches all processes of the terminal. The server and the workers inherit the blocked signal, so they print
    # no traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return context


def in_daemon(work: Callable[[], None]) -> Future[None]:
    """Call `work` in a thread that may be left behind: Ctrl-C does not wait for it."""
    finished: Future[None] = Future()

    def call() -> None:
        try:
            work()
            finished.set_result(None)
        except BaseException as error:
            finished.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return finished


def _first_process() -> None:
    start_imports().Process(target=_nothing).start()  # returns when the server has forked it


def _nothing() -> None:
    pass


@contextmanager
def worker_pool(workers: int, work: Callable[[Given], Made]) -> Iterator[Callable[[Given], Future[Made]]]:
    """A function that calls `work` in one of `workers` processes; `work` is pickled once.

    If the context ends with an exception, the workers are terminated. They also end when this process is killed. They
    ignore Ctrl-C, which this process handles.
    """
    context = start_imports()
    # Wait for its imports. Ctrl-C then ends this process at once, before it requests workers: a worker that starts
    # after this process has ended prints a traceback.
    in_daemon(_first_process).result()
    others = set(multiprocessing.active_children())
    # As bytes: starting a process blocks until it has unpickled its arguments, and unpickling a tokenizer takes time.
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(pickle.dumps(work),))
    try:
        yield lambda given: pool.submit(_call, given)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


_work: Callable[[Any], Any]  # of this worker process


def _start(work: bytes) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = pickle.loads(work)


def _call(given: Any) -> Any:
    return _work(given)


def _end_with_parent() -> None:
    """Exit when the parent ends; a worker would otherwise wait forever for work from a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
