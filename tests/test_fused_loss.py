"""The fused losses against the dense references in float64: values, gradients, memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hgpt.model import loss as fused_loss_module
from hgpt.model.harmax import harmonic_loss
from hgpt.model.loss import chunk_positions, fused_harmonic_loss, fused_softmax_loss

# Awkward on purpose: no size is a multiple of a vector width or of the chunk.
N, V, D, CHUNK, EXPONENT = 252, 507, 123, 64, 2 * math.sqrt(123)
EVEN = 22.0  # an exponent whose powers are multiplied out on a CPU; half of it is 1011 in binary digits


class Problem(NamedTuple):
    x: Tensor  # (N, D)
    w: Tensor  # (V, D)
    targets: Tensor  # (N,)

    def to(self, dtype: torch.dtype) -> "Problem":
        x, w = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.w))
        return Problem(x, w, self.targets)


def make_problem(mean: float = 0.0, planted: bool = True) -> Problem:
    """Some targets ignored; some positions exactly on their target's centre, some on another's."""
    common = mean * torch.randn(D)
    x, w = torch.randn(N, D) + common, torch.randn(V, D) + common
    targets = torch.randint(V, (N,))
    if planted:
        x[:8] = w[targets[:8]]
        x[8:12] = w[(targets[8:12] + 1) % V]
    targets[5::11] = -100
    return Problem(x, w, targets)


class Result(NamedTuple):
    loss: Tensor
    grad_x: Tensor
    grad_w: Tensor


def differentiate(loss_of: Callable[..., Tensor], problem: Problem, **kwargs: Any) -> Result:
    loss = loss_of(*problem, **kwargs)
    return Result(loss.detach(), *torch.autograd.grad(loss, problem[:2]))


def fused(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return fused_harmonic_loss(x, w, targets, EXPONENT, **({"chunk": CHUNK} | kwargs))


def dense(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return harmonic_loss(x, w, targets, EXPONENT, **kwargs)


def fused_even(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return fused_harmonic_loss(x, w, targets, EVEN, **({"chunk": CHUNK} | kwargs))


def dense_even(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return harmonic_loss(x, w, targets, EVEN, **kwargs)


def fused_softmax(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return fused_softmax_loss(x, w, targets, **({"chunk": CHUNK} | kwargs))


def dense_softmax(x: Tensor, w: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    return F.cross_entropy(F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets, **kwargs)


BOTH = pytest.mark.parametrize(
    ("fused_loss", "dense_loss"),
    [(fused, dense), (fused_even, dense_even), (fused_softmax, dense_softmax)],
    ids=["harmonic", "even", "softmax"],
)
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


# Values and gradients


@BOTH
def test_equals_the_dense_reference_in_float64(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem().to(torch.float64)
    for value, expected in zip(differentiate(fused_loss, problem), differentiate(dense_loss, problem), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize(
    ("mean", "scale"), [(0.0, 1.0), (3.0, 1.0), (10.0, 1.0), (0.0, 0.02), (0.0, 30.0), (0.0, 1000.0), (3.0, 30.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_dense_in_the_same_dtype(
    fused_loss: Callable, dense_loss: Callable, dtype: torch.dtype, mean: float, scale: float
) -> None:
    """Both against float64 on the same (rounded) values; `scale` is that of x, whose norm need not be w's."""
    problem = make_problem(mean, planted=False)
    problem = problem._replace(x=(problem.x.detach() * scale).requires_grad_()).to(dtype)
    truth = differentiate(dense_loss, problem.to(torch.float64))
    ours, theirs = differentiate(fused_loss, problem), differentiate(dense_loss, problem)
    assert ours.loss.dtype == torch.float32 and ours.grad_x.dtype == ours.grad_w.dtype == dtype
    assert relative_error(ours.loss, truth.loss) < relative_error(theirs.loss, truth.loss) + 1e-6
    for name in ("grad_x", "grad_w"):
        our_error, their_error = (relative_error(getattr(r, name), getattr(truth, name)) for r in (ours, theirs))
        assert our_error < 1.3 * their_error + 1e-6


@pytest.mark.parametrize("fused_loss, dense_loss", [(fused, dense), (fused_even, dense_even)], ids=["harmonic", "even"])
def test_what_x_and_w_have_in_common_costs_bfloat16_nothing(fused_loss: Callable, dense_loss: Callable) -> None:
    """Distances do not see it; the dense loss's rounded gradients do."""
    errors = []
    for mean in (0.0, 10.0):
        problem = make_problem(mean, planted=False).to(torch.bfloat16)
        truth = differentiate(dense_loss, problem.to(torch.float64))
        errors.append([relative_error(*pair) for pair in zip(differentiate(fused_loss, problem), truth, strict=True)])
    assert all(with_mean < 1.2 * without for without, with_mean in zip(*(row[1:] for row in errors), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_planted_zero_distances(dtype: torch.dtype) -> None:
    problem = make_problem().to(dtype)
    ours = differentiate(fused, problem)
    assert all(value.isfinite().all() for value in ours)
    torch.testing.assert_close(ours.loss, dense(*problem).detach(), rtol=1e-5, atol=0)
    # Pairs at distance zero are clamped in either, and all others have their gradient: what those of the dense loss in
    # float32 are on the same values, but for the rounding to this type. Of the sum, for float16's range ends above the
    # gradients of the mean.
    summed = differentiate(fused, problem, reduction="sum")
    expected = differentiate(dense, problem.to(torch.float32), reduction="sum")
    for name in ("grad_x", "grad_w"):
        error = relative_error(getattr(summed, name), getattr(expected, name).double())
        assert error < 2e-6 + torch.finfo(dtype).eps, name
    # On their own centre: no loss and no gradient.
    on_centre = Problem(problem.x[:5], problem.w, problem.targets[:5]).to(dtype)
    result = differentiate(fused, on_centre)
    assert 0 <= result.loss < 1e-4
    assert result.grad_x.abs().max() < 1e-3 and result.grad_w.abs().max() < 1e-3


def test_float16_up_to_its_largest_values() -> None:
    """Its range ends at 65504: twice an entry lies beyond, and no distance may be computed from that."""
    problem = make_problem(planted=False).to(torch.float16)
    with torch.no_grad():
        problem.x[0, 0], problem.w[problem.targets[0], 0] = 4e4, 3.9e4
        problem.x[1, 3], problem.w[7, 3] = -6e4, 6e4
    expected = differentiate(dense, problem.to(torch.float64), reduction="sum")
    for value, reference in zip(differentiate(fused, problem, reduction="sum"), expected, strict=True):
        assert relative_error(value, reference) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("n", [2.0, 4.0, 6.0, 36.0, 256.0, 1022.0, 1536.0])
def test_even_exponents(n: float, spread: float, dtype: torch.dtype) -> None:
    """Powers by multiplication, against float64 by logarithms. With the spread most are far too small for float32,
    those of the targets too, whose loss and gradient must not be lost."""
    x, w, targets = make_problem(planted=False)
    problem = Problem(x * (1 + spread * torch.rand(N, 1)), w * (1 + spread * torch.rand(V, 1)), targets).to(dtype)

    def losses(loss_of: Callable[..., Tensor], dtype: torch.dtype) -> Result:
        return differentiate(lambda x, w, y: loss_of(x, w, y, n, reduction="sum"), problem.to(dtype))

    truth, theirs, ours = (
        losses(harmonic_loss, torch.float64),
        losses(harmonic_loss, dtype),
        losses(fused_harmonic_loss, dtype),
    )
    for value, other, exact in zip(ours, theirs, truth, strict=True):
        bound = 1e-12 if dtype == torch.float64 else relative_error(other, exact) + torch.finfo(value.dtype).eps
        assert relative_error(value, exact) < bound
    counted = targets != -100
    assert (ours.grad_x[counted].norm(dim=-1) > 0.5 * truth.grad_x[counted].norm(dim=-1)).all()


def test_gradcheck() -> None:
    x, w = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    targets = torch.tensor([0, 1, 2, -100, 4, 0, 1])
    for loss_of in (fused, fused_even, fused_softmax):
        assert torch.autograd.gradcheck(lambda x, w, f=loss_of: f(x, w, targets, chunk=3, num_classes=5), (x, w))
        assert torch.autograd.gradcheck(lambda x, w, f=loss_of: 3 * f(x, w, targets, num_items=2), (x, w))


@pytest.mark.parametrize("chunk", [1, 7, 64, 252, 1000, None])
@BOTH
def test_the_chunk_changes_nothing(fused_loss: Callable, dense_loss: Callable, chunk: int | None) -> None:
    problem = make_problem().to(torch.float64)
    for value, expected in zip(
        differentiate(fused_loss, problem, chunk=chunk), differentiate(dense_loss, problem), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 64, 100, 507, 600])  # 1: as many as positions
@BOTH
def test_the_rows_of_a_product_change_nothing(
    fused_loss: Callable, dense_loss: Callable, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss_module, "_PRODUCT_ROWS", rows)
    problem = make_problem().to(torch.float64)
    for value, expected in zip(differentiate(fused_loss, problem), differentiate(dense_loss, problem), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0])
@RECOMPUTE
def test_what_comes_after_the_loss_scales_its_gradients(recompute: bool, factor: float) -> None:
    problem = make_problem().to(torch.float64)
    scaled = differentiate(
        lambda *operands, **kwargs: fused(*operands, **kwargs) * factor, problem, recompute=recompute
    )
    for value, expected in zip(scaled, differentiate(dense, problem), strict=True):
        torch.testing.assert_close(value, expected * factor, rtol=1e-9, atol=1e-12)


def test_default_chunk_fits_its_memory() -> None:
    assert chunk_positions(50304) == 384
    assert chunk_positions(50304, torch.bfloat16) == 384  # the scores are float32 either way
    assert chunk_positions(50304, torch.float64) == 192
    assert chunk_positions(10**7) == 64
    assert chunk_positions(50304, torch.bfloat16, "cuda") == 2624


# Targets, divisors, padding


@BOTH
@pytest.mark.parametrize("num_items", [None, 7])
def test_all_ignored(fused_loss: Callable, dense_loss: Callable, num_items: int | None) -> None:
    problem = make_problem().to(torch.float32)
    result = differentiate(fused_loss, problem._replace(targets=problem.targets * 0 - 100), num_items=num_items)
    assert all((value == 0).all() for value in result)


def test_no_positions() -> None:
    problem = make_problem().to(torch.float32)
    assert fused(problem.x[:0], problem.w, problem.targets[:0]) == 0


@BOTH
@pytest.mark.parametrize("num_items", [100, torch.tensor(100)])
def test_num_items_divides_the_sum(fused_loss: Callable, dense_loss: Callable, num_items: int | Tensor) -> None:
    """Two micro-batches with the divisor of both together are the whole batch."""
    problem = make_problem().to(torch.float64)
    whole = differentiate(fused_loss, problem, num_items=num_items)
    counted = (problem.targets != -100).sum()
    torch.testing.assert_close(whole.loss, dense_loss(*problem).detach() * counted / 100)
    x, w, targets = problem
    halves = sum(fused_loss(x[part], w, targets[part], num_items=num_items) for part in (slice(90), slice(90, N)))
    torch.testing.assert_close(halves, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(halves, w)[0], whole.grad_w)


@BOTH
def test_ignore_index_is_a_parameter(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem().to(torch.float64)
    renamed = problem.targets.where(problem.targets >= 0, 3)
    expected = dense_loss(problem.x, problem.w, renamed.where(renamed != 3, -100))
    torch.testing.assert_close(fused_loss(problem.x, problem.w, renamed, ignore_index=3), expected)


@BOTH
def test_an_ignored_position_may_hold_anything_finite(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem()
    expected = differentiate(fused_loss, problem.to(torch.float32))
    problem.x[5::11] = 1e4
    result = differentiate(fused_loss, problem.to(torch.float32))
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grad_w, expected.grad_w)
    assert (result.grad_x[5::11] == 0).all()


@BOTH
@pytest.mark.parametrize("padding", ["zeros", "huge", "on the hidden states"])
def test_padding_rows_change_nothing(fused_loss: Callable, dense_loss: Callable, padding: str) -> None:
    problem = make_problem()
    rows = {"zeros": torch.zeros(5, D), "huge": torch.full((5, D), 1e3), "on the hidden states": problem.x[:5]}
    padded = problem._replace(w=torch.cat([problem.w, rows[padding]]))
    expected = differentiate(fused_loss, problem.to(torch.float32))
    result = differentiate(fused_loss, padded.to(torch.float32), num_classes=V)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grad_x, expected.grad_x)
    torch.testing.assert_close(result.grad_w[:V], expected.grad_w)
    assert (result.grad_w[V:] == 0).all()


@BOTH
def test_a_target_among_the_padding_is_not_a_silent_loss(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem().to(torch.float32)
    assert fused_loss(problem.x, problem.w, problem.targets * 0 + V - 1, num_classes=V - 1).isinf()
    with pytest.raises((IndexError, RuntimeError)):
        fused_loss(problem.x, problem.w, problem.targets * 0 + V)


@BOTH
@pytest.mark.parametrize("where", ["x", "w"])
def test_a_nan_reaches_the_loss(fused_loss: Callable, dense_loss: Callable, where: str) -> None:
    problem = make_problem()
    getattr(problem, where)[0, 0] = torch.nan
    assert fused_loss(*problem).isnan()


# Autograd


@BOTH
def test_frozen_operands(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem().to(torch.float64)
    expected = differentiate(dense_loss, problem)
    x, w, targets = problem
    (grad_x,) = torch.autograd.grad(fused_loss(x, w.detach(), targets), x)
    (grad_w,) = torch.autograd.grad(fused_loss(x.detach(), w, targets), w)
    torch.testing.assert_close(grad_x, expected.grad_x)
    torch.testing.assert_close(grad_w, expected.grad_w)
    loss = fused_loss(x.detach(), w.detach(), targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.loss)
    with torch.no_grad():
        torch.testing.assert_close(fused_loss(x, w, targets), expected.loss)


@BOTH
def test_non_contiguous_operands_and_leading_dimensions(fused_loss: Callable, dense_loss: Callable) -> None:
    problem = make_problem().to(torch.float64)
    expected = differentiate(dense_loss, problem)
    x = problem.x.detach().T.contiguous().T.requires_grad_()
    w = problem.w.detach().repeat_interleave(2, 0)[::2].requires_grad_()
    assert not x.is_contiguous() and not w.is_contiguous()
    folded = fused_loss(x.view(4, 63, D), w, problem.targets.view(4, 63))
    grads = torch.autograd.grad(folded, (x, w))
    for value, reference in zip((folded.detach(), *grads), expected, strict=True):
        torch.testing.assert_close(value, reference)


@BOTH
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(fused_loss: Callable, dense_loss: Callable, threads: int, dtype: torch.dtype) -> None:
    problem = make_problem().to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = (differentiate(fused_loss, problem) for _ in range(4))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(value, again) for value, again in zip(first, other, strict=True))


@RECOMPUTE
def test_backward_twice_through_one_graph(recompute: bool) -> None:
    problem = make_problem().to(torch.float32)
    loss = fused(*problem, recompute=recompute)
    first = torch.autograd.grad(loss, problem.w, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, problem.w)[0], first)


@RECOMPUTE
def test_a_second_derivative_is_refused(recompute: bool) -> None:
    problem = make_problem().to(torch.float64)
    loss = fused(*problem, recompute=recompute)
    with pytest.raises(RuntimeError, match=r"no second derivative.*cross_entropy on its logits"):
        torch.autograd.grad(loss, problem.x, create_graph=True)


@BOTH
@RECOMPUTE
@pytest.mark.parametrize("operand", ["x", "w"])
def test_forward_mode_is_refused(fused_loss: Callable, dense_loss: Callable, recompute: bool, operand: str) -> None:
    problem = make_problem()

    def loss(value: Tensor) -> Tensor:
        return fused_loss(*problem._replace(**{operand: value}), recompute=recompute)

    value = getattr(problem, operand)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*cross_entropy on its logits"):
        torch.func.jvp(loss, (value,), (torch.ones_like(value),))


@BOTH
@RECOMPUTE
def test_autocast_has_no_effect(fused_loss: Callable, dense_loss: Callable, recompute: bool) -> None:
    problem = make_problem().to(torch.float32)
    expected = differentiate(fused_loss, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = differentiate(fused_loss, problem, recompute=recompute)
    assert all(torch.equal(value, reference) for value, reference in zip(result, expected, strict=True))


# Options


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@RECOMPUTE
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_options_equal_the_dense_reference_in_float64(
    fused_loss: Callable, dense_loss: Callable, reduction: str, recompute: bool, label_smoothing: float
) -> None:
    problem = make_problem().to(torch.float64)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    value, expected = fused_loss(*problem, **options, recompute=recompute), dense_loss(*problem, **options)
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(expected)  # of either sign
    for ours, theirs in zip(
        torch.autograd.grad(value, problem[:2], upstream),
        torch.autograd.grad(expected, problem[:2], upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@BOTH
@pytest.mark.parametrize("options", [{"recompute": True}, {"label_smoothing": 0.1}, {"reduction": "none"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options_are_no_less_accurate_than_dense(
    fused_loss: Callable, dense_loss: Callable, options: dict[str, Any], dtype: torch.dtype
) -> None:
    def summed(loss_of: Callable, **kept: Any) -> Callable:
        return lambda *operands, **options: loss_of(*operands, **kept, **options).sum()

    problem = make_problem(planted=False).to(dtype)
    dense_options = {name: value for name, value in options.items() if name != "recompute"}
    truth = differentiate(summed(dense_loss, **dense_options), problem.to(torch.float64))
    ours = differentiate(summed(fused_loss, **options), problem)
    theirs = differentiate(summed(dense_loss, **dense_options), problem)
    for name, tolerance in (("loss", 1e-6), ("grad_x", torch.finfo(dtype).eps), ("grad_w", torch.finfo(dtype).eps)):
        our_error, their_error = (relative_error(getattr(r, name), getattr(truth, name)) for r in (ours, theirs))
        assert our_error < their_error + tolerance


@BOTH
@RECOMPUTE
def test_float16_gradients_survive_a_large_batch_under_a_loss_scale(
    fused_loss: Callable, dense_loss: Callable, recompute: bool
) -> None:
    """Divided by a million tokens they lie below float16's range, times the loss scale within it."""
    problem = make_problem(planted=False).to(torch.float16)
    expected = differentiate(lambda *operands: dense_loss(*operands, reduction="sum"), problem.to(torch.float64))

    def scaled(*operands: Tensor) -> Tensor:
        return fused_loss(*operands, num_items=10**6, recompute=recompute) * 10**6

    result = differentiate(scaled, problem)
    assert relative_error(result.grad_x, expected.grad_x) < 1e-3
    assert relative_error(result.grad_w, expected.grad_w) < 1e-3


@BOTH
@RECOMPUTE
def test_smoothing_spreads_over_the_classes_and_not_the_padding(
    fused_loss: Callable, dense_loss: Callable, recompute: bool
) -> None:
    problem = make_problem().to(torch.float64)
    padded = Problem(problem.x, torch.cat([problem.w, problem.x[:5]]), problem.targets).to(torch.float64)
    expected = differentiate(dense_loss, problem, label_smoothing=0.2)
    result = differentiate(fused_loss, padded, label_smoothing=0.2, num_classes=V, recompute=recompute)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grad_x, expected.grad_x)
    torch.testing.assert_close(result.grad_w[:V], expected.grad_w)
    assert (result.grad_w[V:] == 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}])
def test_gradient_of_the_exponent(options: dict[str, Any], label_smoothing: float) -> None:
    planted, problem = make_problem(), make_problem(planted=False)

    def grads(problem: Problem, loss_of: Callable, dtype: torch.dtype, **kwargs: Any) -> tuple[Tensor, ...]:
        padded = torch.cat([problem.w, torch.zeros(5, D)])
        n = torch.tensor(EXPONENT, dtype=dtype, requires_grad=True)
        x, w = (t.to(dtype).requires_grad_() for t in (problem.x, padded if "chunk" in kwargs else problem.w))
        loss = loss_of(x, w, problem.targets, n, label_smoothing=label_smoothing, **kwargs).sum()
        return torch.autograd.grad(loss, (n, x))

    fused_options = {"chunk": CHUNK, "num_classes": V, **options}
    reduction = {"reduction": "none"} if "reduction" in options else {}
    expected = grads(planted, harmonic_loss, torch.float64, **reduction)
    for value, truth in zip(grads(planted, fused_harmonic_loss, torch.float64, **fused_options), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)
    # Without the distances of zero, at which the floor of float32 decides the gradient by n.
    truth = grads(problem, harmonic_loss, torch.float64, **reduction)[0]
    ours = grads(problem, fused_harmonic_loss, torch.float32, **fused_options)[0]
    theirs = grads(problem, harmonic_loss, torch.float32, **reduction)[0]
    assert ours.dtype == torch.float32
    assert relative_error(ours, truth) < relative_error(theirs, truth) + 1e-6


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exponent_that_is_trained_alone(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is as accurate as the dense one with operands of any dtype, and no other is computed."""
    problem = make_problem(planted=False).to(dtype)
    smoothing = {name: value for name, value in options.items() if name == "label_smoothing"}

    def gradient(loss_of: Callable, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        x, w = (tensor.detach().to(dtype) for tensor in problem[:2])
        n = torch.tensor(EXPONENT, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        return torch.autograd.grad(loss_of(x, w, problem.targets, n, **kwargs), n)[0]

    truth = gradient(harmonic_loss, torch.float64, **smoothing)
    dense_gradient = gradient(harmonic_loss, dtype, **smoothing)
    wanted = []
    inside = fused_loss_module._losses_and_grads
    monkeypatch.setattr(fused_loss_module, "_losses_and_grads", lambda *args: wanted.append(args[-3:]) or inside(*args))
    ours = gradient(fused_harmonic_loss, dtype, chunk=CHUNK, **options)
    assert wanted[-1] == (False, False, True)
    assert relative_error(ours, truth) < relative_error(dense_gradient, truth) + 1e-6


def test_everything_at_the_origin_stays_finite() -> None:
    """x = w = 0, where the floor of d² is not relative to |x|²; a third such x belongs to another centre."""
    problem = make_problem(planted=False)
    problem.x[:3] = 0
    problem.w[:2] = 0
    problem.targets[:3] = torch.tensor([0, 1, 2])
    expected = differentiate(dense, problem.to(torch.float32))
    for kwargs in ({}, {"recompute": True}):
        for value, reference in zip(differentiate(fused, problem.to(torch.float32), **kwargs), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6)


def test_options_that_do_not_fit() -> None:
    problem = make_problem()
    for options, message in (
        ({"chunk": 0}, "chunk must be at least 1 position; got 0"),
        ({"reduction": "average"}, "reduction must be one of mean, sum, none; got 'average'"),
        ({"reduction": "sum", "num_items": 3}, "num_items divides the sum of reduction=\"mean\".*no effect with 'sum'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\); got 1.0"),
        ({"num_classes": 0}, f"num_classes must lie between 1 and the rows of w, {V}; got 0"),
        ({"num_classes": V + 1}, f"num_classes must lie between 1 and the rows of w, {V}; got {V + 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(*problem, **options)
    for exponent in (0, -2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"exponent must be a positive number; got {exponent}"):
            fused_harmonic_loss(*problem, exponent)


@pytest.mark.parametrize("exponent", [2.0**20, 2.0**20 + 2, 2.0**40])
def test_huge_exponents(exponent: float) -> None:
    problem = make_problem(planted=False).to(torch.float32)
    expected = differentiate(lambda *p: harmonic_loss(*p, exponent), problem.to(torch.float64))
    for value, reference in zip(
        differentiate(lambda *p: fused_harmonic_loss(*p, exponent), problem), expected, strict=True
    ):
        assert relative_error(value, reference) < 1e-5


# The loss within other machinery


@BOTH
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}])
def test_torch_checks_the_operator(fused_loss: Callable, dense_loss: Callable, options: dict[str, Any]) -> None:
    """Schema, fake tensors and AOT dispatch of the custom operators, by torch's own checks."""
    problem = make_problem().to(torch.float32)
    calls: list[tuple] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "fused_loss" in func.namespace:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        fused_loss(*problem, **options)
    ((operator, arguments),) = calls
    arguments = tuple(
        argument.detach().requires_grad_() if isinstance(argument, Tensor) and i < 2 else argument
        for i, argument in enumerate(arguments)
    )
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@BOTH
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}, {"label_smoothing": 0.1}])
def test_compiles_without_a_graph_break(fused_loss: Callable, dense_loss: Callable, options: dict[str, Any]) -> None:
    problem = make_problem().to(torch.float32)

    def step(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return fused_loss(torch.tanh(x) * 2, w * 2, targets, **options).sum()

    expected = differentiate(step, problem)
    torch.compiler.reset()  # one function's recompilations are limited, over all parametrisations
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value, reference in zip(differentiate(compiled, problem), expected, strict=True):
        torch.testing.assert_close(value, reference)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*problem), expected.loss)


@pytest.fixture
def compiled_graphs() -> Callable[[], int]:
    """How many graphs torch.compile has compiled since the test began."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiling_what_follows_the_products_changes_nothing(
    fused_loss: Callable, dense_loss: Callable, options: dict[str, Any], dtype: torch.dtype, compiled_graphs: Callable
) -> None:
    for positions in (N, 128, 40, 230):  # chunks of several sizes, some after larger ones
        x, w, targets = make_problem()
        problem = Problem(x[:positions], w, targets[:positions]).to(dtype)
        expected = differentiate(fused_loss, problem, **options)
        found = differentiate(fused_loss, problem, compiled=True, **options)
        for value, reference in zip(found, expected, strict=True):
            assert relative_error(value, reference.double()) < 1e-5 + torch.finfo(dtype).eps
    sizes = 4  # of chunks: 64, and the last ones of 60, 40 and 38
    assert compiled_graphs() == sizes * (2 if options.get("recompute") else 1)


@pytest.mark.slow
def test_every_size_of_chunk_is_compiled(compiled_graphs: Callable) -> None:
    """More of them than torch.compile compiles of one function unless it is told otherwise."""
    x, w, targets = make_problem().to(torch.float32)
    for positions in range(1, 13):
        fused(x[:positions], w, targets[:positions], compiled=True)
    assert compiled_graphs() == 12 > torch._dynamo.config.recompile_limit


def test_an_exponent_that_changes_is_not_compiled_again(compiled_graphs: Callable) -> None:
    problem = make_problem().to(torch.float32)
    n = torch.tensor(EXPONENT, requires_grad=True)
    for step in range(3):
        with torch.no_grad():
            n += step
        expected, found = (
            torch.autograd.grad(fused_harmonic_loss(*problem, n, chunk=N, compiled=compiled), (problem.x, problem.w, n))
            for compiled in (False, True)
        )
        for value, reference in zip(found, expected, strict=True):
            assert relative_error(value, reference.double()) < 1e-5
    assert compiled_graphs() == 1


def test_the_compiled_body_within_a_compiled_model() -> None:
    """With a last chunk that is smaller, planted zeros, and an exponent that is learnt."""
    problem = make_problem().to(torch.float32)
    n = torch.tensor(EXPONENT, requires_grad=True)

    def loss_of(x: Tensor, w: Tensor, targets: Tensor, compiled: bool) -> Tensor:
        return fused_harmonic_loss(2 * x, 2 * w, targets, n, chunk=CHUNK, compiled=compiled)

    torch.compiler.reset()
    whole = torch.compile(loss_of, fullgraph=True)
    for positions in (N, 40):
        operands = (problem.x[:positions], problem.w, problem.targets[:positions])
        expected = torch.autograd.grad(loss_of(*operands, False), (*problem[:2], n))
        found = torch.autograd.grad(whole(*operands, True), (*problem[:2], n))
        for value, reference in zip(found, expected, strict=True):
            assert relative_error(value, reference.double()) < 1e-5


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_activation_checkpointing(fused_loss: Callable, dense_loss: Callable, use_reentrant: bool) -> None:
    problem = make_problem().to(torch.float32)

    def step(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return checkpoint(fused_loss, x, w, targets, use_reentrant=use_reentrant)

    expected, result = differentiate_backward(fused_loss, problem), differentiate_backward(step, problem)
    assert all(torch.equal(value, reference) for value, reference in zip(result, expected, strict=True))


def differentiate_backward(loss_of: Callable[..., Tensor], problem: Problem) -> Result:
    problem = problem.to(problem.x.dtype)
    loss = loss_of(*problem)
    loss.backward()
    assert problem.x.grad is not None and problem.w.grad is not None
    return Result(loss.detach(), problem.x.grad, problem.w.grad)


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, or any of those given."""

    def __init__(self, *operations: Any) -> None:
        super().__init__()
        self.operations, self.numel = operations, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.operations and func.overloadpacket not in self.operations:
            return out
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def watch(monkeypatch: pytest.MonkeyPatch, mode: TorchDispatchMode) -> None:
    """From outside, the fused loss is one operation; this lets `mode` see those within."""
    inside = fused_loss_module._losses_and_grads

    def watched(*args: Any) -> Any:
        with mode:
            return inside(*args)

    monkeypatch.setattr(fused_loss_module, "_losses_and_grads", watched)


@BOTH
@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(
    fused_loss: Callable,
    dense_loss: Callable,
    dtype: torch.dtype,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem().to(dtype)
    largest = LargestTensor()
    watch(monkeypatch, largest)
    differentiate(fused_loss, problem, chunk=32, recompute=recompute)
    assert largest.numel == V * D  # the gradient of w; a chunk's scores are 32 · V
    with LargestTensor() as largest:
        differentiate(dense_loss, problem)
    assert largest.numel == N * V


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "matmul")}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize(
    ("frozen", "recompute", "expected"),
    [("", False, 3), ("x", False, 2), ("w", False, 2), ("xw", False, 1), ("", True, 4), ("w", True, 3)],
)
def test_gradients_that_nobody_needs_cost_nothing(
    fused_loss: Callable,
    dense_loss: Callable,
    frozen: str,
    recompute: bool,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make_problem().to(torch.float32)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    products = Products()
    watch(monkeypatch, products)
    loss = fused_loss(*problem, chunk=N, recompute=recompute)
    if loss.requires_grad:
        loss.backward()
    assert products.count == expected


@BOTH
@RECOMPUTE
def test_evaluation_does_not_pay_for_gradients(
    fused_loss: Callable, dense_loss: Callable, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem().to(torch.float32)  # parameters require gradients in evaluation too
    products = Products()
    watch(monkeypatch, products)
    with torch.no_grad():
        fused_loss(*problem, chunk=N, recompute=recompute)
    assert products.count == 1


@pytest.mark.parametrize("n", [EVEN, EVEN + 1])
def test_an_even_exponent_costs_no_logarithm_of_the_scores(n: float, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = LargestTensor(torch.ops.aten.log2, torch.ops.aten.log, torch.ops.aten.exp2)
    watch(monkeypatch, largest)
    x, w, targets = make_problem()
    fused_harmonic_loss(x, w, targets, n, chunk=N)
    assert largest.numel == (N if n == EVEN else N * V)


# Errors


def test_operands_that_do_not_fit() -> None:
    x, w, targets = make_problem()
    for operands in (
        (x.double(), w, targets),
        (x[:, :-1], w, targets),
        (x, w, targets[:-1]),
        (x, w, targets.view(4, -1)),
    ):
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\), w \(V, D\) and targets \(\.\.\.\) must fit"):
            fused(*operands)
