"""VGG: 3x3 convolutions only, in stages; each stage halves the size of the maps and has up to twice the filters.

    image -> [3x3 -> ReLU] x n -> 2x2 max pool -> ... one stage for each list in `stages` ... -> head -> logits

Two 3x3 convolutions have a receptive field of 5x5 pixels, three of 7x7. Compared with one large filter, they have fewer
weights, 3 * (3*3*C*C) = 27 C^2 instead of 49 C^2, and more nonlinearities. The configurations of the paper's table 1
have 11 (A), 13 (B), 16 (D) and 19 (E) layers with weights. Their numbers of convolutions at (3, 224, 224) are:

    stage    1: 64 @ 224    2: 128 @ 112    3: 256 @ 56    4: 512 @ 28    5: 512 @ 14    -> 512 @ 7
    A             1               1              2              2              2
    B             2               2              2              2              2
    D             2               2              3              3              3
    E             2               2              4              4              4

    head `imagenet`: 7x7 maps (other sizes are averaged to 7x7) -> [4096 -> ReLU -> dropout] x 2 -> classes
    head `small`:    mean over pixels -> dropout -> classes. For images of about 32 px: five pools leave one pixel. The
                     large head would have nine tenths of the weights and would repeat this pixel 49 times.

Batch normalisation, which is newer than VGG, can be added between each convolution and its ReLU. Parameters have
torchvision's names, so its weights can be loaded.

Source: Simonyan and Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition, section 2 and
table 1; initial weights: section 3.1.
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

HEADS = {"imagenet": 7, "small": 1}  # side of the maps that the linear layers read


class VGG(nn.Module):
    """VGG. Each list in `stages` has the widths of the 3x3 convolutions before a pool."""

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
        self.minimum_size = 2 ** len(stages)  # each pool halves the size, rounded down; one pixel must remain

        layers: list[nn.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                # With a bias before a norm too, where it has no effect, because torchvision's weights contain it.
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
        """Return the logits (B, num_classes) of feature maps (B, channels, h, w)."""
        if maps.shape[2:] != (self.side, self.side):
            deterministic = torch.are_deterministic_algorithms_enabled()
            maps = average(maps, side=self.side) if deterministic else functional.adaptive_avg_pool2d(maps, self.side)
        logits: Tensor = self.classifier(maps.flatten(1))  # (B, channels, side, side) -> (B, channels * side * side)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return self.head(self.features(images))


def average(maps: Tensor, *, side: int) -> Tensor:
    """Return (B, C, side, side) for maps (B, C, h, w): adaptive average pooling.

    Torch's adaptive average pooling has no deterministic gradient on CUDA. Pixel i of the result is the mean of the
    maps' pixels from floor(i h / side) to ceil((i + 1) h / side).
    """

    def pixel_weights(size: int) -> Tensor:
        start = torch.arange(side, device=maps.device) * size // side
        end = -(-(torch.arange(side, device=maps.device) + 1) * size // side)
        pixel = torch.arange(size, device=maps.device)
        inside = (start[:, None] <= pixel) & (pixel < end[:, None])  # (side, size)
        return (inside / inside.sum(1, keepdim=True)).to(maps.dtype)

    return pixel_weights(maps.shape[2]) @ maps @ pixel_weights(maps.shape[3]).T


def _glorot(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill the weights as Glorot and Bengio do, uniformly.

    The paper trained its small configuration A from a normal distribution and initialised the deeper ones with A's
    layers. It notes that Glorot and Bengio's weights make this unnecessary (section 3.1).
    """
    nn.init.xavier_uniform_(layer.weight)
