"""The tokens after which a harmonic head on a trained softmax model's trunk is near softmax's loss.

    python -m benchmarks.distillation --teacher runs/quickstart_softmax --out comparisons/distillation

Trains each arm of `ARMS` for the same steps, on the same tokens, at one constant learning rate, from the weights of a
finished run of configs/quickstart_softmax.toml. "softmax" is that model trained further; "no lift" is a harmonic head
that starts with its rows as centres; "distilled": that model is the teacher. n = 4√D at the end. A lift is untied and
has radii, so softmax is also trained untied and with biases. Prints the validation loss minus that of "softmax" after
the same tokens, and the tokens from which the difference stays at most GAP. Finished arms are not trained again.
RESULTS.md has the figures.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hgpt import cli
from hgpt.history import records

GAP = 0.01  # nats per token
CONFIGS = Path(__file__).parent.parent / "configs"
HARMONIC = "--model.head.exponent=4*sqrt_dim --model.head.radius=learned --model.tie_word_embeddings=false"
LIFTED = HARMONIC + " --model.init_from={out}/lift{multiple} --model.backbone={out}/lift{multiple}"
FALLING = LIFTED.replace("{multiple}", "16") + " --train.exponent_start=4 --train.exponent_steps={half}"
UNTIED = "--model.init_from={teacher} --model.tie_word_embeddings=false --model.head.radius=learned"
DISTILLED = " --train.distill_from={teacher} --train.distill_weight={weight}"
ARMS = {
    "softmax": "--model.init_from={teacher}",
    "softmax, distilled": "--model.init_from={teacher}" + DISTILLED,
    "softmax, untied, bias": UNTIED + " --model.head.radius_init=zero",
    "softmax, untied, bias, distilled": UNTIED + " --model.head.radius_init=zero" + DISTILLED,
    "lift at 4√D, distilled": LIFTED.replace("{multiple}", "4") + DISTILLED,
    "lift at 4√D": LIFTED.replace("{multiple}", "4"),
    "no lift": HARMONIC + " --model.init_from={teacher}",
    "lift at 16√D, n falls, distilled": FALLING + DISTILLED,
    "lift at 16√D, n falls": FALLING,
}


def call(*words: object) -> None:
    """Run python with these words."""
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def losses(arm: str, options: argparse.Namespace) -> dict[int, float]:
    """Validation loss of an arm by step; trains the arm unless it is finished."""
    run = options.out / "".join(letter if letter.isalnum() else "_" for letter in arm)
    found = {record["step"]: record["loss"] for record in records(run, "eval")}
    if options.steps not in found:
        chosen = ARMS[arm].format(**vars(options), half=options.steps // 2)
        config = CONFIGS / ("quickstart_softmax.toml" if arm.startswith("softmax") else "quickstart.toml")
        shared = (
            f"--name={run.name} --runs_dir={options.out} --resume=auto --data.path={options.data} --train.seed=1 "
            f"--train.steps={options.steps} --eval.every={options.every} --eval.unigram_baseline=false "
            f"--checkpoint.every={options.steps} --optim.lr={options.lr} --optim.schedule=constant "
            f"--optim.warmup_steps=10"
        )
        call(CONFIGS.parent / "train.py", "--config", config, *shared.split(), *chosen.split())
    return {record["step"]: record["loss"] for record in records(run, "eval") if record["step"] <= options.steps}


def main(arguments: Sequence[str]) -> str:
    parser = cli.Parser("python -m benchmarks.distillation", __doc__)
    parser.add_argument("--teacher", required=True, help="a finished run of configs/quickstart_softmax.toml")
    parser.add_argument("--data", default="data/python_docs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--lr", default="1e-3")
    parser.add_argument("--weight", default="0.5", help="train.distill_weight (default: %(default)s)")
    options = parser.parse_args(arguments)
    for multiple in (4, 16):
        if not (folder := options.out / f"lift{multiple}").exists():
            where = ("--exponent", f"{multiple}*sqrt_dim", "--data", options.data, "--out", folder)
            call("-m", "hgpt.convert", options.teacher, *where)
    curves = {arm: losses(arm, options) for arm in ARMS}
    softmax, tokens = curves["softmax"], 2048  # a step
    rows = [["tokens", *(f"{step * tokens:,}" for step in softmax), f"gap ≤ {GAP} from"]]
    rows.append(["softmax, loss", *(f"{loss:.4f}" for loss in softmax.values()), ""])
    for arm, curve in list(curves.items())[1:]:
        gaps = {step: loss - softmax[step] for step, loss in curve.items()}
        wide = [step for step, gap in gaps.items() if gap > GAP]
        near = next((step for step in gaps if not wide or step > max(wide)), None)
        rows.append([arm, *(f"{gap:+.4f}" for gap in gaps.values()), "–" if near is None else f"{near * tokens:,}"])
    return cli.markdown(rows, numbers=len(softmax) + 1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
