"""Language models of Miller-Golub et al., arXiv:2603.10225, with corrected heads, small unless asked otherwise.

    python -m papers.millergolub2026_lm --data data/python_docs --steps 200
    python -m papers.millergolub2026_lm --data data/openwebtext --models gpt bert --layers 12 --width 768 --steps 10000

DATA is a folder of data_prep. gpt is GPT-2, bert a pre-LN BERT (the head directly behind the final norm, tied, without
bias), qwen a Qwen 2 (SwiGLU, RMSNorm, RoPE). Theirs: contexts, learning rates, warm-ups
(Qwen's is not known), BERT's dropout 0.1, Qwen's label smoothing 0.1. Not theirs: batches, rate, clipping at 1.

BERT: 15 % of the positions are targets; of these 80 % show the mask, 10 % a random token, 10 % themselves. The mask is
a token of its own behind the vocabulary, which is never predicted; theirs is token 103, a word. The validation loss is
−log p of the targets in nats, without smoothing. The smoothed one is what they report for Qwen, clamped at 20.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hgpt import harmonize
from hgpt.cli import Parser, run
from hgpt.data.batches import TrainingBatches, num_windows
from hgpt.data.shards import TokenShards
from hgpt.errors import UserError
from hgpt.model.distances import distance_names
from papers.millergolub2026_floors import SMOOTHING, smoothing_floor

HEADS = ("softmax", *distance_names())
IGNORED = -100
SPECIAL = ("bos_token_id", "eos_token_id")  # of GPT-2's own vocabulary


@dataclass(frozen=True)
class Recipe:
    context: int
    lr: float
    warmup: int
    smoothing: float = 0.0


RECIPES = {"gpt": Recipe(1024, 2e-4, 500), "bert": Recipe(512, 1e-4, 1000), "qwen": Recipe(1024, 1e-4, 500, SMOOTHING)}


def make_backbone(kind: str, vocab_size: int, layers: int, width: int, context: int) -> Any:
    """A language model with random weights; BERT has a row more, for the mask."""
    heads = max(1, width // 64)
    if kind == "gpt":
        shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context}
        others = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | dict.fromkeys(SPECIAL)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **others))
    common = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    if kind == "qwen":
        rope = {"rope_type": "default", "rope_theta": 1e6}
        shape = {"intermediate_size": width * 4864 // 896, "num_key_value_heads": max(1, heads // 7)}
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, rope_parameters=rope, **shape, **common))
    model = MegatronBertForMaskedLM(
        MegatronBertConfig(vocab_size=vocab_size + 1, intermediate_size=4 * width, **common)
    )
    model.cls.predictions.transform = nn.Identity()
    model.cls.predictions.decoder.bias = model.cls.predictions.bias = None
    return model


def mask(ids: Tensor, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a masked model, (B, T) each; the mask is token `vocab_size`."""
    chance, what = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    chosen = chance < 0.15
    words = torch.randint(vocab_size, ids.shape, generator=generator)
    shown = torch.where(what < 0.8, torch.full_like(ids, vocab_size), torch.where(what < 0.9, words, ids))
    return torch.where(chosen, shown, ids), torch.where(chosen, ids, IGNORED)


def batches(
    shards: TokenShards, kind: str, steps: int, seed: int, options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) of each step."""
    context = options.context or RECIPES[kind].context
    size = max(1, min(options.batch, num_windows(len(shards), context)))
    windows = TrainingBatches(shards, seq_len=context, global_batch=size, micro_batch=size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        ids, following = windows(step, 0)
        yield mask(ids, shards.vocab_size, generator) if kind == "bert" else (ids, following)


def losses(model: nn.Module, ids: Tensor, targets: Tensor, vocab_size: int, smoothing: float) -> Tensor:
    """Mean loss of the targets that are not ignored, ()."""
    logits = model(input_ids=ids).logits[..., :vocab_size].flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)


def make_model(kind: str, head: str, vocab_size: int, options: argparse.Namespace) -> nn.Module:
    context = options.context or RECIPES[kind].context
    model = make_backbone(kind, vocab_size, options.layers, options.width, context)
    if head == "softmax":
        return model
    distance = {"distance": head} | ({"distance_options": {"p": 3}} if head == "minkowski" else {})
    try:
        return harmonize(model, options.exponent, vocab_size=vocab_size, **distance)
    except ValueError as error:
        raise UserError(f"--exponent {options.exponent} or the head {head}: {error}") from error


def train(
    kind: str, head: str, splits: tuple[TokenShards, TokenShards], options: argparse.Namespace
) -> tuple[int, float, float]:
    """The number of parameters, the validation loss, and the smoothed one."""
    torch.manual_seed(options.seed)
    recipe, vocab_size = RECIPES[kind], splits[0].vocab_size
    model = make_model(kind, head, vocab_size, options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr or recipe.lr)
    warmup = max(1, min(recipe.warmup, options.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    for ids, targets in batches(splits[0], kind, options.steps, options.seed, options):
        loss = losses(model, ids, targets, vocab_size, recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = [
            [float(losses(model, ids, targets, vocab_size, smoothing)) for smoothing in (0.0, SMOOTHING)]
            for ids, targets in batches(splits[1], kind, options.val_batches, 0, options)
        ]
    plain, smoothed = (sum(column) / len(column) for column in zip(*found, strict=True))
    return sum(parameter.numel() for parameter in model.parameters()), plain, smoothed


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m papers.millergolub2026_lm", __doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="folder of token shards")
    add("--models", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="MODEL", help=", ".join(RECIPES))
    add("--heads", nargs="+", choices=HEADS, default=["softmax", "euclidean"], metavar="HEAD", help=", ".join(HEADS))
    add("--exponent", default="2*sqrt_dim", help="n on d of the harmonic heads (default: %(default)s)")
    add("--layers", type=int, default=2, help="default: %(default)s")
    add("--width", type=int, default=128, help="a multiple of 64 (default: %(default)s)")
    add("--context", type=int, help="default: theirs")
    add("--batch", type=int, default=8, help="sequences of a step (default: %(default)s)")
    add("--steps", type=int, default=200, help="default: %(default)s")
    add("--val-batches", type=int, default=4, help="default: %(default)s")
    add("--lr", type=float, help="default: theirs")
    add("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    for name in ("layers", "width", "context", "batch", "steps", "val_batches"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    if options.width % 64:
        raise UserError(f"--width must be a multiple of 64; got {options.width}")
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise UserError(f"--lr must be a positive number; got {options.lr}")
    return options


def main(argv: Sequence[str]) -> str:
    options = parse_arguments(argv)
    train_shards, val_shards = (TokenShards.open(options.data, split) for split in ("train", "val"))
    print(
        "| model | head | parameters | validation loss | smoothed 0.1 | took |\n| --- | --- | --- | --- | --- | --- |"
    )
    for kind in options.models:
        for head in options.heads:
            start = time.perf_counter()
            parameters, plain, smoothed = train(kind, head, (train_shards, val_shards), options)
            took = time.perf_counter() - start
            print(f"| {kind} | {head} | {parameters:,} | {plain:.3f} | {smoothed:.3f} | {took:.0f} s |", flush=True)
    floor = smoothing_floor(train_shards.vocab_size, SMOOTHING)
    return f"No model has a smoothed loss below {floor:.3f} on {train_shards.vocab_size:,} tokens."


if __name__ == "__main__":
    sys.exit(run(main))
