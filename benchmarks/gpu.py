"""All GPU measurements in one command that ends within its minutes.

    python -m benchmarks.gpu --minutes 8 --out FOLDER          on one GPU, from a checkout
    python -m benchmarks.gpu --device cpu --out FOLDER         the same parts with tiny sizes

The parts run one after the other, each in its own process with a time limit:

    head        loss and gradients of GPT-2 small's head and of other libraries' heads: time, memory, errors
    step        the training step of GPT-2 small: harmonic, softmax and a plain GPT-2, micro-batches of 8 to 64
    train       train.py from its start to its end on random tokens
    tests       the tests marked "gpu"
    generate    tokens per second of generation, and the head's share
    energy      the card's energy counter under load, compared with hgpt.run.energy

A part that fails, lacks a package, or reaches its limit is reported with the reason; the next part goes on. Unused time
goes to later parts. FOLDER gets gpu.json, rewritten after each part, gpu.txt (the tables), and log.txt (the parts'
output). All parts use the first GPU; the tests use all GPUs.
"""

import argparse
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import head_loss, sampling, train_step
from hgpt import cli
from hgpt.cli import shown
from hgpt.data.shards import DataMeta, ShardWriter, SplitMeta, token_dtype, write_meta
from hgpt.durable import whole_file
from hgpt.errors import UserError
from hgpt.hardware import choose_device, device_name, installed_versions
from hgpt.history import records
from hgpt.run.energy import EnergyMeter, Reading
from hgpt.run.engines import code_fingerprint

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "deepspeed", "numpy", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "nvidia-ml-py", "codecarbon", "pytest",
)  # fmt: skip
# Name in the table → variant of benchmarks.head_loss.
LOSSES = {
    "harmonic": "fused harmonic",
    "softmax": "fused softmax",
    "F.cross_entropy": "F.cross_entropy(x @ W.T)",
    "F.cross_entropy, compiled": "F.cross_entropy(x @ W.T), compiled",
    **{name: name for name in ("F.linear_cross_entropy", "Liger", "Apple CCE", "quack", "dense harmonic")},
}
MICRO_BATCH = 32  # of `train`, and of the goals
MICRO_BATCHES = (MICRO_BATCH, 16, 64, 8)  # the most important first
TRAIN_STEPS = 60
ENERGY_SECONDS = 3.0
MARGIN = 12  # seconds for imports before `main` begins, and for the end


@dataclass(frozen=True)
class Job:
    """The task of a part's process. `save` replaces the part's result; `deadline` is of time.monotonic."""

    device: str
    deadline: float
    work: Path
    save: Callable[[dict[str, Any]], None]

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def bf16(self) -> bool:
        """Whether the device computes in bf16; otherwise float32 is measured."""
        supported = getattr(torch.get_device_module(self.device), "is_bf16_supported", None)
        return supported is not None and supported(including_emulation=False)

    def options(self, parser: cli.Parser, always: str, full: str, tiny: str) -> argparse.Namespace:
        """Options of another benchmark for this device: `always`, and `full` on a GPU or `tiny` on a CPU."""
        return parser.parse_args(f"{tiny if self.tiny else full} {always} --device {self.device}".split())


# --------------------------------------------------------------------------------------------------------------
# The parts


def head(job: Job) -> None:
    """Losses in one process, in turn. `extra`: peak memory without the returned gradients."""
    positions, dim, rows = (256, 32, 512) if job.tiny else (32768, 768, 50304)
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    settings = head_loss.Settings(positions, dim, rows, dtype, job.device, torch.get_num_threads())
    operands = {harmonic: head_loss.problem(settings, harmonic) for harmonic in (True, False)}
    gradients = (positions + rows) * dim * dtype.itemsize
    exact, variants, losses = {}, head_loss.all_variants(settings), {}
    found: dict[str, dict[str, Any]] = {}
    result = {"shape": [positions, dim, rows], "dtype": str(dtype), "losses": found, "skipped": {}}
    for name, variant in LOSSES.items():
        loss, harmonic = variants[variant], head_loss.is_harmonic(variant)
        if job.tiny and "compiled" in name:
            loss = "compiling takes longer than all other parts on a CPU"
        elif job.left < 15:
            loss = "no time is left"
        if isinstance(loss, str):
            result["skipped"][name] = loss
            continue
        try:
            head_loss.differentiate(loss, operands[harmonic])  # kernels are compiled
            extra = None if job.tiny else head_loss.peak_memory(loss, operands[harmonic]) - gradients
            if harmonic not in exact:
                dense = head_loss.dense_of(loss, settings, harmonic)
                exact[harmonic] = head_loss.truth(dense, settings, operands[harmonic])
            errors = head_loss.measure_errors(loss, settings, operands[harmonic], exact[harmonic])
            losses[variant] = loss
            found[name] = {"extra_bytes": extra, "errors": errors}
        except Exception as error:  # some other library's, or memory is short
            result["skipped"][name] = one_line(error)
            empty_cache(job.device)
        job.save(result)
    times = head_loss.measure_times(losses, operands, 2 if job.tiny else 10, job.device)
    for name, row in found.items():
        own = times[LOSSES[name]]
        row["ms"] = 1000 * statistics.median(own)
        for ours in ("harmonic", "softmax"):
            if ours in found:
                pairs = zip(times[LOSSES[ours]], own, strict=True)
                row[f"{ours} / this"] = statistics.median(a / b for a, b in pairs)
    job.save(result)


def step(job: Job) -> None:
    full = "--layers 12 --heads 12 --dim 768 --seq-len 1024 --vocab 50257 --rounds 12 --compile"
    tiny = "--layers 1 --heads 2 --dim 16 --seq-len 8 --vocab 50 --rounds 2"
    precision = "bf16" if job.bf16 else "fp32"
    options = job.options(train_step.parser(), f"--exponent 2*sqrt_dim --precision {precision}", full, tiny)
    result: dict[str, Any] = {"precision": options.precision, "micro_batches": {}, "skipped": {}}
    longest = 0.0
    for micro_batch in MICRO_BATCHES:
        if job.left < 1.1 * longest + 5:
            result["skipped"][f"micro-batch {micro_batch}"] = "no time is left"
            continue
        begin = time.monotonic()
        options.micro_batch = micro_batch
        try:
            result["micro_batches"][str(micro_batch)] = measured_step(options)
        except Exception as error:
            result["skipped"][f"micro-batch {micro_batch}"] = one_line(error)
        torch.compiler.reset()  # otherwise the next size is compiled with dynamic shapes
        empty_cache(job.device)
        longest = max(longest, time.monotonic() - begin)
        job.save(result)


def measured_step(options: argparse.Namespace) -> dict[str, Any]:
    times, configs = train_step.measure(options), train_step.configs_of(options)
    rates = {name: options.micro_batch * options.seq_len / statistics.median(own) for name, own in times.items()}
    models = {
        name: {"tokens_per_second": rate, "mfu": train_step.mfu(configs[name], rate, options)}
        for name, rate in rates.items()
    }
    return models | {f"harmonic / {name}": train_step.ratio(times, name) for name in ("softmax", "plain")}


def train(job: Job) -> None:
    """`warm_up` is the time from the start of the process to the end of the first step."""
    data, steps = job.work / "data", 6 if job.tiny else TRAIN_STEPS
    batch, seq_len, vocab = (2, 8, 50) if job.tiny else (MICRO_BATCH, 1024, 50257)
    write_data(data, vocab, {"train": (steps + 1) * batch * seq_len, "val": 2 * batch * seq_len + 1})
    settings = [
        f"--config={ROOT / 'configs' / 'gpt2_small_harmonic.toml'}", f"--runs_dir={job.work}", "--name=train",
        f"--data.path={data}",
        f"--data.seq_len={seq_len}", f"--train.steps={steps}", f"--train.global_batch={batch}",
        f"--train.micro_batch={batch}", "--optim.warmup_steps=1", f"--eval.every={steps}",
        f"--eval.micro_batch={batch}", "--eval.diagnostic_windows=1", f"--checkpoint.every={steps}",
        f"--log.every={2 if job.tiny else 10}", "--log.trackers=[]", f"--train.compile={str(not job.tiny).lower()}",
    ]  # fmt: skip
    if job.tiny:
        settings += ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16"]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if job.tiny else {"CUDA_VISIBLE_DEVICES": first_gpu()})
    began = time.time()
    done = subprocess.run(
        [sys.executable, "train.py", *settings], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"train.py ended with exit code {done.returncode}: {done.stderr.strip()[-250:]}")
    logged = records(job.work / "train", "train")
    steady = [record for record in logged if record["step"] > steps // 3]
    result: dict[str, Any] = {
        "steps": logged[-1]["step"],
        "tokens_per_step": batch * seq_len,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steady),
        "mfu": statistics.median(record["mfu"] for record in steady) if "mfu" in steady[-1] else None,
        "warm_up": logged[0]["time"] - began,
        "whole": time.time() - began,
        "memory_gib": logged[-1]["memory_gib"],
        "planned_gib": None,
        "loss": [logged[0]["loss"], logged[-1]["loss"]],
    }
    job.save(result)
    plan = [sys.executable, "-m", "hgpt.plan", "--device", device_name(torch.device(job.device)), *settings]
    planned = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    match = re.search(r"^ +total +([0-9.]+)", planned, re.MULTILINE)
    job.save(result | {"planned_gib": None if match is None else float(match[1])})


def write_data(folder: Path, vocab: int, tokens: dict[str, int]) -> None:
    """A data folder of random tokens: split → their number."""
    folder.mkdir()
    splits, random = {}, np.random.RandomState(0)
    for split, count in tokens.items():
        with ShardWriter(folder, split, dtype=token_dtype(vocab)) as writer:
            writer.write(random.randint(vocab, size=count))
            splits[split] = SplitMeta(tokens=count, documents=1, bytes=count, shards=writer.close())
    write_meta(
        folder,
        DataMeta(tokenizer="none", vocab_size=vocab, end_of_text=vocab - 1, splits=splits, source="random tokens"),
    )


def tests(job: Job) -> None:
    """Outcomes by test; on a CPU the tests of test_gpu.py that also run there."""
    import pytest

    outcomes: dict[str, Any] = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = report.longrepr[2] if report.skipped else crash.message if crash else str(report.longrepr)
                outcomes[report.nodeid] = {
                    "outcome": report.outcome,
                    "seconds": report.duration,
                    "reason": None if report.passed else " ".join(reason.split())[:300],
                }
                job.save({"tests": outcomes})

    # Other test files may need missing packages.
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    chosen = ["-m", "not gpu and not slow", str(ROOT / "tests" / "test_gpu.py")] if job.tiny else ["-m", "gpu", *files]
    code = pytest.main(["-v", "--tb=short", "-p", "no:cacheprovider", *chosen], plugins=[Recorder()])
    if code != pytest.ExitCode.OK:
        failed = sum(entry["outcome"] == "failed" for entry in outcomes.values())
        raise RuntimeError(f"pytest ended with exit code {int(code)}, {failed} of {len(outcomes)} tests failed")


def generate(job: Job) -> None:
    tiny = "--layers 1 --heads 2 --dim 16 --vocab 50 --prompt 4 --new-tokens 6 --batch 1 2 --rounds 1"
    dtype = "bfloat16" if job.bf16 else "float32"
    options = job.options(sampling.parser(), f"--uncached-batch --dtype {dtype}", "--batch 1 32 --rounds 3", tiny)
    rows = []
    for row in sampling.measure(options):
        rows.append({"head": row.head, "batch": row.batch, "tokens_per_second": row.cached, "share_of_head": row.share})
        job.save({"rows": rows})


def energy(job: Job) -> None:
    """Under matrix products: the card's own counter (NVML), and `hgpt.run.energy` with codecarbon."""
    size = 256 if job.tiny else 8192
    a = torch.randn(size, size, device=job.device, dtype=torch.bfloat16 if job.bf16 else torch.float32)
    result: dict[str, Any] = {"skipped": {}}
    meter = EnergyMeter("USA") if find_spec("codecarbon") else None
    counter = nvml_counter(job, result["skipped"])
    before, begin, products = counter and counter(), time.monotonic(), 0
    while time.monotonic() < begin + (0.2 if job.tiny else ENERGY_SECONDS):
        for _ in range(20):
            a @ a
        head_loss.synchronize(job.device)
        products += 20
    taken = time.monotonic() - begin
    result |= {"seconds": taken, "tflops": 2 * size**3 * products / taken / 1e12}
    if counter:
        result["nvml_joules"] = counter() - before
        result["nvml_watts"] = result["nvml_joules"] / taken
    if meter is None:
        result["skipped"]["codecarbon"] = "it is not installed"
    else:
        reading = meter.read()
        meter.stop()
        if isinstance(reading, Reading):
            result["codecarbon_kwh"] = {"cpu": reading.cpu_kwh, "gpu": reading.gpu_kwh, "ram": reading.ram_kwh}
            result["codecarbon_method"] = meter.method
        else:
            result["skipped"]["codecarbon"] = reading
    job.save(result)


def nvml_counter(job: Job, skipped: dict[str, str]) -> Callable[[], float] | None:
    """Joules since the driver was loaded, of the first GPU; None, and the reason in `skipped`, without a counter."""
    if job.device != "cuda":
        skipped["NVML"] = "it reads NVIDIA's GPUs"
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        by_index, by_uuid, first = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID, first_gpu()
        handle = by_index(int(first)) if first.isdigit() else by_uuid(first)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # not installed, no NVIDIA driver, or a card without a counter
        skipped["NVML"] = one_line(error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def empty_cache(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.accelerator.empty_cache()


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --------------------------------------------------------------------------------------------------------------
# Time


class Part(NamedTuple):
    """A part, the seconds that it wants, and the least that it needs; both with the start of its process."""

    run: Callable[[Job], None]
    wanted: float
    least: float


# The most valuable first. Seconds of a part on one H200, where a process compiles for 30 to 60 s.
PARTS = {
    "head": Part(head, 50, 40),
    "step": Part(step, 140, 75),
    "train": Part(train, 95, 60),
    "tests": Part(tests, 210, 40),
    "generate": Part(generate, 35, 20),
    "energy": Part(energy, 20, 10),
}


def time_limits(names: Sequence[str], seconds: float) -> dict[str, float]:
    """Limits of the parts that fit into `seconds`, in proportion to their wants; the last are left out first."""
    for count in range(len(names), 0, -1):
        whole = sum(PARTS[name].wanted for name in names[:count])
        limits = {name: seconds * PARTS[name].wanted / whole for name in names[:count]}
        if all(limits[name] >= PARTS[name].least for name in limits):
            return limits
    return {}


def run_part(name: str, device: str, limit: float, work: Path, log: Path) -> dict[str, Any]:
    """The part's record: status, reason, seconds, limit, result. A stopped part keeps its saved result."""
    result, begin = work / f"{name}.json", time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n===== {name}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            command(name, device, limit, work), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, process_group=0
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the part and its children
            process.wait()
    record = {"status": "done", "reason": None, "seconds": time.monotonic() - begin, "limit": limit, "result": {}}
    if code is None:
        record |= {"status": "stopped", "reason": f"it reached its limit of {limit:.0f} s"}
    elif code != 0:
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        record |= {"status": "failed", "reason": lines[-1].strip()[:300] if lines else f"exit code {code}"}
    if result.exists():
        record["result"] = json.loads(result.read_text())
    return record


def command(name: str, device: str, limit: float, work: Path) -> list[str]:
    own = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--out", str(work)]
    return [*own, "--run", name, "--until", str(time.monotonic() + limit)]


def run_here(name: str, device: str, deadline: float, work: Path) -> None:
    """A part, in this process."""

    def save(result: dict[str, Any]) -> None:
        write(work / f"{name}.json", json.dumps({"card": head_loss.machine_name(device), **result}))

    PARTS[name].run(Job(device, deadline, work, save))


# --------------------------------------------------------------------------------------------------------------
# Tables


def goals(results: dict[str, Any]) -> list[tuple[str, str, float | None, str]]:
    """Measure, goal, value (None: not measured) and format, of the goals in docs/performance.md."""
    losses = look_up(results, "head", "losses") or {}
    own_step = look_up(results, "step", "micro_batches", str(MICRO_BATCH)) or {}
    trained = look_up(results, "train", "tokens_per_second")
    stepped = look_up(own_step, "harmonic", "tokens_per_second")
    extra, dense = (look_up(losses, name, "extra_bytes") for name in ("harmonic", "dense harmonic"))
    rows = look_up(results, "generate", "rows") or ()
    alone = next((row for row in rows if row["head"] == "harmonic" and row["batch"] == 1), {})
    return [
        ("head: harmonic / Liger, time", "≤ 1.0", look_up(losses, "Liger", "harmonic / this"), ".3f"),
        ("head: softmax / Liger, time", "≤ 0.9", look_up(losses, "Liger", "softmax / this"), ".3f"),
        ("head: extra memory, harmonic / dense", "≤ 0.05", extra / dense if extra and dense else None, ".3f"),
        ("step: harmonic / softmax, tokens/s", "≥ 0.98", own_step.get("harmonic / softmax"), ".3f"),
        ("step: harmonic / plain, tokens/s", "≥ 1.0", own_step.get("harmonic / plain"), ".3f"),
        ("step: MFU of harmonic", "≥ 45 %", look_up(own_step, "harmonic", "mfu"), ".1%"),
        ("train.py / step, tokens/s", "≥ 0.97", trained / stepped if trained and stepped else None, ".3f"),
        ("generate: tokens/s at batch 1", "≥ 930", alone.get("tokens_per_second"), ",.0f"),
        ("generate: the head's share", "≤ 10 %", alone.get("share_of_head"), ".1%"),
    ]


def look_up(tree: Any, *path: str) -> Any:
    """tree[path[0]][path[1]]…, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def report_text(report: dict[str, Any]) -> str:
    """All tables, at most 100 columns wide."""
    versions = [f"{name} {version}" for name, version in report["versions"].items() if version != "not installed"]
    origin = f"commit {report['commit']}, code {report['code']}"
    lines = [
        *textwrap.wrap(f"{report['card']}, {', '.join(versions)}", 100),
        origin,
        f"{report['started']}, {report['minutes']:g} minutes",
    ]
    rows = [
        [name, record["status"], f"{record['seconds']:.0f}", f"{record['limit']:.0f}", record["reason"] or ""]
        for name, record in report["parts"].items()
    ]
    lines += ["", *aligned(["part", "status", "s", "limit", "reason"], rows)]
    if "goals" in report:
        rows = [[measure, goal, shown(value, form)] for measure, goal, value, form in report["goals"]]
        lines += ["", *aligned(["measure", "goal", "measured"], rows)]
    for name, record in report["parts"].items():
        result = record["result"]
        lines += ["", f"--- {name}", *TABLES[name](result)] if len(result) > 1 else []  # more than the card's name
        for what, why in result.get("skipped", {}).items():
            lines += textwrap.wrap(f"skipped: {what} ({why})", 100, subsequent_indent="    ")
    return "\n".join(lines)


def head_table(result: dict[str, Any]) -> list[str]:
    losses, rows = result["losses"], []
    dense = look_up(losses, "dense harmonic", "extra_bytes")
    for name, row in losses.items():
        extra = row["extra_bytes"]
        rows.append(
            [
                name,
                shown(row.get("ms"), ".2f"),
                shown(row.get("harmonic / this"), ".3f"),
                shown(row.get("softmax / this"), ".3f"),
                shown(None if extra is None else extra / 2**20, ",.0f"),
                shown(extra / dense if extra is not None and dense else None, ".3f"),
                " ".join(f"{error:.1e}" for error in row["errors"]),
            ]
        )
    title = f"{' x '.join(map(str, result['shape']))}, {result['dtype']}, forward + backward, errors against float64"
    header = ["loss", "ms", "harmonic /", "softmax /", "extra MiB", "/ dense", "errors: loss, dx, dw"]
    return [title, *aligned(header, rows)]


def step_table(result: dict[str, Any]) -> list[str]:
    names, rows = ("harmonic", "softmax", "plain"), []
    for micro_batch, found in sorted(result["micro_batches"].items(), key=lambda entry: int(entry[0])):
        rates = [shown(found[name]["tokens_per_second"], ",.0f") for name in names]
        shares = [shown(found[name]["mfu"], ".1%") for name in names]
        ratios = [shown(found[f"harmonic / {name}"], ".3f") for name in names[1:]]
        rows.append([micro_batch, *rates, *shares, *ratios])
    header = ["micro-batch", *names, *(f"MFU {name[0]}." for name in names), "h. / softmax", "h. / plain"]
    return [f"tokens/s, {result['precision']}", *aligned(header, rows)]


def train_table(result: dict[str, Any]) -> list[str]:
    values = [
        ("tokens/s", shown(result["tokens_per_second"], ",.0f")),
        ("MFU", shown(result["mfu"], ".1%")),
        ("tokens a step", f"{result['tokens_per_step']:,}"),
        ("seconds until the first step is done", f"{result['warm_up']:.1f}"),
        ("seconds of the process", f"{result['whole']:.1f}"),
        ("peak memory, GiB", f"{result['memory_gib']:.2f}"),
        ("hgpt.plan's estimate, GiB", shown(result["planned_gib"], ".2f")),
    ]
    return aligned([f"{result['steps']} steps", ""], [list(row) for row in values])


def tests_table(result: dict[str, Any]) -> list[str]:
    outcomes = [entry["outcome"] for entry in result["tests"].values()]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [counts]
    for name, entry in result["tests"].items():
        if entry["outcome"] != "passed":
            text = f"{entry['outcome']}: {name} ({entry['reason']})"
            lines += textwrap.wrap(text, 100, subsequent_indent="    ", max_lines=4)
    return lines


def generate_table(result: dict[str, Any]) -> list[str]:
    rows = [
        [row["head"], str(row["batch"]), f"{row['tokens_per_second']:,.1f}", f"{row['share_of_head']:.1%}"]
        for row in result["rows"]
    ]
    return aligned(["head", "batch", "tokens/s", "the head's share"], rows)


def energy_table(result: dict[str, Any]) -> list[str]:
    lines = [f"matrix products for {result['seconds']:.1f} s: {result['tflops']:,.1f} TFLOP/s"]
    if "nvml_joules" in result:
        lines.append(f"NVML's counter: {result['nvml_joules']:,.1f} J, {result['nvml_watts']:.0f} W")
    if "codecarbon_kwh" in result:
        found = ", ".join(f"{name} {value:.2e}" for name, value in result["codecarbon_kwh"].items())
        lines += textwrap.wrap(f"codecarbon, kWh: {found}; {result['codecarbon_method']}", 100)
    return lines


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "head": head_table,
    "step": step_table,
    "train": train_table,
    "tests": tests_table,
    "generate": generate_table,
    "energy": energy_table,
}


def aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; the last column wraps at 100 columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)][:-1]
    indent, lines = sum(widths) + 2 * len(widths), []
    for *cells, last in (header, *rows):
        start = "".join(f"{cell.ljust(width)}  " for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(last, max(20, 100 - indent)) or [""]
        lines += [(start + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    return lines


# --------------------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    with whole_file(file) as path:
        path.write_text(text + "\n", encoding="utf-8")


def new_report(options: argparse.Namespace, device: str) -> dict[str, Any]:
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() if git.returncode == 0 else "unknown"
    except OSError:
        commit = "unknown"
    toolkit = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return {
        "card": "unknown",
        "device": device,
        "minutes": options.minutes,
        "started": datetime.now().isoformat(timespec="seconds"),
        "commit": commit,
        "code": code_fingerprint(),
        "versions": {"Python": sys.version.split()[0], **installed_versions(*PACKAGES)}
        | {name: version for name, version in toolkit.items() if version is not None},
        "parts": {},
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole ends within them (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.txt and log.txt")
    parser.add_argument("--device", help="cuda, xpu, or cpu with tiny sizes (default: a GPU)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    # A part's process: its name, and its deadline on the clock of time.monotonic, which all processes share.
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = [name for name in PARTS if name in options.parts]
    return options


def left_out(names: Sequence[str], seconds: float) -> Iterator[str]:
    """Lines about the parts that do not fit into `seconds`; UserError if none does."""
    limits = time_limits(names, seconds)
    least = min(PARTS[name].least for name in names)
    if not limits and seconds < least:
        raise UserError(
            f"--minutes is too few for any part: {', '.join(names)} need at least {least:g} s, and "
            f"{max(seconds, 0):.0f} s are left after the start. Give more minutes; 8 are enough for all parts"
        )
    for name in names:
        if name not in limits:
            yield f"left out unless an earlier part ends early: {name}, which needs {PARTS[name].least} s of its own"


def main(arguments: Sequence[str]) -> str | None:
    begin = time.monotonic()
    options = parse(arguments)
    device = choose_device(options.device).type
    if options.run is not None:
        run_here(options.run, device, options.until - 3, options.out)
        return None
    if device == "cpu" and options.device is None:
        raise UserError("there is no GPU here: --device cpu runs every part with tiny sizes")
    deadline = begin + 60 * options.minutes - MARGIN
    for line in left_out(options.parts, deadline - time.monotonic()):
        print(line, flush=True)
    if (options.out / "gpu.json").exists():
        raise UserError(f"--out {options.out} has the gpu.json of another call: name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is stopped too
    report = new_report(options, device)
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(options.parts):
            seconds = deadline - time.monotonic()
            limit = time_limits(options.parts[number:], seconds).get(name)
            if limit is None:
                reason = f"{max(seconds, 0):.0f} s are left, and it needs {PARTS[name].least}"
                record = {"status": "left out", "reason": reason, "seconds": 0.0, "limit": 0.0, "result": {}}
            else:
                record = run_part(name, device, limit, Path(work), options.out / "log.txt")
            report["parts"][name] = record
            report["card"] = record["result"].get("card", report["card"])
            report["goals"] = goals({name: part["result"] for name, part in report["parts"].items()})
            write(options.out / "gpu.json", json.dumps(report, indent=1))
            write(options.out / "gpu.txt", report_text(report))
            print(f"{name}: {record['status']} after {record['seconds']:.0f} s {record['reason'] or ''}", flush=True)
    return "\n" + report_text(report)


if __name__ == "__main__":
    sys.exit(cli.run(main))
