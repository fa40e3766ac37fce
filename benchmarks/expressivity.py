"""How near HarMax with an exponent n can come to a softmax model's predictions, whatever network precedes it.

    python -m benchmarks.expressivity --teacher runs/quickstart_softmax --data data/python_docs

At --positions positions of the validation split the softmax model predicts P, (N, V). For each exponent this fits N
free hidden states x, V centres and, with radii, V log-weights, so that

    mean over positions of KL(P ‖ HarMax(x))

is small, by Adam from the conversion of hgpt.convert. This is what the head can express; a network must also find the
x, so a trained model does not come as near. "norm": the x are layer-normalised with a gain and an offset per
coordinate, as after a final layer norm. x and centres have D + 1 coordinates. The d ratio is the distance to the
target's centre divided by the median distance; the loss is that of the targets. RESULTS.md has the figures.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hgpt import cli, squared_distances
from hgpt.convert import Balanced, Softmax, balance, best_lift, hidden_states, last_layer
from hgpt.data.shards import TokenShards
from hgpt.source import find_source

LEARNING_RATE = 0.03  # of Adam; falls to 0 along half a cosine


def start(softmax: Softmax, balanced: Balanced, n: float, radius: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D + 1), centres (V, D + 1) and log-weights (V,) from which the fit begins.

    Without radii: d_i² = |x|² + C − 2 (x·u_i + a_i) with r_i² = C − 2 a_i − |u_i|², so that the order is softmax's.
    """
    found = best_lift(softmax, balanced, n)
    x = softmax.h @ found.matrix.T + found.offset
    if radius:
        return x, found.centres, found.log_weight
    inner = 2 * (balanced.a - balanced.a.mean()) + balanced.u_sq
    r_sq = (inner.max().maximum(n - balanced.x_sq) - inner).sqrt()
    return x, torch.cat((balanced.u, r_sq[:, None]), 1).float(), torch.zeros_like(found.log_weight)


def fit(
    softmax: Softmax, n: float, radius: bool, norm: bool, targets: Tensor, steps: int
) -> tuple[float, float, float]:
    """KL, d ratio and loss after `steps` steps."""
    p = softmax.logits(softmax.h).log_softmax(-1)
    x, centres, log_weight = start(softmax, balance(softmax), n, radius)
    gain = x.std(0).clamp_min(x.std() / 10)
    offset = x.mean(0)
    parameters = [x, centres, *([log_weight] if radius else []), *([gain, offset] if norm else [])]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def distances() -> Tensor:
        return squared_distances(F.layer_norm(x, x.shape[1:], gain, offset) if norm else x, centres)

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        q = (log_weight - 0.5 * n * distances().log()).log_softmax(-1)
        optimizer.zero_grad()
        F.kl_div(q, p, reduction="batchmean", log_target=True).backward()
        optimizer.step()
    with torch.no_grad():
        d_sq = distances()
        q = (log_weight - 0.5 * n * d_sq.log()).log_softmax(-1)
        ratio = (d_sq.gather(1, targets[:, None])[:, 0] / d_sq.median(1).values).sqrt().mean()
        kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return float(kl), float(ratio), float(F.nll_loss(q, targets))


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser("python -m benchmarks.expressivity", __doc__)
    parser.add_argument("--teacher", required=True, help="a finished run of configs/quickstart_softmax.toml")
    parser.add_argument("--data", default="data/python_docs")
    parser.add_argument("--positions", type=cli.at_least_1, default=2048)
    parser.add_argument("--steps", type=cli.at_least_1, default=300)
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 2, 3, 4, 8], help="exponents, in √D")
    options = parser.parse_args(arguments)
    model = find_source(options.teacher).load(torch.float32)[0].eval()
    h, targets = hidden_states(model, TokenShards.open(options.data, "val", None), options.positions)
    softmax = last_layer(model, h)
    loss = float(F.cross_entropy(softmax.logits(h), targets))
    print(f"{len(h):,} positions, loss of softmax {loss:.4f}\n")
    print("| n/√D | n | radii | hidden states | KL | d ratio | loss − softmax's |\n| --- " + "| ---: " * 6 + "|")
    for multiple in options.multiples:
        n = multiple * h.shape[1] ** 0.5
        for radius in (False, True):
            for norm in (True, False):
                kl, ratio, found = fit(softmax, n, radius, norm, targets, options.steps)
                words = ["learned" if radius else "none", "norm" if norm else "free"]
                cells = [f"{multiple:g}", f"{n:.4g}", *words, f"{kl:.4f}", f"{ratio:.3f}", f"{found - loss:+.4f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
