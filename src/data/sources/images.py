"""Labelled images: in memory as uint8, or as files that are decoded on demand.

A file that can be read but contains no image, or an image of more than `max_pixels`, is bad. With `on_bad_image: error`
it ends the run. With `skip`, the next good image of the same class replaces it, in the order of the split, and from its
start again after its end. The replacement depends on the files alone, so it is the same in each worker and on resume.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from core.errors import DataError
from data.loading.parcels import bytes_of
from data.sources.cache import Cache
from data.sources.cache_creation import open_cache
from data.sources.cache_index import UnusableRow
from data.sources.decode import MAX_PIXELS, BadImage, decode
from data.sources.listing import PackedPaths

MAX_BAD_SHARE = 0.01  # share of a split's images that may be bad with `skip`; one is always allowed
PIECE = 64  # images that a thread reads before it takes the next piece, at most
log = logging.getLogger("preceptor.data")


@dataclass
class Problems:
    """Problems of single images, by their position in the split, for one warning each in the main process."""

    bad: dict[int, str] = field(default_factory=dict)  # another image of the class replaces it
    uncached: dict[int, str] = field(default_factory=dict)  # its cached pixels are unusable: decoded from its file

    def add(self, other: "Problems") -> None:
        self.bad |= other.bad
        self.uncached |= other.uncached


@dataclass(frozen=True)
class Files:
    """Image files. Image i is decoded, or read from the cache, when it is requested: uint8 (C, H, W)."""

    paths: PackedPaths
    _: KW_ONLY
    image_size: int
    channels: int
    on_bad_image: str = "error"
    max_pixels: int = MAX_PIXELS
    bits: int | None = None  # of the values in 16-bit files; None: 16
    caches: Mapping[int, Cache] = field(default_factory=dict)  # by image_size
    known: Problems = field(default_factory=Problems, init=False)  # reported already

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index, Problems())

    def _read(self, index: int, problems: Problems) -> Tensor:
        """Return one image. Raises BadImage."""
        path = self.paths[index]
        if self.cache is not None:
            pixels = torch.empty(self.shape[1:], dtype=torch.uint8)
            try:
                self.cache.read(index, path, bytes_of(pixels))
                return pixels
            except UnusableRow as error:
                problems.uncached[index] = str(error)
        size, channels = self.image_size, self.channels
        return decode(path, image_size=size, channels=channels, max_pixels=self.max_pixels, bits=self.bits)

    @property
    def cache(self) -> Cache | None:
        """The cache of these images at this size."""
        return self.caches.get(self.image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of all images, known without decoding."""
        return (len(self), self.channels, self.image_size, self.image_size)

    def take(self, indices: Tensor) -> "Files":
        """Return the files at these positions."""
        caches = {size: cache.take(indices) for size, cache in self.caches.items()}
        return replace(self, paths=self.paths.take(indices), caches=caches)

    def cached(self, indices: Tensor) -> Tensor | None:
        """Return the cached images (B, C, H, W); None if they are not cached, or if one of them is bad or unusable."""
        return None if self.cache is None else self.cache.read_all(indices, self.paths)

    def first_good(self, candidates: Iterable[int], problems: Problems) -> Tensor:
        """Return the first of these images that is not bad, and add the problems of those before it."""
        for index in candidates:
            if index in self.known.bad:
                continue
            try:
                return self._read(index, problems)
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise
                problems.bad[index] = error.explanation
                self._refuse_too_many(self.known.bad | problems.bad)
        raise DataError(str(self.paths[index]), "is bad, as are all other images of its class")

    def report(self, problems: Problems) -> None:
        """Log a warning for each new problem, in the main process. Too many bad images are an error."""
        for index, reason in problems.bad.items():
            if index not in self.known.bad:
                self.known.bad[index] = reason
                self._refuse_too_many(self.known.bad)
                log.warning(f"{self.paths[index]}: {reason}; replaced by another image of its class")
        if problems.uncached and self.cache is not None:
            if not self.known.uncached:
                index, reason = next(iter(problems.uncached.items()))
                consequence = "such images are decoded from their files"
                consequence += ", and the next run repairs the cache" * self.cache.can_repair
                log.warning(f"the image cache {self.cache.path}: {self.paths[index]}: {reason}; {consequence}")
                self.cache.request_check()
            self.known.uncached.update(problems.uncached)

    def _refuse_too_many(self, bad: dict[int, str]) -> None:
        most = max(1, int(MAX_BAD_SHARE * len(self)))
        if len(bad) > most:
            index, reason = list(bad.items())[-1]
            explanation = f"{reason}; {len(bad)} of {len(self)} images are unreadable; data.on_bad_image=skip allows"
            raise DataError(str(self.paths[index]), f"{explanation} {most}")


def with_cache(files: Files, folder: Path, *, create: bool = True) -> Files:
    """Return the same files with their cache of this size in a folder; it is created if missing and `create` is true.

    If it cannot be created, a warning gives the reason, and each image is decoded each time it is read.
    """
    cache = open_cache(
        files.paths,
        folder,
        shape=files.shape,
        max_pixels=files.max_pixels,
        bits=files.bits,
        skip_bad=files.on_bad_image == "skip",
        create=create,
    )
    return files if cache is None else replace(files, caches={**files.caches, files.image_size: cache})


@dataclass(frozen=True)
class Images:
    """A labelled set of images."""

    pixels: Tensor | Files  # uint8 (N, C, H, W), or files that are decoded to it
    labels: Tensor  # int64 (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Images":
        """Return the images at these positions, in this order."""
        chosen = self.pixels.take(indices) if isinstance(self.pixels, Files) else self.pixels[indices]
        return Images(pixels=chosen, labels=self.labels[indices])

    def load(self) -> Tensor:
        """Return all pixels, uint8 (N, C, H, W)."""
        return self.read(torch.arange(len(self))) if isinstance(self.pixels, Files) else self.pixels

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at these positions (B,), uint8 (B, C, H, W), and log problems.

        Threads read the files: Pillow's decoders and system calls release the GIL.
        """
        if isinstance(self.pixels, Tensor):
            return self.pixels[rows]
        pixels = torch.empty(len(rows), *self.pixels.shape[1:], dtype=torch.uint8)
        piece = min(PIECE, max(1, math.ceil(len(rows) / (4 * (os.cpu_count() or 1)))))
        pool = ThreadPoolExecutor()
        try:
            start = 0
            for images, problems in pool.map(self.fetch, rows.split(piece)):
                self.pixels.report(problems)
                pixels[start : start + len(images)] = images
                start += len(images)
        finally:
            pool.shutdown(cancel_futures=True)  # an error does not wait for the other pieces
        return pixels

    def fetch(self, rows: Tensor) -> tuple[Tensor, Problems]:
        """Return the images at these positions and their problems; runs in one thread, possibly of a worker process.

        The main process passes the problems to `report`.
        """
        problems = Problems()
        if isinstance(self.pixels, Tensor):
            return self.pixels.index_select(0, rows), problems  # faster than plain indexing: copies whole images
        if (cached := self.pixels.cached(rows)) is not None:
            return cached, problems
        images = [self.pixels.first_good(self._candidates(row), problems) for row in rows.tolist()]
        return torch.stack(images), problems

    def report(self, problems: Problems) -> None:
        """Log the problems that `fetch` returned."""
        if isinstance(self.pixels, Files):
            self.pixels.report(problems)

    def _candidates(self, row: int) -> Iterator[int]:
        """Yield a position, then the positions of the same label after it, then those before it."""
        yield row
        same = (self.labels == self.labels[row]).nonzero().flatten()
        yield from same[same > row].tolist()
        yield from same[same < row].tolist()
