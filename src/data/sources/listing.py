"""Image files below a folder: listed without a stat per file, and kept as packed bytes.

A million `Path` objects take 400 MB, and 7 s to send to a loader worker; packed, the same names take 40 MB.
"""

import heapq
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Endings of the formats that `data.sources.decode` reads.
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# Folders that operating systems, file servers and archives add; most of them hold copies or previews of images.
SYSTEM_FOLDERS = frozenset({b"@eadir", b"__macosx", b"$recycle.bin", b"system volume information", b"lost+found"})
SYSTEM_FILES = frozenset({b"thumbs.db", b"desktop.ini"})

_ENDINGS = frozenset(suffix.encode() for suffix in SUFFIXES)
_DOT = b"."[0]
_MAX_EXAMPLES = 3  # names or endings of skipped files in a warning


class PackedPaths(Sequence[Path]):
    """Paths in one folder as a tensor of bytes, which loader workers share. `take` shares it too."""

    def __init__(self, folder: Path, names: Iterable[bytes]) -> None:
        """Pack names relative to `folder`."""
        packed = _Packer()
        packed.add(list(names))
        self._set(folder, *packed.tensors())

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "PackedPaths":
        """Pack any paths."""
        return cls(Path(), map(os.fsencode, paths))

    @classmethod
    def packed(cls, folder: Path, characters: Tensor, starts: Tensor) -> "PackedPaths":
        """Return paths whose names are `characters[starts[i] : starts[i + 1]]`, uint8 and int64 (N + 1,)."""
        paths = cls.__new__(cls)
        paths._set(folder, characters, starts)
        return paths

    def _set(self, folder: Path, characters: Tensor, starts: Tensor, rows: Tensor | None = None) -> None:
        self.folder, self.characters, self.starts = folder, characters, starts
        self.rows = rows  # int32 (N,): which of the packed names; None: all

    def take(self, indices: Tensor) -> "PackedPaths":
        """Return the paths at these positions."""
        paths = PackedPaths.__new__(PackedPaths)
        rows = indices.to(torch.int32) if self.rows is None else self.rows[indices]
        paths._set(self.folder, self.characters, self.starts, rows)
        return paths

    def update(self, digest: Any) -> None:
        """Add the names and their order to a digest of hashlib. The folder does not change it."""
        digest.update(self.starts.numpy())
        digest.update(self.characters.numpy())
        if self.rows is not None:
            digest.update(self.rows.numpy())

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        row = position if self.rows is None else int(self.rows[position])
        name = self.characters[self.starts[row] : self.starts[row + 1]].numpy().tobytes()
        return self.folder / os.fsdecode(name)


class _Packer:
    """Collects names as bytes; the names themselves are not kept."""

    def __init__(self) -> None:
        self._characters, self._sizes = bytearray(), [np.zeros(1, dtype=np.int64)]

    def add(self, names: Sequence[bytes]) -> None:
        self._characters += b"".join(names)
        self._sizes.append(np.fromiter(map(len, names), dtype=np.int64, count=len(names)))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the bytes, uint8, and where each name starts, int64 (N + 1,)."""
        starts = np.concatenate(self._sizes)
        np.cumsum(starts, out=starts)
        return torch.frombuffer(self._characters or bytearray(1), dtype=torch.uint8), torch.from_numpy(starts)


@dataclass
class Skipped:
    """Files and folders that a listing leaves out, counted by reason, with a few names or endings."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, reason: str, example: bytes) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, {})
        if len(examples) <= _MAX_EXAMPLES:
            examples[os.fsdecode(example)] = None

    def __str__(self) -> str:
        """Return text such as `5 files or folders skipped: 3 hidden (.DS_Store), 2 of another format (.heic, .txt)`."""
        reasons = []
        for reason, count in self.counts.most_common():
            examples = list(self.examples[reason])
            shown = ", ".join(sorted(examples[:_MAX_EXAMPLES])) + (", ..." if len(examples) > _MAX_EXAMPLES else "")
            reasons.append(f"{count:,} {reason} ({shown})")
        total = sum(self.counts.values())
        return f"{total:,} file{'s' * (total > 1)} or folder{'s' * (total > 1)} skipped: {', '.join(reasons)}"


def pack_class_folders(folder: Path, class_names: Sequence[str], skipped: Skipped) -> tuple[PackedPaths, list[int]]:
    """Return the image files of class folders, class after class, each class sorted; and their number per class."""
    packed, counts = _Packer(), []
    for class_name in class_names:
        names = image_names(folder / class_name, skipped)
        prefix = os.fsencode(class_name) + b"/"
        packed.add([prefix + name for name in names])
        counts.append(len(names))
    return PackedPaths.packed(folder, *packed.tensors()), counts


def is_skipped_folder(name: bytes) -> bool:
    """Return whether a folder is hidden or added by a system."""
    return name.startswith(b".") or name.lower() in SYSTEM_FOLDERS


def image_files(folder: Path, skipped: Skipped) -> list[Path]:
    """Return the image files below a folder, sorted by their path in it."""
    return [folder / os.fsdecode(name) for name in image_names(folder, skipped)]


def image_names(folder: Path, skipped: Skipped) -> list[bytes]:
    """Return the names of the image files below a folder, relative to it and sorted.

    Hidden and system files and folders are skipped. Links are followed; a folder that was read already is skipped, so
    links that form a loop end. Raises OSError if a folder cannot be read.
    """
    names: list[bytes] = []
    visited: set[tuple[int, int]] = set()
    root = os.fsencode(folder)
    folders: list[bytes] = [b""]  # prefixes of the names in them
    links: list[bytes] = []
    while folders or links:
        # Real folders come before links, and links in sorted order: the result must not depend on the file system.
        prefix = folders.pop() if folders else heapq.heappop(links)
        status = os.stat(root + b"/" + prefix)  # noqa: PTH116  bytes
        if (status.st_dev, status.st_ino) in visited:
            skipped.add("reached twice by links", prefix[:-1])
            continue
        visited.add((status.st_dev, status.st_ino))
        linked, own = _read_folder(root + b"/" + prefix, prefix, names, skipped)
        folders += own
        for link in linked:
            heapq.heappush(links, link)
    names.sort()
    return names


def _read_folder(path: bytes, prefix: bytes, names: list[bytes], skipped: Skipped) -> tuple[list[bytes], list[bytes]]:
    """Add the image files of one folder to `names`; return its folders that are links, and its real folders."""
    linked: list[bytes] = []
    own: list[bytes] = []
    images: list[bytes] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            ending = name[name.rfind(b".") :].lower()
            # The kind of an entry is part of the listing: only a link needs a stat.
            if ending in _ENDINGS and name[0] != _DOT and entry.is_file():
                images.append(name)
            elif entry.is_dir():
                if is_skipped_folder(name):
                    skipped.add("hidden or of the system", name)
                else:
                    (linked if entry.is_symlink() else own).append(prefix + name + b"/")
            elif name[0] == _DOT or name.lower() in SYSTEM_FILES:
                skipped.add("hidden or of the system", name)
            elif ending not in _ENDINGS:
                skipped.add("of another format", ending if b"." in name else name)
            else:
                skipped.add("dangling links" if entry.is_symlink() else "neither file nor folder", name)
    names += [prefix + name for name in images] if prefix else images
    return linked, own
