"""The two heads as modules: a drop-in classifier, logits against loss, padding rows, dtypes, errors."""

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hgpt import HarmonicHead, SoftmaxHead

D, V, ROWS = 12, 29, 32


def heads(rows: int | None = None, dtype: torch.dtype = torch.float64) -> list[HarmonicHead | SoftmaxHead]:
    return [HarmonicHead(D, V, rows=rows).to(dtype), SoftmaxHead(D, V, init_std=0.5, rows=rows).to(dtype)]


def test_drop_in_classifier_learns_digits() -> None:
    """Defaults, Adam at an ordinary rate, plain F.cross_entropy, scikit-learn's 1797 digits."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, test = pixels.float() / 16, torch.arange(len(labels)) % 5 == 0
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), HarmonicHead(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train_x, train_y = x[~test], labels[~test]
    for _ in range(10):
        for batch in torch.randperm(len(train_y)).split(128):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = (model(x[test]).argmax(-1) == labels[test]).float().mean()
    assert accuracy > 0.95


def test_harmonic_logits_are_minus_n_log_d() -> None:
    head = HarmonicHead(D, V, "2*sqrt_dim").double()
    x = torch.randn(4, 5, D, dtype=torch.float64)
    n = 2 * D**0.5
    assert head.exponent == pytest.approx(n)
    d = torch.cdist(x, head.weight.detach().expand(4, V, D))
    torch.testing.assert_close(head(x), -n * d.log())
    torch.testing.assert_close(head.distances(x), d)
    torch.testing.assert_close(head(x).softmax(-1), d**-n / (d**-n).sum(-1, keepdim=True))


class Memory(TorchDispatchMode):
    """The tensors of `numel` elements or more that operations return, each memory once."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.numel:
            self.found[out.untyped_storage().data_ptr()] = out  # kept, so that its address is not given to another
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_without_gradients_logits_are_made_in_one_tensor(rows: int | None, dtype: torch.dtype) -> None:
    """And are those of the way with gradients, also where a distance is clamped and where one is nan."""
    head, x = HarmonicHead(D, V, rows=rows).to(dtype), torch.randn(50, D).to(dtype)
    with torch.no_grad():
        x[0], x[1, 3] = head.weight[7], torch.nan
    expected = head(x).detach()
    assert expected[1].isnan().all()
    with torch.no_grad(), Memory(50 * V) as memory:
        found = head(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert len(memory.found) == 1


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}], ids=str)
def test_unchanged_centres_in_compiled_code(options: dict[str, Any]) -> None:
    """Two graphs, one that makes what is kept and one that uses it, however often they change in between."""
    head, x = HarmonicHead(D, V, **options), torch.randn(3, 1, D)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            expected = head(x)
            with head.unchanged_centres():
                for _ in range(3):
                    torch.testing.assert_close(compiled(x), expected)
            head.weight.mul_(1.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_softmax_head_is_a_linear_layer() -> None:
    head = SoftmaxHead(D, V).double()
    x, targets = torch.randn(4, 5, D, dtype=torch.float64), torch.randint(V, (4, 5))
    logits = F.linear(x, head.weight)
    torch.testing.assert_close(head(x), logits)
    torch.testing.assert_close(head(x, targets), F.cross_entropy(logits.view(-1, V), targets.view(-1)))


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("which", [0, 1], ids=["harmonic", "softmax"])
def test_loss_is_the_cross_entropy_of_the_logits(which: int, rows: int | None) -> None:
    """Whatever the option, and with rows of padding that lie on hidden states."""
    head = heads(rows)[which]
    x = torch.randn(4, 5, D, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head.weight[V:] = x[0, : len(head.weight) - V]
    targets = torch.randint(V, (4, 5))
    targets[0, :3] = -100
    logits = head(x)
    assert logits.shape == (4, 5, V)
    each = F.cross_entropy(logits.view(-1, V), targets.view(-1), reduction="none").view(4, 5)
    renamed = targets.where(targets >= 0, V)
    for value, expected in (
        (head(x, targets), each.sum() / 17),
        (head(x, targets, recompute=True), each.sum() / 17),
        (head(x, targets, reduction="none"), each),
        (head(x, targets, reduction="sum"), each.sum()),
        (head(x, targets, num_items=100), each.sum() / 100),
        (head(x, renamed, ignore_index=V), each.sum() / 17),
    ):
        torch.testing.assert_close(value, expected)
        inputs = (x, head.weight)
        ours, theirs = (torch.autograd.grad(v.square().sum(), inputs, retain_graph=True) for v in (value, expected))
        torch.testing.assert_close(ours, theirs)
        assert (ours[1][V:] == 0).all()


@pytest.mark.parametrize("which", [0, 1], ids=["harmonic", "softmax"])
def test_autocast_rounds_the_operands_and_nothing_else(which: int) -> None:
    head = heads(ROWS, torch.float32)[which]
    x, targets = torch.randn(300, D), torch.randint(V, (300,))
    rounded = (x.bfloat16().double(), head.weight.detach().bfloat16().double()[:V])
    exact = heads()[which]
    exact.weight = nn.Parameter(rounded[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = head(x), head(x, targets)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact(rounded[0]), rtol=1e-5, atol=1e-4)
    # torch's linear_cross_entropy returns this loss rounded to bfloat16: an error of up to 4e-3 of it.
    torch.testing.assert_close(loss.double(), exact(rounded[0], targets), rtol=1e-6, atol=0)
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32
    exact(rounded[0], targets).backward()
    error = (head.weight.grad[:V] - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_without_autocast(dtype: torch.dtype) -> None:
    for head in heads(ROWS, dtype):
        x, targets = torch.randn(7, D, dtype=dtype), torch.randint(V, (7,))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert head(x).dtype == head(x, targets).dtype == wide
        # A float32 weight follows a narrower x, as the float32 master weights of mixed precision do.
        assert head.float()(x, targets).dtype == wide


@pytest.mark.parametrize("which", [0, 1], ids=["harmonic", "softmax"])
def test_label_smoothing_is_for_training_only(which: int) -> None:
    head = heads(ROWS)[which]
    x, targets = torch.randn(7, D, dtype=torch.float64), torch.randint(V, (7,))
    logits, plain = head(x), head(x, targets)
    head.label_smoothing = 0.1
    torch.testing.assert_close(head(x, targets), F.cross_entropy(logits, targets, label_smoothing=0.1))
    assert torch.equal(head(x), logits)
    assert torch.equal(head.eval()(x, targets), plain)
    assert "label_smoothing=0.1" in repr(head)


def test_a_learned_exponent() -> None:
    head = HarmonicHead(D, V, "2*sqrt_dim", learn_exponent=True).double()
    fixed = HarmonicHead(D, V, "2*sqrt_dim").double()
    assert [name for name, _ in head.named_parameters()] == ["weight", "log_exponent"]
    assert head.log_exponent is not None and head.log_exponent.shape == (1,)
    assert "exponent=6.9282 (learned)" in repr(head)
    with torch.no_grad():
        fixed.weight.copy_(head.weight)
    x, targets = torch.randn(7, D, dtype=torch.float64), torch.randint(V, (7,))
    torch.testing.assert_close(head(x), fixed(x))
    torch.testing.assert_close(head(x, targets), fixed(x, targets))
    inputs = (head.weight, head.log_exponent)
    expected = torch.autograd.grad(F.cross_entropy(head(x), targets), inputs)
    for value, reference in zip(torch.autograd.grad(head(x, targets), inputs), expected, strict=True):
        torch.testing.assert_close(value, reference)
    # Downhill, and what was learned is what is saved.
    optimizer = torch.optim.SGD([head.log_exponent], lr=1.0)
    before = head(x, targets)
    before.backward()
    optimizer.step()
    assert head(x, targets) < before and head.log_exponent.item() != pytest.approx(math.log(2 * D**0.5))
    copy = HarmonicHead(D, V, learn_exponent=True).double()
    copy.load_state_dict(head.state_dict())
    torch.testing.assert_close(copy(x), head(x))
    copy.reset_parameters()
    assert copy.log_exponent is not None and copy.log_exponent.item() == pytest.approx(math.log(D**0.5))


def test_initial_centres() -> None:
    head = HarmonicHead(256, 1000)
    assert head.exponent == 16.0
    assert head.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    head = HarmonicHead(256, 1000, init_std=0.3)
    assert head.weight.std().item() == pytest.approx(0.3, rel=0.02)
    with torch.no_grad():
        head.weight.zero_()
    head.reset_parameters()
    assert head.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert "exponent=16, distance=euclidean" in repr(head)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"distance must be one of euclidean, cosine, .*; got 'cosinus'"):
        HarmonicHead(D, V, distance="cosinus")
    with pytest.raises(ValueError, match=r"exponent .* must be a positive number"):
        HarmonicHead(D, V, exponent=0)
    for head in (HarmonicHead, SoftmaxHead):
        with pytest.raises(ValueError, match="num_classes must lie between 1 and the number of rows, 28; got 29"):
            head(D, V, rows=28)
    x: Tensor = torch.zeros(3, D - 1)
    for arguments in ((x,), (x, torch.zeros(3, dtype=torch.long))):
        for head in (HarmonicHead(D, V), SoftmaxHead(D, V), HarmonicHead(D, V, distance="cosine")):
            with pytest.raises(ValueError, match=r"one width: x is \(3, 11\), w is \(29, 12\)"):
                head(*arguments)
    with pytest.raises(TypeError, match="reductoin"):
        HarmonicHead(D, V)(torch.zeros(3, D), torch.zeros(3, dtype=torch.long), reductoin="sum")
