"""Differences of the parallelogram score between each model and the first, tested for every relation and variant."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hgpt.interpret.drawing import GREY, finish, headings, listed, rows_of_intervals
from hgpt.interpret.measure import Analysis, Block, Cell, Drawing, ModelResult, Table, bold, bullets, paragraph
from hgpt.interpret.measures.parallelograms import (
    BAEK2025,
    Scores,
    baek2025_scores,
    below_random,
    result_of,
    variants_of,
    without_power,
)
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


def compare(first: ModelResult, other: ModelResult) -> list[dict[str, Any]]:
    """For each variant and relation: other minus first, its interval over pairs, and its p-value.

    `p_holm` is p after Holm's correction for the number of relations of the variant.
    """
    tests: list[dict[str, Any]] = []
    for variant, results in result_of(other).items():
        found: list[dict[str, Any]] = []
        for name, mine in results.items():
            if (theirs := result_of(first).get(variant, {}).get(name)) is None:
                continue
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
    """Mean difference over common relations, with its paired interval over pairs; None without any."""
    shared = [name for name in mine if name in theirs]
    if not shared:
        return None
    return mean_estimate(
        [mine[name].score.value - theirs[name].score.value for name in shared],
        [mine[name].replicates - theirs[name].replicates for name in shared],
    )


def relations_without_power(tests: Sequence[dict[str, Any]], other: ModelResult) -> list[str]:
    """The relations of one variant that cannot be significant after Holm's correction.

    Not even if all relations had the smallest p-values that their numbers of pairs allow.
    """
    disjoint = [len(result_of(other)[test["variant"]][test["relation"]].disjoint) for test in tests]
    adjusted = holm([smallest_sign_flip_p(m) for m in disjoint])
    return [test["relation"] for test, p in zip(tests, adjusted, strict=True) if p >= SIGNIFICANT]


def mean_differences(tests: Sequence[dict[str, Any]]) -> list[float]:
    """The mean difference over relations of each variant; variants with equal values, such as tied ones, count once."""
    by_variant: dict[str, list[float]] = {}
    for test in tests:
        by_variant.setdefault(test["variant"], []).append(test["difference"])
    return list(dict.fromkeys(float(np.mean(differences)) for differences in by_variant.values()))


def section(analysis: Analysis) -> list[Block]:
    if len(analysis.models) < 2:
        return []
    sentences = [sentence for other in analysis.models[1:] for sentence in conclusions(analysis, other)]
    sentences.append(
        "A difference need not be due to the head: two checkpoints also differ in their seed, the length of their "
        "training and how well each was tuned. Intervals over word pairs show the variation with other words, not "
        "between runs."
    )
    blocks: list[Block] = [bullets(sentences)]
    if tested := [other for other in analysis.models[1:] if comparisons(analysis, other)]:
        blocks += _tests_table(analysis, tested)
        if (drawing := variants(analysis)) is not None:
            blocks.append(drawing)
    return blocks


def conclusions(analysis: Analysis, other: ModelResult) -> list[str]:
    """Sentences on the tests of one model against the first."""
    first = analysis.models[0]
    names = bold(other.label) + " against " + bold(first.label)
    tests = comparisons(analysis, other, BAEK2025)
    if not tests:
        why = "they share no relation with enough pairs"
        if other.vocabulary != first.vocabulary:
            why = "their tokenizers differ"
        return [names + f": no test compares their parallelograms, since {why}."]
    significant = [test for test in tests if test["p_holm"] < SIGNIFICANT]
    lower_score = [(other if test["difference"] < 0 else first, test["relation"]) for test in significant]
    below, above = (sum(model is each for model, _ in lower_score) for each in (other, first))
    shown = sum(name in below_random(model) for model, name in lower_score)
    means = mean_differences(comparisons(analysis, other))
    lower, higher = sum(mean < 0 for mean in means), sum(mean > 0 for mean in means)
    return [
        names + f", score {BAEK2025}: lower in {below} relations, higher in {above}, not significantly different in "
        f"{len(tests) - len(significant)} (paired permutation test over disjoint pairs of pairs, Holm's correction for "
        f"{len(tests)} relations).{_meaning(len(significant), shown)}"
        f"{without_power(relations_without_power(tests, other), len(tests))}",
        names
        + f": of {len(means)} variants of the score (equal ones counted once), the mean difference over relations "
        f"is below 0 in {lower} and above 0 in {higher}. The variants are dependent: this checks robustness and "
        "is not a test.",
    ]


def _meaning(different: int, shown: int) -> str:
    """A sentence on the significant differences: in `shown` of them the lower score is also below random pairs."""
    if not different:
        return ""
    text = f" In {shown} of these {different} the lower score is also below that of the same words paired at random."
    if shown < different:
        text += (
            " Where it is not, it may only show that the words lie close together, not that they form parallelograms."
        )
    return text


def _tests_table(analysis: Analysis, tested: Sequence[ModelResult]) -> list[Block]:
    """Difference of the score of Baek et al., and its corrected p-value, for each relation."""
    first = analysis.models[0]
    head: list[str] = ["relation"]
    rows: dict[str, list[Cell]] = {name: [] for name in sorted(baek2025_scores(first))}
    for heading, model in zip(headings(analysis.models), analysis.models, strict=True):
        if model not in tested:
            continue
        head += [heading + f" minus {first.label}", "p, Holm"]
        tests = {test["relation"]: test for test in comparisons(analysis, model, BAEK2025)}
        for name, cells in rows.items():
            if (test := tests.get(name)) is None:
                cells += [None, None]
                continue
            p = f"{test['p_holm']:.3f}"
            difference = Estimate(value=test["difference"], low=test["low"], high=test["high"])
            cells += [difference, bold(p) if test["p_holm"] < SIGNIFICANT else p]
    return [
        paragraph(
            f"Differences of the score {BAEK2025}; below 0: lower than that of {first.label}. The permutation test "
            "exchanges the two models' scores of disjoint pairs of pairs, which are independent. p is corrected by "
            f"Holm's method for the number of relations, and bold below {SIGNIFICANT:.2f}. results.json has the tests "
            "under all variants."
        ),
        Table(head=head, rows=list(rows.items()), digits=2),
    ]


def variants(analysis: Analysis) -> Drawing | None:
    """The mean difference under each variant; None if no relation can be compared."""
    first = analysis.models[0]
    series: list[tuple[int, str, dict[str, Estimate]]] = []
    left_out = []
    for index, other in enumerate(analysis.models[1:], start=1):
        found = {}
        for name in variants_of(analysis.models) if other.vocabulary == first.vocabulary else ():
            scores = (result_of(model).get(name, {}) for model in (other, first))
            if (difference := difference_over_relations(*scores)) is not None:
                found[name] = difference
        if found:
            series.append((index, f"{other.label} minus {first.label}", found))
        else:
            left_out.append(other.label)
    if not series:
        return None
    names = [name for name in variants_of(analysis.models) if any(name in found for _, _, found in series)]
    figure, panel, _ = rows_of_intervals(names, series)
    panel.axvline(0, color=GREY, linewidth=1)
    panel.set_xlabel(f"difference of the mean score (below 0: lower than {first.label})")
    return finish(
        figure,
        "variants",
        "Differences under each variant of the score",
        caption="The mean difference over relations, with intervals over pairs. If its sign depends on the plane, the "
        "scale or the tokens, the difference is an effect of the method. Variants have different scales: compare the "
        "signs of the differences, not their sizes. If all models are tied, variants of the centres are left out: the "
        "centres are the input embedding.",
        source=f"Relations: {analysis.relations}. Input embedding unless the variant names the centres. Intervals: 95 "
        f"%, {analysis.resampled} of the pairs.",
        remarks=listed(f"Left out, with no relation that can be compared with {first.label}", left_out),
    )


def overall(analysis: Analysis) -> dict[str, Any]:
    return {"comparisons": [test for tests in analysis.compared.get("differences", {}).values() for test in tests]}
