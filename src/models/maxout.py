"""Maxout: a convolutional network that learns its activation. Each map is the largest of several linear ones.

    maxout       h_c = max over j < k of (w_cj * x + b_cj)       the maximum of k lines: convex, as bent as k allows

With k = 2 that includes ReLU (one line at zero) and the absolute value (two opposite lines). It never saturates, and a
large piece always passes its gradient, which suits dropout: this is what it was made for.

    28 -5x5-> 32 @ 28 -pool-> 14 -5x5-> 32 @ 14 -pool-> 7 -5x5-> 64 @ 7 -pool-> 4 -> classes

The paper's shape for MNIST: three convolutional maxout layers, each with a pool (a maximum over 3x3 in steps of 2),
then one linear layer; but for the first, each drops out its inputs (the paper drops pixels too). The paper states no
widths; these are small enough for a CPU. For a perceptron with maxout units: `model=mlp model.activation=maxout`.

Maxima of maxima are large, so the first steps are steep. The paper bounds the norm of each filter; here a learning rate
of 0.1 wants `trainer.clip_norm=1.0`, and 0.02 does without.

Source: Goodfellow, Warde-Farley, Mirza, Courville and Bengio 2013, Maxout Networks, sections 2, 3 and 5.1.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import Maxout, initialise, require_count, require_counts, require_dropout


class MaxoutNet(nn.Module):
    """`widths` are the maps of each layer behind the maximum: its convolution makes `pieces` times as many."""

    minimum_size = 1  # everything is padded

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        widths: Sequence[int] = (32, 32, 64),
        pieces: int = 2,
        dropout: float = 0.5,
        init: str = "default",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels, image_size=image_size, pieces=pieces)
        require_counts(widths=widths)
        require_dropout(dropout)
        if not widths:
            raise ConfigError("widths", "must have one number or more", value=widths)

        layers: list[nn.Module] = []
        channels, side = in_channels, image_size
        for width in widths:
            layers += [
                nn.Conv2d(channels, pieces * width, kernel_size=5, padding=2),
                Maxout(pieces=pieces),
                nn.MaxPool2d(3, stride=2, padding=1),
                nn.Dropout(dropout),
            ]
            channels, side = width, (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),  # (B, channels, side, side) -> (B, channels * side * side)
            nn.Linear(channels * side**2, num_classes),
        )
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits
