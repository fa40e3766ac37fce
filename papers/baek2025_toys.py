"""The synthetic tasks of Baek et al., arXiv:2502.01628: explained variance, epochs to generalise.

    python -m papers.baek2025_toys --faithful --tasks lattice circle --models harmonic-mlp standard-mlp
    python -m papers.baek2025_toys --tasks circle --epochs 50 --seeds 2            a smoke run
    python -m papers.baek2025_toys --faithful --tasks circle --plot circle.png     the case study, from saved runs

All seeds of a task and a model are trained side by side, in float32. A result is saved in --out and used again by the
next command with the same settings. Without --faithful the arms are equal: no bias, tied embeddings, no dropout at
test time, no test example that is also a training example.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgpt import HarmonicHead, SoftmaxHead, squared_distances
from hgpt.cli import Parser, run
from hgpt.durable import whole_file
from hgpt.errors import UserError
from hgpt.interpret.drawing import COLOURS, grid
from hgpt.model.harmax import harmonic_scores, resolve_exponent
from papers.structure import SCORES, plane

WIDTH, HIDDEN, BATCH, LR = 16, 100, 32, 2e-3
DROPOUT = 0.1  # of the transformer
EXAMPLES = 1000  # drawn with replacement
SPARSITY = 0.01  # weight of the penalty on the columns of the embedding
SUSTAINED = 20  # epochs in a row above ACCURACY
ACCURACY = 0.9
COMPONENTS = (1, 2, 4, 6)
MODELS = tuple(f"{head}-{body}" for body in ("mlp", "transformer") for head in ("standard", "harmonic", "spherical"))
Examples = tuple[np.ndarray, np.ndarray]  # tokens (N, k), labels (N,)


# ---------------------------------------------------------------------------------------------------------------
# Tasks


def lattice(rng: np.random.Generator) -> Examples:
    """x0, x1, x2 → x1 + x2 − x0 on a 5 x 5 lattice; point (a, b) is token 5a + b. Targets outside are left out."""
    points = rng.integers(0, 5, (5 * EXAMPLES, 3, 2))
    targets = points[:, 1] + points[:, 2] - points[:, 0]
    inside = np.flatnonzero(((targets >= 0) & (targets < 5)).all(1))[:EXAMPLES]
    return points[inside] @ [5, 1], targets[inside] @ [5, 1]


def circle(rng: np.random.Generator) -> Examples:
    """a, b → (a + b) mod 31."""
    pairs = rng.integers(0, 31, (EXAMPLES, 2))
    return pairs, pairs.sum(1) % 31


def equivalence(rng: np.random.Generator) -> Examples:
    """a, b < 40 → token 40 if a = b mod 5, otherwise 41."""
    pairs = rng.integers(0, 40, (EXAMPLES, 2))
    return pairs, np.where((pairs[:, 0] - pairs[:, 1]) % 5 == 0, 40, 41)


def genealogy(rng: np.random.Generator) -> Examples:
    """Node of a binary tree (1 to 126), relation → node. Relations: 127 parent, 128 grandparent, 129 sibling.

    As released, the sibling of 126 is 127, the token of "parent".
    """
    facts = [(i, 127, i // 2) for i in range(2, 127)] + [(i, 128, i // 4) for i in range(4, 127)]
    facts += [(i, 129, i + 1 if i % 2 == 0 else i - 1) for i in range(2, 127)]
    drawn = np.array(facts)[rng.integers(0, len(facts), EXAMPLES)]
    return drawn[:, :2], drawn[:, 2]


def permutation(rng: np.random.Generator) -> Examples:
    """i, j → the permutation of four things that applies j, then i. All 576 pairs, each once."""
    group = list(itertools.permutations(range(4)))
    pairs = np.array(list(itertools.product(range(24), repeat=2)))
    return pairs, np.array([group.index(tuple(group[i][k] for k in group[j])) for i, j in pairs])


@dataclass(frozen=True)
class Task:
    examples: Callable[[np.random.Generator], Examples]
    tokens: int  # of an example
    vocabulary: int
    rows: slice  # of the embedding, that the explained variance is measured of


TASKS = {
    "lattice": Task(lattice, 3, 25, slice(25)),
    "circle": Task(circle, 2, 31, slice(31)),
    "equivalence": Task(equivalence, 2, 42, slice(42)),
    "genealogy": Task(genealogy, 2, 130, slice(1, 127)),
    "permutation": Task(permutation, 2, 24, slice(24)),
}


@dataclass(frozen=True)
class Split:
    """Training and test examples; `leaked` (test,) tells which test examples are also training examples."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    leaked: Tensor


def split(task: str, seed: int, fraction: float) -> Split:
    """The examples of a seed: int(N · fraction) for training, the others for the test."""
    rng = np.random.default_rng(seed)
    x, y = TASKS[task].examples(rng)
    order = rng.permutation(len(x))
    train, test = np.split(order, [int(len(x) * fraction)])
    keys = x @ (1000 ** np.arange(x.shape[1]))
    tensors = [torch.from_numpy(a) for a in (x[train], y[train], x[test], y[test], np.isin(keys[test], keys[train]))]
    return Split(*tensors)


# ---------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Settings:
    """Equal arms by default."""

    fraction: float
    epochs: int
    learning_rate: float = LR
    exponent: str | float = "2"
    weight_decay: float | None = None  # None: theirs
    sparsity: float = SPARSITY
    faithful_bias: bool = False
    faithful_tying: bool = False
    dropout_at_test: bool = False
    epsilon: float = 0.0  # added to d²
    compiled: bool = False


class ShiftedHead(HarmonicHead):
    """HarmonicHead with ε added to every d², as released."""

    epsilon = 0.0

    def logits(self, x: Tensor) -> Tensor:
        return harmonic_scores(squared_distances(x, self.weight) + self.epsilon, self.exponent)


class SphericalHead(SoftmaxHead):
    """p_i = z_i² / Σ_j z_j² of the logits z of softmax."""

    def logits(self, x: Tensor) -> Tensor:
        return (super().logits(x).square() + 1e-12).log()


class Network(nn.Module):
    """Tokens (B, k) → logits (B, V)."""

    def __init__(self, task: Task, model: str, settings: Settings) -> None:
        super().__init__()
        kind, body = model.split("-")
        bias = settings.faithful_bias and model == "standard-mlp"
        self.tied = not (settings.faithful_tying and model == "harmonic-transformer")
        self.head: HarmonicHead | SoftmaxHead
        if kind == "harmonic":
            self.head = ShiftedHead(WIDTH, task.vocabulary, settings.exponent)
            self.head.epsilon = settings.epsilon
        else:
            self.head = {"standard": SoftmaxHead, "spherical": SphericalHead}[kind](WIDTH, task.vocabulary, radius=bias)
        bound = WIDTH**-0.5
        for parameter in self.head.parameters():  # nn.Linear's
            nn.init.uniform_(parameter, -bound, bound)
        if body == "mlp":
            layers: list[nn.Module] = [nn.Linear(WIDTH * task.tokens, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)]
            self.body = nn.Sequential(*layers)
            return
        if self.tied:
            nn.init.normal_(self.head.weight, std=bound)
        else:
            self.embedding = nn.Parameter(torch.randn(task.vocabulary, WIDTH) * bound)
        self.positions = nn.Parameter(torch.randn(task.tokens, WIDTH))
        options = {"dim_feedforward": 4 * WIDTH, "dropout": DROPOUT, "batch_first": True}
        self.body = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 2, **options) for _ in range(2)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.head.weight if self.tied else self.embedding)
        if not hasattr(self, "positions"):
            return self.head(self.body(x.flatten(1)))
        x = x + self.positions
        for layer in self.body:
            x = layer(x) + x
        return self.head(x[:, -1])


# ---------------------------------------------------------------------------------------------------------------
# Training


def sparsity(embedding: Tensor) -> Tensor:
    """mean_k sqrt(mean_i E_ik²), (V, D) → ()."""
    return embedding.square().mean(0).sqrt().mean()


@sdpa_kernel(SDPBackend.MATH)  # the fused attention knows no vmap
def train(task: str, model: str, seeds: Sequence[int], settings: Settings) -> dict[str, np.ndarray]:
    """Train one model of each seed, side by side.

    Returns:
        train, test, clean: accuracy of each epoch, (seeds, epochs), of the epoch's training batches, of all test
        examples, and of those that are no training examples. embedding: at the end, (seeds, V, 16).
    """
    torch.backends.mha.set_fastpath_enabled(False)  # it knows no vmap
    networks, data = [], [split(task, seed, settings.fraction) for seed in seeds]
    for seed in seeds:
        torch.manual_seed(seed)
        networks.append(Network(TASKS[task], model, settings))
    template = networks[0]
    parameters, _ = stack_module_state(networks)
    embedded = "head.weight" if template.tied else "embedding"
    decay = (0.005 if "transformer" in model else 0.01) if settings.weight_decay is None else settings.weight_decay
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=decay, fused=True)
    x, y, test_x, test_y, leaked = (
        torch.stack([getattr(one, name) for one in data]) for name in ("x", "y", "test_x", "test_y", "leaked")
    )
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(template, parameters, (x,))
        return F.cross_entropy(logits, y) + settings.sparsity * sparsity(parameters[embedded]), logits.argmax(-1) == y

    losses, row = vmap(loss, randomness="different"), torch.arange(len(seeds))[:, None]
    if settings.compiled:
        torch.compiler.reset()  # otherwise a later run of the process meets the limit of recompilations
        losses = torch.compile(losses, dynamic=False)  # with dynamic shapes dropout under vmap fails
    curves = {name: np.zeros((len(seeds), settings.epochs), np.float32) for name in ("train", "test", "clean")}
    for epoch in range(settings.epochs):
        template.train()
        order = torch.stack([torch.randperm(x.shape[1], generator=generator) for generator in orders])
        right = torch.zeros(len(seeds))
        for batch in order.split(BATCH, dim=1):
            value, correct = losses(parameters, x[row, batch], y[row, batch])
            optimizer.zero_grad()
            value.sum().backward()
            optimizer.step()
            right += correct.sum(1)
        template.train(settings.dropout_at_test)
        with torch.no_grad():
            correct = losses(parameters, test_x, test_y)[1]
        curves["train"][:, epoch] = right / x.shape[1]
        curves["test"][:, epoch] = correct.float().mean(1)
        curves["clean"][:, epoch] = (correct & ~leaked).sum(1) / (~leaked).sum(1)
    return curves | {"embedding": parameters[embedded].detach().numpy()}


def trained(task: str, model: str, seeds: Sequence[int], settings: Settings, out: Path) -> dict[str, np.ndarray]:
    """`train`, or its result from `out`; with `seconds`, how long it took."""
    key = json.dumps([task, model, list(seeds), asdict(settings)])
    path = out / f"{task}_{model}_{hashlib.sha256(key.encode()).hexdigest()[:8]}.npz"
    if not path.is_file():
        start = time.perf_counter()
        result = train(task, model, seeds, settings)
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **result, seconds=np.array(time.perf_counter() - start), key=np.array(key))
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the command trains again") from error


# ---------------------------------------------------------------------------------------------------------------
# Measures


def explained_variance(embedding: np.ndarray, components: Sequence[int] = COMPONENTS) -> np.ndarray:
    """Share of the variance in the first principal components, cumulative, (..., V, D) → (..., len(components))."""
    values = np.linalg.svd(embedding - embedding.mean(-2, keepdims=True), compute_uv=False) ** 2
    shares = values.cumsum(-1) / values.sum(-1, keepdims=True)
    return shares[..., np.array(components) - 1]


def sustained(accuracy: np.ndarray) -> np.ndarray:
    """First epoch, from 0, from which accuracy > 0.9 for 20 epochs, (seeds, epochs) → (seeds,); nan: none."""
    if accuracy.shape[1] < SUSTAINED:
        return np.full(len(accuracy), np.nan)
    above = np.lib.stride_tricks.sliding_window_view(accuracy > ACCURACY, SUSTAINED, axis=1).all(-1)
    return np.where(above.any(1), above.argmax(1), np.nan)


def median(values: np.ndarray) -> str:
    """The median of the numbers that are not nan, and how many these are."""
    known = values[~np.isnan(values)]
    return f"{np.median(known):g} ({len(known)})" if len(known) else "– (0)"


def table(task: str, model: str, fraction: float, result: dict[str, np.ndarray], test: str) -> str:
    """One row of Markdown."""
    embeddings = result["embedding"][:, TASKS[task].rows]
    variance = np.median(explained_variance(embeddings), axis=0)
    structure = np.median([SCORES[task](embedding) for embedding in embeddings])
    epochs = [median(sustained(result[name])) for name in ("train", test)]
    cells = [task, model, f"{fraction:g}", *(f"{v:.2f}" for v in variance), f"{structure:.3f}", *epochs]
    cells.append(f"{np.median(result[test][:, -1]):.3f}")
    return f"| {' | '.join(cells)} | {float(result['seconds']):.0f} s |"


VARIANCES = (f"EV {k}" for k in COMPONENTS)
COLUMNS = ("task", "model", "fraction", *VARIANCES, "structure", "epochs, train", "epochs, test", "accuracy", "took")
HEADING = f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|"


def draw(path: Path, task: str, results: dict[str, dict[str, np.ndarray]]) -> None:
    """The embedding's first two components, one panel a model: of the seed with the median share of the variance."""
    figure, axes = grid(len(results), 3, row_height=3.6, extra=0.3)
    for axis, (model, result) in zip(axes.flat, results.items(), strict=False):
        colour = COLOURS[("standard", "harmonic", "spherical").index(model.split("-")[0])]
        embeddings = result["embedding"][:, TASKS[task].rows]
        shares = explained_variance(embeddings, [2])[:, 0]
        seed = shares.argsort()[len(shares) // 2]
        points = plane(embeddings[seed])
        axis.scatter(*points.T, s=14, color=colour)
        for token, point in enumerate(points, TASKS[task].rows.start or 0):
            axis.annotate(str(token), point, (2, 2), textcoords="offset points", fontsize=7)
        axis.set(
            title=f"{model}, {shares[seed]:.0%} of the variance", xlabel="first component", ylabel="second component"
        )
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------
# Command


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m papers.baek2025_toys", __doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    add("--models", nargs="+", choices=MODELS, default=list(MODELS[:2]), metavar="MODEL", help=", ".join(MODELS))
    add("--seeds", type=int, default=20, help="seeds 0, 1, … (default: %(default)s)")
    add("--epochs", type=int, default=7000, help="default: %(default)s")
    add("--fractions", type=float, nargs="+", default=[0.8], metavar="X", help="training's share of the examples (0.8)")
    add("--exponent", default="2", help="n on d of the harmonic head; the paper's is %(default)s")
    add("--lr", type=float, default=LR, help="learning rate (default: %(default)s)")
    add("--weight-decay", type=float, help="default: 0.01 for the MLP, 0.005 for the transformer")
    add("--sparsity", type=float, default=SPARSITY, help="weight of the embedding's penalty (default: %(default)s)")
    add("--faithful", action="store_true", help="everything as released: the five options below, and ε = 1e-4 on d²")
    add("--split", choices=("faithful", "disjoint"), default="disjoint", help="test examples that count")
    add("--bias", choices=("faithful", "equal"), default="equal", help="faithful: the standard MLP alone has a bias")
    add("--tying", choices=("faithful", "equal"), default="equal", help="faithful: not the harmonic transformer")
    add("--dropout-at-test", action="store_true", help="test transformers with dropout")
    add("--compile", action="store_true", help="torch.compile: half the time for long runs; needs a C++ compiler")
    add("--out", type=Path, default=Path("runs/baek2025_toys"), help="folder of the results (default: %(default)s)")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the first task: the embeddings at the last fraction, median seeds",
    )
    options = parser.parse_args(argv)
    for name, value, rule, holds in (
        ("--seeds", options.seeds, "at least 1", options.seeds >= 1),
        ("--epochs", options.epochs, "at least 1", options.epochs >= 1),
        ("--fractions", options.fractions, "between 0.05 and 0.95", all(0.05 <= x <= 0.95 for x in options.fractions)),
        ("--lr", options.lr, "a positive number", 0 < options.lr < math.inf),
        ("--weight-decay", options.weight_decay, "0 or a positive number", 0 <= (options.weight_decay or 0) < math.inf),
        ("--sparsity", options.sparsity, "0 or a positive number", 0 <= options.sparsity < math.inf),
    ):
        if not holds:
            raise UserError(f"{name} must be {rule}; got {value}")
    try:
        resolve_exponent(options.exponent, WIDTH)
    except ValueError as error:
        raise UserError(f"--exponent: {error}") from error
    return options


def main(argv: Sequence[str]) -> str:
    options = parse_arguments(argv)
    torch.set_num_threads(1)  # the matrices are so small that a second thread only costs time
    faithful = options.faithful
    settings = Settings(
        faithful_bias=faithful or options.bias == "faithful",
        faithful_tying=faithful or options.tying == "faithful",
        dropout_at_test=faithful or options.dropout_at_test,
        epsilon=1e-4 if faithful else 0.0,
        exponent=options.exponent,
        fraction=options.fractions[-1],
        epochs=options.epochs,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        sparsity=options.sparsity,
        compiled=options.compile,
    )
    test = "test" if faithful or options.split == "faithful" else "clean"
    print(HEADING, flush=True)
    for task in options.tasks:
        results = {}
        for model, fraction in itertools.product(options.models, options.fractions):
            here = replace(settings, fraction=fraction)
            results[model] = trained(task, model, range(options.seeds), here, options.out)
            print(table(task, model, fraction, results[model], test), flush=True)
        if options.plot and task == options.tasks[0]:
            draw(options.plot, task, results)
    return "Medians over the seeds. Accuracy: of the last test. Epochs: of the seeds that got there, with their number."


if __name__ == "__main__":
    sys.exit(run(main))
