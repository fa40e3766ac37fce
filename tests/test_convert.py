"""python -m hgpt.convert: the lift of a softmax layer, of whole models, and what is refused."""

import pytest
import torch
from small_models import TEXT, byte_pairs, export, prepare
from test_harmonized import CAUSAL, IDS, MASKED, V, plain
from transformers import AutoModelForCausalLM

import hgpt
from hgpt.convert import Softmax, balance, best_lift, compare, last_layer, lift, lifted_model, main, with_linear_output
from hgpt.errors import UserError
from hgpt.interpret.models import loaded
from hgpt.model.harmonized import output_embedding
from hgpt.source import find_source


@pytest.fixture
def softmax() -> Softmax:
    """Logits of a standard deviation of about 6, with hidden states far from the origin and unequal coordinates."""
    torch.manual_seed(0)
    w, mix = torch.randn(50, 12).double() @ torch.randn(12, 12).double() / 3, torch.randn(12, 12).double() / 3
    return Softmax(w=w + 1, b=torch.randn(50).double(), h=torch.randn(400, 12).double() @ mix + 2)


def test_the_lift_is_exact_in_the_limit_and_its_error_is_of_first_order(softmax):
    balanced = balance(softmax)
    expected = (softmax.h @ softmax.w.T + softmax.b).softmax(-1)

    def error(n: float) -> float:
        found = lift(balanced, n)
        d = torch.cdist(softmax.h @ found.matrix.T + found.offset, found.centres)
        return float(((found.log_weight - n * d.log()).softmax(-1) - expected).abs().max())

    assert error(1e7) < 1e-4
    assert error(1e5) / error(1e6) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("n", [1.0, 1e3])
def test_what_is_constant_is_exact_for_every_exponent(n):
    """Where x·u_i = 0 and |x|² is at its mean, the scores are the a_i, also of centres with r_i = 0 (n = 1)."""
    torch.manual_seed(1)
    few = Softmax(w=torch.randn(5, 12).double(), b=torch.randn(5).double(), h=torch.randn(400, 12).double())
    balanced = balance(few)
    x = balanced.x_sq.sqrt() * torch.linalg.svd(balanced.u).Vh[-1]
    found = lift(balanced, n)
    assert bool((found.centres[:, -1] == 0).all()) == (n == 1)
    scores = found.log_weight - n * (found.centres - torch.cat((x, x.new_zeros(1)))).norm(dim=1).log()
    torch.testing.assert_close(scores - scores.mean(), balanced.a - balanced.a.mean())


def test_balanced_means_are_equal_and_chosen_lifts_are_the_better_ones(softmax):
    balanced = balance(softmax)
    x, u = (softmax.h - softmax.h.mean(0)) @ balanced.t, balanced.u
    assert float(x.square().sum(1).mean()) == pytest.approx(float(u.square().sum(1).mean()), rel=1e-6)
    w = softmax.w - softmax.w.mean(0)
    torch.testing.assert_close(x @ u.T, (softmax.h - softmax.h.mean(0)) @ w.T)
    for n in (10.0, 30.0):
        chosen = compare(softmax, best_lift(softmax, balanced, n), softmax.h)
        assert chosen[0] < compare(softmax, lift(balanced, n), softmax.h)[0]


def softmax_backbone():
    torch.manual_seed(2)
    shape = {"vocab_size": V - 5, "head": "softmax", "radius": "learned", "final_norm_gain": 0.7}
    model = hgpt.HarmonizedForCausalLM(hgpt.HarmonizedConfig(backbone=CAUSAL["llama"].to_dict(), **shape))
    torch.nn.init.normal_(model.lm_head.log_weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, "a softmax head on a backbone"])
def test_a_converted_model_predicts_what_it_did(name):
    before = (softmax_backbone() if name not in CAUSAL | MASKED else plain(name)).double()
    with torch.no_grad():
        expected = before(IDS).logits[..., :V].softmax(-1)
        classes = expected.shape[-1]  # the rest is padding
        model, seen = with_linear_output(before), []
        hook = output_embedding(model).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        torch.testing.assert_close(model(IDS).logits[..., :classes].softmax(-1), expected)
        hook.remove()
        layer = last_layer(model, seen[0].flatten(0, 1))
        found = lifted_model(model, lift(balance(layer), 1e8))(IDS).logits.softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders with a GPT-2, a harmonic model and data of the same tokenizer, and data of another one."""
    folder, backend = tmp_path_factory.mktemp("convert"), byte_pairs(300)
    export(folder / "gpt2", backend, "gpt2")
    export(folder / "harmonic", backend, "harmonic")
    prepare(folder / "data", backend)
    prepare(folder / "other", byte_pairs(280), TEXT)
    return folder


def test_the_command_prints_a_table_and_saves_the_model(places, tmp_path):
    printed = main([str(places / "gpt2"), "--data", str(places / "data"), "--out", str(tmp_path / "new")])
    rows = [line.split() for line in printed.splitlines()[2:7]]
    divergences = [float(row[2]) for row in rows]
    assert divergences == sorted(divergences, reverse=True) and divergences[-1] < 1e-4
    assert float(rows[0][0]) == pytest.approx(4 * 32**0.5, rel=1e-3)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "A gpt2 backbone with a harmonic head, made by hgpt.convert" in card and "width 32" in card
    assert f"| converted from | {places / 'gpt2'} |" in card and f"of validation | {rows[0][2]} nats |" in card
    assert f"| top-1 agreement | {rows[0][3]} |" in card and "x = L h + b has one coordinate more" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    before = AutoModelForCausalLM.from_pretrained(places / "gpt2")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (before, model))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 10 * divergences[0] + 1e-3
    assert (model.config.exponent, model.config.radius) == (pytest.approx(4 * 32**0.5), "learned")
    with loaded(find_source(str(tmp_path / "new")), torch.device("cpu")) as found:  # as hgpt.interpret does
        states = found.hidden_states(ids)
        assert {state.shape for state in states} == {(1, 20, 33)}
        torch.testing.assert_close(found.logits(states[-1][0]).log_softmax(-1), q[0])
        assert found.final_norm(states[1]).shape == (1, 20, 33)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        ("harmonic", "data", [], "already has a harmonic head"),
        ("gpt2", "other", [], "MODEL = .*: its tokenizer is not"),
        ("gpt2", "data", ["--exponent", "many"], "exponent .* 'many'"),
        ("gpt2", "data", ["--positions", "0"], "--positions must be at least 1"),
        ("gpt2", "data", ["--out", "."], "already exists"),
    ],
)
def test_what_cannot_be_converted_is_refused(places, tmp_path, model, data, options, message):
    with pytest.raises(UserError, match=message):
        main([str(places / model), "--data", str(places / data), "--out", str(tmp_path / "new"), *options])
    assert not (tmp_path / "new").exists()
