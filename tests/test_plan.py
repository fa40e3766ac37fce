"""hgpt/plan.py: its figures against real parameters, real activations, and what the head's code allocates."""

import json
import re
import runpy
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgpt import plan
from hgpt.data.shards import DataMeta, ShardWriter, SplitMeta, write_meta
from hgpt.errors import UserError
from hgpt.model import loss as fused_loss
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.harmax import harmonic_loss, inner_products
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.plan import GIB, Launch, Precision, activation_memory, count_parameters, head_memory, memory_per_gpu
from hgpt.run.config import OptimConfig
from hgpt.run.optim import build_optimizer
from hgpt.run.report import flops_per_token
from hgpt.run.settings import load_run_config

ROOT = Path(__file__).resolve().parent.parent
FP32 = Precision(torch.float32, torch.float32)
AUTOCAST = Precision(torch.bfloat16, torch.float32)
BF16 = Precision(torch.bfloat16, torch.bfloat16)


def tiny(**changes) -> HGPTConfig:
    return HGPTConfig(**{"vocab_size": 300, "n_positions": 96, "n_embd": 128, "n_layer": 3, "n_head": 4} | changes)


def gpt2(name: str, *options: str):
    return load_run_config(["--config", str(ROOT / "configs" / f"gpt2_{name}_harmonic.toml"), *options])


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


# ---------------------------------------------------------------------------------------------------------------
# Parameters, gradients, AdamW


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_by_part(tied, bias):
    D, L, T, rows = 128, 3, 96, 320
    counts = count_parameters(tiny(tie_word_embeddings=tied, bias=bias))
    assert (counts.token_embedding, counts.positions, counts.head) == (rows * D, T * D, 0 if tied else rows * D)
    assert counts.matrices == L * 12 * D * D
    # Biases: 3 D + D in attention, 4 D + D in the MLP, and one D for each norm.
    assert counts.blocks == counts.matrices + L * (2 * D + (9 * D + 2 * D if bias else 0))
    assert counts.final_norm == (2 * D if bias else D)
    assert counts.total == HGPTForCausalLM(tiny(tie_word_embeddings=tied, bias=bias)).num_parameters()


def test_the_shipped_sizes_take_no_memory_to_count():
    totals = []
    for name in ("small", "medium", "large", "xl"):
        run = gpt2(name)
        totals.append(count_parameters(run.model.to_hf(vocab_size=50257, seq_len=1024)).total)
    assert totals == [124_373_760, 354_599_936, 773_582_080, 1_556_840_000]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_gradients_and_adamw_of_a_real_model(precision):
    """One process: float32 parameters in either precision, and what AdamW keeps for them."""
    config = tiny()
    model = HGPTForCausalLM(config).train()
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(300, (2, 96))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(ids, shift_labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [v for p in parameters for name, v in optimizer.state[p].items() if name != "step"]
    memory = memory_per_gpu(
        "ddp",
        config,
        count_parameters(config),
        processes=1,
        tokens=192,
        precision=precision,
        checkpointing=False,
    )
    assert memory.parameters == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters)
    assert memory.optimiser == sum(value.nbytes for value in state)
    assert memory.buckets == memory.host == 0


def test_muon_keeps_one_number_for_each_weight_of_the_blocks_matrices():
    config = HGPTConfig(vocab_size=61, n_positions=8, n_layer=2, n_head=2, n_embd=16, exponent=8.0)
    model = HGPTForCausalLM(config)
    optimizer = build_optimizer(model, OptimConfig(algorithm="muon"))
    tokens = torch.arange(16).reshape(2, 8)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = [v for p in model.parameters() for name, v in optimizer.state[p].items() if name != "step"]
    memory = memory_per_gpu(
        "ddp",
        config,
        count_parameters(config),
        processes=1,
        tokens=16,
        precision="fp32",
        checkpointing=False,
        muon=True,
    )
    assert memory.optimiser == sum(value.nbytes for value in state)


# ---------------------------------------------------------------------------------------------------------------
# Activations


def kept_by_the_trunk(config: HGPTConfig, batch: int, precision: Precision, checkpointing: bool) -> int:
    """Bytes that a real forward pass of the trunk keeps for its backward pass, without the parameters themselves."""
    model = HGPTForCausalLM(config).train()
    if not precision.autocast:
        model.to(precision.compute)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor  # alive, or its address would be given to another one
        return tensor

    ids = torch.randint(config.vocab_size, (batch, config.n_positions))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast),
    ):
        model.transformer(ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("activation_function", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("precision", [FP32, AUTOCAST, BF16], ids=["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_real_forward_pass(activation_function, precision, checkpointing):
    """To 1 %: the layer norms' statistics are of another dtype on a CPU, and there is a position's number for each."""
    config = tiny(activation_function=activation_function)
    measured = kept_by_the_trunk(config, 4, precision, checkpointing)
    expected = activation_memory(config, 4 * 96, precision, checkpointing=checkpointing).kept
    if precision.autocast and not checkpointing:
        expected += 2 * count_parameters(config).matrices
    assert measured == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("precision", [FP32, AUTOCAST, BF16], ids=["fp32", "autocast", "bf16"])
def test_checkpointing_moves_a_block_from_what_is_kept_to_its_backward_pass(precision):
    config = tiny()
    whole = activation_memory(config, 1000, precision, checkpointing=False)
    less = activation_memory(config, 1000, precision, checkpointing=True)
    assert whole.kept - less.kept == 3 * (less.block - whole.block)


@pytest.mark.parametrize("precision", [FP32, AUTOCAST, BF16], ids=["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_real_backward_pass(precision, checkpointing):
    """The trunk's allocations at their peak, with gradients from a step before, to 2 %."""
    config = tiny(n_embd=256, n_layer=2, n_positions=256)
    model = HGPTForCausalLM(config).to(precision.residual).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(300, (4, 256))
    with Allocations(*model.parameters(), ids) as seen:
        for _ in range(2):
            seen.peak = seen.live
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
                hidden = model.transformer(ids, use_cache=False).last_hidden_state
            hidden.backward(torch.empty_like(hidden))
            del hidden
    planned = activation_memory(config, 4 * 256, precision, checkpointing=checkpointing)
    matrices = count_parameters(config).matrices
    copies = 2 * matrices // (2 if checkpointing else 1) if precision.autocast else 0  # of one block, or of both
    expected = seen.live + planned.kept + planned.block + copies
    assert seen.peak == pytest.approx(expected, rel=0.02)


def test_dropout_keeps_masks():
    plain, masked = (activation_memory(tiny(dropout=p), 10, AUTOCAST, checkpointing=False).kept for p in (0.0, 0.1))
    assert masked - plain == 10 * 128 * (2 * 3 + 1)


# ---------------------------------------------------------------------------------------------------------------
# The head's loss


def head_operands(config: HGPTConfig, tokens: int, dtype: torch.dtype, **options) -> tuple[torch.Tensor, ...]:
    x = torch.empty(tokens, config.n_embd, dtype=dtype, device="meta", **options)
    w = torch.empty(config.padded_vocab_size, config.n_embd, dtype=dtype, device="meta", **options)
    return x, w, torch.empty(tokens, dtype=torch.long, device="meta")


@pytest.mark.parametrize("head", ["harmonic", "softmax"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "chosen"), [(1000, None), (12 * 1024, None), (12 * 1024, 1024)])
def test_the_fused_loss_allocates_what_is_planned(monkeypatch, head, precision, tokens, chosen):
    """The code itself, at full size, on tensors without memory: it takes its way on a GPU for all that is no CPU."""
    if precision.compute == torch.bfloat16:  # on a GPU the product alone: bf16 operands, float32 result
        monkeypatch.setattr(fused_loss, "inner_products", lambda x, w: x.new_empty(len(x), len(w), dtype=torch.float32))
    config = HGPTConfig(head=head)
    x, w, targets = head_operands(config, tokens, precision.compute)
    weights = torch.empty(tokens, device="meta")
    chunk = chosen or fused_loss.chunk_positions(config.padded_vocab_size, precision.compute, "cuda")
    n = 55.4 if head == "harmonic" else None
    params = fused_loss.LossParams(n=n, num_classes=50257, chunk=chunk)
    with Allocations(x, w, targets, weights) as seen:
        fused_loss.by_products(params, (x, w, None), targets, weights, (True, True, False))
    planned = head_memory(config, tokens, precision, loss_chunk=chosen)
    assert planned.chunk_positions == min(chunk, tokens)
    # x itself, its targets and their weights are made outside.
    assert seen.peak == pytest.approx(planned.peak - x.nbytes - targets.nbytes - weights.nbytes, rel=0.01)


@pytest.mark.parametrize("head", ["harmonic", "softmax"])
def test_the_dense_head_allocates_what_is_planned(head):
    config, tokens = HGPTConfig(head=head), 2048
    x, w, targets = head_operands(config, tokens, torch.float32, requires_grad=True)
    with Allocations(x, w, targets) as seen:
        if head == "harmonic":
            loss = harmonic_loss(x, w, targets, 55.4)
        else:
            loss = torch.nn.functional.cross_entropy(inner_products(x, w), targets)
        loss.backward()
    planned = head_memory(config, tokens, FP32).dense
    # Gradients of x and w come when one of the score matrices is gone.
    assert planned - 2 * x.nbytes - w.nbytes <= seen.peak * 1.01 <= planned * 1.02


def test_autocast_adds_copies_of_the_operands():
    config, tokens = HGPTConfig(), 4096
    more = head_memory(config, tokens, AUTOCAST).peak - head_memory(config, tokens, BF16).peak
    assert more == tokens * 768 * 4 + 50304 * 768 * 2


# ---------------------------------------------------------------------------------------------------------------
# Engines


def totals(processes: int, precision: str = "bf16", checkpointing: bool = False) -> dict[str, plan.Memory]:
    config = HGPTConfig()
    counts = count_parameters(config)
    return {
        engine: memory_per_gpu(
            engine,
            config,
            counts,
            processes=processes,
            tokens=4096,
            precision=precision,
            checkpointing=checkpointing,
        )
        for engine in plan.ENGINES
    }


def test_bytes_per_parameter_under_each_engine():
    """Masters, gradients and moments are 16 bytes in float32 and 18 in bf16 ZeRO-1; what is shared falls with W."""
    P = 124_373_760
    found = {
        engine: tuple(round(size / P, 3) for size in (m.parameters, m.gradients, m.optimiser))
        for engine, m in totals(8).items()
    }
    assert found == {
        "ddp": (4, 4, 8),
        "zero1": (2, 6, 1.5),
        "zero2": (2, 0.5, 1.5),
        "zero2_offload": (2, 0, 0),
        "zero3": (0.25, 0.5, 1.5),
        "fsdp2": (0.5, 0.5, 1),
    }
    assert totals(8)["zero2_offload"].host == pytest.approx(2 * P)
    assert totals(8, "fp32")["zero1"].gradients == totals(8, "fp32")["zero2"].parameters == 4 * P


def test_total_is_the_sum_of_its_parts():
    for memory in totals(2).values():
        parts = (memory.parameters, memory.gradients, memory.optimiser, memory.buckets, memory.activations)
        assert memory.total == sum(parts) + memory.head
    checkpointed = totals(2, checkpointing=True)["ddp"]
    assert checkpointed.transient == max(checkpointed.head, checkpointed.block)


def test_more_processes_never_need_more():
    for engine in plan.ENGINES[1:]:
        sizes = [totals(w)[engine].total for w in (2, 4, 8, 64)]
        assert sizes == sorted(sizes, reverse=True)


def test_an_engine_that_is_none():
    with pytest.raises(ValueError, match="engine must be one of ddp, zero1"):
        memory_per_gpu(
            "zero4",
            tiny(),
            count_parameters(tiny()),
            processes=1,
            tokens=1,
            precision="bf16",
            checkpointing=False,
        )


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def shipped(monkeypatch):
    """In a checkout without data."""
    monkeypatch.chdir(ROOT)
    return ["--config", "configs/gpt2_small_harmonic.toml", "--data.path", "there/is/none"]


def test_report(shipped):
    text = plan.main([*shipped, "--gpus", "8", "--mfu", "0.4"])
    assert "note: there/is/none is not there (yet): vocabulary of 50,257 (GPT-2's), epochs unknown" in text
    assert re.search(r"^parameters +124,373,760$", text, re.M)
    assert re.search(r"^  token embedding +38,633,472  also the head's centres$", text, re.M)
    assert re.search(r"^  12 blocks +84,953,088$", text, re.M)
    assert "tokens per step  491,520 = 480 x 1,024; accumulation 5 x 12 sequences on each of 8" in text
    assert "600,000, 294.9 G tokens" in text and "epochs of" not in text
    flops = flops_per_token(HGPTConfig(), 1024)
    rate = 0.4 * 989e12 * 8 / flops
    assert f"{rate:,.0f} tokens/s" in text
    assert f"{600_000 * 491_520 / rate / 3600:.1f} hours at 40% MFU of 989 TFLOP/s" in text
    for engine in plan.ENGINES:
        assert re.search(rf"^  {engine} +[\d.]+", text, re.M)
    assert "warning" not in text
    assert max(map(len, text.splitlines())) <= 140


def test_nodes_multiply(shipped):
    text = plan.main([*shipped, "--gpus", "4", "--nodes", "2"])
    assert "on 2 nodes of 4 x NVIDIA H100" in text and "accumulation 5 x 12 sequences on each of 8" in text


def test_command_line_wins_and_reaches_the_run(shipped):
    text = plan.main([*shipped, "--train.precision", "fp32", "--gpus", "2", "--model.tie_word_embeddings", "false"])
    assert re.search(r"^  head +38,633,472$", text, re.M)
    assert "not estimated: peaks are known for bf16" in text and ", fp32," in text


def test_impossible_accumulation_is_the_error_of_train(shipped):
    with pytest.raises(UserError, match=r"train\.global_batch = 480 cannot be reached with train\.micro_batch = 12"):
        plan.main([*shipped, "--gpus", "7"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1; got 0"),
        (["--mfu", "40"], "--mfu is the share of the peak, above 0 and at most 1; got 40.0"),
        (["--memory", "0"], "--memory is the memory of a GPU in GiB, more than 0; got 0.0"),
        (["--gpu", "8"], "there is no setting gpu"),
        (["--train.micro_bach", "8"], "did you mean train.micro_batch"),
    ],
)
def test_bad_options(shipped, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan.main([*shipped, *options])


def test_what_does_not_fit_says_what_helps(shipped):
    text = plan.main([*shipped, "--gpus", "8", "--train.micro_batch", "60", "--device", "NVIDIA L4"])
    line = text.splitlines()[-1]
    assert re.fullmatch(
        r"warning: [\d.]+ GiB in the 22\.00 GiB of NVIDIA L4 does not fit; what helps: (--engine [\w, ]+ or )?"
        r"train\.activation_checkpointing = true \([\d.]+ GiB\) or a smaller train\.micro_batch",
        line,
    )
    assert "is tight" in plan.main([*shipped, "--gpus", "8", "--memory", "8.2"])


def test_unknown_device_gets_no_figures(shipped):
    text = plan.main([*shipped, "--gpus", "8", "--device", "NVIDIA B200"])
    assert "not estimated: the bf16 peak of 'NVIDIA B200' is not known" in text
    assert "warning: the memory of 'NVIDIA B200' is not known: give it with --memory GIB" in text


def test_a_distance_that_takes_days(shipped):
    tokens = 600_000 * 491_520
    for distance, traffic in (("manhattan", 11), ("canberra", 33)):
        text = plan.main([*shipped, "--gpus", "8", "--model.head.distance", distance])
        days = tokens * 50257 * 768 * traffic * 4 / 3350e9 / 8 / 86400
        assert f"distance         about {days:.1f} days besides for {distance}" in text
        assert f'warning: model.head.distance = "{distance}" visits every coordinate' in text
        assert f"about {days:.1f} days for 294.9 G tokens and 50,257 centres" in text
    assert "harmonic head (canberra), n = " in text
    for distance in ("cosine", "mahalanobis"):
        text = plan.main([*shipped, "--gpus", "8", "--model.head.distance", distance])
        assert "warning" not in text and "besides" not in text
    # A small run says what it takes and warns of nothing.
    small = ["--data.vocab_size", "512", "--train.steps", "3000"]
    text = plan.main([*shipped, "--model.head.distance", "manhattan", *small])
    assert "distance         about" in text and "warning" not in text
    # A GPU that is not known is at best an H100 here.
    assert plan.distance_seconds(tiny(distance="manhattan"), 1e9, "Mystery") == pytest.approx(
        1e9 * 300 * 128 * 11 * 4 / 3350e9
    )


def test_a_distance_that_takes_days_on_a_cpu_alone(shipped):
    settings = [*shipped, "--model.head.distance", "manhattan", "--train.steps", "2100"]
    settings += ["--train.global_batch", "16", "--train.micro_batch", "1"]
    on_gpu, on_cpu = (plan.main([*settings, "--device", device]) for device in ("NVIDIA H100", "cpu"))
    seconds = 2100 * 16 * 1024 * 50257 * 768 * 11 * 4 / 60e9
    assert f"about {seconds / 86400:.1f} days besides for manhattan" in on_cpu
    assert 'warning: model.head.distance = "manhattan" visits every' in on_cpu
    assert f"about {seconds * 60 / 3350 / 3600:.1f} hours besides for manhattan" in on_gpu
    assert "visits every" not in on_gpu


def test_memory_of_a_head_with_another_distance():
    euclid, cosine, manhattan = (
        head_memory(tiny(distance=distance), 96, AUTOCAST) for distance in ("euclidean", "cosine", "manhattan")
    )
    assert cosine.operands == euclid.operands + (96 + 320) * 128 * 8 and cosine.chunk == euclid.chunk
    assert manhattan.chunk == 512 * 2**20
    assert head_memory(tiny(distance="manhattan"), 96, AUTOCAST, distance_memory=3.0).chunk == 3 * 2**20
    options = {"metric": "full"}
    full = count_parameters(tiny(distance="mahalanobis", distance_options=options, tie_word_embeddings=True))
    assert full.head == 128 * 128


def test_zero3_with_compile(shipped):
    assert "zero3 does not work with train.compile = true" in plan.main([*shipped, "--gpus", "8", "--engine", "zero3"])


def write_data(folder: Path, tokens: int) -> None:
    folder.mkdir()
    splits = {}
    for split in ("train", "val"):
        with ShardWriter(folder, split) as writer:
            writer.write(np.arange(tokens) % 100)
        splits[split] = SplitMeta(tokens=tokens, documents=1, bytes=tokens, shards=writer.close())
    meta = DataMeta(tokenizer="t", vocab_size=100, end_of_text=0, splits=splits, source="s", packages={})
    write_meta(folder, meta)


def test_vocabulary_and_epochs_come_from_the_data(tmp_path, shipped):
    write_data(tmp_path / "data", 2049)
    options = ["--data.path", str(tmp_path / "data"), "--train.steps", "10", "--optim.warmup_steps", "0"]
    text = plan.main([*shipped, *options, "--train.global_batch", "12"])
    assert "vocabulary 100 in 128 rows" in text
    assert f"{10 * 12 * 1024 / 2049:.2f} epochs of 2,049" in text and "note:" not in text
    with pytest.raises(UserError, match="fewer than one sequence"):
        plan.main([*shipped, *options, "--data.seq_len", "4096"])
    (tmp_path / "data" / "meta.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"meta\.json"):
        plan.main([*shipped, *options])


def test_table(shipped):
    files = [f"configs/gpt2_{name}_harmonic.toml" for name in ("xl", "small")]
    lines = plan.main(["--gpus", "8", "--table", *files, *shipped[2:]]).splitlines()
    assert lines[0] == "| run | parameters | micro-batch | checkpointing | " + " | ".join(plan.ENGINES) + " |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| gpt2_small_harmonic", "| gpt2_xl_harmonic"]
    small = plan.make_plan(load_run_config(shipped), Launch(gpus=8))
    assert lines[2].split(" | ")[4] == f"{small.memory('ddp').total / GIB:.1f}"


def test_the_table_of_the_readme(monkeypatch):
    """As its command prints it, whether or not there is data (GPT-2's vocabulary either way)."""
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^python -m hgpt\.plan (.*--table) (configs/\S+)$", readme, re.M)
    files = sorted(str(path) for path in Path().glob(command[2]))
    assert len(files) == 4
    assert plan.main([*command[1].split(), *files, "--data.path", "there/is/none"]) in readme


def test_the_command_itself(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    command = ["plan.py", "--config", "configs/quickstart.toml", "--data.path", "there/is/none"]
    monkeypatch.setattr(sys, "argv", [*command, "--gpus", "3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(plan.__file__, run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: train.global_batch = 16 cannot be reached")
    monkeypatch.setattr(sys, "argv", [*command, "--gpus", "1"])
    runpy.run_path(plan.__file__, run_name="__main__")
    assert capsys.readouterr().out.startswith("quickstart: harmonic head (euclidean), n = ")
