"""AlexNet: the network that won ImageNet 2012 and began the field. Sizes at (3, 227, 227), `|` where the maps are in
two groups that do not see each other (the paper's two graphics cards):

    227 -11x11/4-> 96 @ 55 -norm, pool-> 27 -5x5-> 128|128 @ 27 -norm, pool-> 13
        -3x3-> 384 @ 13 -3x3-> 192|192 @ 13 -3x3-> 128|128 @ 13 -pool-> 256 @ 6 -> 4096 -> 4096 -> classes

A ReLU stands behind every layer but the last, pools are maxima over 3x3 in steps of 2, so that they overlap, and both
hidden linear layers are dropped out. The paper says 224 where its own sizes need 227. Other sizes work too, with a
first linear layer of their size: 224 gives maps of 5x5.

Local response normalisation lets the channels of a pixel compete, as neurons inhibit their neighbours:

    b_c = a_c / (k + alpha * sum a_j^2)^beta      over the n channels j around c, as far as there are any

Later networks do without it, and without the groups: both can be switched off.

Source: Krizhevsky, Sutskever and Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks, section
3 and figure 2; starting weights: section 5.
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
    """60,965,224 parameters at (3, 227, 227) and 1000 classes."""

    minimum_size = 67  # leaves one pixel behind the third pool: 67 -> 15 -> 7 -> 3 -> 1

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
        require_image_size(image_size, network="AlexNet", minimum=self.minimum_size)
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
            nn.Linear(256 * _side_behind_pools(image_size) ** 2, 4096),
            activation("relu"),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            activation("relu"),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        initialise(self, init, paper=_normal)
        if init == "paper":  # layers 2, 4, 5, 6 and 7: inputs above zero, so that their ReLUs pass a gradient at first
            biases = [bias for name, bias in self.named_parameters() if name.endswith("bias")]
            for number in (2, 4, 5, 6, 7):
                nn.init.ones_(biases[number - 1])

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _side_behind_pools(image_size: int) -> int:
    """The side of the maps behind the first convolution and the three pools, each rounded down; the rest keep it."""
    side = (image_size - 11) // 4 + 1
    for _ in range(3):
        side = (side - 3) // 2 + 1
    return side


def _normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Standard deviation 0.01 in every layer, whatever its width (section 5)."""
    nn.init.normal_(layer.weight, std=0.01)
