"""GoogLeNet, the first Inception model: each block applies filters of several sizes in parallel.

    maps -+-> 1x1 -------------------+-> concatenation
          +-> 1x1 -> 3x3 ------------+
          +-> 1x1 -> 5x5 ------------+        the 1x1 before a 3x3 or 5x5 reduces the channels, and so the cost
          +-> 3x3 max pool -> 1x1 ---+

    image -> stem -> 3a 3b -> pool -> 4a 4b 4c 4d 4e -> pool -> 5a 5b -> mean over pixels -> dropout -> linear -> logits
                                      |        |
                                      +--------+-> auxiliary heads, in training only: gradients for the lower layers

In training mode, a model with auxiliary heads returns (logits, logits of head 1, logits of head 2). The loss of each
auxiliary head is multiplied by `auxiliary_weight`. In evaluation mode, the model returns only the logits.

As in the paper, there is no batch norm, and the stem has two local response normalisations. The paper does not state
their constants; they are those of the paper that introduced them (Krizhevsky et al. 2012, section 3.3).
`batch_norm: true` replaces the bias of each convolution by a norm and removes the two normalisations, as the authors
did later (Ioffe and Szegedy 2015, section 4.2.1). The paper does not state initial weights either. With He's weights,
made for ReLU, the model learns without batch norm; with torch's default or Xavier's weights it stays at chance level.
(torchvision's GoogLeNet has batch norm, and 3x3 convolutions in place of the 5x5 ones.)

The paper's images have 224 pixels, and its last pool is a mean over 7x7. Here, the mean over all pixels accepts any
size. So do the auxiliary heads: they pool to 4x4 pixels, which at 224 is the paper's 5x5 pool of stride 3.

Source: Szegedy et al. 2014, Going Deeper with Convolutions: table 1, figures 2b and 3, section 5 (auxiliary heads).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import LocalResponseNorm, activation, initialise, require_count, require_dropout, require_flag

TABLE_1 = {  # input channels, then output channels: 1x1, 1x1 before 3x3, 3x3, 1x1 before 5x5, 5x5, 1x1 after the pool
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
    """GoogLeNet, with 13,378,280 parameters at 3 channels and 1000 classes; 6,998,552 without the auxiliary heads."""

    minimum_size = 31  # leaves one pixel after the last pool: 31 -> 16 -> 8 -> 4 -> 2 -> 1
    auxiliary_weight = 0.3  # factor of each auxiliary head's loss (section 5)

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
            self.minimum_size = 63  # leaves 4x4 pixels for the auxiliary heads: 63 -> 32 -> 16 -> 8 -> 4

        def norm() -> list[nn.Module]:
            return [] if batch_norm else [LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)]

        def inception(name: str) -> Inception:
            return Inception(*TABLE_1[name], batch_norm=batch_norm)

        # Three modules, because the auxiliary heads read the outputs of 4a and 4d. Sizes at 224 pixels.
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
        """Return the maps of the last block (B, 1024, H/32, W/32) for images (B, C, H, W)."""
        maps: Tensor = self.to_5b(self.to_4d(self.to_4a(images)))
        return maps

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits (B, num_classes) of images (B, C, H, W); in training, a tuple with the auxiliary logits."""
        if not (self.training and self.auxiliary_heads):
            logits: Tensor = self.head(self.features(images))
            return logits
        maps_4a = self.to_4a(images)
        maps_4d = self.to_4d(maps_4a)
        logits = self.head(self.to_5b(maps_4d))
        head_1, head_2 = self.auxiliary_heads
        return logits, head_1(maps_4a), head_2(maps_4d)


class Inception(nn.Module):
    """Four parallel branches: (B, in_channels, H, W) -> (B, one + three + five + pooled, H, W)."""

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
        """Return (B, one + three + five + pooled, H, W) for maps (B, in_channels, H, W)."""
        return torch.cat((self.one(maps), self.three(maps), self.five(maps), self.pooled(maps)), dim=1)


class AuxiliaryHead(nn.Module):
    """Small classifier on the maps of an intermediate block: (B, in_channels, H, W) -> logits (B, num_classes)."""

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
        """Return the logits (B, num_classes) of maps (B, in_channels, H, W)."""
        # Pool to 4x4 pixels. From 14 pixels: windows of 14 - 3 * 3 = 5, stride 3, as in the paper. Torch's adaptive
        # pool would have windows of 4.
        strides = [side // 4 for side in maps.shape[2:]]
        windows = [side - 3 * stride for side, stride in zip(maps.shape[2:], strides, strict=True)]
        logits: Tensor = self.head(self.unit(functional.avg_pool2d(maps, windows, strides)))
        return logits


def unit(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, batch_norm: bool) -> nn.Sequential:
    """Return a padded convolution and ReLU, with a norm between them in place of the bias if `batch_norm` is true."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=not batch_norm)
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return nn.Sequential(convolution, *norm, activation("relu"))


def max_pool() -> nn.MaxPool2d:
    """Return a 3x3 max pool that halves the size, rounded down.

    Windows extend only over the right and bottom edges, as in the paper's sizes.
    """
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
