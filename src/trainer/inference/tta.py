"""Test-time augmentation: an evaluated image's logits are a weighted mean over several views of it.

    none            f(x)
    mirror          f(x) and f(mirrored x), 1/2 each
    mirror_shift    f(x) and f(mirrored x), 1/4 each; x shifted by a pixel down-right and up-left, each of them
                    mirrored and not, 1/8 each (Jordan 2024, section 3.6: six views)

The mean is computed in float32, whatever the precision of the model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mirrored(nn.Module):
    """Return the mean of the logits of an image and of its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K), float32, of images (B, C, H, W)."""
        logits: Tensor = (self.model(images).float() + self.model(images.flip(3)).float()) / 2
        return logits


class MirroredAndShifted(Mirrored):
    """Return the mean over six views: half of its weight on the unshifted image, half on two diagonal shifts."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K), float32, of images (B, C, H, W)."""
        height, width = images.shape[2:]
        padded = functional.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
        views = torch.stack([super(MirroredAndShifted, self).forward(view) for view in shifted]).mean(0)
        logits: Tensor = (super().forward(images) + views) / 2
        return logits


VIEWS = {"mirror": Mirrored, "mirror_shift": MirroredAndShifted}


def with_tta(model: nn.Module, tta: str) -> nn.Module:
    """Return the model as it is evaluated. It shares the weights of `model`."""
    return VIEWS[tta](model) if tta in VIEWS else model
