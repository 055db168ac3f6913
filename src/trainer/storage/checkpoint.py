"""Checkpoints: tensors and plain values in a safetensors file that is complete or does not exist.

    checkpoints/{last,best,step}-<step, 8 digits>-<first 16 hex digits of the content's sha256>.safetensors

The content is serialised in memory, then written durably (`core.durable`). Only then are older checkpoints deleted.
There is no pointer file: `load` uses the newest file whose content matches the hash in its name. Nothing is pickled,
and the hash is checked before the content is parsed.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from core.durable import link_durably, write_durably
from core.errors import CheckpointError
from core.regular_files import read_regular
from trainer.snapshot import Snapshot
from trainer.storage.safetensors_file import read_header, serialise

FORMAT = 4  # version of a checkpoint's content; `unpack` refuses other versions
METADATA_KEY = "preceptor"  # the only metadata key: safetensors has no fixed order of keys, and the hash needs one
NAME = re.compile(r"^(last|best|step)-(\d{8,})-([0-9a-f]{16})\.safetensors$")


def pack(snapshot: Snapshot) -> list[bytes | memoryview]:
    """Return a snapshot as the parts of a safetensors file; equal snapshots give equal bytes."""
    values = json.dumps({"format": FORMAT, **snapshot.values}, sort_keys=True)
    return serialise(snapshot.tensors, metadata={METADATA_KEY: values})


def unpack(content: bytes, *, source: Path) -> Snapshot:
    """Return the snapshot in the content of a checkpoint file.

    Raises CheckpointError, which names `source`, if the content is not a checkpoint of this FORMAT, and SecurityError
    if it is not a safetensors file.
    """
    header = read_header(content, source=source)
    try:
        tensors = safetensors.torch.load(content)
        values = json.loads(header["__metadata__"][METADATA_KEY])
    except (SafetensorError, ValueError, KeyError, RecursionError) as exception:
        raise CheckpointError(str(source), f"not a checkpoint of Preceptor: {exception!r}") from None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise CheckpointError(str(source), "not a checkpoint of Preceptor: it has no integer `step`")
    if values.get("format") != FORMAT:
        raise CheckpointError(str(source), f"format {values.get('format')}; this version reads format {FORMAT}")
    return Snapshot(tensors, values)


def digest(*content: bytes | memoryview) -> str:
    """Return the first 16 hex digits of the content's sha256, as in the name of a checkpoint."""
    sha256 = hashlib.sha256()
    for part in content:
        sha256.update(part)
    return sha256.hexdigest()[:16]


@dataclass(frozen=True, order=True)
class CheckpointFile:
    """The parts of a checkpoint's file name; ordered by step."""

    step: int
    kind: str
    hash: str
    path: Path

    @classmethod
    def parse(cls, path: Path) -> "CheckpointFile | None":
        """Return the parts of a file name, or None if it is not the name of a checkpoint."""
        match = NAME.match(path.name)
        return match and cls(step=int(match[2]), kind=match[1], hash=match[3], path=path)


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self, *kinds: str) -> list[CheckpointFile]:
        """Return the checkpoints of these kinds, newest first; an empty list if the folder does not exist."""
        paths = self.path.iterdir() if self.path.is_dir() else iter(())
        files = [file for path in paths if (file := CheckpointFile.parse(path))]
        return sorted((file for file in files if file.kind in kinds), reverse=True)

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> list[CheckpointFile]:
        """Write a snapshot under one name for each of `kinds`, and return these files.

        The names are created in the order of `kinds`; each is on the disk before the next. Then all but the newest
        `keep[kind]` checkpoints of each of these kinds are deleted, and other checkpoints of this step. Without a
        number in `keep`, the checkpoints of other steps are kept. Raises OSError.
        """
        content = pack(snapshot)
        content_hash = digest(*content)
        saved: list[CheckpointFile] = []
        for kind in kinds:
            path = self.path / f"{kind}-{snapshot.step:08d}-{content_hash}.safetensors"
            if saved:
                try:
                    link_durably(saved[0].path, path)
                except OSError:  # the file system has no hard links
                    write_durably(path, *content)
            else:
                write_durably(path, *content)
            saved += [file] if (file := CheckpointFile.parse(path)) else []
        for file in saved:
            others = [old for old in self.files(file.kind) if old.step != file.step]
            same_step = [old for old in self.files(file.kind) if old.step == file.step and old != file]
            limit = keep.get(file.kind)
            for old in same_step + (others[limit - 1 :] if limit else []):
                os.unlink(old.path)  # noqa: PTH108  one system call
        return saved

    def load(self, *kinds: str) -> tuple[Snapshot, Path, dict[Path, str]]:
        """Return the newest undamaged checkpoint of these kinds, its path, and a message for each newer damaged file.

        A checkpoint is undamaged if its content matches the hash in its name. A kill between a save and the deletion
        of older files can leave two checkpoints of one step; the one with the later evaluation is returned. Raises
        CheckpointError if no checkpoint is usable: a run never restarts from step 0 on its own.
        """
        files = self.files(*kinds)
        while True:
            try:
                return self._newest_undamaged(files)
            except CheckpointError:
                previous, files = files, self.files(*kinds)
                if files == previous:  # if not, another process has replaced the files meanwhile: try again
                    raise

    def _newest_undamaged(self, files: list[CheckpointFile]) -> tuple[Snapshot, Path, dict[Path, str]]:
        damaged: dict[Path, str] = {}
        for _, same_step in groupby(files, key=lambda file: file.step):
            undamaged: dict[str, tuple[Snapshot, Path]] = {}  # by hash
            for file in same_step:
                if file.hash in undamaged:  # the same content under another name
                    continue
                try:
                    content = read_regular(file.path, follow=False)
                except FileNotFoundError:  # deleted by a process that has saved a newer one
                    continue
                except OSError as exception:  # for example a bad sector, or not a regular file
                    damaged[file.path] = f"{file.path.name} cannot be read: {exception.strerror}"
                    continue
                if digest(content) == file.hash:
                    undamaged[file.hash] = unpack(content, source=file.path), file.path
                else:
                    what = f"({len(content)} bytes) does not match the hash in its name"
                    damaged[file.path] = f"{file.path.name} {what}"
            if undamaged:
                snapshot, path = max(undamaged.values(), key=lambda pair: pair[0].values.get("evaluated", 0))
                return snapshot, path, damaged
        reasons = "; ".join(damaged.values()) or "there is none"
        raise CheckpointError(str(self.path), f"no usable checkpoint; {reasons}")


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Return the weights in a safetensors file: a checkpoint, or a state dict that another program saved.

    Raises CheckpointError if the file cannot be read or is damaged, and SecurityError for another format.
    """
    try:
        content = read_regular(path)
    except OSError as exception:
        raise CheckpointError(str(path), f"cannot be read: {exception.strerror}") from None
    read_header(content, source=path)
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as exception:
        raise CheckpointError(str(path), f"not a safetensors file: {exception}") from None
    return Snapshot(tensors, {}).weights or tensors
