"""The Parquet files of a data set on the Hugging Face hub, downloaded into its cache."""

import concurrent.futures
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data_prep.worker_pool import in_daemon
from hgpt.errors import UserError

REPOSITORY = "Skylion007/openwebtext"
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"  # 80 Parquet files with 8,013,769 documents
HUB_TIMEOUT = 10  # seconds to wait for an answer of the hub
DOWNLOADS = 8  # files at once

Found = tuple[list[Path], str]  # the files, sorted by their paths in the data set, and their commit


def cached(repository: str, revision: str, files: int | None) -> Found | None:
    """As `download`, but without the hub; None unless all files are in the Hugging Face cache.

    `files` is their number; None: the number in their names (train-00003-of-00080.parquet).
    """
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns="*.parquet"
            )
        )
    except (LocalEntryNotFoundError, ValueError):  # ValueError: not a valid id; the hub's own message says more
        return None
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file())
    numbered = [re.fullmatch(r"(.+)-\d+-of-(\d+)\.parquet", name) for name in names]
    series = Counter(match and match.groups() for match in numbered)
    as_numbered = all(key is not None and number == int(key[1]) for key, number in series.items())
    if not names or not (as_numbered if files is None else len(names) == files):
        return None
    print(f"{repository} at {folder.name}: {len(names)} files, from the cache")
    return [folder / name for name in names], folder.name


def download(repository: str, revision: str) -> Found:
    """Download the Parquet files of a data set into the Hugging Face cache, except those already there.

    `revision` is resolved to a commit once, and all files come from this commit. Raises UserError; if the hub cannot be
    reached, the message lists alternatives.
    """
    alternatives = (
        f"Alternatives: on a machine that can reach it, run\n"
        f"  hf download {repository} --repo-type dataset --revision {revision} --local-dir openwebtext\n"
        "copy the folder here and give it with --source openwebtext; or set HF_ENDPOINT to a mirror; or give any "
        "folder of Parquet, JSONL or text files with --source."
    )
    sizes, commit = _listing(repository, revision, alternatives)
    if not sizes:
        raise UserError(
            f"{repository} holds no Parquet files at revision {revision}. Older revisions hold a script, which "
            f"datasets 4 and later do not run. The Parquet files of {REPOSITORY} are at --revision {REVISION}."
        )
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    in_cache = partial(huggingface_hub.try_to_load_from_cache, repository, repo_type="dataset", revision=commit)
    missing = sum(size for name, size in sizes.items() if in_cache(name) is None)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if missing > free:
        raise UserError(
            f"{missing / 1e9:.1f} GB must be downloaded to {cache}, but {free / 1e9:.1f} GB are free on that disk. "
            "Free some, or set HF_HOME to a folder on another disk."
        )
    size = sum(sizes.values())
    print(f"{repository} at {commit}: {len(sizes)} files, {size / 1e9:.1f} GB, from the hub or its cache")

    def fetch(name: str, revision: str = commit) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))

    names = sorted(sizes)
    try:
        files = fetch_all(fetch, names)
    except Exception as error:  # of the HTTP client, and a full disk
        raise UserError(
            f"The download of {repository} was interrupted ({type(error).__name__}: {_first_line(error)}). The same "
            f"command resumes it. {alternatives}"
        ) from error
    with suppress(Exception):
        fetch(names[0], revision)  # makes the cache record the commit of `revision`, for a run with HF_HUB_OFFLINE
    return files, commit


def _listing(repository: str, revision: str, alternatives: str) -> tuple[dict[str, int], str]:
    """Sizes of the Parquet files by name, and the current commit of `revision`."""
    try:
        info = huggingface_hub.HfApi().dataset_info(
            repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT
        )
    except RevisionNotFoundError as error:
        raise UserError(
            f"--revision {revision} does not exist in {repository}. Leave it out for the one that is known to hold "
            f"Parquet files of {REPOSITORY} ({REVISION}), or look for others: "
            f"https://huggingface.co/datasets/{repository}/tree/main"
        ) from error
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"--source {repository} is no folder on this machine, and no data set on the hub that you may read: "
            f"{_first_line(error)}. Check the name. For a private data set, run: hf auth login"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"The Hugging Face hub answers with an error: {_first_line(error)}. {alternatives}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so nothing is downloaded, and {huggingface_hub.constants.HF_HUB_CACHE} does not "
            f"hold all Parquet files of {repository} at {revision}. Unset it. {alternatives}"
        ) from error
    except Exception as error:  # any error of huggingface_hub's HTTP client
        raise UserError(
            f"The Hugging Face hub cannot be reached ({type(error).__name__}: {_first_line(error)}). {alternatives}"
        ) from error
    files = info.siblings or []
    return {file.rfilename: file.size or 0 for file in files if file.rfilename.endswith(".parquet")}, str(info.sha)


def fetch_all(fetch: Callable[[str], Path], names: Sequence[str]) -> list[Path]:
    """`fetch` each name, DOWNLOADS at a time. After an error running downloads finish, and none begins.

    Daemon threads, because after Ctrl-C a ThreadPoolExecutor would wait for all running downloads.
    """
    todo = iter(list(names))  # shared by the threads
    paths = {}

    def work() -> None:
        try:
            for name in todo:
                paths[name] = fetch(name)
        finally:
            list(todo)  # after an error no other download begins

    try:
        threads = [in_daemon(work) for _ in range(min(DOWNLOADS, len(names)))]
        for thread in concurrent.futures.wait(threads).done:
            thread.result()
    finally:
        list(todo)
    return [paths[name] for name in names]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
