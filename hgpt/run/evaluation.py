"""The loss over the whole validation split, and diagnostics of the head."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hgpt.data.baselines import bytes_per_target, unigram_loss
from hgpt.data.batches import check_length, read_windows
from hgpt.data.shards import TokenShards
from hgpt.model.heads import HarmonicHead
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.config import RunConfig
from hgpt.run.engines import Engine, whole


class Validation(NamedTuple):
    """An evaluation after `step` steps.

    `values`: "loss" in nats per token, "bits_per_byte" if the data has a tokenizer, and `Evaluation.diagnostics`.
    """

    step: int
    values: dict[str, float]

    @property
    def loss(self) -> float:
        return self.values["loss"]


def evaluation_windows(shards: TokenShards, seq_len: int) -> int:
    """The number of windows in which each token of a split but the first is a target exactly once.

    Raises UserError when the split is shorter than one sequence.
    """
    check_length(shards, seq_len)
    return -(-(len(shards) - 1) // seq_len)


class Evaluation:
    """Evaluates a model on the validation split: `evaluation(model, step, engine)` returns a `Validation`.

    Raises UserError when the validation split is shorter than one sequence.

    Attributes:
        unigram: the validation loss of a unigram model of the training split, set by `compare_with_unigram`.
    """

    def __init__(self, train_shards: TokenShards, val_shards: TokenShards, config: RunConfig) -> None:
        self.train_shards, self.shards = train_shards, val_shards
        self.config = config.eval
        self.seq_len = config.data.seq_len
        self.windows = evaluation_windows(val_shards, self.seq_len)
        self.unigram: float | None = None
        self.bytes_per_target = bytes_per_target(val_shards)

    def compare_with_unigram(self, engine: Engine) -> None:
        """Set `unigram`, and print it, if eval.unigram_baseline asks for it. Collective."""
        if self.config.unigram_baseline:
            self.unigram = engine.from_main(lambda: unigram_loss(self.train_shards, self.shards))
            engine.say(f"a unigram model of this data has validation loss {self.unigram:.4f}")

    def __call__(self, model: nn.Module, step: int, engine: Engine) -> Validation:
        """Evaluate without changing the model, its mode or the random state. Collective."""
        was_training = model.training
        model.eval()
        values = {"loss": self.loss(model, engine)}
        if self.bytes_per_target is not None:  # comparable between tokenizers, unlike nats per token
            values["bits_per_byte"] = values["loss"] / (math.log(2) * self.bytes_per_target)
        values |= self.diagnostics(model, engine)
        model.train(was_training)
        return Validation(step, values)

    @torch.no_grad()
    def loss(self, model: nn.Module, engine: Engine) -> float:
        """−(1/N) Σ log p(token) over all N targets of the split, in nats; no smoothing, no sampling.

        The windows lie end to end, and each process takes every world_size-th one. Losses and targets are summed in
        float64, so each target has the same weight, also in the shorter last window, and the number of processes
        changes only the order of the sum.
        """
        mine = range(engine.rank, self.windows, engine.world_size)
        # Every process makes the same number of forward passes: sharded engines gather parameters in each.
        largest_share = -(-self.windows // engine.world_size)
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # Σ −log p, N
        for start in range(0, largest_share, self.config.micro_batch):
            part = list(mine[start : start + self.config.micro_batch])
            inputs, targets = read_windows(self.shards, part or [0], self.seq_len)
            if not part:
                targets = torch.full_like(targets, -100)
            inputs, targets = inputs.to(engine.device), targets.to(engine.device)
            with engine.accelerator.autocast():
                loss = model(inputs, shift_labels=targets, num_items_in_batch=1, loss_only=True, use_cache=False).loss
            total += torch.stack((loss.double(), (targets != -100).sum().double()))
        total = engine.accelerator.reduce(total, reduction="sum")
        return float(total[0] / total[1])

    @torch.no_grad()
    def diagnostics(self, model: nn.Module, engine: Engine) -> dict[str, float]:
        """Diagnostics of the head on eval.diagnostic_windows sequences, evenly spaced over the split. Collective.

        For every head: `accuracy` (the share of positions whose largest logit is the target's) and the mean and maximum
        of |w_i| over the vocabulary and of |x| over the positions. For a harmonic head also the means over positions of
        d_target / d_median and d_min / d_median, with d = exp(−z / n) from the logits z and d_median the median of the
        position's distances. A d_target / d_median near 1 means that the distances hardly differ, and that the head
        acts like a softmax head. `exponent`: a learned n. With radii d = exp((a − z) / n), and with either head
        `log_weight_mean` and `log_weight_std` over the vocabulary.
        """
        plain: HGPTForCausalLM = engine.accelerator.unwrap_model(model)
        config, head = plain.config, plain.lm_head
        exponent, learned = float(config.exponent), head.log_exponent if isinstance(head, HarmonicHead) else None
        if learned is not None:
            with whole(learned) as log_exponent:
                exponent = float(log_exponent.exp())
        a = None
        if head.log_weight is not None:
            with whole(head.log_weight) as log_weight:
                a = log_weight[: config.vocab_size].float().clone()
        sums: dict[str, float] = {}
        x_norm_max, positions, count = 0.0, 0, min(self.config.diagnostic_windows, self.windows)
        for window in sorted({int(i * self.windows / count) for i in range(count)}):
            inputs, targets = (t.to(engine.device) for t in read_windows(self.shards, [window], self.seq_len))
            # For a few windows, compiling another forward pass does not pay.
            with engine.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                output = model(inputs, output_hidden_states=True, use_cache=False)
            counted = targets[0] != -100
            targets, logits = targets[0, counted], output.logits[0, counted]  # (T,), (T, V)
            x_norms = output.hidden_states[-1][0, counted].float().norm(dim=-1)
            values = {"accuracy": (logits.argmax(-1) == targets).float(), "x_norm_mean": x_norms}
            if config.head == "harmonic":
                values |= _distance_ratios(logits if a is None else logits - a, targets, exponent)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
            x_norm_max = max(x_norm_max, float(x_norms.max()))
            positions += len(targets)
        with whole(head.weight) as centres:
            w_norms = centres[: config.vocab_size].float().norm(dim=-1)
        found = {name: total / positions for name, total in sums.items()}
        found |= {"x_norm_max": x_norm_max, "w_norm_mean": float(w_norms.mean()), "w_norm_max": float(w_norms.max())}
        if learned is not None:
            found["exponent"] = exponent
        if a is not None:
            found |= {"log_weight_mean": float(a.mean()), "log_weight_std": float(a.std())}
        return found


def _distance_ratios(logits: Tensor, targets: Tensor, exponent: float) -> dict[str, Tensor]:
    """d_target / d_median and d_min / d_median of each position, (T,), from z = −n log d, (T, V)."""
    median = logits.median(dim=-1).values  # z falls with d: the median z belongs to the median d
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    return {
        "target_over_median_distance": torch.exp((median - target) / exponent),
        "nearest_over_median_distance": torch.exp((median - logits.amax(-1)) / exponent),
    }
