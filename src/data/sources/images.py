"""Labelled pictures: already in memory as uint8, or as files that are decoded on demand.

Any picture becomes uint8 (C, H, W) by one rule:

    stored as                           becomes
    1 bit, grey, palette, CMYK, ...     8-bit grey or RGB, by Pillow; colour to grey is ITU-R 601 luma
    with transparency                   composited on white
    16-bit grey                         value / 257, rounded: 65535 becomes 255, nothing is clipped
    with an EXIF orientation            turned upright
    an animation                        its first frame
    any size                            the centre square, resized to image_size (bilinear, antialiased),
                                        those to train on to data.stored_size, where there is one

That is "shorter side to image_size, then centre crop", to the pixel; but only the square is ever resized, so that a
picture of 30000 x 2 stays small in memory.

A file that is there but holds no picture, or one of more than `max_pixels`, is bad: an error, or with `on_bad_image`
skip replaced by the next good picture of its label, in the part's order and around its end. Which one follows from the
files alone, so it is the same for any worker and after a resume.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import DataError

if TYPE_CHECKING:
    from data.sources.cache import Cache

# Formats of plain pictures only: some of Pillow's others start programs (EPS) or hold no pixels (PDF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 100_000_000  # 300 MB as RGB
PAUSES = (0.1, 0.3, 0.9)  # seconds before a file that cannot be read is tried again: a network drive comes back
BEARABLE = 0.01  # share of a part's pictures that may be bad with `skip`; one always may

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit only warns at first, and is the same for all: `max_pixels` replaces it
log = logging.getLogger("preceptor.data")


class BadImage(DataError):
    """A file that can be read, but holds no picture that can be used."""


@dataclass(frozen=True)
class Files:
    """Picture files; item i is decoded when it is asked for, to uint8 (C, H, W)."""

    paths: list[Path]
    _: KW_ONLY
    image_size: int
    channels: int
    on_bad_image: str = "error"
    max_pixels: int = MAX_PIXELS
    caches: Mapping[int, "Cache"] = field(default_factory=dict)  # where they lie decoded, by image_size
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

    @property
    def cache(self) -> "Cache | None":
        """Where they lie decoded at this size."""
        return self.caches.get(self.image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of all pictures, known without decoding."""
        return (len(self), self.channels, self.image_size, self.image_size)

    def take(self, indices: Tensor) -> "Files":
        paths = [self.paths[index] for index in indices.tolist()]
        return replace(self, paths=paths, caches={size: cache.take(indices) for size, cache in self.caches.items()})

    def cached(self, indices: Tensor) -> Tensor | None:
        """Pictures (B, C, H, W) as they lie in the cache, where they do and none of them is bad."""
        return self.cache.read(indices) if self.cache is not None and self.cache.has(indices) else None

    def first_good(self, candidates: Iterable[int]) -> tuple[Tensor, dict[int, str]]:
        """The first of these pictures that is not bad; and why those before it are, by position."""
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
        raise DataError(str(self.paths[index]), "is bad, as are all other pictures of its class")

    def tell(self, bad: dict[int, str]) -> None:
        """Warn of each bad picture once, by the main process; too many of them are an error."""
        for index, reason in bad.items():
            if index not in self.bad:
                self.bad[index] = reason
                self._refuse_too_many(self.bad)
                log.warning(f"{self.paths[index]}: {reason}; another picture of its class stands in for it")

    def _refuse_too_many(self, bad: dict[int, str]) -> None:
        most = max(1, int(BEARABLE * len(self)))
        if len(bad) > most:
            index, reason = list(bad.items())[-1]
            explanation = f"{reason}; {len(bad)} of {len(self)} pictures are bad, where data.on_bad_image=skip bears"
            raise DataError(str(self.paths[index]), f"{explanation} {most}")


@dataclass(frozen=True)
class Images:
    """A labelled set of pictures."""

    pixels: Tensor | Files  # uint8 (N, C, H, W), or files that are decoded to it
    labels: Tensor  # int64 (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Images":
        """The pictures at these positions, in this order."""
        chosen = self.pixels.take(indices) if isinstance(self.pixels, Files) else self.pixels[indices]
        return Images(pixels=chosen, labels=self.labels[indices])

    def load(self) -> Tensor:
        """All pixels, uint8 (N, C, H, W), decoded where they are files."""
        return self.read(torch.arange(len(self))) if isinstance(self.pixels, Files) else self.pixels

    def read(self, rows: Tensor) -> Tensor:
        """The pictures at these positions (B,), uint8 (B, C, H, W); bad ones are told.

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
            for position, (picture, bad) in enumerate(pool.map(files.first_good, candidates)):
                files.tell(bad)
                pixels[position] = picture
        finally:
            pool.shutdown(cancel_futures=True)  # so that an error does not wait for all the rest
        return pixels

    def fetch(self, rows: Tensor) -> tuple[Tensor, dict[int, str]]:
        """The same by this thread alone, perhaps in a worker; the bad ones are left for the main process to `tell`."""
        if isinstance(self.pixels, Tensor):
            return self.pixels.index_select(0, rows), {}  # copies whole pictures, where plain indexing takes longer
        if (cached := self.pixels.cached(rows)) is not None:
            return cached, {}
        found = [self.pixels.first_good(self._candidates(row)) for row in rows.tolist()]
        return torch.stack([picture for picture, _ in found]), {
            index: why for _, bad in found for index, why in bad.items()
        }

    def tell(self, bad: dict[int, str]) -> None:
        """Warn of the bad pictures that `fetch` has found."""
        if isinstance(self.pixels, Files):
            self.pixels.tell(bad)

    def _candidates(self, row: int) -> Iterator[int]:
        """A position, then those of the same label behind it, then those before it."""
        yield row
        same = (self.labels == self.labels[row]).nonzero().flatten()
        yield from same[same > row].tolist()
        yield from same[same < row].tolist()


def decode(path: str | Path, *, image_size: int | None, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture file as uint8 (channels, image_size, image_size), by the rule at the top of this file.

    `image_size` None leaves the centre square at its own size.
    """
    for pause in (*PAUSES, None):
        try:
            picture = _open(Path(path), mode="L" if channels == 1 else "RGB", max_pixels=max_pixels)
            break
        except OSError as error:
            if pause is None:
                explanation = f"cannot be read: {error.strerror} (tried {len(PAUSES) + 1} times)"
                raise DataError(str(path), explanation) from error
            time.sleep(pause)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    size = image_size or side
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.array(square).reshape(size, size, channels)  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (C, H, W)


def _open(path: Path, *, mode: str, max_pixels: int) -> Image.Image:
    """The decoded picture, upright; BadImage if it is none, OSError if the file cannot be read."""
    try:
        # Pillow gets no path: it would map plain formats into memory, where a file that is cut short kills the process.
        with path.open("rb") as content, Image.open(content, formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                found = f"{file.width} x {file.height} = {file.width * file.height:,} pixels"
                raise BadImage(str(path), f"has {found}: must be at most data.max_pixels = {max_pixels:,}")
            return _eight_bit(ImageOps.exif_transpose(file)).convert(mode)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(str(path), f"is not a picture: must be {', '.join(FORMATS)}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the system's: those of Pillow have no number
            raise
        raise BadImage(str(path), f"cannot be decoded: {error or type(error).__name__}") from error


def _eight_bit(picture: Image.Image) -> Image.Image:
    """The picture without transparency and with 8 bits a channel."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values go from {values.min()} to {values.max()}: must be within 0 to 65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("it holds floating-point values, whose scale is unknown")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture
