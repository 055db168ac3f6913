"""Augmentations that change colours, in the same way for all pixels of an image.

Each is a step of `data.augment.pipeline`: it takes a batch and the uniform random values of each sample, and draws
none itself. Results are float32.
"""

import torch
from torch import Tensor

from data.augment.checks import require_within
from data.augment.distributions import normal
from data.device import widest_float


class ColorShift:
    """Change of brightness, contrast, saturation and hue, in this order, with factors drawn for each sample.

        brightness   f x                                   f uniform in 1 - brightness to 1 + brightness
        contrast     f x + (1 - f) mean grey of the image  f uniform in 1 - contrast to 1 + contrast
        saturation   f x + (1 - f) grey of the pixel       f uniform in 1 - saturation to 1 + saturation
        hue          shift by f of the colour circle       f uniform in -hue to hue

        grey = 0.2989 red + 0.587 green + 0.114 blue

    The first three are followed by clipping to 0 to 255. The definitions are torchvision's (functional.adjust_*), whose
    ColorJitter uses a random order for each image. A grey image has neither saturation nor hue.

    Source: Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification, 2013, section 2.
    """

    num_random_values = 4  # brightness, contrast, saturation, hue

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        self.brightness = require_within("brightness", brightness, 0, 1)
        self.contrast = require_within("contrast", contrast, 0, 1)
        self.saturation = require_within("saturation", saturation, 0, 1)
        self.hue = require_within("hue", hue, 0, 0.5)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        factors = (2 * random_values - 1)[:, :, None, None, None]  # (B, 4, 1, 1, 1), -1 to 1
        brightness, contrast, saturation, hue = factors.unbind(1)
        images = (images * (1 + self.brightness * brightness)).clamp_(0, 255)
        if self.contrast:
            # Grey values are rounded to multiples of 1/256: their sum is exact in double precision, in any order.
            shades = (grey(images) * 256).round_()
            mean = shades.mean(dim=(1, 2, 3), keepdim=True, dtype=widest_float(images.device)).div_(256).float()
            images = _blend(images, mean, 1 + self.contrast * contrast)
        if images.shape[1] == 3 and self.saturation:
            images = _blend(images, grey(images), 1 + self.saturation * saturation)
        if images.shape[1] == 3 and self.hue:
            images = turn_hue(images, self.hue * hue)
        return images


class PCAColor:
    """Random multiples of the principal components of the train split's colours, added to all pixels of an image.

        x + 255 (p1, p2, p3) (a1 l1, a2 l2, a3 l3)^T    a_i from N(0, sigma^2), once for each image

    p_i and l_i are eigenvectors and eigenvalues of the 3x3 covariance of the train split's pixels. The result depends
    on the scale of the pixels, which the paper does not state: here it is 0 to 1. (On the scale 0 to 255 the
    eigenvalues would be 255 times as large relative to the pixels, and would dominate the image.)

    Source: Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep CNNs, 2012, section 4.1 (sigma = 0.1).
    """

    num_random_values = 3  # one per component

    def __init__(self, sigma: float) -> None:
        self.sigma = require_within("sigma", sigma, 0, 100)
        self.components = torch.zeros(1, 1)  # before `fit`, images are unchanged

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set the covariance (C, C) of the train split's colours, on the scale 0 to 1. The mean (C,) is not used."""
        values, vectors = torch.linalg.eigh(covariance.double())
        # An eigenvector's sign is arbitrary: make its largest entry positive, for the same result on every machine.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.components = (255 * vectors * values).float()  # (C, C): one column per component

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        multiples = self.sigma * normal(random_values)  # (B, 3)
        self.components = self.components.to(images.device)  # copied once: each copy would wait for the device
        shift = torch.zeros((), device=images.device)
        for multiple, component in zip(multiples.unbind(1), self.components.unbind(1), strict=False):
            shift = shift + multiple[:, None] * component  # (B, C); in a fixed order, so that the batch changes no bit
        return images + shift[:, :, None, None]


def grey(images: Tensor) -> Tensor:
    """Return the grey values, float32 (B, 1, H, W), of images (B, C, H, W): ITU-R 601 luma if there are 3 channels."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    luma: Tensor = red * 0.2989 + green * 0.587 + blue * 0.114
    return luma


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Return float images (B, 3, H, W) with hues shifted by `turn` (B, 1, 1, 1), a share of the colour circle (HSV).

    Let V be the largest channel and V - C the smallest. If red, green or blue is the largest, then 6h = 0, 2 or 4,
    plus the difference of the other two channels divided by C. Back to RGB: channel n = 5, 3, 1 (red, green, blue) is
    V - C max(0, min(k, 4 - k, 1)) with k = (n + 6h) mod 6.
    """
    red, green, blue = images.split(1, dim=1)  # (B, 1, H, W) each
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)  # grey has no hue: any value is correct
    hue = torch.where(  # 6h
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # (3, 1, 1); a copy from the CPU would wait
    k = (n + (hue + 6 * turn)).remainder_(6)  # (B, 3, H, W)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp_(0, 255)
