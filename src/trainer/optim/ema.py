"""Exponential moving average of the weights (Polyak & Juditsky 1992), which is what is evaluated and kept as best.

    average <- d average + (1 - d) weights,   d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...

The warm-up of d (as in TensorFlow's ExponentialMovingAverage) lets a short run forget its random start.
"""

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """Holds `average`, a second model in evaluation mode. Buffers (the statistics of batch norm) are copied."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.average = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average the weights in after the update that led to `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(model.parameters()), 1 - decay)
        if buffers := list(self.average.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
