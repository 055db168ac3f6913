"""Multilayer perceptron: every pixel feeds every unit, layer after layer.

    (B, C, H, W) -> (B, C*H*W) -> [linear -> norm -> activation -> dropout] for each of `hidden` -> linear -> logits

With no hidden layer it is softmax regression, the baseline that any other network has to beat. The activation `maxout`
gives each hidden unit the largest of `pieces` linear functions of its inputs, so that layer has `pieces` times as many
weights; at a learning rate of 0.1 it wants `trainer.clip_norm=1.0`.

Sources: Rumelhart, Hinton and Williams 1986, Learning Representations by Back-propagating Errors; Goodfellow et al.
2013, Maxout Networks, section 2.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.blocks import (
    ACTIVATIONS,
    Maxout,
    choose,
    initialise,
    require_count,
    require_counts,
    require_dropout,
    require_flag,
)


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
        pieces: int = 5,
        dropout: float = 0.0,
        batch_norm: bool = False,
        init: str = "default",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels, image_size=image_size, pieces=pieces)
        require_counts(hidden=hidden)
        require_dropout(dropout)
        require_flag(batch_norm=batch_norm)
        # Chosen in front of the loop: a misspelt name is an error with no hidden layer too.
        activation_layer = choose("activation", activation, ACTIVATIONS | {"maxout": partial(Maxout, pieces=pieces)})
        outputs = pieces if activation == "maxout" else 1  # of the linear layer, for each unit

        width = in_channels * image_size**2
        layers: list[nn.Module] = [nn.Flatten()]
        for units in hidden:
            layers.append(nn.Linear(width, outputs * units, bias=not batch_norm))  # the norm has a bias of its own
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs * units))
            layers += [activation_layer(), nn.Dropout(dropout)]
            width = units

        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits
