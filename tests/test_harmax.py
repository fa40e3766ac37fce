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


def test_hand_worked_values_use_n_on_d_not_on_d_squared() -> None:
    x, w = torch.zeros(1, 1), torch.tensor([[1.0], [-2.0], [4.0]])
    d_sq = squared_distances(x, w)
    torch.testing.assert_close(d_sq, torch.tensor([[1.0, 4.0, 16.0]]))
    # n = 2: d^-2 = 1, 1/4, 1/16 with the sum 21/16. On d² it would be 1, 1/16, 1/256.
    torch.testing.assert_close(harmax(d_sq, 2.0), torch.tensor([[16 / 21, 4 / 21, 1 / 21]]))
    torch.testing.assert_close(log_harmax(d_sq, 2.0).exp(), torch.tensor([[16 / 21, 4 / 21, 1 / 21]]))
    torch.testing.assert_close(harmonic_scores(d_sq, 2.0), torch.tensor([[0.0, -math.log(4), -math.log(16)]]))
    torch.testing.assert_close(
        harmonic_loss(x, w, torch.tensor([1]), 2.0), torch.tensor(-math.log(4 / 21)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("exponent", [1.0, 5.0, 27.7, 1536.0])
@pytest.mark.parametrize(("dim", "rows"), [(D, V), (1, 9), (1, 2), (6, 2), (6, 1)])
def test_equals_cdist_in_float64(exponent: float, dim: int, rows: int) -> None:
    x, w = operands(dim=dim, rows=rows)
    d_sq = squared_distances(x, w)
    torch.testing.assert_close(d_sq, torch.cdist(x, w).square())
    expected = reference_log_harmax(x, w, exponent)
    torch.testing.assert_close(log_harmax(d_sq, exponent), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(harmax(d_sq, exponent), expected.exp(), rtol=1e-9, atol=1e-12)
    targets = torch.randint(rows, (N,))
    torch.testing.assert_close(harmonic_loss(x, w, targets, exponent), F.nll_loss(expected, targets))


def test_exponents_whose_powers_leave_float32() -> None:
    """d^(−n) underflows for each of these classes; log p does not, and every class gets a gradient."""
    x = torch.randn(N, 768)
    w = torch.randn(V, 768, requires_grad=True)
    n = resolve_exponent("dim", 768)
    assert (squared_distances(x, w) ** (-n / 2) == 0).all()
    expected = reference_log_harmax(x, w.detach(), n).float()
    torch.testing.assert_close(log_harmax(squared_distances(x, w), n), expected, rtol=0, atol=5e-3)
    harmonic_loss(x, w, torch.arange(N), n).backward()
    assert w.grad is not None and (w.grad[:N].norm(dim=-1) > 0).all()


def test_leading_dimensions_and_reductions() -> None:
    x, w = torch.randn(2, 3, D), torch.randn(V, D)
    targets = torch.tensor([[1, -100, 3], [4, 5, -100]])
    d_sq = squared_distances(x, w)
    assert d_sq.shape == (2, 3, V)
    torch.testing.assert_close(d_sq[1, 2], squared_distances(x[1, 2], w))
    each = harmonic_loss(x, w, targets, 3.0, reduction="none")
    assert each[1] == 0 and each[5] == 0
    torch.testing.assert_close(harmonic_loss(x, w, targets.where(targets >= 0, 9), 3.0, ignore_index=9), each.sum() / 4)


# Inverse


@pytest.mark.parametrize("exponent", [2.0, 27.7])
def test_inverse_recovers_the_distance_ratios(exponent: float) -> None:
    x, w = operands()
    d = torch.cdist(x, w)
    expected = d / d.amin(-1, keepdim=True)
    log_probs = log_harmax(squared_distances(x, w), exponent)
    torch.testing.assert_close(relative_distances(log_probs, exponent), expected)
    torch.testing.assert_close(relative_distances(log_probs + 7.0, exponent), expected)
    assert (relative_distances(log_probs, exponent).amin(-1) == 1).all()
    log_probs[:, 3] = -torch.inf  # a masked class
    assert (relative_distances(log_probs, exponent)[:, 3] == torch.inf).all()


def test_radii() -> None:
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


# Gradients


def test_gradcheck() -> None:
    x, w = (tensor.requires_grad_() for tensor in operands(dim=5, rows=7))
    targets = torch.randint(7, (N,))
    assert torch.autograd.gradcheck(squared_distances, (x, w))
    assert torch.autograd.gradcheck(lambda x, w: harmonic_loss(x, w, targets, 3.3), (x, w))


def test_gradient_is_the_formula_of_the_design() -> None:
    x, w = (tensor.requires_grad_() for tensor in operands())
    targets, n = torch.randint(V, (N,)), 5.0
    harmonic_loss(x, w, targets, n, reduction="sum").backward()
    with torch.no_grad():
        d_sq = torch.cdist(x, w).square()
        p = d_sq.pow(-n / 2) / d_sq.pow(-n / 2).sum(-1, keepdim=True)
        g = -n * (p - F.one_hot(targets, V)) / d_sq
        torch.testing.assert_close(x.grad, g.sum(1)[:, None] * x - g @ w)
        torch.testing.assert_close(w.grad, g.sum(0)[:, None] * w - g.T @ x)


# Invariances


def test_scale_translation_and_rotation_change_nothing() -> None:
    x, w = operands()
    expected = log_harmax(squared_distances(x, w), 6.5)
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q
    shift = torch.randn(D, dtype=torch.float64)
    for other_x, other_w in ((37 * x, 37 * w), (x + shift, w + shift), (x @ rotation, w @ rotation)):
        torch.testing.assert_close(log_harmax(squared_distances(other_x, other_w), 6.5), expected)
    assert not torch.allclose(log_harmax(squared_distances(x + shift, w), 6.5), expected, atol=0.1)


# Edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [2.0, 28.0, 768.0])
def test_x_on_its_centre(dtype: torch.dtype, exponent: float) -> None:
    w = torch.randn(V, D).to(dtype).requires_grad_()
    x = w[:N].detach().clone().requires_grad_()
    targets = torch.arange(N)
    loss = harmonic_loss(x, w, targets, exponent)
    assert 0 <= loss < 1e-4
    assert (squared_distances(x, w).gather(1, targets[:, None]) > 0).all()
    loss.backward()
    for grad in (x.grad, w.grad):
        assert grad is not None and grad.isfinite().all()
        assert grad.abs().max() < 1e-2
    # On a centre that is not the target, the loss is large and still finite.
    wrong = harmonic_loss(x, w, targets + 1, exponent)
    assert wrong.isfinite() and wrong > 5
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(wrong, (x, w)))


def test_a_clamped_entry_passes_no_gradient() -> None:
    w = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    x = w[:1].detach().clone().requires_grad_()
    d_sq = squared_distances(x, w)
    assert d_sq[0, 0] == distance_floor(x.detach().square().sum(-1, keepdim=True))
    grads = torch.autograd.grad(d_sq[0, 0], (x, w))
    assert all((grad == 0).all() for grad in grads)


def test_everything_zero() -> None:
    x, w = torch.zeros(3, D, requires_grad=True), torch.zeros(V, D, requires_grad=True)
    loss = harmonic_loss(x, w, torch.tensor([0, 1, 2]), 5.0)
    torch.testing.assert_close(loss, torch.tensor(math.log(V)))
    loss.backward()
    assert (x.grad == 0).all() and (w.grad == 0).all()


def test_one_centre_far_away() -> None:
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


def test_a_nan_stays_a_nan() -> None:
    """It must not be clamped into a small distance: the training loop stops on a loss that is not finite."""
    x, w = operands(torch.float32)
    w[3, 0] = torch.nan
    assert squared_distances(x, w)[:, 3].isnan().all()
    assert harmonic_loss(x, w, torch.zeros(N, dtype=torch.long), 3.0).isnan()


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"one dtype: x is torch.bfloat16, w is torch.float32"):
        squared_distances(torch.zeros(2, D, dtype=torch.bfloat16), torch.zeros(V, D))
    with pytest.raises(ValueError, match=r"one width: x is \(2, 5\), w is \(57, 24\)"):
        squared_distances(torch.zeros(2, 5), torch.zeros(V, D))


# Precision: D = 768 and n = 27.7 as in DESIGN.md §2, with a smaller vocabulary


def autocast_log_harmax(x: Tensor, w: Tensor, exponent: float) -> Tensor:
    """What autocast makes of the formula: norms of the float32 values, a product rounded to bfloat16."""
    product = (x.bfloat16() @ w.bfloat16().T).float()
    d_sq = x.square().sum(-1, keepdim=True) + w.square().sum(-1) - 2 * product
    return log_harmax(d_sq.clamp_min(1e-6), exponent)


@pytest.mark.parametrize(
    ("mean", "near", "float32_limit", "bfloat16_limit"),
    [(0, None, 1e-5, 6e-3), (0, 0.3, 1e-4, 3e-2), (3, None, 5e-5, 1.5e-2), (3, 0.3, 1e-3, 1e-1)],
)
def test_low_precision_errors(mean: float, near: float | None, float32_limit: float, bfloat16_limit: float) -> None:
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


def test_resolve_exponent() -> None:
    for given, expected in ((27.7, 27.7), (1536, 1536.0), ("27.7", 27.7), ("dim", 256.0), ("sqrt_dim", 16.0)):
        assert resolve_exponent(given, 256) == pytest.approx(expected)
    for given, expected in (("2*sqrt_dim", 32.0), (" 0.5 * dim ", 128.0), ("1e-1*dim", 25.6)):
        assert resolve_exponent(given, 256) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given",
    [0, -1.0, "-2*dim", "0*dim", math.inf, math.nan, "nan", "", "sqrt", "dim*2", "2*", "two*dim", "1.2.3*dim"],
)
def test_resolve_exponent_refuses(given: float | str) -> None:
    with pytest.raises(ValueError, match=r'must be a positive number, "dim", "sqrt_dim" or a multiple') as error:
        resolve_exponent(given, 256)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 1024, 2500])
def test_squared_norms(rows: int, dtype: torch.dtype) -> None:
    w = torch.randn(rows, 37).to(dtype)
    found = squared_norms(w)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), w.double().square().sum(-1), rtol=1e-6, atol=0)
    tracked = squared_norms(w.requires_grad_())
    torch.testing.assert_close(tracked, found, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(tracked.sum(), w)[0], 2 * w.detach())
