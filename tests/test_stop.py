"""hgpt/run/stop.py: signals, the watchdog, and the end of a run that did not finish."""

import errno
import io
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hgpt.errors import UserError
from hgpt.run.stop import EXIT_HUNG, EXIT_PREEMPTED, LastingOutput, Preempted, StopSignals, Watchdog, explain


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_signal_is_seen_when_asked_for_and_a_later_one_stops_at_once(number, monkeypatch):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopSignals(SimpleNamespace(world_size=1)) as signals:
        signals.training = True
        assert signals.update(together=False) == 0
        os.kill(os.getpid(), number)
        assert signals.seen == 0 and signals.update(together=False) == number
        os.kill(os.getpid(), number)  # a cluster and its launcher may both pass on one signal
        later = time.monotonic() + 3
        monkeypatch.setattr(time, "monotonic", lambda: later)
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_several_processes_see_a_signal_only_where_all_ask():
    """The other process of two received SIGTERM."""
    others = torch.tensor([signal.SIGTERM])
    accelerator = SimpleNamespace(gather=lambda mine: torch.cat([mine, others]))
    engine = SimpleNamespace(world_size=2, device="cpu", accelerator=accelerator)
    with StopSignals(engine) as signals:
        assert signals.update(together=False) == 0
        assert signals.update(together=True) == signal.SIGTERM


def test_a_signal_before_the_first_step_ends_the_run_at_once():
    for number, raised in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted), (signal.SIGHUP, Preempted)):
        with pytest.raises(raised, match="before the first step"), StopSignals(SimpleNamespace(world_size=1)):
            os.kill(os.getpid(), number)
            time.sleep(1)


def test_signals_that_are_ignored_are_left_alone():
    """tests/test_faults.py trains in a thread, which can handle none."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals(SimpleNamespace(world_size=1)) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.update(together=False) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_output_outlives_its_reader(tmp_path, code):
    """A pipe that nobody reads, a closed terminal, a full disk; then a stream of a file that goes on."""

    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(code, os.strerror(code))

        def fileno(self):
            return file.fileno()

    with open(tmp_path / "out", "wb") as file:
        output = LastingOutput(Broken())
        assert output.write("text") == 4
        output.flush()
        file.write(b"to the end")
    assert (tmp_path / "out").read_bytes() == b"" and not output.isatty()


def test_what_a_run_that_did_not_finish_says(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(RuntimeError) as torch_out_of_memory:
        torch.empty(2**60)
    for error, message, code in (
        (UserError("no such file"), "error: no such file", 2),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "error: out of memory: CUDA out of memory. Lower tr", 2),
        (torch_out_of_memory.value, "error: out of memory: ", 2),
        (MemoryError(), "error: out of memory: ", 2),
        (Preempted("stopped by SIGTERM"), "stopped by SIGTERM", EXIT_PREEMPTED),
        (dist.DistBackendError("NCCL\nmore"), "error: process 3 lost contact with another one: NCCL The", EXIT_HUNG),
        (RuntimeError("[gloo] connection closed"), "error: process 3 lost contact", EXIT_HUNG),
        (KeyboardInterrupt(), "interrupted; resume the last checkpoint with --resume auto", 130),
        (KeyboardInterrupt("interrupted after step 4"), "interrupted after step 4", 130),
    ):
        said, status = explain(error)
        assert said.startswith(message) and status == code
    with pytest.raises(ZeroDivisionError):
        explain(ZeroDivisionError())


# ----------------------------------------------- The watchdog; tests/test_engines.py stops a process of a real run


def test_a_process_alone_is_not_watched():
    with Watchdog(timeout=0.1) as watchdog:
        watchdog.beat(1, "training")
        time.sleep(0.3)


def test_the_message_names_the_step_and_the_processes_that_are_behind(monkeypatch, capfd):
    """Processes 0 and 1 of three as two watchdogs on one store; process 2 never starts."""
    codes, store = [], dist.HashStore()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), watchdogs[0]._end.set()))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    watchdogs = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        watchdogs.append(Watchdog(timeout=1.0))
    with watchdogs[0], watchdogs[1]:
        for step in range(1, 9):  # slow, but making progress: 1.6 s in all
            for watchdog in watchdogs:
                watchdog.beat(step, "training")
            time.sleep(0.2)
        assert codes == []
        watchdogs[0].beat(9, "training")
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            watchdogs[1].beat(8, "saving a checkpoint")  # busy with something else
            time.sleep(0.1)
    assert codes == [EXIT_HUNG]
    message = capfd.readouterr().err
    assert "error: process 0 has waited for 1 s in step 9 (training)" in message
    assert "process 1 is still in step 8 (saving a checkpoint); process 2 never reported a step" in message


def test_a_store_that_does_not_answer_delays_nobody(monkeypatch, capfd):
    """Process 0, which holds the store, is frozen: each call on it waits. The clock of the machine is set back."""

    class Frozen:
        def __getattr__(self, name):
            return lambda *arguments: time.sleep(60)

    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), watchdog._end.set()))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    watchdog = Watchdog(timeout=1.0)
    watchdog._rank, watchdog._world_size, watchdog._store = 1, 2, Frozen()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with watchdog:
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert codes == [EXIT_HUNG]
    message = capfd.readouterr().err
    assert "process 1 has waited for 1 s in step 0 (starting)" in message and "process 0" in message
