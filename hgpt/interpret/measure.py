"""What a measure is, and what a report holds: the one protocol of all files in `measures/`.

A measure computes something of each model while that is in memory. What it found is shown in up to four ways: as JSON,
as rows of the summary, as a section of the page with tables and figures, and as curves over the checkpoints of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from hgpt.interpret.blocks import Block, Cell
from hgpt.interpret.models import LoadedModel, Source
from hgpt.interpret.positions import TextMeasures
from hgpt.interpret.subject import AnalysisSettings, Subject


@dataclass(kw_only=True)
class ModelResult:
    """What is kept of a model when it is no longer in memory.

    Attributes:
        found: the name of a measure → what its `compute` returned.
        checkpoints: for each checkpoint that the run kept, step, tokens and what the measures say of it.
        skipped: which scores could not be computed, and why.
    """

    source: Source
    description: str
    harmonic: bool
    exponent: float | None
    parameters: int
    tied: bool
    vocabulary: frozenset[tuple[str, int]]
    text: TextMeasures | None = None
    found: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: LoadedModel, vocabulary: frozenset[tuple[str, int]]) -> "ModelResult":
        names = ("source", "description", "harmonic", "exponent", "parameters", "tied")
        return cls(**{name: getattr(model, name) for name in names}, vocabulary=vocabulary)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def provenance(self) -> str:
        step = "" if self.source.step is None else f", step {self.source.step:,}"
        seen = "" if self.source.tokens_seen is None else f", {self.source.tokens_seen / 1e6:.3g} M tokens seen"
        return f"{self.label}: {self.description}{step}{seen}"


@dataclass(kw_only=True)
class Analysis:
    """The results of all models.

    Attributes:
        compared: measure → label of another model → its comparison with the first.
        curves: of all measures, for what is drawn over training.
    """

    settings: AnalysisSettings
    models: list[ModelResult]
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: "Sequence[Curve]" = ()
    data: str | None = None
    data_source: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def evaluated_tokens(self) -> int:
        """Of the first model that was measured on text."""
        return next(iter(tokens_read(self.models).values()), 0)

    @property
    def windows(self) -> int:
        return next((model.text.windows for model in self.models if model.text is not None), 0)

    @property
    def measured_on(self) -> str:
        if self.data is None:
            return "no text"
        windows = {model.label: model.text.windows for model in self.models if model.text is not None}
        tokens = counts_text(tokens_read(self.models))
        return f"{tokens} validation tokens in {counts_text(windows)} windows of {self.data_source}"

    @property
    def resampled(self) -> str:
        return f"{self.settings.bootstrap:,} resamples"

    @property
    def relations(self) -> str:
        return self.settings.relations or "the relation sets that ship with hgpt"

    def having(self, found: Callable[[ModelResult], object]) -> list[tuple[int, ModelResult]]:
        """The models of which `found` finds something, and their places in the report."""
        return [(index, model) for index, model in enumerate(self.models) if found(model)]


def tokens_read(models: Sequence[ModelResult]) -> dict[str, int]:
    """How many validation tokens each of the models predicted that were measured on text."""
    return {model.label: len(model.text.positions.loss) for model in models if model.text is not None}


def states_sampled(models: Sequence[ModelResult]) -> dict[str, int]:
    """How many hidden states were kept of each of the models that were measured on text."""
    return {model.label: len(model.text.sample_at) for model in models if model.text is not None}


def counts_text(counts: Mapping[str, int]) -> str:
    """`8,192` where all labels have the same count, otherwise `8,192 (a, b), 7,900 (c)`; "no" without any."""
    labels: dict[int, list[str]] = {}
    for label, count in counts.items():
        labels.setdefault(count, []).append(label)
    if len(labels) < 2:
        return f"{next(iter(labels)):,}" if labels else "no"
    return ", ".join(f"{count:,} ({', '.join(named)})" for count, named in labels.items())


@dataclass(frozen=True)
class Quantity:
    """One number of a model, in the summary, in hgpt.compare, or in both.

    Attributes:
        label: heading of its row in the summary; "" for none.
        value: the number; None where it is not known.
        better: "lower", "higher", or "" where neither is.
        key: its column in hgpt.compare's readability.csv; "" for none.
        axis: what hgpt.compare's figure calls it; "" for the label.
    """

    label: str
    value: Callable[[ModelResult], Cell]
    better: str = ""
    key: str = ""
    axis: str = ""


@dataclass(frozen=True)
class Curve:
    """A number that is drawn over training.

    Attributes:
        key: its name in what `Measure.checkpoint` returns.
        axis: axis label.
        logged: its name in the evaluations of metrics.jsonl, where the run logs it.
        on_text: whether it is an average over text.
        log_scale: for quantities that differ by orders of magnitude between heads.
    """

    key: str
    axis: str
    logged: str | None = None
    on_text: bool = False
    log_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure; whatever it does not have may be left out.

    A file in `measures/` is a measure: its name is `name`, its constants TITLE, QUANTITIES and CURVES and its functions
    are the other attributes.

    Attributes:
        name: key of `ModelResult.found` and `Analysis.compared`, and anchor of its section.
        title: heading of its section.
        compute: what is found of a model in memory; None where nothing can be.
        checkpoint: numbers of one kept checkpoint, by the keys of `curves`.
        compare: another model against the first, with the same tokenizer, neither in memory; None where nothing can be.
        rows: entries of a model's object in results.json, in which dataclasses and arrays may be. Objects of one name
            from several measures are merged.
        overall: entries of results.json beside "models".
        files: further files beside the page, by name, as text.
        section: the blocks of its section; none for no section.
    """

    name: str
    title: str = ""
    compute: Callable[[Subject], Any] = lambda subject: None
    checkpoint: Callable[[Subject], dict[str, float]] = lambda subject: {}
    compare: Callable[[ModelResult, ModelResult], Any] = lambda first, other: None
    rows: Callable[[ModelResult], dict[str, Any]] = lambda model: {}
    overall: Callable[[Analysis], dict[str, Any]] = lambda analysis: {}
    files: Callable[[Analysis], dict[str, str]] = lambda analysis: {}
    section: Callable[[Analysis], Sequence[Block]] = lambda analysis: ()
    quantities: tuple[Quantity, ...] = ()
    curves: tuple[Curve, ...] = ()

    @classmethod
    def of(cls, module: ModuleType) -> "Measure":
        """The measure that a file in `measures/` is."""
        own = {field.name: vars(module)[name] for field in fields(cls) for name in (field.name, field.name.upper())
               if name in vars(module)}  # fmt: skip
        return cls(name=module.__name__.rpartition(".")[2], **own)
