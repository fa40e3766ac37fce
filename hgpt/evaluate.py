"""Evaluate models on a whole text: loss, perplexity, bits per byte, accuracy, calibration.

    python -m hgpt.evaluate RUN_OR_MODEL… --data data/openwebtext
    python -m hgpt.evaluate RUN_OR_MODEL… --text book.txt letters.txt

A model is a run folder (its latest checkpoint), a checkpoint, an export, or any causal language model of transformers
(folder or id). Nothing is sampled: every token is predicted once, without label smoothing.

--data reads the validation split as training does: one stream of tokens, in windows end to end, so the loss is the
run's validation loss. A model with another tokenizer reads the same text in its own tokens. --text reads each file as
one document after end-of-text; its last window is filled up with the tokens before it, whose loss counts once. This is
the rolling log-likelihood of lm-evaluation-harness.

    loss              −(1/N) Σ log p(token), in nats per token, over N tokens
    perplexity        exp(loss)
    bits/byte         −Σ log₂ p(token) / bytes of the UTF-8 of these tokens; compares models with different tokenizers
    accuracy, top-5   share of tokens that were the most probable, or among the five most probable
    ECE               expected calibration error over 15 bins of confidence (arXiv:1706.04599, eq. 3)
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hgpt.interpret  # noqa: F401  # isort: skip  (first: it names the extra that brings a missing package)
import torch
from torch import Tensor
from tqdm import tqdm

from hgpt.cli import Parser, aligned, at_least_1, run, shown
from hgpt.data.baselines import bytes_per_target
from hgpt.data.tokenizer import TOKENIZER_FILE, encode
from hgpt.errors import UserError
from hgpt.hardware import choose_device, enough_memory
from hgpt.interpret.corpus import Corpus, data_of_runs
from hgpt.interpret.measures.calibration import expected_calibration_error
from hgpt.interpret.models import WORKING_BYTES, find_sources
from hgpt.interpret.positions import CHUNK, log_probability_measures
from hgpt.source import Source, load_distance_file

LONGEST, UNKNOWN_CONTEXT = 4096, 1024  # tokens of a window, unless --seq-len says otherwise
TOKENS = 2048  # of one forward pass
MEASURES = ("loss", "confidence", "correct", "top5")
COLUMNS = ("loss", "perplexity", "bits_per_byte", "accuracy", "top5_accuracy", "calibration_error")
Batch = tuple[np.ndarray, np.ndarray, int]  # inputs and targets, (B, T); number of first targets that do not count


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens of a text; all but the first are predicted.

    `bytes`: UTF-8 size of the predicted tokens' text; None if unknown. `document`: whether the last window is filled up
    with the tokens before it.
    """

    tokens: np.ndarray
    bytes: float | None
    document: bool = False

    def batches(self, seq_len: int) -> Iterator[Batch]:
        """Windows of `seq_len` tokens, end to end, and a last one that may be shorter."""
        targets = len(self.tokens) - 1
        whole = targets // seq_len * seq_len
        step = max(1, TOKENS // seq_len) * seq_len
        for start in range(0, whole, step):
            part = self.tokens[start : min(start + step, whole) + 1]
            yield part[:-1].reshape(-1, seq_len), part[1:].reshape(-1, seq_len), 0
        if whole < targets:
            start = max(0, targets - seq_len) if self.document else whole
            part = self.tokens[start:]
            yield part[None, :-1], part[None, 1:], whole - start


class Reader:
    """A model that predicts text: `tokenizer` is None if none is saved with it."""

    # Any: transformers' annotations name every kind of model and tokenizer at once.
    def __init__(self, source: Source, seq_len: int | None, device: torch.device) -> None:
        self.source, self.label = source, source.label
        self.tokenizer: Any = None
        self.unknown = 0  # unknown tokens in the encoded texts
        config = source.load_config()
        if _has_tokenizer(source):
            model, self.tokenizer = source.load(torch.float32, WORKING_BYTES)
        else:
            model = source.load_model(torch.float32, WORKING_BYTES)
        self.model = model.to(device).eval()
        self.device, self.vocab_size = device, int(config.vocab_size)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        if seq_len is not None and context is not None and seq_len > context:
            raise UserError(f"--seq-len {seq_len} is more than the context of {self.label}, {context} tokens")
        self.seq_len = seq_len or min(context or UNKNOWN_CONTEXT, LONGEST)
        self._check_causal()

    def _check_causal(self) -> None:
        """Raise UserError if the model sees the tokens that it predicts, as BERT does."""
        first, second = (self.logits(np.array([[0, token]]))[0, 0] for token in (0, 1))
        if not torch.equal(first, second):
            raise UserError(f"{self.label} is no causal language model: its predictions depend on later tokens")

    @torch.inference_mode()
    def logits(self, inputs: np.ndarray) -> Tensor:
        """Logits of tokens (B, T), → (B, T, V)."""
        logits: Tensor = self.model(torch.from_numpy(inputs.astype(np.int64)).to(self.device), use_cache=False).logits
        return logits

    def encode(self, text: str) -> tuple[np.ndarray, int | None]:
        """The tokens of a text, without special ones, and the first one's size in bytes, or None."""
        offsets = self.tokenizer.is_fast
        settings = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": offsets}
        found = encode(self.tokenizer, text, **settings)
        ids = np.array(found.input_ids, dtype=np.int64)
        if self.tokenizer.unk_token_id != self.tokenizer.eos_token_id:
            self.unknown += int((ids == self.tokenizer.unk_token_id).sum())
        first = len(text[: found.offset_mapping[0][1]].encode()) if offsets and len(ids) else None
        return ids, first

    def stream(self, texts: Sequence[str], *, document: bool) -> Stream:
        """The texts of a data folder as one stream, each followed by end-of-text; or one `document`, preceded by it.

        The first token of a data folder is not predicted; that of a document is, if the model has an end-of-text.
        """
        end = self.tokenizer.eos_token_id
        prefix = end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        before, after = (prefix, None) if document else (None, end)
        ids: list[np.ndarray] = [] if before is None else [np.array([before])]
        size: int | None = sum(len(text.encode()) for text in texts)
        for number, text in enumerate(texts):
            tokens, first = self.encode(text)
            if number == 0 and before is None:
                size = None if size is None or first is None else size - first
            ids += [tokens] if after is None else [tokens, np.array([after])]
        return Stream(tokens=np.concatenate(ids) if ids else np.array([]), bytes=size, document=document)

    def measure(self, streams: Sequence[Stream]) -> dict[str, Any]:
        """The row of the table: `COLUMNS`, tokens, bytes and window."""
        total = sum(len(stream.tokens) - 1 for stream in streams)
        found: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
        with tqdm(total=total, desc=self.label, unit="token", unit_scale=True, disable=None, leave=False) as bar:
            for inputs, targets, skip in (batch for stream in streams for batch in stream.batches(self.seq_len)):
                logits = self.logits(inputs).flatten(0, 1)[skip:]
                wanted = torch.from_numpy(targets.astype(np.int64)).flatten()[skip:].to(self.device)
                for start in range(0, len(wanted), CHUNK):
                    part = slice(start, start + CHUNK)
                    measured = log_probability_measures(logits[part].float(), wanted[part])
                    for name in MEASURES:
                        found[name].append(measured[name].cpu().numpy())
                bar.update(len(wanted))
        losses, confidence, correct, top5 = (np.concatenate(found[name]) for name in MEASURES)
        loss, sizes = float(losses.mean(dtype=np.float64)), [stream.bytes for stream in streams]
        if not math.isfinite(loss):
            raise UserError(f"the loss of {self.label} is {loss}: its weights are damaged, or it predicts p = 0")
        size = None if None in sizes else sum(value for value in sizes if value is not None)
        return {
            "model": self.label,
            "folder": self.source.folder,
            "step": self.source.step,
            "tokens": total,
            "bytes": None if size is None else round(size),
            "window": self.seq_len,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": loss * total / (math.log(2) * size) if size else None,
            "accuracy": float(correct.mean(dtype=np.float64)),
            "top5_accuracy": float(top5.mean(dtype=np.float64)),
            "calibration_error": expected_calibration_error(confidence, correct),
        }


def _has_tokenizer(source: Source) -> bool:
    """False only for a local folder without a tokenizer, as of a run on nanoGPT's tokens."""
    folder = Path(source.folder)
    return not folder.is_dir() or any(folder.glob("*token*")) or any(folder.glob("vocab*"))


# --------------------------------------------------------------------------------------------------------------
# Text


def streams_of_data(reader: Reader, corpus: Corpus, notes: list[str]) -> list[Stream]:
    """The validation split in the model's tokens. Raises UserError if they cannot be determined."""
    val, folder, label, tokenizer = corpus.val, corpus.val.folder, reader.label, reader.tokenizer
    tokens = val.read(0, len(val))
    words = None if tokenizer is None else frozenset(tokenizer.get_vocab().items())
    if val.vocab_size == reader.vocab_size if words is None else corpus.has_tokens_of(words, reader.vocab_size):
        if words is None or corpus.vocabulary is None:
            notes.append(f"{label} and {folder} are assumed to have the same tokens: one of them has no tokenizer")
        backend = tokenizer.backend_tokenizer if tokenizer is not None and tokenizer.is_fast else None
        mean = bytes_per_target(val, backend)
        return [Stream(tokens=tokens, bytes=None if mean is None else mean * (len(val) - 1))]
    if corpus.tokenizer is None or tokenizer is None:
        raise UserError(
            f"{label} predicts {reader.vocab_size:,} tokens, and {folder} has a vocabulary of {val.vocab_size:,}: with "
            f"the {TOKENIZER_FILE} of both beside them the text is encoded again. Or use --text"
        )
    notes.append(
        f"{label} has another tokenizer than {folder}: it read the same text in its own tokens. Compare bits per byte, "
        "not losses and accuracies"
    )
    ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
    documents = [part[part != corpus.tokenizer.end_of_text] for part in np.split(tokens, ends + 1)]
    texts = [corpus.tokenizer.decode(part) for part in documents if len(part)]
    stream = reader.stream(texts, document=False)
    if len(stream.tokens) < 2:
        raise UserError(f"{folder}: its val split holds no token that {label} could predict; prepare a longer one")
    return [stream]


def streams_of_files(reader: Reader, files: Sequence[str]) -> list[Stream]:
    """Each file as a document. Raises UserError for a file that is no text or has nothing to predict."""
    if reader.tokenizer is None:
        raise UserError(f"{reader.label} has no tokenizer to read a text with; name its data folder with --data")
    found = []
    for file in files:
        try:
            text = Path(file).read_bytes().decode()
        except (OSError, ValueError) as error:
            raise UserError(f"--text {file} cannot be read as UTF-8: {error}") from error
        stream = reader.stream([text], document=True)
        if len(stream.tokens) < 2:
            raise UserError(f"--text {file} holds no token that {reader.label} could predict; name a longer text")
        found.append(stream)
    return found


def open_corpus(options: argparse.Namespace, sources: Sequence[Source]) -> Corpus | None:
    """The data that the models are evaluated on; None for --text."""
    if options.text is not None:
        return None
    folder = options.data or data_of_runs(sources)
    if folder is None:
        raise UserError("name a text to evaluate on: --data DIR, a data folder, or --text FILE…")
    sizes = sorted({int(source.load_config().vocab_size) for source in sources})
    return Corpus.open(folder, vocab_sizes=sizes)


# --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model."""
    forms = (".4f", ",.2f", ".4f", ".1%", ".1%", ".4f")
    lines = [["model", "tokens", "window", "loss", "perplexity", "bits/byte", "accuracy", "top-5", "ECE"]]
    for row in rows:
        cells = [shown(row[name], form) for name, form in zip(COLUMNS, forms, strict=True)]
        lines.append([row["model"], f"{row['tokens']:,}", f"{row['window']:,}", *cells])
    return "\n".join(aligned(lines))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m hgpt.evaluate", __doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN_OR_MODEL", help="run folder, checkpoint, export, or a model of transformers")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--data", metavar="DIR", help="data folder (default: the one that the first run was trained on)")
    text.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 texts, each a document")
    add("--seq-len", type=at_least_1, metavar="N", help=f"tokens of a window (default: the context, up to {LONGEST})")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--distance-file", metavar="FILE", help="a Python file that registers a model's own distance; it is executed")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> str:
    """The table, or JSON. Raises UserError."""
    options = parse_arguments(argv)
    load_distance_file(options.distance_file)
    device, sources = choose_device(options.device), find_sources(options.models)
    corpus = open_corpus(options, sources)
    rows, notes = [], list[str]()
    for source in sources:
        with enough_memory(device, f"{source.folder} needs more; lower --seq-len, or use --device cpu"):
            reader = Reader(source, options.seq_len, device)
            if corpus is None:
                streams = streams_of_files(reader, options.text)
            else:
                streams = streams_of_data(reader, corpus, notes)
            rows.append(reader.measure(streams))
        if reader.unknown:
            notes.append(
                f"{reader.label} has no tokens for parts of the text, which became {reader.unknown:,} unknown tokens: "
                "its bits per byte are too low to be compared"
            )
    if corpus is None and len({row["tokens"] for row in rows}) > 1:
        notes.append("the models have different tokenizers: compare bits per byte, not losses and accuracies")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if options.json:
        origin = options.text if corpus is None else str(corpus.val.folder)
        return json.dumps({"text": origin, "models": rows, "notes": notes}, indent=1)
    text = " ".join(options.text) if corpus is None else f"the validation split of {corpus.val.folder}"
    about = "loss: nats per token. window: tokens read at a time. ECE: expected calibration error."
    return f"{table(rows)}\n\nOn {text}. {about}"


if __name__ == "__main__":
    sys.exit(run(main))
