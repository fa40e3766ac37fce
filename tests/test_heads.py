"""The two heads as modules: a drop-in classifier, radii, cached centres, dtypes, errors."""

import copy
import math
import pickle
import threading

import pytest
import torch
from operations import Operations
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from hgpt import HarmonicHead, HarmonicLoss, SoftmaxHead

D, V, ROWS = 12, 29, 32
WHICH = pytest.mark.parametrize("which", [0, 1], ids=["harmonic", "softmax"])


def heads(rows=None, dtype=torch.float64, radius=False) -> list[HarmonicHead | SoftmaxHead]:
    """A harmonic and a softmax head, with random radii if with any."""
    both = [HarmonicHead(D, V, rows=rows, radius=radius), SoftmaxHead(D, V, init_std=0.5, rows=rows, radius=radius)]
    for head in both:
        if head.log_weight is not None:
            nn.init.normal_(head.log_weight, std=2)
    return [head.to(dtype) for head in both]


def test_drop_in_classifier_learns_digits():
    """Defaults, Adam at an ordinary rate, plain F.cross_entropy, scikit-learn's 1797 digits."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, train = pixels.float() / 16, torch.arange(len(labels)) % 5 > 0
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), HarmonicHead(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in train.nonzero()[torch.randperm(int(train.sum())), 0].split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
    assert (model(x[~train]).argmax(-1) == labels[~train]).float().mean() > 0.95


def test_loss_of_distances():
    """Against −log p_y written out, and its options against those of cross-entropy on logits."""
    torch.manual_seed(0)
    d, y, n = torch.rand(5, V, dtype=torch.float64).requires_grad_(), torch.randint(V, (5,)), 7.5
    p = d**-n / (d**-n).sum(-1, keepdim=True)
    expected = -p[range(5), y].log().mean()
    loss = HarmonicLoss(n)(d, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, d), torch.autograd.grad(expected, d))
    options = {"reduction": "none", "ignore_index": int(y[0]), "label_smoothing": 0.1, "weight": torch.rand(V).double()}
    torch.testing.assert_close(HarmonicLoss(n, **options)(d, y), F.cross_entropy(-n * d.log(), y, **options))
    assert HarmonicLoss(64)(torch.tensor([[0.0, 1.0]]), torch.tensor([0])) == 0  # the centre itself
    with pytest.raises(ValueError, match="exponent"):
        HarmonicLoss(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "radius"), [(None, False), (ROWS, False), (ROWS, True)])
def test_without_gradients_logits_are_made_in_one_tensor(rows, radius, dtype):
    """And are those of the way with gradients, also where a distance is clamped and where one is nan."""
    head, x = heads(rows, dtype, radius)[0], torch.randn(50, D).to(dtype)
    with torch.no_grad():
        x[0], x[1, 3] = head.weight[7], torch.nan
    expected = head(x).detach()
    assert expected[1].isnan().all()
    with torch.no_grad(), Operations() as operations:
        found = head(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    large = {out.untyped_storage().data_ptr() for out in operations.outputs if out.numel() >= 50 * V}
    assert len(large) == 1


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}], ids=str)
def test_unchanged_centres_in_compiled_code(options):
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


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}, {"distance": "mahalanobis"}], ids=str)
def test_unchanged_centres_of_several_threads_and_of_a_weight_that_changes(options):
    head, x = HarmonicHead(D, V, **options), torch.randn(3, D)
    begun, ended = threading.Barrier(2), threading.Barrier(2)

    def other() -> None:
        with torch.no_grad(), head.unchanged_centres():
            head(x)
            begun.wait(10)
            ended.wait(10)  # ends after the context of the first thread, which began later

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(10)
    with torch.no_grad():
        with head.unchanged_centres():
            head(x)
            for parameter in [head.weight, *head.metric.parameters()]:
                parameter.mul_(1.1 + torch.rand_like(parameter))
                torch.testing.assert_close(head(x), copy.deepcopy(head)(x))
        ended.wait(10)
        thread.join()
        head.weight.mul_(1 + torch.rand(V, 1))
        assert head._cache.entries is None
        torch.testing.assert_close(head(x), pickle.loads(pickle.dumps(head))(x))


@pytest.mark.parametrize("radius", [False, True])
@WHICH
def test_autocast_rounds_the_operands_and_nothing_else(which, radius):
    head = heads(ROWS, torch.float32, radius)[which]
    x, targets = torch.randn(300, D), torch.randint(V, (300,))
    rounded = (x.bfloat16().double(), head.weight.detach().bfloat16().double()[:V])
    exact = heads(radius=radius)[which]
    exact.weight = nn.Parameter(rounded[1])
    if radius:
        exact.log_weight = nn.Parameter(head.log_weight.detach().double()[:V])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = head(x), head(x, targets)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact(rounded[0]), rtol=1e-5, atol=1e-4)
    # torch's linear_cross_entropy returns this loss rounded to bfloat16: an error of up to 4e-3 of it.
    torch.testing.assert_close(loss.double(), exact(rounded[0], targets), rtol=1e-6, atol=0)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    exact(rounded[0], targets).backward()
    error = (head.weight.grad[:V] - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_without_autocast(dtype):
    for head in heads(ROWS, dtype):
        x, targets = torch.randn(7, D, dtype=dtype), torch.randint(V, (7,))
        wide = torch.promote_types(dtype, torch.float32)
        assert head(x).dtype == head(x, targets).dtype == wide
        # A float32 weight follows a narrower x, as the float32 master weights of mixed precision do.
        assert head.float()(x, targets).dtype == wide


def test_a_learned_exponent():
    head, fixed = (HarmonicHead(D, V, "2*sqrt_dim", learn_exponent=learnt).double() for learnt in (True, False))
    assert [name for name, _ in head.named_parameters()] == ["weight", "log_exponent"]
    assert head.log_exponent.shape == (1,) and "exponent=6.9282 (learned)" in repr(head)
    fixed.weight = head.weight
    x, targets = torch.randn(7, D, dtype=torch.float64), torch.randint(V, (7,))
    torch.testing.assert_close((head(x), head(x, targets)), (fixed(x), fixed(x, targets)))
    nn.init.constant_(head.log_exponent, 0.5)
    torch.testing.assert_close(head(x), fixed(x) * math.exp(0.5) / fixed.exponent)
    head.reset_parameters()
    assert head.log_exponent.item() == pytest.approx(math.log(2 * D**0.5))


def test_radii():
    """Learned log-weights a: softmax's bias, and of the harmonic head n times the logarithm of the radii."""
    x = torch.randn(7, D, dtype=torch.float64)
    harmonic, softmax = heads(ROWS, radius=True)
    torch.testing.assert_close(softmax(x), F.linear(x, softmax.weight, softmax.log_weight)[:, :V])
    d, n = torch.cdist(x, harmonic.weight[:V]), harmonic.exponent
    torch.testing.assert_close(harmonic.distances(x), d)
    powers = (d / harmonic.radii) ** -n
    torch.testing.assert_close(harmonic(x).softmax(-1), powers / powers.sum(-1, keepdim=True))
    torch.testing.assert_close(harmonic.relative_distances(harmonic(x)), d / d.amin(-1, keepdim=True))
    torch.testing.assert_close(heads()[0].radii, torch.ones(V, dtype=torch.float64))
    for head in (harmonic, softmax):
        assert "radius=True" in repr(head) and head.log_weight.shape == (ROWS,)
        head(x, torch.arange(7)).backward()
        assert (head.log_weight.grad[V:] == 0).all()
        head.reset_parameters()
        assert (head.log_weight == 0).all()


def test_initial_centres():
    for head, std in ((HarmonicHead(256, 1000), 1 / 16), (HarmonicHead(256, 1000, init_std=0.3), 0.3)):
        assert head.exponent == 16.0 and "exponent=16, distance=euclidean" in repr(head)
        assert [name for name, _ in head.named_parameters()] == ["weight"]
        for _ in range(2):
            assert head.weight.std().item() == pytest.approx(std, rel=0.02)
            nn.init.zeros_(head.weight)
            head.reset_parameters()


def test_errors():
    with pytest.raises(ValueError, match=r"exponent .* must be a positive number"):
        HarmonicHead(D, V, exponent=0)
    for head in (HarmonicHead, SoftmaxHead):
        with pytest.raises(ValueError, match="num_classes must lie between 1 and the number of rows, 28; got 29"):
            head(D, V, rows=28)
    x, targets = torch.zeros(3, D - 1), torch.zeros(3, dtype=torch.long)
    by_products, in_blocks = (HarmonicHead(D, V, distance=distance) for distance in ("cosine", "manhattan"))
    for head in (HarmonicHead(D, V), SoftmaxHead(D, V), by_products, in_blocks):
        for arguments in ((x,), (x, targets)):
            with pytest.raises(ValueError, match=r"same width: x is \(3, 11\), w is \(29, 12\)"):
                head(*arguments)
        with pytest.raises(ValueError, match=r"targets \(\.\.\.\) must fit"):
            head(torch.zeros(2, D), targets)
    with pytest.raises(TypeError, match="reductoin"):
        HarmonicHead(D, V)(torch.zeros(3, D), targets, reductoin="sum")
