"""LeNet: the first convolutional networks that read digits. Sizes at (1, 32, 32) and (1, 28, 28):

    LeNet5  32x32 -5x5-> 6@28x28 -avg-> 6@14x14 -5x5-> 16@10x10 -avg-> 16@5x5 -> 120 -> 84 -> classes     tanh
    LeNet   28x28 -5x5-> 20@24x24 -max-> 20@12x12 -5x5-> 50@8x8 -max-> 50@4x4 -> 256 -> classes           ReLU

LeNet5 is LeNet-5 as it is taught. The paper's own (section II.B) differs in four ways that have not lasted: its pools
scale and shift each map, its second convolution sees only some of the maps, its activation is 1.7159 tanh(2x/3), and it
ends in radial basis functions. LeNet is the wider ReLU form, as in Caffe's MNIST example, but with 256 hidden units.

Source: LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document Recognition, section II.B;
starting weights: appendix A.
"""

from torch import Tensor, nn

from models.blocks import activation as activation_layer
from models.blocks import initialise, require_count, require_dropout, require_image_size

MINIMUM_SIZE = 16  # leaves one pixel behind the second pool: 16 -> 12 -> 6 -> 2 -> 1


class LeNet5(nn.Module):
    """LeNet-5: 61,706 parameters at (1, 32, 32) and 10 classes."""

    minimum_size = MINIMUM_SIZE

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: int, activation: str = "tanh", init: str = "default"
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_image_size(image_size, network="LeNet5", minimum=self.minimum_size)

        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, kernel_size=5),
            activation_layer(activation),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            activation_layer(activation),
            nn.AvgPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (B, 16, side, side) -> (B, 16 * side * side)
            nn.Linear(16 * _side_behind_pools(image_size) ** 2, 120),
            activation_layer(activation),
            nn.Linear(120, 84),
            activation_layer(activation),
            nn.Linear(84, num_classes),
        )
        initialise(self, init, paper=_lecun_uniform)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class LeNet(nn.Module):
    """The wider ReLU form: 233,196 parameters at (1, 28, 28) and 10 classes."""

    minimum_size = MINIMUM_SIZE

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: int, dropout: float = 0.0, init: str = "default"
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_image_size(image_size, network="LeNet", minimum=self.minimum_size)
        require_dropout(dropout)

        # Pool, then ReLU: a maximum and a function that never falls may swap places, so values and gradients are the
        # same as the other way round, while the ReLU sees a quarter of the numbers.
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 20, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            nn.Conv2d(20, 50, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Sequential(
            nn.Flatten(),  # (B, 50, side, side) -> (B, 50 * side * side)
            nn.Linear(50 * _side_behind_pools(image_size) ** 2, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _side_behind_pools(image_size: int) -> int:
    """The side of the maps behind two rounds of a 5x5 convolution (4 px less) and a 2x2 pool (half, rounded down)."""
    return ((image_size - 4) // 2 - 4) // 2


def _lecun_uniform(layer: nn.Conv2d | nn.Linear) -> None:
    """Uniform in +-2.4 / fan-in, so that a unit starts in the steep part of its tanh (LeCun 1998, appendix A)."""
    bound = 2.4 / layer.weight[0].numel()
    nn.init.uniform_(layer.weight, -bound, bound)
