"""Labelled images: in memory as uint8, or as files that are decoded on demand.

A file that can be read but holds no image, or one of more than `max_pixels`, is bad. With `on_bad_image` error it ends
the run; with skip the next good image of its label replaces it, in the split's order and around its end. Which one
follows from the files alone, so it is the same for any worker and after a resume.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import DataError
from data.sources.cache import Cache, open_cache
from data.sources.decode import MAX_PIXELS, BadImage, decode

BEARABLE = 0.01  # share of a split's images that may be bad with `skip`; one always may
log = logging.getLogger("preceptor.data")


class PackedPaths(Sequence[Path]):
    """Paths as one tensor of characters, which loader workers share: a million Path objects take 7 s to unpickle."""

    def __init__(self, paths: Sequence[Path]) -> None:
        names = [os.fsencode(path) for path in paths]
        self.characters = torch.frombuffer(bytearray(b"".join(names) or b" "), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, names)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:  # a slice gives a list, as a list does
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return Path(os.fsdecode(self.characters[self.ends[row] : self.ends[row + 1]].numpy().tobytes()))


@dataclass(frozen=True)
class Files:
    """Image files; item i is decoded when it is asked for, to uint8 (C, H, W)."""

    paths: Sequence[Path]
    _: KW_ONLY
    image_size: int
    channels: int
    on_bad_image: str = "error"
    max_pixels: int = MAX_PIXELS
    caches: Mapping[int, Cache] = field(default_factory=dict)  # where they lie decoded, by image_size
    bad: dict[int, str] = field(default_factory=dict, init=False)  # by position: those found so far, told already

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.cache is not None:
            row = int(self.cache.rows[index])
            if row in self.cache.bad:
                raise BadImage(str(self.paths[index]), self.cache.bad[row])
            return self.cache.pixels[row]
        return decode(self.paths[index], image_size=self.image_size, channels=self.channels, max_pixels=self.max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"paths": PackedPaths(self.paths)}

    @property
    def cache(self) -> Cache | None:
        """Where they lie decoded at this size."""
        return self.caches.get(self.image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of all images, known without decoding."""
        return (len(self), self.channels, self.image_size, self.image_size)

    def take(self, indices: Tensor) -> "Files":
        paths = [self.paths[index] for index in indices.tolist()]
        return replace(self, paths=paths, caches={size: cache.take(indices) for size, cache in self.caches.items()})

    def cached(self, indices: Tensor) -> Tensor | None:
        """Return the cached images (B, C, H, W); None if they are not cached or one of them is bad."""
        return self.cache.read(indices) if self.cache is not None and self.cache.has(indices) else None

    def first_good(self, candidates: Iterable[int]) -> tuple[Tensor, dict[int, str]]:
        """The first of these images that is not bad; and why those before it are, by position."""
        bad: dict[int, str] = {}
        for index in candidates:
            if index in self.bad:
                continue
            try:
                return self[index], bad
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise
                bad[index] = error.explanation
                self._refuse_too_many(self.bad | bad)
        raise DataError(str(self.paths[index]), "is bad, as are all other images of its class")

    def tell(self, bad: dict[int, str]) -> None:
        """Warn of each bad image once, by the main process; too many of them are an error."""
        for index, reason in bad.items():
            if index not in self.bad:
                self.bad[index] = reason
                self._refuse_too_many(self.bad)
                log.warning(f"{self.paths[index]}: {reason}; replaced by another image of its class")

    def _refuse_too_many(self, bad: dict[int, str]) -> None:
        most = max(1, int(BEARABLE * len(self)))
        if len(bad) > most:
            index, reason = list(bad.items())[-1]
            explanation = f"{reason}; {len(bad)} of {len(self)} images are unreadable; data.on_bad_image=skip allows"
            raise DataError(str(self.paths[index]), f"{explanation} {most}")


def with_cache(files: Files, folder: Path, *, create: bool = True) -> Files:
    """Return the same files, read from their cache of this size in a folder, which `create` lets create.

    If it cannot be created, a warning gives the reason, and each image is decoded whenever it is read.
    """
    cache = open_cache(
        files.paths,
        folder,
        shape=files.shape,
        max_pixels=files.max_pixels,
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
        """The images at these positions, in this order."""
        chosen = self.pixels.take(indices) if isinstance(self.pixels, Files) else self.pixels[indices]
        return Images(pixels=chosen, labels=self.labels[indices])

    def load(self) -> Tensor:
        """All pixels, uint8 (N, C, H, W), decoded where they are files."""
        return self.read(torch.arange(len(self))) if isinstance(self.pixels, Files) else self.pixels

    def read(self, rows: Tensor) -> Tensor:
        """The images at these positions (B,), uint8 (B, C, H, W); bad ones are logged.

        Files are decoded by threads: Pillow's decoders let others run meanwhile.
        """
        if isinstance(self.pixels, Tensor):
            return self.pixels[rows]
        files = self.pixels
        if (cached := files.cached(rows)) is not None:
            return cached
        pixels = torch.empty(len(rows), *files.shape[1:], dtype=torch.uint8)
        candidates = (self._candidates(row) for row in rows.tolist())
        pool = ThreadPoolExecutor()
        try:
            for position, (image, bad) in enumerate(pool.map(files.first_good, candidates)):
                files.tell(bad)
                pixels[position] = image
        finally:
            pool.shutdown(cancel_futures=True)  # so that an error does not wait for all the rest
        return pixels

    def fetch(self, rows: Tensor) -> tuple[Tensor, dict[int, str]]:
        """The same by this thread alone, perhaps in a worker; the bad ones are left for the main process to `tell`."""
        if isinstance(self.pixels, Tensor):
            return self.pixels.index_select(0, rows), {}  # copies whole images, where plain indexing takes longer
        if (cached := self.pixels.cached(rows)) is not None:
            return cached, {}
        found = [self.pixels.first_good(self._candidates(row)) for row in rows.tolist()]
        return torch.stack([image for image, _ in found]), {
            index: why for _, bad in found for index, why in bad.items()
        }

    def tell(self, bad: dict[int, str]) -> None:
        """Warn of the bad images that `fetch` has found."""
        if isinstance(self.pixels, Files):
            self.pixels.tell(bad)

    def _candidates(self, row: int) -> Iterator[int]:
        """A position, then those of the same label behind it, then those before it."""
        yield row
        same = (self.labels == self.labels[row]).nonzero().flatten()
        yield from same[same > row].tolist()
        yield from same[same < row].tolist()
