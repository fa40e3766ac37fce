"""Write text with a trained model, and show the distances behind each token.

    python sample.py --checkpoint runs/quickstart --prompt "The with statement"
    python sample.py --checkpoint runs/quickstart --prompt-file start.txt --num-samples 4 --top-p 0.9
    echo "The with statement" | python sample.py --checkpoint runs/quickstart --prompt - --show-distances

Text goes to standard output, everything said about it to standard error.
"""

import argparse
import math
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.utils.logging
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.generation import BaseStreamer

import hgpt
from hgpt.cli import Parser, run
from hgpt.errors import UserError
from hgpt.model.distances import load_distances
from hgpt.run.checkpoint import model_folder

DEFAULT_TEMPERATURE = 0.8  # this and the next as in nanoGPT's sample.py
DEFAULT_TOP_K = 200
DEFAULT_NEAREST = 4
# Below, logits divided by the temperature leave float32's range.
SMALLEST_TEMPERATURE = 1e-6
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKEN_WIDTH = 16  # columns of the terminal that a token takes at most in the table

LEGEND = """\
p        HarMax probability of the token under the model itself: exponent n = {exponent:.4g}, temperature 1,
         nothing cut off, whatever the text was sampled with
d/d_min  {distance} distance of the hidden state to the token's centre over that to the nearest centre,
         (p_max / p)^(1/n); the scale d_min is not in the probabilities
rank     1 where the token's own centre is the nearest"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    sample(parse_arguments(argv))


@torch.inference_mode()
def sample(options: argparse.Namespace) -> None:
    """From the command line to the printed text."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model writes any character, a terminal may not know it

    # Model, tokenizer, prompt
    prompt = read_prompt(options)
    device = resolve_device(options.device)
    register_own_distances(options.distance_file)
    model, tokenizer = load(options.checkpoint, device, options.dtype)
    head = model.get_output_embeddings()
    exponent = float(head.exponent) if isinstance(head, hgpt.HarmonicHead) else None
    if options.show_distances and exponent is None:
        raise UserError(
            f"--show-distances needs a model with a harmonic head; {options.checkpoint} has a softmax head, whose "
            "logits are inner products, so that no distances stand behind its probabilities. Leave the option out."
        )
    note(f"model     {describe(model, options.checkpoint, exponent)}")

    prompt_ids = encode_prompt(tokenizer, prompt, model.config.model_type)
    context = getattr(model.config, "max_position_embeddings", None)
    kept, new_tokens = fit_context(len(prompt_ids), options.max_new_tokens, context)
    if kept < len(prompt_ids):
        note(
            f"prompt    its {len(prompt_ids)} tokens and {new_tokens} new ones exceed the context of {context}: "
            f"only its last {kept} are used"
        )
        prompt_ids = prompt_ids[-kept:]
    if new_tokens < options.max_new_tokens:
        note(
            f"length    at most {new_tokens} new tokens instead of {options.max_new_tokens}: they and the prompt's "
            f"{kept} fill the context of {context}"
        )

    # Text
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    note(f"sampling  {describe_sampling(options, exponent, seed)}")
    prompt_text = decode(tokenizer, prompt_ids)
    print_opening(prompt_text, 1, options.num_samples)
    stream = TextStream(tokenizer, prompt_ids) if options.stream else None
    samples = generate(model, prompt_ids, new_tokens, options, seed, stream)

    for number, new_ids in enumerate(samples, start=1):
        if number > 1:
            print()
            print_opening(prompt_text, number, options.num_samples)
        if number > 1 or stream is None:
            print(decode(tokenizer, new_ids, after=prompt_ids), end="")
        print()
        if options.show_distances:
            positions = measure(model, prompt_ids, new_ids, options.nearest)
            print("\n" + distance_table(positions, tokenizer, exponent))
    if options.show_distances:
        print("\n" + LEGEND.format(exponent=exponent, distance=model.config.distance))


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked as far as that is possible without the model."""
    parser = Parser(
        prog="python sample.py",
        description="Write text with a trained model. Text goes to standard output, notes to standard error.",
        epilog="The seed is named on standard error; the same command with that --seed writes the same text, on the "
        "same kind of device.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run folder (its latest checkpoint), checkpoint folder, exported model folder, or the id of a causal "
        "language model on the Hugging Face hub",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as they were saved)")
    add("--distance-file", metavar="FILE", help="a Python file that registers the model's own distance; it is executed")

    add = parser.add_argument_group(
        "prompt",
        "Without one the text starts at end-of-text, as documents do. One newline at the end of a file or of "
        "standard input is dropped. Prompt and new tokens share the model's context: where they do not fit, the "
        "prompt's last tokens are kept, as many as leave room for the new ones but at least half of the context, "
        "and the text ends where the context ends; a note says so.",
    ).add_argument
    add("--prompt", metavar="TEXT", help="text to continue; - reads it from standard input")
    add("--prompt-file", metavar="FILE", help="a UTF-8 file with the text to continue")

    add = parser.add_argument_group("text").add_argument
    add("--num-samples", type=int, default=1, metavar="N", help="texts, written as one batch (default: 1)")
    add("--max-new-tokens", type=int, default=200, metavar="N", help="length of each at most (default: 200)")
    add("--seed", type=int, help="of the random numbers (default: another one each time, printed)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print tokens as they come; of several samples the first (default: on a terminal)",
    )

    add = parser.add_argument_group("sampling", "Applied in this order.").add_argument
    add("--greedy", action="store_true", help="always the most probable token; the same as --temperature 0")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help=f"divides the logits; a harmonic model samples with the exponent n/T (default: {DEFAULT_TEMPERATURE})",
    )
    add(
        "--top-k",
        type=int,
        metavar="K",
        help=f"only the K most probable tokens; 0: all (default: {DEFAULT_TOP_K})",
    )
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="only the most probable tokens that together reach P, 0 < P <= 1 (default: all)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens with at least P times the probability of the most probable one, 0 <= P <= 1 (default: all)",
    )

    add = parser.add_argument_group("geometry").add_argument
    add(
        "--show-distances",
        action="store_true",
        help="print for each generated token its HarMax probability and the nearest centres with their distance "
        "ratios d_i/d_min (harmonic models only); both are the model's own: temperature 1, nothing cut off",
    )
    add("--nearest", type=int, metavar="K", help=f"centres to print for each token (default: {DEFAULT_NEAREST})")

    options = parser.parse_args(argv)
    check(options)
    if options.greedy:
        options.temperature = 0.0
    if options.temperature is None:
        options.temperature = DEFAULT_TEMPERATURE
    if options.top_k is None and options.temperature > 0:
        options.top_k = DEFAULT_TOP_K
    if options.nearest is None:
        options.nearest = DEFAULT_NEAREST
    if options.stream is None:
        options.stream = sys.stdout.isatty()
    return options


def check(options: argparse.Namespace) -> None:
    """Raises UserError for a value out of range and for a setting that could not take effect."""
    temperature = options.temperature
    for option, value, valid, rule in (
        ("--num-samples", options.num_samples, lambda n: n >= 1, "be at least 1"),
        ("--max-new-tokens", options.max_new_tokens, lambda n: n >= 1, "be at least 1"),
        ("--seed", options.seed, lambda n: 0 <= n < 2**63, "lie between 0 and 2^63 - 1"),
        (
            "--temperature",
            temperature,
            lambda t: t == 0 or SMALLEST_TEMPERATURE <= t < math.inf,
            f"be 0 (greedy) or a number from {SMALLEST_TEMPERATURE:g} up",
        ),
        ("--top-k", options.top_k, lambda k: k >= 0, "be 0 (all tokens) or more"),
        ("--top-p", options.top_p, lambda p: 0 < p <= 1, "lie in (0, 1]"),
        ("--min-p", options.min_p, lambda p: 0 <= p <= 1, "lie in [0, 1]"),
        ("--nearest", options.nearest, lambda k: k >= 1, "be at least 1"),
    ):
        if value is not None and not valid(value):
            raise UserError(f"{option} must {rule}; got {value}")
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt-file exclude each other; leave one out")
    if options.nearest is not None and not options.show_distances:
        raise UserError("--nearest has no effect without --show-distances; add that or leave it out")
    if options.greedy and temperature:
        raise UserError(f"--greedy is temperature 0, so --temperature {temperature:g} has no effect; leave one out")
    if options.greedy or temperature == 0:
        cause = "--greedy" if options.greedy else "--temperature 0"
        for option in ("top_k", "top_p", "min_p"):
            if getattr(options, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} has no effect with {cause}, which always takes the most "
                    "probable token; leave one out"
                )
        if options.num_samples > 1:
            raise UserError(f"--num-samples {options.num_samples} with {cause} would write the same text each time")


def describe_sampling(options: argparse.Namespace, exponent: float | None, seed: int) -> str:
    if options.temperature == 0:
        return "greedy"
    parts = [f"temperature {options.temperature:g}"]
    if exponent is not None and options.temperature != 1:
        parts[0] += f" (exponent n/T = {exponent / options.temperature:.4g})"
    parts += [f"top-k {options.top_k}"] if options.top_k else []
    parts += [f"top-p {options.top_p:g}"] if options.top_p is not None else []
    parts += [f"min-p {options.min_p:g}"] if options.min_p is not None else []
    return ", ".join([*parts, f"seed {seed}"])


# ------------------------------------------------------------------------------------------------------------
# Prompt


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt as given, from standard input or from a file; "" for none."""
    if options.prompt_file is not None:
        source = f"prompt file {options.prompt_file}"
        try:
            content = Path(options.prompt_file).read_bytes()
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}") from error
    elif options.prompt == "-":
        source = "the prompt on standard input"
        if sys.stdin.isatty():
            note("prompt    type it, then press Ctrl-D on a line of its own")
        content = sys.stdin.buffer.read()
    else:
        # Bytes of a command line that are no UTF-8 arrive as lone surrogates.
        source, content = "--prompt", (options.prompt or "").encode("utf-8", "surrogateescape")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not UTF-8: byte {error.start} is {content[error.start]:#04x}; convert it first, for "
            "example with iconv -f latin1 -t utf-8"
        ) from error
    if source == "--prompt":
        return text
    text = re.sub(r"\r?\n\Z", "", text.removeprefix("\ufeff"))
    if not text:
        raise UserError(f"{source} is empty; leave it out to start at end-of-text")
    return text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, model_type: str) -> list[int]:
    """Tokens of the prompt; end-of-text alone for an empty one, the start of every training document."""
    if prompt:
        # What hgpt trains on has no special tokens around a text, whatever its tokenizer would add.
        return tokenizer(prompt, add_special_tokens=model_type != "hgpt").input_ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise UserError("the tokenizer has no end-of-text token to start from; give a --prompt")
    return [start]


def fit_context(prompt_tokens: int, new_tokens: int, context: int | None) -> tuple[int, int]:
    """(tokens of the prompt to keep, tokens to generate), which together fit into the context.

    New tokens may push out the beginning of a prompt, but never so much that less than half of the context is
    left to it; beyond that they are cut.
    """
    if context is None:
        return prompt_tokens, new_tokens
    kept = min(prompt_tokens, max(context - new_tokens, context // 2))
    return kept, min(new_tokens, context - kept)


# ------------------------------------------------------------------------------------------------------------
# Model


def load(checkpoint: str, device: torch.device, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on `device`, stripped of sampling defaults, and the tokenizer saved beside it.

    Raises UserError when there is none, when a weight is missing, and when the two do not belong together.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    if is_hub_id(checkpoint):
        source = checkpoint
        note(f"model     there is no folder {checkpoint} here; looking on the Hugging Face hub")
    else:
        source = str(model_folder(checkpoint))
    try:
        # The code beside an exported model is what `import hgpt` has registered already.
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"no model can be loaded from {source}: {first_line(error)}") from error
    if loading["missing_keys"]:
        raise UserError(
            f"the weights in {source} are incomplete, without {', '.join(sorted(loading['missing_keys']))}; "
            "copy or export the model again"
        )

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise no_tokenizer(source) from error
    if tokenizer.vocab_size == 0:  # some classes start empty where they find no file
        raise no_tokenizer(source)
    tokens, vocab_size = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    # Only hgpt keeps padding out of vocab_size; other models count rows of padding that no token belongs to.
    if tokens > vocab_size or (tokens < vocab_size and model.config.model_type == "hgpt"):
        raise UserError(
            f"the tokenizer in {source} has {tokens} tokens, but the model's vocab_size is {vocab_size}: they do "
            "not belong together. Put the tokenizer that the model was trained with (tokenizer.json of its data "
            "folder) beside the model"
        )

    # A hub model brings sampling defaults of its own, of which only the tokens that end a text shall count.
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    model.generation_config = GenerationConfig(eos_token_id=[end] if isinstance(end, int) else end)
    return model.to(device), tokenizer


def register_own_distances(file: str | None) -> None:
    if file is not None:
        try:
            load_distances(file)
        except ValueError as error:
            raise UserError(f"--distance-file: {error}") from error


def no_tokenizer(source: str) -> UserError:
    return UserError(
        f"no tokenizer can be loaded from {source}; put the tokenizer.json and tokenizer_config.json that the "
        "model was trained with beside its config.json"
    )


def is_hub_id(checkpoint: str) -> bool:
    """Whether this can only be a name on the hub: of the form owner/name or name, and no path on this machine."""
    owner = checkpoint.split("/")[0]
    named_like_one = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", checkpoint) is not None
    # runs/ is where train.py writes: a mistyped run must not become the download of a stranger's model.
    return named_like_one and owner != "runs" and not Path(owner).exists()


def resolve_device(device: str | None) -> torch.device:
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        # Naming a device succeeds without it; taking memory there does not.
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {first_line(error)}") from error


def describe(model: PreTrainedModel, checkpoint: str, exponent: float | None) -> str:
    head = "softmax" if exponent is None else f"harmonic ({model.config.distance}), n = {exponent:.4g}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e6:.3g}M" if parameters < 1e9 else f"{parameters / 1e9:.3g}B"
    dtype = str(model.dtype).removeprefix("torch.")
    context = getattr(model.config, "max_position_embeddings", None)
    parts = [head, f"{size} parameters", *([f"context {context}"] if context else []), f"{model.device} {dtype}"]
    return f"{checkpoint} ({', '.join(parts)})"


def first_line(error: BaseException) -> str:
    """The beginning of a message that may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------------------------------
# Text


def generate(
    model: PreTrainedModel,
    prompt_ids: list[int],
    new_tokens: int,
    options: argparse.Namespace,
    seed: int,
    stream: "TextStream | None" = None,
) -> list[list[int]]:
    """New tokens of each sample, up to and with its first end-of-text."""
    end_ids = model.generation_config.eos_token_id or []
    if options.temperature == 0:
        warpers: dict[str, Any] = {"do_sample": False}
    else:
        warpers = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
        }
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        num_return_sequences=options.num_samples,
        pad_token_id=end_ids[0] if end_ids else 0,
        use_cache=True,
        **warpers,
    )
    prompt = torch.tensor([prompt_ids], device=model.device)
    torch.manual_seed(seed)
    try:
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=stream
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{model.device} ran out of memory with --num-samples {options.num_samples} of up to {new_tokens} "
            "tokens; lower one of them, or try --dtype bfloat16"
        ) from error
    return [through_end(row, end_ids) for row in output[:, len(prompt_ids) :].tolist()]


def through_end(ids: list[int], end_ids: Iterable[int]) -> list[int]:
    """`ids` up to and with the first that is in `end_ids`; what follows is padding of the batch."""
    stop = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: stop + 1]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], after: Sequence[int] = ()) -> str:
    """Text of `ids`, without special tokens; `after`: as it reads behind these tokens, which are not shown."""
    settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Decoded alone, a token may lose the space that it begins with.
    head = tokenizer.decode(list(after), **settings) if after else ""
    return tokenizer.decode([*after, *ids], **settings)[len(head) :]


class TextStream(BaseStreamer):
    """Prints the first sample of a batch while it is generated, a token at a time.

    transformers' TextStreamer takes one sequence only and holds text back until the next space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.ids: list[int] | None = None  # None until the prompt has come by
        self.shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids.append(int(value[0]))
        self.show(self.text().rstrip("\ufffd"))  # the end of a character whose other bytes are still to come

    def end(self) -> None:
        self.show(self.text())

    def text(self) -> str:
        # After end-of-text come more of the same as padding, which decode skips.
        return decode(self.tokenizer, self.ids or [], after=self.prompt_ids)

    def show(self, text: str) -> None:
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def print_opening(prompt_text: str, number: int, num_samples: int) -> None:
    """What stands before the new text: a line with the sample's number if there are several, and the prompt."""
    if num_samples > 1:
        print(f"--- sample {number} of {num_samples} ---")
    if prompt_text and colour(sys.stdout):
        prompt_text = f"\033[2m{prompt_text}\033[0m"  # dim: the model's part stands out
    print(prompt_text, end="", flush=True)


def colour(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Distances


@dataclass(frozen=True, kw_only=True)
class TokenDistances:
    """A generated token as the hidden state before it sees the centres.

    `probability` is HarMax's, `ratio` is d/d_min of the token's centre, `rank` the number of centres that are
    nearer plus one, `nearest` pairs of token and d/d_min, the nearest first.
    """

    token: int
    probability: float
    ratio: float
    rank: int
    nearest: list[tuple[int, float]]


@torch.inference_mode()
def measure(model: PreTrainedModel, prompt_ids: list[int], new_ids: list[int], nearest: int) -> list[TokenDistances]:
    """Probability, d_i/d_min = (p_max/p_i)^(1/n) and the `nearest` centres for each of `new_ids`.

    One more pass over the finished text: of the same logits that sampling saw it keeps those of one sample only,
    and never the warped ones.
    """
    ids = torch.tensor([prompt_ids + new_ids[:-1]], device=model.device)
    logits = model(ids, use_cache=False, logits_to_keep=len(new_ids)).logits[0]  # (T, V): −n log d
    log_probs = logits.log_softmax(-1)
    ratios = hgpt.relative_distances(log_probs, model.get_output_embeddings().exponent)
    chosen = torch.tensor(new_ids, device=model.device)[:, None]  # (T, 1)
    own = log_probs.gather(1, chosen)
    ranks = 1 + (log_probs > own).sum(-1)
    near_ratios, near_tokens = ratios.topk(min(nearest, ratios.shape[-1]), largest=False)  # (T, nearest)
    return [
        TokenDistances(
            token=token, probability=probability, ratio=ratio, rank=rank, nearest=list(zip(*near, strict=True))
        )
        for token, probability, ratio, rank, *near in zip(
            new_ids,
            own.exp().squeeze(1).tolist(),
            ratios.gather(1, chosen).squeeze(1).tolist(),
            ranks.tolist(),
            near_tokens.tolist(),
            near_ratios.tolist(),
            strict=True,
        )
    ]


def distance_table(positions: Sequence[TokenDistances], tokenizer: PreTrainedTokenizerBase, exponent: float) -> str:
    """A line for each token, columns aligned."""
    # Decimals that tell two centres apart whose probabilities differ by a few percent.
    decimals = max(3, 1 + math.ceil(math.log10(exponent)))
    head = ["", "token", "p", "d/d_min", "rank", "nearest centres and their d/d_min"]
    rows = []
    for number, position in enumerate(positions, start=1):
        p = position.probability
        row = [
            str(number),
            visible(tokenizer, position.token),
            f"{p:.4f}" if p >= 1e-3 else f"{p:.0e}",
            f"{position.ratio:.{decimals}f}",
            str(position.rank),
        ]
        for token, ratio in position.nearest:
            row += [visible(tokenizer, token), f"{ratio:.{decimals}f}"]
        rows.append(row)
    # The last heading stands over all the columns of neighbours and widens none of them.
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    widths[:5] = [max(width(title), fitted) for title, fitted in zip(head[:5], widths[:5], strict=True)]
    lines = []
    for row in [head, *rows]:
        line = ""
        for column, cell in enumerate(row):
            padding = " " * (widths[column] - width(cell))
            is_token = column == 1 or (column >= 5 and column % 2 == 1)
            # A ratio belongs to the token before it, a token stands off from what is before.
            gap = "" if column == 0 else " " if column > 5 and not is_token else "  "
            line += gap + (cell + padding if is_token else padding + cell)
        lines.append(line.rstrip())
    return "\n".join(lines)


def visible(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token on one line: spaces as ␣, runs of a character counted, control characters and broken UTF-8 escaped."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" in text:  # a piece of a character: its bytes, where the vocabulary is written in GPT-2's way
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        piece = tokenizer.convert_ids_to_tokens(token)
        if all(character in byte_of for character in piece):
            text = bytes(byte_of[character] for character in piece).decode("utf-8", "backslashreplace")
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    text = re.sub(r"(.)\1{4,}", lambda run: f"{run[1]}×{len(run[0])}", text).replace(" ", "␣")
    if width(text) <= TOKEN_WIDTH:
        return text
    while width(text) >= TOKEN_WIDTH:
        text = text[:-1]
    return text + "…"


def width(text: str) -> int:
    """Columns of a terminal that `text` takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


if __name__ == "__main__":
    sys.exit(run(main))
