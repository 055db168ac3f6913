"""GoogLeNet, the first Inception network: each block looks at its maps at several scales, side by side.

    maps -+-> 1x1 -------------------+-> joined channels
          +-> 1x1 -> 3x3 ------------+
          +-> 1x1 -> 5x5 ------------+        the 1x1 in front of a 3x3 or 5x5 takes away channels: that makes it cheap
          +-> 3x3 max pool -> 1x1 ---+

    image -> stem -> 3a 3b -> pool -> 4a 4b 4c 4d 4e -> pool -> 5a 5b -> mean over pixels -> dropout -> linear -> logits
                                      |        |
                                      +--------+-> auxiliary heads, in training only: a gradient for the lower layers

In training mode a network with auxiliary heads returns (logits, logits of head 1, logits of head 2), and their losses
count `auxiliary_weight` times each; in evaluation mode it returns the logits alone.

As in the paper there is no batch norm, and two local response normalisations in the stem; the paper gives them no
constants, so they have those of the network it took them from (Krizhevsky et al. 2012, section 3.3). `batch_norm: true`
puts a norm in place of each convolution's bias and drops the two, as the authors did next (Ioffe and Szegedy 2015,
section 4.2.1). The paper states no starting weights either: He's, made for ReLU, let it learn without batch norm, where
torch's own and Xavier's leave it at chance.
(torchvision's GoogLeNet has batch norm, and 3x3 convolutions where the 5x5 ones should be.)

The paper's images have 224 pixels, and its last pool takes the mean over 7x7. A mean over all pixels takes any size,
and so do the auxiliary heads: they pool to 4x4 pixels, which is the paper's 5x5 pool in steps of 3 at 224.

Source: Szegedy et al. 2014, Going Deeper with Convolutions: table 1, figures 2b and 3, section 5 (auxiliary heads).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import LocalResponseNorm, activation, initialise, require_count, require_dropout, require_flag

TABLE_1 = {  # channels in, then out: 1x1, in front of 3x3, 3x3, in front of 5x5, 5x5, behind the pool
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}


class GoogLeNet(nn.Module):
    """13,378,280 parameters at 3 channels and 1000 classes; 6,998,552 without the auxiliary heads."""

    minimum_size = 31  # leaves one pixel behind the last pool: 31 -> 16 -> 8 -> 4 -> 2 -> 1
    auxiliary_weight = 0.3  # of each auxiliary head's loss (section 5)

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        auxiliary: bool = True,
        batch_norm: bool = False,
        dropout: float = 0.4,
        init: str = "he_normal",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_dropout(dropout)
        require_flag(auxiliary=auxiliary, batch_norm=batch_norm)
        if auxiliary:
            self.minimum_size = 63  # leaves the heads their 4x4 pixels: 63 -> 32 -> 16 -> 8 -> 4

        def norm() -> list[nn.Module]:
            return [] if batch_norm else [LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)]

        def inception(name: str) -> Inception:
            return Inception(*TABLE_1[name], batch_norm=batch_norm)

        # In three parts, as the auxiliary heads look at what is behind 4a and 4d. Sizes at 224 pixels.
        self.to_4a = nn.Sequential(
            unit(in_channels, 64, kernel_size=7, stride=2, batch_norm=batch_norm),  # (B, 64, 112, 112)
            max_pool(),  # (B, 64, 56, 56)
            *norm(),
            unit(64, 64, kernel_size=1, batch_norm=batch_norm),
            unit(64, 192, kernel_size=3, batch_norm=batch_norm),  # (B, 192, 56, 56)
            *norm(),
            max_pool(),  # (B, 192, 28, 28)
            inception("3a"),  # (B, 256, 28, 28)
            inception("3b"),  # (B, 480, 28, 28)
            max_pool(),  # (B, 480, 14, 14)
            inception("4a"),  # (B, 512, 14, 14)
        )
        self.to_4d = nn.Sequential(
            inception("4b"),  # (B, 512, 14, 14)
            inception("4c"),  # (B, 512, 14, 14)
            inception("4d"),  # (B, 528, 14, 14)
        )
        self.to_5b = nn.Sequential(
            inception("4e"),  # (B, 832, 14, 14)
            max_pool(),  # (B, 832, 7, 7)
            inception("5a"),  # (B, 832, 7, 7)
            inception("5b"),  # (B, 1024, 7, 7)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # (B, 1024, h, w) -> (B, 1024, 1, 1)
            nn.Flatten(),  # -> (B, 1024)
            nn.Dropout(dropout),
            nn.Linear(1024, num_classes),
        )
        self.auxiliary_heads = nn.ModuleList(
            AuxiliaryHead(channels, num_classes, batch_norm=batch_norm)
            for channels in ((512, 528) if auxiliary else ())
        )
        initialise(self, init)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the maps of the last block (B, 1024, H/32, W/32)."""
        maps: Tensor = self.to_5b(self.to_4d(self.to_4a(images)))
        return maps

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, C, H, W) to logits (B, num_classes); in training a tuple with those of the auxiliary heads."""
        if not (self.training and self.auxiliary_heads):
            logits: Tensor = self.head(self.features(images))
            return logits
        behind_4a = self.to_4a(images)
        behind_4d = self.to_4d(behind_4a)
        logits = self.head(self.to_5b(behind_4d))
        first, second = self.auxiliary_heads
        return logits, first(behind_4a), second(behind_4d)


class Inception(nn.Module):
    """Four branches side by side: (B, in_channels, H, W) to (B, one + three + five + pooled, H, W)."""

    def __init__(
        self,
        in_channels: int,
        one: int,
        before_three: int,
        three: int,
        before_five: int,
        five: int,
        pooled: int,
        *,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.one = unit(in_channels, one, kernel_size=1, batch_norm=batch_norm)
        self.three = nn.Sequential(
            unit(in_channels, before_three, kernel_size=1, batch_norm=batch_norm),
            unit(before_three, three, kernel_size=3, batch_norm=batch_norm),
        )
        self.five = nn.Sequential(
            unit(in_channels, before_five, kernel_size=1, batch_norm=batch_norm),
            unit(before_five, five, kernel_size=5, batch_norm=batch_norm),
        )
        self.pooled = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            unit(in_channels, pooled, kernel_size=1, batch_norm=batch_norm),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, one + three + five + pooled, H, W)."""
        return torch.cat((self.one(maps), self.three(maps), self.five(maps), self.pooled(maps)), dim=1)


class AuxiliaryHead(nn.Module):
    """A small classifier on the maps of a block in the middle: (B, in_channels, H, W) to logits (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.unit = unit(in_channels, 128, kernel_size=1, batch_norm=batch_norm)
        self.head = nn.Sequential(
            nn.Flatten(),  # (B, 128, 4, 4) -> (B, 2048)
            nn.Linear(2048, 1024),
            activation("relu"),
            nn.Dropout(0.7),
            nn.Linear(1024, num_classes),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        # To 4x4 pixels: from 14, windows of 14 - 3 * 3 = 5 in steps of 3, where torch's adaptive pool has windows of 4.
        steps = [side // 4 for side in maps.shape[2:]]
        windows = [side - 3 * step for side, step in zip(maps.shape[2:], steps, strict=True)]
        logits: Tensor = self.head(self.unit(functional.avg_pool2d(maps, windows, steps)))
        return logits


def unit(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, batch_norm: bool) -> nn.Sequential:
    """A padded convolution, a norm in place of its bias if wanted, and ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=not batch_norm)
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return nn.Sequential(convolution, *norm, activation("relu"))


def max_pool() -> nn.MaxPool2d:
    """Half the size, rounded down. What reaches over the edge is on the right and below, as in the paper's sizes."""
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
