"""Airbench: a small model that trains on 32-pixel images in few steps; its first filters are fitted, not trained.

    whiten   2x2 filters that transform patches to uncorrelated values of variance 1, and their negatives -> GELU
    block    3x3 -> max pool -> norm -> GELU -> 3x3 -> norm -> GELU                      three of them
    head     largest value of each map / 9 -> linear

    32 -2x2-> 24 @ 31 -block-> 64 @ 15 -block-> 256 @ 7 -block-> 256 @ 3 -max, linear-> logits

Neighbouring pixels are nearly equal. Raw patches therefore vary along few directions, and training is slow along all
others. The filters W let every direction contribute from the first step. S = U L U^T is the covariance of the patches x
of training images (2 x 2 x C values; L: eigenvalues):

    W = (L + epsilon I)^-1/2 U^T        used as (W, -W), because GELU keeps only one sign

The filters are not trained, only their biases. The other convolutions start as the identity on as many maps as they
have inputs (Dirac), so images pass through from the start.

Source: Jordan 2024, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, sections 3.1 (network), 3.2 (whitening) and 3.3
(Dirac), and the norms' constants from its code; the whitening is Page's (How to Train Your ResNet, 2019) and tysam's.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import activation, convolution, initialise, require_counts

PATCH = 2  # side in pixels; the cost of larger filters grows with its square
EPSILON = 5e-4  # added to each variance; images have variance 1, and directions with less variance are mostly noise
CHUNK = 64  # number of images whose patches are processed at a time


class Airbench(nn.Module):
    """Airbench with one block per entry of `widths` (channels); 1,971,352 parameters at 3 channels and 10 classes."""

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
        del self.whiten.weight  # fitted, not trained: a buffer instead of a parameter
        self.whiten.register_buffer("weight", unfitted)
        self.blocks = nn.Sequential(*(block(before, width) for before, width in pairwise([filters, *widths])))
        self.activation = activation("gelu")
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        initialise(self, init, paper=_identity)
        self.minimum_size = 2 ** len(widths) + 1  # leaves one pixel for the head

    def fit(self, images: Tensor) -> None:
        """Fit the first filters to normalised training images (N, C, H, W)."""
        # `eigh` returns ascending eigenvalues; the eigenvectors are the columns of U.
        values, vectors = torch.linalg.eigh(patch_covariance(images))
        filters = (vectors * (values + EPSILON).rsqrt()).T.flip(0)  # (D, D): one filter per row, by falling variance
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))

    def features(self, images: Tensor) -> Tensor:
        """Return the largest value of each map, divided by 9, (B, widths[-1]), for images (B, C, H, W)."""
        maps: Tensor = self.blocks(self.activation(self.whiten(images)))
        # Not amax: its gradient compares values that a compiler may have rounded differently, and is then NaN.
        return functional.max_pool2d(maps, maps.shape[2:]).flatten(1) / 9

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def block(in_channels: int, width: int) -> nn.Sequential:
    """Return a block: (B, in_channels, H, W) -> (B, width, H // 2, W // 2)."""
    return nn.Sequential(
        convolution(in_channels, width, kernel_size=3),
        nn.MaxPool2d(2),  # before norm and GELU, which then process a quarter of the values
        norm(width),
        activation("gelu"),
        convolution(width, width, kernel_size=3),
        norm(width),
        activation("gelu"),
    )


def norm(width: int) -> nn.BatchNorm2d:
    """Return a norm without a trainable scale. Its running statistics cover the last few batches."""
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    # A constant scale, as torch's CUDA kernels return no gradient for a shift without a scale.
    del layer.weight
    layer.register_buffer("weight", torch.ones(width), persistent=False)
    return layer


def patch_covariance(images: Tensor) -> Tensor:
    """Return the covariance (D, D) of all patches (D,) of images (N, C, H, W), in double precision; D = C * PATCH^2."""
    count, sums, products = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chunk in images.split(CHUNK):
        patches = functional.unfold(chunk, PATCH).double().movedim(1, 0).flatten(1)  # (D, patches of all images)
        count += patches.shape[1]
        sums, products = sums + patches.sum(1), products + patches @ patches.T
    return products / count - torch.outer(sums, sums) / count**2


def _identity(layer: nn.Conv2d | nn.Linear) -> None:
    """Set the first filters of a convolution to the identity on one map each; all other weights are torch's default."""
    if isinstance(layer, nn.Conv2d):
        nn.init.dirac_(layer.weight[: layer.in_channels])
