"""The distances of the head against SciPy and dense float64 autograd: values, gradients, edges, memory, errors."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operations import Operations
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn import functional as F

import hgpt
from hgpt import Distance, HarmonicHead, register_distance
from hgpt.model import distances as distances_module
from hgpt.model.distances import distance_names, load_distances, make_distance, pairwise_distances, score_chunk
from hgpt.model.loss import LossParams, head_loss

LORENTZIAN = Path(__file__).parent.parent / "configs" / "distances" / "lorentzian.py"
load_distances(str(LORENTZIAN))

# Awkward on purpose, and small: every pair and coordinate is looked at.
N, V, D, EXPONENT = 11, 13, 7, 5.0


def signed_bray_curtis(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """SciPy's, which divides by Σ |x_k + w_k|, of the positive and the negative parts side by side."""
    return cdist(*(np.hstack([v.clip(0), -v.clip(max=0)]) for v in (x, w)), "braycurtis")


def soft_hamming(x: np.ndarray, w: np.ndarray, temperature: float = 0.5) -> np.ndarray:
    x, w = (1 / (1 + np.exp(-v / temperature)) for v in (x, w))
    return cdist(x, w, "cityblock") / x.shape[1]


METRICS: list[dict[str, Any]] = [{}, {"metric": "low_rank", "rank": 2}, {"metric": "full"}]
# Distance, its options, and what it is by somebody else's code: (x, w) → (N, V).
CASES: list[tuple[str, dict[str, Any], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = [
    ("euclidean", {}, lambda x, w: cdist(x, w, "euclidean")),
    ("cosine", {}, lambda x, w: cdist(x, w, "cosine")),
    *(("mahalanobis", options, lambda x, w: cdist(x, w, "mahalanobis", VI=np.eye(D))) for options in METRICS),
    ("manhattan", {}, lambda x, w: cdist(x, w, "cityblock")),
    ("minkowski", {"p": 1.0}, lambda x, w: cdist(x, w, "cityblock")),
    ("minkowski", {"p": 3.0}, lambda x, w: cdist(x, w, "minkowski", p=3)),
    ("minkowski", {"p": 1.5}, lambda x, w: cdist(x, w, "minkowski", p=1.5)),
    ("minkowski", {"p": 2.0}, lambda x, w: cdist(x, w, "euclidean")),
    ("chebyshev", {}, lambda x, w: cdist(x, w, "chebyshev")),
    ("canberra", {}, lambda x, w: cdist(x, w, "canberra")),
    ("bray_curtis", {}, signed_bray_curtis),
    ("hamming", {"temperature": 0.5}, soft_hamming),
    ("lorentzian", {}, lambda x, w: np.log1p(np.abs(x[:, None] - w)).sum(-1)),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options, _ in CASES]
EVERY = pytest.mark.parametrize(("distance", "options"), [case[:2] for case in CASES], ids=IDS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few pairs."""
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", 4096)


@pytest.fixture
def whole_blocks(_small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as large as usual, for tests of the size of a model."""
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", 2**26)


def make_head(distance: str, options: dict[str, Any], dtype: Any = torch.float64, **kwargs: Any) -> HarmonicHead:
    kwargs = {"exponent": EXPONENT, "init_std": 1.0} | kwargs
    return HarmonicHead(D, V, distance=distance, **options, **kwargs).to(dtype)


def disturb(head: HarmonicHead) -> HarmonicHead:
    """With what is learnt of its distance away from the start."""
    with torch.no_grad():
        for parameter in (*head.metric.parameters(), *([] if head.log_weight is None else [head.log_weight])):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def test_every_distance_of_hgpt_is_tested():
    assert {case[0] for case in CASES} >= set(distance_names())


# Definitions


@pytest.mark.parametrize(("distance", "options", "reference"), CASES, ids=IDS)
def test_the_definition_is_the_known_one(distance, options, reference):
    head = make_head(distance, options)
    x = torch.randn(N, D, dtype=torch.float64)
    if distance != "cosine":  # of which SciPy has none at the origin
        x[0] = 0
    expected = torch.from_numpy(reference(x.numpy(), head.weight.detach().numpy()))
    torch.testing.assert_close(head.distances(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head(x), -EXPONENT * expected.log(), rtol=1e-9, atol=1e-9)
    p = expected**-EXPONENT / (expected**-EXPONENT).sum(-1, keepdim=True)
    torch.testing.assert_close(head(x).softmax(-1), p)
    torch.testing.assert_close(head(x.view(1, N, D)), head(x)[None])
    assert head(x[:0]).shape == (0, V)


@pytest.mark.parametrize("options", METRICS, ids=str)
def test_mahalanobis_with_what_it_has_learnt(options):
    head = make_head("mahalanobis", options)
    x, targets, metric = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,)), head.metric
    (gradient,) = torch.autograd.grad(head(x, targets), next(metric.parameters()))
    assert gradient.abs().max() > 1e-3  # it learns from its first step on
    disturb(head)
    if "rank" in options:
        factor = torch.eye(D) + metric.left @ metric.right
    elif options:
        factor = (metric.factor.tril(-1) + torch.diag(metric.factor.diagonal().exp())).T
        torch.testing.assert_close(torch.linalg.cholesky(factor.T @ factor), factor.T)
    else:
        factor = torch.diag(metric.log_scale.exp())
    inverse_covariance = (factor.T @ factor).detach().numpy()
    expected = cdist(x, head.weight.detach(), "mahalanobis", VI=inverse_covariance)
    torch.testing.assert_close(head.distances(x), torch.from_numpy(expected))


def test_limits_are_other_distances():
    x, w = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)

    def distances(name: str, **options: Any) -> Tensor:
        metric = make_distance(name, D, **options)
        return pairwise_distances(metric, *metric(x, w))

    torch.testing.assert_close(distances("minkowski", p=1e4), distances("chebyshev"), rtol=1e-3, atol=0)
    # A large temperature leaves Manhattan; a small one counts the coordinates of different sign.
    torch.testing.assert_close(distances("hamming", temperature=1e5) * 4e5 * D, distances("manhattan"))
    counted = (x.sign()[:, None] != w.sign()).double().mean(-1)
    torch.testing.assert_close(distances("hamming", temperature=1e-6), counted.clamp_min(1e-15))


def test_powers_stay_within_the_range_of_float32():
    """(2e-3)^40 does not exist in float32."""
    head, targets = make_head("minkowski", {"p": 40.0}, torch.float32, init_std=1e-3), torch.randint(V, (N,))
    exact = copy.deepcopy(head).double()
    x = (1e-3 * torch.randn(N, D)).requires_grad_()
    doubled = x.detach().double().requires_grad_()
    expected = torch.from_numpy(cdist(doubled.detach(), exact.weight.detach(), "minkowski", p=40))
    torch.testing.assert_close(head.distances(x).double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(h(v, targets), v)[0].double() for h, v in ((head, x), (exact, doubled))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2)


# Gradients


@EVERY
def test_gradcheck(distance, options):
    """Of the logits, by x, the centres, the exponent, the radii and what is learnt of the distance."""
    head = disturb(make_head(distance, options, learn_exponent=True, radius=True, rows=V + 2))
    names, parameters = zip(*head.named_parameters(), strict=True)

    def logits(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(logits, (x, *parameters), fast_mode=True)


@EVERY
def test_the_loss_is_the_cross_entropy_of_the_logits(distance, options, monkeypatch):
    """With gradients by x, the centres, the exponent, the radii and what is learned of the distance; in any blocks."""
    head = disturb(make_head(distance, options, learn_exponent=True, radius=True, rows=V + 3, label_smoothing=0.1))
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[1:9:3] = -100
    with torch.no_grad():
        head.weight[V:] = x[:3]  # rows of padding, as near as can be
    each = F.cross_entropy(head(x), targets, label_smoothing=0.1, reduction="none")
    mean = each.sum() / (targets != -100).sum()
    inputs = [x, *head.parameters()]
    expected = [torch.autograd.grad(v.square().sum(), inputs, retain_graph=True) for v in (mean, each)]
    for memory, recompute in ((1, False), (2000, True), (2**26, False)):
        monkeypatch.setattr(distances_module, "_MEMORY_CPU", memory)
        found = head.loss(x, targets, recompute=recompute), head.loss(x, targets, reduction="none")
        torch.testing.assert_close(found, (mean, each))
        for value, gradients in zip(found, expected, strict=True):
            torch.testing.assert_close(
                torch.autograd.grad(value.square().sum(), inputs), gradients, rtol=1e-6, atol=1e-9
            )
    torch.testing.assert_close(head.eval()(x, targets), F.cross_entropy(head(x), targets))  # smoothed in training only


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_degenerate_vectors_are_finite(distance, options, dtype):
    """x on a centre, at the origin, parallel and opposite to centres; a centre at the origin; two equal centres."""
    head = make_head(distance, options, dtype, learn_exponent=True)
    w = torch.randn(V, D)
    w[1], w[3], w[4, :3] = 0, w[2], 0
    x = torch.stack([w[0], torch.zeros(D), 2 * w[2], -w[2], w[4], 3e-5 * w[5], 1e-30 * w[6], w[1], 100 * w[7]])
    with torch.no_grad():
        head.weight.copy_(w)
    for targets in (torch.tensor([0, 1, 2, 2, 4, 5, 6, 1, 7]), torch.full((9,), 8)):
        inputs = [x.to(dtype, copy=True).requires_grad_(), *head.parameters()]
        for value in (head(inputs[0], targets), F.cross_entropy(head(inputs[0]), targets)):
            assert value.isfinite()
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, inputs))
    # On its own centre the loss is that of a sure thing; a nan reaches it.
    assert head(x[:1].to(dtype), torch.tensor([0])) < 1e-3
    x[0, 0] = torch.nan
    assert head(x.to(dtype), targets).isnan()


@pytest.mark.parametrize(
    ("distance", "origin", "towards", "against"),
    [("cosine", 0.5, 0, 2), ("bray_curtis", 1, 0.5, 1), ("canberra", D, D / 2, D)],
)
def test_the_origin_and_parallel_vectors(distance, origin, towards, against):
    """By hand: d(0, w), d(3 w, w) and d(−w / 10, w)."""
    head = make_head(distance, {})
    w = head.weight[0].detach()
    d = head.distances(torch.stack([0 * w, 3 * w, -0.1 * w]))
    assert d[:, 0].tolist() == pytest.approx([origin, towards, against], abs=1e-14)
    zero = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)
    loss = head(zero, torch.tensor([3]))
    assert loss.item() == pytest.approx(math.log(V))  # every centre is as far away
    if distance == "cosine":
        assert (torch.autograd.grad(loss, zero)[0] == 0).all()


def test_small_angles_survive_bfloat16():
    """The rounding of operands cancels in |x̂|² + |ŵ|² − 2 x̂·ŵ, which in 1 − x̂·ŵ it does not."""
    w = torch.randn(100, 768)
    x = w + 0.1 * torch.randn(100, 768)
    head = HarmonicHead(768, 100, distance="cosine")
    head.weight = nn.Parameter(w)
    exact = 1 - F.cosine_similarity(x.double(), w.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head.distances(x).diagonal().double()
    rounded = [F.normalize(v, dim=-1).bfloat16().double() for v in (x, w)]
    naive = 1 - (rounded[0] * rounded[1]).sum(-1)
    errors = [((value - exact) / exact).square().mean().sqrt().item() for value in (ours, naive)]
    assert errors[0] < 2e-3 < 4 * errors[0] < errors[1]


def test_a_clamped_distance_passes_no_gradient():
    head = make_head("manhattan", {})
    centre = head.weight[2:3].detach()
    x = torch.nextafter(centre, centre + 1).requires_grad_()
    d = pairwise_distances(head.metric, x, head.weight)
    assert 0 < (x - centre).norm() < d[0, 2] == head.metric.floor(x)[0, 0] < 1e-14
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(d[0, 2], [x, head.weight], retain_graph=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(d.sum(), x, create_graph=True)


def test_chebyshevs_gradient_goes_to_one_of_equal_coordinates():
    """All of them together would be no subgradient: a step along it overshoots."""
    x = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    d = pairwise_distances(make_distance("chebyshev", 3), x, torch.zeros(1, 3))
    assert torch.equal(torch.autograd.grad(d.sum(), x)[0], torch.tensor([[1.0, 0.0, 0.0]]))


# Precision


@EVERY
@pytest.mark.usefixtures("whole_blocks")
def test_float32_is_accurate(distance, options):
    """At the scales of a model's start, in float32 against float64."""
    head = HarmonicHead(64, 50, "2*sqrt_dim", distance=distance, init_std=0.02, **options)
    exact, targets = copy.deepcopy(head).double(), torch.randint(50, (40,))
    x = 0.05 * torch.randn(40, 64)
    found = []
    for layer, inputs in ((head, x.requires_grad_()), (exact, x.detach().double().requires_grad_())):
        gradients = torch.autograd.grad(layer(inputs, targets), [inputs, layer.weight])
        found.append([layer(inputs).log_softmax(-1).double(), *gradients])
    (log_p, *ours), (expected, *theirs) = found
    assert (log_p - expected).square().mean().sqrt() < 2e-5
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient.double() - reference).norm() / reference.norm() < 1e-5


@EVERY
@pytest.mark.usefixtures("whole_blocks")
def test_under_autocast(distance, options):
    """Products have operands of bfloat16, rounded once, at the end; blocks stay in float32."""
    width, n = 768, math.sqrt(768)
    head = HarmonicHead(width, 100, n, distance=distance, init_std=0.02, **options)
    x, targets = 0.05 * torch.randn(64, width), torch.randint(100, (64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = head(x), head(x, targets)
    assert logits.dtype == loss.dtype == torch.float32
    plain = head(x)
    if head.metric.power is None:
        torch.testing.assert_close(logits, plain)
    # Of the rule for products, 3e-3 at this n, what rounding x and w themselves to bfloat16 does, doubled for cosine.
    error = logits.log_softmax(-1) - plain.log_softmax(-1)
    assert error.square().mean().sqrt() < (0.02 if distance == "cosine" else 0.01)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    # The backward pass may stand in autocast too; what is learnt of the distance gets a gradient in its own dtype.
    parameters = list(head.parameters())
    for value in (loss, logits.logsumexp(-1).sum()):
        outside = torch.autograd.grad(value, parameters, retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = torch.autograd.grad(value, parameters)
        for gradient, reference in zip(inside, outside, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=0.02, atol=0.02 * reference.abs().max().item())


# Memory


@pytest.mark.parametrize(
    ("distance", "options"), [case[:2] for case in CASES if make_distance(case[0], D, **case[1]).power is None], ids=str
)
def test_memory_is_bounded(distance, options, monkeypatch):
    tokens, classes, width, memory = 60, 90, 16, 32 * 1024
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", memory)
    metric = make_distance(distance, width, **options)
    x, w = torch.randn(tokens, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    targets = torch.randint(classes, (tokens,))
    params = LossParams(n=3.0, distance=metric)
    x_, w_ = metric(x, w)
    with Operations() as operations:
        head_loss(x_, w_, targets, params).backward()
    sizes = operations.sizes()
    # A block's tensor has a sixteenth of the memory, a chunk's a sixth; the rest are operands and gradients.
    assert max(sizes) <= max(memory // 4 // 6, classes * width)
    assert not {tokens * classes, tokens * classes * width} & sizes
    assert score_chunk(classes, 4, "cpu") * classes * 4 * 6 <= memory
    assert score_chunk(10**9, 4, "cpu") == 1
    # With few classes a chunk has all tokens, whose floors are computed some at a time.
    monkeypatch.setattr(distances_module, "_MEMORY_CPU", memory // 8)
    floor, at_once = metric.floor, []
    metric.floor = lambda x: at_once.append(len(x)) or floor(x)
    head_loss(x_, w_[:3], targets % 3, params)
    assert sum(at_once) == tokens and max(at_once) * width <= memory // 8 // 4 // 16


# Within other machinery


@pytest.mark.parametrize(
    ("distance", "options"), [("cosine", {}), ("mahalanobis", {"metric": "full"}), ("manhattan", {})], ids=str
)
def test_torch_compile_around_it(distance, options):
    """The logits by products stay in one graph; a distance in blocks is a break in it."""
    head = make_head(distance, options, torch.float32)
    x = torch.randn(N, D, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return head(torch.tanh(x)).square().mean()

    expected = torch.autograd.grad(step(x), [x, *head.parameters()])
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=distance != "manhattan", backend="aot_eager")
    for value, reference in zip(torch.autograd.grad(compiled(x), [x, *head.parameters()]), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-2, atol=1e-3)


# A distance of one's own


def test_a_distance_of_ones_own_with_an_option_and_frozen():
    head = make_head("lorentzian", {"scale": 2.0})
    x, targets = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(V, (N,))
    torch.testing.assert_close(head.distances(x), torch.log1p((x[:, None] - head.weight).abs() / 2).sum(-1))
    assert head.metric.options == {"scale": 2.0}
    expected = torch.autograd.grad(head(x, targets), [x, head.weight])
    head.metric.requires_grad_(False)
    for ours, theirs in zip(torch.autograd.grad(head(x, targets), [x, head.weight]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_registry():
    assert distance_names()[0] == "euclidean" and hgpt.register_distance is register_distance
    for name in ("Mine", "Manhattan"):
        with pytest.raises(ValueError, match="there already is a distance 'manhattan', Manhattan: choose another name"):
            register_distance("manhattan")(type(name, (Distance,), {}))
    with pytest.raises(TypeError, match=r"subclasses of hgpt\.Distance; got"):
        register_distance("mine")(int)
    with pytest.raises(NotImplementedError, match="Mine has no power and no pairwise value"):
        type("Mine", (Distance,), {"power": None})(3).pairwise(torch.zeros(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"own.py cannot be executed: FileNotFoundError"),
        ("1 / 0", r"own.py cannot be executed: ZeroDivisionError"),
        ("x = 1", r"own.py registers no distance: it must use @hgpt.register_distance"),
    ],
)
def test_a_file_without_a_distance(tmp_path, text, message):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_distances(str(file))


@pytest.mark.parametrize(
    ("distance", "options", "message"),
    [
        ("minkowski", {"p": math.inf}, r'p must be .*for infinity: distance = "chebyshev"\); got inf'),
        ("minkowski", {"p": math.nan}, "p must be .*; got nan"),
        ("cosine", {"p": 3}, 'p = 3 has no effect with distance = "cosine", which has no options: remove it'),
        ("hamming", {"p": 3}, 'p = 3 has no effect with distance = "hamming", which has temperature: remove it'),
        ("hamming", {"temperature": -1.0}, "temperature must be a positive number; got -1.0"),
        ("mahalanobis", {"metric": "low_rank", "rank": 0}, "rank must lie between 1 and the width .*, 7; got 0"),
        ("mahalanobis", {"metric": "low_rank", "rank": "4"}, "cannot be made with metric = 'low_rank', rank = '4'"),
    ],
)
def test_bad_options(distance, options, message):
    """Beside those of test_settings."""
    with pytest.raises(ValueError, match=message):
        HarmonicHead(D, V, distance=distance, **options)
