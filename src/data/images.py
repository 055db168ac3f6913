"""Labelled pictures: already in memory as uint8, or as files that are decoded on demand.

Any picture becomes uint8 (C, H, W) by one rule:

    stored as                           becomes
    1 bit, grey, palette, CMYK, ...     8-bit grey or RGB, by Pillow; colour to grey is ITU-R 601 luma
    with transparency                   composited on white
    16-bit grey                         value / 257, rounded: 65535 becomes 255, nothing is clipped
    with an EXIF orientation            turned upright
    an animation                        its first frame
    any size                            the centre square, resized to image_size (bilinear, antialiased)

That is "shorter side to image_size, then centre crop", to the pixel; but only the square is ever resized, so that a
picture of 30000 x 2 stays small in memory.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import DataError

# Formats of plain pictures only: some of Pillow's others start programs (EPS) or hold no pixels (PDF).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


class Files(Dataset[Tensor]):
    """Picture files; item i is decoded when it is asked for, to uint8 (C, H, W)."""

    def __init__(self, paths: list[Path], *, image_size: int, channels: int) -> None:
        self.paths = paths
        self.image_size = image_size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.paths[index], image_size=self.image_size, channels=self.channels)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of what `load` returns, known without decoding."""
        return (len(self), self.channels, self.image_size, self.image_size)

    def take(self, indices: Tensor) -> "Files":
        paths = [self.paths[index] for index in indices.tolist()]
        return Files(paths, image_size=self.image_size, channels=self.channels)

    def load(self) -> Tensor:
        """All pictures as uint8 (N, C, H, W), decoded by threads: Pillow's decoders let others run meanwhile."""
        pixels = torch.empty(self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for index, picture in enumerate(pool.map(self.__getitem__, range(len(self)))):
                pixels[index] = picture
        return pixels


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
        """The pixels, uint8 (N, C, H, W), decoded where they are files."""
        return self.pixels.load() if isinstance(self.pixels, Files) else self.pixels


def decode(path: str | Path, *, image_size: int | None, channels: int) -> Tensor:
    """A picture file as uint8 (channels, image_size, image_size), by the rule at the top of this file.

    `image_size` None leaves the centre square at its own size.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            picture = _eight_bit(ImageOps.exif_transpose(file)).convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise DataError(str(path), f"is not a picture: must be {', '.join(FORMATS)}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        raise DataError(str(path), f"cannot be decoded: {error or type(error).__name__}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    size = image_size or side
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.array(square).reshape(size, size, channels)  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (C, H, W)


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
