"""Parallelograms: a is to b as c is to d if E(a) − E(b) = E(c) − E(d).

The score of Baek et al. (arXiv:2502.01628) and variants with other planes, scales and words, with intervals over pairs,
compared with the same words paired at random.

The pairs of a relation are the rows of `inputs` and `outputs`, (pairs, k) each. With the offsets o_i = E(b_i) − E(a_i),
the score of the parallelogram of pairs i and j is

    s_ij = ‖E(a_i) + E(b_j) − E(b_i) − E(a_j)‖² / scale = ‖o_i − o_j‖² / scale

0 for a perfect parallelogram. Four independent vectors have 4 on average if `scale` is the mean squared distance of
vectors from their mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from hgpt.interpret import drawing
from hgpt.interpret.measure import (
    Analysis,
    Block,
    Cell,
    Curve,
    Details,
    Drawing,
    ModelResult,
    Quantity,
    Table,
    bold,
    bullets,
    paragraph,
    tied,
)
from hgpt.interpret.relations import SMALLEST_RELATION, TokenPairs, distinct
from hgpt.interpret.statistics import SIGNIFICANT, Estimate, estimate, mean_estimate, smallest_shuffle_p
from hgpt.interpret.subject import Subject
from hgpt.interpret.vectors import Projection, ScoreSettings, project

TITLE = "Parallelograms"
EXPECTED_AT_RANDOM = 4.0
INPUTS_AT_A_TIME = 64  # with 5,000 pairs a block of products has 2.6 MB and stays in the cache
SAMPLED_SCORES = 10_000  # random pairs of pairs per relation, for the distribution of the score
SHUFFLES = 999
SCORE_AXIS = 100.0  # end of the axis of the distribution: a few scores are thousands

BAEK2025, OWN_SCALE = "baek2025", "full space, scale of the relation, distinct"
OF_CENTRES = f"{OWN_SCALE}, centres"
IN_FULL_SPACE = ScoreSettings(components=None, normalisation="relation", distinct=True)
# The score of Baek et al., variants that differ from it in one or two settings, and two that depend on no plane.
VARIANTS: dict[str, ScoreSettings] = {
    BAEK2025: ScoreSettings(),
    "centres": ScoreSettings(vectors="centres"),
    "5 components": ScoreSettings(components=5),
    "10 components": ScoreSettings(components=10),
    "100 components": ScoreSettings(components=100),
    "full space": ScoreSettings(components=None),
    "plane of the relation": ScoreSettings(plane="relation"),
    "scale of the relation": ScoreSettings(normalisation="relation"),
    "plane and scale of the relation": ScoreSettings(plane="relation", normalisation="relation"),
    "plane-free scale": ScoreSettings(normalisation="full_space"),
    "words of one token": ScoreSettings(words="single"),
    "words of one token after a space": ScoreSettings(words="single_after_space"),
    "distinct pairs of tokens": ScoreSettings(distinct=True),
    OWN_SCALE: IN_FULL_SPACE,
    OF_CENTRES: replace(IN_FULL_SPACE, vectors="centres"),
}


@dataclass(frozen=True, kw_only=True)
class RelationScore:
    """One relation under one variant in one model."""

    pairs: int  # number of pairs used
    dropped: int  # number of pairs that the tokenizer cannot represent
    score: Estimate  # mean over all pairs of pairs, its interval over pairs
    shuffled: float  # mean score of the same words paired at random
    p_shuffled: float  # p-value of the hypothesis that the words are paired at random
    plane_variance: float  # as in `Projection`
    plane_variance_of_words: float
    replicates: np.ndarray  # of the score
    disjoint: np.ndarray  # scores of disjoint pairs of pairs, which are independent
    sampled: np.ndarray  # scores of SAMPLED_SCORES random pairs of pairs; empty except for baek2025


Scores = dict[str, RelationScore]  # relation → score


def result_of(model: ModelResult) -> dict[str, Scores]:
    """Variant → relation → score."""
    return model.found.get("parallelograms", {})


def variants_of(models: Sequence[ModelResult]) -> list[str]:
    """The names in `VARIANTS`; if all models are tied, without those of the centres, which repeat others."""
    return [name for name, s in VARIANTS.items() if s.vectors == "input" or not all(model.tied for model in models)]


def baek2025_scores(model: ModelResult) -> Scores:
    return result_of(model).get(BAEK2025, {})


def pairs_of_pairs(pairs: int, count: int, seed: int) -> np.ndarray:
    """`count` random pairs (i, j) of different pairs, (count, 2), drawn with replacement."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, pairs, count)
    return np.stack([first, (first + rng.integers(1, pairs, count)) % pairs], axis=1)


def disjoint_pairs_of_pairs(pairs: int, seed: int) -> np.ndarray:
    """The pairs in random order, two by two, (⌊pairs / 2⌋, 2). No pair occurs twice, so the scores are independent."""
    order = np.random.default_rng(seed).permutation(pairs)
    return order[: pairs // 2 * 2].reshape(-1, 2)


def parallelogram_scores(offsets: np.ndarray, scale: float, chosen: np.ndarray) -> np.ndarray:
    """s_ij = ‖o_i − o_j‖² / scale of the pairs of pairs `chosen`, (Q, 2) → (Q,); offsets (pairs, k)."""
    return np.sum(np.square(offsets[chosen[:, 0]] - offsets[chosen[:, 1]]), axis=1) / scale


def mean_parallelogram_score(offsets: np.ndarray, scale: float, counts: np.ndarray | None = None) -> np.ndarray:
    """The mean of s_ij over i ≠ j, shape (), or with bootstrap `counts`, (B, pairs), of each resample, (B,).

    With weights w_i (the counts, or 1) and W = Σ w_i it is exactly

        2 (W Σ w_i ‖o_i‖² − ‖Σ w_i o_i‖²) / ((W² − Σ w_i²) scale)

    A pair that is drawn twice is not compared with itself.
    """
    w = np.ones((1, len(offsets))) if counts is None else counts
    centred = offsets - offsets.mean(axis=0)  # only reduces the rounding error
    total = w.sum(axis=1)
    squares = w @ np.square(centred).sum(axis=1)
    sums = np.square(w @ centred).sum(axis=1)
    compared = total**2 - np.einsum("bi,bi->b", w, w)  # einsum allocates no w²
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may consist of one pair only
        scores = 2 * (total * squares - sums) / (compared * scale)
    scores = np.where(compared > 0, np.maximum(scores, 0.0), np.nan)
    return scores[0] if counts is None else scores


@lru_cache(maxsize=4)  # successive variants use the same pairings
def random_pairings(pairs: int, count: int, seed: int) -> np.ndarray:
    """`count` random permutations of the pairs as columns, (pairs, count) int32, read-only."""
    rng = np.random.default_rng(seed)
    pairings = np.stack([rng.permutation(pairs).astype(np.int32) for _ in range(count)], axis=1)
    pairings.setflags(write=False)
    return pairings


def shuffled_scores(inputs: np.ndarray, outputs: np.ndarray, scale: float, pairings: np.ndarray) -> np.ndarray:
    """Mean scores if input i is paired with output π(i), for each permutation π of `pairings`, (pairs, B) → (B,).

    With B random permutations, p = (1 + #{shuffled ≤ observed}) / (1 + B) tests whether outputs belong to their inputs.
    The mean offset is the same for every π, so only Σ a_i · b_π(i) is needed. Summed over blocks of inputs, without a
    (pairs, pairs) matrix.
    """
    pairs, count = pairings.shape
    a, b = inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0)
    products = np.zeros(count)  # Σ a_i · b_π(i)
    for start in range(0, pairs, INPUTS_AT_A_TIME):
        part = slice(start, start + INPUTS_AT_A_TIME)
        products += np.take_along_axis(a[part] @ b.T, pairings[part], axis=1).sum(axis=0)
    sums = np.square(a).sum() + np.square(b).sum() - 2 * products
    return 2 * np.maximum(sums, 0.0) / ((pairs - 1) * scale)  # the mean offset is 0 after centring


def relation_score(
    projected: Projection, pairs: TokenPairs, subject: Subject, name: str, sampled: int = 0
) -> RelationScore:
    """The score of the relation `name`, with the scores of `sampled` random pairs of pairs."""
    offsets, scale, count = projected.offsets, projected.scale, len(pairs.words)
    seed_of = subject.settings.seed_of
    replicates = mean_parallelogram_score(offsets, scale, subject.resamples(count, name, "bootstrap"))
    value = float(mean_parallelogram_score(offsets, scale))
    pairings = random_pairings(count, SHUFFLES, seed_of(name, "shuffle"))
    shuffled = shuffled_scores(projected.inputs, projected.outputs, scale, pairings)
    disjoint = disjoint_pairs_of_pairs(count, seed_of(name, "disjoint", str(count)))
    chosen = pairs_of_pairs(count, sampled, seed_of(name, "quadruples"))
    return RelationScore(
        pairs=count,
        dropped=pairs.dropped,
        score=estimate(value, replicates),
        shuffled=float(shuffled.mean()),
        p_shuffled=float((1 + np.sum(shuffled <= value * (1 + 1e-12))) / (1 + len(shuffled))),
        plane_variance=projected.plane_variance,
        plane_variance_of_words=projected.plane_variance_of_words,
        replicates=replicates,
        disjoint=parallelogram_scores(offsets, scale, disjoint),
        sampled=parallelogram_scores(offsets, scale, chosen),
    )


def compute(subject: Subject) -> dict[str, Scores]:
    """Every variant of the score for every relation."""
    dimensions = subject.input.rows.shape[1]
    usable = {name: s for name, s in VARIANTS.items() if s.components is None or s.components <= dimensions}
    scores: dict[str, Scores] = {variant: {} for variant in usable}
    small: dict[str, list[str]] = {variant: [] for variant in usable}
    steps = len(subject.relations) * len(usable)
    with tqdm(total=steps, desc=f"{subject.label}: relations", unit="score", disable=None, leave=False) as bar:
        for relation in subject.relations:
            for variant, s in usable.items():
                bar.update()
                pairs = subject.pairs(s.words)[relation.name]
                pairs = distinct(pairs) if s.distinct else pairs
                if len(pairs.words) < SMALLEST_RELATION:
                    small[variant].append(f"{relation.name} ({len(pairs.words)} of {len(relation.pairs)})")
                    continue
                projected = project(subject.matrices[s.vectors], pairs.ids, s)
                sampled = SAMPLED_SCORES if variant == BAEK2025 else 0
                scores[variant][relation.name] = relation_score(projected, pairs, subject, relation.name, sampled)
    for variant in VARIANTS:
        if variant not in usable:
            subject.skipped.append(f"{variant}: the model has only {dimensions} dimensions")
        elif small[variant]:
            named = ", ".join(small[variant])
            subject.skipped.append(f"{variant}: fewer than {SMALLEST_RELATION} pairs can be used of {named}")
    return {variant: found for variant, found in scores.items() if found}


def checkpoint(subject: Subject) -> dict[str, float]:
    """The mean over relations of the score of Baek et al."""
    projected = [project(subject.input, pairs.ids, VARIANTS[BAEK2025]) for pairs in subject.scored.values()]
    scores = [mean_parallelogram_score(each.offsets, each.scale) for each in projected]
    return {"parallelogram_score": float(np.mean(scores))} if scores else {}


def mean_over_relations(results: Scores) -> Estimate:
    """The mean score over relations; its interval is over the pairs of each, with the relations fixed."""
    return mean_estimate([r.score.value for r in results.values()], [r.replicates for r in results.values()])


def relative_to_random_pairs(results: Scores) -> Estimate:
    """The score divided by that of the same words paired at random, mean over relations: 1 without a relation.

    Independent of the scale and of how close together the words lie. The interval is over pairs, with the score of the
    random pairs fixed.
    """
    found = results.values()
    return mean_estimate([r.score.value / r.shuffled for r in found], [r.replicates / r.shuffled for r in found])


def rows(model: ModelResult) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant, results in result_of(model).items():
        relations = {}
        for name, result in results.items():
            kept_for_figures = ("replicates", "disjoint", "sampled")
            relations[name] = {key: value for key, value in vars(result).items() if key not in kept_for_figures}
            if len(result.sampled):
                mean, median = float(result.sampled.mean()), float(np.median(result.sampled))
                relations[name] |= {"sampled_mean": mean, "sampled_median": median}
        found[variant] = {"mean": mean_over_relations(results), "relations": relations}
    return {"parallelograms": found}


def section(analysis: Analysis) -> list[Block]:
    names = sorted({name for model in analysis.models for name in baek2025_scores(model)})
    figures = [scores_by_relation(analysis, names), score_distributions(analysis, names)] if names else []
    explanation = paragraph(
        f"{BAEK2025} is the score of Baek et al. (arXiv:2502.01628): each word is represented by its last token, "
        "vectors are projected on the first two principal components of the vocabulary, and the scale is the mean "
        "squared length of the vocabulary's vectors in that plane. Lower is better."
    )
    return [explanation, findings(analysis), *figures, _every_variant(analysis), _pairs_used(analysis)]


def below_random(model: ModelResult) -> set[str]:
    """Relations whose baek2025 score is significantly below random pairs, with Bonferroni's correction."""
    results = baek2025_scores(model)
    return {name for name, result in results.items() if result.p_shuffled < SIGNIFICANT / len(results)}


def findings(analysis: Analysis) -> Markup:
    """Sentences on each model's scores and on their limits."""
    items: list[str] = []
    for model in analysis.models:
        results = baek2025_scores(model)
        if not results:
            items.append(
                bold(model.label)
                + f": no relation has {SMALLEST_RELATION} usable pairs, so the model has no score and is "
                "not in figures of relations."
            )
            continue
        level, lower = SIGNIFICANT / len(results), len(below_random(model))
        powerless = [name for name, r in results.items() if smallest_shuffle_p(r.pairs, SHUFFLES) >= level]
        items.append(
            bold(model.label)
            + f": in {lower} of {len(results)} relations the score {BAEK2025} is lower than that of the "
            f"same words paired at random (permutation test with {SHUFFLES} shuffles, {SIGNIFICANT:.0%} with "
            f"Bonferroni's correction).{without_power(powerless, len(results))}"
        )
    items.append(
        "Scores of different variants, and of models with different spectra, are on different scales. Four random "
        f"tokens score {EXPECTED_AT_RANDOM:g} on average under {BAEK2025}, but words that lie close together score "
        "less without any relation. So compare a score with that of the same words paired at random."
    )
    if any(model.skipped for model in analysis.models):
        items.append("The section Method lists the scores that could not be computed, mostly because too few words "
                     "are one token.")  # fmt: skip
    return bullets(items)


def without_power(relations: Sequence[str], total: int) -> str:
    """A sentence about the relations whose test has no power, "" if there are none."""
    if not relations:
        return ""
    which = "any" if len(relations) == total else f"{len(relations)} ({', '.join(relations)})"
    return (
        f" The test cannot become significant in {which} of them, whatever the models: the pairs are too few, or the "
        "relations to correct for too many."
    )


def _every_variant(analysis: Analysis) -> Details:
    head: list[str] = ["variant"]
    for heading in drawing.headings(analysis.models):
        head += [heading + ": score", "plane's variance"]
    rows: list[tuple[str, list[Cell]]] = [(name, []) for name in variants_of(analysis.models)]
    for name, cells in rows:
        for model in analysis.models:
            results = result_of(model).get(name)
            if VARIANTS[name].vectors == "centres" and model.tied:
                cells += [tied(model), None]
            else:
                share = np.mean([result.plane_variance for result in results.values()]) if results else 0
                cells += [mean_over_relations(results), f"{share:.1%}"] if results else [None, None]
    explanation = paragraph(
        "Score of a parallelogram a : b = c : d: ‖E(a) + E(d) − E(b) − E(c)‖² divided by the scale; 0 is perfect. The "
        "mean is over all pairs of pairs of a relation; the interval comes from resampling pairs. A variant's name "
        f"says in what it differs from {BAEK2025}; distinct: each pair of tokens is used once. The centres of tied "
        "models are the input embedding and have no scores of their own."
    )
    return Details(title="All variants of the score", blocks=[explanation, Table(head=head, rows=rows, digits=2)])


def _pairs_used(analysis: Analysis) -> Details:
    """The number of word pairs of each relation that each tokenizer can represent."""
    forms = (BAEK2025, "words of one token", "words of one token after a space", "distinct pairs of tokens")
    tables: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}  # one for all models with the same tokenizer
    for model in analysis.models:
        found = [result_of(model).get(variant, {}) for variant in forms]
        names = sorted({name for scores in found for name in scores})
        used = [[f"{s[n].pairs} of {s[n].pairs + s[n].dropped}" if n in s else "–" for s in found] for n in names]
        tables.setdefault(tuple(zip(names, map(tuple, used), strict=True)), []).append(model.label)
    blocks: list[Block] = [
        paragraph(
            "Every variant leaves out pairs with a word that contains the tokenizer's unknown token. The last three "
            f"also leave out words of several tokens, or repeated pairs of tokens. –: fewer than {SMALLEST_RELATION} "
            "pairs, so no score."
        )
    ]
    for table, labels in tables.items():
        blocks += [paragraph(bold(", ".join(labels))), Table(head=["relation", *forms], rows=table)]
    return Details(title="Number of pairs used, by relation", blocks=blocks)


def _without_score(analysis: Analysis) -> list[str]:
    labels = [model.label for model in analysis.models if not baek2025_scores(model)]
    return drawing.listed("Left out, because no relation has enough usable pairs", labels)


def scores_by_relation(analysis: Analysis, names: Sequence[str]) -> Drawing:
    models = analysis.having(baek2025_scores)
    scores = [(i, model.label, {name: r.score for name, r in baek2025_scores(model).items()}) for i, model in models]
    figure, panel, heights = drawing.rows_of_intervals(names, scores)
    for (index, model), y in zip(models, heights, strict=True):
        shuffled = [result.shuffled for result in baek2025_scores(model).values()]
        panel.plot(shuffled, y, "|", color=drawing.look(index)["color"], markersize=9, markeredgewidth=1.5)
    panel.axvline(EXPECTED_AT_RANDOM, color=drawing.GREY, linestyle=":", linewidth=1)
    panel.set_xlabel("mean parallelogram score (dotted: four random tokens; |: same words, random pairs)")
    panel.set_xlim(left=0)
    return drawing.finish(
        figure,
        "scores_by_relation",
        "Parallelogram score of each relation",
        caption="Lower is better. A bar | is the score of the same words paired at random. A low score that is not "
        "below its bar only shows that the words lie close together, not that they form parallelograms.",
        source=f"Score {BAEK2025}: first 2 components of the vocabulary. Relations: {analysis.relations}. "
        f"Input embedding. Intervals: 95 %, {analysis.resampled} of the pairs.",
        remarks=_without_score(analysis),
    )


def score_distributions(analysis: Analysis, names: Sequence[str]) -> Drawing:
    models = analysis.having(baek2025_scores)
    figure, axes = drawing.grid(len(names), 4, row_height=1.7, extra=1.2, sharex=True, sharey=True)
    shares, beyond = np.linspace(0, 1, 201), 0.0
    for panel, name in zip(axes.flat, names, strict=False):
        for index, model in models:
            if name in baek2025_scores(model):
                sampled = baek2025_scores(model)[name].sampled
                panel.plot(np.quantile(sampled, shares), shares, **drawing.line_look(index), label=model.label)
                beyond = max(beyond, float(np.mean(sampled > SCORE_AXIS)))
        panel.set_title(name)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(0, SCORE_AXIS)
        panel.set_xticks([0, 0.1, 1, 10, SCORE_AXIS], ["0", ".1", "1", "10", f"{SCORE_AXIS:g}"])
    drawing.label_edges(axes, "score", "share of pairs\nof pairs below")
    return drawing.finish(
        figure,
        "score_cdfs",
        "Distribution of the parallelogram score",
        caption=f"The share of {SAMPLED_SCORES:,} random pairs of pairs (drawn with replacement) whose score is below "
        f"the value on the axis. A curve further left is better. At most {beyond:.2%} of a curve lies beyond the end "
        f"of the axis, {SCORE_AXIS:g}.",
        source=f"Score {BAEK2025}. Relations: {analysis.relations}. Input embedding.",
        remarks=_without_score(analysis),
    )


def _number(variant: str, number: Callable[[Scores], Estimate]) -> Callable[[ModelResult], Estimate | None]:
    return lambda model: number(result_of(model)[variant]) if variant in result_of(model) else None


def overall(analysis: Analysis) -> dict[str, Any]:
    return {"variants": VARIANTS}


MEAN, RELATIVE = mean_over_relations, relative_to_random_pairs
QUANTITIES = (
    Quantity(f"parallelogram score ({BAEK2025})", _number(BAEK2025, MEAN), "lower", "preset_score"),
    Quantity(f"parallelogram score ({BAEK2025}) over that of random pairs", _number(BAEK2025, RELATIVE), "lower",
             "preset_relative"),
    Quantity(f"parallelogram score ({OWN_SCALE})", _number(OWN_SCALE, MEAN), "lower", "own_scale_score"),
    Quantity(f"parallelogram score ({OWN_SCALE}) over that of random pairs", _number(OWN_SCALE, RELATIVE), "lower"),
    Quantity(f"parallelogram score ({OF_CENTRES})", _number(OF_CENTRES, MEAN), "lower", repeats=tied),
    Quantity(f"parallelogram score ({OF_CENTRES}) over that of random pairs", _number(OF_CENTRES, RELATIVE), "lower",
             "own_scale_relative_centres", repeats=tied),
)  # fmt: skip
CURVES = (Curve("parallelogram_score", f"parallelogram score ({BAEK2025}), mean over relations"),)
