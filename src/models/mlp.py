"""Multilayer perceptron: every pixel feeds every unit, layer after layer.

    (B, C, H, W) -> (B, C*H*W) -> [linear -> norm -> activation -> dropout] for each of `hidden` -> linear -> logits

With no hidden layer it is softmax regression, the baseline that any other network has to beat.

Source: Rumelhart, Hinton and Williams 1986, Learning Representations by Back-propagating Errors.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.blocks import activation as activation_layer
from models.blocks import initialise, require_count, require_counts, require_dropout


class MLP(nn.Module):
    """784-256-256-10 on MNIST: 269,322 parameters."""

    minimum_size = 1

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        init: str = "default",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        require_counts(hidden=hidden)
        require_dropout(dropout)
        activation_layer(activation)  # a misspelt name is an error with no hidden layer too

        width = in_channels * image_size**2
        layers: list[nn.Module] = [nn.Flatten()]
        for units in hidden:
            layers.append(nn.Linear(width, units, bias=not batch_norm))  # the norm has a bias of its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers += [activation_layer(activation), nn.Dropout(dropout)]
            width = units

        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.head(self.features(images))
