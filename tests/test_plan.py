"""hgpt/plan.py: its figures against real parameters, real activations, and what the head's code allocates."""

import re
import weakref
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import write_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgpt import plan
from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmax import harmonic_loss, inner_products
from hgpt.model.loss import LossParams
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.plan import ENGINES, GIB, Launch, Precision, activation_memory, count_parameters, head_memory, make_plan
from hgpt.run.optim import build_optimizer
from hgpt.run.report import flops_per_token
from hgpt.run.settings import load_run_config

ROOT = Path(__file__).resolve().parent.parent
FP32 = Precision(torch.float32, torch.float32)
AUTOCAST = Precision(torch.bfloat16, torch.float32)
BF16 = Precision(torch.bfloat16, torch.bfloat16)
PRECISIONS = pytest.mark.parametrize("precision", [FP32, AUTOCAST, BF16], ids=["fp32", "autocast", "bf16"])


def tiny(**changes) -> HGPTConfig:
    return HGPTConfig(**{"vocab_size": 300, "n_positions": 96, "n_embd": 128, "n_layer": 3, "n_head": 4} | changes)


@pytest.fixture
def shipped(monkeypatch):
    """Arguments for a shipped configuration, in a checkout without data."""
    monkeypatch.chdir(ROOT)
    return ["--config", "configs/gpt2_small_harmonic.toml", "--data.path", "there/is/none"]


class Allocations(TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside, on any device: the meta device has sizes too."""

    def __init__(self, *outside: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in outside}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


# -------------------------------------------------------------------------------- Parameters, gradients, optimiser


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_parameters_by_part(tied, bias):
    D, L, T, rows = 128, 3, 96, 320
    counts = count_parameters(tiny(tie_word_embeddings=tied, bias=bias))
    assert (counts.token_embedding, counts.positions, counts.head) == (rows * D, T * D, 0 if tied else rows * D)
    assert counts.matrices == L * 12 * D * D
    # Biases: 3 D + D in attention, 4 D + D in the MLP, and one D for each norm.
    assert counts.blocks == counts.matrices + L * (2 * D + (9 * D + 2 * D if bias else 0))
    assert counts.final_norm == (2 * D if bias else D)
    assert counts.total == HGPTForCausalLM(tiny(tie_word_embeddings=tied, bias=bias)).num_parameters()
    full = tiny(distance="mahalanobis", distance_options={"metric": "full"}, tie_word_embeddings=True)
    assert count_parameters(full).head == D * D
    free = count_parameters(tiny(radius="learned", final_norm="none", bias=True, tie_word_embeddings=True))
    assert (free.head, free.final_norm) == (rows, D)


@pytest.mark.parametrize(("algorithm", "precision"), [("adamw", "bf16"), ("muon", "fp32")])
def test_parameters_gradients_and_optimiser_of_a_real_model(shipped, algorithm, precision):
    """One process: float32 parameters in either precision, and what the optimiser keeps for them."""
    options = "--model.n_layer=3 --model.n_head=4 --model.n_embd=128 --model.bias=true --data.seq_len=96"
    options += (
        f" --data.vocab_size=300 --train.micro_batch=2 --train.precision={precision} --optim.algorithm={algorithm}"
    )
    planned = make_plan(load_run_config([*shipped, *options.split()]), Launch())
    model = HGPTForCausalLM(planned.config).train()
    optimizer = build_optimizer(model, planned.run.optim)
    ids = torch.randint(300, (2, 96))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, shift_labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [v.nbytes for p in parameters for name, v in optimizer.state[p].items() if name != "step"]
    weights, gradients = sum(p.nbytes for p in parameters), sum(p.grad.nbytes for p in parameters)
    assert planned.memory("ddp")[:5] == (weights, gradients, sum(state), 0, 0)


# ----------------------------------------------------------------------------------------------------- Activations


@pytest.mark.parametrize("activation_function", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("checkpointing", [False, True])
@PRECISIONS
def test_activations_of_a_real_step(activation_function, precision, checkpointing):
    """Allocations of the trunk after the forward pass and at the peak of the backward pass, within 2 %."""
    config = tiny(n_layer=2, activation_function=activation_function)
    model = HGPTForCausalLM(config).to(precision.residual).train()
    if checkpointing:
        # transformers 5.17 has the second name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    ids = torch.randint(300, (4, 96))
    with Allocations(*model.parameters(), ids) as seen:
        for _ in range(2):  # the second step starts with gradients
            before = seen.peak = seen.live
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
                hidden = model.transformer(ids, use_cache=False).last_hidden_state
            kept = seen.live - before - hidden.nbytes
            hidden.backward(torch.empty_like(hidden))
            del hidden
    planned = activation_memory(config, 4 * 96, precision, checkpointing=checkpointing)
    copies = 2 * count_parameters(config).matrices if precision.autocast else 0
    assert kept == pytest.approx(planned.kept + (0 if checkpointing else copies), rel=0.02)
    # Checkpointing keeps the copies of one block at a time.
    expected = seen.live + planned.kept + planned.block + (copies // 2 if checkpointing else copies)
    assert seen.peak == pytest.approx(expected, rel=0.02)


def test_dropout_keeps_masks():
    plain, masked = (activation_memory(tiny(dropout=p), 10, AUTOCAST, checkpointing=False).kept for p in (0.0, 0.1))
    assert masked - plain == 10 * 128 * (2 * 3 + 1)


# ------------------------------------------------------------------------------------------------- The head's loss


@pytest.mark.parametrize("radius", ["none", "learned"])
@pytest.mark.parametrize("head", ["harmonic", "softmax"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1000, 12 * 1024])
def test_the_row_kernels_allocate_what_is_planned(monkeypatch, radius, head, precision, tokens):
    """The code itself, at full size, on the meta device; only the kernels and the products are left out."""
    kernels = pytest.importorskip("hgpt.model.row_kernels", reason="they need Triton")
    for name in ("_squared_norms", "_losses", "_gradients", "_subtract"):
        monkeypatch.setattr(kernels, name, defaultdict(lambda: lambda *_, **__: None))
    monkeypatch.setattr(kernels, "multiply", lambda a, b, out, add=False: out)
    config = HGPTConfig(head=head, radius=radius)
    with torch.device("meta"):
        a = torch.empty(config.vocab_size) if radius == "learned" else None
        x = torch.empty(tokens, config.n_embd, dtype=precision.compute)
        w = torch.empty(config.padded_vocab_size, config.n_embd, dtype=precision.compute)
        targets, weights = torch.empty(tokens, dtype=torch.long), torch.empty(tokens)
    params = LossParams(n=55.4 if head == "harmonic" else None, log_weight=a, num_classes=config.vocab_size)
    with Allocations(x, w, targets, weights) as seen:
        kernels.by_rows(params, (x, w, None, a), targets, weights, (True, True, False, a is not None))
    planned = head_memory(config, tokens, precision)
    # x itself, its targets and their weights are made outside.
    assert seen.peak == pytest.approx(planned.peak - x.nbytes - targets.nbytes - weights.nbytes, rel=0.01)


@pytest.mark.parametrize("head", ["harmonic", "softmax"])
def test_the_dense_head_allocates_what_is_planned(head):
    config, tokens = HGPTConfig(head=head), 2048
    with torch.device("meta"):
        x = torch.empty(tokens, config.n_embd, requires_grad=True)
        w = torch.empty(config.padded_vocab_size, config.n_embd, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.long)
    with Allocations(x, w, targets) as seen:
        if head == "harmonic":
            loss = harmonic_loss(x, w, targets, 55.4)
        else:
            loss = torch.nn.functional.cross_entropy(inner_products(x, w), targets)
        loss.backward()
    planned = head_memory(config, tokens, FP32).dense
    # Gradients of x and w are allocated after one of the score matrices is freed.
    assert planned - 2 * x.nbytes - w.nbytes <= seen.peak * 1.01 <= planned * 1.02


def test_memory_of_heads_that_need_more():
    more = head_memory(HGPTConfig(), 4096, AUTOCAST).peak - head_memory(HGPTConfig(), 4096, BF16).peak
    assert more == 4096 * 768 * 4 + 50304 * 768 * 2  # copies of the operands
    euclid, cosine, manhattan = (
        head_memory(tiny(distance=distance), 96, AUTOCAST) for distance in ("euclidean", "cosine", "manhattan")
    )
    assert cosine.operands == euclid.operands + (96 + 320) * 128 * 8 and cosine.chunk == euclid.chunk
    assert manhattan.chunk == 512 * 2**20


# --------------------------------------------------------------------------------------------------------- Engines


def test_bytes_per_parameter_under_each_engine(shipped):
    """Weights, gradients and moments are 16 bytes in float32 and 18 in bf16 ZeRO-1; what is sharded falls with W."""
    P = 124_373_760

    def memory_of(gpus: int, *options: str) -> dict[str, plan.Memory]:
        planned = make_plan(load_run_config([*shipped, "--train.micro_batch=1", *options]), Launch(gpus=gpus))
        return {engine: planned.memory(engine) for engine in ENGINES}

    eight = memory_of(8)
    assert {engine: tuple(round(size / P, 3) for size in memory[:3]) for engine, memory in eight.items()} == {
        "ddp": (4, 4, 8),
        "zero1": (2, 6, 1.5),
        "zero2": (2, 0.5, 1.5),
        "zero2_offload": (2, 0, 0),
        "zero3": (0.25, 0.5, 1.5),
        "fsdp2": (0.5, 0.5, 1),
    }
    assert eight["zero2_offload"].host == pytest.approx(2 * P)
    full = memory_of(8, "--train.precision=fp32")
    assert full["zero1"].gradients == full["zero2"].parameters == 4 * P
    for m in eight.values():
        assert m.total == m.parameters + m.gradients + m.optimiser + m.buckets + m.activations + max(m.head, m.block)
    for engine in ENGINES[1:]:  # more processes never need more
        sizes = [memory.total + memory.host for memory in (memory_of(n)[engine] for n in (2, 8, 48))]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


# ----------------------------------------------------------------------------------------------------- The command


def test_report(shipped):
    text = plan.main([*shipped, "--gpus", "4", "--nodes", "2", "--mfu", "0.4"])
    assert "on 2 nodes of 4 x NVIDIA H100" in text
    assert "note: there/is/none does not exist (yet): vocabulary of 50,257 (GPT-2's; state another" in text
    assert re.search(r"^parameters +124,373,760$", text, re.M)
    assert re.search(r"^  token embedding +38,633,472  also the head's centres$", text, re.M)
    assert re.search(r"^  12 blocks +84,953,088$", text, re.M)
    assert "tokens per step  491,520 = 480 x 1,024; accumulation 5 x 12 sequences on each of 8" in text
    assert "600,000, 294.9 G tokens" in text and "epochs of" not in text
    rate = 0.4 * 989e12 * 8 / flops_per_token(HGPTConfig(), 1024)
    assert f"{rate:,.0f} tokens/s" in text
    assert f"{600_000 * 491_520 / rate / 3600:.1f} hours at 40% MFU of 989 TFLOP/s" in text
    for engine in ENGINES:
        assert re.search(rf"^  {engine} +[\d.]+", text, re.M)
    assert "warning" not in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpus 0", "--gpus: must be at least 1; got 0"),
        ("--mfu 40", "--mfu: .* 40.0"),
        ("--memory 0", "--memory: .* 0.0"),
        ("--gpu 8", "there is no setting gpu"),
        ("--gpus 7", "train.global_batch = 480 .* train.micro_batch = 12"),
    ],
)
def test_bad_options(shipped, options, message):
    with pytest.raises(UserError, match=message):
        plan.main([*shipped, *options.split()])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--train.precision fp32 --model.tie_word_embeddings false", r"^  head +38,633,472$"),
        ("--train.precision fp32", r", fp32,[\s\S]*not estimated: peaks are known for bf16"),
        (
            "--train.micro_batch 60 --device NVIDIA_L4",
            r"^warning: [\d.]+ GiB in the 22\.00 GiB of NVIDIA L4 does not fit; .*activation_checkpointing = true",
        ),
        ("--memory 7.6", "^warning: .* is tight"),
        ("--device NVIDIA_GB200", "not estimated: the bf16 peak of 'NVIDIA GB200' is not known"),
        ("--device NVIDIA_GB200", "^warning: the memory of 'NVIDIA GB200' is not known: give it with --memory GIB"),
        ("--engine zero3 --train.compile true", "^warning: zero3 does not work with train.compile = true"),
        ("--engine zero1 --optim.algorithm muon", '^warning: zero1 does not work with optim.algorithm = "muon"'),
        ("--device cpu", r"\A(?![\s\S]*zero)[\s\S]*fp32[\s\S]*^memory per process[\s\S]*not estimated on a CPU"),
        ("--vocab 2048", r"vocabulary of 2,048 \(as stated\)"),
        (
            "--vocab 300 --model.n_layer 1 --model.n_head 1 --model.n_embd 16 --train.steps 2 --optim.warmup_steps 1",
            "^time +not estimated: the FLOPs alone would take less than a second",
        ),
        ("--model.head.distance cosine", r"\A(?![\s\S]*(warning|distance  ))"),
    ],
)
def test_what_the_report_says(shipped, options, found):
    words = [word.replace("NVIDIA_", "NVIDIA ") for word in options.split()]
    text = plan.main([*shipped, "--gpus", "8", *words])
    assert re.search(found, text, re.M), text


@pytest.mark.parametrize(
    ("distance", "traffic", "device", "bandwidth"),
    [
        ("manhattan", 11, "NVIDIA H100", 3350e9),
        ("canberra", 33, "Mystery", 3350e9),  # a GPU that is not known counts as an H100
        ("manhattan", 11, "cpu", 60e9),
    ],
)
def test_a_distance_that_takes_days(shipped, distance, traffic, device, bandwidth):
    options = [*shipped, "--gpus", "8", "--model.head.distance", distance, "--device", device]
    text = plan.main(options)
    days = 600_000 * 491_520 * 50257 * 768 * traffic * 4 / bandwidth / 8 / 86400
    assert f"distance         about {days:.1f} days more for {distance}" in text
    assert f'warning: model.head.distance = "{distance}"' in text and f"about {days:.1f} days for 294.9 G" in text
    assert f"harmonic head ({distance}), n = " in text
    short = plan.main([*options, "--train.steps", "2100", "--data.vocab_size", "512"])
    assert f"more for {distance}" in short and "visits every" not in short


def test_vocabulary_and_epochs_come_from_the_data(tmp_path, shipped):
    folder = write_data(tmp_path / "data", np.arange(2049) % 100, np.arange(2049) % 100)
    command = [*shipped, "--data.path", str(folder), "--train.steps", "10", "--optim.warmup_steps", "0"]
    text = plan.main([*command, "--train.global_batch", "12"])
    assert "vocabulary 300 in 320 rows" in text
    assert f"{10 * 12 * 1024 / 2049:.2f} epochs of 2,049" in text and "note:" not in text
    with pytest.raises(UserError, match="fewer than one sequence"):
        plan.main([*command, "--data.seq_len", "4096"])
    (folder / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"meta\.json"):
        plan.main(command)


def test_the_table_of_the_documentation(monkeypatch):
    """As its command prints it, whether or not there is data; in order of the parameters, as counted by hand."""
    monkeypatch.chdir(ROOT)
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    command = r"^python -m hgpt\.plan (.*--table) (configs/\S+)$"
    ((page, found),) = [(page, found) for page in pages if (found := re.search(command, page, re.M))]
    files = sorted(str(path) for path in Path().glob(found[2]))
    text = plan.main([*found[1].split(), *files, "--data.path", "there/is/none"])
    assert text in page
    head, _, *rows = (line.split(" | ") for line in text.splitlines())
    assert head == ["| run", "parameters", "micro-batch", "checkpointing", *ENGINES[:-1], f"{ENGINES[-1]} |"]
    sizes = {"small": "124.4 M", "medium": "354.6 M", "large": "773.6 M", "xl": "1.557 G"}
    assert [row[:2] for row in rows] == [[f"| gpt2_{name}_harmonic", size] for name, size in sizes.items()]
    small = make_plan(load_run_config(["--config", files[2], "--data.path", "there/is/none"]), Launch(gpus=8))
    assert rows[0][4] == f"{small.memory('ddp').total / GIB:.1f}"
