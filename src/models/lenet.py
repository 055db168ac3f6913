"""LeNet: the first convolutional networks for reading digits. Sizes at (1, 32, 32) and (1, 28, 28):

    LeNet5  32x32 -5x5-> 6@28x28 -avg-> 6@14x14 -5x5-> 16@10x10 -avg-> 16@5x5 -> 120 -> 84 -> classes     tanh
    LeNet   28x28 -5x5-> 20@24x24 -max-> 20@12x12 -5x5-> 50@8x8 -max-> 50@4x4 -> 256 -> classes           ReLU

LeNet5 is LeNet-5 in the form taught today. The form of the paper (section II.B) differs in four ways: its pools scale
and shift each map, its second convolution reads only some of the maps, its activation is 1.7159 tanh(2x/3), and its
output layer is made of radial basis functions. LeNet is the wider ReLU form of Caffe's MNIST example, but with 256
hidden units.

Source: LeCun, Bottou, Bengio and Haffner 1998, Gradient-Based Learning Applied to Document Recognition, section II.B;
initial weights: appendix A.
"""

from torch import Tensor, nn

from models.blocks import activation as activation_layer
from models.blocks import initialise, require_count, require_dropout, require_image_size

MINIMUM_SIZE = 16  # leaves one pixel after the second pool: 16 -> 12 -> 6 -> 2 -> 1


class LeNet5(nn.Module):
    """LeNet-5, with 61,706 parameters at (1, 32, 32) and 10 classes."""

    minimum_size = MINIMUM_SIZE

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: int, activation: str = "tanh", init: str = "default"
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_image_size(image_size, model="LeNet5", minimum=self.minimum_size)

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
            nn.Linear(16 * _side_after_pools(image_size) ** 2, 120),
            activation_layer(activation),
            nn.Linear(120, 84),
            activation_layer(activation),
            nn.Linear(84, num_classes),
        )
        initialise(self, init, paper=_lecun_uniform)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class LeNet(nn.Module):
    """Wider form of LeNet-5 with ReLU, with 233,196 parameters at (1, 28, 28) and 10 classes."""

    minimum_size = MINIMUM_SIZE

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: int, dropout: float = 0.0, init: str = "default"
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_image_size(image_size, model="LeNet", minimum=self.minimum_size)
        require_dropout(dropout)

        # The pool is before the ReLU. Max pooling and a non-decreasing function commute, so values and gradients are
        # the same as in the other order, and the ReLU processes a quarter of the values.
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
            nn.Linear(50 * _side_after_pools(image_size) ** 2, 256),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )
        initialise(self, init)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _side_after_pools(image_size: int) -> int:
    """Return the side of the maps after two rounds of 5x5 convolution (4 px less) and 2x2 pool (half, rounded down)."""
    return ((image_size - 4) // 2 - 4) // 2


def _lecun_uniform(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill the weights uniformly in +-2.4 / fan-in: units start in the steep part of tanh (LeCun 1998, appendix A)."""
    bound = 2.4 / layer.weight[0].numel()
    nn.init.uniform_(layer.weight, -bound, bound)
