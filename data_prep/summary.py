"""The output of a preparation: a progress bar, and tables at the end."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from data_prep.encoding import Counts, Tally
from data_prep.parts import Record
from hgpt.data.shards import SPLITS


class ProgressBar:
    """Documents, tokens, tokens/s, MB/s of text, time left; the rates are those of this run.

    `new`: counts of this run. `earlier`: the tally of the runs before it.
    """

    def __init__(self, documents: int, earlier: Tally) -> None:
        self.new = Counts()
        self._earlier = earlier.both.tokens
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=documents,
            initial=earlier.rows,
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30,  # seconds between lines in a file
            bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} documents{postfix}, {remaining} left",
        )

    def update(self, tally: Tally) -> None:
        self.new.add(tally.both)
        seconds = time.perf_counter() - self._started
        self._bar.set_postfix_str(
            f"{(self._earlier + self.new.tokens) / 1e6:,.1f} M tokens, "
            f"{self.new.tokens / seconds / 1e6:.2f} M tokens/s, {self.new.bytes / seconds / 1e6:.1f} MB/s",
            refresh=False,
        )
        self._bar.update(tally.rows)

    def close(self) -> None:
        self._bar.close()


def summary(parts: Sequence[Record], tally: Tally, missing: str) -> list[str]:
    """Lines for the terminal about what was written. `missing`: the name for documents without text."""
    counts = [*(tally.counts[split] for split in SPLITS), tally.both]
    shards = [sum(len(part.shards[split]) for part in parts) for split in SPLITS]
    rows: list[tuple[str, ...]] = [("", *SPLITS, "both")]
    for name in ("documents", "characters", "tokens"):
        rows.append((name, *(f"{getattr(column, name):,}" for column in counts)))
    rows.append(("characters/token", *(f"{column.characters / max(1, column.tokens):.2f}" for column in counts)))
    rows.append(("shards", *map(str, [*shards, sum(shards)])))
    first = parts[0]
    revision = first.settings["revision"]
    lines = [f"{row[0]:<18}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows] + [
        f"tokenizer         {first.tokenizer}, {first.vocab_size:,} tokens",
        f"source            {first.source}" + (f" at {revision}" if revision else ""),
        f"{missing:<18}{tally.missing:,} documents, left out",
        f"invalid UTF-8     {tally.replaced:,} documents, the invalid bytes replaced by U+FFFD",
    ]
    left_out = [*first.left_out, *tally.bad]
    if left_out:
        lines.append(f"could not be read {len(left_out):,}:")
        lines += [f"  {message}" for message in left_out[:10]] + (["  ..."] if len(left_out) > 10 else [])
    return lines + length_table(tally)


def length_table(tally: Tally) -> list[str]:
    """The distribution of document lengths: for each power of two the documents and their share of all tokens."""
    documents, tokens = sum(tally.length_documents), max(1, sum(tally.length_tokens))
    if not documents:
        return []
    shown = [length for length, number in enumerate(tally.length_documents) if number]
    widest = max(tally.length_documents)
    lines = ["", "length in tokens       documents    share   of all tokens"]
    for length in range(shown[0], shown[-1] + 1):
        low, high = (1 << length - 1, (1 << length) - 1) if length else (0, 0)
        number = tally.length_documents[length]
        lines.append(
            f"{f'{low:,} to {high:,}' if low < high else f'{low}':>20}{number:>12,}{number / documents:>9.1%}"
            f"{tally.length_tokens[length] / tokens:>10.1%}   {'#' * round(30 * number / widest)}".rstrip()
        )
    mean = sum(tally.length_tokens) / documents
    return [*lines, f"mean {mean:,.0f}, longest {tally.longest:,} tokens", ""]
