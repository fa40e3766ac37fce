"""hgpt/interpret/positions.py and the logit lens: every number against float64 arithmetic on the whole matrix."""

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


@pytest.mark.parametrize("kind", ["harmonic", "softmax", "gpt2"])
def test_every_measure_is_that_of_the_whole_matrix(kind, monkeypatch):
    monkeypatch.setattr("hgpt.interpret.positions.CHUNK", 5)  # chunks that end inside windows
    sizes = {"vocab_size": VOCAB, "n_positions": T, "n_embd": 16, "n_layer": LAYERS, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes)) if kind == "gpt2" else HGPTForCausalLM(HGPTConfig(**sizes, head=kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    loaded = LoadedModel(Source(label=kind, folder=kind), model, object(), torch.device("cpu"))
    tokens = np.random.default_rng(0).integers(0, VOCAB, 4 * T + 5)
    text = [(tokens[at : at + T], tokens[at + 1 : at + T + 1]) for at in range(0, 4 * T, T)] + [
        (tokens[-5:-1], tokens[-4:])
    ]
    seen = []
    found = measure_text(loaded, text, sample=1000, seed=0, advance=seen.append)
    few = measure_text(loaded, text, sample=20, seed=0)
    positions = found.positions
    lens = logit_lens(loaded, found.sample, positions.target[found.sample_at])

    exact = loaded.model.double()
    with torch.no_grad():
        hidden = [exact.transformer(torch.from_numpy(inputs)[None], output_hidden_states=True) for inputs, _ in text]
    x = torch.cat([output.last_hidden_state[0] for output in hidden])
    y = torch.from_numpy(np.concatenate([targets for _, targets in text]))
    w = exact.lm_head.weight[:VOCAB].detach()
    d = torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist")
    logits = -loaded.exponent * d.log() if kind == "harmonic" else x @ w.T
    p = logits.softmax(-1)
    own = d.gather(1, y[:, None])[:, 0]
    expected = {
        "loss": -p.gather(1, y[:, None])[:, 0].log(),
        "confidence": p.amax(1),
        "correct": p.argmax(1) == y,
        "top5": (p.topk(5).indices == y[:, None]).any(1),
        "entropy": -(p * p.log()).sum(1),
        "nearest": d.argmin(1) == y,
        "log_margin": (d.scatter(1, y[:, None], float("inf")).amin(1) / own).log(),
        "target_ratio": own / d.quantile(0.5, dim=1),  # V is odd: a distance that occurs
        "target": y,
        "window": torch.arange(len(y)) // T,
    }
    for name, values in expected.items():
        measured = getattr(positions, name)
        assert measured.astype(float) == pytest.approx(values.double().numpy(), rel=2e-4, abs=2e-5), name
    assert sum(seen) == len(y) == 4 * T + 4 and found.windows == 5
    assert positions.window_sums(positions.loss)[1] == pytest.approx(positions.loss[T : 2 * T].sum())
    if kind == "harmonic":
        assert (positions.nearest == positions.correct).all()
    assert few.sample.shape == (LAYERS + 1, 20, 16) and set(few.sample_at) < set(found.sample_at)
    assert few.sample[-1] == pytest.approx(x[few.sample_at].numpy(), abs=1e-4)

    # The lens reads the last layer as the model does, and earlier ones through the final norm.
    assert [layer["layer"] for layer in lens] == [0, 1, 2]
    last = {"loss": positions.loss, "accuracy": positions.correct, "target_ratio": positions.target_ratio}
    assert {name: lens[-1][name] for name in last} == pytest.approx({k: v.mean() for k, v in last.items()}, rel=1e-5)
    assert lens[-1]["loss_error"] == pytest.approx(positions.loss.std(ddof=1) / len(positions.loss) ** 0.5, rel=1e-4)
    middle = torch.cat([output.hidden_states[1][0] for output in hidden])
    loss = torch.nn.functional.cross_entropy(exact.lm_head(exact.transformer.ln_f(middle))[:, :VOCAB], y)
    assert lens[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_measures_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]))
    found = log_probability_measures(logits, torch.tensor([1, 2]))
    assert found["loss"].tolist() == pytest.approx([np.log(4), 0])
    assert found["entropy"].tolist() == pytest.approx([1.5 * np.log(2), 0])  # a masked class has no entropy
    log_d = torch.log(torch.tensor([[1.0, 2.0, 4.0]])).expand(2, 3)
    found = {name: values.tolist() for name, values in distance_measures(log_d, torch.tensor([0, 2])).items()}
    assert found["log_margin"] == pytest.approx([np.log(2), -np.log(4)]) and found["nearest"] == [True, False]
    assert found["target_ratio"] == pytest.approx([0.5, 2])
