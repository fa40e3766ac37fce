"""hgpt/model/row_kernels.py against the loss in float64 and against PyTorch's kernel in the same dtype.

On a machine with a GPU the kernels run on it, otherwise in Triton's interpreter (conftest.py).
"""

import importlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_loss import HARMONIC, LOG_WEIGHT, SOFTMAX, Kind, Problem, make_problem, relative_error
from torch import Tensor

from hgpt.model import loss as loss_module
from hgpt.model.distances import make_distance
from hgpt.model.loss import LossParams, by_products, head_loss, kernel_for_products

pytest.importorskip("triton", reason="the row kernels need Triton, which is part of PyTorch's builds for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# The interpreter rounds to bfloat16 towards zero, a GPU to the nearest: the mean error is twice as large.
BFLOAT16_ERROR = 1.2 if DEVICE == "cuda" else 4.0


row_kernels = importlib.import_module("hgpt.model.row_kernels")


@pytest.fixture(autouse=True)
def _row_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loss_module, "kernel_for_products", lambda *_: row_kernels.by_rows)
    if DEVICE == "cpu":  # the interpreter takes as long for a small tile as for a large one
        monkeypatch.setattr(row_kernels, "_LOSS_TILE", {"ROWS": 16, "COLUMNS": 128})
        monkeypatch.setattr(row_kernels, "_GRADIENT_TILE", {"STEPS": 2, "ROWS": 8, "COLUMNS": 128})
        monkeypatch.setattr(row_kernels, "_VECTOR_TILE", {"ROWS": 128, "COLUMNS": 64})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "divide by zero|invalid value", RuntimeWarning)  # masked lanes, interpreted
        yield


def small_problem(mean: float = 0.0, planted: bool = True) -> Problem:
    x, w, targets = make_problem(mean, planted)
    return Problem(x[:29], w, targets[:29])


def results(kind: Kind, problem: Problem, n: float, kernel: Any, **options: Any) -> tuple[Tensor, ...]:
    """The losses, and the gradients of their weighted sum by x, w, n and the log-weights."""
    x, w, targets = (t.detach().to(DEVICE) for t in problem)
    x, w = x.requires_grad_(), w.requires_grad_()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponent = torch.tensor(n, dtype=wide, device=DEVICE, requires_grad=True)
    a = LOG_WEIGHT.to(DEVICE, wide).requires_grad_() if options.pop("weighted", False) else None
    inputs = [x, w, *([exponent] if kind == HARMONIC else []), *([a] if a is not None else [])]
    with pytest.MonkeyPatch.context() as patch:
        if kernel is not None:
            patch.setattr(loss_module, "kernel_for_products", lambda *_: kernel)
            params = LossParams(
                n=exponent if kind == HARMONIC else None, log_weight=a, chunk=24, reduction="none", **options
            )
            losses = head_loss(x, w, targets, params)
        else:
            losses = kind.dense(x, w, targets, exponent, a, reduction="none", **options)
    weights = torch.linspace(-0.2, 1, len(targets), device=DEVICE)  # negative ones too
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)


# The gain of x, the common mean of x and w in units of their spread, n, options.
CASES: list[tuple[Kind, float, float, float, dict[str, Any]]] = [
    (HARMONIC, 1, 0, 55.4, {}),
    (HARMONIC, 0.05, 0, 55.4, {"label_smoothing": 0.1}),
    (HARMONIC, 1, 3, 55.4, {"weighted": True}),
    (HARMONIC, 0.05, 3, 0.5, {"weighted": True, "label_smoothing": 0.1}),
    (HARMONIC, 1, 3, 1536, {}),
    (HARMONIC, 0.05, 0, 1536, {"weighted": True}),
    (SOFTMAX, 1, 0, 1, {"label_smoothing": 0.1}),
    (SOFTMAX, 1, 3, 1, {"weighted": True}),
]


@pytest.mark.parametrize(
    ("dtype", "case"),
    [(dtype, case) for case in CASES for dtype in (torch.float32, torch.bfloat16)] + [(torch.float16, CASES[2])],
    ids=str,
)
def test_no_less_accurate_than_pytorch(dtype, case):
    """Loss and every gradient, with ignored targets."""
    kind, gain, mean, n, options = case
    x, w, targets = small_problem(mean, planted=False)  # float64 clamps small distances later
    problem = Problem(gain * x, w, targets).to(dtype)
    expected = results(kind, problem.to(torch.float64), n, None, **options)
    found = results(kind, problem, n, row_kernels.by_rows, **options)
    other = results(kind, problem, n, by_products, **options)
    allowed = BFLOAT16_ERROR if dtype == torch.bfloat16 else 1.5
    for value, reference, pytorch in zip(found, expected, other, strict=True):
        error, theirs = relative_error(value, reference), relative_error(pytorch, reference)
        # Narrow operands allow a logarithm with an absolute error of 2^-22. A scalar is a sum over all positions.
        noise = 4e-6 if dtype != torch.float32 else 2e-6 if value.ndim == 0 else 1e-7
        assert value.dtype == pytorch.dtype
        assert error < allowed * theirs + noise, (error, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items": 70, "num_classes": 201},
        {"reduction": "sum", "ignore_index": 3},
        {"recompute": True, "label_smoothing": 0.1, "num_classes": 250},
        {"distance": make_distance("cosine", 61)},
        {"distance": make_distance("mahalanobis", 61, metric="low_rank", rank=3)},
        {"chunk": 1000},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("kind", [HARMONIC, SOFTMAX], ids=str)
def test_options(kind, options):
    """As PyTorch's kernel for every option of the loss, with zero distances, in training and in evaluation."""
    if kind == SOFTMAX and "distance" in options:
        options = {}
    problem = small_problem().to(torch.float32)
    x, w, targets = (t.detach().to(DEVICE) for t in problem)
    ignored = targets < 0
    targets = (targets % options.get("num_classes", len(w))).masked_fill(ignored, options.get("ignore_index", -100))
    x, w = x.requires_grad_(), w.requires_grad_()
    params = LossParams(n=None if kind == SOFTMAX else 15.6, **({"chunk": 24} | options))
    if params.distance is not None:
        params.distance.to(DEVICE)
        x, w = params.distance(x, w)
    found = head_loss(x, w, targets, params)
    grads = torch.autograd.grad(found, (x, w))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "kernel_for_products", lambda *_: by_products)
        expected = head_loss(x, w, targets, params)
    for value, reference in zip((found, *grads), (expected, *torch.autograd.grad(expected, (x, w))), strict=True):
        assert relative_error(value, reference.double()) < 3e-6
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, w, targets, params), found)


def test_rows_without_targets_and_repeated_runs():
    """Positions that are all ignored have no gradient, and two runs agree in every bit."""
    problem = small_problem().to(torch.bfloat16)
    ignored = Problem(problem.x, problem.w, torch.full_like(problem.targets, -100))
    losses, *grads = results(HARMONIC, ignored, 15.6, row_kernels.by_rows)
    assert not losses.any() and not any(grad.any() for grad in grads)
    first, second = (results(HARMONIC, problem, 15.6, row_kernels.by_rows, weighted=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_non_finite_operands_show():
    x, w, targets = small_problem(planted=False).to(torch.float32)
    with torch.no_grad():
        x[7, 3] = math.nan
    for kind in (HARMONIC, SOFTMAX):
        losses = results(kind, Problem(x, w, targets), 15.6, row_kernels.by_rows)[0]
        assert losses[7].isnan() and losses[:5].isfinite().all()


def test_without_triton(monkeypatch):
    """A device on which the kernels fail gets PyTorch's, and one warning says why."""
    monkeypatch.setattr(loss_module.importlib, "import_module", lambda *_: exec("raise ImportError('no triton')"))
    kernel_for_products.cache_clear()
    with pytest.warns(UserWarning, match="without Triton on cuda"):
        assert kernel_for_products(torch.device("cuda"), torch.float32) is by_products
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for_products(torch.device("cuda"), torch.float32) is by_products
        assert kernel_for_products(torch.device("cpu"), torch.float32) is by_products
        assert kernel_for_products(torch.device("cuda"), torch.float64) is by_products
    kernel_for_products.cache_clear()


def test_out_of_memory_names_the_chunk(monkeypatch):
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    x, w, targets = (t.to(DEVICE) for t in small_problem())
    monkeypatch.setattr(row_kernels.torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"24 of 29 positions.*micro_batch"):
        head_loss(x.detach(), w.detach(), targets, LossParams(n=2.0, chunk=24))
