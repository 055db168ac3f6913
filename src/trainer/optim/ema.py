"""Exponential moving average of the weights (Polyak & Juditsky 1992); it is evaluated, and saved as the best model.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) after update t = 1, 2, ...

The warm-up of d (as in TensorFlow's ExponentialMovingAverage) lets a short run forget its random initial weights.
"""

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Holds `average`, a second model in evaluation mode. Buffers (statistics of batch norm) are copied."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        # Lists that are created once: finding the tensors of a ResNet-50 takes longer than averaging them.
        self._average: list[Tensor] = list(self.average.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        # Buffers of one dtype at a time: for mixed dtypes, _foreach_copy_ launches one kernel per tensor.
        pairs = list(zip(self.average.buffers(), model.buffers(), strict=True))
        self._buffers = [
            [pair for pair in pairs if pair[0].dtype == dtype]
            for dtype in dict.fromkeys(buffer.dtype for buffer, _ in pairs)
        ]

    @torch.no_grad()
    def update(self, step: int, *, skipped: bool | Tensor = False) -> None:
        """Average the weights after the update that led to `step` (counted from 1).

        If the step was skipped, the average stays unchanged: `skipped` is true, or a flag of 1.0 on the device.
        """
        if skipped is True:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        if isinstance(skipped, Tensor):
            differences: list[Tensor] = list(torch._foreach_sub(self._weights, self._average))
            torch._foreach_mul_(differences, (1 - skipped) * (1 - decay))
            torch._foreach_add_(self._average, differences)
        else:
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)
        for pairs in self._buffers:
            torch._foreach_copy_([average for average, _ in pairs], [buffer for _, buffer in pairs])
