"""hgpt/interpret/positions.py: every number against float64 arithmetic on the whole matrix."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hgpt.interpret.measures.lens import logit_lens
from hgpt.interpret.models import LoadedModel, Source
from hgpt.interpret.positions import distance_measures, log_probability_measures, measure_text
from hgpt.model.configuration_hgpt import HGPTConfig
from hgpt.model.modeling_hgpt import HGPTForCausalLM

VOCAB, T, LAYERS = 61, 12, 2


class Words:
    """What `LoadedModel` needs of a tokenizer here: nothing."""


def model_of(kind: str) -> LoadedModel:
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=T, n_embd=16, n_layer=LAYERS, n_head=2))
    else:
        model = HGPTForCausalLM(
            HGPTConfig(vocab_size=VOCAB, n_positions=T, n_embd=16, n_layer=LAYERS, n_head=2, head=kind)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return LoadedModel(Source(label=kind, folder=kind), model, Words(), torch.device("cpu"))


def windows(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, count * T + 5)
    parts = [tokens[start : start + T + 1] for start in range(0, len(tokens) - 1, T)]
    return [(part[:-1], part[1:]) for part in parts]


@pytest.mark.parametrize("kind", ["harmonic", "softmax", "gpt2"])
def test_every_measure_is_that_of_the_whole_matrix(kind, monkeypatch):
    monkeypatch.setattr("hgpt.interpret.positions.CHUNK", 5)  # chunks that end inside windows
    loaded = model_of(kind)
    text = windows(4)
    seen = []
    found = measure_text(loaded, text, sample=20, seed=0, advance=seen.append)
    exact = loaded.model.double()
    x, y, window = [], [], []
    for number, (inputs, targets) in enumerate(text):
        with torch.no_grad():
            x.append(exact.transformer(torch.from_numpy(inputs)[None]).last_hidden_state[0])
        y.append(torch.from_numpy(targets))
        window += [number] * len(inputs)
    x, y = torch.cat(x), torch.cat(y)
    w = exact.lm_head.weight[:VOCAB].detach()
    d = torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist")
    logits = -loaded.exponent * d.log() if kind == "harmonic" else x @ w.T
    p = logits.softmax(-1)
    own = d.gather(1, y[:, None])[:, 0]
    others = d.scatter(1, y[:, None], float("inf")).amin(1)
    expected = {
        "loss": -p.gather(1, y[:, None])[:, 0].log(),
        "confidence": p.amax(1),
        "correct": p.argmax(1) == y,
        "top5": (p.topk(5).indices == y[:, None]).any(1),
        "entropy": -(p * p.log()).sum(1),
        "nearest": d.argmin(1) == y,
        "log_margin": (others / own).log(),
        "target_ratio": own / d.quantile(0.5, dim=1),  # V is odd: a distance that occurs
        "target": y,
        "window": torch.tensor(window),
    }
    for name, values in expected.items():
        measured = getattr(found.positions, name)
        assert measured.astype(float) == pytest.approx(values.double().numpy(), rel=2e-4, abs=2e-5), name
    assert sum(seen) == len(y)
    if kind == "harmonic":
        assert (found.positions.nearest == found.positions.correct).all()

    assert found.sample.shape == (LAYERS + 1, 20, 16)
    assert found.sample[-1] == pytest.approx(x[found.sample_at].numpy(), abs=1e-4)


def test_the_lens_reads_the_last_layer_as_the_model_does_and_earlier_ones_through_the_final_norm(monkeypatch):
    monkeypatch.setattr("hgpt.interpret.measures.lens.CHUNK", 5)
    loaded = model_of("harmonic")
    found = measure_text(loaded, windows(3), sample=1000, seed=0)
    positions = found.positions
    lens = logit_lens(loaded, found.sample, positions.target[found.sample_at])
    assert [layer["layer"] for layer in lens] == [0, 1, 2]
    last = {"loss": positions.loss, "accuracy": positions.correct, "target_ratio": positions.target_ratio}
    for name, values in last.items():
        assert lens[-1][name] == pytest.approx(values.mean(), rel=1e-5)
    assert lens[-1]["loss_error"] == pytest.approx(positions.loss.std(ddof=1) / len(positions.loss) ** 0.5, rel=1e-4)
    x = torch.from_numpy(found.sample[1])
    logits = loaded.model.lm_head(loaded.model.transformer.ln_f(x)).double()
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(positions.target[found.sample_at]))
    assert lens[1]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_window_sums():
    found = measure_text(model_of("softmax"), windows(3), sample=4, seed=0).positions
    sums, sizes = found.window_sums(found.loss)
    assert sizes.tolist() == [T, T, T, 4]
    assert sums[1] == pytest.approx(found.loss[T : 2 * T].sum())


def test_measures_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]))
    found = log_probability_measures(logits, torch.tensor([1, 2]))
    assert found["loss"].tolist() == pytest.approx([np.log(4), 0])
    assert found["entropy"].tolist() == pytest.approx([1.5 * np.log(2), 0])  # a masked class has no entropy
    assert found["correct"].tolist() == [False, True]
    log_d = torch.log(torch.tensor([[1.0, 2.0, 4.0]]))
    near = distance_measures(log_d, torch.tensor([0]))
    assert near["log_margin"].item() == pytest.approx(np.log(2))
    assert near["target_ratio"].item() == pytest.approx(0.5)
    assert near["nearest"].item()
    far = distance_measures(log_d, torch.tensor([2]))
    assert far["log_margin"].item() == pytest.approx(-np.log(4))
    assert not far["nearest"].item()
