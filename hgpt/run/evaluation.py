"""Validation loss over the whole validation set, and where the hidden states stand among the centres."""

import torch
from accelerate import Accelerator
from torch import Tensor

from hgpt.data.batches import read_windows
from hgpt.data.shards import TokenShards
from hgpt.errors import UserError
from hgpt.model.heads import HarmonicHead
from hgpt.model.modeling_hgpt import HGPTForCausalLM
from hgpt.run.engines import whole


def evaluation_windows(shards: TokenShards, seq_len: int) -> int:
    """Windows that cover a split so that every token but the very first is a target exactly once.

    Raises UserError when the split is shorter than one sequence.
    """
    if len(shards) < seq_len + 1:
        raise UserError(
            f"{shards.folder}: the {shards.split} split has {len(shards):,} tokens, fewer than one sequence of "
            f"data.seq_len + 1 = {seq_len + 1}. Lower data.seq_len, or prepare the data with a larger validation split."
        )
    return -(-(len(shards) - 1) // seq_len)


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module, shards: TokenShards, *, seq_len: int, micro_batch: int, accelerator: Accelerator
) -> float:
    """−(1/N) Σ log p(token) over all N targets of the split, in nats; no smoothing, no sampling.

    The windows lie end to end, and the processes take them in turn; the sum and the count of targets are added up in
    float64, so that a short last window weighs what it holds and the number of processes changes nothing but the order
    of the sum.
    """
    windows = evaluation_windows(shards, seq_len)
    mine = list(range(accelerator.process_index, windows, accelerator.num_processes))
    # Every process makes the same number of forward passes: sharded engines gather parameters in each.
    passes = _passes(windows, accelerator.num_processes, micro_batch)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # Σ −log p, N
    was_training = model.training
    model.eval()
    for i in range(passes):
        part = mine[i * micro_batch : (i + 1) * micro_batch]
        inputs, targets = read_windows(shards, part or [0], seq_len)
        if not part:
            targets = torch.full_like(targets, -100)
        with accelerator.autocast():
            loss = model(
                inputs.to(accelerator.device),
                shift_labels=targets.to(accelerator.device),
                num_items_in_batch=1,
                loss_only=True,
                use_cache=False,
            ).loss
        total += torch.stack((loss.double(), (targets != -100).sum().to(loss.device).double()))
    model.train(was_training)
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])


def _passes(windows: int, processes: int, micro_batch: int) -> int:
    largest_share = -(-windows // processes)
    return -(-largest_share // micro_batch)


@torch.no_grad()
def head_diagnostics(
    model: torch.nn.Module, shards: TokenShards, *, seq_len: int, windows: int, accelerator: Accelerator
) -> dict[str, float]:
    """In which regime the head works, on `windows` sequences spread evenly over the split.

    For every head: `accuracy` (the share of positions whose nearest centre, or largest logit, is the target), the mean
    and the maximum of |w_i| over the vocabulary and of |x| over the positions. For a harmonic head besides, with d from
    the logits (d = exp(−z / n), whatever the metric): the means over positions of d to the target and of d to the
    nearest centre, each over the median of the position's distances. A target ratio near 1 says that distances hardly
    differ: such a model is a softmax model under another name. Where n is learnt, `exponent` is what it has become.
    """
    unwrapped: HGPTForCausalLM = accelerator.unwrap_model(model)
    config, head = unwrapped.config, unwrapped.lm_head
    exponent, learnt = float(config.exponent), head.log_exponent if isinstance(head, HarmonicHead) else None
    if learnt is not None:
        with whole(learnt) as log_exponent:
            exponent = float(log_exponent.exp())
    count = evaluation_windows(shards, seq_len)
    chosen = sorted({int(i * count / windows) for i in range(windows)})
    sums: dict[str, float] = {}
    maximum_x = 0.0
    positions = 0
    was_training = model.training
    model.eval()
    for window in chosen:
        inputs, targets = (tensor.to(accelerator.device) for tensor in read_windows(shards, [window], seq_len))
        with accelerator.autocast():
            output = model(inputs, output_hidden_states=True, use_cache=False)
        counted = targets[0] != -100
        targets = targets[0, counted]  # (T,)
        logits = output.logits[0, counted]  # (T, V)
        x_norms = output.hidden_states[-1][0, counted].float().norm(dim=-1)
        values = {"accuracy": (logits.argmax(-1) == targets).float(), "x_norm_mean": x_norms}
        if config.head == "harmonic":
            values |= _distance_ratios(logits, targets, exponent)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
        maximum_x = max(maximum_x, float(x_norms.max()))
        positions += len(targets)
    model.train(was_training)
    with whole(unwrapped.lm_head.weight) as centres:
        w_norms = centres[: config.vocab_size].float().norm(dim=-1)
    return {name: total / positions for name, total in sums.items()} | {
        "x_norm_max": maximum_x,
        "w_norm_mean": float(w_norms.mean()),
        "w_norm_max": float(w_norms.max()),
        **({} if learnt is None else {"exponent": exponent}),
    }


def _distance_ratios(logits: Tensor, targets: Tensor, exponent: float) -> dict[str, Tensor]:
    """d_target / d_median and d_min / d_median of each position, (T,), from z = −n log d, (T, V)."""
    median = logits.median(dim=-1).values  # the scores fall with d, so their median is the median distance's
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    return {
        "target_over_median_distance": torch.exp((median - target) / exponent),
        "nearest_over_median_distance": torch.exp((median - logits.amax(-1)) / exponent),
    }
