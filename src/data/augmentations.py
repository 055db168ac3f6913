"""Augmentation: a whole batch at once, each sample with its own numbers.

A step is an object with `numbers`, how many uniform numbers a sample needs, and a call (images, numbers) -> images;
it draws nothing itself. The frame draws all numbers of an epoch at once, with a generator of their own:

    numbers = rand(N, k) of fold(seed, "augment", step's name, epoch);  sample i gets row i

so that what happens to a sample depends on seed, epoch and sample alone: not on its batch, the workers, or other steps.
Pixels stay uint8 as long as a step allows it, and are on the scale 0 to 255 throughout.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import ConfigError
from core.seeding import fold


class Step(Protocol):
    """One augmentation."""

    numbers: int  # uniform numbers a sample

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float, and numbers (B, k) in [0, 1) to images of the same shape."""
        ...


class Augmentations:
    """Steps in their order; an empty mapping changes nothing."""

    def __init__(self, steps: Mapping[str, Step], seed: int) -> None:
        self.steps = dict(steps)
        self.seed = seed
        self.epoch: int | None = None
        self.samples = 0
        self.drawn: dict[str, Tensor] = {}  # step's name -> (N, k), of this epoch

    def draw(self, *, epoch: int, samples: int, device: torch.device) -> None:
        """Draw an epoch's numbers: always on the CPU, so that they are the same for every device."""
        self.epoch, self.samples, self.drawn = epoch, samples, {}
        for name, step in self.steps.items():
            generator = torch.Generator().manual_seed(fold(self.seed, "augment", name, epoch))
            self.drawn[name] = torch.rand(samples, step.numbers, generator=generator).to(device)

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Images uint8 (B, C, H, W), at these positions (B,) of the training part, as this epoch shows them."""
        if self.steps and epoch != self.epoch:
            # A loader has drawn before. Rows do not depend on how many follow them, so any number will do here.
            self.draw(epoch=epoch, samples=max(self.samples, int(indices.max()) + 1), device=images.device)
        for name, step in self.steps.items():
            images = step(images, self.drawn[name].index_select(0, indices))
        return images


class RandomCrop:
    """Pad with black and cut out a window of the old size: a shift by -padding to +padding pixels each way."""

    numbers = 2

    def __init__(self, padding: int) -> None:
        if padding < 0:
            raise ConfigError("padding", "must be >= 0", value=padding)
        self.padding = padding

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        wide = width + 2 * self.padding
        padded = functional.pad(images, [self.padding] * 4)  # (B, C, H + 2p, W + 2p)
        top, left = (numbers * (2 * self.padding + 1)).long().unbind(1)  # (B,) each
        # A row of the result lies in one piece in memory: copy B * C * H pieces of W bytes, by where they start.
        plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
        row = plane * (height + 2 * self.padding) + top[:, None, None] + torch.arange(height, device=images.device)
        start = row * wide + left[:, None, None]  # (B, C, H)
        pieces = padded.flatten().unfold(0, width, 1)  # a view: every piece of W bytes there is
        return pieces.index_select(0, start.flatten()).view(batch, channels, height, width)


class RandomFlip:
    """Mirror left and right with this probability."""

    numbers = 1

    def __init__(self, probability: float) -> None:
        self.probability = _within("probability", probability, 0, 1)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        # Choosing whole pictures among both versions copies them in one piece: four times as fast as torch.where.
        both = torch.cat([images, images.flip(3)])  # (2B, C, H, W)
        position = torch.arange(len(images), device=images.device)
        return both.index_select(0, position + len(images) * (numbers[:, 0] < self.probability))


class RandomAffine:
    """Mirror, shear, scale, rotate and shift about the centre; bilinear, black outside; the result is float32.

    With S = [[1, -tan shear], [0, 1]] and R = [[cos, -sin], [sin, cos]] (y points down, so angles are clockwise), a
    point p of the picture goes to scale * R S p + shift; the pixels are fetched by the inverse (Jaderberg et al.,
    Spatial Transformer Networks, 2015, section 3.2). Same convention as torchvision's functional.affine.
    """

    numbers = 6  # shift right, shift down, scale, rotation, shear, mirror

    def __init__(self, translate: float, scale: Sequence[float], rotate: float, shear: float, mirror: float) -> None:
        self.translate = _within("translate", translate, 0, 1)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ConfigError("scale", "must be [lowest, highest] with 0 < lowest <= highest", value=list(scale))
        self.scale = (float(scale[0]), float(scale[1]))
        self.rotate = math.radians(_within("rotate", rotate, 0, 180))
        self.shear = math.radians(_within("shear", shear, 0, 80))
        self.mirror = _within("mirror", mirror, 0, 1)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[2:]
        right, down, size, turn, lean, mirror = numbers.unbind(1)  # (B,) each
        right, down = self.translate * (2 * right - 1) * width, self.translate * (2 * down - 1) * height
        size = self.scale[0] + size * (self.scale[1] - self.scale[0])
        turn = self.rotate * (2 * turn - 1)
        slope = torch.tan(self.shear * (2 * lean - 1))
        side = torch.where(mirror < self.mirror, -1.0, 1.0)  # the picture is mirrored before all the rest
        cosine, sine = torch.cos(turn) / size, torch.sin(turn) / size
        # The inverse, (S^-1 R^-1 / scale)(q - shift), for q in pixels from the centre.
        x_from_x, x_from_y = side * (cosine - slope * sine), side * (sine + slope * cosine)
        y_from_x, y_from_y = -sine, cosine
        x_from_1 = -(x_from_x * right + x_from_y * down)
        y_from_1 = -(y_from_x * right + y_from_y * down)
        # Built by hand, because affine_grid is ten times slower, and because sums of two terms have no batch's order.
        x = torch.arange(width, device=images.device) + 0.5 - width / 2
        y = torch.arange(height, device=images.device) + 0.5 - height / 2
        rows = [
            (across[:, None] * x + constant[:, None])[:, None, :] + (along[:, None] * y)[:, :, None]  # (B, H, W)
            for across, along, constant in ((x_from_x, x_from_y, x_from_1), (y_from_x, y_from_y, y_from_1))
        ]
        grid = torch.stack([rows[0] * (2 / width), rows[1] * (2 / height)], dim=-1)  # (B, H, W, 2), -1 to 1
        return functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ConfigError(name, f"must be within {low} to {high}", value=value)
    return float(value)
