"""hgpt/run/stop.py alone; tests/test_engines.py stops a process of a real run."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import in_group

from hgpt.run.stop import EXIT_HUNG, Watchdog


def test_a_process_alone_is_not_watched():
    with Watchdog(timeout=0.1) as watchdog:
        watchdog.beat(1, "training")
        time.sleep(0.3)


def _slow_but_alive(folder: Path) -> None:
    with Watchdog(timeout=1.0) as watchdog:
        for step in range(6):
            watchdog.beat(step, "training")
            time.sleep(0.4)  # 2.4 s in all
            dist.barrier()


def _one_is_behind(folder: Path) -> None:
    with Watchdog(timeout=1.5) as watchdog:
        watchdog.beat(1, "training")
        dist.barrier()
        if dist.get_rank() == 1:  # busy with something else, and beating on
            for _ in range(100):
                watchdog.beat(1, "saving a checkpoint")
                time.sleep(0.1)
        watchdog.beat(2, "training")
        dist.barrier()


def test_nobody_is_ended_who_goes_on(tmp_path):
    assert in_group(_slow_but_alive, 2, tmp_path) == [0, 0]


@pytest.mark.parametrize("function", [_one_is_behind])
def test_the_message_names_the_step_and_the_process_that_is_behind(tmp_path, function):
    codes = in_group(function, 2, tmp_path)
    assert codes[0] == EXIT_HUNG and codes[1] != 0
    message = (tmp_path / "log.0").read_text()
    assert "error: process 0 has waited for 1.5 s in step 2 (training)" in message
    assert "process 1 is still in step 1 (saving a checkpoint)" in message
