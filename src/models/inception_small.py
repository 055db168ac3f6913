"""Small Inception, for images of about 32 pixels: each block applies filters of two sizes in parallel.

    Inception   maps -+-> 1x1 ---------------+-> concatenation          Downsample   maps -+-> 3x3, stride 2 -------+->
                      +-> 3x3 ---------------+                                             +-> 3x3 max, stride 2 ---+

    image -> 3x3 -> 2 blocks -> Downsample -> 4 blocks -> Downsample -> 2 blocks -> mean over pixels -> linear -> logits

Batch norm and ReLU follow each convolution. `batch_norm: false` is the paper's form without batch norm: its
convolutions have biases instead. Both forms have 1,649,402 parameters, so the paper's norms shift but do not scale (see
`unit`). The paper crops CIFAR-10 to 28 pixels, so its mean is over 7x7 maps. The mean over all pixels accepts any size.

Source: Zhang, Bengio, Hardt, Recht and Vinyals 2017, Understanding Deep Learning Requires Rethinking Generalization,
appendix A and figure 3. It states no initial weights.
"""

import torch
from torch import Tensor, nn

from models.blocks import activation, initialise, require_count, require_flag


class InceptionSmall(nn.Module):
    """Small Inception, with 1,649,402 parameters at 3 channels and 10 classes."""

    minimum_size = 1  # all layers are padded, and the mean accepts any size

    def __init__(self, *, num_classes: int, in_channels: int, batch_norm: bool = True, init: str = "he_normal") -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_flag(batch_norm=batch_norm)
        self.features = nn.Sequential(
            unit(in_channels, 96, kernel_size=3, batch_norm=batch_norm),  # (B, 96, H, W)
            Inception(96, 32, 32, batch_norm=batch_norm),
            Inception(64, 32, 48, batch_norm=batch_norm),
            Downsample(80, 80, batch_norm=batch_norm),  # (B, 160, H/2, W/2)
            Inception(160, 112, 48, batch_norm=batch_norm),
            Inception(160, 96, 64, batch_norm=batch_norm),
            Inception(160, 80, 80, batch_norm=batch_norm),
            Inception(160, 48, 96, batch_norm=batch_norm),
            Downsample(144, 96, batch_norm=batch_norm),  # (B, 240, H/4, W/4)
            Inception(240, 176, 160, batch_norm=batch_norm),
            Inception(336, 176, 160, batch_norm=batch_norm),  # (B, 336, H/4, W/4)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # (B, 336, h, w) -> (B, 336, 1, 1)
            nn.Flatten(),  # -> (B, 336)
            nn.Linear(336, num_classes),
        )
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class Inception(nn.Module):
    """A 1x1 and a 3x3 convolution in parallel: (B, in_channels, H, W) -> (B, width_1x1 + width_3x3, H, W)."""

    def __init__(self, in_channels: int, width_1x1: int, width_3x3: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.one = unit(in_channels, width_1x1, kernel_size=1, batch_norm=batch_norm)
        self.three = unit(in_channels, width_3x3, kernel_size=3, batch_norm=batch_norm)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, width_1x1 + width_3x3, H, W) for maps (B, in_channels, H, W)."""
        return torch.cat((self.one(maps), self.three(maps)), dim=1)


class Downsample(nn.Module):
    """Half the size, more channels: (B, in_channels, H, W) -> (B, width + in_channels, H/2, W/2), rounded up."""

    def __init__(self, in_channels: int, width: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.three = unit(in_channels, width, kernel_size=3, stride=2, batch_norm=batch_norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, width + in_channels, H/2, W/2), rounded up, for maps (B, in_channels, H, W)."""
        return torch.cat((self.three(maps), self.pool(maps)), dim=1)


def unit(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, batch_norm: bool) -> nn.Sequential:
    """Return a padded convolution and ReLU, with a norm between them in place of the bias if `batch_norm` is true.

    The norm learns a shift but no scale: ReLU passes a scale on, and the next convolution can learn it.
    """
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=not batch_norm)
    if not batch_norm:
        return nn.Sequential(convolution, activation("relu"))
    norm = nn.BatchNorm2d(out_channels)
    scale = norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", scale, persistent=False)  # a constant 1, which lets torch use the fast kernels
    return nn.Sequential(convolution, norm, activation("relu"))
