"""hgpt/run/evaluation.py: validation loss and the head's diagnostics against float64, torch.cdist and other counts."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import EvalConfig
from hgpt.run.evaluation import evaluation_windows, head_diagnostics, validation_loss

VOCAB, T = 61, 8
HEADS = pytest.mark.parametrize("head", ["harmonic", "softmax"])


@dataclass
class Stream:
    """What an evaluation needs of `TokenShards`."""

    tokens: np.ndarray
    folder: Path = Path("data/x")
    split: str = "val"

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


class OneOf:
    """One process of several, as `Accelerator` shows it; what it would add up with the others is kept."""

    device = torch.device("cpu")

    def __init__(self, process_index: int = 0, num_processes: int = 1) -> None:
        self.process_index, self.num_processes = process_index, num_processes

    def autocast(self):
        return nullcontext()

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.share = tensor
        return tensor

    def unwrap_model(self, model):
        return model


def stream(tokens: int) -> Stream:
    return Stream(np.random.RandomState(3).randint(0, VOCAB, tokens).astype(np.uint16))


def small_model(head: str = "harmonic", **settings) -> HGPTForCausalLM:
    config = HGPTConfig(
        vocab_size=VOCAB, n_positions=T, n_embd=16, n_layer=2, n_head=2, head=head, dropout=0.5, bias=True, **settings
    )
    model = HGPTForCausalLM(config)
    with torch.no_grad():  # away from the almost uniform start, and biases that do something
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


def exactly(model: HGPTForCausalLM, shards: Stream) -> dict[str, torch.Tensor]:
    """Hidden states, targets and distances (or logits) of all targets, window by window, in float64."""
    exact = copy.deepcopy(model).double().eval()
    centres = exact.lm_head.weight[:VOCAB].detach()
    tokens = torch.from_numpy(shards.tokens.astype(np.int64))
    hidden, targets = [], []
    for start in range(0, len(tokens) - 1, T):
        inputs = tokens[start : start + T]
        inputs = inputs[: len(tokens) - 1 - start]
        hidden.append(exact.transformer(inputs[None], use_cache=False).last_hidden_state[0].detach())
        targets.append(tokens[start + 1 : start + 1 + len(inputs)])
    x, y = torch.cat(hidden), torch.cat(targets)
    assert y.tolist() == tokens[1:].tolist()  # every token but the first, once
    if model.config.head == "harmonic":
        d = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
        p = d**-model.config.exponent
        p = p / p.sum(-1, keepdim=True)
    else:
        d, p = x @ centres.T, (x @ centres.T).softmax(-1)
    return {"x": x, "y": y, "d": d, "loss": -p.gather(-1, y[:, None]).log().mean(), "w": centres}


@HEADS
@pytest.mark.parametrize("tokens", [T + 1, 5 * T + 1, 5 * T + 2, 6 * T])
def test_validation_loss_is_the_mean_over_every_token(head, tokens):
    model, shards = small_model(head), stream(tokens)
    expected = exactly(model, shards)["loss"].item()
    assert expected > 1
    for micro_batch in (1, 3, 6, 100):
        loss = validation_loss(model, shards, seq_len=T, micro_batch=micro_batch, accelerator=OneOf())
        assert loss == pytest.approx(expected, rel=2e-6)


def test_validation_loss_is_not_smoothed():
    # A target of probability 1e-12: with 0.01/V mixed into every probability the loss would be below log(100 V) = 8.7.
    model = small_model()
    config = model.config
    with torch.no_grad():
        model.lm_head.weight[1] += 100.0
    shards = Stream(np.array([0] + [1] * T, dtype=np.uint16))
    loss = validation_loss(model, shards, seq_len=T, micro_batch=1, accelerator=OneOf())
    assert loss == pytest.approx(exactly(model, shards)["loss"].item(), rel=1e-5)
    assert loss > np.log(100 * config.vocab_size) + 5


@HEADS
@pytest.mark.parametrize("processes", [2, 3, 4, 9])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_validation_loss_does_not_depend_on_the_number_of_processes(head, processes, micro_batch):
    model, shards = small_model(head), stream(6 * T + 4)  # 7 windows, the last one short
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    shares = torch.zeros(2, dtype=torch.float64)
    forward_passes = set()
    for rank in range(processes):
        process = OneOf(rank, processes)
        passes.clear()
        validation_loss(model, shards, seq_len=T, micro_batch=micro_batch, accelerator=process)
        shares += process.share
        forward_passes.add(len(passes))
    assert len(forward_passes) == 1  # or a process waits for the others for ever
    assert shares[1] == len(shards) - 1
    assert float(shares[0] / shares[1]) == pytest.approx(exactly(model, shards)["loss"].item(), rel=2e-6)


def test_with_accelerate_itself():
    model, shards = small_model(), stream(3 * T + 5)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    loss = validation_loss(prepared, shards, seq_len=T, micro_batch=2, accelerator=accelerator)
    assert loss == pytest.approx(exactly(model, shards)["loss"].item(), rel=2e-6)
    assert head_diagnostics(prepared, shards, seq_len=T, windows=2, accelerator=accelerator)["accuracy"] >= 0


@HEADS
def test_diagnostics(head):
    model, shards = small_model(head), stream(6 * T + 4)
    truth = exactly(model, shards)
    found = head_diagnostics(model, shards, seq_len=T, windows=100, accelerator=OneOf())  # more than there are: all
    x, y, d, w = truth["x"], truth["y"], truth["d"], truth["w"]
    expected = {
        "accuracy": ((d.argmin(-1) if head == "harmonic" else d.argmax(-1)) == y).double().mean(),
        "x_norm_mean": x.norm(dim=-1).mean(),
        "x_norm_max": x.norm(dim=-1).max(),
        "w_norm_mean": w.norm(dim=-1).mean(),
        "w_norm_max": w.norm(dim=-1).max(),
    }
    if head == "harmonic":
        median = d.quantile(0.5, dim=-1)  # V is odd: a distance that occurs
        expected["target_over_median_distance"] = (d.gather(-1, y[:, None])[:, 0] / median).mean()
        expected["nearest_over_median_distance"] = (d.amin(-1) / median).mean()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name


def test_diagnostics_with_a_learnt_exponent():
    """Ratios of distances do not depend on n: it must be the head's own, and not the one it started from."""
    fixed, learnt, shards = small_model(), small_model(learn_exponent=True), stream(3 * T)
    learnt.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        learnt.lm_head.log_exponent.fill_(2.0)
    expected, found = (
        head_diagnostics(model, shards, seq_len=T, windows=9, accelerator=OneOf()) for model in (fixed, learnt)
    )
    assert found.pop("exponent") == pytest.approx(np.exp(2.0))
    assert found == pytest.approx(expected, rel=1e-5)


def test_diagnostics_take_windows_from_all_over_the_split():
    shards = stream(100 * T + 1)
    read = []
    shards.read = lambda start, stop: read.append(start // T) or shards.tokens[start:stop]
    head_diagnostics(small_model(), shards, seq_len=T, windows=4, accelerator=OneOf())
    assert read == [0, 25, 50, 75]


def test_padding_rows_are_in_no_figure():
    plain, padded = small_model(pad_vocab_to_multiple_of=1), small_model(pad_vocab_to_multiple_of=64)
    weights = plain.state_dict()
    weights["transformer.wte.weight"] = torch.cat([weights["transformer.wte.weight"], torch.full((3, 16), 1e3)])
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    padded.load_state_dict(weights)
    shards = stream(3 * T)
    for function, settings in ((validation_loss, {"micro_batch": 2}), (head_diagnostics, {"windows": 9})):
        one, other = (function(m, shards, seq_len=T, accelerator=OneOf(), **settings) for m in (plain, padded))
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_is_learnt(training):
    model, shards = small_model(), stream(3 * T)
    model.train(training)
    generator = torch.get_rng_state()
    validation_loss(model, shards, seq_len=T, micro_batch=2, accelerator=OneOf())
    head_diagnostics(model, shards, seq_len=T, windows=2, accelerator=OneOf())
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)  # evaluating more often changes no run


def test_split_shorter_than_a_sequence():
    assert [evaluation_windows(stream(n), T) for n in (9, 10, 17, 18)] == [1, 2, 2, 3]
    with pytest.raises(UserError, match=r"the val split has 8 tokens.*data\.seq_len \+ 1 = 9\. Lower data\.seq_len"):
        evaluation_windows(stream(8), T)


@pytest.mark.parametrize("name", ["every", "micro_batch", "diagnostic_windows"])
def test_settings_out_of_range(name):
    with pytest.raises(UserError, match=f"eval.{name} must be at least 1; got 0"):
        EvalConfig(**{name: 0})
