"""Standardisation: z = (x / 255 - mean) / std, a mean and a standard deviation for each channel.

The statistics are those of the training part alone, and exact: sums of whole numbers, divided once at the end.
In one pass over the uint8 pixels, z = x * scale + bias with scale = 1 / (255 std) and bias = -mean / std.
Source: LeCun et al., Efficient BackProp (1998), section 4.3.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 1024  # pictures that are widened to 32 bits at a time


def statistics(pictures: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), on the scale 0 to 1, over all pictures of uint8 chunks (N, C, H, W)."""
    count, sums, squares = 0, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for chunk in pictures:
        for piece in chunk.split(CHUNK):
            wide = piece.to(torch.int32)
            count += piece.numel() // piece.shape[1]
            sums = sums + wide.sum(dim=(0, 2, 3), dtype=torch.int64)  # (C,)
            squares = squares + wide.square().sum(dim=(0, 2, 3), dtype=torch.int64)  # (C,)
    # Python's integers do not overflow: n * sum(x^2) - sum(x)^2 is exact, and cancels nothing.
    spread = [count * square - total**2 for total, square in zip(sums.tolist(), squares.tolist(), strict=True)]
    mean = torch.tensor([total / (255 * count) for total in sums.tolist()], dtype=torch.float32)
    std = torch.tensor([math.sqrt(value) / (255 * count) for value in spread], dtype=torch.float32)
    return mean, torch.where(std > 0, std, 1.0)  # a channel without contrast is only shifted


class Standardise:
    """Pictures of the scale 0 to 255, uint8 or float (B, C, H, W), to standardised float32."""

    def __init__(self, mean: Tensor, std: Tensor, *, device: torch.device, channels_last: bool = False) -> None:
        scale = 1 / (255 * std.double())
        self.scale = scale.float().to(device)[:, None, None]  # (C, 1, 1)
        self.bias = (-mean.double() / std.double()).float().to(device)[:, None, None]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return torch.mul(images, self.scale).add_(self.bias).contiguous(memory_format=self.memory_format)
