"""Airbench: a small network that learns 32-pixel images in the fewest steps; its first filters are not learnt at all.

    whiten   2x2 filters that turn patches into uncorrelated numbers of variance 1, each and its negative -> GELU
    block    3x3 -> max pool -> norm -> GELU -> 3x3 -> norm -> GELU                      three of them
    head     the largest value of each map / 9 -> linear

    32 -2x2-> 24 @ 31 -block-> 64 @ 15 -block-> 256 @ 7 -block-> 256 @ 3 -max, linear-> logits

Neighbouring pixels say nearly the same, so that plain patches differ along few directions, and steps along all others
are slow. With the covariance S = U L U^T of the patches x of training images (2 x 2 x C numbers; L: eigenvalues)

    W = (L + epsilon I)^-1/2 U^T        filters (W, -W): as GELU keeps one sign alone, both are there

gives every direction its say from the first step on. The filters stay as they are; only their biases learn. The other
convolutions begin as the identity on as many maps as they get (Dirac), so that images pass through from the start.

Source: Jordan 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, sections 3.1 (network), 3.2 (whitening) and 3.3
(Dirac), and the norms' constants from its code; the whitening is Page's (How to Train Your ResNet, 2019) and tysam's.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import activation, convolution, initialise, require_counts

PATCH = 2  # pixels; larger filters see more, at the cost of the square
EPSILON = 5e-4  # added to each variance, the images being of variance 1: what varies less is mostly noise
CHUNK = 64  # images whose patches are taken up at a time


class Airbench(nn.Module):
    """Each block's convolutions give `widths` channels. 1,971,352 parameters at 3 channels and 10 classes."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int] = (64, 256, 256),
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_counts(widths=widths)
        filters = 2 * in_channels * PATCH**2
        self.whiten = nn.Conv2d(in_channels, filters, PATCH)
        unfitted = self.whiten.weight.detach()
        del self.whiten.weight  # fitted, not learnt: state, but no parameter
        self.whiten.register_buffer("weight", unfitted)
        self.blocks = nn.Sequential(*(block(before, width) for before, width in pairwise([filters, *widths])))
        self.activation = activation("gelu")
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        initialise(self, init, paper=_identity)
        self.minimum_size = 2 ** len(widths) + 1  # leaves one pixel to the head

    def fit(self, images: Tensor) -> None:
        """Fit the first filters to normalised training images (N, C, H, W)."""
        values, vectors = torch.linalg.eigh(patch_covariance(images))  # from the smallest eigenvalue; U's columns
        filters = (vectors * (values + EPSILON).rsqrt()).T.flip(0)  # (D, D), a filter a row, the largest first
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the largest value of each map, (B, W)."""
        maps: Tensor = self.blocks(self.activation(self.whiten(images)))
        return maps.amax(dim=(2, 3)) / 9

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def block(in_channels: int, width: int) -> nn.Sequential:
    """(B, in_channels, H, W) to (B, width, H // 2, W // 2)."""
    return nn.Sequential(
        convolution(in_channels, width, kernel_size=3),
        nn.MaxPool2d(2),  # before norm and GELU, which then have a quarter to do
        norm(width),
        activation("gelu"),
        convolution(width, width, kernel_size=3),
        norm(width),
        activation("gelu"),
    )


def norm(width: int) -> nn.BatchNorm2d:
    """A norm without a scale to learn, whose running statistics are those of the last few batches."""
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.register_parameter("weight", None)
    return layer


def patch_covariance(images: Tensor) -> Tensor:
    """Of all patches x (D,) of images (N, C, H, W): (D, D), D = C * PATCH^2, in double precision."""
    count, sums, products = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for piece in images.split(CHUNK):
        patches = functional.unfold(piece, PATCH).double().movedim(1, 0).flatten(1)  # (D, patches of all images)
        count += patches.shape[1]
        sums, products = sums + patches.sum(1), products + patches @ patches.T
    return products / count - torch.outer(sums, sums) / count**2


def _identity(layer: nn.Conv2d | nn.Linear) -> None:
    """Torch's own weights, but for a convolution's first filters: each passes one map on as it is."""
    if isinstance(layer, nn.Conv2d):
        nn.init.dirac_(layer.weight[: layer.in_channels])
