"""The step of classification: forward, loss, backward -> L1, clip -> check -> update.

Other kinds of training are other classes with the same protocol (`trainer.interfaces.Step`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from trainer.interfaces import Batch, StepResult
from trainer.optim.losses import Objective
from trainer.state import TrainState


class ClassificationStep:
    """Minimises the objective of a classifier: batches -> update, metrics."""

    def __init__(
        self,
        state: TrainState,
        *,
        forward: Callable[..., Tensor | tuple[Tensor, ...]],
        objective: Objective,
        autocast: AbstractContextManager[object],
        penalised: Sequence[nn.Parameter],
        frozen_after: Sequence[tuple[Sequence[nn.Parameter], int]],
        l1: float,
        clip_norm: float | None,
    ) -> None:
        self.state = state
        self.forward = forward  # the model as training calls it: compiled, or recorded as a CUDA graph
        self.objective = objective
        self.autocast = autocast
        self.penalised = penalised  # the parameters with an L1 penalty
        self.frozen_after = frozen_after  # parameters, and the number of steps that they are trained for
        self.l1, self.clip_norm = l1, clip_norm
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Update the weights once; the gradient is that of the mean loss over the samples of all batches."""
        state, optimizer, scaler = self.state, self.state.optimizer, self.state.scaler
        state.guard.remember()
        self.freeze(step=state.step)
        samples = sum(labels.size(0) for _, labels, _ in batches)
        losses: list[Tensor] = []
        for images, labels, _ in batches:
            with self.autocast:
                minimised, loss, logits = self.objective(self.forward(images), labels)
            if len(batches) > 1:
                minimised = minimised * (len(labels) / samples)
            scaler.scale(minimised).backward()
            losses.append(minimised.detach())
            state.sums.add(loss, logits, labels)
        scaler.unscale_(optimizer)
        if self.l1:
            self._add_l1()
        norm = self._clip_gradients()
        indices = [indices for _, _, indices in batches]
        if state.guard.allows(reduce(torch.add, losses), norm, indices, step=state.step + 1):
            scaler.step(optimizer)
        scaler.update()
        return StepResult(samples, {"gradient_norm": norm})

    def clear_gradients(self) -> None:
        """Release the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def freeze(self, *, step: int) -> None:
        """Freeze the parameters that this step, counted from 0, does not train any more."""
        for parameters, steps in self.frozen_after:
            for parameter in parameters:
                parameter.requires_grad_(step < steps)

    @torch.no_grad()
    def _add_l1(self) -> None:
        """Add the gradient of l1 * sum |w|, which is l1 * sign(w) and 0 at 0, once per step."""
        for weight in self.penalised:
            if weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=self.l1)

    def _clip_gradients(self) -> Tensor:
        """Return the L2 norm of all gradients, a scalar on the device; scale them down to `clip_norm` if it is set."""
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm
