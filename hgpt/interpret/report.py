"""A report: every measure of every model as one self-contained page, as JSON, and as figures in PNG and SVG."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from tqdm import tqdm

from hgpt.durable import read_json
from hgpt.errors import UserError
from hgpt.hardware import choose_device
from hgpt.interpret.corpus import data_of_runs, open_text
from hgpt.interpret.drawing import STYLE, headings, inline_svg, save_figure, swatch
from hgpt.interpret.measure import Analysis, Block, Cell, Details, Drawing, ModelResult, Quantity
from hgpt.interpret.measures import MEASURES
from hgpt.interpret.models import LoadedModel, find_sources, loaded, outlines, run_checkpoints
from hgpt.interpret.relations import load_relations
from hgpt.interpret.statistics import Estimate
from hgpt.interpret.subject import HIDDEN_SAMPLE, AnalysisSettings, Subject, Task

PAGE, RESULTS, FIGURE_FOLDER = "index.html", "results.json", "figures"
SCRIPTS = ("data.js", "tokens.js", "map.js", "explorer.js", "reading.js")  # a later one uses earlier ones
ARROWS = {"lower": "\N{NO-BREAK SPACE}↓", "higher": "\N{NO-BREAK SPACE}↑", "": ""}
Section = tuple[str, str, Sequence[Block]]  # name, title, blocks


def analyse(paths: list[str], settings: AnalysisSettings, *, checkpoints: bool = True) -> Analysis:
    """Every measure of every model in `paths`, and the comparisons of each with the first.

    One model is in memory at a time. Raises UserError for bad input.
    """
    sources = find_sources(paths)
    relations = load_relations(settings.relations)
    device = choose_device(settings.device)
    known = outlines(sources)
    data = settings.data or data_of_runs(sources)
    notes: list[str] = []
    text = None if data is None else open_text(data, known, settings.tokens, HIDDEN_SAMPLE, notes)
    if text is None:
        notes.append(
            "No --data was given and no run names its data folder, so nothing was measured on text: no loss, "
            "calibration, hidden states or contexts."
        )
    analysis = Analysis(
        settings=settings,
        models=[],
        curves=[curve for measure in MEASURES for curve in measure.curves],
        data=None if text is None else str(text.corpus.val.folder),
        data_source=None if text is None else text.corpus.source,
        share=1.0 if text is None else text.share,
        notes=notes,
    )
    task = Task(settings=settings, relations=relations, text=text)
    for outline in tqdm(known, desc="models", unit="model", disable=None):
        with loaded(outline.source, device) as model:
            result, fits = _measured(model, outline.words, task, notes)
        if checkpoints:
            result.checkpoints = _over_checkpoints(result, task.for_checkpoints(fits), device)
        analysis.models.append(result)
    for other in analysis.models[1:]:
        _compare(analysis, other)
    return analysis


def _measured(
    model: LoadedModel, vocabulary: frozenset[tuple[str, int]], task: Task, notes: list[str]
) -> tuple[ModelResult, bool]:
    """The results of one model, and whether the data has its tokens."""
    subject = Subject(model, task)
    result = ModelResult.of(model, vocabulary)
    for measure in MEASURES:
        found = measure.compute(subject)
        if found is not None:
            result.found[measure.name] = found
    result.text = None if subject.read is None else subject.read.measures
    result.skipped = subject.skipped
    notes += [note for note in subject.notes if note not in notes]
    return result, subject.read is not None and subject.read.fits


def _over_checkpoints(result: ModelResult, task: Task, device: torch.device) -> list[dict[str, Any]]:
    """A row per kept checkpoint; no rows if the run kept only one."""
    kept = run_checkpoints(result.source)
    rows = []
    for source in tqdm(kept, desc=f"{result.label}: checkpoints", disable=None, leave=False) if len(kept) > 1 else ():
        row: dict[str, Any] = {"step": source.step, "tokens": source.tokens_seen}
        with loaded(source, device) as model:
            subject = Subject(model, task)
            for measure in MEASURES:
                row |= measure.checkpoint(subject)
        rows.append(row)
    return rows


def _compare(analysis: Analysis, other: ModelResult) -> None:
    first = analysis.models[0]
    if first.vocabulary != other.vocabulary:
        analysis.notes.append(
            f"{other.label} and {first.label} have different tokenizers: their words are different tokens, so no test "
            "compares their parallelograms, and no CKA their hidden states."
        )
        return
    for measure in MEASURES:
        found = measure.compare(first, other)
        if found is not None:
            analysis.compared.setdefault(measure.name, {})[other.label] = found


def restricted(analysis: Analysis, models: int) -> Analysis:
    """The analysis of the first `models` models."""
    kept = {model.label for model in analysis.models[:models]}
    compared = {
        name: {label: entry for label, entry in found.items() if label in kept}
        for name, found in analysis.compared.items()
    }
    return replace(analysis, models=analysis.models[:models], compared=compared)


def _compared() -> list[Quantity]:
    return [quantity for measure in MEASURES for quantity in measure.quantities if quantity.key]


READABILITY = {quantity.key: quantity.axis or quantity.label for quantity in _compared()}  # key → axis label


def readability(model: ModelResult) -> dict[str, float | None]:
    """The value of each key of `READABILITY`, None if it is unknown."""
    values: dict[str, Any] = {quantity.key: quantity.value(model) for quantity in _compared()}
    return {key: value.value if isinstance(value, Estimate) else value for key, value in values.items()}


def earlier_figures(folder: Path) -> list[str] | None:
    """The names of the figures of the report in `folder`; None without a report. Raises UserError for other files."""
    if not any((folder / name).exists() for name in (PAGE, RESULTS)):
        return None
    way_out = f"{folder} holds an {PAGE} or a {RESULTS} that is not of a report: choose another folder."
    try:
        found = read_json(folder / RESULTS, way_out)
        if isinstance(found, dict) and {"settings", "models"} <= found.keys():
            return [Path(str(name)).name for name in found.get("figures") or ()]
    except FileNotFoundError:
        pass
    raise UserError(way_out)


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write index.html, results.json and figures/ into `folder`; returns the page.

    Figures of an earlier report in the folder that this one does not have are deleted.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = earlier_figures(folder) or []
        sections = page_sections(analysis)
        images = {}
        for drawing in drawings(block for _, _, blocks in sections for block in blocks):
            file = save_figure(drawing.figure, folder / FIGURE_FOLDER, drawing.name)
            images[drawing.name] = inline_svg(file.with_suffix(".svg"), drawing.title)
        for name in earlier:
            for kind in ("png", "svg") if name not in images else ():
                (folder / FIGURE_FOLDER / f"{name}.{kind}").unlink(missing_ok=True)
        results = json.dumps(_plain(to_json(analysis) | {"figures": list(images)}), indent=1, ensure_ascii=False)
        (folder / RESULTS).write_text(results, encoding="utf-8")
        (folder / PAGE).write_text(page(analysis, sections, images), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}; choose another folder") from error
    return folder / PAGE


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The content of results.json."""
    whole: dict[str, Any] = {
        "settings": analysis.settings,
        "data": {
            "folder": analysis.data,
            "source": analysis.data_source,
            "evaluated_tokens": analysis.evaluated_tokens,
            "windows": next((model.text.windows for model in analysis.models if model.text is not None), 0),
        },
        "notes": analysis.notes,
        "models": [_model_json(model) for model in analysis.models],
    }
    for measure in MEASURES:
        whole |= measure.overall(analysis)
    return whole


def _model_json(model: ModelResult) -> dict[str, Any]:
    whole = {name: getattr(model.source, name) for name in ("label", "folder", "step", "tokens_seen")}
    whole |= {"head": model.description}
    whole |= {name: getattr(model, name) for name in ("exponent", "parameters", "skipped")}
    for measure in MEASURES:
        for key, entry in measure.rows(model).items():
            whole[key] = whole.get(key, {}) | entry if isinstance(entry, dict) else entry
    return whole


def _plain(value: Any) -> Any:
    """As JSON: dataclasses as objects, arrays as lists, null for nan and infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value if not isinstance(value, float) or np.isfinite(value) else None


def page_sections(analysis: Analysis) -> list[Section]:
    """The sections of all measures that have blocks."""
    with matplotlib.rc_context(STYLE):
        sections = [(measure.name, measure.title, measure.section(analysis)) for measure in MEASURES]
    return [section for section in sections if section[2]]


def drawings(blocks: Iterable[Block]) -> list[Drawing]:
    """Every figure among the blocks, also folded ones."""
    found = []
    for block in blocks:
        found += [block] if isinstance(block, Drawing) else drawings(block.blocks) if isinstance(block, Details) else []
    return found


def page(analysis: Analysis, sections: Sequence[Section], images: Mapping[str, str]) -> str:
    """The page; it contains style, script, data and images (name → SVG)."""
    folder = resources.files("hgpt.interpret") / "page"
    text = {name: (folder / name).read_text(encoding="utf-8") for name in ("report.html", "style.css", *SCRIPTS)}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(text["report.html"]).render(
        analysis=analysis,
        sections=sections,
        images=images,
        style=Markup(text["style.css"]),
        script=Markup("".join(text[name] for name in SCRIPTS)),
        headings=headings(analysis.models),
        swatch=swatch,
        summary=summary(analysis),
        settings=", ".join(f"{key} = {value}" for key, value in asdict(analysis.settings).items()),
        page=PAGE,
        results=RESULTS,
        figures=FIGURE_FOLDER,
    )


def summary(analysis: Analysis) -> dict[str, list[tuple[str, list[Cell]]]]:
    """Heading → a row per quantity that at least one model has, unless it repeats another row for all models."""
    groups: dict[str, list[tuple[str, list[Cell]]]] = {}
    for measure in MEASURES:
        for quantity in measure.quantities:
            found = [(quantity.repeats(model), quantity.value(model)) for model in analysis.models]
            if quantity.label and any(value is not None and not repeated for repeated, value in found):
                cells = [repeated or value for repeated, value in found]
                row = (quantity.label + ARROWS[quantity.better], cells)
                groups.setdefault(measure.group.format(part=analysis.part), []).append(row)
    return groups
