"""Augmentations that damage an image: erasing, blur, noise.

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
from data.augment.distributions import normal, per_pixel
from data.augment.geometry import rectangles
from data.device import widest_float


class RandomErasing:
    """Rectangle filled with `random` colours, with the train split's `mean` colour, or with `black`.

    `area` is its share of the image, uniformly distributed. `ratio` is width / height, and its logarithm is uniformly
    distributed. (In the paper the ratio itself is uniform, which makes wide rectangles rarer than tall ones.) Pixels
    keep their type.

    Source: Zhong et al., Random Erasing Data Augmentation, 2017, section 3.2 (probability 0.5, area 2 % to 40 %, ratio
    0.3 to 1 / 0.3, random colours).
    """

    num_random_values = 6  # whether to erase, area, ratio, top, left, colours

    def __init__(self, probability: float, area: Sequence[float], ratio: Sequence[float], fill: str) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.area = require_interval("area", area, high=1)
        self.ratio = require_interval("ratio", ratio)
        if fill not in ("random", "mean", "black"):
            raise ConfigError("fill", "must be random, mean or black", value=fill)
        self.fill = fill
        self.colour = torch.zeros(1)  # black

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the mean colour (C,) of the train split, on the scale 0 to 1. The covariance (C, C) is not used."""
        if self.fill == "mean":
            self.colour = (255 * mean).round().float()

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        channels, height, width = images.shape[1:]
        box = rectangles(random_values[:, 1:5], area=self.area, ratio=self.ratio, height=height, width=width)
        top, left, tall, wide = (coordinate[:, None] for coordinate in box)  # (B, 1) each
        tall = torch.where(random_values[:, :1] < self.probability, tall, 0)
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + wide)  # (B, H), (B, W)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
        if self.fill == "random":
            bits = per_pixel(random_values[:, 5], channels * height * width)
            colours = (bits >> 24).view(images.shape) + 128  # 0 to 255
        else:
            self.colour = self.colour.to(images.device)  # copied once: each copy would wait for the device
            colours = self.colour[:, None, None]  # (C, 1, 1)
        return torch.where(inside, colours.to(images.dtype), images)


class RandomBlur:
    """Gaussian blur with a standard deviation drawn for each sample.

    `sigma`, in pixels, is uniformly distributed. The kernel ends at 3 times the largest sigma, and the image is
    reflected at its border. The result is float32, as of torchvision's gaussian_blur with that kernel.

    Source: Chen et al., A Simple Framework for Contrastive Learning (SimCLR), 2020, appendix A.
    """

    num_random_values = 2  # whether to blur, sigma

    def __init__(self, probability: float, sigma: Sequence[float]) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.sigma = require_interval("sigma", sigma, high=100)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        wide = widest_float(images.device)
        sigma = self.sigma[0] + random_values[:, 1:].to(wide) * (self.sigma[1] - self.sigma[0])  # (B, 1)
        radius = min(math.ceil(3 * self.sigma[1]), min(images.shape[2:]) - 1)
        distance = torch.arange(-radius, radius + 1, device=images.device)
        weights = torch.exp(-0.5 * (distance / sigma) ** 2)  # (B, 2 radius + 1)
        weights = weights / weights.sum(1, keepdim=True)
        weights = torch.where(random_values[:, :1] < self.probability, weights, (distance == 0).to(wide)).float()
        images = functional.pad(images.float(), [radius] * 4, mode="reflect")
        return _weighted_sum(_weighted_sum(images, weights, dim=2), weights, dim=3)


class RandomNoise:
    """Noise from N(0, s^2), added to each channel of each pixel; the result is float32, clipped to 0 to 255.

    The standard deviation s is drawn for each sample, uniformly from 0 to `sd`, on the scale 0 to 255.

    Source: Sietsma and Dow, Creating Artificial Neural Networks that Generalize, 1991.
    """

    num_random_values = 3  # whether to add noise, standard deviation, noise

    def __init__(self, probability: float, sd: float) -> None:
        self.probability = require_within("probability", probability, 0, 1)
        self.sd = require_within("sd", sd, 0, 255)
        self.table = normal((torch.arange(2**16) + 0.5) / 2**16)  # equally likely values of N(0, 1)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        chance, size, seed = random_values.unbind(1)  # (B,) each
        sd = torch.where(chance < self.probability, size * self.sd, 0.0)
        index = (per_pixel(seed, images[0].numel()) >> 16) + 2**15  # (B, C H W), 0 to 2^16 - 1
        self.table = self.table.to(images.device)  # copied once: each copy would wait for the device
        noise = self.table.index_select(0, index.flatten()).view(images.shape)
        return (noise * sd[:, None, None, None]).add_(images).clamp_(0, 255)


def _weighted_sum(images: Tensor, weights: Tensor, *, dim: int) -> Tensor:
    """Return the sum of K shifted images with weights (B, K); dimension `dim` becomes shorter by K - 1.

    The terms are added in a fixed order. A convolution's order of summation depends on the batch.
    """
    size = images.shape[dim] - weights.shape[1] + 1
    terms = (images.narrow(dim, k, size) * weights[:, k, None, None, None] for k in range(weights.shape[1]))
    result = next(terms)
    for term in terms:
        result += term
    return result
