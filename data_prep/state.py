"""The state of a data folder during its preparation, from which an interrupted preparation resumes.

The hidden folder `.preparation` of the data folder holds

    lock             held while a process works on the folder
    settings.json    the settings that determine the bytes of the shards; a resumed run must have the same
    progress.json    the progress of the shards (`Progress`), saved after their content was flushed to the disk
    tokenizer.json   until the shards are complete

Each file is whole or absent. On resume, the shards are truncated to the sizes in progress.json.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.encoding import Tally
from hgpt.data.baselines import training_counts
from hgpt.data.shards import META_FILE, PART_FILE, SPLITS, UNFINISHED_FOLDER, ShardRecord, TokenShards, from_json
from hgpt.durable import folder_lock, read_json, whole_file
from hgpt.errors import UserError

AGAIN = "Begin again with another --out."


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of the shards.

    Attributes:
        units: number of units whose tokens are in the shards.
        tally: their statistics.
        shards: complete shards of each split.
        unfinished: tokens in each split's incomplete shard.
    """

    units: int = 0
    tally: Tally = field(default_factory=Tally)
    shards: dict[str, list[ShardRecord]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    unfinished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


class Preparation(AbstractContextManager["Preparation"]):
    """The data folder `out`; as a context manager it holds the folder's lock.

    `out` is created if it does not exist. Otherwise it must hold an interrupted preparation, or only names that
    `may_hold` accepts. If the context ends before progress was saved, everything it created is removed. An OSError
    inside the context becomes a UserError. `complete`: an earlier run was killed before `finish`, with all else done.

    Raises:
        UserError: any other folder, a finished one, or one that another process is preparing.
    """

    def __init__(self, out: Path, may_hold: Callable[[str], bool] = lambda name: False) -> None:
        self.out = out
        self.folder = out / UNFINISHED_FOLDER
        self._may_hold = may_hold
        self._settings = self.folder / "settings.json"
        self._progress = self.folder / "progress.json"
        self._made: list[Path] = []
        self._lock = ExitStack()

    def __enter__(self) -> "Preparation":
        try:
            self._check_content()
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            busy = (
                f"--out {self.out}: another process is preparing data in this folder. Wait for it, or end it; its "
                "finished work is kept."
            )
            self._lock.enter_context(folder_lock(self.folder / "lock", busy))
            if not (self.folder / "lock").exists():  # the process that held it has finished, and removed it
                raise UserError(busy)
        except (OSError, ValueError) as error:  # ValueError: NUL in the name
            self._remove_created()
            raise UserError(
                f"--out {self.out} cannot be written: {getattr(error, 'strerror', error)}. Choose another folder, or "
                "change its permissions."
            ) from error
        self.complete = self._is_complete()
        return self

    def _is_complete(self) -> bool:
        return any((self.out / name).exists() for name in (META_FILE, PART_FILE))

    def _check_content(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; it must be a folder, new or empty.")
        if not self.out.is_dir() or self.folder.is_dir():
            return
        names = sorted(path.name for path in self.out.iterdir() if not self._may_hold(path.name))
        if META_FILE in names or PART_FILE in names:
            raise UserError(
                f"--out {self.out} already holds prepared data, with other settings. Nothing is overwritten: choose "
                "another folder."
            )
        if names:
            raise UserError(
                f"--out {self.out} is not empty (it holds {names[0]}{', ...' if len(names) > 1 else ''}), and "
                "there is no preparation in it to resume. Choose another folder."
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._progress.exists() and not self._is_complete():
            shutil.rmtree(self.folder, ignore_errors=True)
            for pattern in (f"{split}_*.bin" for split in SPLITS):
                for path in [*self.out.glob(pattern), *self.out.glob(f".{pattern}.*")]:
                    path.unlink(missing_ok=True)
            self._remove_created()
        self._lock.close()
        if isinstance(error, OSError):  # from writing: errors of reading the source have become UserErrors
            raise UserError(
                f"Writing to {self.out} failed: {error.strerror or error}. Remove the cause (if the disk is full, free "
                "space) and run the same command: it resumes."
            ) from error

    def _remove_created(self) -> None:
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def begun(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All settings of the earlier run, {} if there is none. Raises UserError if one of `settings` differs."""
        if not self._settings.exists():
            return {}
        begun: dict[str, Any] = _read(dict[str, Any], self._settings)
        for name, value in settings.items():
            if begun.get(name) != value:
                raise UserError(
                    f"--out {self.out} holds a preparation that was begun with another {name}: "
                    f"{begun.get(name)!r}, now {value!r}. Use the same, or choose another folder."
                )
        return begun

    def begin(self, settings: dict[str, Any]) -> None:
        """Record the settings that determine the bytes. Raises UserError if those of an earlier run differ."""
        begun = self.begun({})
        self.begun({**dict.fromkeys(begun), **settings})
        if not begun:
            self._write(self._settings, settings)

    def save(self, progress: Progress) -> None:
        """Record `progress`. The shards must be flushed to the disk before."""
        self._write(self._progress, asdict(progress))

    def progress(self) -> Progress:
        """The last saved progress."""
        if not self._progress.exists():
            return Progress()
        progress: Progress = _read(Progress, self._progress)
        if not progress.shards.keys() == progress.unfinished.keys() == progress.tally.counts.keys() == set(SPLITS):
            raise UserError(f"{self._progress} is damaged: it must have the splits {SPLITS}. {AGAIN}")
        return progress

    def finish(self) -> None:
        """Count the training tokens, and remove the state. meta.json (or part.json) must have been written before."""
        if (self.out / META_FILE).exists():
            training_counts(TokenShards.open(self.out, "train"))  # writes them into the folder
        shutil.rmtree(self.folder)

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=2))


def _read(kind: Any, path: Path) -> Any:
    return from_json(kind, read_json(path, AGAIN), str(path), AGAIN)
