"""The protocol of the files in `measures/`, the results of a report, and the blocks of its sections.

A measure computes something for each model while the model is in memory. Its result appears in up to four places: in
results.json, in the summary, in a section of the page, and in curves over the checkpoints of a run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, ClassVar

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from matplotlib.figure import Figure

from hgpt.interpret.models import LoadedModel, Source
from hgpt.interpret.positions import TextMeasures
from hgpt.interpret.statistics import Estimate
from hgpt.interpret.subject import AnalysisSettings, Subject

# ------------------------------------------------------------------------------------------------------------
# Blocks of a section: HTML, or an object that page/report.html renders

Cell = Estimate | float | str | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Each row is a heading and its cells; numbers are shown with `digits` decimals."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    digits: int = 3


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure. Its files NAME.png and NAME.svg have neither title nor caption; `source` says what was measured."""

    kind: ClassVar[str] = "drawing"
    name: str
    title: str
    caption: str = ""
    source: str = ""
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks folded under a title."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: "Sequence[Block]"
    open: bool = False


Block = Markup | Table | Drawing | Details


def paragraph(text: str, *, quiet: bool = False) -> Markup:
    """A paragraph; `quiet`: in small print."""
    return Markup("<p{}>{}</p>").format(Markup(' class="quiet"' if quiet else ""), text)


def bullets(items: Iterable[str]) -> Markup:
    return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(item) for item in items))


def bold(label: str) -> Markup:
    return Markup("<b>{}</b>").format(label)


def page_data(name: str, value: Any) -> Markup:
    """A value as JSON; the scripts of the page read it with `load(name)`."""
    data = htmlsafe_json_dumps(value, ensure_ascii=False)
    return Markup('<script type="application/json" id="{}">{}</script>').format(name, data)


# ------------------------------------------------------------------------------------------------------------
# Results


@dataclass(kw_only=True)
class ModelResult:
    """The results of a model that is no longer in memory."""

    source: Source
    description: str
    harmonic: bool
    exponent: float | None
    parameters: int
    tied: bool
    vocabulary: frozenset[tuple[str, int]]
    text: TextMeasures | None = None
    found: dict[str, Any] = field(default_factory=dict)  # name of a measure → what its `compute` returned
    checkpoints: list[dict[str, Any]] = field(default_factory=list)  # step, tokens, and what `checkpoint` returned
    skipped: list[str] = field(default_factory=list)  # scores that were not computed, and why

    @classmethod
    def of(cls, model: LoadedModel, vocabulary: frozenset[tuple[str, int]]) -> "ModelResult":
        names = ("source", "description", "harmonic", "exponent", "parameters", "tied")
        return cls(**{name: getattr(model, name) for name in names}, vocabulary=vocabulary)

    @property
    def label(self) -> str:
        return self.source.label


@dataclass(kw_only=True)
class Analysis:
    """The results of all models."""

    settings: AnalysisSettings
    models: list[ModelResult]
    # Measure → label of another model → its comparison with the first model
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: "Sequence[Curve]" = ()  # of all measures
    data: str | None = None
    data_source: str | None = None
    share: float = 1.0  # of the validation text that was read
    notes: list[str] = field(default_factory=list)

    @property
    def evaluated_tokens(self) -> int:
        """Tokens of the first model that was measured on text."""
        return next((len(model.text.positions.loss) for model in self.models if model.text is not None), 0)

    @property
    def part(self) -> str:
        """The part of the validation text that was read."""
        if self.data is None:
            return "no text"
        return f"{'the whole' if self.share == 1 else f'{min(100 * self.share, 99.9):.3g} % of the'} validation text"

    @property
    def measured_on(self) -> str:
        if self.data is None:
            return self.part
        windows = {model.label: model.text.windows for model in self.models if model.text is not None}
        spread = "" if self.share == 1 else ", evenly spread"
        read = f"{tokens_text(self.models)} tokens in {counts_text(windows)} windows{spread}"
        return f"{self.part} ({read}) of {self.data_source}"

    @property
    def skipped(self) -> dict[str, str]:
        """Each score that was not computed, and why → the labels of the models."""
        labels: dict[str, list[str]] = {}
        for model in self.models:
            for entry in model.skipped:
                labels.setdefault(entry, []).append(model.label)
        return {entry: ", ".join(named) for entry, named in labels.items()}

    @property
    def resampled(self) -> str:
        return f"{self.settings.bootstrap:,} resamples"

    @property
    def relations(self) -> str:
        return self.settings.relations or "the relation sets of hgpt"

    def having(self, found: Callable[[ModelResult], object]) -> list[tuple[int, ModelResult]]:
        """The models for which `found` returns something, with their places in the report."""
        return [(index, model) for index, model in enumerate(self.models) if found(model)]


def tokens_text(models: Sequence[ModelResult]) -> str:
    """The number of predicted validation tokens, as `counts_text`."""
    return counts_text({model.label: len(model.text.positions.loss) for model in models if model.text is not None})


def states_text(models: Sequence[ModelResult], most: int | None = None) -> str:
    """The number of sampled hidden states of each model, at most `most`, as `counts_text`."""
    return counts_text({model.label: len(model.text.sample_at[:most]) for model in models if model.text is not None})


def counts_text(counts: Mapping[str, int]) -> str:
    """`8,192` if all labels have the same count, otherwise `8,192 (a, b), 7,900 (c)`; "no" without labels."""
    labels: dict[int, list[str]] = {}
    for label, count in counts.items():
        labels.setdefault(count, []).append(label)
    if len(labels) < 2:
        return f"{next(iter(labels)):,}" if labels else "no"
    return ", ".join(f"{count:,} ({', '.join(named)})" for count, named in labels.items())


def tied(model: ModelResult) -> str:
    """The cell of a number of the centres that equals the input embedding's; "" otherwise."""
    return "tied" if model.tied else ""


# ------------------------------------------------------------------------------------------------------------
# Measures


@dataclass(frozen=True)
class Quantity:
    """One number of a model, for the summary, for hgpt.compare, or for both."""

    label: str  # heading of its row in the summary; "": no row
    value: Callable[[ModelResult], Cell]  # None if it is unknown
    better: str = ""  # "lower", "higher", or "" if neither is
    key: str = ""  # its column in readability.csv of hgpt.compare; "": no column
    axis: str = ""  # its name in the figure of hgpt.compare; "": the label
    # The text of the cell if another row has the same value of the model; "" if none has
    repeats: Callable[[ModelResult], str] = lambda model: ""


@dataclass(frozen=True)
class Curve:
    """A number over training."""

    key: str  # its name in the result of `Measure.checkpoint`
    axis: str  # axis label
    logged: str | None = None  # its name in the evaluations of metrics.jsonl, if runs log it
    log_scale: bool = False  # for quantities that differ by orders of magnitude between heads


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A file in `measures/`. Its constants TITLE, QUANTITIES and CURVES and its functions are the other attributes."""

    name: str  # key in `ModelResult.found` and `Analysis.compared`, and anchor of the section
    group: str = ""  # heading of its rows in the summary; "{part}" is `Analysis.part`
    title: str = ""
    # The result for a model in memory, None if there is none
    compute: Callable[[Subject], Any] = lambda subject: None
    # Numbers of one kept checkpoint, by the keys of `curves`
    checkpoint: Callable[[Subject], dict[str, float]] = lambda subject: {}
    # Comparison of another model with the first, which has the same tokenizer; None if there is none
    compare: Callable[[ModelResult, ModelResult], Any] = lambda first, other: None
    # Entries of a model's object in results.json; objects of one name from several measures are merged
    rows: Callable[[ModelResult], dict[str, Any]] = lambda model: {}
    # Entries of results.json besides "models"
    overall: Callable[[Analysis], dict[str, Any]] = lambda analysis: {}
    # The blocks of the section; no blocks, no section
    section: Callable[[Analysis], Sequence[Block]] = lambda analysis: ()
    quantities: tuple[Quantity, ...] = ()
    curves: tuple[Curve, ...] = ()

    @classmethod
    def of(cls, module: ModuleType, group: str) -> "Measure":
        """The measure in a module of `measures/`."""
        own = {field.name: vars(module)[name] for field in fields(cls) for name in (field.name, field.name.upper())
               if name in vars(module)}  # fmt: skip
        return cls(name=module.__name__.rpartition(".")[2], group=group, **own)
