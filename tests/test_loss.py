"""hgpt/model/loss.py against the dense losses in float64: values, gradients, precision, memory, errors."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from operations import Operations
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hgpt.model import distances as distances_module
from hgpt.model.distances import make_distance
from hgpt.model.harmax import harmonic_loss
from hgpt.model.loss import LossParams, chunk_positions, head_loss

# Awkward on purpose: no size is a multiple of a vector width or of the chunk.
N, V, D, CHUNK, EXPONENT = 125, 253, 61, 32, 2 * math.sqrt(61)
LOG_WEIGHT = 12 * torch.rand(V, generator=torch.Generator().manual_seed(0)) - 12  # as of tokens' frequencies, in nats
NARROW = [torch.float32, torch.bfloat16, torch.float16]


class Problem(NamedTuple):
    x: Tensor  # (N, D)
    w: Tensor  # (V, D)
    targets: Tensor  # (N,)

    def to(self, dtype: torch.dtype) -> "Problem":
        x, w = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.w))
        return Problem(x, w, self.targets)


def make_problem(mean: float = 0.0, planted: bool = True) -> Problem:
    """Some targets ignored; planted: positions exactly on their target's centre, and on another's."""
    common = mean * torch.randn(D)
    x, w = torch.randn(N, D) + common, torch.randn(V, D) + common
    targets = torch.randint(V, (N,))
    if planted:
        x[:8] = w[targets[:8]]
        x[8:12] = w[(targets[8:12] + 1) % V]
    targets[5::11] = -100
    return Problem(x, w, targets)


class Kind(NamedTuple):
    """A head: its loss by `head_loss`, and the same loss with all of the scores in memory."""

    name: str

    def __str__(self) -> str:
        return self.name

    def loss(self, x: Tensor, w: Tensor, targets: Tensor, n: Any = EXPONENT, a: Any = None, **options: Any) -> Tensor:
        distance = make_distance("manhattan", D) if self.name == "blocks" else None
        n = None if self.name == "softmax" else n
        options = {"chunk": CHUNK} | options
        return head_loss(x, w, targets, LossParams(n=n, distance=distance, log_weight=a, **options))

    def dense(self, x: Tensor, w: Tensor, targets: Tensor, n: Any = EXPONENT, a: Any = None, **options: Any) -> Tensor:
        if self.name == "harmonic":
            return harmonic_loss(x, w, targets, n, a, **options)
        dtype = torch.promote_types(x.dtype, torch.float32)
        a = 0 if a is None else a
        if self.name == "softmax":
            return F.cross_entropy(F.linear(x, w).to(dtype) + a, targets, **options)
        d = (x.to(dtype)[:, None] - w.to(dtype)).abs().sum(-1)
        floor = make_distance("manhattan", D).floor(x.detach().to(dtype))
        return F.cross_entropy(-n * torch.where(d <= floor, floor, d).log() + a, targets, **options)


HARMONIC, SOFTMAX, BLOCKS = Kind("harmonic"), Kind("softmax"), Kind("blocks")
EVERY = pytest.mark.parametrize("kind", [HARMONIC, SOFTMAX, BLOCKS], ids=str)
PRODUCTS = pytest.mark.parametrize("kind", [HARMONIC, SOFTMAX], ids=str)
DISTANCES = pytest.mark.parametrize("kind", [HARMONIC, BLOCKS], ids=str)
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that distances in blocks take many of them."""
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", 2**22)


class Result(NamedTuple):
    loss: Tensor
    grad_x: Tensor
    grad_w: Tensor
    learned: tuple[Tensor, ...]  # gradients by what else requires one: the exponent, the log-weights


def differentiate(loss_of: Callable[..., Tensor], problem: Problem, **options: Any) -> Result:
    loss = loss_of(*problem, **options)
    learned = [option for option in options.values() if isinstance(option, Tensor) and option.requires_grad]
    grad_x, grad_w, *others = torch.autograd.grad(loss.sum(), [*problem[:2], *learned])
    return Result(loss.detach(), grad_x, grad_w, tuple(others))


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


# Values and gradients


@EVERY
@pytest.mark.parametrize(
    "options",
    [
        *({"chunk": chunk} for chunk in (1, 7, 32, 125, 1000, None)),
        *(
            {"reduction": reduction, "label_smoothing": smoothing, "recompute": recompute}
            for reduction in ("mean", "sum", "none")
            for smoothing in (0.0, 0.1)
            for recompute in (False, True)
        ),
        {"num_items": 100},
        {"num_items": torch.tensor(100)},
        {"ignore_index": 3},
        {"ignore_index": 3, "recompute": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("padding", "weighted"), [(0, False), (0, True), (5, True)], ids=["", "radii", "padded"])
def test_equals_the_dense_loss_in_float64(kind, options, padding, weighted):
    """The value, and the gradients by x, w, a learned n and the log-weights of what comes after it."""
    x, w, targets = make_problem().to(torch.float64)
    targets = targets.where(targets >= 0, options.get("ignore_index", -100))
    n = torch.tensor(EXPONENT, dtype=torch.float64, requires_grad=True)
    w = torch.cat([w, x[:padding]]).detach().requires_grad_()  # rows of padding, as near as can be
    a = F.pad(LOG_WEIGHT.double(), (0, padding), value=3.0).requires_grad_() if weighted else None
    value = kind.loss(x, w, targets, n, a, num_classes=V if padding else None, **options)
    same = {name: options[name] for name in ("reduction", "label_smoothing", "ignore_index") if name in options}
    expected = kind.dense(x, w[:V], targets, n, a[:V] if weighted else None, **same)
    if "num_items" in options:
        expected = expected * (targets != -100).sum() / 100
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(expected)  # of either sign
    inputs = [x, w, *([] if kind == SOFTMAX else [n]), *([a] if weighted else [])]
    ours, theirs = (torch.autograd.grad(loss, inputs, upstream) for loss in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@EVERY
def test_non_contiguous_operands_and_leading_dimensions(kind):
    problem = make_problem().to(torch.float64)
    x = problem.x.detach().T.contiguous().T.requires_grad_()
    w = problem.w.detach().repeat_interleave(2, 0)[::2].requires_grad_()
    assert not x.is_contiguous() and not w.is_contiguous()
    folded = differentiate(lambda *p: kind.loss(p[0].view(5, 25, D), p[1], p[2].view(5, 25)), Problem(x, w, problem[2]))
    torch.testing.assert_close(folded, differentiate(kind.dense, problem))


def test_default_chunk_fits_its_memory():
    assert chunk_positions(50304) == chunk_positions(50304, torch.bfloat16) == 384  # products in float32 either way
    assert chunk_positions(50304, torch.float64) == 192
    assert chunk_positions(10**7) == 64
    assert chunk_positions(50304, torch.bfloat16, "cuda") == 4096


# Precision


COMMON_MEANS_AND_SCALES = [(3.0, 1.0), (10.0, 1.0), (0.0, 0.02), (0.0, 30.0), (0.0, 1000.0), (3.0, 30.0)]


@pytest.mark.parametrize(
    ("kind", "mean", "scale", "options"),
    [
        *((kind, mean, scale, {}) for kind in (HARMONIC, SOFTMAX) for mean, scale in COMMON_MEANS_AND_SCALES),
        *(
            (kind, 0.0, 1.0, options)
            for kind in (HARMONIC, SOFTMAX, BLOCKS)
            for options in ({"a": LOG_WEIGHT}, {"recompute": True}, {"label_smoothing": 0.1}, {"reduction": "none"})
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", NARROW)
def test_no_less_accurate_than_dense_in_the_same_dtype(kind, mean, scale, options, dtype):
    """Both against float64 on the same (rounded) values; `scale` is that of x, whose norm need not be w's."""
    problem = make_problem(mean, planted=False)
    problem = problem._replace(x=problem.x * scale).to(dtype)

    def found(loss_of: Callable[..., Tensor], problem: Problem, **options: Any) -> Result:
        wide = torch.promote_types(problem.x.dtype, torch.float32)
        learned = {"n": torch.tensor(EXPONENT, dtype=wide)} if kind != SOFTMAX else {}
        learned |= {"a": options.pop("a").to(wide, copy=True)} if "a" in options else {}
        learned = {name: value.requires_grad_() for name, value in learned.items()}
        return differentiate(loss_of, problem, **learned, **options)

    same = {name: value for name, value in options.items() if name != "recompute"}
    truth, theirs = (found(kind.dense, problem.to(kept), **same) for kept in (torch.float64, dtype))
    ours = found(kind.loss, problem, **options)
    assert ours.loss.dtype == torch.float32 and ours.grad_x.dtype == ours.grad_w.dtype == dtype
    assert relative_error(ours.loss, truth.loss) < relative_error(theirs.loss, truth.loss) + 1e-6
    for value, other, exact in zip(*((*r[1:3], *r.learned) for r in (ours, theirs, truth)), strict=True):
        assert relative_error(value, exact) < 1.3 * relative_error(other, exact) + 1e-6


def test_what_x_and_w_have_in_common_costs_bfloat16_nothing():
    """Distances do not see it; the dense loss's rounded gradients do."""
    errors = []
    for mean in (0.0, 10.0):
        problem = make_problem(mean, planted=False).to(torch.bfloat16)
        truth, ours = differentiate(HARMONIC.dense, problem.to(torch.float64)), differentiate(HARMONIC.loss, problem)
        errors.append([relative_error(value, exact) for value, exact in zip(ours[1:3], truth[1:3], strict=True)])
    assert all(with_mean < 1.2 * without for without, with_mean in zip(*errors, strict=True))


@DISTANCES
@pytest.mark.parametrize("dtype", NARROW)
def test_planted_zero_distances(kind, dtype):
    problem = make_problem().to(dtype)
    ours = differentiate(kind.loss, problem)
    assert all(value.isfinite().all() for value in ours[:3])
    torch.testing.assert_close(ours.loss, kind.dense(*problem).detach(), rtol=1e-5, atol=0)
    # Pairs at distance zero are clamped in either, and all others have their gradient: what those of the dense loss in
    # float32 are on the same values, but for the rounding to this dtype. Of the sum, for float16's range ends above the
    # gradients of the mean.
    summed = differentiate(kind.loss, problem, reduction="sum")
    expected = differentiate(kind.dense, problem.to(torch.float32), reduction="sum")
    for value, reference in zip(summed[1:3], expected[1:3], strict=True):
        assert relative_error(value, reference.double()) < 3e-6 + torch.finfo(dtype).eps
    # On their own centre: no loss and no gradient.
    result = differentiate(kind.loss, Problem(problem.x[:5], problem.w, problem.targets[:5]).to(dtype))
    assert 0 <= result.loss < 1e-4
    assert result.grad_x.abs().max() < 1e-3 and result.grad_w.abs().max() < 1e-3


@EVERY
@RECOMPUTE
def test_everything_at_the_origin_stays_finite(kind, recompute):
    """x = w = 0, where the floor of d is not relative to |x|; a third such x belongs to another centre."""
    problem = make_problem(planted=False)
    problem.x[:3], problem.w[:2] = 0, 0
    problem.targets[:3] = torch.tensor([0, 1, 2])
    problem = problem.to(torch.float32)
    found = differentiate(kind.loss, problem, recompute=recompute)
    torch.testing.assert_close(found, differentiate(kind.dense, problem), rtol=1e-4, atol=1e-6)


def test_float16_up_to_its_largest_values():
    """Its range ends at 65504: twice an entry lies beyond, and no distance may be computed from that."""
    problem = make_problem(planted=False).to(torch.float16)
    with torch.no_grad():
        problem.x[0, 0], problem.w[problem.targets[0], 0] = 4e4, 3.9e4
        problem.x[1, 3], problem.w[7, 3] = -6e4, 6e4
    expected = differentiate(HARMONIC.dense, problem.to(torch.float64), reduction="sum")
    found = differentiate(HARMONIC.loss, problem, reduction="sum")
    for value, reference in zip(found[:3], expected[:3], strict=True):
        assert relative_error(value, reference) < 2e-3


@PRODUCTS
@RECOMPUTE
def test_float16_gradients_survive_a_large_batch_under_a_loss_scale(kind, recompute):
    """Divided by a million tokens they lie below float16's range, times the loss scale within it."""
    problem = make_problem(planted=False).to(torch.float16)
    expected = differentiate(kind.dense, problem.to(torch.float64), reduction="sum")
    result = differentiate(lambda *p: kind.loss(*p, num_items=10**6, recompute=recompute) * 10**6, problem)
    assert relative_error(result.grad_x, expected.grad_x) < 1e-3
    assert relative_error(result.grad_w, expected.grad_w) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("n", [0.5, 2.0, 36.0, 1536.0, 2.0**20, 2.0**40])
def test_exponents(n, spread, dtype):
    """With the spread most powers are far too small for float32, those of the targets too, whose loss and gradient must
    not be lost."""
    x, w, targets = make_problem(planted=False)
    problem = Problem(x * (1 + spread * torch.rand(N, 1)), w * (1 + spread * torch.rand(V, 1)), targets).to(dtype)
    options = {"n": n, "reduction": "sum"}
    truth = differentiate(HARMONIC.dense, problem.to(torch.float64), **options)
    ours, theirs = differentiate(HARMONIC.loss, problem, **options), differentiate(HARMONIC.dense, problem, **options)
    for value, other, exact in zip(ours[:3], theirs[:3], truth[:3], strict=True):
        bound = 1e-12 if dtype == torch.float64 else relative_error(other, exact) + torch.finfo(value.dtype).eps
        assert relative_error(value, exact) < bound
    counted = targets != -100
    assert (ours.grad_x[counted].norm(dim=-1) >= 0.5 * truth.grad_x[counted].norm(dim=-1)).all()


# Targets and padding


@EVERY
def test_ignored_positions(kind):
    """They may hold anything finite, and get no gradient; without any other position the loss is 0."""
    problem = make_problem()
    expected = differentiate(kind.loss, problem.to(torch.float32))
    problem.x[5::11] = 1e4
    problem = problem.to(torch.float32)
    result = differentiate(kind.loss, problem)
    torch.testing.assert_close((result.loss, result.grad_w), (expected.loss, expected.grad_w))
    assert (result.grad_x[5::11] == 0).all()
    for num_items in (None, 7):
        result = differentiate(kind.loss, problem._replace(targets=problem.targets * 0 - 100), num_items=num_items)
        assert all((value == 0).all() for value in result[:3])
        assert kind.loss(problem.x[:0], problem.w, problem.targets[:0], num_items=num_items) == 0


@EVERY
@pytest.mark.parametrize("dtype", NARROW)
def test_padding_rows_far_away_change_nothing(kind, dtype):
    """Neither the mean of the centres, which corrects roundings, nor a norm."""
    problem = make_problem()
    padded = problem._replace(w=torch.cat([problem.w, torch.full((5, D), 1e3)]))
    expected = differentiate(kind.loss, problem.to(dtype), reduction="sum")
    found = differentiate(kind.loss, padded.to(dtype), num_classes=V, reduction="sum")
    torch.testing.assert_close(found.loss, expected.loss)
    for value, reference in ((found.grad_x, expected.grad_x), (found.grad_w[:V], expected.grad_w)):
        assert relative_error(value, reference.double()) < torch.finfo(dtype).eps


@EVERY
def test_a_target_that_is_no_class_is_an_error(kind):
    x, w, targets = make_problem().to(torch.float32)
    for rows in (w, torch.cat([w, w[:5]])):  # beyond the rows, and among the padding
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            kind.loss(x, rows, targets * 0 + V, num_classes=V)


@EVERY
@pytest.mark.parametrize("where", ["x", "w", "a"])
def test_a_nan_reaches_the_loss(kind, where):
    problem = make_problem()
    a = torch.zeros(V)
    (a if where == "a" else getattr(problem, where)[0])[0] = torch.nan
    assert kind.loss(*problem, a=a).isnan()


# Autograd


@EVERY
@RECOMPUTE
def test_one_operand_alone_requires_a_gradient_or_none(kind, recompute):
    x, w, targets = make_problem().to(torch.float64)
    operands = {"x": x, "w": w, "n": torch.tensor(EXPONENT, dtype=torch.float64), "a": LOG_WEIGHT.double()}
    frozen = {name: value.detach() for name, value in operands.items()}
    expected = kind.dense(targets=targets, **frozen)
    for context, given in ((nullcontext, frozen), (torch.no_grad, operands), (torch.inference_mode, operands)):
        with context():
            value = kind.loss(targets=targets, recompute=recompute, **given)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)
    for name in ("x", "w", "a") if kind == SOFTMAX else operands:
        given = frozen | {name: frozen[name].clone().requires_grad_()}
        ours, theirs = kind.loss(targets=targets, recompute=recompute, **given), kind.dense(targets=targets, **given)
        torch.testing.assert_close(*(torch.autograd.grad(value, given[name]) for value in (ours, theirs)))


@EVERY
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_time(kind, threads, dtype):
    problem, before = make_problem().to(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = (differentiate(kind.loss, problem) for _ in range(3))
    finally:
        torch.set_num_threads(before)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"reduction": "none"}], ids=str)
def test_within_autograd(kind, options):
    problem = make_problem().to(torch.float32)

    def loss(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return kind.loss(x, w, targets, **options).sum()

    expected = differentiate(loss, problem)
    value = loss(*problem)
    for retain_graph in (True, False):  # twice through one graph
        grads = torch.autograd.grad(value, problem[:2], retain_graph=retain_graph)
        torch.testing.assert_close(grads, expected[1:3], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"no second derivative.*cross_entropy on its logits"):
        torch.autograd.grad(loss(*problem), problem.x, create_graph=True)
    with pytest.raises(RuntimeError):  # no derivative in forward mode, and no silent zero
        torch.func.jvp(lambda x: loss(x, *problem[1:]), (problem.x,), (torch.ones_like(problem.x),))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # without effect on either pass
        results = [differentiate(loss, problem)]
    for use_reentrant in (False, True):
        repeated = problem.to(torch.float32)
        value = checkpoint(loss, *repeated, use_reentrant=use_reentrant)
        value.backward()
        results.append(Result(value.detach(), repeated.x.grad, repeated.w.grad, ()))
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


# Memory and work


@EVERY
@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(kind, dtype, recompute, monkeypatch):
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", 2**19)
    problem = make_problem().to(dtype)
    with Operations() as operations:
        differentiate(kind.loss, problem, recompute=recompute, chunk=16)
    assert max(operations.sizes()) <= V * D  # the gradient of w; a chunk's scores are 16 · V
    with Operations() as operations:
        differentiate(kind.dense, problem)
    assert max(operations.sizes()) == (N * V * D if kind == BLOCKS else N * V)


def products(operations: Operations) -> int:
    """The number of matrix products."""
    aten = torch.ops.aten
    return sum(packet in {aten.mm, aten.addmm, aten.addmm_} for packet in operations.packets)


@PRODUCTS
@pytest.mark.parametrize(
    ("trained", "stored", "recomputed"), [("xw", 3, 4), ("w", 2, 3), ("x", 2, 3), ("n", 1, 2), ("", 1, 1)]
)
def test_gradients_that_nobody_needs_cost_nothing(kind, trained, stored, recomputed):
    problem = make_problem().to(torch.float32)
    problem.x.requires_grad_("x" in trained)
    problem.w.requires_grad_("w" in trained)
    n = torch.tensor(EXPONENT, requires_grad="n" in trained)
    for recompute, expected in ((False, stored), (True, recomputed)):
        with Operations() as operations:
            loss = kind.loss(*problem, n, chunk=N, recompute=recompute)
            if loss.requires_grad:
                loss.backward()
        assert products(operations) == (expected if loss.requires_grad else 1)
        with torch.no_grad(), Operations() as operations:  # evaluation, where parameters require gradients too
            kind.loss(*problem, n, chunk=N, recompute=recompute)
        assert products(operations) == 1


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 position; got 0"),
        ({"reduction": "average"}, "reduction must be one of mean, sum, none; got 'average'"),
        ({"reduction": "sum", "num_items": 3}, "num_items divides the sum of reduction=\"mean\".*no effect with 'sum'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\); got 1.0"),
        ({"a": LOG_WEIGHT[:-1]}, rf"log_weight must be \({V},\), one number for each row of w; got \({V - 1},\)"),
        ({"num_classes": 0}, f"num_classes must lie between 1 and the rows of w, {V}; got 0"),
        ({"num_classes": V + 1}, f"num_classes must lie between 1 and the rows of w, {V}; got {V + 1}"),
        *(({"n": n}, f"exponent must be a positive number; got {n}") for n in (0, -2.0, math.inf, math.nan)),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        HARMONIC.loss(*make_problem(), **options)


def test_operands_that_do_not_fit():
    x, w, targets = make_problem()
    for operands in ((x.double(), w, targets), (x[:, :-1], w, targets), (x, w, targets[:-1]), (x, w, targets[:, None])):
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\), w \(V, D\) and targets \(\.\.\.\) must fit"):
            HARMONIC.loss(*operands)
