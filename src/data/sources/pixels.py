"""Pixels in memory, uint8 (N, C, H, W): checks, and conversion to the channels and the size of the model's input."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import ConfigError, DataError
from data.loading.normalisation import MAX_CONVERTED_VALUES


def check_pixels(pixels: Tensor, *, split: str) -> None:
    """Raise DataError if pixels in memory are not uint8 (N, C, H, W)."""
    subject = f"{split} pixels"
    if pixels.is_floating_point() and not (finite := torch.isfinite(pixels).flatten(1).all(1)).all():
        index = int((~finite).nonzero()[0])
        raise DataError(subject, f"NaN or infinity in image {index}: must be torch.uint8, 0 to 255")
    if pixels.dtype != torch.uint8:
        raise DataError(subject, "must be torch.uint8, 0 to 255", value=pixels.dtype)
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise DataError(subject, "must be (N, C, H, W) with 1 or 3 channels", value=tuple(pixels.shape))


def recolour(pixels: Tensor, *, channels: int) -> Tensor:
    """Return uint8 (N, channels, H, W): grey is repeated, colour becomes ITU-R 601 luma, rounded as by Pillow."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def resize(pixels: Tensor, *, image_size: int, fit: str) -> Tensor:
    """Resize uint8 (N, C, H, W) to (N, C, image_size, image_size), bilinear and antialiased, or centre it on black."""
    height, width = pixels.shape[2:]
    if (height, width) == (image_size, image_size):
        return pixels
    if fit == "resize":
        size = (image_size, image_size)
        larger = functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        return larger.round().clamp(0, 255).to(torch.uint8)
    if image_size < max(height, width):
        explanation = f"must be >= {max(height, width)}, the size of the data, with fit: pad"
        raise ConfigError("image_size", explanation, value=image_size)
    left, top = (image_size - width) // 2, (image_size - height) // 2
    return functional.pad(pixels, (left, image_size - width - left, top, image_size - height - top))


def at_size(pixels: Tensor, image_size: int) -> Iterator[Tensor]:
    """Yield the images, uint8 (N, C, H, W), at the model's size: in one chunk, or in several if they are resized."""
    if pixels.shape[2:] == (image_size, image_size):
        yield pixels
        return
    few = max(1, MAX_CONVERTED_VALUES // pixels[0].numel())  # they are converted to floats
    yield from (resize(chunk, image_size=image_size, fit="resize") for chunk in pixels.split(few))


def brightness_and_contrast(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the values of each image, float32 (N,), for images (N, C, H, W)."""
    values = images.flatten(1).float()
    return values.mean(1), values.std(1)
