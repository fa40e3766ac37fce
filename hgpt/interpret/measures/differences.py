"""Does another model score differently from the first: tests of every relation, under every variant of the score."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from hgpt.interpret.blocks import Block, Cell, Drawing, Prose, Table, bold, paragraph
from hgpt.interpret.drawing import GREY, headings, listed, rows_of_intervals, sign
from hgpt.interpret.measure import Analysis, ModelResult
from hgpt.interpret.measures.parallelograms import PRESET, Scores, of, preset, without_power
from hgpt.interpret.statistics import (
    SIGNIFICANT,
    Estimate,
    estimate,
    holm,
    mean_estimate,
    sign_flip_test,
    smallest_sign_flip_p,
)

TITLE = "Differences between models"
SCORES = "parallelograms.csv"
TESTED = ("difference", "low", "high", "p", "p_holm")  # columns of a test


def compare(first: ModelResult, other: ModelResult) -> list[dict[str, Any]]:
    """Other minus first, for each variant and relation: difference, interval over pairs, permutation test, Holm."""
    tests: list[dict[str, Any]] = []
    for variant, results in of(other).items():
        found: list[dict[str, Any]] = []
        for name in results:
            if name not in of(first).get(variant, {}):
                continue
            mine, theirs = results[name], of(first)[variant][name]
            difference = estimate(mine.score.value - theirs.score.value, mine.replicates - theirs.replicates)
            found.append(
                {
                    "variant": variant,
                    "relation": name,
                    "model": other.label,
                    "against": first.label,
                    "difference": difference.value,
                    "low": difference.low,
                    "high": difference.high,
                    "p": sign_flip_test(mine.disjoint - theirs.disjoint),
                }
            )
        for row, adjusted in zip(found, holm([row["p"] for row in found]), strict=True):
            row["p_holm"] = float(adjusted)
        tests += found
    return tests


def comparisons(analysis: Analysis, other: ModelResult, variant: str | None = None) -> list[dict[str, Any]]:
    """The tests of `other` against the first model, of one variant or of all."""
    tests = analysis.compared.get("differences", {}).get(other.label, [])
    return [test for test in tests if variant in (None, test["variant"])]


def difference_over_relations(mine: Scores, theirs: Scores) -> Estimate | None:
    """Mean difference over the relations that both have, with its paired interval over pairs; None without any."""
    shared = [name for name in mine if name in theirs]
    if not shared:
        return None
    return mean_estimate(
        [mine[name].score.value - theirs[name].score.value for name in shared],
        [mine[name].replicates - theirs[name].replicates for name in shared],
    )


def duplicate_variants(models: Sequence[ModelResult]) -> dict[str, str]:
    """The variants that give each of `models` the same numbers as an earlier variant, and which variant that is.

    Such as the centres of tied models, which are their input embedding: one way to measure, not two.
    """
    variants = list(dict.fromkeys(variant for model in models for variant in of(model)))
    same: dict[str, str] = {}
    for number, variant in enumerate(variants):
        for earlier in variants[:number]:
            if earlier not in same and all(
                _same_scores(of(model).get(variant, {}), of(model).get(earlier, {})) for model in models
            ):
                same[variant] = earlier
                break
    return same


def _same_scores(one: Scores, other: Scores) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[name].replicates, other[name].replicates, rtol=1e-9, atol=0, equal_nan=True) for name in one
    )


def out_of_reach(tests: Sequence[dict[str, Any]], other: ModelResult) -> list[str]:
    """The relations of one comparison and variant whose test cannot become significant after Holm's correction.

    Not even if every relation had the least p-value that its number of pairs allows.
    """
    disjoint = [len(of(other)[test["variant"]][test["relation"]].disjoint) for test in tests]
    adjusted = holm([smallest_sign_flip_p(m) for m in disjoint])
    return [test["relation"] for test, p in zip(tests, adjusted, strict=True) if p >= SIGNIFICANT]


def variant_signs(tests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean difference over relations of each variant, from the tests of one comparison."""
    by_variant: dict[str, list[float]] = {}
    for test in tests:
        by_variant.setdefault(test["variant"], []).append(test["difference"])
    return {variant: float(np.mean(differences)) for variant, differences in by_variant.items()}


def scores_table(analysis: Analysis) -> str:
    """parallelograms.csv: a row for each model, variant and relation, with the test against the first model."""
    plain = ("shuffled", "p_shuffled", "plane_variance", "plane_variance_of_words")
    columns = ["pairs", "dropped", "score", "score_low", "score_high", *plain]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["model", "variant", "relation", *columns, *(f"{name}_to_the_first_model" for name in TESTED)])
    for model in analysis.models:
        tests = {(test["variant"], test["relation"]): test for test in comparisons(analysis, model)}
        for variant, results in of(model).items():
            for name, r in results.items():
                numbers = [r.pairs, r.dropped, r.score.value, r.score.low, r.score.high]
                numbers += [getattr(r, column) for column in plain]
                test = tests.get((variant, name), {})
                writer.writerow([model.label, variant, name, *numbers, *(test.get(column, "") for column in TESTED)])
    return stream.getvalue()


def section(analysis: Analysis) -> list[Block]:
    if len(analysis.models) < 2:
        return []
    sentences = [sentence for other in analysis.models[1:] for sentence in conclusions(analysis, other)]
    sentences.append(
        "What this does not show: that a difference is due to the head. Two checkpoints differ in their seed, in the "
        "length of their training and in how well each was tuned too. Intervals over word pairs say how the result "
        "would vary with other words, not with other runs."
    )
    tested = [other for other in analysis.models[1:] if comparisons(analysis, other)]
    if not tested:
        return [Prose(items=sentences)]
    blocks: list[Block] = [Prose(items=sentences), *_tests_table(analysis, tested)]
    drawing = variants(analysis)
    return blocks if drawing is None else [*blocks, drawing]


def conclusions(analysis: Analysis, other: ModelResult) -> list[str]:
    """What the tests say of one model against the first."""
    first = analysis.models[0]
    names = bold(other.label) + " against " + bold(first.label)
    tests = comparisons(analysis, other, PRESET)
    if not tests:
        why = "there is no relation that both can use"
        if other.vocabulary != first.vocabulary:
            why = "their tokenizers differ"
        return [names + f": no test compares their parallelograms, since {why}."]
    significant = [test["difference"] for test in tests if test["p_holm"] < SIGNIFICANT]
    better, worse = sum(d < 0 for d in significant), sum(d > 0 for d in significant)
    same = duplicate_variants([first, other])
    measured = variant_signs(comparisons(analysis, other))
    signs = [sign for variant, sign in measured.items() if variant not in same]
    repeated = "; ".join(variant for variant in same if variant in measured)
    counted = f" (not counted, since the numbers repeat those of another: {repeated})" if repeated else ""
    return [
        names + f", preset {PRESET}: a lower (better) score in {better} relations, a higher one in {worse}, no "
        f"difference that the test sees in {len(tests) - better - worse} (paired permutation test over disjoint pairs "
        f"of pairs, Holm for {len(tests)} relations).{without_power(out_of_reach(tests, other), len(tests))}",
        bold(other.label) + f" is favoured by the mean difference in {sum(sign < 0 for sign in signs)} of "
        f"{len(signs)} ways to measure it{counted}, " + bold(first.label) + f" in {sum(sign > 0 for sign in signs)}. "
        "The ways are not independent: this is a check of robustness, not a test.",
    ]


def _tests_table(analysis: Analysis, tested: Sequence[ModelResult]) -> list[Block]:
    """Difference of the preset's score and corrected p of each relation."""
    first = analysis.models[0]
    head: list[str] = ["relation"]
    rows: dict[str, list[Cell]] = {name: [] for name in sorted(preset(first))}
    blind = False
    for heading, model in zip(headings(analysis.models), analysis.models, strict=True):
        if model not in tested:
            continue
        head += [heading + f" minus {first.label}", "p, Holm"]
        tests = comparisons(analysis, model, PRESET)
        found = {test["relation"]: test for test in tests}
        powerless = out_of_reach(tests, model)
        blind |= bool(powerless)
        for name, cells in rows.items():
            test = found.get(name)
            if test is None:
                cells += [None, None]
                continue
            p: str = f"{test['p_holm']:.3f}{' †' if name in powerless else ''}"
            difference = Estimate(value=test["difference"], low=test["low"], high=test["high"])
            cells += [difference, bold(p) if test["p_holm"] < SIGNIFICANT else p]
    blocks: list[Block] = [
        paragraph(
            f"Differences of the score under the preset {PRESET}; below 0 is better than {first.label}. Two models are "
            "compared on disjoint pairs of pairs, which are independent, by a permutation test that exchanges the "
            "models; p-values are corrected for the number of relations by Holm's method, within a variant. Bold: "
            f"p < {SIGNIFICANT:.2f} after correction. All variants are in {SCORES} beside this page."
        ),
        Table(head=head, rows=list(rows.items()), digits=2),
    ]
    if blind:
        dagger = "†: this test cannot become significant, whatever the models, with so few pairs or so many relations "
        blocks.append(paragraph(dagger + "to correct for.", quiet=True))
    return blocks


def variants(analysis: Analysis) -> Drawing | None:
    """The mean difference under each variant; None where no relation can be compared."""
    first = analysis.models[0]
    points: list[tuple[int, ModelResult, dict[str, Estimate]]] = []
    drawn_once: dict[str, list[str]] = {}
    for index, other in enumerate(analysis.models[1:], start=1):
        same = duplicate_variants([first, other])
        differences = {
            name: difference
            for name, results in of(first).items()
            if name not in same
            and other.vocabulary == first.vocabulary
            and (difference := difference_over_relations(of(other).get(name, {}), results)) is not None
        }
        if differences:
            points.append((index, other, differences))
            for variant, earlier in same.items():
                drawn_once.setdefault(f"“{variant}” and “{earlier}”", []).append(other.label)
    if not points:
        return None
    names = [name for name in of(first) if any(name in differences for _, _, differences in points)]
    series = [(index, f"{other.label} minus {first.label}", found) for index, other, found in points]
    figure, panel, _ = rows_of_intervals(names, series)
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_xlabel(f"difference of the mean score (below 0: better than {first.label})")
    shown = [other for _, other, _ in points]
    left_out = [model.label for model in analysis.models[1:] if model not in shown]
    same_numbers = "; ".join(f"{text} ({', '.join(labels)})" for text, labels in drawn_once.items())
    return sign(
        figure,
        "variants",
        "Does the difference survive other ways to measure it?",
        caption="The mean difference over relations under each variant of the score, with intervals over pairs. A "
        "difference that changes its sign with the plane, the scale or the tokens is one of the method. Variants have "
        "different scales: compare signs and intervals, not lengths.",
        models=[first, *shown],
        source=f"Relations: {analysis.relations}. Input embedding. Intervals: 95 %, {analysis.resampled} of the pairs.",
        remarks=[
            *listed(f"Left out, with no relation that can be compared with {first.label}", left_out),
            *([f"Drawn once, since the numbers are the same: {same_numbers}."] if same_numbers else []),
        ],
    )


def overall(analysis: Analysis) -> dict[str, Any]:
    return {"comparisons": [test for tests in analysis.compared.get("differences", {}).values() for test in tests]}


def files(analysis: Analysis) -> dict[str, str]:
    return {SCORES: scores_table(analysis)}
