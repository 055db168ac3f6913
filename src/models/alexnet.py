"""AlexNet: the convolutional network that won the ImageNet challenge of 2012.

Sizes at (3, 227, 227); `|` separates two groups of maps without connections between them (the paper's two GPUs):

    227 -11x11/4-> 96 @ 55 -norm, pool-> 27 -5x5-> 128|128 @ 27 -norm, pool-> 13
        -3x3-> 384 @ 13 -3x3-> 192|192 @ 13 -3x3-> 128|128 @ 13 -pool-> 256 @ 6 -> 4096 -> 4096 -> classes

A ReLU follows every layer but the last. Pools are 3x3 max pools of stride 2, so they overlap. Both hidden linear layers
have dropout. The paper states 224 pixels, but its layer sizes need 227. Other sizes work too: the first linear layer
is sized for them. For example, 224 pixels give maps of 5x5.

Local response normalisation makes the channels of a pixel compete, as neurons inhibit their neighbours:

    b_c = a_c / (k + alpha * sum a_j^2)^beta      over those of the n channels j around c that exist

Later models have neither this normalisation nor groups. Both can be switched off.

Source: Krizhevsky, Sutskever and Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks, section
3 and figure 2; initial weights: section 5.
"""

from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import (
    LocalResponseNorm,
    activation,
    initialise,
    require_count,
    require_dropout,
    require_flag,
    require_image_size,
)


class AlexNet(nn.Module):
    """AlexNet, with 60,965,224 parameters at (3, 227, 227) and 1000 classes."""

    minimum_size = 67  # leaves one pixel after the third pool: 67 -> 15 -> 7 -> 3 -> 1

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int = 227,
        groups: int = 2,
        local_response_norm: bool = True,
        dropout: float = 0.5,
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_image_size(image_size, model="AlexNet", minimum=self.minimum_size)
        require_dropout(dropout)
        require_flag(local_response_norm=local_response_norm)
        if groups not in (1, 2):
            raise ConfigError("groups", "must be 1 or 2", value=groups)

        def norm() -> list[nn.Module]:
            return [LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)] if local_response_norm else []

        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 96, kernel_size=11, stride=4),
            activation("relu"),
            *norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=groups),
            activation("relu"),
            *norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            activation("relu"),
            nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=groups),
            activation("relu"),
            nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=groups),
            activation("relu"),
            nn.MaxPool2d(3, stride=2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (B, 256, side, side) -> (B, 256 * side * side)
            nn.Linear(256 * _side_after_pools(image_size) ** 2, 4096),
            activation("relu"),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            activation("relu"),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        initialise(self, init, paper=_normal)
        if init == "paper":  # bias 1 in layers 2, 4, 5, 6 and 7: ReLUs with positive inputs pass a gradient at first
            biases = [bias for name, bias in self.named_parameters() if name.endswith("bias")]
            for number in (2, 4, 5, 6, 7):
                nn.init.ones_(biases[number - 1])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _side_after_pools(image_size: int) -> int:
    """Return the side of the maps after the first convolution and the three pools, each rounded down.

    The other layers keep the size.
    """
    side = (image_size - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill the weights with standard deviation 0.01, in layers of any width (section 5)."""
    nn.init.normal_(layer.weight, std=0.01)
