"""Do relations between words lie in an embedding as parallelograms: a is to b as c is to d, E(a) − E(b) = E(c) − E(d)?

The score of arXiv:2502.01628, in other planes and with other scales too, beside the same words paired at random and
with intervals over pairs.

A relation is given by the vectors of its pairs, `inputs` and `outputs`, (pairs, k), rows in the same order. With the
offsets o_i = E(b_i) − E(a_i), the score of the parallelogram of pairs i and j is

    s_ij = ‖E(a_i) + E(b_j) − E(b_i) − E(a_j)‖² / scale = ‖o_i − o_j‖² / scale

0 for a perfect parallelogram; 4 on average when the four vectors are drawn independently and `scale` is the mean of
‖E‖² around their mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from tqdm import tqdm

from hgpt.interpret.blocks import Block, Cell, Details, Drawing, Prose, Table, bold, paragraph
from hgpt.interpret.drawing import GREY, grid, headings, label_edges, line_look, listed, look, rows_of_intervals, sign
from hgpt.interpret.measure import Analysis, Curve, ModelResult, Quantity, counts_text
from hgpt.interpret.relations import SMALLEST_RELATION, TokenPairs, WordForm, distinct
from hgpt.interpret.statistics import SIGNIFICANT, Estimate, estimate, mean_estimate, smallest_shuffle_p
from hgpt.interpret.subject import Subject
from hgpt.interpret.vectors import Projection, RelationVectors, ScoreSettings, project

TITLE = "Parallelograms"
EXPECTED_AT_RANDOM = 4.0
INPUTS_AT_A_TIME = 64  # of random pairings: with 5,000 pairs a block of products takes 2.6 MB, and stays in the cache
PRESET_QUADRUPLES = 10_000
SHUFFLES = 999
SCORE_AXIS = 100.0  # where the axis of the score's distribution ends: a few scores are thousands

PRESET, OWN_SCALE = "baek2025", "full space, scale of the relation, distinct"
OF_CENTRES = f"{OWN_SCALE}, centres"
IN_FULL_SPACE = ScoreSettings(components=None, normalisation="relation", distinct=True)
# The preset, changed in one thing at a time, and then in what is left of it when nothing depends on a plane.
VARIANTS: dict[str, ScoreSettings] = {
    PRESET: ScoreSettings(),
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
    """One relation under one variant in one model.

    Attributes:
        pairs, dropped: how many pairs were used, and how many the tokenizer cannot express.
        score: the mean over all pairs of pairs, its interval over pairs.
        sampled: the scores of the preset's random pairs of pairs; empty for other variants.
        shuffled: the mean score of the same words paired at random.
        p_shuffled: how often such a pairing scores as low.
        replicates, disjoint: for comparisons between models: the score's replicates, and independent scores.
    """

    pairs: int
    dropped: int
    score: Estimate
    shuffled: float
    p_shuffled: float
    plane_variance: float
    plane_variance_of_words: float
    replicates: np.ndarray
    disjoint: np.ndarray
    sampled: np.ndarray


Scores = dict[str, RelationScore]  # relation → score


def of(model: ModelResult) -> dict[str, Scores]:
    """Variant → relation → score."""
    return model.found.get("parallelograms", {})


def preset(model: ModelResult) -> Scores:
    return of(model).get(PRESET, {})


def pairs_of_pairs(pairs: int, count: int, seed: int) -> np.ndarray:
    """`count` random pairs (i, j) of different pairs, (count, 2), drawn with replacement."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, pairs, count)
    return np.stack([first, (first + rng.integers(1, pairs, count)) % pairs], axis=1)


def disjoint_pairs_of_pairs(pairs: int, seed: int) -> np.ndarray:
    """The pairs in random order, two by two, (⌊pairs / 2⌋, 2): no pair occurs twice, so the scores are independent."""
    order = np.random.default_rng(seed).permutation(pairs)
    return order[: pairs // 2 * 2].reshape(-1, 2)


def parallelogram_scores(offsets: np.ndarray, scale: float, chosen: np.ndarray) -> np.ndarray:
    """s_ij = ‖o_i − o_j‖² / scale of the pairs of pairs `chosen`, (Q, 2) → (Q,); offsets (pairs, k)."""
    return np.sum(np.square(offsets[chosen[:, 0]] - offsets[chosen[:, 1]]), axis=1) / scale


def mean_parallelogram_score(offsets: np.ndarray, scale: float, counts: np.ndarray | None = None) -> np.ndarray:
    """The mean of s_ij over all pairs of different pairs; with `counts`, (B, pairs), of each resample, (B,).

    With weights w_i, W = Σ w_i, it is exactly

        2 (W Σ w_i ‖o_i‖² − ‖Σ w_i o_i‖²) / ((W² − Σ w_i²) scale)

    in which a pair drawn twice is not compared with itself. Without `counts` all weights are 1, and the result has
    shape ().
    """
    w = np.ones((1, len(offsets))) if counts is None else counts
    centred = offsets - offsets.mean(axis=0)  # changes nothing but the rounding error
    total = w.sum(axis=1)
    squares = w @ np.square(centred).sum(axis=1)
    sums = np.square(w @ centred).sum(axis=1)
    compared = total**2 - np.einsum("bi,bi->b", w, w)  # without a second array of the size of w
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may consist of one pair only
        scores = 2 * (total * squares - sums) / (compared * scale)
    scores = np.where(compared > 0, np.maximum(scores, 0.0), np.nan)
    return scores[0] if counts is None else scores


@lru_cache(maxsize=4)  # variants and models ask for the same pairings one after the other
def random_pairings(pairs: int, count: int, seed: int) -> np.ndarray:
    """Which output each input gets when outputs are dealt out at random, `count` times, (pairs, count) int32."""
    rng = np.random.default_rng(seed)
    pairings = np.stack([rng.permutation(pairs).astype(np.int32) for _ in range(count)], axis=1)
    pairings.setflags(write=False)
    return pairings


def shuffled_scores(inputs: np.ndarray, outputs: np.ndarray, scale: float, pairings: np.ndarray) -> np.ndarray:
    """Mean scores of the same words when each input gets the output of a random pair, (B,).

    What the words' places alone would give. With B random pairings, p = (1 + #{shuffled ≤ observed}) / (1 + B) tests
    that outputs belong to their inputs. The mean offset is the same for every pairing, so only Σ a_i · b_π(i) is
    needed; it is summed over blocks of inputs, so that no (pairs, pairs) matrix is in memory.

    Args:
        pairings: (pairs, B), from `random_pairings`.
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
    """The score of the relation `name`; `sampled`: random pairs of pairs whose scores are kept."""
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
    """Every variant of the score of every relation; variants that start from the same vectors share them."""
    dimensions = subject.input.rows.shape[1]
    usable = {name: s for name, s in VARIANTS.items() if s.components is None or s.components <= dimensions}
    scores: dict[str, Scores] = {variant: {} for variant in usable}
    small: dict[str, list[str]] = {variant: [] for variant in usable}
    steps = len(subject.relations) * len(usable)
    with tqdm(total=steps, desc=f"{subject.label}: relations", unit="score", disable=None, leave=False) as bar:
        for relation in subject.relations:
            located: dict[tuple[str, WordForm, bool], RelationVectors] = {}
            for variant, s in usable.items():
                bar.update()
                pairs = subject.pairs(s.words)[relation.name]
                pairs = distinct(pairs) if s.distinct else pairs
                if len(pairs.words) < SMALLEST_RELATION:
                    small[variant].append(f"{relation.name} ({len(pairs.words)} of {len(relation.pairs)})")
                    continue
                key = ("input" if subject.model.tied else s.vectors, s.words, s.distinct)
                if key not in located:
                    located[key] = RelationVectors(subject.matrices[key[0]], pairs.ids)
                sampled = PRESET_QUADRUPLES if variant == PRESET else 0
                projected = project(located[key], s)
                scores[variant][relation.name] = relation_score(projected, pairs, subject, relation.name, sampled)
    for variant in VARIANTS:
        if variant not in usable:
            subject.skipped.append(f"{variant}: the model has only {dimensions} dimensions")
        elif small[variant]:
            named = ", ".join(small[variant])
            subject.skipped.append(f"{variant}: fewer than {SMALLEST_RELATION} pairs can be used of {named}")
    return {variant: found for variant, found in scores.items() if found}


def checkpoint(subject: Subject) -> dict[str, float]:
    """The preset's mean score over relations."""
    projected = [project(RelationVectors(subject.input, p.ids), VARIANTS[PRESET]) for p in subject.scored.values()]
    scores = [mean_parallelogram_score(each.offsets, each.scale) for each in projected]
    return {"parallelogram_score": float(np.mean(scores))} if scores else {}


def mean_over_relations(results: Scores) -> Estimate:
    """The mean score over relations, its interval over the pairs of each: the relations themselves are not a sample."""
    return mean_estimate([r.score.value for r in results.values()], [r.replicates for r in results.values()])


def relative_to_random_pairs(results: Scores) -> Estimate:
    """Mean over relations of the score over that of the same words paired at random; 1: no trace of the relation.

    Free of the scale, and of where the words lie as long as they lie there together. The interval is over pairs, with
    the mean of the random pairings held fixed.
    """
    found = results.values()
    return mean_estimate([r.score.value / r.shuffled for r in found], [r.replicates / r.shuffled for r in found])


def rows(model: ModelResult) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant, results in of(model).items():
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
    names = sorted({name for model in analysis.models for name in preset(model)})
    blocks: list[Block] = [findings(analysis)]
    if names:
        blocks += [
            paragraph(
                f"Preset {PRESET}: words as their last token, plane of the first two components of the vocabulary, "
                "scale of the vocabulary. Lower is better."
            ),
            _scores_table(analysis, names),
            scores_by_relation(analysis, names),
            score_distributions(analysis, names),
        ]
    return [*blocks, _every_variant(analysis)]


def findings(analysis: Analysis) -> Prose:
    """Sentences on each model's scores, and what limits them."""
    items: list[str] = []
    for model in analysis.models:
        results = preset(model)
        if not results:
            items.append(
                bold(model.label) + f": of no relation {SMALLEST_RELATION} pairs can be used, so the model has no "
                "score, and its words are in no figure."
            )
            continue
        level = SIGNIFICANT / len(results)
        beyond = sum(result.p_shuffled < level for result in results.values())
        blind = [name for name, result in results.items() if smallest_shuffle_p(result.pairs, SHUFFLES) >= level]
        items.append(
            bold(model.label) + f": in {beyond} of {len(results)} relations the preset's score is lower than that of "
            f"the same words paired at random (permutation test of {SHUFFLES} shuffles, Bonferroni at "
            f"{SIGNIFICANT:.0%}).{without_power(blind, len(results))}"
        )
    items.append(
        "Scores of different variants, and of models with different spectra, are on different scales: "
        f"{EXPECTED_AT_RANDOM:g} is what four independent random tokens score on average in the preset, and frequent "
        "words can lie below it for reasons that have nothing to do with relations. Compare with the same words "
        "paired at random."
    )
    if any(model.skipped for model in analysis.models):
        items.append("Some scores could not be computed, mostly for want of words that are one token: see Method.")
    return Prose(items=items)


def without_power(relations: Sequence[str], total: int) -> str:
    """A sentence about the relations whose test has no power at all, empty if there are none."""
    if not relations:
        return ""
    which = "any" if len(relations) == total else f"{len(relations)} ({', '.join(relations)})"
    return (
        f" It cannot become significant in {which} of them, whatever the models: there are too few pairs, or too many "
        "relations to correct for, for the smallest p-value that it can give."
    )


def _scores_table(analysis: Analysis, names: Sequence[str]) -> Table:
    head: list[str] = ["relation", "pairs used"]
    for heading in headings(analysis.models):
        head += [heading, "random pairs"]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for name in names:
        found = [preset(model).get(name) for model in analysis.models]
        used = dict.fromkeys(f"{r.pairs} of {r.pairs + r.dropped}" for r in found if r is not None)
        cells: list[Cell] = [", ".join(used)]
        for result in found:
            cells += [None, None] if result is None else [result.score, result.shuffled]
        rows.append((name, cells))
    return Table(head=head, rows=rows, digits=2)


def _every_variant(analysis: Analysis) -> Details:
    head: list[str] = ["variant", "components", "plane of", "scale of", "words: token", "vectors", "distinct"]
    for heading in headings(analysis.models):
        head += [heading + ": score", "plane's variance"]
    rows: list[tuple[str, Sequence[Cell]]] = []
    for name, s in VARIANTS.items():
        scale, words = s.normalisation.replace("_", " "), s.words.replace("_", " ")
        cells: list[Cell] = ["all" if s.components is None else str(s.components), s.plane, scale, words, s.vectors]
        cells.append("yes" if s.distinct else "no")
        for model in analysis.models:
            results = of(model).get(name)
            share = np.mean([result.plane_variance for result in results.values()]) if results else 0
            cells += [mean_over_relations(results), f"{share:.1%}"] if results else [None, None]
        rows.append((name, cells))
    formula = paragraph(
        "Score of a parallelogram a : b = c : d: ‖E(a) + E(d) − E(b) − E(c)‖² over the scale; 0 is perfect. "
        "Its mean is over all pairs of pairs of a relation, its interval from resampling pairs."
    )
    return Details(title="Every way to measure it", blocks=[formula, Table(head=head, rows=rows, digits=2)])


def without_relations(analysis: Analysis) -> list[str]:
    labels = [model.label for model in analysis.models if not preset(model)]
    return listed("Left out, since no relation has enough pairs that they can use", labels)


def scores_by_relation(analysis: Analysis, names: Sequence[str]) -> Drawing:
    models = analysis.having(preset)
    scores = [(i, model.label, {name: r.score for name, r in preset(model).items()}) for i, model in models]
    figure, panel, heights = rows_of_intervals(names, scores)
    for (index, model), y in zip(models, heights, strict=True):
        shuffled = [result.shuffled for result in preset(model).values()]
        panel.plot(shuffled, y, "|", color=look(index)["color"], markersize=9, markeredgewidth=1.5)
    panel.axvline(EXPECTED_AT_RANDOM, color=GREY, linestyle=":", linewidth=1)
    panel.set_xlabel("mean parallelogram score (dotted: four random tokens; |: same words, random pairs)")
    panel.set_xlim(left=0)
    return sign(
        figure,
        "scores_by_relation",
        "Parallelogram score of each relation",
        caption="Lower is better. The vertical bars show what the same words score when they are paired at random: a "
        "score that is low, but no lower than its bar, says where the words lie and nothing about the relation.",
        models=[model for _, model in models],
        source=f"Preset {PRESET}: plane of the first 2 components of the vocabulary. Relations: {analysis.relations}. "
        f"Input embedding. Intervals: 95 %, {analysis.resampled} of the pairs.",
        remarks=without_relations(analysis),
    )


def score_distributions(analysis: Analysis, names: Sequence[str]) -> Drawing:
    models = analysis.having(preset)
    figure, axes = grid(len(names), 4, row_height=1.7, extra=1.2, sharex=True, sharey=True)
    beyond: dict[tuple[str, str], float] = {}
    shares = np.linspace(0, 1, 201)
    for panel, name in zip(axes.flat, names, strict=False):
        for index, model in models:
            if name in preset(model):
                sampled = preset(model)[name].sampled
                panel.plot(np.quantile(sampled, shares), shares, **line_look(index), label=model.label)
                beyond[name, model.label] = float(np.mean(sampled > SCORE_AXIS))
        panel.set_title(name)
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(0, SCORE_AXIS)
        panel.set_xticks([0, 0.1, 1, 10, SCORE_AXIS], ["0", ".1", "1", "10", f"{SCORE_AXIS:g}"])
    label_edges(axes, "score", "share of pairs\nof pairs below")
    remarks = without_relations(analysis)
    (relation, label), most = max(beyond.items(), key=lambda entry: entry[1])
    if most > 0:
        remarks.append(
            f"The axis ends at {SCORE_AXIS:g}. Scores beyond it are not drawn: at most {most:.2%} of a curve "
            f"({relation}, {label})."
        )
    drawn = counts_text({model.label: len(r.sampled) for _, model in models for r in preset(model).values()})
    return sign(
        figure,
        "score_cdfs",
        "Distribution of the parallelogram score",
        caption=f"Each curve is the share of {drawn} random pairs of pairs, drawn with replacement, that score below. "
        "Further left is better.",
        models=[model for _, model in models],
        source=f"Preset {PRESET}, {drawn} random pairs of pairs a relation. Relations: {analysis.relations}. Input "
        "embedding.",
        remarks=remarks,
    )


def _number(variant: str, number: Callable[[Scores], Estimate]) -> Callable[[ModelResult], Estimate | None]:
    return lambda model: number(of(model)[variant]) if variant in of(model) else None


def overall(analysis: Analysis) -> dict[str, Any]:
    return {"variants": VARIANTS}


RANDOM = "… over that of the same words paired at random"
MEAN, RELATIVE = mean_over_relations, relative_to_random_pairs
QUANTITIES = (
    Quantity(f"parallelogram score, {PRESET}", _number(PRESET, MEAN), "lower", "preset_score"),
    Quantity(RANDOM, _number(PRESET, RELATIVE), "lower", "preset_relative", "the same over random pairs of the words"),
    Quantity(f"parallelogram score, {OWN_SCALE}", _number(OWN_SCALE, MEAN), "lower", "own_scale_score"),
    Quantity(RANDOM, _number(OWN_SCALE, RELATIVE), "lower"),
    Quantity("… of the centres", _number(OF_CENTRES, MEAN), "lower"),
    Quantity("… of the centres, over that of random pairs", _number(OF_CENTRES, RELATIVE), "lower",
             "own_scale_relative_centres", "the same of the centres, over random pairs of the words"),
)  # fmt: skip
CURVES = (Curve("parallelogram_score", f"parallelogram score ({PRESET}), mean over relations"),)
