"""Settings and files of a run that are changed at random: a run ends well or with a UserError, and never hangs."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
from small_run import make_config
from test_fuzz_data import bent

import train
from hgpt import compare, runs
from hgpt.errors import UserError
from hgpt.run.checkpoint import MANIFEST, checkpoints, write_manifest
from hgpt.run.settings import known_settings, load_run_config, settings
from hgpt.run.stop import explain

pytestmark = pytest.mark.slow
SETTINGS, FILES, SECONDS = 300, 150, 60  # test_fuzz_data.py damages 150 files more
# Values of every type at and beyond each limit. 10**7 is a size that no small machine has memory for.
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**7, 2**31, 2**63 - 1, 2**63, 10**400, 0.0, -0.5, 1.5, 1e-300, 1e300, 1e-9,
    float("nan"), float("inf"), "", "auto", "x" * 300, "a\0b", "\udce4", "..", "/", "=1+1", "null", "2*sqrt_dim", [],
    [1], [0.9, 0.95], [[]], {}, {"p": 3}, "[" * 500, "muon", "cosine", "linear", "minkowski",
    "mahalanobis", "/dev/null",
]  # fmt: skip
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


def survives(case: object, work: Callable[[], object]) -> bool:
    """Whether `work` succeeds. Any error but one with exit code 2 or less memory than needed fails the test."""
    with in_time(case):
        try:
            work()
            return True
        except BaseException as error:
            try:
                message, code = explain(error)
            except BaseException as unexpected:
                raise AssertionError(f"{case}: {type(unexpected).__name__}: {unexpected}") from unexpected
            assert code == 2 and len(message) > 20, case
            return False


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
