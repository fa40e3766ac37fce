"""Begin as softmax, end as harmonic: the validation loss of each ending after the same tokens.

    python -m benchmarks.softmax_first --data data/python_docs --out comparisons/softmax_first

For each seed, configs/quickstart_softmax.toml is trained for --first steps at a constant learning rate. From there the
learning rate falls during --second steps, for the softmax model as it is, for the same model untied and with biases,
and for harmonic models that `hgpt.convert` made of it, one for each exponent. All endings of a seed see the same
tokens. Prints the validation loss of each ending, its difference from softmax (paired by seed, Student's 95 %
interval), and the d ratio. Finished runs are not trained again. RESULTS.md has the figures.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation import CONFIGS, call
from hgpt import cli
from hgpt.compare import difference_text, t_interval
from hgpt.history import records

SOFTMAX, HARMONIC = "quickstart_softmax.toml", "quickstart.toml"
SEED = 1337  # of the first run
UNTIED = "--model.tie_word_embeddings=false --model.head.radius=learned"


def trained(name: str, config: str, steps: int, options: argparse.Namespace, settings: str) -> dict[str, Any]:
    """The evaluation at the last step of a run, which is trained unless it is finished."""

    def ends() -> list[dict[str, Any]]:
        return [record for record in records(options.out / name, "eval") if record["step"] == steps]

    if not ends():
        shared = (
            f"--name={name} --runs_dir={options.out} --resume=auto --data.path={options.data} --train.steps={steps} "
            f"--eval.every={steps} --eval.unigram_baseline=false --checkpoint.every={steps}"
        )
        call(CONFIGS.parent / "train.py", "--config", CONFIGS / config, *shared.split(), *settings.split())
    return ends()[-1]


def endings(seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The last evaluation of each ending of a seed."""
    first = options.out / f"first_{seed}"
    trained(first.name, SOFTMAX, options.first, options, f"--train.seed={seed} --optim.schedule=constant")

    def ending(name: str, config: str, settings: str) -> dict[str, Any]:
        # Another seed than the first part's: the tokens come in another order.
        shared = f"--train.seed={seed + 100} --optim.warmup_steps=10 "
        return trained(f"{name}_{seed}", config, options.second, options, shared + settings)

    begun = f"--model.init_from={first} "
    found = {
        "softmax": ending("softmax", SOFTMAX, begun),
        "softmax, untied, biases": ending("softmax_untied", SOFTMAX, f"{begun}{UNTIED} --model.head.radius_init=zero"),
    }
    for exponent in options.exponents:
        name = exponent.replace("*", "x")
        lift = options.out / f"converted_{name}_{seed}"
        if not lift.exists():
            call("-m", "hgpt.convert", first, "--exponent", exponent, "--data", options.data, "--out", lift)
        settings = f"--model.init_from={lift} --model.backbone={lift} {UNTIED} --model.head.exponent={exponent}"
        found[f"harmonic, n = {exponent}"] = ending(f"harmonic_{name}", HARMONIC, settings)
    return found


def main(arguments: Sequence[str]) -> str:
    parser = cli.Parser("python -m benchmarks.softmax_first", __doc__)
    add = parser.add_argument
    add("--data", default="data/python_docs")
    add("--out", type=Path, required=True, help="folder for the runs")
    add("--seeds", type=cli.at_least_1, default=3)
    add("--exponents", nargs="+", default=["2*sqrt_dim", "3*sqrt_dim", "4*sqrt_dim"])
    add("--first", type=cli.at_least_1, default=600, help="steps as softmax (default: %(default)s)")
    add("--second", type=cli.at_least_1, default=200, help="steps of each ending (default: %(default)s)")
    options = parser.parse_args(arguments)
    results = [endings(SEED + number, options) for number in range(options.seeds)]
    rows = [["ending", "validation loss", "seeds", "minus softmax", "d ratio"]]
    for ending in results[0]:
        losses = [result[ending]["loss"] for result in results]
        differences = [result[ending]["loss"] - result["softmax"]["loss"] for result in results]
        ratios = [result[ending].get("target_over_median_distance") for result in results]
        difference = difference_text(statistics.mean(differences), t_interval(differences))
        rows.append(
            [
                ending,
                f"{statistics.mean(losses):.4f}",
                ", ".join(f"{loss:.4f}" for loss in losses),
                "" if ending == "softmax" else difference,
                "" if None in ratios else f"{statistics.mean(ratios):.3f}",
            ]
        )
    return cli.markdown(rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
