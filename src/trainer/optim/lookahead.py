"""Lookahead (Zhang et al. 2019, algorithm 1): slow weights, which the trained weights return to every few steps.

Every `every` steps, with p = step / total steps:

    slow <- d slow + (1 - d) weights,   d = decay p^power
    weights <- slow

Zhang's version has a constant d (`power` 0; the paper's alpha is 1 - d). With a growing d, the slow weights average
over more and more steps, like a moving average that ends with the run (Jordan 2024, section 3.5: every 5 steps,
decay 0.95^5, power 3). Running statistics of batch norm are averaged too. After the last step, the weights are the slow
weights.
"""

import copy

import torch
from torch import Tensor, nn


class Lookahead:
    """Holds `slow`, a second model with the slow weights; `model` is the one that is trained."""

    def __init__(self, model: nn.Module, *, every: int, decay: float, power: float) -> None:
        self.every, self.decay, self.power = every, decay, power
        self.slow = copy.deepcopy(model).requires_grad_(False)
        self._slow, self._weights = averaged_tensors(self.slow), averaged_tensors(model)

    @torch.no_grad()
    def update(self, step: int, *, total_steps: int) -> None:
        """Update slow and trained weights after the optimizer's update that led to `step` (counted from 1)."""
        if step % self.every == 0:
            decay = self.decay * min(1.0, step / total_steps) ** self.power
            torch._foreach_lerp_(self._slow, self._weights, 1 - decay)
        elif step != total_steps:
            return
        torch._foreach_copy_(self._weights, self._slow)


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters and floating-point buffers of a model, as tensors that are changed in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
