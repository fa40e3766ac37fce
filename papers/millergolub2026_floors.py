"""Losses below which the recipes of Miller-Golub et al., arXiv:2603.10225, cannot get, whatever the model.

    python -m papers.millergolub2026_floors

Bounded logits: their MLP, CNN, VGG16 and ViT take −s, the negative similarity s ∈ (0, 1], as logits. Label smoothing ε,
which their language models also apply in evaluation: the entropy of the smoothed targets q = (1 − ε) 1[i = y] + ε / K.
"""

import math
import sys
from collections.abc import Sequence

from hgpt.cli import Parser, run

CLASSES = {10: "CIFAR-10, MNIST", 100: "CIFAR-100", 50_257: "GPT-2's tokens", 151_936: "rows of their Qwen"}
SMOOTHING = 0.1


def bounded_floor(classes: int) -> float:
    """min −log p_y over logits in [−1, 0]: 0 for y and −1 for all others, log(1 + (K − 1) / e)."""
    return math.log1p((classes - 1) / math.e)


def smoothing_floor(classes: int, epsilon: float) -> float:
    """min over p of −Σ q_i log p_i, the entropy of q, reached at p = q."""
    other = epsilon / classes
    return -(1 - epsilon + other) * math.log(1 - epsilon + other) - (classes - 1) * other * math.log(other)


def main(argv: Sequence[str]) -> str:
    Parser("python -m papers.millergolub2026_floors", __doc__).parse_args(argv)
    lines = ["| classes | | logits in [−1, 0] | smoothing 0.1 | log K |", "| --- | --- | --- | --- | --- |"]
    for classes, what in CLASSES.items():
        numbers = bounded_floor(classes), smoothing_floor(classes, SMOOTHING), math.log(classes)
        lines.append(f"| {classes:,} | {what} | {' | '.join(f'{number:.3f}' for number in numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
