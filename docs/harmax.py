"""Draw docs/harmax.png: which token a harmonic and a softmax layer predict at each point of a plane.

    python docs/harmax.py

Both layers have the same five vectors. The colour names the most probable token, and is the stronger the more
probable the token is.
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from hgpt import log_harmax, squared_distances

WORDS = ("cat", "dog", "horse", "seven", "eight")
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00")
VECTORS = torch.tensor([[-1.2, 0.7], [-0.4, 1.4], [-1.3, -0.6], [1.1, 0.3], [0.8, -0.9]])
EXPONENT, SOFTMAX_SCALE, HALF_WIDTH, POINTS = 8, 4, 4, 400


def main() -> None:
    matplotlib.use("Agg")
    ticks = torch.linspace(-HALF_WIDTH, HALF_WIDTH, POINTS)
    x = torch.cartesian_prod(ticks, ticks)[:, [1, 0]]  # (N, 2), row by row
    panels = {
        "harmonic: distance to its centre": log_harmax(squared_distances(x, VECTORS), EXPONENT),
        "softmax: inner product with its vector": (SOFTMAX_SCALE * x @ VECTORS.T).log_softmax(-1),
    }
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained")
    for axis, (title, log_p) in zip(axes, panels.items(), strict=True):
        p, token = log_p.exp().max(-1)
        strength = ((p - 0.2) / 0.8)[:, None]  # 0 where all five are equally probable
        image = 1 - strength * (1 - torch.tensor([to_rgb(colour) for colour in COLOURS])[token])
        extent = (-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH)
        axis.imshow(image.view(POINTS, POINTS, 3).numpy(), origin="lower", extent=extent, interpolation="bilinear")
        axis.contour(ticks, ticks, p.view(POINTS, POINTS), levels=[0.9], colors="white", linewidths=0.8)
        axis.scatter(*VECTORS.T, s=28, color="black")
        for word, (across, up) in zip(WORDS, VECTORS.tolist(), strict=True):
            axis.annotate(word, (across, up), (5, 5), textcoords="offset points", fontweight="bold")
        axis.set(title=title, xlabel="hidden state, coordinate 1", ylabel="hidden state, coordinate 2")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
