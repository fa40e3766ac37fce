"""The same run under every engine and number of processes: how far the losses are apart, and what it costs.

    python -m benchmarks.engines [--steps 20] [--processes 1 2 4] [--engines multi_cpu zero1 zero2 zero3]

Trains the quickstart's model with AdamW for some steps on random tokens on the CPU, launched with the files of
configs/accelerate, and prints for each engine the largest difference from one process: of the loss and the gradient
norm over all steps, of the validation loss, of the exported weights and of AdamW's state. Seconds are those of a step
after the first, with every process on one thread: on a machine with fewer cores than processes they say nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hgpt.data.shards import DataMeta, ShardWriter, SplitMeta, write_meta
from hgpt.history import records

VOCAB = 512
MEASURED = ("loss", "gradient norm", "validation loss", "weights", "AdamW")
CONFIGS = {"harmonic": "configs/quickstart.toml", "softmax": "configs/quickstart_softmax.toml"}


def write_data(folder: Path) -> None:
    """Random tokens: every document is one shard's share of them."""
    random = np.random.RandomState(0)
    splits = {}
    for split, count in (("train", 200_000), ("val", 5_000)):
        with ShardWriter(folder, split) as writer:
            writer.write(random.randint(VOCAB, size=count).astype(np.uint16))
            records = writer.close()
        splits[split] = SplitMeta(tokens=count, documents=1, bytes=count, shards=records)
    meta = DataMeta(tokenizer="none", vocab_size=VOCAB, end_of_text=VOCAB - 1, splits=splits, source="random tokens")
    write_meta(folder, meta)


def train(folder: Path, name: str, launcher: str, processes: int, head: str, tied: bool, steps: int) -> Path:
    """One run under a launcher's file; its folder."""
    command = ["accelerate", "launch", "--config_file", f"configs/accelerate/{launcher}.yaml"]
    command += ["--num_processes", str(processes), *(["--main_process_port", "0"] if processes > 1 else [])]
    command += ["train.py", "--config", CONFIGS[head], "--name", name, "--runs_dir", str(folder / "runs")]
    settings = {
        "data.path": folder / "data",
        "data.seq_len": 64,
        "model.n_embd": 64,
        "model.tie_word_embeddings": str(tied).lower(),
        "train.steps": steps,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "optim.algorithm": "adamw",
        "optim.lr": 1e-3,
        "optim.min_lr": 1e-4,
        "optim.warmup_steps": 5,
        "eval.every": steps,
        "eval.unigram_baseline": "false",
        "log.every": 1,
        "log.trackers": "[]",
    }
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode or f"{processes} x cpu" not in result.stdout + result.stderr:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return folder / "runs" / name


def difference(run: Path, reference: Path, kind: str, name: str) -> float:
    """The largest difference of a value of metrics.jsonl."""
    pairs = zip(records(run, kind), records(reference, kind), strict=True)
    return max(abs(ours[name] - theirs[name]) for ours, theirs in pairs)


def tensor_difference(run: Path, reference: Path, file: str) -> float:
    ours, theirs = (load_file(folder / "latest" / file) for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", default=["multi_cpu", "zero1", "zero2", "zero3"])
    parser.add_argument("--heads", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tied", nargs="+", choices=["tied", "untied"], default=["tied", "untied"])
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {options.steps} steps; largest difference from one process"
    )
    print(
        "| head | embeddings | engine | processes | loss | gradient norm | validation loss | weights | AdamW | s/step |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        write_data(folder / "data")
        for head in options.heads:
            for embeddings in options.tied:
                case = (head, embeddings == "tied", options.steps)
                alone = train(folder, f"{head}-{embeddings}", "cpu", 1, *case)
                for engine in options.engines:
                    for processes in options.processes:
                        name = f"{head}-{embeddings}-{engine}-{processes}"
                        run = train(folder, name, engine, processes, *case)
                        times = [record["time"] for record in records(run, "train")]
                        cells = [
                            difference(run, alone, "train", "loss"),
                            difference(run, alone, "train", "grad_norm"),
                            difference(run, alone, "eval", "loss"),
                            tensor_difference(run, alone, "model/model.safetensors"),
                            tensor_difference(run, alone, "optimizer.safetensors"),
                        ]
                        seconds = statistics.median(later - earlier for earlier, later in pairwise(times))
                        figures = " | ".join(f"{cell:.1e}" for cell in cells)
                        print(
                            f"| {head} | {embeddings} | {engine} | {processes} | {figures} | {seconds:.3f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
