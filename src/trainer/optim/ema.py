"""Exponential moving average of the weights (Polyak & Juditsky 1992), which is what is evaluated and kept as best.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...

The warm-up of d (as in TensorFlow's ExponentialMovingAverage) lets a short run forget its random start.
"""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Holds `average`, a second model in evaluation mode. Buffers (the statistics of batch norm) are copied."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, updated: bool | Tensor = True) -> None:
        """Average the weights in after the update that led to `step` (counted from 1).

        Nothing moves if that step was skipped: `updated` is false then, or a flag (scalar) on the device.
        """
        if updated is False:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        average: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(model.parameters())
        if isinstance(updated, Tensor):
            differences = list(torch._foreach_sub(weights, average))
            torch._foreach_mul_(differences, updated * (1 - decay))
            torch._foreach_add_(average, differences)
        else:
            torch._foreach_lerp_(average, weights, 1 - decay)
        if buffers := list(self.average.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
