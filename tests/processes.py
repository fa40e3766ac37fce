"""Starts train.py in several real processes on this machine, as a launcher would, but without its start-up time."""

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env

import train
from hgpt.run.config import RunConfig

ENGINES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    **{f"zero{n}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)} for n in (1, 2, 3)},
}

# Forked from a server that has imported everything already, so that a process starts in a moment. With a GPU, which a
# forked process cannot use if the server has asked for it, processes start anew.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_context.set_forkserver_preload(["train", "deepspeed", "accelerate.utils.deepspeed"])


def engine_environment(engine: str) -> dict[str, str]:
    """What a launcher sets. On a GPU a run of one plain process needs nothing but the processes' numbers."""
    if engine == "fsdp2":
        file = str(Path(__file__).parent.parent / "configs" / "accelerate" / "fsdp2.yaml")
        arguments = launch.launch_command_parser().parse_args(["--config_file", file, "train.py"])
        known = prepare_multi_gpu_env(launch._validate_launch_command(arguments)[0])
        return {name: value for name, value in known.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return ENGINES[engine]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(
    configs: Sequence[RunConfig],
    processes: int,
    engine: str = "ddp",
    log: Path | None = None,
    *,
    folders: Sequence[Path] | None = None,
    at_build: Sequence[Callable[[], None] | None] | None = None,
    **environment,
):
    """The processes, started; each trains with the configuration of its rank (with the only one, if there is one).

    folders: working directories by rank; each process is then a node of its own.
    at_build: by rank, what a process does in place of building its model.
    """
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": free_port()}
    shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    started = []
    for rank in range(processes):
        settings = shared | {"RANK": rank, "LOCAL_RANK": 0 if folders else rank}
        settings |= engine_environment(engine) | environment
        settings |= {"LOCAL_WORLD_SIZE": 1} if folders else {}
        settings = {name: str(value) for name, value in settings.items()}
        config = configs[rank] if len(configs) > 1 else configs[0]
        around = (folders and folders[rank], at_build and at_build[rank])
        process = _context.Process(target=_train, args=(config, settings, log and log.with_suffix(f".{rank}"), *around))
        process.start()
        started.append(process)
    return started


def finish(started: Sequence[multiprocessing.Process], timeout: float = 600) -> list[int]:
    """The exit codes of all processes; those that are not done in time are killed."""
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def wait_for_step(run_folder: Path, step: int, started) -> None:
    """Wait until a run has logged `step`; none of its processes, or commands, may end before."""
    metrics, deadline = run_folder / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or f'"kind": "train", "step": {step},' not in metrics.read_text(errors="replace"):
        ended = [process.poll() if hasattr(process, "poll") else process.exitcode for process in started]
        assert time.monotonic() < deadline and not any(code is not None for code in ended)
        time.sleep(0.02)


def run(config: RunConfig, processes: int, engine: str = "ddp", log: Path | None = None, **environment: str) -> None:
    """Train to the end; what the processes printed is part of the failure if one of them fails."""
    log = log or Path(config.runs_dir) / f"{config.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    codes = finish(start([config], processes, engine, log, **environment))
    printed = "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.stem}.[0-9]*")))
    assert codes == [0] * processes, f"exit codes {codes}\n{printed[-6000:]}"


def in_group(function: Callable[[Path], None], processes: int, folder: Path) -> list[int]:
    """Exit codes of processes that form a gloo group and call `function`; they print to folder/log.RANK."""
    port, started = free_port(), []
    for rank in range(processes):
        started.append(_context.Process(target=_in_group, args=(function, rank, processes, port, folder)))
        started[-1].start()
    return finish(started)


def _in_group(function: Callable[[Path], None], rank: int, processes: int, port: int, folder: Path) -> None:
    _print_to(folder / f"log.{rank}")
    store = torch.distributed.TCPStore("127.0.0.1", port, processes, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    function(folder)
    torch.distributed.barrier()


def _print_to(log: Path) -> None:
    """Not only Python's streams: C++ prints too."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _train(
    config: RunConfig,
    environment: dict[str, str],
    log: Path | None,
    folder: Path | None,
    at_build: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    if log is not None:
        _print_to(log)
    if folder is not None:
        os.chdir(folder)
    if at_build is not None:
        train.build_model = lambda *arguments: at_build()
    faulthandler.dump_traceback_later(500)  # says where a process hangs
    torch.set_num_threads(1)
    code = 0
    try:
        try:
            replace(config.model.head)  # its checks, which load somebody's own distance; pickling leaves them out
            train.main(config)
        except BaseException as error:
            message, code = train.explain(error)
            print(message, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of the test runner's is run on the way out
