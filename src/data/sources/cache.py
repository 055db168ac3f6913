"""Cache of decoded images: each file is decoded and resized once, and its pixels are read from then on.

    <key>.npy    uint8 (N, C, H, W): the pixels
    <key>.index  per image: size and times of its file, hash of its content, checksum of its pixels (cache_index.py)
    <key>.check  exists after a run found an outdated or damaged row: the next start checks all rows

The key is a hash of the rule that makes pixels of images, of their shape, and of the file names. So a folder that was
moved or copied keeps its cache, and one with other files gets another.

Opening a cache reads no image file. A row is checked when it is first read: the file's size and times must be those in
the index, or else its content must have the same hash; and the pixels must have their checksum. An image whose row
fails is decoded from its file, and the next start replaces the row. Pixels are read by `preadv`, not mapped into
memory: a map of a file that is truncated would kill the process (SIGBUS).
"""

import functools
import io
import logging
import os
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.regular_files import open_regular
from data.loading.parcels import bytes_of
from data.sources.cache_index import DamagedCache, Index, UnusableRow, read_index
from data.sources.decode import BadImage

log = logging.getLogger("preceptor.data")

Shape = tuple[int, int, int, int]  # (N, C, H, W)


class OpenFile:
    """A file descriptor that is closed together with this object."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


@dataclass(frozen=True)
class Cache:
    """Cached images, or some of them. A pickled cache holds the path of the pixels, and opens it again."""

    path: Path  # absolute: <key>.npy
    shape: Shape  # of all images in the file
    index: Index
    rows: Tensor  # int32 (N,): row of each image
    can_repair: bool
    checked: Tensor = field(repr=False)  # uint8 (rows of the file,): rows that were checked; shared by `take`
    file: OpenFile | None = field(repr=False)  # None: it could not be opened again

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with suppress(OSError, DamagedCache):
            self.__dict__["file"] = _open_pixels(self.path, self.shape)

    def take(self, indices: Tensor) -> "Cache":
        """Return the cache of the images at these positions."""
        return replace(self, rows=self.rows[indices])

    def read(self, position: int, path: Path, out: memoryview) -> None:
        """Read the pixels of one image into `out`. Raises BadImage or UnusableRow."""
        row = int(self.rows[position])
        is_first = not self.checked[row]
        if is_first:
            self.index.check_file(row, path)
        if row in self.index.bad:
            raise BadImage(str(path), self.index.bad[row])
        self._read_row(row, out)
        if is_first:
            if signed(zlib.crc32(out)) != int(self.index.checksums[row]):
                raise UnusableRow("its cached pixels are damaged")
            self.checked[row] = 1

    def read_all(self, positions: Tensor, paths: Sequence[Path]) -> Tensor | None:
        """Return the pixels of images, uint8 (B, C, H, W); None if `read` must be called for each of them."""
        pixels = torch.empty(len(positions), *self.shape[1:], dtype=torch.uint8)
        content, size = bytes_of(pixels), int(np.prod(self.shape[1:]))
        rows = self.rows[positions]
        try:
            if bool(self.checked[rows].all()):
                for number, row in enumerate(rows.tolist()):
                    self._read_row(row, content[number * size : (number + 1) * size])
            else:
                for number, position in enumerate(positions.tolist()):
                    self.read(position, paths[position], content[number * size : (number + 1) * size])
        except (BadImage, UnusableRow):
            return None
        return pixels

    def _read_row(self, row: int, out: memoryview) -> None:
        try:
            if self.file is not None:
                count = os.preadv(self.file.descriptor, [out], len(header_of(self.shape)) + row * len(out))
                if count == len(out):
                    return
            reason = "is shorter than it was" if self.file is not None else "cannot be opened"
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        raise UnusableRow(f"{self.path.name} {reason}")

    def request_check(self) -> None:
        """Let the next start check all rows."""
        if self.can_repair:
            with suppress(OSError):
                check_mark(self.path).touch()


def load_cache(path: Path, shape: Shape, *, can_repair: bool) -> Cache | None:
    """Return the cache at a path; None if there is none, or if it is damaged, with a warning."""
    if not path.exists() and not index_path(path).exists():
        return None
    try:
        index = read_index(index_path(path), rows=shape[0])
        return Cache(
            path=path,
            shape=shape,
            index=index,
            rows=torch.arange(shape[0], dtype=torch.int32),
            can_repair=can_repair,
            checked=torch.zeros(shape[0], dtype=torch.uint8),
            file=_open_pixels(path, shape),
        )
    except (DamagedCache, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        consequence = "a new one is created" if can_repair else "images are decoded from their files"
        log.warning(f"the image cache {path} is damaged ({reason}): {consequence}")
        return None


def _open_pixels(path: Path, shape: Shape) -> OpenFile:
    """Open the pixels of a cache. Raises DamagedCache if their header or length is not that of the shape."""
    header = header_of(shape)
    with open_regular(path) as file:
        if file.read(len(header)) != header:
            raise DamagedCache(f"its header is not that of uint8 {shape}")
        length, expected = os.fstat(file.fileno()).st_size, len(header) + int(np.prod(shape))
        if length != expected:
            raise DamagedCache(f"it has {length:,} bytes, not {expected:,}")
        return OpenFile(os.dup(file.fileno()))


@functools.cache
def header_of(shape: Shape) -> bytes:
    """Return the header of the .npy format for uint8 of this shape."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return content.getvalue()


def signed(checksum: int) -> int:
    """Return the int32 with the bits of a uint32."""
    return checksum - 2**32 if checksum >= 2**31 else checksum


def index_path(path: Path) -> Path:
    return path.with_suffix(".index")


def check_mark(path: Path) -> Path:
    return path.with_suffix(".check")
