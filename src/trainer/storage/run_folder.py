"""The folder of a run: created atomically, written by one process at a time, without incomplete lines.

    config.yaml  metrics.jsonl  events.jsonl  summary.json  train.log  checkpoints/  events.out.tfevents.*

The folder is created under a hidden name beside its path, with its config and the checkpoint of step 0, and then
renamed. So every run folder that exists can be resumed.
"""

import datetime
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from core.config import Config
from core.durable import hidden_name, remove_leftovers, sync_folder, write_durably
from core.errors import CheckpointError, StorageError
from core.json_lines import read_lines, without_nonfinite
from core.options.declarations import TrainConfig
from core.regular_files import append_regular
from core.run_config import read_summary
from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder
from trainer.storage.lock import lock_or_refuse, take_lock
from trainer.storage.provenance import now

LOGS = ("metrics.jsonl", "events.jsonl")
MOST_CHARACTERS = 150  # of the name in a default path: file systems allow 255 bytes
UNFINISHED = re.compile(r"^\..+\.[0-9a-f]{8}\.new$")


def chosen_path(config: Config[TrainConfig], *, name: str | None = None) -> Path:
    """Return the path of a new run: `run_dir`, with a subfolder for each job of a grid (-m), or the default path.

    The default name ends with `name`, or the run's name, and the options in which the jobs of a grid differ.
    """
    values = config.values
    if values["run_dir"] is not None:
        return Path(values["run_dir"]) if config.job is None else Path(values["run_dir"]) / str(config.job)
    choices = values["choices"]
    pairs = [item.partition("=")[::2] for item in config.varied]
    varied = [
        f"{key.rpartition('.')[2]}_{value.strip('[]{} ')}" for key, value in pairs if key not in ("model", "data")
    ]
    return default_path("-".join([name or values["name"] or f"{choices['model']}-{choices['data']}", *varied]))


def default_path(name: str) -> Path:
    """Return outputs/<date>_<time>-<name>, with a number appended if this path exists."""
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:MOST_CHARACTERS]
    base = Path("outputs") / f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}-{clean}"
    taken = (base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))
    return base if not base.exists() else next(path for path in taken if not path.exists())


class RunFolder:
    """The files of one run. `create` and `open` lock the folder and return this object; `close` unlocks it."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self._lock = lock

    @classmethod
    def create(cls, path: Path, *, record: Mapping[str, Any], first: Snapshot) -> "RunFolder":
        """Create the folder of a new run, with its config and the checkpoint of step 0.

        Raises StorageError if the path exists or cannot be written.
        """
        refuse_existing(path)
        unfinished = path.parent / hidden_name(path.name, "new")
        lock = -1
        try:
            with _creation_lock(path.parent):
                (unfinished / "checkpoints").mkdir(parents=True)
                for name in LOGS:  # empty: the files exist on the disk before a checkpoint counts their lines
                    write_durably(unfinished / name)
                write_durably(unfinished / "config.yaml", yaml.safe_dump(dict(record), sort_keys=False).encode())
                CheckpointFolder(unfinished / "checkpoints").save(["last"], first, keep={})
                lock = take_lock(unfinished)
                # If another process has created `path` meanwhile, rename fails, as that folder is not empty.
                unfinished.rename(path)
                sync_folder(path.parent)
        except OSError as exception:
            if lock >= 0:
                os.close(lock)
            refuse_existing(path)
            raise StorageError(str(path), f"cannot be created: {exception.strerror}") from exception
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return cls(path, lock)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of a run to resume it, and remove leftovers of killed processes.

        Raises CheckpointError if it is not a run folder, and InUse if another process has its lock.
        """
        checkpoints = path / "checkpoints"
        if not checkpoints.is_dir():  # checked before a lock file is created in it
            raise CheckpointError(str(path), "no such run folder: there are no checkpoints")
        if checkpoints.is_symlink():  # it may lead to another run, whose lock is not taken
            raise CheckpointError(str(checkpoints), "is a link: must be a real folder of this run")
        lock = take_lock(path)
        for folder in (path, path / "checkpoints"):
            remove_leftovers(folder)
        return cls(path, lock)

    def close(self) -> None:
        """Release the lock of the folder."""
        os.close(self._lock)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; it is on the disk when this returns, before the next checkpoint."""
        self._append("metrics.jsonl", line)

    def append_event(self, kind: str, **details: Any) -> None:
        """Append a line to events.jsonl, for example a warning or a resume, with the local time."""
        self._append("events.jsonl", {"time": now(), "event": kind, **details})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        append_regular(self.path / name, json.dumps(without_nonfinite(line), allow_nan=False) + "\n", sync=True)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without an incomplete last line."""
        return [line for line in read_lines(self.path / "metrics.jsonl") if type(line.get("step")) is int]

    def rewind(self, step: int) -> None:
        """Remove metrics of steps after `step`, incomplete last lines, and summary.json.

        `step` is the last evaluation of the state that is resumed.
        """
        metrics = [line for line in self.metrics() if line["step"] <= step]
        events = read_lines(self.path / "events.jsonl")
        for name, kept in zip(LOGS, (metrics, events), strict=True):
            write_durably(self.path / name, "".join(json.dumps(line) + "\n" for line in kept).encode())
        (self.path / "summary.json").unlink(missing_ok=True)  # it describes the end of the run before it was resumed

    def write_config(self, record: Mapping[str, Any]) -> None:
        """Replace config.yaml, after a resume that changes an option."""
        write_durably(self.path / "config.yaml", yaml.safe_dump(dict(record), sort_keys=False).encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, with null for NaN and infinity; after a kill, the file is complete or unchanged."""
        content = json.dumps(without_nonfinite(dict(summary)), indent=2, allow_nan=False) + "\n"
        write_durably(self.path / "summary.json", content.encode())

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, or {} if it does not exist or is damaged."""
        return read_summary(self.path)


def refuse_existing(path: Path) -> None:
    """Raise StorageError if the path of a new run exists, or InUse, which names the process, if a process uses it."""
    if not (path.exists() or path.is_symlink()):
        return
    with suppress(FileNotFoundError, NotADirectoryError):
        lock = os.open(path / ".lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock_or_refuse(lock, path)
        finally:
            os.close(lock)
    raise StorageError(str(path), f"exists already; continue it with resume={path}, or choose another run_dir")


@contextmanager
def _creation_lock(folder: Path) -> Iterator[None]:
    """Hold a lock while a run is created in `folder`; the only holder first removes leftovers of killed processes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # another process creates a run in this folder, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.iterdir():
                if UNFINISHED.match(path.name):
                    shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
