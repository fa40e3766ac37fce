"""What a run needs, worked out before it is started: parameters, memory per GPU, tokens, FLOPs and time.

    python -m hgpt.plan --config configs/gpt2_small_harmonic.toml --gpus 8 [--section.key value ...]
    python -m hgpt.plan --gpus 8 --table configs/gpt2_*_harmonic.toml

Nothing is trained, and no GPU is needed. Parameters are counted in the model itself, built without memory for its
weights; the rest is arithmetic, of the peak of a step, in bytes:

    engine          parameters   gradients   optimiser   buckets and gathered weights
    ddp             4 P          4 P         8 P         - (its buckets are the gradients)
    zero1           c P          6 P         12 P/W      4 min(P, R)
    zero2           c P          4 P/W       12 P/W      c R + 4 min(P, R)
    zero2_offload   c P          -           -           c R + 4 min(P, R), and 16 P/W in the host's memory
    zero3           c P/W        4 P/W       12 P/W      4 R + c min(P, 10⁹)
    fsdp2           4 P/W        4 P/W       8 P/W       c (2 E + 3 B)

P parameters, of which B in each block and E outside the blocks; W processes; R = 5·10⁸, DeepSpeed's reduce bucket; c
bytes for an element of matrix products, 2 under bf16 and 4 under fp32. AdamW keeps two float32 numbers a parameter,
Muon (ddp only) one for the blocks' matrices. ZeRO adds float32 masters of its weights, and ZeRO-1 accumulates float32
gradients beside the bf16 ones (under fp32 it has 4 P of them, and ZeRO-2 a bucket without a copy). A ZeRO engine
allocates whole buckets, however small the model.

    activations            L N (D (2 r + 14 c) + 4 H + 16) + N (D r + 16)
      with checkpointing   L N D r + N (D r + 16)
      with dropout         1 byte for each of the masks' elements, N D after the embedding and 2 N D in a block
      under ddp in bf16    2 bytes for each weight of the blocks' matrices: the copies that autocast makes
    a block's backward     N D (3 r + 4 c), with checkpointing and its activations, which are computed again

L blocks, N = micro_batch · seq_len tokens, D the width, H heads; r bytes for an element of the residual stream: 4 where
bf16 is autocast (ddp, fsdp2), otherwise c. A block keeps the inputs of its two norms (r each), their outputs, q, k, v
and the attention's output (c each), the input and the output of the activation function (4 c each), and per token the
norms' statistics and the attention's log-sum-exp. Other activation functions than gelu and gelu_pytorch_tanh may keep
more; torch.compile usually keeps less.

A distance that is no matrix product takes time that MFU says nothing of (`distance_seconds`).

The head's loss (`head_memory`) has its peak when all activations are there, and the backward pass of the last block
comes after it: the larger of the two counts. Gradients are there at that time because they are accumulated over
micro-batches. Not counted: CUDA's context, workspaces of kernels and the allocator's fragmentation, together often 1 to
3 GiB. Tests hold activations, head and the row of ddp to what the code allocates, as far as that can be seen without a
GPU. Parameters, gradients and optimiser state of ZeRO were counted once in two CPU processes (DeepSpeed 0.19.8), to
0.2 %; buckets and gathered weights, and all of fsdp2 (torch 2.13), follow the sources.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from hgpt.cli import Parser, run
from hgpt.data.batches import TrainingBatches, accumulation_steps
from hgpt.data.shards import TokenShards
from hgpt.errors import UserError
from hgpt.hardware import known_device, peak_flops
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.distances import Distance, make_distance, memory_of, score_chunk
from hgpt.model.loss import chunk_positions
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import RunConfig
from hgpt.run.report import flops_per_token
from hgpt.run.settings import load_run_config

ENGINES = ("ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2")
GPT2_VOCAB_SIZE = 50257
GIB = 2**30

# DeepSpeed's defaults: zero_optimization.reduce_bucket_size and stage3_max_live_parameters, in elements.
_REDUCE_BUCKET, _MAX_LIVE_PARAMETERS = 500_000_000, 1_000_000_000

# Bytes/s that a distance in blocks reads and writes on a CPU; its blocks stay in the caches. In GB/s on two idle cores
# of an AMD EPYC (Zen 3), by python -m benchmarks.head_loss --shape 64x768x50304 --distances ...: 22 (chebyshev),
# 43 (hamming), 58 (bray_curtis), 61 (manhattan), 72 (canberra), 81 (minkowski); beside another process a quarter of it.
_CPU_BANDWIDTH = 60e9
_H100_BANDWIDTH = 3350e9
_DAY = 86400


# --------------------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by part. `head` is 0 where the centres are the token embedding; `matrices` are the weights of the
    blocks' linear layers, which are part of `blocks`."""

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
    """The parameters of the model that `config` describes, counted in the model itself, which takes no memory."""
    with torch.device("meta"):
        model = HGPTForCausalLM(config)
    trunk = model.transformer
    tied = model.lm_head.weight is trunk.wte.weight
    counts = Parameters(
        token_embedding=_size(trunk.wte),
        positions=_size(trunk.wpe),
        blocks=_size(trunk.h),
        final_norm=_size(trunk.ln_f),
        head=_size(model.lm_head) - (trunk.wte.weight.numel() if tied else 0),
        matrices=sum(module.weight.numel() for module in trunk.h.modules() if isinstance(module, nn.Linear)),
    )
    assert counts.total == model.num_parameters(), "a part of the model is not counted"
    return counts


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Precision(NamedTuple):
    """The dtype of matrix products, and that of the residual stream between them."""

    compute: torch.dtype
    residual: torch.dtype

    @property
    def autocast(self) -> bool:
        return self.compute != self.residual


def precision_of(engine: str, precision: str) -> Precision:
    """The dtypes under an engine for `train.precision` on a GPU, where "auto" is bf16."""
    if precision == "fp32":
        return Precision(torch.float32, torch.float32)
    return Precision(torch.bfloat16, torch.bfloat16 if engine.startswith("zero") else torch.float32)


class Activations(NamedTuple):
    """Bytes: those kept from the forward to the backward pass, and what the backward pass of a block adds to them."""

    kept: int
    block: int


def activation_memory(config: HGPTConfig, tokens: int, precision: Precision, *, checkpointing: bool) -> Activations:
    """What the trunk keeps of a micro-batch of `tokens` positions, without the head; the formula of this module.

    Copies of weights that autocast makes are not among them.
    """
    c, r = precision.compute.itemsize, precision.residual.itemsize
    width, layers, mask = config.n_embd, config.n_layer, 1 if config.dropout > 0 else 0
    block = tokens * (width * (2 * r + 14 * c + 2 * mask) + 4 * config.n_head + 16)
    block_input = tokens * width * r
    gradients = tokens * width * (3 * r + 4 * c)  # of the residual stream and of the inner layer of the MLP
    ends = tokens * (width * (r + mask) + 16)  # the final norm's input and statistics, the token numbers
    if checkpointing:
        return Activations(layers * block_input + ends, block - block_input + gradients)
    return Activations(layers * block + ends, gradients)


class HeadMemory(NamedTuple):
    """Bytes at the peak of the head's loss: operands and gradients, and one chunk of scores; of the dense head."""

    operands: int
    chunk: int
    dense: int
    chunk_positions: int

    @property
    def peak(self) -> int:
        return self.operands + self.chunk


def head_memory(
    config: HGPTConfig,
    tokens: int,
    precision: Precision,
    *,
    loss_chunk: int | None = None,
    distance_memory: float | None = None,
) -> HeadMemory:
    """What `hgpt.model.loss` needs on a GPU for `tokens` positions, and the dense head instead.

    operands: x and its gradient, (N, D); under autocast x in both dtypes and a bf16 copy of w; the gradient of w in
        float32, (V, D); the norms and column sums, (V,).
    chunk: C positions · V times 4 bytes of products and, harmonic, 4 of scores and 1 of mask, or 2 of G (bf16) and the
        chunk's share of the gradient of w; C is `loss_chunk`, by default `loss.chunk_positions`.
    dense: (N, V) times 17 bytes in the backward pass of `harmax.harmonic_loss`, 12 in that of the softmax twin, and the
        same operands.

    A distance with operands of its own has them and their gradients in float32 besides. One in blocks works in float32,
    with the operands and their gradients, and in `distance_memory` MiB (train.distance_memory).
    """
    rows, width = config.padded_vocab_size, config.n_embd
    c = precision.compute.itemsize
    metric = distance_of(config)
    if metric is not None and metric.power is None:
        memory = memory_of("cuda") if distance_memory is None else int(distance_memory * 2**20)
        operands = (tokens + rows) * width * (8 + (8 if metric.transforms else 0))
        return HeadMemory(
            operands=operands,
            chunk=memory,
            dense=operands + tokens * rows * 17,
            chunk_positions=min(tokens, score_chunk(config.vocab_size, 4, "cuda")),
        )
    harmonic = config.head == "harmonic"
    chunk = min(tokens, loss_chunk or chunk_positions(rows, precision.compute, "cuda"))
    operands = tokens * width * 2 * c + rows * width * 4 + 8 * rows + 20 * tokens
    if precision.autocast:
        operands += tokens * width * precision.residual.itemsize + rows * width * c
    if metric is not None and metric.transforms:
        operands += (tokens + rows) * width * 8
    scores = chunk * rows
    elementwise = scores * (9 if harmonic else 4)
    # With bf16 operands a chunk's share of the gradient of w comes as a float32 tensor of its own.
    product = scores * 6 + rows * width * 4 if c == 2 else 0
    return HeadMemory(
        operands=operands,
        chunk=max(elementwise, product) + chunk * width * 4,
        dense=operands + tokens * rows * (17 if harmonic else 12),
        chunk_positions=chunk,
    )


def distance_of(config: HGPTConfig) -> Distance | None:
    """The distance of a harmonic head, without memory for its weights."""
    if config.head != "harmonic":
        return None
    with torch.device("meta"):
        return make_distance(config.distance, config.n_embd, **config.distance_options)


def distance_seconds(config: HGPTConfig, tokens: float, device: str) -> float:
    """About how long a device takes for loss and gradients of `tokens` positions with a distance in blocks, else 0.

        tokens · V · D · traffic · 4 bytes / bandwidth

    `traffic` is how often the blocks' operations read or write an element (`Distance.traffic`, counted in the code).
    For a GPU this is computed, not measured: each operation on its own is bound by memory; caches may help, and a fused
    kernel would. A GPU whose bandwidth is not known counts as an H100. "cpu" is two cores, measured (`_CPU_BANDWIDTH`).
    """
    metric = distance_of(config)
    if metric is None or metric.power is not None:
        return 0.0
    if device.lower() == "cpu":
        bandwidth = _CPU_BANDWIDTH
    else:
        known = known_device(device)
        bandwidth = (known and known.bandwidth) or _H100_BANDWIDTH
    return tokens * config.vocab_size * config.n_embd * metric.traffic * 4 / bandwidth


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per GPU, and beside them those in the host's memory per process."""

    parameters: int
    gradients: int
    optimiser: int
    buckets: int
    activations: int
    block: int
    head: int
    host: int

    @property
    def transient(self) -> int:
        """The larger of the head's loss and a block's backward pass: one comes after the other."""
        return max(self.head, self.block)

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimiser + self.buckets + self.activations + self.transient


def memory_per_gpu(
    engine: str,
    config: HGPTConfig,
    parameters: Parameters,
    *,
    processes: int,
    tokens: int,
    precision: str,
    checkpointing: bool,
    muon: bool = False,
    loss_chunk: int | None = None,
    distance_memory: float | None = None,
) -> Memory:
    """The peak of a training step on one GPU, by the table of this module.

    Args:
        engine: one of `ENGINES`.
        processes: W, over all nodes.
        tokens: N, of a micro-batch.
        precision: as `train.precision`, "auto" being bf16.
        checkpointing: as `train.activation_checkpointing`.
        muon: whether Muon trains the blocks' matrices.
        loss_chunk, distance_memory: as in `train`.
    """
    numbers = precision_of(engine, precision)
    total, share, c = parameters.total, -(-parameters.total // processes), numbers.compute.itemsize
    bucket = min(total, _REDUCE_BUCKET)
    reduced = c * _REDUCE_BUCKET + (4 * bucket if c != 4 else 0)
    host = 0
    if engine == "ddp":
        static = (4 * total, 4 * total, 8 * total - (4 * parameters.matrices if muon else 0), 0)
    elif engine == "zero1":
        static = (c * total, (4 if c == 4 else 6) * total, 12 * share, 4 * bucket)
    elif engine == "zero2":
        static = (c * total, 4 * share, 12 * share, reduced)
    elif engine == "zero2_offload":
        static, host = (c * total, 0, 0, reduced), 16 * share
    elif engine == "zero3":
        static = (c * share, 4 * share, 12 * share, 4 * _REDUCE_BUCKET + c * min(total, _MAX_LIVE_PARAMETERS))
    elif engine == "fsdp2":
        block = parameters.blocks // config.n_layer
        static = (4 * share, 4 * share, 8 * share, c * (2 * (total - parameters.blocks) + 3 * block))
    else:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    activations = activation_memory(config, tokens, numbers, checkpointing=checkpointing)
    copies = 2 * parameters.matrices if numbers.autocast and engine == "ddp" else 0
    return Memory(
        parameters=static[0],
        gradients=static[1],
        optimiser=static[2],
        buckets=static[3],
        activations=activations.kept + copies,
        block=activations.block,
        head=head_memory(config, tokens, numbers, loss_chunk=loss_chunk, distance_memory=distance_memory).peak,
        host=host,
    )


# --------------------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True, kw_only=True)
class Launch:
    """On what a run is to be trained: `gpus` on each of `nodes`, and what share of the peak it is thought to reach."""

    gpus: int = 1
    nodes: int = 1
    engine: str = "ddp"
    mfu: float = 0.4
    device: str = "NVIDIA H100"
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is the share of the peak, above 0 and at most 1; got {self.mfu}")
        if self.memory is not None and not self.memory > 0:
            raise UserError(f"--memory is the memory of a GPU in GiB, more than 0; got {self.memory}")

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def capacity(self) -> float | None:
        """Bytes of memory of a GPU; None if unknown."""
        if self.memory is not None:
            return self.memory * GIB
        known = known_device(self.device)
        return None if known is None or known.memory_gib is None else float(known.memory_gib * GIB)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a machine: the model, what it takes, and what is known of the data."""

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

    def memory(self, engine: str, *, checkpointing: bool | None = None) -> Memory:
        """Per GPU under an engine, as the run has it or with `checkpointing` as said."""
        train = self.run.train
        return memory_per_gpu(
            engine,
            self.config,
            self.parameters,
            processes=self.launch.processes,
            tokens=self.micro_tokens,
            precision=train.precision,
            checkpointing=train.activation_checkpointing if checkpointing is None else checkpointing,
            muon=self.run.optim.algorithm == "muon",
            loss_chunk=train.loss_chunk,
            distance_memory=train.distance_memory,
        )

    @property
    def tokens(self) -> int:
        """That the run trains on."""
        return self.run.train.steps * self.run.train.global_batch * self.run.data.seq_len

    @property
    def distance_seconds(self) -> float:
        """About how long the run takes for a distance in blocks alone."""
        return distance_seconds(self.config, self.tokens, self.launch.device) / self.launch.processes


def make_plan(run: RunConfig, launch: Launch) -> Plan:
    """The plan of a run.

    Raises UserError as train.py would: a batch that cannot be reached, data that are damaged or too short, a model that
    cannot be built. A data folder that is not there yet is none: its vocabulary is taken to be GPT-2's, which is noted.
    """
    data, train = run.data, run.train
    notes, shards = [], None
    vocab_size, end_of_text = data.vocab_size or GPT2_VOCAB_SIZE, None
    if Path(data.path).exists():
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
        origin = "data.vocab_size" if data.vocab_size else "GPT-2's"
        notes.append(f"{data.path} is not there (yet): vocabulary of {vocab_size:,} ({origin}), epochs unknown")
        accumulation = accumulation_steps(train.global_batch, train.micro_batch, launch.processes)
    config = run.model.to_hf(vocab_size=vocab_size, seq_len=data.seq_len, end_of_text=end_of_text)
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
    """What would go wrong, or is near to it, and the way out."""
    found = []
    run, launch = plan.run, plan.launch
    need, capacity = plan.memory(launch.engine).total, launch.capacity
    if capacity is None:
        found.append(f"the memory of {launch.device!r} is not known: give it with --memory GIB to have it checked")
    elif need > 0.9 * capacity:
        fits = [engine for engine in ENGINES if plan.memory(engine).total <= 0.9 * capacity]
        ways = [f"--engine {', '.join(fits)}"] if fits else []
        if not run.train.activation_checkpointing:
            smaller = plan.memory(launch.engine, checkpointing=True).total
            if smaller <= 0.9 * capacity:
                ways.append(f"train.activation_checkpointing = true ({_gib(smaller)} GiB)")
        if run.train.micro_batch > 1:
            ways.append("a smaller train.micro_batch")
        state = "does not fit" if need > capacity else "is tight, with CUDA's own needs and fragmentation"
        found.append(
            f"{_gib(need)} GiB in the {_gib(capacity)} GiB of {launch.device} {state}"
            + (f"; what helps: {' or '.join(ways)}" if ways else "")
        )
    if plan.distance_seconds > _DAY:
        found.append(
            f'model.head.distance = "{plan.config.distance}" visits every coordinate of every pair of a token and a '
            f"centre: about {_duration(plan.distance_seconds)} for {_short(plan.tokens)} tokens and "
            f"{plan.config.vocab_size:,} centres, by bandwidth. What helps: cosine, mahalanobis or "
            "euclidean, which are matrix products, a smaller vocabulary, or fewer tokens"
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
        _engine_lines(plan),
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
        f"{'on' if train.activation_checkpointing else 'off'}",
        *(f"note: {note}" for note in plan.notes),
    ]


def _parameter_lines(plan: Plan) -> list[str]:
    counts = plan.parameters
    tied = counts.head == 0
    return _aligned(
        [
            ("parameters", f"{counts.total:,}", ""),
            ("  token embedding", f"{counts.token_embedding:,}", "also the head's centres" if tied else ""),
            ("  positions", f"{counts.positions:,}", ""),
            (f"  {plan.config.n_layer} blocks", f"{counts.blocks:,}", ""),
            ("  final norm", f"{counts.final_norm:,}", ""),
            ("  head", f"{counts.head:,}", "the token embedding" if tied else ""),
        ]
    )


def _memory_lines(plan: Plan) -> list[str]:
    run, engine, config = plan.run, plan.launch.engine, plan.config
    memory = plan.memory(engine)
    precision = precision_of(engine, run.train.precision)
    head = head_memory(
        config,
        plan.micro_tokens,
        precision,
        loss_chunk=run.train.loss_chunk,
        distance_memory=run.train.distance_memory,
    )
    off, on = (plan.memory(engine, checkpointing=value) for value in (False, True))
    rows = [
        (f"memory per GPU, {engine}", "GiB", ""),
        ("  parameters", _gib(memory.parameters), ""),
        ("  gradients", _gib(memory.gradients), ""),
        ("  optimiser state", _gib(memory.optimiser), "in the host's memory" if memory.host else ""),
        ("  buckets, gathered weights", _gib(memory.buckets), ""),
        (
            "  activations",
            _gib(memory.activations),
            f"of {run.train.micro_batch} x {run.data.seq_len:,} tokens, checkpointing "
            f"{'on' if run.train.activation_checkpointing else 'off'}",
        ),
        ("    checkpointing off", _gib(off.activations), f"and {_gib(off.block)} in the backward pass of a block"),
        ("    checkpointing on", _gib(on.activations), f"and {_gib(on.block)} in the backward pass of a block"),
        (
            "  head's loss",
            _gib(memory.head),
            f"of that {_gib(head.chunk)} for a chunk of {head.chunk_positions:,} positions; the dense head would need "
            f"{_gib(head.dense)}",
        ),
        (
            "  total",
            _gib(memory.total),
            "a block's backward pass in the head's place" if memory.block > memory.head else "",
        ),
    ]
    if memory.host:
        rows.append(("host memory per process", _gib(memory.host), "gradients, masters and optimiser state"))
    formula = (
        f"  (bytes of a block's activations: N (D (2 r + 14 c) + 4 H + 16), N = {plan.micro_tokens:,}, "
        f"D = {config.n_embd}, H = {config.n_head}, r = {precision.residual.itemsize}, "
        f"c = {precision.compute.itemsize})"
    )
    return [*_aligned(rows), formula]


def _engine_lines(plan: Plan) -> list[str]:
    titles = ("engine", "parameters", "gradients", "optimiser", "buckets", "activations", "head/block", "total", "host")
    rows: list[tuple[str, ...]] = [titles]
    for engine in ENGINES:
        m = plan.memory(engine)
        values = (m.parameters, m.gradients, m.optimiser, m.buckets, m.activations, m.transient, m.total, m.host)
        rows.append((engine, *map(_gib, values)))
    lines = [f"GiB per GPU under each engine, {plan.launch.processes} processes", *_aligned(rows)]
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def _training_lines(plan: Plan) -> list[str]:
    run, launch = plan.run, plan.launch
    step_tokens = run.train.global_batch * run.data.seq_len
    tokens = plan.tokens
    flops = flops_per_token(plan.config, run.data.seq_len)
    lines = [
        f"tokens per step  {step_tokens:,} = {run.train.global_batch} x {run.data.seq_len:,}; accumulation "
        f"{plan.accumulation} x {run.train.micro_batch} sequences on each of {launch.processes}",
        f"steps            {run.train.steps:,}, {_short(tokens)} tokens"
        + (
            f", {tokens / plan.training_tokens:.2f} epochs of {plan.training_tokens:,}"
            if plan.training_tokens is not None
            else ""
        ),
        f"FLOPs            {_short(flops)} a token, {_short(flops * step_tokens)} a step, "
        f"{_short(flops * tokens)} a run",
    ]
    peak = peak_flops(launch.device)
    if run.train.precision == "fp32":
        lines.append("time             not estimated: peaks are known for bf16, and train.precision is fp32")
    elif peak is None:
        lines.append(f"time             not estimated: the bf16 peak of {launch.device!r} is not known")
    else:
        rate = launch.mfu * peak * launch.processes / flops
        lines.append(
            f"time             {_duration(tokens / rate)} at {launch.mfu:.0%} MFU of {peak / 1e12:g} TFLOP/s a GPU: "
            f"{rate:,.0f} tokens/s, {step_tokens / rate:.3g} s a step; without evaluations and checkpoints"
        )
    if plan.distance_seconds:
        lines.append(
            f"distance         about {_duration(plan.distance_seconds)} besides for {plan.config.distance}, which is "
            "no matrix product"
        )
    return lines


def markdown_table(plans: Sequence[Plan]) -> str:
    """GiB per GPU of each plan under every engine, as Markdown, the smallest model first."""
    rows = [
        ["run", "parameters", "micro-batch", "checkpointing", *ENGINES],
        ["---", *("---:" for _ in range(3 + len(ENGINES)))],
    ]
    for plan in sorted(plans, key=lambda plan: plan.parameters.total):
        train = plan.run.train
        checkpointing = "on" if train.activation_checkpointing else "off"
        totals = [f"{plan.memory(engine).total / GIB:.1f}" for engine in ENGINES]
        rows.append([plan.run.name, _short(plan.parameters.total), str(train.micro_batch), checkpointing, *totals])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, numbers to the right, a last column of remarks as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    remarks = len(rows[0]) == 3
    lines = []
    for row in rows:
        numbers = row[1:-1] if remarks else row[1:]
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False)),
        ]
        lines.append("  ".join([*cells, row[-1]] if remarks else cells).rstrip())
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _short(number: float) -> str:
    """124.4 M, 294.9 G, 2.5e+20: three or four digits and a unit, up to 10¹⁵."""
    for unit, value in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value <= number < 1e15:
            return f"{number / value:.4g} {unit}"
    return f"{number:.3g}" if number >= 1e15 else f"{number:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else str(timedelta(seconds=round(seconds)))


# --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> str:
    """The text that the command line asks for. Raises UserError."""
    parser = Parser(
        prog="python -m hgpt.plan",
        description="What a run needs: parameters, memory per GPU, tokens, FLOPs, time. All other arguments are those "
        "of train.py: --config FILE and --section.key VALUE.",
        allow_abbrev=False,
    )
    default = Launch()
    parser.add_argument("--gpus", type=int, default=default.gpus, help="GPUs on each node (%(default)s)")
    parser.add_argument("--nodes", type=int, default=default.nodes, help="nodes (%(default)s)")
    parser.add_argument("--engine", choices=ENGINES, default=default.engine, help="what trains (%(default)s)")
    parser.add_argument("--mfu", type=float, default=default.mfu, help="share of the peak reached (%(default)s)")
    parser.add_argument("--device", default=default.device, help='the GPU, as CUDA calls it, or "cpu" (%(default)s)')
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU, default: that of the device")
    parser.add_argument(
        "--table", nargs="+", metavar="FILE", help="only a Markdown table: GiB per GPU of these configurations"
    )
    known, settings = parser.parse_known_args(arguments)
    files = known.table
    launch = Launch(**{name: value for name, value in vars(known).items() if name != "table"})
    if files is None:
        return report(make_plan(load_run_config(settings), launch))
    return markdown_table([make_plan(load_run_config([*settings, "--config", file]), launch) for file in files])


if __name__ == "__main__":
    sys.exit(run(main))
