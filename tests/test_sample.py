"""sample.py: what it measures, what it prints, and what it says to bad input."""

import argparse
import io
import json
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

import hgpt
import sample
from hgpt.cli import run
from hgpt.data.tokenizer import Tokenizer, hf_tokenizer, load_tokenizer

ROOT = Path(__file__).parent.parent
CONTEXT = 48
VOCAB = 301  # not a multiple of 64: the model has rows of padding
PROMPT = "The with statement é"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The models are so small that a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return load_tokenizer(f"bpe:{VOCAB}", lambda: [pydoc_data.topics.topics["with"]])


def export(folder: Path, bpe: Tokenizer, head: str) -> Path:
    torch.manual_seed(1)
    config = hgpt.HGPTConfig(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=1,
        n_head=2,
        head=head,
        centre_init_std=0.02,
        bos_token_id=bpe.end_of_text,
        eos_token_id=bpe.end_of_text,
    )
    hgpt.HGPTForCausalLM(config).save_pretrained(folder)
    bpe.save(folder)
    hf_tokenizer(folder / "tokenizer.json", CONTEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def harmonic(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Path:
    return export(tmp_path_factory.mktemp("harmonic"), bpe, "harmonic")


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory, bpe: Tokenizer) -> Path:
    return export(tmp_path_factory.mktemp("softmax"), bpe, "softmax")


@pytest.fixture(scope="module")
def loaded(harmonic: Path) -> tuple[hgpt.HGPTForCausalLM, AutoTokenizer]:
    return sample.load(str(harmonic), torch.device("cpu"), "auto")


@pytest.fixture
def write(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The text that a command line writes; `write.notes` is what it said on standard error."""

    def run(folder: Path, *argv: str) -> str:
        capsys.readouterr()
        status = run(sample.main, ["--checkpoint", str(folder), "--device", "cpu", *argv])
        captured = capsys.readouterr()
        run.notes = captured.err
        assert status == 0, captured.err
        return captured.out

    return run


def options(*argv: str) -> argparse.Namespace:
    return sample.parse_arguments(["--checkpoint", "any", *argv])


def float64_distances(model: hgpt.HGPTForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0]
        return torch.cdist(hidden.double(), model.lm_head.weight[:VOCAB].double())  # (T, V)


# ------------------------------------------------------------------------------------------------------------
# Distances


def test_measured_distances_are_those_of_hidden_states_and_centres(loaded) -> None:
    model, tokenizer = loaded
    prompt_ids, new_ids = tokenizer(PROMPT).input_ids, [5, 300, 17, 123]
    n = model.config.exponent
    distances = float64_distances(model, prompt_ids + new_ids)[len(prompt_ids) - 1 : -1]
    probabilities = torch.softmax(-n * distances.log(), dim=-1)
    ratios = distances / distances.amin(-1, keepdim=True)

    positions = sample.measure(model, prompt_ids, new_ids, nearest=6)

    assert [position.token for position in positions] == new_ids
    for t, position in enumerate(positions):
        token = position.token
        assert position.probability == pytest.approx(probabilities[t, token].item(), rel=1e-4)
        assert position.ratio == pytest.approx(ratios[t, token].item(), rel=1e-5)
        assert position.rank == 1 + (distances[t] < distances[t, token]).sum().item()
        expected = ratios[t].sort()
        assert [token for token, _ in position.nearest] == expected.indices[:6].tolist()
        assert [ratio for _, ratio in position.nearest] == pytest.approx(expected.values[:6].tolist(), rel=1e-5)


def test_probabilities_from_all_ratios_sum_to_one(loaded) -> None:
    model, tokenizer = loaded
    (position,) = sample.measure(model, tokenizer(PROMPT).input_ids, [42], nearest=10_000)
    assert len(position.nearest) == VOCAB
    weights = torch.tensor([ratio for _, ratio in position.nearest], dtype=torch.float64) ** -model.config.exponent
    assert position.ratio**-model.config.exponent / weights.sum() == pytest.approx(position.probability, rel=1e-4)


def test_printed_table_holds_the_measured_values_whatever_the_sampling(loaded, harmonic: Path, write) -> None:
    model, tokenizer = loaded
    argv = ("--prompt", PROMPT, "--max-new-tokens", "12", "--seed", "5")
    warped = ("--temperature", "3", "--top-p", "0.9")
    text = write(harmonic, *argv, *warped)
    out = write(harmonic, *argv, *warped, "--show-distances", "--nearest", "3")
    assert out.startswith(text)
    assert "temperature 1" in out

    prompt_ids = tokenizer(PROMPT).input_ids
    (new_ids,) = sample.generate(model, prompt_ids, 12, options(*argv, *warped), seed=5)
    probabilities = torch.softmax(-model.config.exponent * float64_distances(model, prompt_ids + new_ids).log(), -1)
    rows = re.findall(r"^ *(\d+)  (\S+) +([\d.e-]+) +(\d+\.\d+) +(\d+)  (.*)$", out, flags=re.MULTILINE)
    assert len(rows) == len(new_ids)
    for t, (number, shown, p, ratio, rank, nearest) in enumerate(rows):
        assert int(number) == t + 1
        assert shown == sample.visible(tokenizer, new_ids[t])
        expected = probabilities[len(prompt_ids) - 1 + t, new_ids[t]].item()
        assert float(p) == pytest.approx(expected, abs=6e-5 if float(p) >= 1e-3 else expected * 0.6)
        assert (float(ratio) == 1) == (rank == "1") or float(ratio) < 1.001
        near = [float(value) for value in re.findall(r"(\d+\.\d{3})(?:\s|$)", nearest)]
        assert len(near) == 3 and near[0] == 1 and near == sorted(near)


def test_table_columns_are_aligned(loaded) -> None:
    model, tokenizer = loaded
    positions = sample.measure(model, tokenizer(PROMPT).input_ids, list(range(0, VOCAB, 15)), nearest=2)
    head, *rows = sample.distance_table(positions, tokenizer, model.config.exponent).splitlines()
    assert {sample.width(row) for row in rows} == {sample.width(rows[0])}
    end = sample.width(head[: head.index("d/d_min") + len("d/d_min")])
    assert all(row[end - 4] == "." for row in rows if sample.width(row) == len(row))


@pytest.mark.parametrize(("exponent", "decimals"), [(11.3, 3), (110.9, 4), (1536.0, 5)])
def test_decimals_follow_the_exponent(loaded, exponent: float, decimals: int) -> None:
    position = sample.TokenDistances(token=5, probability=0.25, ratio=1.0123456, rank=2, nearest=[(6, 1.0)])
    table = sample.distance_table([position], loaded[1], exponent)
    assert f" {1.0123456:.{decimals}f} " in table


def test_tokens_are_visible() -> None:
    class Vocabulary:
        pieces = (" the", "\n", "\t", " " * 12, "-" * 20, "<|endoftext|>", "日本", "antidisestablishmentarianism")

        def decode(self, ids: list[int], **_: object) -> str:
            return self.pieces[ids[0]]

    shown = [sample.visible(Vocabulary(), i) for i in range(len(Vocabulary.pieces))]
    assert shown[:7] == ["␣the", r"\n", r"\t", "␣×12", "-×20", "<|endoftext|>", "日本"]
    assert shown[7] == "antidisestablis…"
    assert sample.width("日本") == 4


def test_pieces_of_a_character_are_shown_as_bytes(loaded) -> None:
    tokenizer = loaded[1]
    first, second = tokenizer("é").input_ids
    assert [sample.visible(tokenizer, token) for token in (first, second)] == [r"\xc3", r"\xa9"]


# ------------------------------------------------------------------------------------------------------------
# Text


def test_same_seed_same_text_and_the_printed_seed_repeats_it(harmonic: Path, write) -> None:
    argv = ("--prompt", PROMPT, "--max-new-tokens", "20")
    first = write(harmonic, *argv)
    seed = re.search(r"seed (\d+)", write.notes)[1]
    assert write(harmonic, *argv, "--seed", seed) == first
    assert write(harmonic, *argv, "--seed", str(int(seed) + 1)) != first


def test_several_samples_are_several_texts(harmonic: Path, write) -> None:
    out = write(harmonic, "--prompt", "The ", "--num-samples", "3", "--max-new-tokens", "15", "--seed", "2")
    titles, texts = re.findall(r"^--- .* ---$", out, re.MULTILINE), re.split(r"^--- .* ---\n", out, flags=re.MULTILINE)
    assert titles == [f"--- sample {i} of 3 ---" for i in (1, 2, 3)]
    assert len(set(texts[1:])) == 3
    assert all(text.startswith("The ") for text in texts[1:])


@pytest.mark.parametrize("samples", ["1", "3"])
def test_streaming_prints_the_same_text(harmonic: Path, write, samples: str) -> None:
    # Long enough that the untrained model writes broken characters and, in some rows, end-of-text.
    argv = ("--prompt", PROMPT, "--num-samples", samples, "--seed", "4", "--temperature", "1.5", "--top-k", "0")
    plain = write(harmonic, *argv, "--no-stream")
    assert "\ufffd" in plain
    assert write(harmonic, *argv, "--stream") == plain


def test_stream_holds_back_a_character_that_is_not_complete(loaded, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = loaded[1]
    prompt_ids, (first, second) = tokenizer("caf").input_ids, tokenizer("é").input_ids
    stream = sample.TextStream(tokenizer, prompt_ids)
    shown = []
    for value in ([prompt_ids, prompt_ids], [first, 1], [second, 2]):
        stream.put(torch.tensor(value))
        shown.append(capsys.readouterr().out)
    stream.end()
    assert shown == ["", "", "é"]
    assert capsys.readouterr().out == ""


def test_text_stops_at_its_first_end_of_text(loaded) -> None:
    tokenizer = loaded[1]
    assert sample.through_end([3, 7, 300, 300, 300], [300]) == [3, 7, 300]
    assert sample.through_end([3, 7], [300]) == [3, 7]
    assert sample.decode(tokenizer, [*tokenizer(" b").input_ids, 300], after=tokenizer("a").input_ids) == " b"


def test_top_k_1_and_temperature_0_are_greedy(harmonic: Path, write) -> None:
    argv = ("--prompt", PROMPT, "--max-new-tokens", "15", "--seed", "1")
    greedy = write(harmonic, *argv, "--greedy")
    assert "greedy" in write.notes
    assert write(harmonic, *argv, "--temperature", "0") == greedy
    assert write(harmonic, *argv, "--top-k", "1") == greedy
    assert write(harmonic, *argv, "--min-p", "1") == greedy
    assert write(harmonic, *argv, "--top-p", "1e-9") == greedy


def sampled_from(
    loaded: tuple, monkeypatch: pytest.MonkeyPatch, argv: Sequence[str], prompt_ids: list[int]
) -> torch.Tensor:
    """The probabilities that the first new token was drawn from, (V,)."""
    drawn = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, **kw: (drawn.append(p), draw(p, **kw))[1])
    sample.generate(loaded[0], prompt_ids, 1, options(*argv), seed=0)
    return drawn[0][0]


def test_temperature_is_the_exponent_n_over_t(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    prompt_ids = tokenizer(PROMPT).input_ids
    drawn = sampled_from(loaded, monkeypatch, ("--temperature", "0.3", "--top-k", "0"), prompt_ids)
    distances = float64_distances(model, prompt_ids)[-1]
    expected = hgpt.model.harmax(distances.square(), model.config.exponent / 0.3)
    torch.testing.assert_close(drawn.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("argv", [("--top-k", "7"), ("--top-k", "0", "--top-p", "0.3"), ("--min-p", "0.05")])
def test_truncation_keeps_the_most_probable(loaded, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    prompt_ids = loaded[1](PROMPT).input_ids
    drawn = sampled_from(loaded, monkeypatch, ("--temperature", "1", *argv), prompt_ids)
    distances = float64_distances(loaded[0], prompt_ids)[-1]
    p = hgpt.model.harmax(distances.square(), loaded[0].config.exponent).sort(descending=True)
    expected = {
        "--top-k 7": 7,
        "--top-k 0 --top-p 0.3": int((p.values.cumsum(0) < 0.3).sum()) + 1,
        "--min-p 0.05": int((p.values >= 0.05 * p.values[0]).sum()),
    }[" ".join(argv)]
    assert 1 < expected < VOCAB
    assert set(drawn.nonzero().flatten().tolist()) == set(p.indices[:expected].tolist())


def test_padding_rows_are_never_sampled(loaded) -> None:
    model = loaded[0]
    argv = ("--temperature", "1e6", "--top-k", "0", "--num-samples", "64")
    rows = sample.generate(model, [300], 40, options(*argv), seed=0)
    assert model.lm_head.weight.shape[0] > VOCAB
    assert max(token for row in rows for token in row) < VOCAB
    assert {len(row) for row in rows} != {40}  # some met end-of-text, and end with it
    assert all(row.index(300) == len(row) - 1 for row in rows if 300 in row)


def test_a_hub_style_gpt2_folder_works_and_its_sampling_defaults_do_not_leak(
    tmp_path: Path, harmonic: Path, write
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB + 19, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=300, eos_token_id=300
    )  # rows of padding, as many models on the hub have
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=300)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(harmonic).save_pretrained(tmp_path)
    argv = ("--prompt", "The ", "--max-new-tokens", "12")
    assert write(tmp_path, *argv, "--seed", "1") != write(tmp_path, *argv, "--seed", "2")
    assert "softmax" in write.notes and "n/T" not in write.notes


def test_half_precision(harmonic: Path, write) -> None:
    write(harmonic, "--prompt", "The", "--dtype", "bfloat16", "--max-new-tokens", "4", "--show-distances")
    assert "bfloat16" in write.notes


# ------------------------------------------------------------------------------------------------------------
# Checkpoint and prompt


def test_run_checkpoint_and_exported_folder(harmonic: Path, tmp_path: Path, write) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_0000005"
    shutil.copytree(harmonic, step / "model")
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step_0000005")
    texts = {
        write(folder, "--prompt", "The", "--seed", "1", "--max-new-tokens", "8")
        for folder in (tmp_path / "run", step, step / "model", harmonic)
    }
    assert len(texts) == 1


def test_prompt_from_option_file_and_standard_input(
    harmonic: Path, tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--seed", "1", "--max-new-tokens", "8")
    expected = write(harmonic, "--prompt", PROMPT, *argv)
    assert expected.startswith(PROMPT)
    for content in (PROMPT, PROMPT + "\n", PROMPT + "\r\n", "\ufeff" + PROMPT):
        (tmp_path / "prompt.txt").write_bytes(content.encode())
        assert write(harmonic, "--prompt-file", str(tmp_path / "prompt.txt"), *argv) == expected
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert write(harmonic, "--prompt", "-", *argv) == expected


def test_no_prompt_starts_at_end_of_text(harmonic: Path, write, loaded) -> None:
    text = write(harmonic, "--seed", "1", "--max-new-tokens", "8")
    (ids,) = sample.generate(loaded[0], [300], 8, options(), seed=1)
    assert text == sample.decode(loaded[1], ids, after=[300]) + "\n"
    assert write(harmonic, "--prompt", "<|endoftext|>", "--seed", "1", "--max-new-tokens", "8") == text


@pytest.mark.parametrize(
    ("prompt", "new", "expected"),
    [
        (10, 20, (10, 20)),
        (80, 20, (80, 20)),
        (90, 20, (80, 20)),  # new tokens push out the beginning
        (500, 20, (80, 20)),
        (500, 80, (50, 50)),  # but not more than half of the context
        (30, 500, (30, 70)),  # and the text ends where the context ends
    ],
)
def test_fit_context(prompt: int, new: int, expected: tuple[int, int]) -> None:
    assert sample.fit_context(prompt, new, context=100) == expected
    assert sample.fit_context(prompt, new, context=None) == (prompt, new)


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(harmonic: Path, write, loaded) -> None:
    tokenizer = loaded[1]
    prompt = "abc " * 50
    tokens = len(tokenizer(prompt).input_ids)
    text = write(harmonic, "--prompt", prompt, "--max-new-tokens", "8", "--seed", "1")
    assert f"its {tokens} tokens and 8 new ones exceed the context of {CONTEXT}: only its last 40" in write.notes
    assert text.startswith(tokenizer.decode(tokenizer(prompt).input_ids[-40:]))


def test_text_ends_where_the_context_ends_and_says_so(harmonic: Path, write) -> None:
    write(harmonic, "--prompt", "ab", "--max-new-tokens", "1000", "--seed", "1")
    assert re.search(rf"at most \d+ new tokens instead of 1000: .* context of {CONTEXT}", write.notes)


# ------------------------------------------------------------------------------------------------------------
# Bad input


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error of a command line that must fail with one line and status 2, and write nothing."""
    capsys.readouterr()
    assert run(sample.main, argv) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if not re.match("(model|prompt|sampling|length) ", line)]
    assert captured.out == "" and line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--temperature -1", "--temperature must be 0 (greedy) or a number from 1e-06 up; got -1.0"),
        ("--temperature nan", "--temperature must be"),
        ("--temperature warm", "argument --temperature: invalid float value: 'warm'"),
        ("--top-p 0", "--top-p must lie in (0, 1]; got 0.0"),
        ("--top-p 1.5", "--top-p must lie in (0, 1]; got 1.5"),
        ("--min-p -0.1", "--min-p must lie in [0, 1]; got -0.1"),
        ("--min-p 2", "--min-p must lie in [0, 1]; got 2.0"),
        ("--top-k -1", "--top-k must be 0 (all tokens) or more; got -1"),
        ("--num-samples 0", "--num-samples must be at least 1; got 0"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1; got 0"),
        ("--seed -1", "--seed must lie between"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--show-distances --nearest 0", "--nearest must be at least 1; got 0"),
        ("--nearest 3", "--nearest has no effect without --show-distances"),
        ("--greedy --temperature 0.5", "--temperature 0.5 has no effect"),
        ("--greedy --top-k 5", "--top-k has no effect with --greedy"),
        ("--temperature 0 --top-p 0.9", "--top-p has no effect with --temperature 0"),
        ("--greedy --min-p 0.1", "--min-p has no effect with --greedy"),
        ("--greedy --num-samples 2", "--num-samples 2 with --greedy would write the same text each time"),
        ("--prompt a --prompt-file b", "--prompt and --prompt-file exclude each other"),
        ("--promt a", "unrecognized arguments: --promt a"),
        ("--prompt-file /no/such/file", "prompt file /no/such/file cannot be read: No such file or directory"),
        ("--device toaster", "--device toaster cannot be used here"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], harmonic: Path, argv: str, message: str) -> None:
    assert message in complaint(capsys, "--checkpoint", str(harmonic), *argv.split())


def test_bad_prompts(
    capsys: pytest.CaptureFixture[str], harmonic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("--checkpoint", str(harmonic))
    path = tmp_path / "prompt.txt"
    for content in (b"", b"\n"):
        path.write_bytes(content)
        assert f"prompt file {path} is empty" in complaint(capsys, *argv, "--prompt-file", str(path))
    path.write_bytes("Grüße".encode("latin1"))
    assert "is not UTF-8: byte 2 is 0xfc" in complaint(capsys, *argv, "--prompt-file", str(path))
    assert f"{tmp_path} cannot be read" in complaint(capsys, *argv, "--prompt-file", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "the prompt on standard input is empty" in complaint(capsys, *argv, "--prompt", "-")
    assert "--prompt is not UTF-8: byte 1 is 0xfc" in complaint(capsys, *argv, "--prompt", "a\udcfc")


def test_bad_checkpoints(capsys: pytest.CaptureFixture[str], harmonic: Path, tmp_path: Path) -> None:
    assert "argument --checkpoint: expected one argument" in complaint(capsys, "--checkpoint")
    assert "--checkpoint" in complaint(capsys, "--prompt", "a")
    for missing in (str(tmp_path / "none"), "runs/no_such_run", "./gpt2"):
        assert missing.removeprefix("./") in complaint(capsys, "--checkpoint", missing)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}" in complaint(capsys, "--checkpoint", str(tmp_path / "empty"))
    assert "no model can be loaded from owner/no-such-model" in complaint(capsys, "--checkpoint", "owner/no-such-model")

    damaged = tmp_path / "damaged"
    shutil.copytree(harmonic, damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    assert f"no model can be loaded from {damaged}" in complaint(capsys, "--checkpoint", str(damaged))
    (damaged / "model.safetensors").unlink()
    assert f"no model can be loaded from {damaged}" in complaint(capsys, "--checkpoint", str(damaged))
    (damaged / "config.json").write_text("{")
    assert f"no model can be loaded from {damaged}" in complaint(capsys, "--checkpoint", str(damaged))


def test_incomplete_weights_are_not_made_up(capsys: pytest.CaptureFixture[str], harmonic: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deeper"
    shutil.copytree(harmonic, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    assert "incomplete, without transformer.h.1" in complaint(capsys, "--checkpoint", str(folder))


def test_tokenizers_that_are_missing_or_of_another_model(
    capsys: pytest.CaptureFixture[str], harmonic: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(harmonic, folder)
    for size in (290, 310):
        other = load_tokenizer(f"bpe:{size}", lambda: [pydoc_data.topics.topics["with"]])
        other.save(folder)
        line = complaint(capsys, "--checkpoint", str(folder))
        assert f"has {size} tokens, but the model's vocab_size is {VOCAB}" in line
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert f"no tokenizer can be loaded from {folder}" in complaint(capsys, "--checkpoint", str(folder))


def test_distances_need_a_harmonic_head(capsys: pytest.CaptureFixture[str], softmax: Path) -> None:
    line = complaint(capsys, "--checkpoint", str(softmax), "--show-distances")
    assert "--show-distances needs a model with a harmonic head" in line and "inner products" in line


# ------------------------------------------------------------------------------------------------------------
# As a program


def test_as_a_program_text_and_notes_are_apart(harmonic: Path) -> None:
    """Nothing but the text on standard output, and on standard error nothing that is not ours."""
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(harmonic), "--prompt", "-"]
    done = subprocess.run(
        [*command, "--seed", "1", "--max-new-tokens", "8"],
        input=PROMPT.encode(),
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        check=True,
    )
    assert done.stdout.decode().startswith(PROMPT)
    assert [line.split()[0] for line in done.stderr.decode().splitlines()] == ["model", "sampling"]
