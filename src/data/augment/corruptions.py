"""Augmentations that take something away from an image: a rectangle, sharpness, signal.

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
from data.augment.distributions import normal, per_pixel
from data.augment.geometry import rectangles


class RandomErasing:
    """Fill a rectangle with `random` colours, with the training part's `mean` colour, or with `black`.

    `area` is its share of the image, evenly spread; `ratio` is width / height, its logarithm evenly spread. (The
    paper spreads the ratio itself, which makes lying rectangles rarer than standing ones.) Pixels keep their type.

    Source: Zhong et al., Random Erasing Data Augmentation, 2017, section 3.2 (probability 0.5, area 2 % to 40 %, ratio
    0.3 to 1 / 0.3, random colours).
    """

    num_random_values = 6  # whether, area, ratio, top, left, colours

    def __init__(self, probability: float, area: Sequence[float], ratio: Sequence[float], fill: str) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.area = require_interval("area", area, high=1)
        self.ratio = require_interval("ratio", ratio)
        if fill not in ("random", "mean", "black"):
            raise ConfigError("fill", "must be random, mean or black", value=fill)
        self.fill = fill
        self.colour = torch.zeros(1)  # black

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """The colours of the training part on the scale 0 to 1: mean (C,); their covariance (C, C) is not needed."""
        if self.fill == "mean":
            self.colour = (255 * mean).round().float()

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        box = rectangles(random_values[:, 1:5], area=self.area, ratio=self.ratio, height=height, width=width)
        top, left, tall, wide = (part[:, None] for part in box)  # (B, 1) each
        tall = torch.where(random_values[:, :1] < self.probability, tall, 0)
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + wide)  # (B, H), (B, W)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
        if self.fill == "random":
            colours = (per_pixel(random_values[:, 5], channels * height * width) >> 24).view(
                images.shape
            ) + 128  # 0 to 255
        else:
            self.colour = self.colour.to(images.device)  # and there it stays: copying waits for the device
            colours = self.colour[:, None, None]  # (C, 1, 1)
        return torch.where(inside, colours.to(images.dtype), images)


class RandomBlur:
    """Weigh each pixel with its neighbours by a Gaussian, whose standard deviation is the sample's own.

    `sigma`, in pixels, is evenly spread; the Gaussian is cut off at 3 of the largest, and the image mirrored at its
    border. The result is float32, and torchvision's gaussian_blur of that kernel.

    Source: Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020, appendix A.
    """

    num_random_values = 2  # whether, sigma

    def __init__(self, probability: float, sigma: Sequence[float]) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.sigma = require_interval("sigma", sigma, high=100)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        sigma = self.sigma[0] + random_values[:, 1:].double() * (self.sigma[1] - self.sigma[0])  # (B, 1)
        radius = min(math.ceil(3 * self.sigma[1]), min(images.shape[2:]) - 1)
        distance = torch.arange(-radius, radius + 1, device=images.device)
        weights = torch.exp(-0.5 * (distance / sigma) ** 2)  # (B, 2 radius + 1)
        weights = weights / weights.sum(1, keepdim=True)
        weights = torch.where(random_values[:, :1] < self.probability, weights, (distance == 0).double()).float()
        images = functional.pad(images.float(), [radius] * 4, mode="reflect")
        return _weigh(_weigh(images, weights, dim=2), weights, dim=3)


class RandomNoise:
    """Add to each number of each pixel one from N(0, sd^2); cut off at 0 and 255.

    The standard deviation, on the scale 0 to 255, is the sample's own, evenly spread within 0 to `sd`. Float32.

    Source: Sietsma and Dow, Creating Artificial Neural Networks that Generalize, 1991.
    """

    num_random_values = 3  # whether, standard deviation, noise

    def __init__(self, probability: float, sd: float) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.sd = require_within("sd", sd, 0, 255)
        self.table = normal((torch.arange(2**16) + 0.5) / 2**16)  # equally likely values of N(0, 1)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        chance, size, seed = random_values.unbind(1)  # (B,) each
        sd = torch.where(chance < self.probability, size * self.sd, 0.0)
        place = (per_pixel(seed, images[0].numel()) >> 16) + 2**15  # (B, C H W), 0 to 2^16 - 1
        self.table = self.table.to(images.device)  # and there it stays: copying waits for the device
        noise = self.table.index_select(0, place.flatten()).view(images.shape)
        return (noise * sd[:, None, None, None]).add_(images).clamp_(0, 255)


def _weigh(images: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """A weighted sum of K shifted images along a dimension, which gets shorter by K - 1; weights (B, K).

    One after the other, and not as a convolution: that would sum up in another order for another batch.
    """
    size = images.shape[dim] - weights.shape[1] + 1
    terms = (images.narrow(dim, k, size) * weights[:, k, None, None, None] for k in range(weights.shape[1]))
    result = next(terms)
    for term in terms:
        result += term
    return result
