import os

# Before torch and transformers are imported, and inherited by every process that a test starts: no test reaches
# for the network, and each keeps to one thread. On models this small a second thread gains nothing, and where
# tests share the cores with anything else, waiting for it made them five times slower.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products that are the same every time

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. Triton reads this when transformers imports it.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from small_run import HARMONIC, make_config, markov_tokens, write_data

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of small runs."""
    return write_data(tmp_path_factory.mktemp("data") / "markov", markov_tokens(20_000, 0), markov_tokens(1_000, 1))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A function: the finished run of 6 steps of a head, trained once; to compare with, or to copy with `set_back`."""
    import train  # takes seconds, and many tests do without

    runs, done = tmp_path_factory.mktemp("finished"), {}

    def trained(head=HARMONIC):
        if head.type not in done:
            done[head.type] = make_config(data, runs, head, name=head.type)
            train.main(done[head.type])
        return done[head.type]

    return trained


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for pages; a test that needs it is slow, and skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install -e ".[dev]"')
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium, as Debian's package of that name installs it")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
