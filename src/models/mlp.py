"""Multilayer perceptron: fully connected layers on the flattened image.

    (B, C, H, W) -> (B, C*H*W) -> [linear -> norm -> activation -> dropout] for each of `hidden` -> linear -> logits

Without hidden layers it is softmax regression, the baseline that every other model has to beat. With the activation
`maxout`, a hidden unit is the maximum of `pieces` linear functions of its inputs. Its layer has `pieces` times as many
weights. At a learning rate of 0.1, maxout needs `trainer.clip_norm=1.0`.

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
    """Multilayer perceptron. The default on MNIST is 784-256-256-10, with 269,322 parameters."""

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
        # Looked up before the loop, so that a misspelled name is an error even without hidden layers.
        activation_layer = choose("activation", activation, ACTIVATIONS | {"maxout": partial(Maxout, pieces=pieces)})
        outputs_per_unit = pieces if activation == "maxout" else 1  # of the linear layer

        width = in_channels * image_size**2
        layers: list[nn.Module] = [nn.Flatten()]
        for units in hidden:
            layers.append(nn.Linear(width, outputs_per_unit * units, bias=not batch_norm))  # the norm has a bias
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs_per_unit * units))
            layers += [activation_layer(), nn.Dropout(dropout)]
            width = units

        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits
