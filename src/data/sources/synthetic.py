"""Synthetic images, for tests and demonstrations without any file: a striped patch in noise.

The class k of K sets the direction of the stripes (k pi / K) and the position of the patch on a ring (2 pi k / K). The
phase of the stripes, the exact position and the noise are drawn for each image (Gabor, Theory of Communication, 1946):

    pixel = 128 + 96 exp(-r^2 / 2 s^2) cos(2 pi f (x cos a + y sin a) + phase) + 255 noise N(0, 1)

A mirrored image looks like another class, so augmentation must not mirror.
"""

import math

import torch
from torch import Tensor

from core.errors import ConfigError
from core.seeding import fold
from data.sources.collection import Collection
from data.sources.images import Images

FREQUENCY, WIDTH, RING, JITTER = 5.0, 0.22, 0.2, 0.05  # as shares of the image's side
CHUNK = 256  # images drawn from one generator, which also bounds the memory


def synthetic(
    *, train_samples: int, test_samples: int, noise: float, image_size: int, channels: int, num_classes: int | None
) -> Collection:
    """Return balanced classes of images that depend on the arguments alone. Raises ConfigError."""
    for name, value in (("train_samples", train_samples), ("test_samples", test_samples)):
        if type(value) is not int or value < 1:
            raise ConfigError(name, "must be an integer >= 1", value=value)
    if num_classes is None or num_classes < 2:
        raise ConfigError("num_classes", "must be >= 2", value=num_classes)
    if image_size < 1:
        raise ConfigError("image_size", "must be >= 1", value=image_size)
    if channels not in (1, 3):
        raise ConfigError("channels", "must be 1 (grey) or 3 (RGB)", value=channels)
    if type(noise) not in (int, float) or not 0 <= noise < math.inf:
        raise ConfigError("noise", "must be a number >= 0", value=noise)

    def images(split: str, samples: int) -> Images:
        labels = torch.arange(samples) % num_classes
        chunks = [
            _draw(chunk, f"{split}/{number}", noise=noise, size=image_size, channels=channels, classes=num_classes)
            for number, chunk in enumerate(labels.split(CHUNK))
        ]
        return Images(pixels=torch.cat(chunks), labels=labels)

    class_names = [f"{180 * label / num_classes:.4g} degrees" for label in range(num_classes)]
    return Collection(
        train=images("train", train_samples), val=None, test=images("test", test_samples), class_names=class_names
    )


def _draw(labels: Tensor, name: str, *, noise: float, size: int, channels: int, classes: int) -> Tensor:
    """Return images of these labels, uint8 (B, channels, size, size)."""
    generator = torch.Generator().manual_seed(fold(0, "synthetic", name))
    phase, right, down = torch.rand(3, CHUNK, 1, 1, generator=generator)[:, : len(labels)]
    turn = (labels / classes)[:, None, None] * math.pi
    across = (torch.arange(size) + 0.5) / size - 0.5
    x, y = across[None, None, :], across[None, :, None]
    x = x - RING * torch.cos(2 * turn) - JITTER * (2 * right - 1)
    y = y - RING * torch.sin(2 * turn) - JITTER * (2 * down - 1)
    window = torch.exp(-(x**2 + y**2) / (2 * WIDTH**2))
    stripes = torch.cos(2 * math.pi * (FREQUENCY * (x * torch.cos(turn) + y * torch.sin(turn)) + phase))
    clean = (128 + 96 * window * stripes)[:, None]  # (B, 1, H, W)
    grain = torch.randn(len(labels), channels, size, size, generator=generator)
    return (clean + 255 * noise * grain).round().clamp(0, 255).to(torch.uint8)
