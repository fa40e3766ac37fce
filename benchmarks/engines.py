"""One run under every engine and number of processes: differences of losses and weights, and seconds per step.

    python -m benchmarks.engines [--steps 20] [--processes 1 2 4] [--engines multi_cpu zero1 zero2 zero3]

Trains a small version of the quickstart's model (D = 64) with AdamW on random tokens on the CPU, launched with the
files of configs/accelerate. Prints for each engine the largest difference from one process: of the loss and the
gradient norm over all steps, of the validation loss, of the exported weights and of AdamW's state. Seconds are the
median of a step, with one thread per process; they mean nothing on a machine with fewer cores than processes.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hgpt import cli
from hgpt.history import records

CONFIGS = {"harmonic": "configs/quickstart.toml", "softmax": "configs/quickstart_softmax.toml"}
SETTINGS = (
    "--data.vocab_size=512 --data.seq_len=64 --model.n_embd=64 --train.global_batch=8 --train.micro_batch=2 "
    "--optim.algorithm=adamw --optim.lr=1e-3 --optim.min_lr=1e-4 --optim.warmup_steps=5 --eval.unigram_baseline=false "
    "--log.every=1 --log.trackers=[]"
)


def train(folder: Path, launcher: str, processes: int, head: str, tied: bool, steps: int) -> Path:
    """Train one run with a launcher's file on the data in `folder`; returns its run folder."""
    name = f"{head}-{tied}-{launcher}-{processes}"
    command = ["accelerate", "launch", "--config_file", f"configs/accelerate/{launcher}.yaml"]
    command += ["--num_processes", str(processes), *(["--main_process_port", "0"] if processes > 1 else [])]
    command += ["train.py", "--config", CONFIGS[head], "--name", name, "--runs_dir", str(folder), *SETTINGS.split()]
    command += [f"--data.path={folder}", f"--train.steps={steps}", f"--eval.every={steps}"]
    command += [f"--model.tie_word_embeddings={str(tied).lower()}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode or f"{processes} x cpu" not in result.stdout + result.stderr:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return folder / name


def differences(run: Path, reference: Path) -> list[float]:
    """The largest difference of loss, gradient norm, validation loss, weights and AdamW's state."""
    found = []
    for kind, value in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        pairs = zip(records(run, kind), records(reference, kind), strict=True)
        found.append(max(abs(ours[value] - theirs[value]) for ours, theirs in pairs))
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "latest" / file) for folder in (run, reference))
        assert ours.keys() == theirs.keys()
        found.append(max(float((ours[name] - theirs[name]).abs().max()) for name in ours))
    return found


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("python -m benchmarks.engines", __doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", default=["multi_cpu", "zero1", "zero2", "zero3"])
    parser.add_argument("--heads", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tied", nargs="+", choices=["tied", "untied"], default=["tied", "untied"])
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.steps} steps; difference from one process\n")
    print("| head | embeddings | engine | processes | loss | grad norm | validation loss | weights | AdamW | s/step |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for split, count in (("train", 200_000), ("val", 5_000)):
            np.random.RandomState(0).randint(512, size=count).astype(np.uint16).tofile(folder / f"{split}.bin")
        for head, embeddings in product(options.heads, options.tied):
            case = (head, embeddings == "tied", options.steps)
            alone = train(folder, "cpu", 1, *case)
            for engine, processes in product(options.engines, options.processes):
                run = train(folder, engine, processes, *case)
                times = [record["time"] for record in records(run, "train")]
                seconds = statistics.median(later - earlier for earlier, later in pairwise(times))
                cells = " | ".join(f"{cell:.1e}" for cell in differences(run, alone))
                print(f"| {head} | {embeddings} | {engine} | {processes} | {cells} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
