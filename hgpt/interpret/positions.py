"""One pass of a model over a text: a number per position and quantity, and a sample of hidden states.

Logits are computed for CHUNK positions at a time, so no array has (positions, vocabulary) entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hgpt.interpret.models import LoadedModel

# With GPT-2's vocabulary the logits of a chunk take 51 MB. glibc returns blocks above 32 MB to the system; smaller
# chunks fragmented the heap, up to 5 GB.
CHUNK = 256

Window = tuple[np.ndarray, np.ndarray]  # input and target token ids, (T,) each


@dataclass(frozen=True, kw_only=True)
class Positions:
    """One entry per target, (N,), in the order of the text."""

    window: np.ndarray  # 0, 1, …; positions of one window are dependent, windows nearly independent
    target: np.ndarray  # token id
    loss: np.ndarray  # −log p of the target in nats, unsmoothed
    confidence: np.ndarray  # largest probability
    correct: np.ndarray  # whether the most probable token is the target
    top5: np.ndarray  # whether the target is among the five most probable tokens
    entropy: np.ndarray  # −Σ p log p in nats
    nearest: np.ndarray  # whether the nearest centre is the target's; equals `correct` for a harmonic head
    log_margin: np.ndarray  # log(min_{i ≠ target} d_i / d_target), positive if the target's centre is the nearest
    target_ratio: np.ndarray  # d_target / median_i d_i

    def window_sums(self, values: np.ndarray) -> np.ndarray:
        """Σ values of each window, (windows,), float64."""
        return np.bincount(self.window, weights=values)


@dataclass(frozen=True, kw_only=True)
class TextMeasures:
    """The result of `measure_text`."""

    positions: Positions  # of the whole text
    sample: np.ndarray  # hidden states of each layer, (layers + 1, S, D) float32
    sample_at: np.ndarray  # positions of the sample, (S,); they depend on the text alone

    @property
    def windows(self) -> int:
        return int(self.positions.window[-1]) + 1


def log_probability_measures(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`loss`, `confidence`, `correct`, `top5` and `entropy` from logits (N, V) and targets (N,).

    If another token ties with the target, the order of `topk` decides whether the target counts as predicted.
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
        "entropy": -torch.special.xlogy(p, p).sum(-1),  # xlogy: 0 for p = 0, also for a logit of −inf
    }


def distance_measures(log_distances: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`nearest`, `log_margin` and `target_ratio` from log d (N, V) to every centre and targets (N,)."""
    own = log_distances.gather(-1, targets[:, None])[:, 0]
    median = log_distances.median(dim=-1).values
    others = log_distances.scatter(-1, targets[:, None], float("inf")).amin(-1)
    return {"nearest": own <= others, "log_margin": others - own, "target_ratio": torch.exp(own - median)}


def measure_states(loaded: LoadedModel, x: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """The quantities of `Positions` from hidden states after the final norm, (N, D), and targets, (N,)."""
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(targets), CHUNK):
        states, y = x[start : start + CHUNK], targets[start : start + CHUNK]
        logits = loaded.logits(states)
        measured = log_probability_measures(logits, y) | distance_measures(loaded.log_distances(states, logits), y)
        for name, values in measured.items():
            found.setdefault(name, []).append(values.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def sampled_positions(total: int, count: int, seed: int) -> np.ndarray:
    """Up to `count` random positions, sorted. Of one seed, a smaller sample is a subset of a larger one."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def measure_text(
    loaded: LoadedModel,
    windows: Sequence[Window],
    *,
    sample: int,
    seed: int,
    advance: Callable[[int], object] = lambda positions: None,
) -> TextMeasures:
    """One pass over `windows`.

    Args:
        sample: positions whose hidden states are kept, chosen with `seed`.
        advance: called with the number of positions just measured, for a progress bar.
    """
    sample_at = sampled_positions(sum(len(inputs) for inputs, _ in windows), sample, seed)
    found: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Positions)}
    kept: list[np.ndarray] = []
    done = 0
    for number, (inputs, window_targets) in enumerate(windows):
        hidden = loaded.hidden_states(torch.from_numpy(inputs.astype(np.int64))[None])
        targets = torch.from_numpy(window_targets.astype(np.int64)).to(loaded.device)
        for name, values in measure_states(loaded, hidden[-1][0], targets).items():
            found[name].append(values)
        advance(len(inputs))
        found["target"].append(window_targets.astype(np.int64))
        found["window"].append(np.full(len(inputs), number))
        chosen = sample_at[(sample_at >= done) & (sample_at < done + len(inputs))] - done
        if len(chosen):
            kept.append(np.stack([layer[0].float().cpu().numpy()[chosen] for layer in hidden]))
        done += len(inputs)
    return TextMeasures(
        positions=Positions(**{name: np.concatenate(parts) for name, parts in found.items()}),
        sample=np.concatenate(kept, axis=1),
        sample_at=sample_at,
    )
