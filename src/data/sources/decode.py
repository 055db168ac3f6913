"""Decoding: one rule makes uint8 pixels (C, H, W) of any image file.

    stored as                           becomes
    1 bit, grey, palette, CMYK, ...     8-bit grey or RGB, by Pillow; colour to grey is ITU-R 601 luma
    with transparency                   composited on white
    16-bit grey                         value / 257, rounded: 65535 becomes 255, nothing is clipped
    with an EXIF orientation            turned upright
    an animation                        its first frame
    any size                            the centre square, resized to image_size (bilinear, antialiased)

This equals "resize the shorter side to image_size, then centre crop", pixel by pixel. Only the square is ever resized,
so an image of 30000 x 2 takes little memory.

Pillow's own limit on the size of an image (`Image.MAX_IMAGE_PIXELS`) is one value for the whole process and only warns
at first. `max_pixels` replaces it: Pillow's limit is suspended while this module decodes, and then restored.
"""

import os
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import DataError
from core.regular_files import IrregularFile, open_regular

# Formats of plain images only: some of Pillow's others start programs (EPS) or hold no pixels (PDF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
MAX_PIXELS = 100_000_000  # 300 MB as RGB
PAUSES = (0.1, 0.3, 0.9)  # seconds before a file that cannot be read is tried again: a network drive comes back


class BadImage(DataError):
    """A file that can be read, but holds no image that can be used."""


class PillowLimit:
    """Suspends `Image.MAX_IMAGE_PIXELS` as a context manager. Threads may overlap: the last to leave restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: int | None = None
        self._is_registered = False  # what a fork calls; importing this file leaves the process as it was

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_registered:
                os.register_at_fork(after_in_child=self._restore_in_child)
                self._is_registered = True
            if self._inside == 0:
                self._before = Image.MAX_IMAGE_PIXELS
            self._inside += 1
            Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._inside == 1:
                Image.MAX_IMAGE_PIXELS = self._before
            self._inside -= 1

    def _restore_in_child(self) -> None:
        """Restore the limit in a forked process, which has none of the threads that were inside or held the lock."""
        self._lock = threading.Lock()
        if self._inside:
            Image.MAX_IMAGE_PIXELS = self._before
            self._inside = 0


UNLIMITED = PillowLimit()


def decode(path: str | Path, *, image_size: int | None, channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return an image file as uint8 (channels, image_size, image_size), by the rule at the top of this file.

    `image_size` None leaves the centre square at its own size.
    """
    for pause in (*PAUSES, None):
        try:
            image = _open(Path(path), mode="L" if channels == 1 else "RGB", max_pixels=max_pixels)
            break
        except OSError as error:
            if pause is None:
                explanation = f"cannot be read: {error.strerror} (tried {len(PAUSES) + 1} times)"
                raise DataError(str(path), explanation) from error
            time.sleep(pause)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = image_size or side
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.array(square).reshape(size, size, channels)  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (C, H, W)


def _open(path: Path, *, mode: str, max_pixels: int) -> Image.Image:
    """The decoded image, upright; BadImage if it is none, OSError if the file cannot be read."""
    try:
        # Pillow gets no path: it would map plain formats into memory, where a file that is cut short kills the process.
        with open_regular(path) as content, UNLIMITED, Image.open(content, formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                found = f"{file.width} x {file.height} = {file.width * file.height:,} pixels"
                raise BadImage(str(path), f"has {found}: must be at most data.max_pixels = {max_pixels:,}")
            return _eight_bit(ImageOps.exif_transpose(file)).convert(mode)
    except (BadImage, MemoryError):
        raise
    except IrregularFile as error:
        raise BadImage(str(path), str(error.strerror)) from error
    except UnidentifiedImageError as error:
        raise BadImage(str(path), f"is not an image: must be {', '.join(FORMATS)}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the system's: those of Pillow have no number
            raise
        raise BadImage(str(path), f"cannot be decoded: {error or type(error).__name__}") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image without transparency and with 8 bits a channel."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values go from {values.min()} to {values.max()}: must be within 0 to 65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it holds floating-point values, whose scale is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
