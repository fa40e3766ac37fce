"""harmax.py against float64, torch.cdist, hand-worked values and its own invariances."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hgpt.model.harmax import (
    distance_floor,
    harmax,
    harmonic_loss,
    harmonic_scores,
    log_harmax,
    relative_distances,
    resolve_exponent,
    squared_distances,
    squared_norms,
)

D, V, N = 24, 57, 19


def operands(dtype: torch.dtype = torch.float64, dim: int = D, rows: int = V) -> tuple[Tensor, Tensor]:
    return torch.randn(N, dim, dtype=dtype), torch.randn(rows, dim, dtype=dtype)


def reference_log_harmax(x: Tensor, w: Tensor, exponent: float) -> Tensor:
    """log of d^(−n) / Σ d^(−n), from torch.cdist's distances by differences, in float64."""
    d = torch.cdist(x.double(), w.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return F.log_softmax(-exponent * d.log(), dim=-1)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


# Values


def test_hand_worked_values_use_n_on_d_not_on_d_squared():
    x, w, p = torch.zeros(1, 1), torch.tensor([[1.0], [-2.0], [4.0]]), torch.tensor([[16 / 21, 4 / 21, 1 / 21]])
    d_sq = squared_distances(x, w)
    torch.testing.assert_close(d_sq, torch.tensor([[1.0, 4.0, 16.0]]))
    # n = 2: d^-2 = 1, 1/4, 1/16 with the sum 21/16. On d² it would be 1, 1/16, 1/256.
    torch.testing.assert_close(harmax(d_sq, 2.0), p)
    torch.testing.assert_close(log_harmax(d_sq, 2.0), p.log())
    torch.testing.assert_close(harmonic_scores(d_sq, 2.0), torch.tensor([[0.0, -math.log(4), -math.log(16)]]))


@pytest.mark.parametrize("exponent", [1.0, 27.7, 1536.0])
@pytest.mark.parametrize(("dim", "rows"), [(D, V), (1, 9), (6, 1)])
def test_equals_cdist_in_float64(exponent, dim, rows):
    x, w = operands(dim=dim, rows=rows)
    d, d_sq = torch.cdist(x, w), squared_distances(x, w)
    torch.testing.assert_close(d_sq, d.square())
    expected = reference_log_harmax(x, w, exponent)
    log_p = log_harmax(d_sq, exponent)
    torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(harmax(d_sq, exponent), expected.exp(), rtol=1e-9, atol=1e-12)
    targets = torch.randint(rows, (N,))
    torch.testing.assert_close(harmonic_loss(x, w, targets, exponent), F.nll_loss(expected, targets))
    # And back, from log p or scores; a masked class is infinitely far away.
    ratios = d / d.amin(-1, keepdim=True)
    for shift in (0.0, 7.0):
        torch.testing.assert_close(relative_distances(log_p + shift, exponent), ratios)
    assert (relative_distances(F.pad(log_p, (0, 1), value=-torch.inf), exponent)[:, -1] == torch.inf).all()


def test_exponents_whose_powers_leave_float32():
    """d^(−n) underflows for each of these classes; log p does not, and every class gets a gradient."""
    x = torch.randn(N, 768)
    w = torch.randn(V, 768, requires_grad=True)
    n = resolve_exponent("dim", 768)
    assert (squared_distances(x, w) ** (-n / 2) == 0).all()
    expected = reference_log_harmax(x, w.detach(), n).float()
    torch.testing.assert_close(log_harmax(squared_distances(x, w), n), expected, rtol=0, atol=5e-3)
    harmonic_loss(x, w, torch.arange(N), n).backward()
    assert w.grad is not None and (w.grad[:N].norm(dim=-1) > 0).all()


# Radii


def test_radii():
    """By hand: twice the radius is half the distance, in the probabilities and in what is read from them."""
    d_sq, radii, n = torch.tensor([[1.0, 4.0, 16.0]]), torch.tensor([1.0, 2.0, 1.0]), 2.0
    p = harmax(d_sq, n, n * radii.log())
    torch.testing.assert_close(p, torch.tensor([[16 / 33, 16 / 33, 1 / 33]]))
    torch.testing.assert_close(log_harmax(d_sq, n, n * radii.log()), p.log())
    torch.testing.assert_close(relative_distances(p.log(), n, n * radii.log()), d_sq.sqrt())
    torch.testing.assert_close(relative_distances(p.log(), n), torch.tensor([[1.0, 1.0, 4.0]]))
    for log_weight in (torch.zeros(4), torch.zeros(1)):
        with pytest.raises(ValueError, match="each of the 3 classes of log_probs"):
            relative_distances(p.log(), n, log_weight)


# Edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [2.0, 28.0, 768.0])
def test_x_on_its_centre(dtype, exponent):
    w = torch.randn(V, D).to(dtype).requires_grad_()
    x, targets = w[:N].detach().clone().requires_grad_(), torch.arange(N)
    own = squared_distances(x, w).gather(1, targets[:, None])
    torch.testing.assert_close(own, distance_floor(squared_norms(x.detach())[:, None]))
    assert all((grad == 0).all() for grad in torch.autograd.grad(own.sum(), (x, w)))  # clamped: no gradient
    loss = harmonic_loss(x, w, targets, exponent)
    assert 0 <= loss < 1e-4 and all(grad.abs().max() < 1e-2 for grad in torch.autograd.grad(loss, (x, w)))
    # On a centre that is not the target, the loss is large and still finite.
    wrong = harmonic_loss(x, w, targets + 1, exponent)
    assert wrong.isfinite() and wrong > 5
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(wrong, (x, w)))


def test_everything_zero():
    x, w = torch.zeros(3, D, requires_grad=True), torch.zeros(V, D, requires_grad=True)
    loss = harmonic_loss(x, w, torch.tensor([0, 1, 2]), 5.0)
    torch.testing.assert_close(loss, torch.tensor(math.log(V)))
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, w)))


def test_one_centre_far_away():
    x, w = operands(torch.float32)
    near = log_harmax(squared_distances(x, w), 5.0)
    w_far = torch.cat([w, torch.full((1, D), 1e15)]).requires_grad_()
    log_p = log_harmax(squared_distances(x, w_far), 5.0)
    torch.testing.assert_close(log_p[:, :V], near)  # neither clamped away nor disturbed
    expected = reference_log_harmax(x, w_far.detach(), 5.0)[:, V]
    torch.testing.assert_close(log_p[:, V].double(), expected, rtol=1e-5, atol=0)
    loss = harmonic_loss(x, w_far, torch.full((N,), V), 5.0)
    loss.backward()
    assert loss.isfinite() and w_far.grad is not None and w_far.grad.isfinite().all()


def test_operands_that_do_not_fit():
    with pytest.raises(ValueError, match=r"same dtype: x is torch.bfloat16, w is torch.float32"):
        squared_distances(torch.zeros(2, D, dtype=torch.bfloat16), torch.zeros(V, D))
    with pytest.raises(ValueError, match=r"same width: x is \(2, 5\), w is \(57, 24\)"):
        squared_distances(torch.zeros(2, 5), torch.zeros(V, D))


# Precision: D = 768 and n = 27.7 as in DESIGN.md §2, with a smaller vocabulary


@pytest.mark.parametrize(
    ("mean", "near", "float32_limit", "bfloat16_limit"),
    [(0, None, 1e-5, 6e-3), (0, 0.3, 1e-4, 3e-2), (3, None, 5e-5, 1.5e-2), (3, 0.3, 1e-3, 1e-1)],
)
def test_low_precision_errors(mean, near, float32_limit, bfloat16_limit):
    """x and w of unit spread around a common mean of spread `mean`; some centres as near as `near` to their x.

    The limits are about three times the errors measured.
    """
    common = mean * torch.randn(768)
    x, w = (torch.randn(rows, 768) + common for rows in (8, 2048))
    if near is not None:
        w[:8] = x + near * torch.randn(8, 768)
    expected = reference_log_harmax(x, w, 27.7)
    assert rms(log_harmax(squared_distances(x, w), 27.7) - expected) < float32_limit
    # On values that are bfloat16 already, the formula must be as good as in float32 ...
    rounded_x, rounded_w = x.bfloat16(), w.bfloat16()
    low = log_harmax(squared_distances(rounded_x, rounded_w), 27.7)
    assert rms(low - reference_log_harmax(rounded_x, rounded_w, 27.7)) < float32_limit
    # ... so that the rounding of the operands is all that is lost.
    assert rms(low - expected) < bfloat16_limit
    # What autocast makes of the formula would not pass: norms of float32 values, a product rounded to bfloat16.
    if mean or near:
        product = (rounded_x @ rounded_w.T).float()
        d_sq = x.square().sum(-1, keepdim=True) + w.square().sum(-1) - 2 * product
        assert rms(log_harmax(d_sq.clamp_min(1e-6), 27.7) - expected) > 5 * bfloat16_limit


# Exponents


def test_resolve_exponent():
    numbers = {27.7: 27.7, 1536: 1536.0, "27.7": 27.7}
    multiples = {"dim": 256.0, "sqrt_dim": 16.0, "2*sqrt_dim": 32.0, " 0.5 * dim ": 128.0, "1e-1*dim": 25.6}
    for given, expected in (numbers | multiples).items():
        assert resolve_exponent(given, 256) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given",
    [0, -1.0, "-2*dim", "0*dim", math.inf, math.nan, "nan", "", "sqrt", "dim*2", "2*", "two*dim", "1.2.3*dim"],
)
def test_resolve_exponent_refuses(given):
    with pytest.raises(ValueError, match=r'must be a positive number, "dim", "sqrt_dim" or a multiple') as error:
        resolve_exponent(given, 256)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 1024, 2500])
def test_squared_norms(rows, dtype):
    w = torch.randn(rows, 37).to(dtype)
    found = squared_norms(w)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), w.double().square().sum(-1), rtol=1e-6, atol=0)
    tracked = squared_norms(w.requires_grad_())
    torch.testing.assert_close(tracked, found, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(tracked.sum(), w)[0], 2 * w.detach())
