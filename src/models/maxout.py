"""Maxout: a convolutional network that learns its activation, the maximum of several linear functions.

    maxout       h_c = max over j < k of (w_cj * x + b_cj)       convex, with up to k linear pieces

With k = 2 this includes ReLU (one function is zero) and the absolute value (two opposite functions). Maxout never
saturates, and the largest piece always passes its gradient. It was designed for training with dropout.

    28 -5x5-> 32 @ 28 -pool-> 14 -5x5-> 32 @ 14 -pool-> 7 -5x5-> 64 @ 7 -pool-> 4 -> classes

This is the paper's architecture for MNIST: three convolutional maxout layers, each with a 3x3 max pool of stride 2,
then one linear layer. Dropout is applied to the inputs of all layers but the first (the paper also drops pixels). The
paper states no widths; these are small enough for a CPU. For a perceptron with maxout units, use
`model=mlp model.activation=maxout`.

Maxima of maxima are large, so the first gradients are large. The paper limits the norm of each filter. Here, a learning
rate of 0.1 needs `trainer.clip_norm=1.0`, and 0.02 needs no clipping.

Source: Goodfellow, Warde-Farley, Mirza, Courville and Bengio 2013, Maxout Networks, sections 2, 3 and 5.1.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import Maxout, initialise, require_count, require_counts, require_dropout


class MaxoutNet(nn.Module):
    """Convolutional maxout network with `widths` maps per layer after the maximum.

    Each convolution has `pieces` times as many output channels.
    """

    minimum_size = 1  # all layers are padded

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
            raise ConfigError("widths", "must contain at least one integer >= 1, such as [32, 32, 64]", value=widths)

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
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits
