"""Augmentations that move pixels: shift, flip, rotate, scale, deform.

Each is a step of `data.augment.pipeline`: it takes a batch and the uniform random values of each sample, and draws
none itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import ConfigError
from data.augment.checks import require_interval, require_within
from data.augment.distributions import per_pixel
from data.device import widest_float


class RandomCrop:
    """Random window of the original size in the padded image: a shift by -padding to +padding pixels in x and in y.

    The padding is black, or a reflection of the image: c b | a b c | b a.
    """

    num_random_values = 2

    def __init__(self, padding: int, mode: str = "black") -> None:
        if type(padding) is not int or padding < 0:
            raise ConfigError("padding", "must be an integer >= 0", value=padding)
        if mode not in ("black", "reflect"):
            raise ConfigError("mode", "must be black or reflect", value=mode)
        self.padding, self.mode = padding, mode

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        padded_width = width + 2 * self.padding
        if self.mode == "black":
            padded = functional.pad(images, [self.padding] * 4)  # (B, C, H + 2p, W + 2p)
        else:
            y, x = (_reflected(size, self.padding, images.device) for size in (height, width))
            padded = images.index_select(2, y).index_select(3, x)  # torch's pad does not support uint8
        top, left = (random_values * (2 * self.padding + 1)).long().unbind(1)  # (B,) each
        # Each row of the result is contiguous in memory: copy B * C * H pieces of W pixels, indexed by their starts.
        plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
        row = plane * (height + 2 * self.padding) + top[:, None, None] + torch.arange(height, device=images.device)
        start = row * padded_width + left[:, None, None]  # (B, C, H)
        pieces = padded.flatten().unfold(0, width, 1)  # a view of all pieces of W consecutive pixels
        return pieces.index_select(0, start.flatten()).view(batch, channels, height, width)


class RandomFlip:
    """Horizontal flip with this probability."""

    num_random_values = 1

    def __init__(self, probability: float) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.mirrors = self.probability > 0

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        return _flipped(images, random_values[:, 0] < self.probability)


class AlternatingFlip:
    """Horizontal flip in every other epoch: of half of the samples in even epochs, of the other half in odd epochs.

    Two successive epochs show each sample both ways. Independent random flips would show half of them the same way.

    Source: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024, section 3.6.
    """

    num_random_values = 1
    alternates = True
    mirrors = True

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        return _flipped(images, random_values[:, 0] < 0.5)


class RandomAffine:
    """Random flip, shear, scale, rotation and shift about the centre: bilinear, black outside, float32.

    With S = [[1, -tan shear], [0, 1]] and R = [[cos, -sin], [sin, cos]] (y points down, so angles are clockwise), a
    point p of the image moves to scale * R S p + shift. The pixels are sampled by the inverse (Jaderberg et al.,
    Spatial Transformer Networks, 2015, section 3.2). Same convention as torchvision's functional.affine.
    """

    num_random_values = 6  # shift right, shift down, scale, rotation, shear, horizontal flip

    def __init__(self, translate: float, scale: Sequence[float], rotate: float, shear: float, mirror: float) -> None:
        self.translate = require_within("translate", translate, 0, 1)
        self.scale = require_interval("scale", scale)
        self.rotate = math.radians(require_within("rotate", rotate, 0, 180))
        self.shear = math.radians(require_within("shear", shear, 0, 80))
        self.mirror = require_within("mirror", mirror, 0, 1)
        self.mirrors = self.mirror > 0

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        height, width = images.shape[2:]
        right, down, scale, rotation, shear, mirror = random_values.unbind(1)  # (B,) each
        right, down = self.translate * (2 * right - 1) * width, self.translate * (2 * down - 1) * height
        scale = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        angle = self.rotate * (2 * rotation - 1)
        slope = torch.tan(self.shear * (2 * shear - 1))
        sign = torch.where(mirror < self.mirror, -1.0, 1.0)  # the flip precedes all other changes
        cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
        # The inverse, (S^-1 R^-1 / scale)(q - shift), for q in pixels from the centre.
        x_from_x, x_from_y = sign * (cosine - slope * sine), sign * (sine + slope * cosine)
        y_from_x, y_from_y = -sine, cosine
        x_from_1 = -(x_from_x * right + x_from_y * down)
        y_from_1 = -(y_from_x * right + y_from_y * down)
        # affine_grid is ten times slower, and may sum in an order that depends on the batch. These sums have two terms.
        x, y = _from_centre(width, images.device), _from_centre(height, images.device)
        grid = torch.empty(2, len(images), height, width, device=images.device)
        for axis, (from_x, from_y, constant, length) in enumerate(
            ((x_from_x, x_from_y, x_from_1, width), (y_from_x, y_from_y, y_from_1, height))
        ):
            rows, columns = from_x[:, None] * x + constant[:, None], from_y[:, None] * y  # (B, W), (B, H)
            torch.add(rows[:, None, :] * (2 / length), columns[:, :, None] * (2 / length), out=grid[axis])
        return _sampled(images, grid)


class RandomResizedCrop:
    """Random rectangle of the image, resized to a square of `size` pixels (None: to the original size); float32.

    `area` is the rectangle's share of the image, uniformly distributed. `ratio` is width / height. Its logarithm is
    uniformly distributed over the ratios that fit into the image. (Torchvision draws both again until the rectangle
    fits, which makes large areas rarer.) Resized as torchvision does with antialias=True, one side after the other:
    see `resampling`.

    Source: Szegedy et al., Going Deeper with Convolutions, 2014, section 6 (8 % to 100 %, 3/4 to 4/3).
    """

    num_random_values = 4  # area, ratio, top, left

    def __init__(self, area: Sequence[float], ratio: Sequence[float], size: int | None = None) -> None:
        self.area = require_interval("area", area, high=1)
        self.ratio = require_interval("ratio", ratio)
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError("size", "must be an integer >= 1, or null", value=size)
        self.size = size

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        height, width = images.shape[2:]
        top, left, tall, wide = rectangles(random_values, area=self.area, ratio=self.ratio, height=height, width=width)
        rows = _resized(images.float(), top, tall, size=self.size or height)  # (B, C, size, W)
        columns = _resized(rows.mT.contiguous(), left, wide, size=self.size or width)  # (B, C, size, size)
        return columns.mT.contiguous()


class Elastic:
    """Elastic deformation: each pixel is sampled at a nearby point, with nearly the displacement of its neighbours.

        displacement = alpha * (Gaussian of standard deviation sigma, convolved with noise within -1 to 1)

    in pixels, separately for x and y. Outside the image the noise is 0. A small sigma looks like frosted glass, a large
    sigma shifts the whole image. Bilinear, black outside, float32. (Torchvision's alpha is twice this one.)

    Source: Simard, Steinkraus and Platt, Best Practices for Convolutional Neural Networks, 2003, section 2.
    """

    num_random_values = 1  # the noise

    def __init__(self, alpha: float, sigma: float) -> None:
        self.alpha = require_within("alpha", alpha, 0, 1000)
        self.sigma = require_within("sigma", sigma, 0.5, 100)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        height, width = images.shape[2:]
        right, down = self.displacements(random_values, height=height, width=width).unbind(1)  # (B, H, W) each
        x, y = _from_centre(width, images.device), _from_centre(height, images.device)
        return _sampled_at(images, right + x, down + y[:, None])

    def displacements(self, random_values: Tensor, *, height: int, width: int) -> Tensor:
        """Return the displacement at which each pixel is sampled, in pixels: (B, 2, H, W), to the right and down."""
        # Noise and weights are integers, and their sums stay below 2^53: in double precision these matrix products
        # are exact. So the order of their sums, which depends on the batch size, changes no bit.
        noise = (per_pixel(random_values[:, 0], 2 * height * width) >> 15) | 1  # odd, -65535 to 65535
        noise = noise.view(-1, 2, height, width).to(widest_float(noise.device))
        smooth = self._weights(height, random_values.device) @ noise @ self._weights(width, random_values.device)
        return (smooth * (self.alpha * 2.0**-48)).float()

    def _weights(self, size: int, device: torch.device) -> Tensor:
        """Return integers (size, size): 2^16 times the Gaussian of the distance between two positions."""
        position = torch.arange(size, dtype=widest_float(device), device=device)
        gaussian = torch.exp(-0.5 * ((position - position[:, None]) / self.sigma) ** 2)
        return (gaussian * (2**16 / (self.sigma * math.sqrt(2 * math.pi)))).round()


def _flipped(images: Tensor, chosen: Tensor) -> Tensor:
    """Return the images (B, C, H, W); those that are chosen, bool (B,), are flipped horizontally."""
    # Selecting from both versions copies each image as one block: four times as fast as torch.where.
    both = torch.cat([images, images.flip(3)])  # (2B, C, H, W)
    position = torch.arange(len(images), device=images.device)
    return both.index_select(0, position + len(images) * chosen)


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Return the source position of each padded position, (size + 2 padding,), with repeated reflection at the ends."""
    period = max(2 * (size - 1), 1)  # forwards and backwards
    position = torch.arange(-padding, size + padding, device=device) % period
    return torch.minimum(position, period - position)


def rectangles(
    random_values: Tensor, *, area: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rectangles of whole pixels within an image, for uniform values (B, 4).

    Returns top, left, height and width, float32 (B,) each.
    """
    # In double precision, so that the last bits of the logarithms and roots do not change the result.
    size, shape, down, right = random_values.to(widest_float(random_values.device)).unbind(1)
    share = area[0] + size * (area[1] - area[0])  # of the image
    # wide = sqrt(share H W ratio) <= W and tall = sqrt(share H W / ratio) <= H limit the ratios.
    least, most = share * width / height, width / (share * height)
    lowest, highest = (torch.clamp(torch.full_like(share, end), least, most).log() for end in ratio)
    root = torch.exp((lowest + shape * (highest - lowest)) / 2)  # sqrt(ratio)
    side = torch.sqrt(share * (height * width))
    wide, tall = (side * root).round().clamp(1, width), (side / root).round().clamp(1, height)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    return top.float(), left.float(), tall.float(), wide.float()


def resampling(start: Tensor, length: Tensor, *, full: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the pixels and weights that resample a piece of an image's side to `size` pixels, for each sample.

        centre = (i + 1/2) length / size;  weight of pixel j = max(0, 1 - |j + 1/2 - centre| / max(1, length / size))

    The weights are divided by their sum; pixels outside the piece have weight 0. This is bilinear interpolation if the
    piece is enlarged, and a triangle filter that is two new pixels wide if it is reduced.

    `start` and `length` of the pieces are (B,) each; `full` is the length of the whole side. Returns pixels int64 and
    weights float32, (B, size, taps) each.
    """
    scale = (length / size)[:, None]  # (B, 1)
    reach = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device) + 0.5) * scale  # (B, size)
    taps = math.ceil(2 * max(1, full / size))  # the number for the whole side: the same for every batch
    position = (centre - reach + 0.5).floor()[..., None] + torch.arange(taps, device=start.device)  # (B, size, taps)
    weight = (1 - (position + 0.5 - centre[..., None]).abs() / reach[..., None]).clamp(min=0)
    last = length[:, None, None] - 1
    weight = torch.where((position >= 0) & (position <= last), weight, 0.0)
    pixels = start[:, None, None] + torch.minimum(position.clamp(min=0), last)
    return pixels.long(), weight / weight.sum(2, keepdim=True)


def _resized(images: Tensor, top: Tensor, tall: Tensor, *, size: int) -> Tensor:
    """Return float images (B, C, size, W): `tall` rows from row `top` on of images (B, C, H, W), resized."""
    batch, channels, height, width = images.shape
    pixels, weights = resampling(top, tall, full=height, size=size)
    plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1, 1) * height
    # Weighted sums of whole rows, as fast as grid_sample.
    rows = (plane + pixels[:, None]).flatten(0, 2)  # (B C size, taps)
    shares = weights[:, None].expand(-1, channels, -1, -1).flatten(0, 2)
    table = images.reshape(-1, width)  # (B C H, W)
    mixed = functional.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")
    return mixed.view(batch, channels, size, width)


def _from_centre(size: int, device: torch.device) -> Tensor:
    """Return the positions of a side's pixels, in pixels from its centre: (size,)."""
    return torch.arange(size, device=device) + 0.5 - size / 2


def _sampled_at(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the images sampled at points (x, y), in pixels from the centre: bilinear, black outside, float32.

    x and y are (B, H, W), with size 1 for a dimension along which they are constant.
    """
    height, width = images.shape[2:]
    grid = torch.empty(2, len(images), height, width, device=images.device)
    grid[0], grid[1] = x * (2 / width), y * (2 / height)
    return _sampled(images, grid)


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    """Return the images sampled at the points of a grid (2, B, H, W): x and y, where -1 and 1 are the image's edges.

    Separate planes for x and y are faster to fill than pairs.
    """
    grid = grid.permute(1, 2, 3, 0)
    return functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
