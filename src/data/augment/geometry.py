"""Augmentations that move pixels: shifted, mirrored, turned, enlarged, bent.

Each is a step of `data.augment.pipeline`: it takes a batch and the uniform random values of each sample,
and draws none itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import ConfigError
from data.augment.checks import require_interval, require_within
from data.augment.distributions import per_pixel


class RandomCrop:
    """Pad and cut out a window of the old size: a shift by -padding to +padding pixels each way.

    Padded with black, or by reflection: c b | a b c | b a.
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
        wide = width + 2 * self.padding
        if self.mode == "black":
            padded = functional.pad(images, [self.padding] * 4)  # (B, C, H + 2p, W + 2p)
        else:
            down, across = (_reflected(size, self.padding, images.device) for size in (height, width))
            padded = images.index_select(2, down).index_select(3, across)  # torch's own pad takes no uint8
        top, left = (random_values * (2 * self.padding + 1)).long().unbind(1)  # (B,) each
        # A row of the result lies in one piece in memory: copy B * C * H pieces of W bytes, by where they start.
        plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
        row = plane * (height + 2 * self.padding) + top[:, None, None] + torch.arange(height, device=images.device)
        start = row * wide + left[:, None, None]  # (B, C, H)
        pieces = padded.flatten().unfold(0, width, 1)  # a view: every piece of W bytes there is
        return pieces.index_select(0, start.flatten()).view(batch, channels, height, width)


class RandomFlip:
    """Mirror left and right with this probability."""

    num_random_values = 1

    def __init__(self, probability: float) -> None:
        self.probability = require_within("probability", probability, 0, 1)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        return _mirrored(images, random_values[:, 0] < self.probability)


class AlternatingFlip:
    """Mirror left and right in every other epoch: half of the samples in the even ones, the others in the odd ones.

    Two epochs in a row show each sample both ways, where chance would show half of them twice the same way.

    Source: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024, section 3.6.
    """

    num_random_values = 1
    alternates = True

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        return _mirrored(images, random_values[:, 0] < 0.5)


class RandomAffine:
    """Mirror, shear, scale, rotate and shift about the centre; bilinear, black outside; the result is float32.

    With S = [[1, -tan shear], [0, 1]] and R = [[cos, -sin], [sin, cos]] (y points down, so angles are clockwise), a
    point p of the image goes to scale * R S p + shift; the pixels are fetched by the inverse (Jaderberg et al.,
    Spatial Transformer Networks, 2015, section 3.2). Same convention as torchvision's functional.affine.
    """

    num_random_values = 6  # shift right, shift down, scale, rotation, shear, mirror

    def __init__(self, translate: float, scale: Sequence[float], rotate: float, shear: float, mirror: float) -> None:
        self.translate = require_within("translate", translate, 0, 1)
        self.scale = require_interval("scale", scale)
        self.rotate = math.radians(require_within("rotate", rotate, 0, 180))
        self.shear = math.radians(require_within("shear", shear, 0, 80))
        self.mirror = require_within("mirror", mirror, 0, 1)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        height, width = images.shape[2:]
        right, down, size, turn, lean, mirror = random_values.unbind(1)  # (B,) each
        right, down = self.translate * (2 * right - 1) * width, self.translate * (2 * down - 1) * height
        size = self.scale[0] + size * (self.scale[1] - self.scale[0])
        turn = self.rotate * (2 * turn - 1)
        slope = torch.tan(self.shear * (2 * lean - 1))
        side = torch.where(mirror < self.mirror, -1.0, 1.0)  # the image is mirrored before all the rest
        cosine, sine = torch.cos(turn) / size, torch.sin(turn) / size
        # The inverse, (S^-1 R^-1 / scale)(q - shift), for q in pixels from the centre.
        x_from_x, x_from_y = side * (cosine - slope * sine), side * (sine + slope * cosine)
        y_from_x, y_from_y = -sine, cosine
        x_from_1 = -(x_from_x * right + x_from_y * down)
        y_from_1 = -(y_from_x * right + y_from_y * down)
        # Built by hand, because affine_grid is ten times slower, and because sums of two terms have no batch's order.
        x, y = _from_centre(width, images.device), _from_centre(height, images.device)
        grid = torch.empty(2, len(images), height, width, device=images.device)
        for number, (across, along, constant, length) in enumerate(
            ((x_from_x, x_from_y, x_from_1, width), (y_from_x, y_from_y, y_from_1, height))
        ):
            rows, columns = across[:, None] * x + constant[:, None], along[:, None] * y  # (B, W), (B, H)
            torch.add(rows[:, None, :] * (2 / length), columns[:, :, None] * (2 / length), out=grid[number])
        return _sampled(images, grid)


class RandomResizedCrop:
    """A rectangle of any size and nearly any shape, resized to a square of `size` pixels (None: to the old size).

    `area` is the share of the image, evenly spread; `ratio` is width / height, its logarithm evenly spread over
    what the image has room for. (Torchvision draws both until the rectangle fits into the image, which makes large
    areas rarer.) Resized as torchvision does with antialias=True, the sides one after the other: see `resampling`.
    The result is float32.

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
    """Bend the image like rubber: each pixel is fetched from a place nearby, neighbours from nearly the same.

        displacement = alpha * (Gaussian of standard deviation sigma, convolved with noise within -1 to 1)

    in pixels, for x and y each; outside the image the noise is 0. A small sigma is frosted glass, a large one shifts
    the whole image. Bilinear, black outside; the result is float32. (Torchvision's alpha is twice this one.)

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
        return _fetch(images, right + x, down + y[:, None])

    def displacements(self, random_values: Tensor, *, height: int, width: int) -> Tensor:
        """From where each pixel is fetched, (B, 2, H, W): pixels to the right and down from its own place."""
        # Noise and weights are whole numbers, whose sums stay below 2^53: in double precision these matrix products
        # are exact, so that the order of their sums, which depends on the batch's size, changes no bit.
        noise = (per_pixel(random_values[:, 0], 2 * height * width) >> 15) | 1  # odd, -65535 to 65535
        noise = noise.view(-1, 2, height, width).double()
        smooth = self._weights(height, random_values.device) @ noise @ self._weights(width, random_values.device)
        return (smooth * (self.alpha * 2.0**-48)).float()

    def _weights(self, size: int, device: torch.device) -> Tensor:
        """Whole numbers (size, size): 2^16 times the Gaussian of the distance between two places."""
        place = torch.arange(size, dtype=torch.float64, device=device)
        gaussian = torch.exp(-0.5 * ((place - place[:, None]) / self.sigma) ** 2)
        return (gaussian * (2**16 / (self.sigma * math.sqrt(2 * math.pi)))).round()


def _mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, C, H, W), the chosen ones (B,) with left and right exchanged."""
    # Choosing whole images among both versions copies them in one piece: four times as fast as torch.where.
    both = torch.cat([images, images.flip(3)])  # (2B, C, H, W)
    position = torch.arange(len(images), device=images.device)
    return both.index_select(0, position + len(images) * chosen)


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Positions (size + 2 padding,) of what stands there when it is reflected at its ends, as often as it takes."""
    period = max(2 * (size - 1), 1)  # there and back
    place = torch.arange(-padding, size + padding, device=device) % period
    return torch.minimum(place, period - place)


def rectangles(
    random_values: Tensor, *, area: tuple[float, float], ratio: tuple[float, float], height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers (B, 4) to rectangles of whole pixels within an image: top, left, height, width, (B,) float32 each."""
    size, shape, down, right = random_values.double().unbind(
        1
    )  # logarithms and roots: no last bit of theirs shall matter
    share = area[0] + size * (area[1] - area[0])  # of the image
    # wide = sqrt(share H W ratio) <= W and tall = sqrt(share H W / ratio) <= H leave these ratios.
    least, most = share * width / height, width / (share * height)
    lowest, highest = (torch.clamp(torch.full_like(share, end), least, most).log() for end in ratio)
    root = torch.exp((lowest + shape * (highest - lowest)) / 2)  # of the ratio
    side = torch.sqrt(share * (height * width))
    wide, tall = (side * root).round().clamp(1, width), (side / root).round().clamp(1, height)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    return top.float(), left.float(), tall.float(), wide.float()


def resampling(start: Tensor, length: Tensor, *, full: int, size: int) -> tuple[Tensor, Tensor]:
    """How a piece of each side, (B,) each, becomes `size` pixels: which pixels of the side, and how much of each.

        centre = (i + 1/2) length / size;  weight of pixel j = max(0, 1 - |j + 1/2 - centre| / max(1, length / size))

    divided by their sum, none from outside the piece: bilinear where it is enlarged, a tent as wide as two new pixels
    where it shrinks. `full` is the whole side. Returns pixels int64 and weights float32, (B, size, taps) each.
    """
    scale = (length / size)[:, None]  # (B, 1)
    reach = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device) + 0.5) * scale  # (B, size)
    taps = math.ceil(2 * max(1, full / size))  # as many as the whole side needs: the same for every batch
    place = (centre - reach + 0.5).floor()[..., None] + torch.arange(taps, device=start.device)  # (B, size, taps)
    weight = (1 - (place + 0.5 - centre[..., None]).abs() / reach[..., None]).clamp(min=0)
    last = length[:, None, None] - 1
    weight = torch.where((place >= 0) & (place <= last), weight, 0.0)
    pixels = start[:, None, None] + torch.minimum(place.clamp(min=0), last)
    return pixels.long(), weight / weight.sum(2, keepdim=True)


def _resized(images: Tensor, top: Tensor, tall: Tensor, *, size: int) -> Tensor:
    """Float images (B, C, H, W), the rows from `top` on, `tall` of them, to (B, C, size, W)."""
    batch, channels, height, width = images.shape
    pixels, weights = resampling(top, tall, full=height, size=size)
    plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1, 1) * height
    rows = (plane + pixels[:, None]).flatten(0, 2)  # (B C size, taps): sums of whole rows, as fast as grid_sample
    shares = weights[:, None].expand(-1, channels, -1, -1).flatten(0, 2)
    table = images.reshape(-1, width)  # (B C H, W)
    mixed = functional.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")
    return mixed.view(batch, channels, size, width)


def _from_centre(size: int, device: torch.device) -> Tensor:
    """Where the pixels of a side are, in pixels from its centre: (size,)."""
    return torch.arange(size, device=device) + 0.5 - size / 2


def _fetch(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The images at these points, in pixels from the centre: bilinear, black outside; float32.

    x and y are (B, H, W), or 1 where they are the same along a side.
    """
    height, width = images.shape[2:]
    grid = torch.empty(2, len(images), height, width, device=images.device)
    grid[0], grid[1] = x * (2 / width), y * (2 / height)
    return _sampled(images, grid)


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    """The images at these points, (2, B, H, W), x and y apart, which is quicker to fill than side by side; -1 and 1 are
    the image's edges."""
    grid = grid.permute(1, 2, 3, 0)
    return functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
