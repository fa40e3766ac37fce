"""Check a data folder and show its content.

    python -m data_prep.verify data/openwebtext
    python -m data_prep.verify data/openwebtext --decode 3 --split val

The command reads every byte. It checks headers, sizes, checksums, counts, the range of the tokens, and the end-of-text
after each document, and lists all damage (exit status 2 if there is any).
"""

import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from hgpt.cli import Parser, run
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.data.tokenizer import TOKENIZER_FILE
from hgpt.data.verify import decoded_documents, find_damage
from hgpt.errors import UserError

SHOWN_CHARACTERS = 2000  # of a document that is decoded


def verify_folder(folder: Path, vocab_size: int | None = None) -> list[str]:
    """Lines about the content of an undamaged data folder. Raises UserError with a line for each damage."""
    damage: list[str] = []
    lines = []
    if not os.path.isdir(folder):  # False also where permissions hide it
        TokenShards.open(folder, SPLITS[0])  # raises UserError: there is nothing to check
    for split in SPLITS:
        with tqdm(unit="B", unit_scale=True, desc=f"reading {split}", leave=False) as bar:
            damage += find_damage(folder, split, vocab_size, documents=True, on_read=bar.update)
        if damage:
            continue
        shards = TokenShards.open(folder, split, vocab_size)
        line = f"{split:<6}{len(shards):>16,} tokens"
        if shards.meta is None:
            lines.append(f"{line}; no meta.json, so no checksums and no count of documents")
        else:
            meta = shards.meta.splits[split]
            lines.append(f"{line}{meta.documents:>12,} documents{len(meta.shards):>5} shards")
    if damage:
        raise UserError("\n".join([f"{folder} is not whole:", *dict.fromkeys(damage)]))
    return [*lines, f"{folder} is whole"]


def main(arguments: Sequence[str]) -> str:
    parser = Parser("python -m data_prep.verify", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="data folder of data_prep, nanoGPT or llm.c")
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="print the first N documents as text")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split to decode (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, help="size of the vocabulary, for folders without meta.json (nanoGPT, llm.c)"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.decode <= sys.maxsize:
        raise UserError(f"--decode must be at least 0 documents and no more than there can be, not {options.decode}.")
    lines = verify_folder(options.folder, options.vocab_size)
    if not options.decode:
        return "\n".join(lines)
    if not (options.folder / TOKENIZER_FILE).is_file():
        raise UserError(
            f"--decode needs {options.folder / TOKENIZER_FILE}, which data_prep writes and other tools do not."
        )
    for number, text in enumerate(islice(decoded_documents(options.folder, options.split), options.decode)):
        lines.append(f"\n--- {options.split}, document {number}: {len(text):,} characters")
        lines.append(text[:SHOWN_CHARACTERS] + (" ..." if len(text) > SHOWN_CHARACTERS else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, interrupted="interrupted: not everything was read"))
