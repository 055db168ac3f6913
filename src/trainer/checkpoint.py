"""Checkpoints: tensors and plain values in a safetensors file that is complete or not there.

    checkpoints/{last,best,step}-<step, 8 digits>-<first 16 hex digits of the content's sha256>.safetensors

Bytes first, in memory; then a temporary file in the same folder, fsync, read back, rename, fsync of the folder.
Only then may an older generation go. There is no pointer file: the newest file whose content matches the hash in its
name wins. Nothing is pickled, and a file is recognised by its hash before its content is parsed.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from core.errors import CheckpointError, SecurityError, StorageError

FORMAT = 1  # of the values in a checkpoint; a reader refuses a newer one
METADATA_KEY = "preceptor"  # one key: safetensors writes several in any order, and the hash must be reproducible
NAME = re.compile(r"^(last|best|step)-(\d{8,})-([0-9a-f]{16})\.safetensors$")


@dataclass(frozen=True)
class Snapshot:
    """A run's state at a commit point: tensors by dotted name, and plain values (JSON)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return self.values["step"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it: `part("model")` is the network's state_dict."""
        start = prefix + "."
        return {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state_dict to evaluate with: the moving average where there is one."""
        return self.part("ema") or self.part("model")


def pack(snapshot: Snapshot) -> bytes:
    """A snapshot as the bytes of a safetensors file; equal snapshots give equal bytes."""
    values = json.dumps({"format": FORMAT, **snapshot.values}, sort_keys=True)
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in sorted(snapshot.tensors.items()):
        tensors[name] = tensor.detach().contiguous().cpu()
        if (place := tensors[name].untyped_storage().data_ptr()) in memory:
            tensors[name] = tensors[name].clone()  # tied weights: safetensors refuses tensors that share memory
        memory.add(place)
    return safetensors.torch.save(tensors, metadata={METADATA_KEY: values})


def unpack(content: bytes, *, source: Path) -> Snapshot:
    """The snapshot in a file's bytes; `source` is named in errors."""
    refuse_foreign_format(content[:16], source)
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        values = json.loads(header["__metadata__"][METADATA_KEY])
    except (SafetensorError, ValueError, KeyError) as exception:
        raise CheckpointError(str(source), f"not a checkpoint of ours: {exception!r}") from None
    if values.get("format") != FORMAT:
        raise CheckpointError(str(source), f"format {values.get('format')}; this version reads format {FORMAT}")
    return Snapshot(tensors, values)


def refuse_foreign_format(head: bytes, source: Path) -> None:
    """Refuse what can carry code by its first bytes; in safetensors eight bytes of length come first, then JSON."""
    if head[8:9] != b"{":
        raise SecurityError(str(source), "not safetensors; pickle, torch.save and zip files are never opened")


def digest(content: bytes) -> str:
    """The part of the content's sha256 that stands in a checkpoint's name."""
    return hashlib.sha256(content).hexdigest()[:16]


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
        """What is there of these kinds, newest first."""
        names = self.path.iterdir() if self.path.is_dir() else iter(())
        found = [file for name in names if (file := CheckpointFile.parse(name))]
        return sorted((file for file in found if file.kind in kinds), reverse=True)

    def save(self, kinds: list[str], snapshot: Snapshot, *, keep: Mapping[str, int | None]) -> list[CheckpointFile]:
        """Write a snapshot under each of `kinds`, then drop what is older than the `keep` newest of that kind."""
        content = pack(snapshot)
        saved: list[CheckpointFile] = []
        for kind in kinds:
            name = f"{kind}-{snapshot.step:08d}-{digest(content)}.safetensors"
            write_durably(self.path / name, content)
            file = CheckpointFile.parse(self.path / name)
            saved += [file] if file else []
        for kind in kinds:
            limit = keep.get(kind)
            for old in self.files(kind)[limit:] if limit else []:
                old.path.unlink(missing_ok=True)
        return saved

    def load(self, *kinds: str) -> tuple[Snapshot, Path, list[str]]:
        """The newest checkpoint of these kinds whose content matches its name, and what was wrong with newer ones.

        Raises CheckpointError when there is none: a run never starts over by itself.
        """
        damaged: list[str] = []
        for file in self.files(*kinds):
            content = file.path.read_bytes()
            if digest(content) == file.hash:
                return unpack(content, source=file.path), file.path, damaged
            damaged.append(f"{file.path.name} ({len(content)} bytes) does not match the hash in its name")
        raise CheckpointError(str(self.path), "no usable checkpoint; " + ("; ".join(damaged) or "there is none"))


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the whole of it or nothing: temporary, fsync, read back, replace, fsync."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != content:
            raise StorageError(str(path), "what was read back differs from what was written")
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as exception:
        raise StorageError(str(path), f"cannot write {len(content):,} bytes: {exception.strerror}") from exception
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """The weights in any safetensors file: one of ours, or a plain state_dict from elsewhere."""
    try:
        content = path.read_bytes()
    except OSError as exception:
        raise CheckpointError(str(path), f"cannot be read: {exception.strerror}") from None
    refuse_foreign_format(content[:16], path)
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as exception:
        raise CheckpointError(str(path), f"not a safetensors file: {exception}") from None
    return Snapshot(tensors, {}).weights or tensors
