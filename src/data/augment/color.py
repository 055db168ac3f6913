"""Augmentations that change colours, the same way for all pixels of an image.

Each is a step of `data.augment.pipeline`: it takes a batch and the uniform random values of each sample,
and draws none itself.
Results are float32.
"""

import torch
from torch import Tensor

from data.augment.checks import require_within
from data.augment.distributions import normal


class ColorShift:
    """Brightness, contrast, saturation and hue, in this order, each by a factor of the sample's own.

        brightness   f x                    f evenly within 1 - brightness to 1 + brightness; likewise
        contrast     f x + (1 - f) mean of the image's grey
        saturation   f x + (1 - f) the pixel's grey            grey = 0.2989 red + 0.587 green + 0.114 blue
        hue          turned by f of the colour circle          f evenly within -hue to hue

    Cut off at 0 and 255 after each. The definitions are torchvision's (functional.adjust_*), whose ColorJitter has a
    new order for each image. A grey image has neither saturation nor hue.

    Source: Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification, 2013, section 2.
    """

    num_random_values = 4  # brightness, contrast, saturation, hue

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        self.brightness = require_within("brightness", brightness, 0, 1)
        self.contrast = require_within("contrast", contrast, 0, 1)
        self.saturation = require_within("saturation", saturation, 0, 1)
        self.hue = require_within("hue", hue, 0, 0.5)

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        brightness, contrast, saturation, hue = (2 * random_values - 1)[:, :, None, None, None].unbind(
            1
        )  # (B, 1, 1, 1) each
        images = (images * (1 + self.brightness * brightness)).clamp_(0, 255)
        if self.contrast:
            # Grey in whole 256ths: their sum is exact in double precision, whatever its order.
            shades = (grey(images) * 256).round_()
            mean = shades.mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).div_(256).float()
            images = _blend(images, mean, 1 + self.contrast * contrast)
        if images.shape[1] == 3 and self.saturation:
            images = _blend(images, grey(images), 1 + self.saturation * saturation)
        if images.shape[1] == 3 and self.hue:
            images = turn_hue(images, self.hue * hue)
        return images


class PCAColor:
    """Add to all pixels a multiple of each principal component of the training data's colours.

        x + 255 (p1, p2, p3) (a1 l1, a2 l2, a3 l3)^T    a_i from N(0, sigma^2), once for each image

    p_i and l_i are eigenvectors and eigenvalues of the 3x3 covariance of the training part's pixels. The formula knows
    their scale, though the paper does not tell it: here it is 0 to 1. (On 0 to 255 the eigenvalues would be 255 times
    as large beside the pixels, and drown the image.)

    Source: Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep CNNs, 2012, section 4.1 (sigma = 0.1).
    """

    num_random_values = 3  # one for each component

    def __init__(self, sigma: float) -> None:
        self.sigma = require_within("sigma", sigma, 0, 100)
        self.components = torch.zeros(1, 1)  # of no data: they change nothing

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """The colours of the training part on the scale 0 to 1: their mean (C,) is not needed, covariance (C, C)."""
        values, vectors = torch.linalg.eigh(covariance.double())
        # An eigenvector is one up to its sign: let its largest part be positive, on every machine.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.components = (255 * vectors * values).float()  # (C, C): a column a component

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        multiples = self.sigma * normal(random_values)  # (B, 3)
        self.components = self.components.to(images.device)  # and there they stay: copying waits for the device
        shift = torch.zeros((), device=images.device)
        for multiple, component in zip(multiples.unbind(1), self.components.unbind(1), strict=False):
            shift = shift + multiple[:, None] * component  # (B, C): one by one, so that the batch changes no bit
        return images + shift[:, :, None, None]


def grey(images: Tensor) -> Tensor:
    """Images (B, C, H, W) to float32 (B, 1, H, W): ITU-R 601 luma of colour, grey as it is."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    luma: Tensor = red * 0.2989 + green * 0.587 + blue * 0.114
    return luma


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Float images (B, 3, H, W), their hues moved by `turn` (B, 1, 1, 1) of the colour circle (HSV: a hexagon).

    With the largest part V and the smallest V - C, hue 6h = 0, 2, 4 at red, green, blue, plus the difference of the
    other two over C; and back, a part n = 5, 3, 1 is V - C max(0, min(k, 4 - k, 1)) with k = (n + 6h) mod 6.
    """
    red, green, blue = images.split(1, dim=1)  # (B, 1, H, W) each
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    over = torch.where(chroma > 0, chroma, 1.0)  # grey has no hue: any will do
    hue = torch.where(
        value == red,
        (green - blue) / over,
        torch.where(value == green, (blue - red) / over + 2, (red - green) / over + 4),
    )
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # (3, 1, 1): made there, as copying waits
    k = (n + (hue + 6 * turn)).remainder_(6)  # (B, 3, H, W)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp_(0, 255)
