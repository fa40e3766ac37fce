"""sample.py: what it measures, what it prints, and what it says to bad input."""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small_models
import torch
from transformers import AutoTokenizer, GenerationConfig

import hgpt
import sample
from hgpt import cli
from hgpt.interpret.token_distances import TokenDistances, distance_table, measure, visible, width

ROOT = Path(__file__).parent.parent
CONTEXT = 48
VOCAB = 301  # not a multiple of 64: the model has rows of padding
PROMPT = "The with statement é"
END = VOCAB - 1  # end-of-text


def export(folder: Path, head: str = "harmonic", **settings) -> Path:
    return small_models.export(folder, small_models.byte_pairs(VOCAB), head, context=CONTEXT, **settings)


@pytest.fixture(scope="module")
def harmonic(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("harmonic"))


@pytest.fixture(scope="module")
def loaded(harmonic: Path) -> tuple[hgpt.HGPTForCausalLM, AutoTokenizer]:
    return sample.load(options(str(harmonic)))


@pytest.fixture
def write(capsys) -> Callable[..., str]:
    """The text that a command line writes; `write.notes` is what it said on standard error."""

    def run(folder: Path, *argv: str) -> str:
        capsys.readouterr()
        sample.main(["--checkpoint", str(folder), "--device", "cpu", *argv])
        text, run.notes = capsys.readouterr()
        return text

    return run


@pytest.fixture
def complaint(capsys) -> Callable[..., str]:
    """The error of a command line, which must be one line with status 2, and no text."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert cli.run(sample.main, argv) == 2
        text, notes = capsys.readouterr()
        (line,) = [line for line in notes.splitlines() if not re.match("(model|prompt|sampling|length) ", line)]
        assert text == "" and line.startswith("error: ")
        return line

    return run


def options(checkpoint: str, *argv: str) -> argparse.Namespace:
    return sample.parse_arguments(["--checkpoint", checkpoint, *argv])


def generate(model: hgpt.HGPTForCausalLM, prompt_ids: list[int], new: int, *argv: str) -> list[list[int]]:
    return sample.generate(model, prompt_ids, new, options("any", *argv))


def float64_distances(model: hgpt.HGPTForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0]
        return torch.cdist(hidden.double(), model.lm_head.weight[:VOCAB].double())  # (T, V)


# ------------------------------------------------------------------------------------------------------- Distances


@pytest.mark.parametrize("radius", ["none", "learned"])
def test_measured_distances_are_those_of_hidden_states_and_centres(tmp_path, write, radius) -> None:
    """In float64: d of each token, with radii ρ and d / ρ too, which have their columns."""
    free = {"radius": "learned", "final_norm": "none"} if radius == "learned" else {}
    folder = export(tmp_path, **free)
    model, tokenizer = hgpt.HGPTForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    n, a = model.config.exponent, model.lm_head.log_weight
    radii = torch.ones(VOCAB) if a is None else (a.detach().double()[:VOCAB] / n).exp()
    prompt_ids, new_ids = tokenizer(PROMPT).input_ids, [5, 299, 17, 123]
    distances = float64_distances(model, prompt_ids + new_ids)[len(prompt_ids) - 1 : -1]
    positions = measure(model, prompt_ids, new_ids, nearest=10_000)
    assert [position.token for position in positions] == new_ids
    for token, position, d in zip(new_ids, positions, distances, strict=True):
        scaled = d / radii
        order, p = scaled.sort(), torch.softmax(-n * scaled.log(), dim=-1)
        assert position.probability == pytest.approx(p[token].item(), rel=1e-4)
        assert position.ratio == pytest.approx((d[token] / d.min()).item(), rel=1e-5)
        assert position.rank == 1 + (scaled < scaled[token]).sum().item()
        assert [ratio for _, ratio in position.nearest] == pytest.approx(
            (order.values / scaled.min()).tolist(), rel=1e-5
        )
        assert [token for token, _ in position.nearest[:6]] == order.indices[:6].tolist()
        if free:
            assert position.radius == pytest.approx((radii[token] / radii.max()).item(), rel=1e-4)
            assert position.scaled == pytest.approx((scaled[token] / scaled.min()).item(), rel=1e-4)
    if free:
        head, row, *_ = distance_table(positions, tokenizer, n).splitlines()
        assert head.split()[:6] == ["token", "p", "d/d_min", "ρ/ρ_max", "d/ρ", "rank"]
        assert row.split()[3:6] == [f"{v:.3f}" for v in (positions[0].ratio, positions[0].radius, positions[0].scaled)]
        out = write(folder, "--prompt", PROMPT, "--max-new-tokens", "3", "--show-distances")
        assert "\nρ/ρ_max  " in out and "learned radii" in write.notes


def test_the_table_of_measured_values_is_printed_below_the_text(loaded, harmonic: Path, write) -> None:
    """Measured at temperature 1, whatever the temperature of the sampling."""
    model, tokenizer = loaded
    argv = ("--prompt", PROMPT, "--max-new-tokens", "12", "--seed", "5", "--temperature", "3", "--top-p", "0.9")
    text = write(harmonic, *argv)
    out = write(harmonic, *argv, "--show-distances", "--nearest", "3")
    prompt_ids = tokenizer(PROMPT).input_ids
    (new_ids,) = generate(model, prompt_ids, 12, *argv)
    table = distance_table(measure(model, prompt_ids, new_ids, nearest=3), tokenizer, model.config.exponent)
    assert out.startswith(text) and "temperature 1" in out and table in out
    assert len(table.splitlines()) == 1 + 12


def test_columns_of_the_table(loaded) -> None:
    """They are aligned and fit the terminal; the decimals of the ratio follow the exponent."""
    model, tokenizer = loaded
    positions = measure(model, tokenizer(PROMPT).input_ids, list(range(0, VOCAB, 15)), nearest=4)
    head, *rows = distance_table(positions, tokenizer, model.config.exponent).splitlines()
    (whole,) = {width(row) for row in rows}
    end = width(head[: head.index("d/d_min") + len("d/d_min")])
    assert all(row[end - 4] == "." for row in rows if width(row) == len(row))
    for columns, centres in ((whole, 4), (whole - 1, 3), (45, 0)):
        _, *rows = distance_table(positions, tokenizer, model.config.exponent, columns).splitlines()
        assert max(map(width, rows)) <= columns
        assert len(re.findall(r" \d+\.\d{3}(?= |$)", rows[0])) == 1 + centres
    position = TokenDistances(token=5, probability=0.25, ratio=1.0123456, rank=2, nearest=[(6, 1.0)])
    for exponent, decimals in ((11.3, 3), (110.9, 4), (1536.0, 5)):
        _, row = distance_table([position], tokenizer, exponent).splitlines()
        number, shown, probability, ratio, rank, *_ = row.split()
        assert (number, shown, rank) == ("1", visible(tokenizer, 5), "2")
        assert float(probability) == 0.25 and ratio == f"{1.0123456:.{decimals}f}"


def test_tokens_are_visible(loaded) -> None:
    class Vocabulary:
        pieces = (" the", "\n", "\t", " " * 12, "-" * 20, "<|endoftext|>", "日本", "antidisestablishmentarianism")

        def decode(self, ids: list[int], **_: object) -> str:
            return self.pieces[ids[0]]

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.pieces[token]

    shown = [visible(Vocabulary(), i) for i in range(len(Vocabulary.pieces))]
    assert shown == ["␣the", r"\n", r"\t", "␣×12", "-×20", "<|endoftext|>", "日本", "antidisestablis…"]
    assert width("日本") == 4
    assert [visible(loaded[1], token) for token in loaded[1]("é").input_ids] == [r"\xc3", r"\xa9"]


# ------------------------------------------------------------------------------------------------------------ Text


def test_same_seed_same_text_and_the_printed_seed_repeats_it(harmonic: Path, write) -> None:
    argv = ("--prompt", PROMPT, "--max-new-tokens", "12")
    first = write(harmonic, *argv)
    seed = re.search(r"seed (\d+)", write.notes)[1]
    assert write(harmonic, *argv, "--seed", seed) == first
    assert write(harmonic, *argv, "--seed", str(int(seed) + 1)) != first


@pytest.mark.parametrize("samples", [1, 3])
def test_streaming_prints_the_same_text_and_several_samples_are_several_texts(harmonic: Path, write, samples) -> None:
    # Long enough that the untrained model writes broken characters and, in some rows, end-of-text.
    argv = ("--prompt", PROMPT, "--num-samples", str(samples), "--seed", "4", "--temperature", "1.5", "--top-k", "0")
    plain = write(harmonic, *argv, "--no-stream")
    assert "\ufffd" in plain
    assert write(harmonic, *argv, "--stream") == plain
    texts = re.split(r"^--- sample \d of 3 ---\n", plain, flags=re.MULTILINE)[samples > 1 :]
    assert len(set(texts)) == samples
    assert all(text.startswith(PROMPT) for text in texts)


def test_stream_holds_back_a_character_that_is_not_complete(loaded, capsys) -> None:
    tokenizer = loaded[1]
    prompt_ids, (first, second) = tokenizer("caf").input_ids, tokenizer("é").input_ids
    stream = sample.TextStream(tokenizer, prompt_ids)
    shown = []
    for value in ([prompt_ids, prompt_ids], [first, 1], [second, 2]):
        stream.put(torch.tensor(value))
        shown.append(capsys.readouterr().out)
    stream.end()
    assert shown == ["", "", "é"] and capsys.readouterr().out == ""


def test_temperature_0_and_cuts_to_one_token_are_greedy(loaded, harmonic: Path, write) -> None:
    texts = [generate(loaded[0], [17, 4], 10, *argv.split()) for argv in (
        "--greedy", "--temperature 0", "--top-k 1", "--min-p 1", "--top-p 1e-9",
    )]  # fmt: skip
    assert all(text == texts[0] for text in texts)
    write(harmonic, "--prompt", PROMPT, "--max-new-tokens", "1", "--greedy")
    assert "sampling  greedy" in write.notes


@pytest.mark.parametrize(
    ("argv", "temperature", "kept"),
    [
        ("--temperature 0.3 --top-k 0", 0.3, lambda p: VOCAB),
        ("--temperature 1 --top-k 7", 1, lambda p: 7),
        ("--temperature 1 --top-k 0 --top-p 0.3", 1, lambda p: int((p.cumsum(0) < 0.3).sum()) + 1),
        ("--temperature 1 --min-p 0.05", 1, lambda p: int((p >= 0.05 * p[0]).sum())),
    ],
)
def test_sampling_is_from_the_most_probable_with_the_exponent_n_over_t(loaded, monkeypatch, argv, temperature, kept):
    model, tokenizer = loaded
    prompt_ids, drawn, draw = tokenizer(PROMPT).input_ids, [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, **kw: (drawn.append(p), draw(p, **kw))[1])
    generate(model, prompt_ids, 1, *argv.split())
    p = hgpt.harmax(float64_distances(model, prompt_ids)[-1].square(), model.config.exponent / temperature)
    order = p.sort(descending=True)
    count = kept(order.values)
    assert 1 < count < VOCAB or temperature != 1
    p[order.indices[count:]] = 0
    torch.testing.assert_close(drawn[0][0].double(), p / p.sum(), rtol=1e-4, atol=1e-9)


def test_padding_is_never_sampled_and_a_text_stops_at_its_first_end_of_text(loaded) -> None:
    model, tokenizer = loaded
    rows = generate(model, [END], 40, "--temperature", "1e6", "--top-k", "0", "--num-samples", "64", "--seed", "0")
    assert model.lm_head.weight.shape[0] > VOCAB
    assert max(token for row in rows for token in row) < VOCAB
    assert {len(row) for row in rows} != {40}  # some met end-of-text, and end with it
    assert all(row.index(END) == len(row) - 1 for row in rows if END in row)
    assert sample.decode(tokenizer, [*tokenizer(" b").input_ids, END], after=tokenizer("a").input_ids) == " b"


def test_a_gpt2_folder_works_and_its_sampling_defaults_do_not_leak(tmp_path: Path, write) -> None:
    export(tmp_path, "gpt2", rows=VOCAB + 19)  # of padding, as many models on the hub have
    GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=END).save_pretrained(tmp_path)
    argv = ("--prompt", "The ", "--max-new-tokens", "12")
    assert write(tmp_path, *argv, "--seed", "1") != write(tmp_path, *argv, "--seed", "2")
    assert "softmax" in write.notes and "n/T" not in write.notes


# ---------------------------------------------------------------------------------------------------------- Prompt


def test_prompt_from_option_file_and_standard_input(tmp_path: Path, monkeypatch) -> None:
    assert sample.read_prompt(options("any", "--prompt", PROMPT)) == PROMPT
    assert sample.read_prompt(options("any")) == ""
    for content in (PROMPT, PROMPT + "\n", PROMPT + "\r\n", "\ufeff" + PROMPT):
        (tmp_path / "prompt.txt").write_bytes(content.encode())
        assert sample.read_prompt(options("any", "--prompt-file", str(tmp_path / "prompt.txt"))) == PROMPT
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert sample.read_prompt(options("any", "--prompt", "-")) == PROMPT


def test_no_prompt_starts_at_end_of_text_and_a_long_one_keeps_its_end(harmonic: Path, write, loaded) -> None:
    model, tokenizer = loaded
    argv = ("--max-new-tokens", "8", "--seed", "1")
    text = write(harmonic, *argv)
    (ids,) = generate(model, [END], 8, "--seed", "1")
    assert text == sample.decode(tokenizer, ids, after=[END]) + "\n"
    assert write(harmonic, "--prompt", "<|endoftext|>", *argv) == text
    ids = tokenizer("abc " * 50).input_ids
    long = write(harmonic, "--prompt", "abc " * 50, *argv, "--dtype", "bfloat16", "--show-distances")
    assert long.startswith(tokenizer.decode(ids[-40:])) and "bfloat16" in write.notes
    assert f"its {len(ids)} tokens" in write.notes and "its last 40 are used" in write.notes


@pytest.mark.parametrize(
    ("prompt", "new", "expected", "notes"),
    [
        (80, 20, (80, 20), []),
        (90, 20, (80, 20), ["prompt"]),  # new tokens push out the beginning
        (500, 80, (50, 50), ["prompt", "length"]),  # but not more than half of the context
        (30, 500, (30, 70), ["length"]),  # and the text ends where the context ends
    ],
)
def test_fit_context(capsys, prompt: int, new: int, expected, notes) -> None:
    ids = list(range(prompt))
    kept, length = sample.fit_context(ids, new, context=100)
    assert (kept, length) == (ids[-expected[0] :], expected[1])
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == notes and all("context of 100" in line for line in said)
    assert sample.fit_context(ids, new, context=None) == (ids, new)


# ------------------------------------------------------------------------------------------------------- Bad input


# Of these, the message says the option and the value.
WRONG_VALUES = """
    --temperature -1.0, --temperature nan, --top-p 0.0, --top-p 1.5, --min-p -0.1, --min-p 2.0, --top-k -1,
    --num-samples 0, --max-new-tokens 0, --seed -1, --dtype int8, --device toaster
"""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        *((argv.strip(), argv) for argv in WRONG_VALUES.split(",")),
        ("--show-distances --nearest 0", "--nearest 0"),
        ("--nearest 3", "--nearest --show-distances"),
        ("--greedy --temperature 0.5", "--temperature --greedy"),
        ("--greedy --top-k 5", "--top-k --greedy"),
        ("--temperature 0 --top-p 0.9", "--top-p --temperature"),
        ("--greedy --min-p 0.1", "--min-p --greedy"),
        ("--greedy --num-samples 2", "--num-samples --greedy"),
        ("--prompt a --prompt-file b", "--prompt-file --prompt"),
        ("--prompt-file /no/such/file", "/no/such/file"),
        ("--prompt a\udcfc", "--prompt UTF-8 0xfc"),
        ("--checkpoint runs/no_such_run", "runs/no_such_run"),
        ("--distance-file /no/such/file.py", "--distance-file"),
    ],
)
def test_bad_options(complaint, harmonic: Path, argv: str, words: str) -> None:
    message = complaint("--checkpoint", str(harmonic), *argv.split())
    assert all(word in message for word in words.split())


def test_bad_prompts(complaint, tmp_path: Path, monkeypatch) -> None:
    assert "--checkpoint" in complaint("--prompt", "a")
    file = tmp_path / "prompt.txt"
    for content, fault in ((b"", "empty"), (b"\n", "empty"), ("Grüße".encode("latin1"), "byte 2 is 0xfc")):
        file.write_bytes(content)
        message = complaint("any", "--prompt-file", str(file))
        assert str(file) in message and fault in message
    assert f"{tmp_path} cannot be read" in complaint("any", "--prompt-file", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "standard input is empty" in complaint("any", "--prompt", "-")


def test_a_tokenizer_that_is_another_one_or_missing(complaint, harmonic: Path, tmp_path: Path) -> None:
    """tests/test_source.py has damaged models."""
    folder = shutil.copytree(harmonic, tmp_path / "model")
    for size in (290, 310):
        small_models.byte_pairs(size).save(str(folder / "tokenizer.json"))
        assert f"has {size} tokens, but the model's vocab_size is {VOCAB}" in complaint(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert f"no tokenizer can be loaded from {folder}" in complaint(str(folder))


def test_distances_need_a_harmonic_head(complaint, tmp_path: Path, write) -> None:
    softmax = export(tmp_path, "softmax")
    assert "--show-distances" in complaint(str(softmax), "--show-distances")
    assert write(softmax, "--prompt", "The", "--max-new-tokens", "3").startswith("The")


# ---------------------------------------------------------------------------------------------------- As a program


@pytest.mark.slow
def test_as_a_program_text_and_notes_are_apart(harmonic: Path) -> None:
    """Nothing but the text on standard output, and on standard error nothing that is not ours."""
    command = [sys.executable, ROOT / "sample.py", "--checkpoint", harmonic, "--prompt", "-", "--max-new-tokens", "8"]
    done = subprocess.run(command, input=PROMPT, capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    assert done.stdout.startswith(PROMPT)
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["model", "sampling"]
