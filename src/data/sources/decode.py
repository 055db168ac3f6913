"""Decoding of any image file to uint8 pixels (C, H, W), by one rule.

    stored as                           becomes
    1 bit, grey, palette, CMYK, ...     8-bit grey or RGB, by Pillow; colour to grey is ITU-R 601 luma
    with transparency                   composited on white
    16-bit grey                         value x 255 / (2^bits - 1), rounded; `bits` is 16 unless it is set
    with an EXIF orientation            rotated upright
    an animation                        its first frame
    any size                            the centre square, resized to image_size (bilinear, antialiased)

The pixels equal those of "resize the shorter side to image_size, then centre crop". Only the square is resized, so an
image of 30000 x 2 takes little memory.

`max_pixels` replaces Pillow's limit on the size of an image (`Image.MAX_IMAGE_PIXELS`), which is one value for the
whole process and first only warns. Pillow's limit is suspended while this module decodes.
"""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import DataError
from core.regular_files import IrregularFile, open_regular

# Only formats of plain images: some other formats of Pillow start programs (EPS) or contain no pixels (PDF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000  # 300 MB as RGB
Result = TypeVar("Result")
PAUSES = (0.1, 0.3, 0.9)  # seconds before an unreadable file is tried again: a network drive may be back by then


class BadImage(DataError):
    """A file that can be read but contains no usable image."""


class PillowLimit:
    """Context manager that suspends `Image.MAX_IMAGE_PIXELS`; the last of several threads restores it.

    It also silences Python warnings of Pillow, such as those on invalid EXIF or TIFF tags: they name no file, and an
    image that cannot be decoded is reported as BadImage.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: int | None = None
        self._filter: Any = None
        self._is_registered = False  # importing this module must not change the process

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_registered:
                os.register_at_fork(after_in_child=self._restore_in_child)
                self._is_registered = True
            if self._inside == 0:
                self._before = Image.MAX_IMAGE_PIXELS
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = warnings.filters[0]
            self._inside += 1
            Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._inside == 1:
                self._restore()
            self._inside -= 1

    def _restore(self) -> None:
        Image.MAX_IMAGE_PIXELS = self._before
        with contextlib.suppress(ValueError):  # other code has restored its own list of filters meanwhile
            cast(list[Any], warnings.filters).remove(self._filter)

    def _restore_in_child(self) -> None:
        """Restore the limit in a forked process: threads that use this object or hold its lock do not exist there."""
        self._lock = threading.Lock()
        if self._inside:
            self._restore()
            self._inside = 0


UNLIMITED = PillowLimit()


def decode(
    path: str | Path, *, image_size: int | None, channels: int, max_pixels: int = MAX_PIXELS, bits: int | None = None
) -> Tensor:
    """Return an image file as uint8 (channels, image_size, image_size), by the rule at the top of this module.

    With `image_size=None` the centre square keeps its size. Raises BadImage, or DataError if the file cannot be read.
    """

    def decode_open(file: BinaryIO) -> Tensor:
        return decode_file(file, str(path), image_size=image_size, channels=channels, max_pixels=max_pixels, bits=bits)

    return with_retries(Path(path), decode_open)


def with_retries(path: Path, use: Callable[[BinaryIO], Result]) -> Result:
    """Return what a function returns for an open file; errors of the system are tried again after PAUSES.

    Raises BadImage if the file is not a regular file, and DataError if it cannot be read.
    """
    for pause in (*PAUSES, None):
        try:
            with open_regular(path) as file:
                return use(file)
        except IrregularFile as error:
            raise BadImage(str(path), str(error.strerror)) from error
        except OSError as error:
            if pause is None:
                explanation = f"cannot be read: {error.strerror} (tried {len(PAUSES) + 1} times)"
                raise DataError(str(path), explanation) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def decode_file(
    file: BinaryIO, name: str, *, image_size: int | None, channels: int, max_pixels: int, bits: int | None = None
) -> Tensor:
    """Return an open image file as `decode` does. Raises BadImage, or OSError if the file cannot be read."""
    image = _open(file, name, mode="L" if channels == 1 else "RGB", max_pixels=max_pixels, bits=bits)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size = image_size or side
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.array(square).reshape(size, size, channels)  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (C, H, W)


def _open(content: BinaryIO, name: str, *, mode: str, max_pixels: int, bits: int | None) -> Image.Image:
    """Return the decoded image, upright. Raises BadImage, or OSError if the file cannot be read."""
    try:
        # Pillow gets no path: it would map plain formats into memory, and a truncated file would kill the process.
        with UNLIMITED, Image.open(content, formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                size = f"{file.width} x {file.height} = {file.width * file.height:,} pixels"
                raise BadImage(name, f"has {size}: must be at most data.max_pixels = {max_pixels:,}")
            return _eight_bit(ImageOps.exif_transpose(file), bits).convert(mode)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(name, f"is not an image: must be {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions for a broken file
        if isinstance(error, OSError) and error.errno is not None:  # of the system: Pillow's own have no number
            raise
        raise BadImage(name, f"cannot be decoded: {error or type(error).__name__}") from error


def _eight_bit(image: Image.Image, bits: int | None) -> Image.Image:
    """Return the image without transparency and with 8 bits per channel."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        largest = 2 ** (bits or 16) - 1
        if values.min() < 0 or values.max() > largest:
            key = f" (data.bits={bits})" if bits else ""
            raise ValueError(f"its values are {values.min()} to {values.max()}: must be within 0 to {largest}{key}")
        return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it contains floating-point values of unknown scale")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def largest_16_bit_value(path: Path) -> int | None:
    """Return the largest value of an image file with 16-bit values; None for other files, and if it is unreadable."""
    try:
        with open_regular(path) as content, UNLIMITED, Image.open(content, formats=FORMATS) as file:
            if not file.mode.startswith("I") or file.width * file.height > MAX_PIXELS:
                return None
            return int(np.asarray(file).max())
    except Exception:  # Pillow's decoders raise many kinds of exceptions; reading the image later reports the error
        return None
