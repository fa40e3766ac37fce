"""Write text with a trained model, and show the distances behind each token.

    python sample.py runs/quickstart --prompt "The with statement"
    python sample.py runs/quickstart --prompt-file start.txt --num-samples 4 --top-p 0.9
    echo "The with statement" | python sample.py runs/quickstart --prompt - --show-distances

The text goes to standard output, notes to standard error.
"""

import argparse
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hgpt.interpret  # isort: skip  (first: Ctrl-C and a missing package then end it without a traceback)
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from hgpt import cli, decoding
from hgpt.data.tokenizer import encode
from hgpt.errors import UserError
from hgpt.hardware import choose_device, enough_memory
from hgpt.interpret.token_distances import LEGEND, LEGEND_WITH_RADII, distance_table, measure
from hgpt.source import find_source, is_hub_id, load_distance_file

DEFAULT_TEMPERATURE, DEFAULT_TOP_K = 0.8, 200  # as in nanoGPT's sample.py
MOST_NEAREST = 4  # centres that the table shows for each token, unless --nearest says how many


@torch.inference_mode()
def main(arguments: Sequence[str]) -> None:
    """Read the options, load the model, print the text and, if asked for, its distances. Raises UserError."""
    options = parse_arguments(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for characters that the terminal's encoding lacks

    # The prompt first, so that a mistake in it shows before the model is loaded.
    prompt = read_prompt(options)
    device = choose_device(options.device)
    model, tokenizer = load(options)
    with enough_memory(device, "use --device cpu, or try --dtype bfloat16"):
        model.to(device)
    head = model.get_output_embeddings()
    exponent = float(head.exponent) if isinstance(head, hgpt.HarmonicHead) else None
    if options.show_distances and exponent is None:
        raise UserError(
            f"--show-distances needs a model with a harmonic head; {options.checkpoint} has a softmax head, whose "
            "probabilities come from inner products, not distances. Leave the option out"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    note("model", f"{options.checkpoint} ({describe(model, exponent, context)})")
    prompt_ids, new_tokens = fit_context(encode_prompt(tokenizer, prompt, model), options.max_new_tokens, context)

    # Text. All samples are one batch; with --stream the first is printed while it is generated.
    note("sampling", describe_sampling(options, exponent))
    prompt_text = decode(tokenizer, prompt_ids)
    print_prompt(prompt_text, 1, options.num_samples)
    stream = TextStream(tokenizer, prompt_ids) if options.stream else None
    samples = generate(model, prompt_ids, new_tokens, options, stream)
    for number, new_ids in enumerate(samples, start=1):
        if number > 1:
            print()
            print_prompt(prompt_text, number, options.num_samples)
        if number > 1 or stream is None:
            print(decode(tokenizer, new_ids, after=prompt_ids), end="")
        print()
        if options.show_distances:
            tokens = measure(model, prompt_ids, new_ids, options.nearest or MOST_NEAREST)
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() and not options.nearest else None
            print("\n" + distance_table(tokens, tokenizer, exponent, columns))
    if options.show_distances:
        legend = LEGEND if head.log_weight is None else LEGEND_WITH_RADII
        print("\n" + legend.format(exponent=exponent, distance=model.config.distance))


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with all checks that need no model. Raises UserError."""
    parser = cli.Parser("python sample.py", __doc__)
    add = (group := parser.add_argument_group("model")).add_argument
    model: dict[str, Any] = {"metavar": "MODEL", "default": argparse.SUPPRESS}
    either = group.add_mutually_exclusive_group(required=True).add_argument
    either("checkpoint", nargs="?", **model, help="run folder (its latest checkpoint), checkpoint folder, exported "
        "model folder, or the id of a causal language model on the Hugging Face hub")  # fmt: skip
    either("--checkpoint", **model, help="the same")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(default: auto, as saved)")
    add("--distance-file", metavar="FILE", help="a Python file that registers the model's own distance; it is executed")

    group = parser.add_argument_group("prompt", PROMPT_HELP).add_mutually_exclusive_group()
    group.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads it from standard input")
    group.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with the text to continue")

    add = parser.add_argument_group("text").add_argument
    few = cli.checked(int, "lie between 1 and 10000", lambda n: 1 <= n <= 10_000)  # all samples are one batch
    add("--num-samples", type=few, default=1, metavar="N", help="number of texts (default: 1)")
    add("--max-new-tokens", type=cli.at_least_1, default=200, metavar="N", help="longest text (default: 200)")
    add("--seed", type=cli.checked(int, "lie between 0 and 2^63 - 1", lambda n: 0 <= n < 2**63),
        default=secrets.randbelow(2**31), help="seed of the random numbers; the same seed gives the same text on "
        "the same kind of device (default: a random seed, which is printed)")  # fmt: skip
    add("--stream", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(),
        help="print the first sample while it is generated (default: on a terminal)")  # fmt: skip

    group = parser.add_argument_group("sampling", "Applied in this order.")
    add = group.add_mutually_exclusive_group().add_argument
    add("--greedy", action="store_true", help="always the most probable token; the same as --temperature 0")
    # Logits divided by less than 1e-6 leave the range of float32.
    valid = cli.checked(float, "be 0 (greedy) or a number from 1e-06 up", lambda t: t == 0 or 1e-6 <= t < math.inf)
    add("--temperature", type=valid, default=DEFAULT_TEMPERATURE, metavar="T",
        help="divides the logits; a harmonic model samples with the exponent n/T (default: %(default)s)")  # fmt: skip
    add = group.add_argument
    add("--top-k", type=cli.checked(int, "be 0 (all tokens) or more", lambda k: k >= 0), metavar="K",
        help=f"only the K most probable tokens; 0: all (default: {DEFAULT_TOP_K})")  # fmt: skip
    add("--top-p", type=cli.checked(float, "lie in (0, 1]", lambda p: 0 < p <= 1), metavar="P",
        help="only the most probable tokens that together reach P (default: all)")  # fmt: skip
    add("--min-p", type=cli.checked(float, "lie in [0, 1]", lambda p: 0 <= p <= 1), metavar="P",
        help="only tokens with at least P times the probability of the most probable one (default: all)")  # fmt: skip

    add = parser.add_argument_group("distances").add_argument
    add("--show-distances", action="store_true", help="print the distances behind each token (harmonic models only)")
    add("--nearest", type=cli.at_least_1, metavar="K",
        help=f"centres to print for each token (default: {MOST_NEAREST}, fewer on a narrow terminal)")  # fmt: skip
    options = parser.parse_args(arguments)
    check_greedy(options)
    if options.nearest is not None and not options.show_distances:
        raise UserError("--nearest has no effect without --show-distances; add that or leave it out")
    return options


PROMPT_HELP = """Without a prompt the text starts at end-of-text, as documents do, or at a line break. One newline at
the end of a file or of standard input is dropped. If prompt and new tokens exceed the context, only the prompt's last
tokens are used, at least half of the context. The text ends at the end of the context."""


def check_greedy(options: argparse.Namespace) -> None:
    """Set temperature 0 for --greedy; with temperature 0 refuse options that have no effect. Raises UserError."""
    if options.greedy:
        options.temperature = 0.0
    if options.temperature > 0:
        options.top_k = DEFAULT_TOP_K if options.top_k is None else options.top_k
        return
    idle = [option for option in ("top_k", "top_p", "min_p") if getattr(options, option) is not None]
    idle += ["num_samples"] if options.num_samples > 1 else []
    if idle:
        raise UserError(
            f"--{idle[0].replace('_', '-')} has no effect with {'--greedy' if options.greedy else '--temperature 0'}, "
            "which always takes the most probable token and writes one text; leave one out"
        )


def note(subject: str, text: str) -> None:
    print(f"{subject:<9} {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Model


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    load_distance_file(options.distance_file)
    source = find_source(options.checkpoint)
    if is_hub_id(options.checkpoint):
        note("model", f"there is no folder {options.checkpoint} here; looking on the Hugging Face hub")
    model, tokenizer = source.load(options.dtype)
    # A model of the hub has its own sampling defaults: keep only the tokens that end a text.
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    model.generation_config = GenerationConfig(eos_token_id=[end] if isinstance(end, int) else end)
    return model, tokenizer


def describe(model: PreTrainedModel, exponent: float | None, context: int | None) -> str:
    head = "softmax head" if exponent is None else f"harmonic head, {model.config.distance}, n = {exponent:.4g}"
    head += ", learned radii" if exponent is not None and model.config.radius == "learned" else ""
    length = f"context {context}, " if context else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"
    return f"{head}, {size} parameters, {length}{model.device} {str(model.dtype).removeprefix('torch.')}"


# ------------------------------------------------------------------------------------------------------------
# Prompt


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt from the command line, standard input or a file; "" without one."""
    if options.prompt_file is not None:
        source = f"prompt file {options.prompt_file}"
        try:
            content = Path(options.prompt_file).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            raise UserError(f"{source} cannot be read: {getattr(error, 'strerror', error)}") from error
    elif options.prompt == "-":
        source = "the prompt on standard input"
        if sys.stdin.isatty():
            note("prompt", "type it, then press Ctrl-D on a line of its own")
        content = sys.stdin.buffer.read()
    else:
        # Bytes of a command line that are not UTF-8 arrive as lone surrogates.
        source, content = "--prompt", (options.prompt or "").encode("utf-8", "surrogateescape")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8: byte {error.start} is {content[error.start]:#04x}; convert it first, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error
    if source == "--prompt":
        return text
    text = re.sub(r"\r?\n\Z", "", text.removeprefix("\ufeff"))
    if not text:
        raise UserError(f"{source} is empty; leave it out to start at end-of-text")
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, model: PreTrainedModel) -> list[int]:
    """The prompt's tokens; without a prompt beginning-of-text, else end-of-text, else (nanoGPT) a line break."""
    if prompt:
        return encode(tokenizer, prompt, add_special_tokens=model.config.model_type != "hgpt").input_ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.get_vocab().get("\n")):
        if start is not None:
            return [start]
    raise UserError("the tokenizer has no end-of-text token to start from; give a --prompt")


def fit_context(ids: list[int], new: int, context: int | None) -> tuple[list[int], int]:
    """The last tokens of the prompt and the number of new tokens, together at most `context`.

    First the prompt is shortened, to at least half of the context, then the number of new tokens.
    """
    if context is None:
        return ids, new
    kept = min(len(ids), max(context - new, context // 2))
    length = min(new, context - kept)
    if kept < len(ids):
        note("prompt", f"its {len(ids)} tokens and {length} new ones exceed the context of {context}: only its last "
             f"{kept} are used")  # fmt: skip
    if length < new:
        note("length", f"at most {length} new tokens instead of {new}: they and the {kept} of the prompt fill the "
             f"context of {context}")  # fmt: skip
    return ids[-kept:], length


# ------------------------------------------------------------------------------------------------------------
# Text


def describe_sampling(options: argparse.Namespace, exponent: float | None) -> str:
    if options.temperature == 0:
        return "greedy"
    power = "" if exponent is None else f" (exponent n/T = {exponent / options.temperature:.4g})"
    limits = {"top-k": options.top_k or None, "top-p": options.top_p, "min-p": options.min_p}
    shown = [f"{name} {value:g}" for name, value in limits.items() if value is not None]
    return ", ".join([f"temperature {options.temperature:g}{power}", *shown, f"seed {options.seed}"])


def generate(
    model: PreTrainedModel, prompt_ids: list[int], new: int, options: argparse.Namespace, stream: Any = None
) -> list[list[int]]:
    """The new tokens of each sample, at most `new`, up to and including the first end-of-text."""
    end_ids = model.generation_config.eos_token_id or []
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    config = GenerationConfig(
        max_new_tokens=new,
        num_return_sequences=options.num_samples,
        pad_token_id=end_ids[0] if end_ids else 0,
        use_cache=True,
        **({"do_sample": False} if options.temperature == 0 else {"do_sample": True} | sampling),
    )
    prompt = torch.tensor([prompt_ids], device=model.device)
    torch.manual_seed(options.seed)
    with enough_memory(model.device, "lower --num-samples or --max-new-tokens, or try --dtype bfloat16"):
        output = decoding.generate(model, prompt, config, stream)
    rows = output[:, len(prompt_ids) :].tolist()  # padded after end-of-text
    return [row[: 1 + next((i for i, token in enumerate(row) if token in end_ids), len(row))] for row in rows]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], after: Sequence[int] = ()) -> str:
    """The text of `ids` when it follows the tokens `after`, without special tokens."""
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Decoded alone, the first token could lose its leading space.
    before = tokenizer.decode(list(after), **settings) if after else ""
    return tokenizer.decode([*after, *ids], **settings)[len(before) :]


class TextStream(BaseStreamer):
    """Prints the first sample of a batch while it is generated, token by token.

    transformers' TextStreamer accepts one sequence only, and holds text back until the next space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
        self.tokenizer, self.prompt_ids = tokenizer, prompt_ids
        self.ids: list[int] | None = None  # new tokens; None until `generate` has passed the prompt
        self.shown = 0  # characters printed so far

    def put(self, value: torch.Tensor) -> None:
        self.ids = [] if self.ids is None else [*self.ids, int(value[0])]
        self.show(complete=False)

    def end(self) -> None:
        self.show(complete=True)

    def show(self, complete: bool) -> None:
        text = decode(self.tokenizer, self.ids or [], after=self.prompt_ids)
        text = text if complete else text.rstrip("\ufffd")  # a character whose other bytes come later
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def print_prompt(text: str, number: int, num_samples: int) -> None:
    """Print the sample's number, if there are several, and the prompt."""
    if num_samples > 1:
        print(f"--- sample {number} of {num_samples} ---")
    if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        text = f"\033[2m{text}\033[0m"  # dim, so that the model's part stands out
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
