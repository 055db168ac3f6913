"""VGG: nothing but 3x3 convolutions, more of them where the maps are smaller.

    image -> [3x3 -> ReLU] x n -> 2x2 max pool -> ... a stage for each list in `stages` ... -> head -> logits

Two 3x3 convolutions see 5x5 pixels and three see 7x7, as one large filter would, with fewer weights and more
nonlinearities: 3 * (3*3*C*C) = 27 C^2 against 49 C^2. How many there are at (3, 224, 224) in the configurations of the
paper's table 1, which have 11 (A), 13 (B), 16 (D) and 19 (E) layers with weights:

    stage    1: 64 @ 224    2: 128 @ 112    3: 256 @ 56    4: 512 @ 28    5: 512 @ 14    -> 512 @ 7
    A             1               1              2              2              2
    B             2               2              2              2              2
    D             2               2              3              3              3
    E             2               2              4              4              4

    head `imagenet`: 7x7 maps (others are averaged to that) -> 4096 -> ReLU -> 4096 -> ReLU -> classes, both dropped out
    head `small`:    mean over pixels -> dropout -> classes. For images of about 32 px, of which five pools leave one:
                     the large head would hold nine tenths of the weights and repeat that pixel 49 times.

Batch normalisation, two years younger, goes between each convolution and its ReLU. Parameters have torchvision's names,
so its weights load as they are.

Source: Simonyan and Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition, section 2 and
table 1; starting weights: section 3.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import (
    activation,
    choose,
    initialise,
    require_count,
    require_dropout,
    require_flag,
    require_lists_of_counts,
)

HEADS = {"imagenet": 7, "small": 1}  # the side of the maps that the linear layers read


class VGG(nn.Module):
    """`stages` are the widths of the 3x3 convolutions in front of each pool."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        stages: Sequence[Sequence[int]] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
        batch_norm: bool = False,
        head: str = "imagenet",
        dropout: float = 0.5,
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_lists_of_counts(stages=stages)
        require_dropout(dropout)
        require_flag(batch_norm=batch_norm)
        self.side = choose("head", head, HEADS)
        self.minimum_size = 2 ** len(stages)  # each pool halves, rounded down; one pixel must be left

        layers: list[nn.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                # With a bias in front of a norm too, where it has no effect: torchvision's weights have it.
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(activation("relu"))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

        if head == "imagenet":
            self.classifier = nn.Sequential(
                nn.Linear(channels * self.side**2, 4096),
                activation("relu"),
                nn.Dropout(dropout),
                nn.Linear(4096, 4096),
                activation("relu"),
                nn.Dropout(dropout),
                nn.Linear(4096, num_classes),
            )
        else:
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, init, paper=_glorot)

    def head(self, maps: Tensor) -> Tensor:
        """Maps (B, channels, h, w) to logits (B, num_classes)."""
        if maps.shape[2:] != (self.side, self.side):
            exact = torch.are_deterministic_algorithms_enabled()
            maps = average(maps, side=self.side) if exact else functional.adaptive_avg_pool2d(maps, self.side)
        logits: Tensor = self.classifier(maps.flatten(1))  # (B, channels, side, side) -> (B, channels * side * side)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images))


def average(maps: Tensor, *, side: int) -> Tensor:
    """(B, C, h, w) to (B, C, side, side), as adaptive average pooling; torch's has no deterministic gradient on CUDA.

    Pixel i of the result is the mean of the maps' pixels from floor(i h / side) to ceil((i + 1) h / side).
    """

    def shares(size: int) -> Tensor:
        start = torch.arange(side, device=maps.device) * size // side
        end = -(-(torch.arange(side, device=maps.device) + 1) * size // side)
        pixel = torch.arange(size, device=maps.device)
        inside = (start[:, None] <= pixel) & (pixel < end[:, None])  # (side, size)
        return (inside / inside.sum(1, keepdim=True)).to(maps.dtype)

    return shares(maps.shape[2]) @ maps @ shares(maps.shape[3]).T


def _glorot(layer: nn.Conv2d | nn.Linear) -> None:
    """The paper trained its small network A from a normal distribution and began the deeper ones with A's layers; it
    notes that Glorot and Bengio's weights make that needless (section 3.1)."""
    nn.init.xavier_uniform_(layer.weight)
