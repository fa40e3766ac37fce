"""How many word pairs of each relation a tokenizer can represent; all scores of relations use these pairs."""

from hgpt.interpret.measure import Analysis, Block, Details, ModelResult, Table, bold, paragraph
from hgpt.interpret.relations import SMALLEST_RELATION, TokenPairs, WordForm, distinct
from hgpt.interpret.subject import Subject

TITLE = "Word pairs"
# Heading → which token represents a word, and whether equal pairs of tokens count once.
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
    tables: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}  # one for all models with the same tokenizer
    for model in analysis.models:
        table = tuple((name, tuple(map(_used, forms))) for name, forms in of(model).items())
        tables.setdefault(table, []).append(model.label)
    blocks: list[Block] = []
    for table, labels in tables.items():
        blocks += [paragraph(bold(", ".join(labels))), Table(head=["relation", *FORMS], rows=table)]
    return [
        paragraph(
            "A pair is left out if a word contains the tokenizer's unknown token. Some variants of the score also "
            "leave out words of several tokens, or repeated pairs of tokens. A relation with fewer than "
            f"{SMALLEST_RELATION} pairs is not scored."
        ),
        Details(title="Number of pairs used, by relation", blocks=blocks),
    ]


def _used(pairs: TokenPairs) -> str:
    used = len(pairs.words)
    return f"{used} of {used + pairs.dropped}" if used >= SMALLEST_RELATION else f"under {SMALLEST_RELATION}"
