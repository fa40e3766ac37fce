"""data_prep/hub.py: downloads, interrupted ones, the cache without a network, and a hub that does not answer."""

import contextlib
import http.server
import json
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from small_texts import contents, fails, small_units, status
from test_openwebtext import SMALL, make_source, run
from test_resuming import units_encoded

from data_prep import hub as hub_module
from data_prep import openwebtext
from data_prep.openwebtext import main
from hgpt.data.shards import read_meta

PINNED = hub_module.REVISION
NAME = "Skylion007/openwebtext"
THIRD = "train-00002-of-00003.parquet"


@pytest.fixture(autouse=True)
def _small_units(monkeypatch):
    small_units(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


def shards(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The shards of the same files on this machine."""
    return shards(run(source, tmp_path_factory.mktemp("whole") / "out"))


def failed(capsys, out, *options):
    return fails(capsys, main, "--out", out, *SMALL, *options)


def prepare(out, *options):
    assert status(main, "--out", out, *SMALL, *options) == 0
    return out


class Hub(http.server.BaseHTTPRequestHandler):
    """What data_prep needs of the Hugging Face hub, over HTTP: one data set, one revision that may move.

    `files` by name, of which `refused` ones are not given; `asked`: the requests.
    """

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.replace("%2F", "/")
        known = re.fullmatch(rf"/api/datasets/{NAME}/revision/(.+?)(\?.*)?", path)
        commits = {"refs/pr/20": self.commit, "a" * 40: "a" * 40, PINNED: PINNED}
        match = re.fullmatch(rf"/datasets/{NAME}/resolve/({'|'.join(commits)})/(.+)", path)
        if self.down:
            self.send(503, {})
        elif known and known[1] in commits:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            info = {"id": NAME, "sha": commits[known[1]], "siblings": siblings, "tags": []}
            self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        elif not match:
            self.send(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}")
        elif self.command == "GET" and match[2] in self.refused:
            self.send(403, {})
        else:
            headers = {"ETag": f'"{Path(match[2]).name}"', "X-Repo-Commit": commits[match[1]]}
            self.send(200, headers, self.files[match[2]])

    do_HEAD = do_GET

    def send(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    state = {"files": {}, "commit": "a" * 40, "asked": [], "refused": set(), "down": False}
    handler = type("Served", (Hub,), state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(monkeypatch, server.server_address[1], tmp_path / "cache")
    monkeypatch.setattr(openwebtext, "REVISION", "refs/pr/20")  # one that may move
    yield handler
    server.shutdown()
    server.server_close()


def point_to(monkeypatch, port, cache):
    hub = f"http://127.0.0.1:{port}"
    set_hub(monkeypatch, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(cache), ENDPOINT=hub)
    set_hub(monkeypatch, HUGGINGFACE_CO_URL_TEMPLATE=f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}")


def set_hub(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


@pytest.fixture
def on_hub(source, hub):
    """A hub that holds the files of `source`; the order of its listing does not matter."""
    for path in sorted(source.iterdir(), reverse=True):
        hub.files[f"plain_text/{path.name}"] = path.read_bytes()
    hub.files["README.md"] = b"x"
    return hub


def downloads(hub):
    return sorted(line.split()[1].rpartition("/")[2] for line in hub.asked if re.match("GET .*/resolve/", line))


def test_from_the_hub(tmp_path, on_hub, whole, monkeypatch):
    out = prepare(tmp_path / "out")
    meta = read_meta(out)
    assert (meta.source, meta.source_revision) == (NAME, "a" * 40)
    assert shards(out) == whole
    assert len(downloads(on_hub)) == 3 and "README" not in str(on_hub.asked)
    on_hub.asked.clear()
    prepare(tmp_path / "again")
    assert not downloads(on_hub)  # from the cache
    set_hub(monkeypatch, HF_HUB_OFFLINE=True)
    on_hub.asked.clear()
    for number, revision in enumerate(((), ("--revision", "a" * 40))):
        assert contents(prepare(tmp_path / str(number), *revision)) == contents(out)
    assert not on_hub.asked


def test_the_default_revision_is_a_commit_which_cannot_move(tmp_path, on_hub, monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}", PINNED)
    monkeypatch.setattr(openwebtext, "REVISION", PINNED)
    meta = read_meta(prepare(tmp_path / "out"))
    assert meta.source_revision == PINNED and all(PINNED in line for line in on_hub.asked)


def test_a_download_that_was_interrupted_goes_on(tmp_path, on_hub, capsys, monkeypatch):
    on_hub.refused.add(f"plain_text/{THIRD}")
    message = failed(capsys, tmp_path / "out")
    assert "interrupted (HfHubHTTPError: " in message and "--source openwebtext" in message
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        set_hub(patch, HF_HUB_OFFLINE=True)
        for revision in ((), ("--revision", "a" * 40)):
            assert "HF_HUB_OFFLINE is set" in failed(capsys, tmp_path / "out", *revision)
    on_hub.refused.clear()
    on_hub.asked.clear()
    prepare(tmp_path / "out")
    assert downloads(on_hub) == [THIRD]


def test_ctrl_c_does_not_wait_for_downloads():
    """Neither the message, nor the end of the process: no thread keeps it that is no daemon."""
    going_on = threading.Event()
    started = []

    def fetch(name):
        started.append(name)
        if len(started) == hub_module.DOWNLOADS:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        going_on.wait(60)
        return Path(name)

    before = set(threading.enumerate())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            hub_module.fetch_all(fetch, [str(number) for number in range(20)])
        assert time.perf_counter() - start < 5
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    finally:
        signal.signal(signal.SIGINT, handler)
        going_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert len(started) == hub_module.DOWNLOADS  # and none of the others began


def test_a_preparation_goes_on_with_its_commit(tmp_path, source, on_hub, monkeypatch, capsys):
    """Without the hub, if the cache holds all files."""
    out = tmp_path / "out"
    units_encoded("openwebtext", NAME, out, monkeypatch, interrupt_at=9)
    on_hub.commit = "b" * 40  # the pull request has moved
    asked = "another data set on the hub: 'Skylion007/openwebtext at refs/pr/20', now "
    assert asked + "'Skylion007/openwebtext at aaaa" in failed(capsys, out, "--revision", "a" * 40)
    assert asked + "None" in failed(capsys, out, "--source", source)
    shutil.copytree(out, tmp_path / "other")
    on_hub.asked.clear()
    prepare(out)
    assert not on_hub.asked and read_meta(out).source_revision == "a" * 40
    assert contents(out) == contents(prepare(tmp_path / "whole", "--revision", "a" * 40))

    (blob,) = (tmp_path / "cache").rglob(f"blobs/{THIRD}")
    blob.unlink()
    out = tmp_path / "other"
    set_hub(monkeypatch, HF_HUB_OFFLINE=True)
    message = failed(capsys, out)
    assert "does not hold all Parquet files" in message and f"--revision {'a' * 40}" in message
    set_hub(monkeypatch, HF_HUB_OFFLINE=False)
    on_hub.asked.clear()
    prepare(out)
    assert downloads(on_hub) == [THIRD] and read_meta(out).source_revision == "a" * 40


def test_what_the_hub_does_not_give(tmp_path, hub, capsys, monkeypatch):
    out = tmp_path / "out"
    message = failed(capsys, out, "--revision", "refs/pr/999")
    assert "--revision refs/pr/999 does not exist in Skylion007/openwebtext" in message
    assert "no data set on the hub" in failed(capsys, out, "--source", "Skylion007/openwebtxt")
    hub.files["openwebtext.py"] = b"x"
    assert "holds no Parquet files at revision" in failed(capsys, out)
    hub.down = True
    message = failed(capsys, out)
    assert "503" in message and "--source openwebtext" in message
    hub.down = False
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    hub.files["plain_text/train-00000-of-00001.parquet"] = b"x" * 100
    assert "must be downloaded to" in failed(capsys, out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["refused", "silent", "offline"])
def test_no_network_is_an_error_within_seconds_that_names_the_local_alternative(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and never answers
        point_to(monkeypatch, server.getsockname()[1], tmp_path / "cache")
        if kind == "refused":
            server.close()
        if kind == "offline":
            set_hub(monkeypatch, HF_HUB_OFFLINE=True)
        start = time.perf_counter()
        message = failed(capsys, tmp_path / "out")
        assert time.perf_counter() - start < 5
    assert "--source openwebtext" in message and "hf download Skylion007/openwebtext" in message
    assert not (tmp_path / "out").exists()
