"""configs/accelerate and configs/slurm: they parse, say nothing that the run's TOML decides, and really launch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from processes import free_port
from test_engines import curve, engine_config

import train
from hgpt.run.checkpoint import checkpoints
from hgpt.run.settings import write_toml

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_every_way_to_launch_is_there():
    single = {"cpu", "multi_cpu", "single_gpu", "multi_gpu", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2"}
    assert {path.stem for path in LAUNCHERS} == single | {"multi_node", "multi_node_zero2"}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_files_leave_to_the_run_what_the_run_decides(path):
    config = load_config_from_file(str(path))  # Accelerate's own parser refuses unknown keys
    assert config.mixed_precision == "no"
    settings = yaml.safe_load(path.read_text())
    deepspeed = settings.get("deepspeed_config", {})
    assert not deepspeed.keys() & {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"}
    if "zero" in path.stem:
        assert f"zero{deepspeed['zero_stage']}" in path.stem
        assert ("offload" in path.stem) == (deepspeed.get("offload_optimizer_device", "none") != "none")
    assert (settings["num_machines"] > 1) == ("multi_node" in path.stem)


def test_the_batch_script_is_shell_and_names_real_options():
    script = ROOT / "configs" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    options = {word for word in script.read_text().split() if word.startswith("--") and "_" in word}
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert options <= known and {"--config_file", "--machine_rank", "--main_process_ip"} <= options


def launch_as_alone(data: Path, tmp_path: Path, launcher: str, micro_batch: int, *nodes: tuple) -> str:
    """Launch the shipped file on each node, with these options, and compare with one process; what was printed."""
    alone, config = (engine_config(data, tmp_path, n, train={"micro_batch": micro_batch}) for n in ("alone", launcher))
    train.main(alone)
    toml, file = tmp_path / "run.toml", ROOT / "configs" / "accelerate" / f"{launcher}.yaml"
    write_toml(config, toml)
    started, printed = [], ""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for options in nodes:
        command = ["accelerate", "launch", "--config_file", file, *options, "train.py", "--config", toml]
        started.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, **streams))
    for process in started:
        printed += process.communicate(timeout=400)[0]
        assert process.returncode == 0, printed[-5000:]
    # DeepSpeed's Adam on the CPU is another implementation of the same formula.
    np.testing.assert_allclose(curve(config), curve(alone), atol=1e-4 if "offload" in launcher else 1e-5)
    assert len(checkpoints(config.run_folder)) == 2
    return printed


ENGINES = {
    **{"cpu": "one process", "multi_cpu": "DDP", "zero1": "DeepSpeed ZeRO-1", "zero2": "DeepSpeed ZeRO-2"},
    **{"zero3": "DeepSpeed ZeRO-3", "zero2_offload": "DeepSpeed ZeRO-2"},
}


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=pytest.mark.slow if name != "zero2" else ()) for name in ENGINES]
)
def test_accelerate_launch(data, tmp_path, launcher):
    processes = 1 if launcher == "cpu" else 2
    port = ["--main_process_port", free_port()] if processes > 1 else []
    printed = launch_as_alone(data, tmp_path, launcher, 2, ("--num_processes", processes, *port))
    assert f"{processes} x cpu, {ENGINES[launcher]}" in printed


@pytest.mark.parametrize(
    "launcher", ["multi_node", pytest.param("multi_node_zero2", marks=pytest.mark.slow)], ids=["ddp", "zero2"]
)
def test_two_nodes(data, tmp_path, launcher):
    """Two launchers, each with the rank of its node, that meet on this machine's loopback."""
    options = ("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    nodes = [("--machine_rank", rank, *options) for rank in (0, 1)]
    assert "2 x cpu" in launch_as_alone(data, tmp_path, launcher, 1, *nodes)
