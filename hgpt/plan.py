"""Plan a run before it is started: parameters, memory per GPU, tokens, FLOPs and time.

    python -m hgpt.plan --config configs/gpt2_small_harmonic.toml --gpus 8 [--section.key value ...]
    python -m hgpt.plan --config configs/quickstart.toml --device cpu
    python -m hgpt.plan --gpus 8 --table configs/gpt2_*_harmonic.toml

All other arguments are train.py's.

Nothing is trained, and no GPU is needed. The parameters are counted on a model without memory for its weights. Memory
is computed by the formulas below: bytes on one GPU at the peak of a training step.

    engine          parameters   gradients   optimiser   buckets and gathered weights
    ddp             4 P          4 P         8 P         - (its buckets are the gradients)
    zero1           c P          6 P         12 P/W      4 min(P, R)
    zero2           c P          4 P/W       12 P/W      c R + 4 min(P, R)
    zero2_offload   c P          -           -           c R + 4 min(P, R), and 16 P/W of host memory
    zero3           c P/W        4 P/W       12 P/W      4 R + c min(P, 10⁹)
    fsdp2           4 P/W        4 P/W       8 P/W       c (2 E + 3 B)

P: parameters; B: those of one block; E: those outside the blocks. W: processes (world size). R = 5·10⁸: DeepSpeed's
reduce bucket. c: bytes of an operand of a matrix product, 2 in bf16 and 4 in fp32. AdamW keeps two float32 numbers per
parameter; Muon (ddp only) keeps one for the matrices of the blocks. ZeRO keeps float32 master weights. ZeRO-1 also
accumulates float32 gradients besides the bf16 ones. In fp32, ZeRO-1 has 4 P of gradients, and ZeRO-2 has no
4 min(P, R), a float32 copy of its bucket. ZeRO-2 and 3 allocate whole buckets, even for a small model.

    activations            L N (D (2 r + 14 c) + 4 H + 16) + N (D r + 16)
      with checkpointing   L N D r + N (D r + 16)
      with dropout         1 byte per element of a mask: N D after the embedding, 2 N D in each block
      ddp in bf16          2 bytes per weight of the blocks' matrices: the copies that autocast makes
    a block's backward     N D (3 r + 4 c); with checkpointing also the recomputed activations of the block

L: blocks. N = micro_batch · seq_len: tokens. D: width. H: heads. r: bytes of an element of the residual stream, 4 with
autocast (ddp, fsdp2), otherwise c. A block keeps the inputs of its two norms (r each), their outputs, q, k, v
and the output of attention (c each), input and output of the activation function (4 c each), and for each token the
statistics of the norms and the log-sum-exp of attention. An activation function other than gelu and gelu_pytorch_tanh
may keep more; torch.compile usually keeps less.

`head_memory` has the formula of the head's loss. All activations exist while the loss is computed. The backward pass of
the last block comes later, so the peak has the larger of the two. Gradients always exist, because they accumulate over
micro-batches. Not counted: the CUDA context, kernel workspaces and fragmentation, often 1 to 3 GiB together.

The tests compare activations, the loss and the row of ddp with the code's allocations, without a GPU. The formulas for
ZeRO's parameters, gradients and optimiser state were within 0.2 % of two CPU processes (DeepSpeed 0.19.8). Those for
buckets, gathered weights and fsdp2 (torch 2.13) follow the libraries' source code and were not measured.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import nn

from hgpt.cli import Parser, aligned, at_least_1, checked, markdown, run
from hgpt.data.batches import TrainingBatches, accumulation_steps
from hgpt.data.shards import TokenShards
from hgpt.hardware import known_device, peak_flops
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.distances import Distance, make_distance, memory_of
from hgpt.model.harmonized import HarmonizedConfig, model_class
from hgpt.model.loss import chunk_positions
from hgpt.run.config import RunConfig
from hgpt.run.optim import DISTILLING
from hgpt.run.report import flops_per_token
from hgpt.run.settings import load_run_config
from hgpt.source import shape_of

ENGINES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2")
GPT2_VOCAB_SIZE = 50257
GIB = 2**30

# DeepSpeed's defaults of zero_optimization.reduce_bucket_size and stage3_max_live_parameters, in elements.
_REDUCE_BUCKET, _MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000

# Bytes/s of a distance in blocks on a CPU; the blocks stay in the caches. Measured in GB/s on two idle cores of an AMD
# EPYC (Zen 3) with `python -m benchmarks.head_loss --shape 64x768x50304 --distances ...`: 22 (chebyshev), 43 (hamming),
# 58 (bray_curtis), 61 (manhattan), 72 (canberra), 81 (minkowski). A second busy process reduces it to a quarter.
_CPU_BANDWIDTH = 60e9
_H100_BANDWIDTH = 3350e9
_DAY = 86400


# --------------------------------------------------------------------------------------------------------------
# Parameters and bytes


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters. `head` is 0 if the centres are the token embedding. `matrices`, the weights of the linear
    layers in the blocks, are part of `blocks`."""

    token_embedding: int
    positions: int
    blocks: int
    final_norm: int
    head: int
    matrices: int

    @property
    def total(self) -> int:
        return self.token_embedding + self.positions + self.blocks + self.final_norm + self.head


def count_parameters(config: HGPTConfig) -> Parameters:
    """Count the parameters of the model that `config` describes, built on the meta device."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        model = model_class(config)(config)
    trunk = model.transformer
    tied = model.lm_head.weight is trunk.wte.weight
    backbone = isinstance(config, HarmonizedConfig)
    final_norm = size(trunk.ln_f) + (size(trunk.norm) if backbone else 0)
    rest = size(trunk) - size(trunk.wte) - size(trunk.h) - final_norm  # of a backbone
    counts = Parameters(
        token_embedding=size(trunk.wte),
        positions=rest if backbone else size(trunk.wpe),
        blocks=size(trunk.h),
        final_norm=final_norm,
        head=size(model.lm_head) - (trunk.wte.weight.numel() if tied else 0),
        matrices=sum(module.weight.numel() for module in trunk.h.modules() if isinstance(module, nn.Linear)),
    )
    assert counts.total == model.num_parameters(), "a part of the model is not counted"
    return counts


class Precision(NamedTuple):
    """The dtype of matrix products and the dtype of the residual stream."""

    compute: torch.dtype
    residual: torch.dtype

    @property
    def autocast(self) -> bool:
        return self.compute != self.residual


def precision_of(engine: str, precision: str) -> Precision:
    """The dtypes under an engine on a GPU. `precision`: a value of train.precision; "auto" means bf16 on a GPU."""
    if precision == "fp32":
        return Precision(torch.float32, torch.float32)
    return Precision(torch.bfloat16, torch.bfloat16 if engine.startswith("zero") else torch.float32)


class Activations(NamedTuple):
    """Bytes that the forward pass keeps, and additional bytes of the backward pass of one block."""

    kept: int
    block: int


def activation_memory(config: HGPTConfig, tokens: int, precision: Precision, *, checkpointing: bool) -> Activations:
    """Activations of the trunk for a micro-batch of `tokens`, by the formula of this module.

    Without the head, and without the copies of weights that autocast makes.
    """
    c, r = precision.compute.itemsize, precision.residual.itemsize
    width, layers, mask = config.n_embd, config.n_layer, 1 if config.dropout > 0 else 0
    block = tokens * (width * (2 * r + 14 * c + 2 * mask) + 4 * config.n_head + 16)
    block_input = tokens * width * r
    gradients = tokens * width * (3 * r + 4 * c)  # of the residual stream and of the inner layer of the MLP
    ends = tokens * (width * (r + mask) + 16)  # input and statistics of the final norm, token indices
    if checkpointing:
        return Activations(layers * block_input + ends, block - block_input + gradients)
    return Activations(layers * block + ends, gradients)


class HeadMemory(NamedTuple):
    """Bytes at the peak of the head's loss.

    `operands`: operands and their gradients. `chunk`: one chunk of `chunk_positions` positions, which is None for a
    distance in blocks. `dense`: the whole peak of a head that computes all logits at once.
    """

    operands: int
    chunk: int
    dense: int
    chunk_positions: int | None

    @property
    def peak(self) -> int:
        return self.operands + self.chunk


def head_memory(config: HGPTConfig, tokens: int, precision: Precision, device: str = "cuda") -> HeadMemory:
    """Memory of the head's loss on a GPU (`hgpt.model.row_kernels`) for N = `tokens` positions and V rows of w.

    On a CPU the chunks are smaller, and the formula is a bound.

    operands: x and its gradient, (N, D); under autocast x in both dtypes and a bf16 copy of w; the gradient of w in
        float32, (V, D); five numbers a position.
    chunk: C = `loss.chunk_positions` positions · V · (4 bytes of products and 2 or 4 of G); harmonic: C · D · 4 of G w,
        and sums of G over 256 classes and over 32 positions, in bf16 also of what rounding adds; with log-weights sums
        of p − q over 32 positions.
    dense: the operands, and N · V · 17 bytes in the backward pass of `harmax.harmonic_loss`, 12 in that of softmax.

    A distance that transforms its operands adds x′, w′ and their gradients in float32. A distance in
    blocks needs its operands and their gradients in float32, and `distances.memory_of` in place of the chunk.
    """
    rows, width, metric = config.padded_vocab_size, config.n_embd, distance_of(config)
    transformed = (tokens + rows) * width * 8 if metric is not None and metric.transforms else 0
    if metric is not None and metric.power is None:
        operands = (tokens + rows) * width * 8 + transformed
        return HeadMemory(operands, memory_of(device), operands + tokens * rows * 17, None)
    c, harmonic = precision.compute.itemsize, config.head == "harmonic"
    operands = tokens * width * 2 * c + rows * width * 4 + 20 * tokens + transformed
    if precision.autocast:
        operands += tokens * width * precision.residual.itemsize + rows * width * c
    positions = min(tokens, chunk_positions(rows, precision.compute, device))
    chunk = positions * rows * (4 + c)
    tiles_down, tiles_across = -(-positions // 32), -(-rows // 256)
    if harmonic:
        planes = 2 if c == 2 else 1
        chunk += positions * width * 4 + planes * 4 * (tiles_down * rows + tiles_across * positions)
    if config.radius == "learned":
        chunk += tiles_down * rows * 4
    dense = operands + tokens * rows * (17 if harmonic else 12)
    return HeadMemory(operands, chunk, dense, positions)


def distance_of(config: HGPTConfig) -> Distance | None:
    """The distance of a harmonic head on the meta device; None for softmax."""
    if config.head != "harmonic":
        return None
    with torch.device("meta"):
        return make_distance(config.distance, config.n_embd, **config.distance_options)


def distance_seconds(config: HGPTConfig, tokens: float, device: str) -> float:
    """Seconds that one device takes for the loss and gradients of a distance in blocks; 0 for any other distance.

        tokens · V · D · traffic · 4 bytes / bandwidth

    `Distance.traffic` is how often the operations of the blocks read or write an element. The time on a GPU is an
    estimate that assumes each operation is bound by memory bandwidth; caches or a fused kernel may be faster. A GPU of
    unknown bandwidth counts as an H100. For "cpu" the bandwidth was measured on two cores (`_CPU_BANDWIDTH`).
    """
    metric = distance_of(config)
    if metric is None or metric.power is not None:
        return 0.0
    known = known_device(device)
    bandwidth = _CPU_BANDWIDTH if device.lower() == "cpu" else (known and known.bandwidth) or _H100_BANDWIDTH
    return tokens * config.vocab_size * config.n_embd * metric.traffic * 4 / bandwidth


# --------------------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The machines: `gpus` of the kind `device` on each of `nodes`; the engine; the expected share of the peak FLOP/s
    (`mfu`); GiB of a GPU (`memory`; None: as known of `device`)."""

    gpus: int = 1
    nodes: int = 1
    engine: str = "ddp"
    mfu: float = 0.4
    device: str = "NVIDIA H100"
    memory: float | None = None

    @property
    def on_cpu(self) -> bool:
        return self.device.lower() == "cpu"

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def capacity(self) -> float | None:
        """Memory of a GPU in bytes; None if unknown."""
        if self.memory is not None:
            return self.memory * GIB
        known = known_device(self.device)
        return None if known is None or known.memory_gib is None else float(known.memory_gib * GIB)


class Memory(NamedTuple):
    """Bytes per GPU at the peak of a training step; `host` is host memory per process."""

    parameters: int
    gradients: int
    optimiser: int
    buckets: int
    host: int
    activations: int
    block: int
    head: int

    @property
    def transient(self) -> int:
        """The larger of the head's loss and a block's backward pass, which do not overlap."""
        return max(self.head, self.block)

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimiser + self.buckets + self.activations + self.transient


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on given machines, with its model and the size of its data."""

    run: RunConfig
    launch: Launch
    config: HGPTConfig
    parameters: Parameters
    accumulation: int
    training_tokens: int | None
    notes: tuple[str, ...]

    @property
    def micro_tokens(self) -> int:
        return self.run.train.micro_batch * self.run.data.seq_len

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.run.train.steps * self.run.train.global_batch * self.run.data.seq_len

    @property
    def distance_seconds(self) -> float:
        """Additional seconds of the run for a distance in blocks."""
        return distance_seconds(self.config, self.tokens, self.launch.device) / self.launch.processes

    def memory(self, engine: str, *, checkpointing: bool | None = None) -> Memory:
        """Memory under one of `ENGINES`, by this module's formulas. `checkpointing`: None takes the run's setting."""
        train = self.run.train
        precision = precision_of(engine, train.precision)
        if checkpointing is None:
            checkpointing = train.activation_checkpointing
        activations = activation_memory(self.config, self.micro_tokens, precision, checkpointing=checkpointing)
        copies = 2 * self.parameters.matrices if precision.autocast and engine == "ddp" else 0
        head = self.head_memory(engine).peak
        static = self._static_memory(engine, precision.compute.itemsize)
        return Memory(*static, activations=activations.kept + copies, block=activations.block, head=head)

    def head_memory(self, engine: str) -> HeadMemory:
        precision = precision_of(engine, self.run.train.precision)
        return head_memory(self.config, self.micro_tokens, precision, "cpu" if self.launch.on_cpu else "cuda")

    def _static_memory(self, engine: str, c: int) -> tuple[int, int, int, int, int]:
        """Bytes of parameters, gradients, optimiser state, buckets and host memory, by the table of this module."""
        total, blocks = self.parameters.total, self.parameters.blocks
        share = -(-total // self.launch.processes)
        bucket = min(total, _REDUCE_BUCKET)
        reduced = c * _REDUCE_BUCKET + (4 * bucket if c != 4 else 0)
        muon = 4 * self.parameters.matrices if self.run.optim.algorithm == "muon" else 0
        gathered = c * (2 * (total - blocks) + 3 * blocks // self.config.n_layer)
        table = {
            "ddp": (4 * total, 4 * total, 8 * total - muon, 0, 0),
            "zero1": (c * total, (4 if c == 4 else 6) * total, 12 * share, 4 * bucket, 0),
            "zero2": (c * total, 4 * share, 12 * share, reduced, 0),
            "zero2_offload": (c * total, 0, 0, reduced, 16 * share),
            "zero3": (c * share, 4 * share, 12 * share, 4 * _REDUCE_BUCKET + c * min(total, _MAX_LIVE_PARAMETERS), 0),
            "fsdp2": (4 * share, 4 * share, 8 * share, gathered, 0),
        }
        return table[engine]


def make_plan(run: RunConfig, launch: Launch) -> Plan:
    """The plan of a run; without the data folder with a note, and GPT-2's vocabulary unless data.vocab_size is set.

    On a CPU train.precision = "auto" means fp32.

    Raises UserError where train.py would: a global_batch that cannot be reached, data that are damaged or too short, a
    model that cannot be built.
    """
    if launch.on_cpu and run.train.precision == "auto":
        run = replace(run, train=replace(run.train, precision="fp32"))
    data, train = run.data, run.train
    notes, shards = [], None
    vocab_size, end_of_text = data.vocab_size or GPT2_VOCAB_SIZE, None
    if os.path.exists(data.path):
        shards = TokenShards.open(data.path, "train", data.vocab_size)
        vocab_size, end_of_text = shards.vocab_size, shards.end_of_text
        accumulation = TrainingBatches(
            shards,
            seq_len=data.seq_len,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            world_size=launch.processes,
            rank=0,
            seed=train.seed,
        ).accumulation
    else:
        origin = "as stated" if data.vocab_size else "GPT-2's; state another one with --vocab N"
        notes.append(f"{data.path} does not exist (yet): vocabulary of {vocab_size:,} ({origin}), epochs unknown")
        accumulation = accumulation_steps(train.global_batch, train.micro_batch, launch.processes)
    config = run.model.to_hf(vocab_size=vocab_size, seq_len=data.seq_len, end_of_text=end_of_text)
    if run.model.backbone is not None:
        notes.append("activations are estimated by those of a GPT-2 block of the same width")
    if train.distill_from is not None:
        logits = DISTILLING * train.micro_batch * data.seq_len * vocab_size
        notes.append(f"train.distill_from takes {_gib(logits)} GiB for logits, and the teacher; neither is counted")
    return Plan(
        run=run,
        launch=launch,
        config=config,
        parameters=count_parameters(config),
        accumulation=accumulation,
        training_tokens=None if shards is None else len(shards),
        notes=tuple(notes),
    )


def warnings(plan: Plan) -> list[str]:
    """Settings that will fail or hardly fit, each with a way out."""
    found = []
    run, launch = plan.run, plan.launch
    need, capacity = plan.memory(launch.engine).total, launch.capacity
    if capacity is None and not launch.on_cpu:
        found.append(f"the memory of {launch.device!r} is not known: give it with --memory GIB to have it checked")
    elif capacity is not None and need > 0.9 * capacity:
        engines = () if launch.on_cpu else ENGINES
        fits = [engine for engine in engines if plan.memory(engine).total <= 0.9 * capacity]
        ways = [f"--engine {', '.join(fits)}"] if fits else []
        smaller = plan.memory(launch.engine, checkpointing=True).total
        if not run.train.activation_checkpointing and smaller <= 0.9 * capacity:
            ways.append(f"train.activation_checkpointing = true ({_gib(smaller)} GiB)")
        if run.train.micro_batch > 1:
            ways.append("a smaller train.micro_batch")
        state = "does not fit" if need > capacity else "is tight: CUDA and fragmentation need memory too"
        found.append(
            f"{_gib(need)} GiB in the {_gib(capacity)} GiB of {launch.device} {state}"
            + (f"; what helps: {' or '.join(ways)}" if ways else "")
        )
    if plan.distance_seconds > _DAY:
        found.append(
            f'model.head.distance = "{plan.config.distance}" visits every coordinate of every pair of a position and a '
            f"centre: about {_duration(plan.distance_seconds)} for {_short(plan.tokens)} tokens and "
            f"{plan.config.vocab_size:,} centres, estimated from the memory bandwidth. What helps: cosine, mahalanobis "
            "or euclidean, which are matrix products, a smaller vocabulary, or fewer tokens"
        )
    if launch.engine != "ddp" and run.optim.algorithm == "muon":
        found.append(f'{launch.engine} does not work with optim.algorithm = "muon": set it to "adamw"')
    if launch.engine == "zero3" and run.train.compile:
        found.append("zero3 does not work with train.compile = true: set it to false")
    return found


# --------------------------------------------------------------------------------------------------------------
# Printing


def report(plan: Plan) -> str:
    """The plan as text."""
    sections = [
        _introduction(plan),
        _parameter_lines(plan),
        _memory_lines(plan),
        [] if plan.launch.on_cpu else _engine_lines(plan),
        _training_lines(plan),
        [f"warning: {line}" for line in warnings(plan)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _introduction(plan: Plan) -> list[str]:
    launch, train, config = plan.launch, plan.run.train, plan.config
    precision = "fp32" if train.precision == "fp32" else "bf16"
    nodes = f"{launch.nodes} nodes of {launch.gpus}" if launch.nodes > 1 else f"{launch.gpus}"
    return [
        f"{plan.run.name}: {config.head_in_words}, "
        f"vocabulary {config.vocab_size:,} in {config.padded_vocab_size:,} rows",
        f"on {nodes} x {launch.device}, {launch.engine}, {precision}, activation checkpointing "
        f"{_on(train.activation_checkpointing)}",
        *(f"note: {note}" for note in plan.notes),
    ]


def _parameter_lines(plan: Plan) -> list[str]:
    counts = plan.parameters
    tied = counts.head == 0
    rows = [
        ("parameters", counts.total, ""),
        ("  token embedding", counts.token_embedding, "also the head's centres" if tied else ""),
        ("  positions", counts.positions, ""),  # and other parts of a backbone outside its blocks
        (f"  {plan.config.n_layer} blocks", counts.blocks, ""),
        ("  final norm", counts.final_norm, ""),
        ("  head", counts.head, "the token embedding" if tied else ""),
    ]
    return _with_remarks([(title, f"{count:,}", remark) for title, count, remark in rows])


def _memory_lines(plan: Plan) -> list[str]:
    run, engine = plan.run, plan.launch.engine
    memory, head = plan.memory(engine), plan.head_memory(engine)
    off, on = (plan.memory(engine, checkpointing=value) for value in (False, True))
    positions = "the blocks" if head.chunk_positions is None else f"a chunk of {head.chunk_positions:,} positions"
    batch = f"for {run.train.micro_batch} x {run.data.seq_len:,} tokens, checkpointing "
    rows = [
        ("  parameters", memory.parameters, ""),
        ("  gradients", memory.gradients, ""),
        ("  optimiser state", memory.optimiser, "in host memory" if memory.host else ""),
        ("  buckets, gathered weights", memory.buckets, ""),
        ("  activations", memory.activations, batch + _on(run.train.activation_checkpointing)),
        ("    checkpointing off", off.activations, f"and {_gib(off.block)} in the backward pass of a block"),
        ("    checkpointing on", on.activations, f"and {_gib(on.block)} in the backward pass of a block"),
        ("  head's loss", memory.head, f"{_gib(head.chunk)} for {positions}; a dense head: {_gib(head.dense)}"),
        ("  total", memory.total, "with a block's backward pass instead of the loss" * (memory.block > memory.head)),
    ]
    if memory.host:
        rows.append(("host memory per process", memory.host, "gradients, master weights and optimiser state"))
    lines = [(title, _gib(size), remark) for title, size, remark in rows]
    each = "process on a CPU" if plan.launch.on_cpu else f"GPU, {engine}"
    return _with_remarks([(f"memory per {each}", "GiB", ""), *lines])


def _engine_lines(plan: Plan) -> list[str]:
    titles = ("engine", "parameters", "gradients", "optimiser", "buckets", "activations", "head/block", "total", "host")
    rows: list[tuple[str, ...]] = [titles]
    for engine in ENGINES:
        m = plan.memory(engine)
        values = (m.parameters, m.gradients, m.optimiser, m.buckets, m.activations, m.transient, m.total, m.host)
        rows.append((engine, *map(_gib, values)))
    title = f"GiB per GPU under each engine, {plan.launch.processes} processes"
    return [title, *(f"  {line}" for line in aligned(rows))]


def _training_lines(plan: Plan) -> list[str]:
    run, launch, tokens = plan.run, plan.launch, plan.tokens
    step_tokens = run.train.global_batch * run.data.seq_len
    flops = flops_per_token(plan.config, run.data.seq_len)
    peak, epochs = peak_flops(launch.device), ""
    if plan.training_tokens is not None:
        epochs = f", {tokens / plan.training_tokens:.2f} epochs of {plan.training_tokens:,}"
    if launch.on_cpu:
        time = "not estimated on a CPU: train.py prints the time left with each log line"
    elif run.train.precision == "fp32":
        time = "not estimated: peaks are known for bf16, and train.precision is fp32"
    elif peak is None:
        time = f"not estimated: the bf16 peak of {launch.device!r} is not known"
    else:
        rate = launch.mfu * peak * launch.processes / flops
        time = (
            "not estimated: the FLOPs alone would take less than a second, and so small a model waits for the host"
            if tokens / rate < 1
            else f"{_duration(tokens / rate)} at {launch.mfu:.0%} MFU of {peak / 1e12:g} TFLOP/s a GPU: {rate:,.0f} "
            f"tokens/s, {step_tokens / rate:.3g} s a step; without evaluations and checkpoints"
        )
    lines = [
        f"tokens per step  {step_tokens:,} = {run.train.global_batch} x {run.data.seq_len:,}; accumulation "
        f"{plan.accumulation} x {run.train.micro_batch} sequences on each of {launch.processes}",
        f"steps            {run.train.steps:,}, {_short(tokens)} tokens{epochs}",
        f"FLOPs            {_short(flops)} a token, {_short(flops * step_tokens)} a step, "
        f"{_short(flops * tokens)} a run",
        f"time             {time}",
    ]
    if plan.distance_seconds:
        lines.append(
            f"distance         about {_duration(plan.distance_seconds)} more for {plan.config.distance}, which no "
            "matrix product computes"
        )
    return lines


def markdown_table(plans: Sequence[Plan]) -> str:
    """GiB per GPU of each plan under every engine, as Markdown, the smallest model first."""
    rows = [["run", "parameters", "micro-batch", "checkpointing", *ENGINES]]
    for plan in sorted(plans, key=lambda plan: plan.parameters.total):
        train = plan.run.train
        totals = [f"{plan.memory(engine).total / GIB:.1f}" for engine in ENGINES]
        model = [plan.run.name, _short(plan.parameters.total), str(train.micro_batch)]
        rows.append([*model, _on(train.activation_checkpointing), *totals])
    return markdown(rows, numbers=3 + len(ENGINES))


def _with_remarks(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Rows of a title, a number and a remark as lines."""
    lines = aligned([row[:2] for row in rows])
    return [f"{line}  {remark}".rstrip() for line, (_, _, remark) in zip(lines, rows, strict=True)]


def _on(value: bool) -> str:
    return "on" if value else "off"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _short(number: float) -> str:
    """124.4 M, 294.9 G, 2.5e+20: at most four digits, and a unit up to 10¹⁵."""
    for unit, value in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value <= number < 1e15:
            return f"{number / value:.4g} {unit}"
    return f"{number:.3g}" if number >= 1e15 else f"{number:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * _DAY:
        return f"{seconds / _DAY:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else str(timedelta(seconds=round(seconds)))


# --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> str:
    """The text that the command line asks for. Raises UserError."""
    parser = Parser("python -m hgpt.plan", "\n\n".join(str(__doc__).split("\n\n")[:3]))
    add, default = parser.add_argument, Launch()
    add("--gpus", type=at_least_1, default=default.gpus, help="GPUs on each node (default: %(default)s)")
    add("--nodes", type=at_least_1, default=default.nodes, help="number of nodes (default: %(default)s)")
    add("--engine", choices=ENGINES, default=default.engine, help="engine of the run (default: %(default)s)")
    share = checked(float, "be above 0 and at most 1", lambda mfu: 0 < mfu <= 1)
    add("--mfu", type=share, default=default.mfu, help="expected share of the peak FLOP/s (default: %(default)s)")
    add("--device", default=default.device, help='CUDA\'s name of the GPU, or "cpu" (default: %(default)s)')
    add("--vocab", type=int, metavar="N", help="tokens of the vocabulary, if the data does not exist yet")
    size = checked(float, "be more than 0 GiB", lambda gib: gib > 0)
    add("--memory", type=size, metavar="GIB", help="memory of a GPU (default: that of the device)")
    add("--table", nargs="+", metavar="FILE", help="print only a Markdown table: GiB per GPU of these configurations")
    known, settings = parser.parse_known_args(arguments)
    files = known.table
    if known.vocab is not None:
        settings += ["--data.vocab_size", str(known.vocab)]
    launch = Launch(**{name: value for name, value in vars(known).items() if name not in ("table", "vocab")})
    if files is None:
        return report(make_plan(load_run_config(settings, shape_of, parser.options), launch))
    return markdown_table(
        [make_plan(load_run_config([*settings, "--config", file], shape_of, parser.options), launch) for file in files]
    )


if __name__ == "__main__":
    sys.exit(run(main))
