"""Test-time augmentation: what is evaluated is not the network alone.

none     f(x)
mirror   (f(x) + f(mirror image of x)) / 2        twice the work; for images whose left and right mean nothing
"""

from torch import Tensor, nn


class Mirrored(nn.Module):
    """The mean of the logits for an image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        logits: Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return logits


def with_tta(network: nn.Module, tta: str) -> nn.Module:
    """The network as it is evaluated; its weights stay where they are."""
    return Mirrored(network) if tta == "mirror" else network
