"""The report: one self-contained page, its numbers as JSON and CSV, its figures as PNG and SVG."""

import base64
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from hgpt.errors import UserError
from hgpt.interpret.analysis import SHUFFLES, analyse
from hgpt.interpret.figures import (
    Drawing,
    counts_text,
    draw_all,
    duplicate_variants,
    save_figure,
    swatch,
    tokens_read,
)
from hgpt.interpret.parallelograms import EXPECTED_AT_RANDOM, PRESET, VARIANTS
from hgpt.interpret.relations import SMALLEST_RELATION
from hgpt.interpret.results import (
    OWN_SCALE,
    Analysis,
    AnalysisSettings,
    Estimate,
    ModelResult,
    RelationResult,
    mean_analogy,
    mean_consistency,
    mean_over_relations,
    relative_to_random_pairs,
    to_json,
)
from hgpt.interpret.statistics import CONFIDENCE, holm, smallest_shuffle_p, smallest_sign_flip_p

PAGE, RESULTS, SCORES, FIGURE_FOLDER = "index.html", "results.json", "parallelograms.csv", "figures"
SIGNIFICANT = 1 - CONFIDENCE
# Variants that use different pairs: on these it depends which words a tokenizer can express.
FORMS = {
    PRESET: "last token of each word",
    "words of one token": "words of one token",
    "words of one token after a space": "words of one token after a space",
    "distinct pairs of tokens": "last tokens, each pair of tokens once",
}


def interpret(paths: list[str], settings: AnalysisSettings, out: str | Path, *, checkpoints: bool = True) -> Analysis:
    """Measure the models and write the report into the folder `out`; returns what was measured."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    analysis = analyse(paths, settings, checkpoints=checkpoints)
    write_report(analysis, folder)
    return analysis


def write_report(analysis: Analysis, folder: Path) -> Path:
    """index.html, results.json, parallelograms.csv and figures/ in `folder`; returns the page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(
            json.dumps(_finite(to_json(analysis)), indent=1, ensure_ascii=False), encoding="utf-8"
        )
        _write_scores(analysis, folder / SCORES)
        drawings = draw_all(analysis)
        images = {d.name: save_figure(d.figure, folder / FIGURE_FOLDER, d.name).read_bytes() for d in drawings}
        (folder / PAGE).write_text(page(analysis, drawings, images), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}; choose another folder") from error
    return folder / PAGE


def restricted(analysis: Analysis, models: int) -> Analysis:
    """The same for the first so many models."""
    kept = {model.label for model in analysis.models[:models]}
    return replace(
        analysis,
        models=analysis.models[:models],
        comparisons=[row for row in analysis.comparisons if row["model"] in kept],
        cka={label: table for label, table in analysis.cka.items() if label in kept},
        last_layer_cka={label: value for label, value in analysis.last_layer_cka.items() if label in kept},
    )


def _finite(value: Any) -> Any:
    """The same with null for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _write_scores(analysis: Analysis, path: Path) -> None:
    """One row for each model, variant and relation, with the test against the first model where there is one."""
    tests = {(row["model"], row["variant"], row["relation"]): row for row in analysis.comparisons}
    columns = ("difference", "low", "high", "p", "p_holm")
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["model", "variant", "relation", "pairs", "dropped", "score", "score_low", "score_high", "shuffled"]
            + ["p_shuffled", "plane_variance", "plane_variance_of_words"]
            + [f"{column}_to_the_first_model" for column in columns]
        )
        for model in analysis.models:
            for variant, results in model.relations.items():
                for name, r in results.items():
                    test = tests.get((model.label, variant, name), {})
                    writer.writerow(
                        [model.label, variant, name, r.pairs, r.dropped, r.score.value, r.score.low, r.score.high]
                        + [r.shuffled, r.p_shuffled, r.plane_variance, r.plane_variance_of_words]
                        + [test.get(column, "") for column in columns]
                    )


# ------------------------------------------------------------------------------------------------------------
# The page


def page(analysis: Analysis, drawings: Sequence[Drawing], images: dict[str, bytes]) -> str:
    """The whole page; style, script, data and images are inside it, and nothing is fetched."""
    resources = files("hgpt.interpret") / "page"
    style = (resources / "style.css").read_text(encoding="utf-8")
    script = (resources / "browser.js").read_text(encoding="utf-8")
    readings = reading_groups(analysis)
    sections = [
        ("summary", "Summary", _summary(analysis)),
        ("says", "What the numbers say, and what they do not", _conclusions(analysis)),
        ("relations", "Relations", _relations_table(analysis)),
        ("figures", "Figures", "".join(_figure(d, images[d.name]) for d in drawings)),
        ("text", "Text browser", _text_browser(analysis, readings)),
        ("centres", "Centres to read", _centres(analysis)),
        ("method", "Method", _method(analysis)),
    ]
    sections = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    title = " · ".join(model.label for model in analysis.models)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{html}</section>' for anchor, name, html in sections)
    data = json.dumps(_finite(readings), ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: interpretation report</title><style>{style}</style></head><body>"
        f"<h1>What can be read in {len(analysis.models)} model{'s' if len(analysis.models) > 1 else ''}</h1>"
        f"{_models(analysis)}<nav>{links}</nav>{body}"
        f'<script type="application/json" id="readings">{data}</script><script>{script}</script></body></html>\n'
    )


def _labels(analysis: Analysis) -> list[str]:
    """Swatch and label of each model, for headings."""
    return [f"{swatch(index)}{escape(model.label)}" for index, model in enumerate(analysis.models)]


def _models(analysis: Analysis) -> str:
    items = "".join(
        f"<li>{swatch(index)}<b>{escape(model.label)}</b>: {escape(model.description)}, {model.parameters / 1e6:.3g} M "
        f"parameters{_trained(model)}</li>"
        for index, model in enumerate(analysis.models)
    )
    text = (
        f"{escape(counts_text(tokens_read(analysis.models)))} validation tokens in "
        f"{escape(counts_text(_windows_read(analysis)))} windows of {escape(analysis.data_source or '')}"
        if analysis.data is not None
        else "no text"
    )
    return f'<ul id="models">{items}</ul><p class="quiet">Measured on {text}. All intervals are 95 %.</p>'


def _windows_read(analysis: Analysis) -> dict[str, int]:
    measured = [(model.label, model.text) for model in analysis.models if model.text is not None]
    return {label: len(np.unique(text.positions.window)) for label, text in measured}


def _trained(model: ModelResult) -> str:
    seen = "" if model.source.tokens_seen is None else f", {model.source.tokens_seen:,} tokens seen"
    return ("" if model.source.step is None else f", step {model.source.step:,}") + seen


def _number(estimate: Estimate | float | str | None, digits: int = 3) -> str:
    if estimate is None:
        return '<td class="number">–</td>'
    if isinstance(estimate, str):
        return f'<td class="number">{escape(estimate)}</td>'
    if isinstance(estimate, Estimate):
        low, high = f"{estimate.low:.{digits}f}", f"{estimate.high:.{digits}f}"
        return f'<td class="number">{estimate.value:.{digits}f} <span class="interval">[{low}, {high}]</span></td>'
    return f'<td class="number">{estimate:.{digits}f}</td>'


_ARROWS = {"lower": "↓", "higher": "↑", "": ""}
Measure = Callable[[ModelResult], Estimate | float | str | None]


def _score(variant: str) -> Measure:
    return lambda model: mean_over_relations(model.relations[variant]) if model.relations.get(variant) else None


def _relative(variant: str) -> Measure:
    return lambda model: relative_to_random_pairs(model.relations[variant]) if model.relations.get(variant) else None


def summary_measures() -> list[tuple[str, str, Measure]]:
    """(name, what is better, value) of the rows of the summary."""

    def quality(name: str) -> Measure:
        return lambda model: model.quality.get(name)

    def shape(matrix: str, name: str) -> Measure:
        return lambda model: model.geometry.get(matrix, {}).get(name)

    def energy(name: str) -> Measure:
        def measure(model: ModelResult) -> str | None:
            value = (model.energy or {}).get(name)
            return None if value is None else f"{value:.3g}"

        return measure

    return [
        ("validation loss, nats per token, unsmoothed", "lower", quality("loss")),
        ("bits per byte", "lower", quality("bits_per_byte")),
        ("accuracy", "higher", quality("accuracy")),
        ("top-5 accuracy", "higher", quality("top5")),
        ("expected calibration error", "lower", quality("ece")),
        ("entropy of predictions, nats", "", quality("entropy")),
        ("nearest-centre accuracy", "higher", quality("nearest_accuracy")),
        ("margin log(d of the nearest other / d of the target)", "higher", quality("log_margin")),
        ("distance to the target over the median distance", "lower", quality("target_ratio")),
        (f"parallelogram score, {PRESET}", "lower", _score(PRESET)),
        ("… over that of the same words paired at random", "lower", _relative(PRESET)),
        (f"parallelogram score, {OWN_SCALE}", "lower", _score(OWN_SCALE)),
        ("… over that of the same words paired at random", "lower", _relative(OWN_SCALE)),
        ("… of the centres", "lower", _score(f"{OWN_SCALE}, centres")),
        ("… of the centres, over that of random pairs", "lower", _relative(f"{OWN_SCALE}, centres")),
        ("offset consistency, input embedding", "higher", lambda model: mean_consistency(model, "input")),
        ("offset consistency, centres", "higher", lambda model: mean_consistency(model, "centres")),
        ("analogy accuracy 3CosAdd, input embedding", "higher", lambda model: mean_analogy(model, "input", "3CosAdd")),
        ("analogy accuracy 3CosMul, input embedding", "higher", lambda model: mean_analogy(model, "input", "3CosMul")),
        ("analogy accuracy 3CosAdd, centres", "higher", lambda model: mean_analogy(model, "centres", "3CosAdd")),
        ("effective rank of the centres", "", shape("centres", "effective_rank")),
        ("participation ratio of the centres", "", shape("centres", "participation_ratio")),
        ("isotropy of the centres", "", shape("centres", "isotropy")),
        ("mean cosine of two centres", "", shape("centres", "mean_cosine")),
        ("effective rank of hidden states", "", shape("hidden", "effective_rank")),
        ("mean norm of the centres", "", lambda model: model.geometry["centres"]["norms"]["mean"]),
        ("energy of the training, kWh", "lower", energy("energy_kwh")),
        ("training tokens per joule", "higher", energy("tokens_per_joule")),
        ("emissions of the training, kg CO2eq", "lower", energy("emissions_kg")),
    ]


def _summary(analysis: Analysis) -> str:
    heads = "".join(f"<th>{label}</th>" for label in _labels(analysis))
    rows = []
    for name, better, measure in summary_measures():
        values = [measure(model) for model in analysis.models]
        if any(value is not None for value in values):
            cells = "".join(map(_number, values))
            rows.append(f"<tr><th>{escape(name)} {_ARROWS[better]}</th>{cells}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in analysis.notes)
    methods = "".join(
        f'<p class="quiet">Energy of {escape(model.label)}, by whole machines: {escape(model.energy["method"])}. '
        "Estimates compare runs on one machine only.</p>"
        for model in analysis.models
        if model.energy is not None
    )
    explanation = (
        "↓ lower is better, ↑ higher is better. Intervals of losses and calibration are over windows of text, those of "
        "scores, consistency and analogies over word pairs, with the relations held fixed. None of them covers another "
        "seed: how much two runs of one configuration differ only several seeds can tell (python -m hgpt.compare). "
        "Margins, ratios of distances, the logit lens, neighbours and contexts use the head's own distance. Those of a "
        "softmax head are Euclidean and stand for comparison only: its training does not see them. Parallelograms, "
        "analogies, norms, ranks and CKA are Euclidean on purpose, whatever the head's distance: they describe the "
        "vectors as they are stored, and compare models. Ranks, participation ratio, isotropy, mean cosine and norm of "
        "the centres have no interval: they are computed from all the weights, exactly, and vary over seeds only."
    )
    if sampled := _sampled(analysis):
        explanation += f" The rank of hidden states is that of a sample of {counts_text(sampled)} positions."
    return (
        f'{notes}<div class="scroll"><table><thead><tr><th>measure</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="quiet">{escape(explanation)}</p>{methods}'
    )


def _sampled(analysis: Analysis) -> dict[str, int]:
    return {model.label: len(model.text.sample_at) for model in analysis.models if model.text is not None}


def _conclusions(analysis: Analysis) -> str:
    """Sentences that follow from the numbers, with what limits them."""
    items = []
    for model in analysis.models:
        results = model.relations.get(PRESET, {})
        if results:
            level = SIGNIFICANT / len(results)
            beyond = sum(r.p_shuffled < level for r in results.values())
            blind = [name for name, r in results.items() if smallest_shuffle_p(r.pairs, SHUFFLES) >= level]
            items.append(
                f"<b>{escape(model.label)}</b>: in {beyond} of {len(results)} relations the preset's score is lower "
                f"than that of the same words paired at random (permutation test of {SHUFFLES} shuffles, Bonferroni at "
                f"{SIGNIFICANT:.0%}).{_cannot(blind, len(results))}"
            )
        else:
            items.append(
                f"<b>{escape(model.label)}</b>: of no relation {SMALLEST_RELATION} pairs can be used, so it has no "
                "score, and its words are in no figure."
            )
    for other in analysis.models[1:]:
        items += _comparison(analysis, other)
    items.append(
        "What this does not show: that a difference is due to the head. Two checkpoints differ in their seed, in the "
        "length of their training and in how well each was tuned too. Intervals over word pairs say how the result "
        "would vary with other words, not with other runs."
    )
    items.append(
        f"Scores of different variants, and of models with different spectra, are on different scales: "
        f"{EXPECTED_AT_RANDOM:g} is what four independent random tokens score on average in the preset, and frequent "
        "words can lie below it for reasons that have nothing to do with relations. Compare with the same words "
        "paired at random."
    )
    if any(model.skipped for model in analysis.models):
        items.append("Some scores could not be computed, mostly for want of words that are one token: see Method.")
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _comparison(analysis: Analysis, other: ModelResult) -> list[str]:
    """What the tests say of one model against the first."""
    first = analysis.models[0]
    names = f"<b>{escape(other.label)}</b>", f"<b>{escape(first.label)}</b>"
    rows = [row for row in analysis.comparisons if row["model"] == other.label]
    preset = [row for row in rows if row["variant"] == PRESET]
    if not preset:
        why = "there is no relation that both can use"
        if other.vocabulary != first.vocabulary:
            why = "their tokenizers differ"
        return [f"{names[0]} against {names[1]}: no test compares their parallelograms, since {why}."]
    better = sum(row["p_holm"] < SIGNIFICANT and row["difference"] < 0 for row in preset)
    worse = sum(row["p_holm"] < SIGNIFICANT and row["difference"] > 0 for row in preset)
    same = duplicate_variants([first, other])
    signs = variant_signs([row for row in rows if row["variant"] not in same]).values()
    repeated = [variant for variant in same if any(row["variant"] == variant for row in rows)]
    counted = (
        f" (not counted, since the numbers repeat those of another: {escape('; '.join(repeated))})" if repeated else ""
    )
    return [
        f"{names[0]} against {names[1]}, preset {PRESET}: a lower (better) score in {better} relations, a higher one "
        f"in {worse}, no difference that the test sees in {len(preset) - better - worse} (paired permutation test over "
        f"disjoint pairs of pairs, Holm for {len(preset)} relations)."
        + _cannot(out_of_reach(preset, other), len(preset)),
        f"Over {len(signs)} ways to measure it{counted}, the mean difference favours {names[0]} in "
        f"{sum(sign < 0 for sign in signs)} and {names[1]} in {sum(sign > 0 for sign in signs)}. The ways are not "
        "independent: this is a check of robustness and no test.",
    ]


def out_of_reach(rows: Sequence[dict[str, Any]], other: ModelResult) -> list[str]:
    """The relations of one comparison and variant whose test cannot become significant after Holm's correction.

    Not even if every relation had the least p-value that its number of pairs allows.
    """
    disjoint = [len(other.relations[row["variant"]][row["relation"]].disjoint) for row in rows]
    adjusted = holm([smallest_sign_flip_p(m) for m in disjoint])
    return [row["relation"] for row, p in zip(rows, adjusted, strict=True) if p >= SIGNIFICANT]


def _cannot(relations: Sequence[str], total: int) -> str:
    """A sentence about the relations whose test has no power at all, empty if there are none."""
    if not relations:
        return ""
    which = "any" if len(relations) == total else f"{len(relations)} ({escape(', '.join(relations))})"
    return (
        f" It cannot become significant in {which} of them, whatever the models: there are too few pairs, or too many "
        "relations to correct for, for the smallest p-value that it can give."
    )


def variant_signs(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean difference over relations of each variant, from the rows of one comparison."""
    by_variant: dict[str, list[float]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row["difference"])
    return {variant: float(np.mean(differences)) for variant, differences in by_variant.items()}


def _relations_table(analysis: Analysis) -> str:
    names = sorted({name for model in analysis.models for name in model.relations.get(PRESET, {})})
    if not names:
        return ""
    preset = [row for row in analysis.comparisons if row["variant"] == PRESET]
    tests = {(row["model"], row["relation"]): row for row in preset}
    blind = {
        (model.label, relation)
        for model in analysis.models[1:]
        for relation in out_of_reach([row for row in preset if row["model"] == model.label], model)
    }
    head = "<th>relation</th><th>pairs used</th>"
    for index, label in enumerate(_labels(analysis)):
        head += f"<th>{label}</th><th>random pairs</th>"
        head += "<th>minus the first (p, Holm)</th>" if index and analysis.comparisons else ""
    body = ""
    for name in names:
        found = [model.relations.get(PRESET, {}).get(name) for model in analysis.models]
        pairs = dict.fromkeys(_pairs_text(result) for result in found if result is not None)
        body += f'<tr><th>{escape(name)}</th><td class="number">{", ".join(pairs)}</td>'
        for index, (model, result) in enumerate(zip(analysis.models, found, strict=True)):
            body += _number(None if result is None else result.score, 2)
            body += _number(None if result is None else result.shuffled, 2)
            if index and analysis.comparisons:
                test = tests.get((model.label, name))
                shown = "–" if test is None else f"{test['difference']:+.2f} ({test['p_holm']:.3f})"
                shown += " †" if (model.label, name) in blind else ""
                bold = test is not None and test["p_holm"] < SIGNIFICANT
                body += f'<td class="number">{"<b>" if bold else ""}{shown}{"</b>" if bold else ""}</td>'
        body += "</tr>"
    dagger = (
        '<p class="quiet">†: this test cannot become significant, whatever the models, with so few pairs or so many '
        "relations to correct for.</p>"
        if blind
        else ""
    )
    return (
        f"<p>Preset {PRESET}: words as their last token, plane of the first two components of the vocabulary, scale of "
        'the vocabulary. Lower is better; bold: p &lt; 0.05 after correction. All variants are in <a href="'
        f'{SCORES}">{SCORES}</a> beside this page.</p><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{dagger}{_pairs_used(analysis)}"
    )


def _pairs_text(result: RelationResult) -> str:
    return f"{result.pairs} of {result.pairs + result.dropped}"


def _pairs_used(analysis: Analysis) -> str:
    """How many pairs of each relation every way to make a word a token leaves, by model, and which it leaves out."""
    names = sorted({n for model in analysis.models for results in model.relations.values() for n in results})
    tables: dict[str, list[str]] = {}  # models with one tokenizer can use the same pairs
    for model in analysis.models:
        rows = ""
        for name in names:
            found = [model.relations.get(variant, {}).get(name) for variant in FORMS]
            cells = (f"under {SMALLEST_RELATION}" if result is None else _pairs_text(result) for result in found)
            rows += f"<tr><th>{escape(name)}</th>{''.join(map(_number, cells))}</tr>"
        tables.setdefault(rows, []).append(model.label)
    head = "".join(f"<th>{escape(form)}</th>" for form in FORMS.values())
    html = "".join(
        f'<h3>{escape(", ".join(labels))}</h3><div class="scroll"><table><thead><tr><th>relation</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        for rows, labels in tables.items()
    )
    missing = "".join(
        f"<li>{escape(model.label)}, {escape(name)}: {escape(', '.join(f'{a} – {b}' for a, b in pairs))}</li>"
        for model in analysis.models
        for name in names
        if (pairs := _pairs_of_others(analysis, model, name))
    )
    missing = f"<p>Pairs that another model here can use and this one cannot:</p><ul>{missing}</ul>" if missing else ""
    return (
        "<details><summary>Pairs used of each relation</summary><p>A pair is left out where the tokenizer does not "
        "know one of its words, where a variant wants words of one token and they are more, and where a variant wants "
        f"each pair of tokens once. A relation with under {SMALLEST_RELATION} pairs is not scored.</p>"
        f"{html}{missing}</details>"
    )


def _pairs_of_others(analysis: Analysis, model: ModelResult, name: str) -> list[tuple[str, str]]:
    """The pairs that other models use of a relation that `model` is scored on, and it does not; last tokens."""
    if name not in model.planes:
        return []
    used = (other.planes[name]["words"] for other in analysis.models if name in other.planes)
    own = set(model.planes[name]["words"])
    return [pair for pair in dict.fromkeys(pair for pairs in used for pair in pairs) if pair not in own]


def _figure(drawing: Drawing, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    return (
        f'<figure id="{drawing.name}"><h3>{escape(drawing.title)}</h3>'
        f'<div class="scroll"><img alt="{escape(drawing.title)}" src="data:image/png;base64,{data}"></div>'
        f'<figcaption><p>{escape(drawing.caption)}</p><p class="source">{escape(drawing.source)}</p></figcaption>'
        "</figure>"
    )


def reading_groups(analysis: Analysis) -> list[dict[str, Any]]:
    """Models that read the same tokens together, [{"tokens", "models": [{"label", "number", "reading"}]}].

    `number` is the model's place in the report.
    """
    groups: list[dict[str, Any]] = []
    for number, model in enumerate(analysis.models):
        if not model.reading:
            continue
        tokens = [reading.token for reading in model.reading]
        entry = {"label": model.label, "number": number, "reading": [asdict(reading) for reading in model.reading]}
        for group in groups:
            if group["tokens"] == tokens:
                group["models"].append(entry)
                break
        else:
            groups.append({"tokens": tokens, "models": [entry]})
    return groups


def _text_browser(analysis: Analysis, groups: Sequence[dict[str, Any]]) -> str:
    if not groups:
        return ""
    html = (
        "<p>Point at a token, tap it or reach it with Tab: what each model thought before it came, the most probable "
        "tokens first. Of a harmonic head these are the nearest centres, with d / d_min; the list of a softmax head is "
        "by probability alone.</p>"
    )
    source = analysis.settings.text or "the beginning of the first window of validation text"
    html += f'<p class="quiet">Text: {escape(source)}.</p>'
    for number, group in enumerate(groups):
        spans = "".join(
            f'<span tabindex="0" data-position="{position}" style="background:rgba(86,180,233,{seen["p"]:.2f})">'
            f"{escape(seen['token'])}</span>"
            for position, seen in enumerate(group["models"][0]["reading"])
        )
        labels = [model["label"] for model in group["models"]]
        tokens = f", in the tokens of {', '.join(labels)}" if len(groups) > 1 else ""
        # A panel keeps to the bottom of the window as long as its own text is in sight.
        html += (
            f'<div class="reading"><p class="quiet">The darker a token, the more probable {escape(labels[0])} found it'
            f'{escape(tokens)}.</p><div class="text" id="text-{number}">{spans}</div>'
            f'<div class="panel" id="panel-{number}"></div></div>'
        )
    return html


def _centres(analysis: Analysis) -> str:
    html = ""
    for model in analysis.models:
        for number, word in enumerate(model.words_read):
            unit = "d" if model.harmonic else "1 − cosine"
            near = ", ".join(f"<code>{escape(_visible(t))}</code> {d:.2f}" for t, d in word["neighbours"])
            value = "d / d_min" if model.harmonic else "p"
            contexts = "contexts nearest to the centre" if model.harmonic else "contexts with the largest logit"
            rows = "".join(
                f"<tr><td><code>…{escape(_visible(c['before']))}</code></td><td><code>{escape(_visible(c['next']))}</code>"
                f'</td><td class="number">{c["value"]:.3f}</td></tr>'
                for c in word["contexts"]
            )
            if number == 0:
                html += f"<h3>{escape(model.label)}</h3>"
            table = (
                f'<div class="scroll"><table><thead><tr><th>{contexts}</th><th>what came</th><th>{value}</th></tr>'
                f"</thead><tbody>{rows}</tbody></table></div>"
            )
            html += (
                f"<details{' open' if number == 0 else ''}><summary><code>{escape(_visible(word['token']))}</code>"
                f"</summary><p>Nearest centres ({unit}): {near}</p>{table if rows else ''}</details>"
            )
    if not html:
        return ""
    chosen = (
        "The words that were asked for with --words, of each its last token"
        if analysis.settings.words
        else "The text's most frequent tokens that are words"
    )
    sampled = _sampled(analysis)
    states = (
        f", and of a sample of {counts_text(sampled)} positions of the validation text the contexts whose hidden "
        "states are nearest to the centre (of a softmax head: that give the token the largest logit)"
    )
    return f"<p>{escape(chosen)}: the neighbours of their centres{escape(states) if sampled else ''}.</p>{html}"


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _method(analysis: Analysis) -> str:
    variants = "".join(
        f"<tr><th>{escape(name)}</th><td>{'all' if s.components is None else s.components}</td><td>{s.plane}</td>"
        f"<td>{s.normalisation.replace('_', ' ')}</td><td>{s.words.replace('_', ' ')}</td><td>{s.vectors}</td>"
        f"<td>{'yes' if s.distinct else 'no'}</td>"
        f"{''.join(_variant_cells(model, name) for model in analysis.models)}</tr>"
        for name, s in VARIANTS.items()
    )
    heads = "".join(f"<th>{label}: score</th><th>plane's variance</th>" for label in _labels(analysis))
    settings = ", ".join(f"{key} = {value}" for key, value in asdict(analysis.settings).items())
    skipped = "".join(
        f"<li>{escape(model.label)}: {escape(entry)}</li>" for model in analysis.models for entry in model.skipped
    )
    skipped = (
        f"<details><summary>Scores that could not be computed</summary><ul>{skipped}</ul></details>" if skipped else ""
    )
    return (
        "<p>Score of a parallelogram a : b = c : d: ‖E(a) + E(d) − E(b) − E(c)‖² over the scale; 0 is perfect. Its "
        "mean is over all pairs of pairs of a relation, its interval from resampling pairs. Two models are compared "
        "on disjoint pairs of pairs, which are independent, by a permutation test that exchanges the models; p-values "
        "are corrected for the number of relations by Holm's method, within a variant. Calibration error: 15 bins of "
        "equal width. CKA: debiased. Formulas and sources are in the docstrings of <code>hgpt/interpret/</code>.</p>"
        '<div class="scroll"><table><thead><tr><th>variant</th><th>components</th><th>plane of</th><th>scale of</th>'
        f"<th>words: token</th><th>vectors</th><th>distinct</th>{heads}</tr></thead><tbody>{variants}</tbody>"
        "</table></div>"
        f'<p class="quiet">Settings: {escape(settings)}. Every number is in <a href="{RESULTS}">{RESULTS}</a>, every '
        f"figure as PNG and SVG in <code>{FIGURE_FOLDER}/</code>.</p>{skipped}"
    )


def _variant_cells(model: ModelResult, variant: str) -> str:
    results = model.relations.get(variant)
    if not results:
        return _number(None) + _number(None)
    share = float(np.mean([r.plane_variance for r in results.values()]))
    return _number(mean_over_relations(results), 2) + f'<td class="number">{share:.1%}</td>'
