"""Settings and files that are changed at random: what uses them ends well or with a UserError, and never hangs."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
from small_models import byte_pairs, export
from small_run import make_config
from small_texts import prepared, texts

import sample
import train
from hgpt import compare, runs
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.data.tokenizer import hf_tokenizer, load_tokenizer
from hgpt.data.verify import find_damage
from hgpt.errors import UserError
from hgpt.run.checkpoint import MANIFEST, checkpoints, write_manifest
from hgpt.run.settings import known_settings, load_run_config, settings
from hgpt.run.stop import explain

pytestmark = pytest.mark.slow
SETTINGS, FILES, SECONDS = 300, 150, 60
# Values of every type at and beyond each limit. 10**7 is a size that no small machine has memory for.
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**7, 2**31, 2**63 - 1, 2**63, 10**400, 0.0, -0.5, 1.5, 1e-300, 1e300, 1e-9,
    float("nan"), float("inf"), "", "auto", "x" * 300, "a\0b", "\udce4", "..", "/", "=1+1", "null", "2*sqrt_dim", [],
    [1], [0.9, 0.95], [[]], {}, {"p": 3}, "[" * 500, "muon", "cosine", "linear", "minkowski",
    "mahalanobis", "/dev/null",
]  # fmt: skip
# Values of a file of JSON.
ODD = (None, True, -1, 0, 3, 2**31, 4 * 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), "", "x", "\ud800", "../x", [],
       {}, [1], {"x": 1})  # fmt: skip
# These would train for long or wait on purpose.
LEFT_OUT = {"train.steps", "log.energy_country", "model.head.distance_file", "train.compile", "train.compile_loss"}
LEFT_OUT |= {"runs_dir"}  # which is written to
SHORT = {"optim": {"warmup_steps": 0}, "train": {"steps": 2}, "checkpoint": {"every": 1}}


@contextmanager
def in_time(case: object):
    def too_long(number, frame):
        raise AssertionError(f"{case} takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survives(case: object, work: Callable[[], object], memory: bool = True) -> bool:
    """Whether `work` succeeds. Any error but one with exit code 2 fails the test; `memory`: but for lack of memory."""
    with in_time(case):
        try:
            work()
            return True
        except BaseException as error:
            try:
                message, code = explain(error)
            except BaseException as unexpected:
                raise AssertionError(f"{case}: {type(unexpected).__name__}: {unexpected}") from unexpected
            assert code == 2 and len(message) > 20 and (memory or isinstance(error, UserError)), case
            return False


def use_model(folder):
    sample.main(["--checkpoint", str(folder), "--prompt", "with", "--greedy", "--max-new-tokens", "2", "--no-stream"])


def use_data(folder):
    for split in SPLITS:
        list(find_damage(folder, split, documents=True))
        shards = TokenShards.open(folder, split)
        list(shards.chunks())
        load_tokenizer(str(folder)).encode_batch(["with a file"])
        hf_tokenizer(folder / "tokenizer.json", 16, shards.end_of_text)("with a file")


def bent(content, rng):
    """Another content: bits, ranges, digits or values changed."""
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    way = rng.randrange(7)
    if way == 0:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if way == 1:
        return content[:start]
    if way == 2:
        return content[:start] + content[end:]
    if way == 3:
        return content[:start] + rng.randbytes(rng.randint(1, 9)) + content[start:]
    if way == 4:
        return rng.choice([b"", b"[" * 100_000, b'{"a":' * 100_000, b"\x80\x04K\x01.", b"null", b"[]", b"\xff\xfe{}"])
    digits = [place for place, byte in enumerate(content[:4000]) if byte in b"0123456789"]
    if way == 5 and digits:
        place = rng.choice(digits)
        return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]
    try:
        tree = json.loads(content)
    except ValueError:
        return content[:start] + bytes(end - start) + content[end:]
    node = tree
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            node[key] = rng.choice(ODD)
            return json.dumps(tree).encode()
        node = node[key]


def test_settings(data, tmp_path):
    rng = random.Random(0)
    names = sorted(known_settings().keys() - LEFT_OUT)
    base = settings(make_config(data, tmp_path, **SHORT))
    done = 0
    for case in range(SETTINGS):
        values = base | {"name": f"run{case}"}
        for name in rng.sample(names, rng.choice((1, 1, 2))):
            values[name] = rng.choice(VALUES)
        arguments = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
        ]
        done += survives(arguments, lambda arguments=arguments: train.main(load_run_config(arguments)))
        shutil.rmtree(tmp_path / f"run{case}", ignore_errors=True)
    assert 0 < done < SETTINGS


def test_files_of_a_run(data, tmp_path):
    """Half of the damage has a manifest that fits. What ends well is the run of before, whatever is lost of its log."""
    rng = random.Random(1)
    whole = make_config(data, tmp_path, name="whole", **SHORT)
    train.main(whole)
    config = replace(whole, name="run", resume="auto", train=replace(whole.train, steps=3))
    done = 0
    for case in range(FILES):
        shutil.rmtree(config.run_folder, ignore_errors=True)
        shutil.copytree(whole.run_folder, config.run_folder, symlinks=True)
        newest = checkpoints(config.run_folder)[-1]
        files = [config.run_folder / "metrics.jsonl", config.run_folder / "config.toml"]
        files += sorted(path for path in newest.rglob("*") if path.is_file() and path.suffix != ".py")
        path = rng.choice(files)
        path.write_bytes(bent(path.read_bytes(), rng))
        if path.name != MANIFEST and rng.random() < 0.5:
            (newest / MANIFEST).unlink()
            write_manifest(newest)
        done += survives((case, path), lambda: train.main(config))
        with in_time((case, path)):
            runs.main([str(tmp_path)])
            runs.read_curves(runs.read_run("run", config.run_folder, 0.0), "tokens")
            compare.gradient_norm_spread(config.run_folder)
            compare.median_tokens_per_second([config.run_folder])
            try:
                compare.outcome_of(config)
            except UserError as error:
                assert str(config.run_folder) in str(error)
    assert FILES / 3 < done < FILES


@pytest.mark.parametrize(("kind", "tries"), [("model", 50), ("gpt2", 25), ("data", 75)])
def test_damaged_files(tmp_path, kind, tries):
    """Of an exported model, or of a data folder."""
    if kind == "data":
        whole, use = prepared(tmp_path / "whole", texts(60)), use_data
    else:
        whole, use = export(tmp_path / "whole", byte_pairs(300), kind.replace("model", "harmonic")), use_model
    done = 0
    for seed in range(tries):
        rng = random.Random(f"{kind} {seed}")
        folder = shutil.copytree(whole, tmp_path / str(seed))
        file = rng.choice(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".bin", ".safetensors")))
        file.write_bytes(bent(file.read_bytes(), rng))
        done += survives((kind, seed, file), lambda folder=folder: use(folder), memory=False)
        shutil.rmtree(folder)
    assert done < 2 * tries / 3
