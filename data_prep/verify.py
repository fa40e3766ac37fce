"""Whether a data folder is whole, and what is in it.

    python -m data_prep.verify data/openwebtext
    python -m data_prep.verify data/openwebtext --decode 3 --split val

re-reads every byte: headers, sizes, checksums, counts, the range of the tokens, end-of-text behind each document.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hgpt.cli import Parser, run
from hgpt.data.shards import SPLITS, TokenShards, find_damage
from hgpt.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from hgpt.errors import UserError

SHOWN_CHARACTERS = 2000  # of a document that is decoded


def verify_folder(folder: Path, vocab_size: int | None = None) -> list[str]:
    """Lines that say what is in a whole data folder. Raises UserError with a line for everything that is damaged."""
    damage: list[str] = []
    lines = []
    for split in SPLITS:
        with tqdm(unit="B", unit_scale=True, desc=f"reading {split}", leave=False) as bar:
            damage += find_damage(folder, split, vocab_size, documents=True, on_read=bar.update)
        if damage:
            continue
        shards = TokenShards.open(folder, split, vocab_size)
        if shards.meta is None:
            lines.append(
                f"{split:<6}{len(shards):>16,} tokens; no meta.json, so no checksums and no count of documents"
            )
        else:
            meta = shards.meta.splits[split]
            lines.append(
                f"{split:<6}{meta.tokens:>16,} tokens{meta.documents:>12,} documents{len(meta.shards):>5} shards"
            )
    if damage:
        raise UserError("\n".join([f"{folder} is damaged:", *dict.fromkeys(damage)]))
    return [*lines, f"{folder} is whole"]


def decoded_documents(folder: Path, split: str) -> Iterator[str]:
    """The documents of a split as text, in order, without their end-of-text. Raises UserError without a tokenizer."""
    shards = TokenShards.open(folder, split)
    tokenizer = load_tokenizer(str(folder))
    held: list[np.ndarray] = []
    for chunk in shards.chunks(1 << 16):
        start = 0
        for end in np.flatnonzero(chunk == shards.end_of_text).tolist():
            yield tokenizer.decode(np.concatenate([*held, chunk[start:end]]))
            held = []
            start = end + 1
        held.append(chunk[start:])


def main(arguments: Sequence[str]) -> None:
    """Print what is in the folder. Raises UserError if it is damaged."""
    parser = Parser(
        prog="python -m data_prep.verify",
        description="Re-read a data folder, check all that can be checked, and say what is damaged (exit status 2).",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="as data_prep writes it, nanoGPT's, or llm.c's")
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="print the first N documents as text")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of --decode (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, help="where no meta.json says it: nanoGPT's folders, llm.c's shards")
    options = parser.parse_args(arguments)
    if options.decode < 0:
        raise UserError(f"--decode must be at least 0 documents, not {options.decode}.")
    for line in verify_folder(options.folder, options.vocab_size):
        print(line)
    if not options.decode:
        return
    if not (options.folder / TOKENIZER_FILE).is_file():
        raise UserError(f"--decode needs {options.folder / TOKENIZER_FILE}, which shards of others do not have.")
    for number, text in enumerate(decoded_documents(options.folder, options.split)):
        if number == options.decode:
            break
        print(f"\n--- {options.split}, document {number}: {len(text):,} characters")
        print(text[:SHOWN_CHARACTERS] + (" ..." if len(text) > SHOWN_CHARACTERS else ""))


if __name__ == "__main__":
    sys.exit(run(main, interrupted="interrupted: not everything was read"))
