"""Index of an image cache: what each image file was like when its pixels were cached.

    one line of JSON    number of rows, bad images, hash of the bytes below and of the bad images
    int64 (N, 3)        size, modification time and change time of the file (ns)
    uint8 (N, 16)       hash of its content
    uint32 (N,)         CRC-32 of its pixels in the cache

It takes 44 bytes per image. The change time is part of it because users cannot set it: a file that was replaced by one
of the same size and modification time is detected.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from core.durable import write_durably
from core.errors import DataError
from core.regular_files import open_regular
from data.loading.parcels import bytes_of
from data.sources.decode import with_retries

CONTENT_BYTES = 16  # of the hash of a file
MAX_HEADER = 2**30  # bytes of the line with the bad images
Facts = tuple[int, int, int]


class DamagedCache(Exception):
    """A file of a cache whose content is not what was written."""


class UnusableRow(Exception):
    """Cached pixels that are damaged, or that an older version of the image file gave."""


@dataclass(frozen=True)
class Index:
    """What each image file was like when its pixels were cached."""

    facts: Tensor  # int64 (N, 3)
    contents: Tensor  # uint8 (N, 16)
    checksums: Tensor  # int32 (N,): the bits of a uint32
    bad: dict[int, str]  # row -> why its image could not be decoded

    @classmethod
    def empty(cls, rows: int) -> "Index":
        """Return an index of zeros."""
        return cls(
            facts=torch.zeros(rows, 3, dtype=torch.int64),
            contents=torch.zeros(rows, CONTENT_BYTES, dtype=torch.uint8),
            checksums=torch.zeros(rows, dtype=torch.int32),
            bad={},
        )

    def check_file(self, row: int, path: Path) -> None:
        """Raise UnusableRow if the content of a file is not the one that was cached.

        The content is read only if the size or the times differ. A file that cannot be found passes: it was there when
        the run listed its files.
        """
        try:
            is_same = self.has_facts(row, facts_of(path))
        except OSError:
            return
        if not is_same:
            try:
                is_same = with_retries(path, content_of) == self.contents[row].numpy().tobytes()
            except DataError as error:
                raise UnusableRow(error.explanation) from None
            if not is_same:
                raise UnusableRow("its file was changed after it was cached")

    def has_facts(self, row: int, facts: Facts) -> bool:
        """Return whether the size and the times of a file are those in the index."""
        return bool(self.facts[row].tolist() == list(facts))


def facts_of(file: Path | int) -> Facts:
    """Return the size, modification time and change time of a file or descriptor. Raises OSError."""
    status = os.stat(file)  # noqa: PTH116  it may be a descriptor
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def content_of(file: BinaryIO) -> bytes:
    """Return the hash of an open file's content. Raises OSError."""
    file.seek(0)
    return hashlib.file_digest(cast(Any, file), "sha256").digest()[:CONTENT_BYTES]


def read_index(path: Path, *, rows: int) -> Index:
    """Read an index of this many rows. Raises DamagedCache, or OSError if it cannot be read."""
    index = Index.empty(rows)
    with open_regular(path) as file:
        line = file.readline(MAX_HEADER)
        complete = all(cast(Any, file).readinto(part) == len(part) for part in _parts(index)) and not file.read(1)
    try:
        header = json.loads(line)
        index.bad.update({int(row): str(reason) for row, reason in header["bad"].items()})
        is_right = complete and header["rows"] == rows and header["digest"] == _digest(index)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_right = False
    if not is_right:
        raise DamagedCache(f"{path.name} is not as it was written")
    return index


def write_index(path: Path, index: Index) -> None:
    """Write an index durably. Raises StorageError."""
    header = {"rows": len(index.facts), "bad": index.bad, "digest": _digest(index)}
    write_durably(path, json.dumps(header).encode() + b"\n", *_parts(index))


def _parts(index: Index) -> list[memoryview]:
    return [bytes_of(part) for part in (index.facts, index.contents, index.checksums)]


def _digest(index: Index) -> str:
    digest = hashlib.blake2b(repr(sorted(index.bad.items())).encode(), digest_size=16)
    for part in _parts(index):
        digest.update(part)
    return digest.hexdigest()
