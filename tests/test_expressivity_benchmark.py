"""benchmarks.expressivity on a layer made by hand."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import expressivity
from hgpt.convert import Softmax


@pytest.fixture
def softmax() -> Softmax:
    torch.manual_seed(0)
    return Softmax(w=torch.randn(30, 8), b=torch.randn(30), h=torch.randn(200, 8))


@pytest.mark.parametrize("radius", [False, True])
def test_before_the_fit_the_order_of_tokens_is_softmaxs(softmax: Softmax, radius: bool) -> None:
    x, centres, log_weight = expressivity.start(softmax, expressivity.balance(softmax), 1e4, radius)
    scores = log_weight.double() - 1e4 * torch.cdist(x.double(), centres.double()).log()
    assert (scores.argmax(1) == softmax.logits(softmax.h).argmax(1)).double().mean() > 0.98


def test_a_fit_lowers_the_divergence_and_a_large_exponent_allows_a_smaller_one(softmax: Softmax) -> None:
    targets = softmax.logits(softmax.h).argmax(1)
    found = {n: expressivity.fit(softmax, n, True, False, targets, steps) for n, steps in ((2.0, 150), (60.0, 150))}
    begun = expressivity.fit(softmax, 2.0, True, False, targets, 1)
    assert found[60.0][0] < found[2.0][0] < begun[0]
    of_softmax = float(F.cross_entropy(softmax.logits(softmax.h), targets))
    assert found[60.0][2] == pytest.approx(of_softmax, abs=0.02)
    assert found[2.0][1] < found[60.0][1] < 1  # the smaller n, the nearer the target
