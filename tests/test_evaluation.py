"""hgpt/run/evaluation.py: validation loss and the head's diagnostics against float64, torch.cdist and other counts."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import Stream

from hgpt.errors import UserError
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import EvalConfig
from hgpt.run.evaluation import Evaluation, evaluation_windows

VOCAB, T = 61, 8
HEADS = pytest.mark.parametrize("head", ["harmonic", "softmax"])


class OneOf:
    """The engine of one process of several; what it would add up with the others is kept."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.accelerator = rank, world_size, self

    def autocast(self):
        return nullcontext()

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.share = tensor
        return tensor

    def unwrap_model(self, model):
        return model


def evaluation(shards: Stream, micro_batch: int = 2, windows: int = 100) -> Evaluation:
    settings = EvalConfig(micro_batch=micro_batch, diagnostic_windows=windows)
    return Evaluation(shards, shards, SimpleNamespace(eval=settings, data=SimpleNamespace(seq_len=T)))


def evaluate(model, shards: Stream, **settings) -> dict[str, float]:
    return evaluation(shards, **settings)(model, 0, OneOf()).values


def stream(tokens: int) -> Stream:
    return Stream(np.random.RandomState(3).randint(0, VOCAB, tokens).astype(np.uint16), split="val")


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
    inputs, y = tokens[:-1], tokens[1:]  # every token but the first is a target, once
    hidden = [exact.transformer(window[None], use_cache=False).last_hidden_state[0] for window in inputs.split(T)]
    x = torch.cat(hidden).detach()
    d = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
    p = d**-model.config.exponent if model.config.head == "harmonic" else (x @ centres.T).exp()
    a = torch.zeros(1) if exact.lm_head.log_weight is None else exact.lm_head.log_weight[:VOCAB].detach()
    p = p * a.exp()
    p = p / p.sum(-1, keepdim=True)
    return {"x": x, "y": y, "d": d, "p": p, "loss": -p.gather(-1, y[:, None]).log().mean(), "w": centres, "a": a}


@HEADS
@pytest.mark.parametrize("tokens", [T + 1, 5 * T + 2, 6 * T + 4])
@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 1), (1, 3), (1, 100), (2, 5), (3, 2), (9, 1)])
def test_validation_loss_is_the_mean_over_every_token(head, tokens, processes, micro_batch):
    model, shards = small_model(head).eval(), stream(tokens)
    exact, passes, forward_passes = exactly(model, shards)["loss"].item(), [], set()
    model.register_forward_hook(lambda *_: passes.append(1))
    shares = torch.zeros(2, dtype=torch.float64)
    for rank in range(processes):
        process = OneOf(rank, processes)
        passes.clear()
        evaluation(shards, micro_batch).loss(model, process)
        shares += process.share
        forward_passes.add(len(passes))
    assert len(forward_passes) == 1  # or a process waits for the others for ever
    assert shares[1] == len(shards) - 1 and exact > 1
    assert float(shares[0] / shares[1]) == pytest.approx(exact, rel=2e-6)


def test_validation_loss_is_not_smoothed():
    # A target of probability 1e-12: with 0.01/V mixed into every probability the loss would be below log(100 V) = 8.7.
    model = small_model()
    config = model.config
    with torch.no_grad():
        model.lm_head.weight[1] += 100.0
    shards = Stream(np.array([0] + [1] * T, dtype=np.uint16))
    loss = evaluate(model, shards)["loss"]
    assert loss == pytest.approx(exactly(model, shards)["loss"].item(), rel=1e-5)
    assert loss > np.log(100 * config.vocab_size) + 5


@pytest.mark.parametrize("radius", ["none", "learned"])
@HEADS
def test_diagnostics(head, radius):
    model, shards = small_model(head, radius=radius), stream(6 * T + 4)
    truth = exactly(model, shards)
    found = evaluate(model, shards)  # more windows than there are: all
    x, y, d, w = truth["x"], truth["y"], truth["d"], truth["w"]
    expected = {"loss": truth["loss"], "accuracy": (truth["p"].argmax(-1) == y).double().mean()}
    for name, vectors in (("x", x), ("w", w)):
        expected |= {f"{name}_norm_mean": vectors.norm(dim=-1).mean(), f"{name}_norm_max": vectors.norm(dim=-1).max()}
    if head == "harmonic":
        median = d.quantile(0.5, dim=-1)  # V is odd: a distance that occurs
        expected["target_over_median_distance"] = (d.gather(-1, y[:, None])[:, 0] / median).mean()
        expected["nearest_over_median_distance"] = (d.amin(-1) / median).mean()
    if radius == "learned":
        expected |= {"log_weight_mean": truth["a"].mean(), "log_weight_std": truth["a"].std()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name


def test_diagnostics_with_a_learnt_exponent():
    """Ratios of distances do not depend on n: it must be the head's own, and not the one it started from."""
    fixed, learnt, shards = small_model(), small_model(learn_exponent=True), stream(3 * T)
    learnt.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        learnt.lm_head.log_exponent.fill_(2.0)
    expected, found = evaluate(fixed, shards), evaluate(learnt, shards)
    assert found.pop("exponent") == pytest.approx(np.exp(2.0))
    assert found.pop("loss") != expected.pop("loss")
    assert found == pytest.approx(expected, rel=1e-5)


def test_diagnostics_take_windows_from_all_over_the_split():
    shards = stream(100 * T + 1)
    read = []
    shards.read = lambda start, stop: read.append(start // T) or shards.tokens[start:stop]
    evaluation(shards, windows=4).diagnostics(small_model(), OneOf())
    assert read == [0, 25, 50, 75]


def test_padding_rows_are_in_no_figure():
    plain, padded = (small_model(pad_vocab_to_multiple_of=rows, radius="learned") for rows in (1, 64))
    weights = plain.state_dict()
    weights["lm_head.log_weight"] = torch.cat([weights["lm_head.log_weight"], torch.full((3,), 1e3)])
    weights["transformer.wte.weight"] = torch.cat([weights["transformer.wte.weight"], torch.full((3, 16), 1e3)])
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    padded.load_state_dict(weights)
    shards = stream(3 * T)
    assert evaluate(plain, shards) == pytest.approx(evaluate(padded, shards), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_is_learnt(training):
    model, shards = small_model(), stream(3 * T)
    model.train(training)
    generator = torch.get_rng_state()
    evaluate(model, shards)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)  # evaluating more often changes no run


def test_split_shorter_than_a_sequence():
    assert [evaluation_windows(stream(n), T) for n in (9, 10, 17, 18)] == [1, 2, 2, 3]
    with pytest.raises(UserError, match=r"the val split has 8 tokens.*seq_len \+ 1 = 9\..*lower data\.seq_len to 7"):
        evaluation(stream(8))


def test_diagnostics_compile_no_forward_pass_of_their_own():
    """Only the validation loss runs compiled code, whatever the windows of the diagnostics are."""
    model, data = small_model(), stream(50)
    expected = evaluate(model, data)
    torch.compiler.reset()
    graphs = []
    model.transformer.h.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    loss = evaluation(data).loss
    model.eval()
    loss(model, OneOf())
    of_the_loss = len(graphs)
    found = evaluate(model, data)
    assert found == pytest.approx(expected) and len(graphs) == of_the_loss > 0
