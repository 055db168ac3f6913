"""Network in Network: a small perceptron at every pixel after each convolution, and a mean over pixels as the head.

    mlpconv      k x k convolution -> ReLU -> 1x1 -> ReLU -> 1x1 -> ReLU       the 1x1 are linear layers at each pixel

    32 -5x5, 1x1, 1x1-> 192, 160, 96 @ 32 -pool, dropout-> 96 @ 16
       -5x5, 1x1, 1x1-> 192, 192, 192 @ 16 -pool, dropout-> 192 @ 8
       -3x3, 1x1-> 192, 192 @ 8 -1x1-> one map per class @ 8 -mean over pixels-> logits

The head has no linear layer that could overfit: each map of the last 1x1 convolution shows the confidence in its class.
Pools are 3x3 max pools of stride 2, as in the paper (in the authors' code, the second is a mean pool). The authors'
code also applies ReLU to the last maps. Here they may be negative, because a logit held at zero gets no gradient.

Source: Lin, Chen and Yan 2013, Network In Network, sections 3.1 (mlpconv), 3.2 (global average pooling) and 4.1; the
widths, filters and initial weights are those of the authors' published CIFAR-10 network.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import (
    activation,
    initialise,
    require_count,
    require_counts,
    require_dropout,
    require_flag,
    require_lists_of_counts,
)


class NIN(nn.Module):
    """Network in Network, with 966,986 parameters at 3 channels and 10 classes.

    Each list in `widths` has the channels of the convolutions before a pool. The first one has the list's kernel size;
    the others are 1x1.
    """

    minimum_size = 1  # all layers are padded, and the mean accepts any size

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        widths: Sequence[Sequence[int]] = ((192, 160, 96), (192, 192, 192), (192, 192)),
        kernel_sizes: Sequence[int] = (5, 5, 3),
        dropout: float = 0.5,
        batch_norm: bool = False,
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_lists_of_counts(widths=widths)
        require_counts(kernel_sizes=kernel_sizes)
        require_dropout(dropout)
        require_flag(batch_norm=batch_norm)
        if len(kernel_sizes) != len(widths) or not all(size % 2 for size in kernel_sizes):
            reason = f"must be {len(widths)} odd integers, one for each list in widths"
            raise ConfigError("kernel_sizes", reason, value=kernel_sizes)

        layers: list[nn.Module] = []
        channels = in_channels
        for index, (block, kernel_size) in enumerate(zip(widths, kernel_sizes, strict=True)):
            if index > 0:
                layers += [nn.MaxPool2d(3, stride=2, padding=1), nn.Dropout(dropout)]
            for width in block:
                layers.append(nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=not batch_norm))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(activation("relu"))
                channels, kernel_size = width, 1  # the other convolutions of the block are 1x1
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Conv2d(channels, num_classes, kernel_size=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # (B, num_classes, 1, 1) -> (B, num_classes)
        )
        initialise(self, init, paper=_normal)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill the weights with standard deviation 0.05, in layers of any width."""
    nn.init.normal_(layer.weight, std=0.05)
