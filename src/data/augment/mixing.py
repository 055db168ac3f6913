"""Augmentations that mix two samples: their images and their labels.

Each is a mixing step of `data.augment.pipeline`, which supplies the partners and turns labels into probabilities.
A step draws no random values itself. The partner is any sample of the train split (in the papers: of the same batch),
so that it does not depend on how samples are grouped into batches.
"""

import torch
from torch import Tensor

from data.augment.checks import require_within
from data.augment.distributions import SymmetricBeta


class Mixing:
    """Base class of the mixing steps: it computes the share l that a sample keeps of its own image and label."""

    mixes = True

    def __init__(self, alpha: float, probability: float) -> None:
        self.beta = SymmetricBeta("alpha", alpha)
        self.probability = require_within("probability", probability, 0, 1)

    def shares(self, random_values: Tensor) -> Tensor:
        """Return l of each sample, (B,): 1 if it is not mixed. The random values (B, >= 2) are uniform."""
        return torch.where(random_values[:, 0] < self.probability, self.beta(random_values[:, 1]), 1.0)


class Mixup(Mixing):
    """Weighted mean of two images, l x_i + (1 - l) x_j, and of their labels; l from Beta(a, a).

    The images become float32. They are mixed on the scale 0 to 255: the normalised mixture is equal to the mixture of
    the normalised images.

    Source: Zhang, Cissé, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, 2018, section 2.
    """

    num_random_values = 2  # whether to mix, share

    def __call__(self, images: Tensor, labels: Tensor, random_values: Tensor) -> tuple[Tensor, Tensor]:
        (own, other), (label, other_label) = images.chunk(2), labels.chunk(2)
        share = self.shares(random_values)
        return _mixed(own, other, share[:, None, None, None]), _mixed(label, other_label, share[:, None])


class CutMix(Mixing):
    """Image in which a rectangle is replaced by the partner's pixels; the labels are mixed by the areas.

        width W sqrt(1 - l), height H sqrt(1 - l), l from Beta(a, a)

    The rectangle's centre is any point of the image. The rectangle is clipped to the image, so the share of the label
    is computed from the number of replaced pixels. Pixels keep their type.

    Source: Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers, 2019, section 3.1 and algorithm A1.
    """

    num_random_values = 4  # whether to mix, share, centre x, centre y

    def __call__(self, images: Tensor, labels: Tensor, random_values: Tensor) -> tuple[Tensor, Tensor]:
        (own, other), (label, other_label) = images.chunk(2), labels.chunk(2)
        share = self.shares(random_values)
        height, width = images.shape[2:]
        rows = _covered(random_values[:, 3], share, size=height)  # (B, H)
        columns = _covered(random_values[:, 2], share, size=width)  # (B, W)
        area = rows.sum(1) * columns.sum(1)
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)
        kept = 1 - area / (height * width)
        return torch.where(inside, other, own), _mixed(label, other_label, kept[:, None])


def _mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return own * share + other * (1 - share)


def _covered(centre: Tensor, share: Tensor, *, size: int) -> Tensor:
    """Return which pixels of a side the rectangles cover: bool (B, size)."""
    half = (size * torch.sqrt(1 - share) / 2).floor()
    middle = (size * centre).floor()
    position = torch.arange(size, device=centre.device)
    return (position >= (middle - half)[:, None]) & (position < (middle + half)[:, None])
