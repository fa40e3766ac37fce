"""Which pairs of words of each relation a tokenizer can express: what every score of relations is made of."""

from hgpt.interpret.blocks import Block, Details, Prose, Table, bold, paragraph
from hgpt.interpret.measure import Analysis, ModelResult
from hgpt.interpret.relations import SMALLEST_RELATION, TokenPairs, WordForm, distinct
from hgpt.interpret.subject import Subject

TITLE = "Pairs of words"
# Heading → which token stands for a word, and whether each pair of tokens counts once.
FORMS: dict[str, tuple[WordForm, bool]] = {
    "last token of each word": ("last", False),
    "words of one token": ("single", False),
    "words of one token after a space": ("single_after_space", False),
    "last tokens, each pair of tokens once": ("last", True),
}


def of(model: ModelResult) -> dict[str, list[TokenPairs]]:
    """Relation → its pairs in each of `FORMS`."""
    return model.found.get("pairs", {})


def compute(subject: Subject) -> dict[str, list[TokenPairs]]:
    found: dict[str, list[TokenPairs]] = {relation.name: [] for relation in subject.relations}
    for form, once in FORMS.values():
        for name, pairs in subject.pairs(form).items():
            found[name].append(distinct(pairs) if once else pairs)
    return found


def section(analysis: Analysis) -> list[Block]:
    tables: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}  # models with one tokenizer share a table
    for model in analysis.models:
        table = tuple((name, tuple(map(_used, forms))) for name, forms in of(model).items())
        tables.setdefault(table, []).append(model.label)
    blocks: list[Block] = []
    for table, labels in tables.items():
        blocks += [paragraph(bold(", ".join(labels))), Table(head=["relation", *FORMS], rows=table)]
    missing = [
        f"{model.label}, {name}: {', '.join(f'{a} – {b}' for a, b in pairs)}"
        for model in analysis.models
        for name in of(model)
        if (pairs := _pairs_of_others(analysis, model, name))
    ]
    if missing:
        blocks += [paragraph("Pairs that another model here can use and this one cannot:"), Prose(items=missing)]
    return [
        paragraph(
            "A pair is left out where the tokenizer does not know one of its words, where a variant wants words of one "
            "token and they are more, and where a variant wants each pair of tokens once. A relation with under "
            f"{SMALLEST_RELATION} pairs is not scored."
        ),
        Details(title="Pairs used of each relation", blocks=blocks),
    ]


def _used(pairs: TokenPairs) -> str:
    used = len(pairs.words)
    return f"{used} of {used + pairs.dropped}" if used >= SMALLEST_RELATION else f"under {SMALLEST_RELATION}"


def _pairs_of_others(analysis: Analysis, model: ModelResult, name: str) -> list[tuple[str, str]]:
    """The pairs that other models use of a relation, as last tokens, and `model` does not."""
    used = dict.fromkeys(pair for other in analysis.models for pair in of(other)[name][0].words)
    return [pair for pair in used if pair not in set(of(model)[name][0].words)]
