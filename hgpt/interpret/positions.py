"""What a model does at every position of a text: one number per position and measure, and a sample of hidden states.

One pass over the text, in chunks: nothing of the size (positions, vocabulary) is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hgpt.interpret.models import LoadedModel

# Positions that have logits at a time. With GPT-2's vocabulary an array of them takes 51 MB: above 32 MB glibc gives
# memory back to the system when it is freed. Chunks of half the size left the heap in pieces, 5 GB of them.
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Positions:
    """One entry per target, (N,), in the order of the text.

    Attributes:
        window: the window it was predicted in; positions of a window are not independent, windows nearly are.
        target: token id.
        loss: −log p of the target in nats, unsmoothed.
        confidence: largest probability.
        correct: whether the most probable token is the target.
        top5: whether the target is among the five most probable tokens.
        entropy: −Σ p log p in nats.
        nearest: whether the nearest centre is the target's (the same as `correct` with a harmonic head).
        log_margin: log(min_{i ≠ target} d_i / d_target): positive where the target's centre is the nearest.
        target_ratio: d_target / median_i d_i.
    """

    window: np.ndarray
    target: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    top5: np.ndarray
    entropy: np.ndarray
    nearest: np.ndarray
    log_margin: np.ndarray
    target_ratio: np.ndarray

    def window_sums(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Σ values and the number of positions of each window, for `statistics.bootstrap_ratio`."""
        index = np.unique(self.window, return_inverse=True)[1]
        return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class LayerLens:
    """The logit lens of one layer on a sample of positions: its hidden state through the final norm and the head.

    nostalgebraist, *interpreting GPT: the logit lens* (2020); here with distances too. Means over the sample and their
    standard errors.
    """

    layer: int
    loss: float
    loss_error: float
    accuracy: float
    target_ratio: float
    target_ratio_error: float


@dataclass(frozen=True, kw_only=True)
class TextMeasures:
    """`positions` of the whole text; `lens` by layer; `sample`: hidden states of each layer, (layers + 1, S, D)
    float32, at the positions `sample_at` of the text, which depend on the text and not on the model."""

    positions: Positions
    lens: tuple[LayerLens, ...]
    sample: np.ndarray
    sample_at: np.ndarray


def log_probability_measures(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`loss`, `confidence`, `correct`, `top5` and `entropy` of positions with `logits` (N, V) and `targets` (N,).

    A tie with the target counts as a hit of accuracy and top-5 only if the target comes first in `topk`.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = log_p.topk(min(5, log_p.shape[-1]), dim=-1)
    hits = top.indices == targets[:, None]
    return {
        "loss": -log_p.gather(-1, targets[:, None])[:, 0],
        "confidence": top.values[:, 0].exp(),
        "correct": hits[:, 0],
        "top5": hits.any(-1),
        # p log p is 0 where p is, also for a class that is masked with −inf.
        "entropy": -torch.special.xlogy(p, p).sum(-1),
    }


def distance_measures(log_distances: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`nearest`, `log_margin` and `target_ratio` of positions with log d (N, V) to every centre and `targets` (N,)."""
    own = log_distances.gather(-1, targets[:, None])[:, 0]
    median = log_distances.median(dim=-1).values
    others = log_distances.scatter(-1, targets[:, None], float("inf")).amin(-1)
    return {"nearest": own <= others, "log_margin": others - own, "target_ratio": torch.exp(own - median)}


def measure_text(
    loaded: LoadedModel,
    windows: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    sample: int,
    lens_sample: int,
    seed: int,
    advance: Callable[[int], object] = lambda positions: None,
) -> TextMeasures:
    """One pass over `windows`, pairs of input and target token ids, (T,) each.

    Args:
        sample: positions whose hidden states are kept, drawn without replacement from all of them.
        lens_sample: of these, how many go through the logit lens; 0 for none, otherwise at least 2.
        advance: called with the number of positions that are done, for a progress bar.
    """
    total = sum(len(inputs) for inputs, _ in windows)
    order = np.random.default_rng(seed).permutation(total)
    sample_at = np.sort(order[:sample])
    lens_at = set(np.sort(order[: min(lens_sample, sample)]).tolist())
    found: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Positions)}
    kept: list[np.ndarray] = []
    in_lens: list[bool] = []
    sample_targets: list[np.ndarray] = []
    done = 0
    for number, (inputs, window_targets) in enumerate(windows):
        hidden = loaded.hidden_states(torch.from_numpy(inputs.astype(np.int64))[None])
        targets = torch.from_numpy(window_targets.astype(np.int64)).to(loaded.device)
        for start in range(0, len(inputs), CHUNK):
            part = slice(start, start + CHUNK)
            x, y = hidden[-1][0, part], targets[part]
            logits = loaded.logits(x)
            measured = log_probability_measures(logits, y) | distance_measures(loaded.log_distances(x, logits), y)
            for name, value in measured.items():
                found[name].append(value.cpu().numpy())
            found["target"].append(window_targets[part].astype(np.int64))
            found["window"].append(np.full(len(y), number))
            advance(len(y))
        chosen = sample_at[(sample_at >= done) & (sample_at < done + len(inputs))]
        if len(chosen):
            kept.append(np.stack([layer[0].float().cpu().numpy()[chosen - done] for layer in hidden]))
            sample_targets.append(window_targets[chosen - done])
            in_lens += [int(position) in lens_at for position in chosen]
        done += len(inputs)
    states = np.concatenate(kept, axis=1)  # (layers + 1, S, D)
    positions = Positions(**{name: np.concatenate(parts) for name, parts in found.items()})
    mask = np.array(in_lens)
    lens = logit_lens(loaded, states[:, mask], np.concatenate(sample_targets)[mask]) if lens_sample else ()
    return TextMeasures(positions=positions, lens=lens, sample=states, sample_at=sample_at)


def logit_lens(loaded: LoadedModel, states: np.ndarray, targets: np.ndarray) -> tuple[LayerLens, ...]:
    """Loss, accuracy and d_target / d_median of each layer's states, (layers + 1, S, D), read by the final norm and
    head.

    The last entry is after the final norm already.
    """
    lens = []
    y = torch.from_numpy(targets.astype(np.int64)).to(loaded.device)
    bar = tqdm(states, desc=f"{loaded.source.label}: logit lens", unit="layer", disable=None, leave=False)
    for layer, layer_states in enumerate(bar):
        parts: dict[str, list[Tensor]] = {"loss": [], "correct": [], "target_ratio": []}
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            x = torch.from_numpy(layer_states[part]).to(loaded.device)
            if layer < len(states) - 1:
                x = loaded.final_norm(x)
            logits = loaded.logits(x)
            measured = log_probability_measures(logits, y[part])
            measured |= distance_measures(loaded.log_distances(x, logits), y[part])
            for name, values in parts.items():
                values.append(measured[name].double())
        means = {name: torch.cat(values) for name, values in parts.items()}
        errors = {name: float(values.std() / len(values) ** 0.5) for name, values in means.items()}
        lens.append(
            LayerLens(
                layer=layer,
                loss=float(means["loss"].mean()),
                loss_error=errors["loss"],
                accuracy=float(means["correct"].mean()),
                target_ratio=float(means["target_ratio"].mean()),
                target_ratio_error=errors["target_ratio"],
            )
        )
    return tuple(lens)
