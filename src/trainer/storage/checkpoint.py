"""Checkpoints: tensors and plain values in a safetensors file that is complete or not there.

    checkpoints/{last,best,step}-<step, 8 digits>-<first 16 hex digits of the content's sha256>.safetensors

Bytes first, in memory; then the file, durably (`core.durable`); only then may an older generation go. There is no
pointer file: the newest file whose content matches the hash in its name wins. Nothing is pickled, and a file is
recognised by its hash before its content is parsed.
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
from trainer.storage.safetensors_file import read_header, written

FORMAT = 4  # of what is in a checkpoint; any other is refused
METADATA_KEY = "preceptor"  # one key: safetensors writes several in any order, and the hash must be reproducible
NAME = re.compile(r"^(last|best|step)-(\d{8,})-([0-9a-f]{16})\.safetensors$")


def pack(snapshot: Snapshot) -> list[bytes | memoryview]:
    """A snapshot as the parts of a safetensors file; equal snapshots give equal bytes."""
    values = json.dumps({"format": FORMAT, **snapshot.values}, sort_keys=True)
    return written(snapshot.tensors, metadata={METADATA_KEY: values})


def unpack(content: bytes, *, source: Path) -> Snapshot:
    """The snapshot in a file's bytes; `source` is named in errors."""
    header = read_header(content, source=source)
    try:
        tensors = safetensors.torch.load(content)
        values = json.loads(header["__metadata__"][METADATA_KEY])
    except (SafetensorError, ValueError, KeyError, RecursionError) as exception:
        raise CheckpointError(str(source), f"not a checkpoint of Preceptor: {exception!r}") from None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise CheckpointError(str(source), "not a checkpoint of Preceptor: it names no step")
    if values.get("format") != FORMAT:
        raise CheckpointError(str(source), f"format {values.get('format')}; this version reads format {FORMAT}")
    return Snapshot(tensors, values)


def digest(*content: bytes | memoryview) -> str:
    """The part of the content's sha256 that stands in a checkpoint's name."""
    found = hashlib.sha256()
    for part in content:
        found.update(part)
    return found.hexdigest()[:16]


@dataclass(frozen=True, order=True)
class CheckpointFile:
    """A checkpoint's name, taken apart; the order is by step."""

    step: int
    kind: str
    hash: str
    path: Path

    @classmethod
    def parse(cls, path: Path) -> "CheckpointFile | None":
        """None for a file of another name."""
        match = NAME.match(path.name)
        return match and cls(step=int(match[2]), kind=match[1], hash=match[3], path=path)


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self, *kinds: str) -> list[CheckpointFile]:
        """Return the checkpoints of these kinds, newest first."""
        names = self.path.iterdir() if self.path.is_dir() else iter(())
        found = [file for name in names if (file := CheckpointFile.parse(name))]
        return sorted((file for file in found if file.kind in kinds), reverse=True)

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> list[CheckpointFile]:
        """Write a snapshot, give it a name for each of `kinds`, and drop what is older than the `keep` newest of each.

        The names come in the order given, each on the disk before the next.
        """
        content = pack(snapshot)
        name = digest(*content)
        saved: list[CheckpointFile] = []
        for kind in kinds:
            path = self.path / f"{kind}-{snapshot.step:08d}-{name}.safetensors"
            if saved:
                try:
                    link_durably(saved[0].path, path)
                except OSError:  # a file system without links
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
        """The newest checkpoint of these kinds whose content matches its name, and what was wrong with newer ones.

        Of two of one step, which a kill between a save and the end of the older one leaves, that which was evaluated.
        Raises CheckpointError when there is none: a run never starts over by itself.
        """
        files = self.files(*kinds)
        while True:
            try:
                return self._newest_good(files)
            except CheckpointError:
                listed, files = files, self.files(*kinds)
                if files == listed:  # else a process that is saving has replaced them meanwhile
                    raise

    def _newest_good(self, files: list[CheckpointFile]) -> tuple[Snapshot, Path, dict[Path, str]]:
        damaged: dict[Path, str] = {}
        for _, same_step in groupby(files, key=lambda file: file.step):
            good: dict[str, tuple[Snapshot, Path]] = {}
            for file in same_step:
                if file.hash in good:  # another name for it
                    continue
                try:
                    content = read_regular(file.path, follow=False)
                except FileNotFoundError:  # replaced by a process that is saving
                    continue
                except OSError as exception:  # a bad sector, or no regular file
                    damaged[file.path] = f"{file.path.name} cannot be read: {exception.strerror}"
                    continue
                if digest(content) == file.hash:
                    good[file.hash] = unpack(content, source=file.path), file.path
                else:
                    what = f"({len(content)} bytes) does not match the hash in its name"
                    damaged[file.path] = f"{file.path.name} {what}"
            if good:
                found, path = max(good.values(), key=lambda pair: pair[0].values.get("evaluated", 0))
                return found, path, damaged
        reasons = "; ".join(damaged.values()) or "there is none"
        raise CheckpointError(str(self.path), f"no usable checkpoint; {reasons}")


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Return the weights in a safetensors file: a checkpoint, or a plain state_dict from elsewhere."""
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
