"""Gradients against finite differences: (loss(w + h v) - loss(w - h v)) / 2h must equal gradient . v.

All parameters are moved at once, in a random direction v. Only if the two numbers differ, each parameter is moved alone
to name the wrong ones. A step that crosses a kink of ReLU or max pooling gives another slope, the less likely the
smaller h is; rounding errors grow as 1 / h. So the smallest error over several h counts. A wrong gradient is wrong for
each h. Source: Goodfellow et al. 2016, Deep Learning, section 11.5, "Compare back-propagated
derivatives to numerical derivatives".
"""

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from trainer.optim.losses import Objective

STEPS = (1e-6, 1e-7, 1e-8, 1e-9)
TOLERANCE = 1e-3  # of all parameters together, relative to the larger of the two slopes
TOLERANCE_OF_ONE = 0.02  # of one parameter


def wrong_gradients(
    model: nn.Module, objective: Objective, images: Tensor, labels: Tensor, *, seconds: float
) -> dict[str, float]:
    """Return the relative error of each parameter whose gradient is wrong; {} if all are right.

    The model is copied to float64 and stays in its mode, except that dropout is off. `seconds` limits the time in
    which wrong parameters are searched, from the first to the last.
    """
    model = copy.deepcopy(model).double()
    loss_function = copy.deepcopy(objective.loss_function).double()
    objective = Objective(loss_function, auxiliary_weight=objective.auxiliary_weight)
    without_dropout(model)
    images = images.double()
    labels = labels.double() if labels.is_floating_point() else labels
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss() -> Tensor:
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])  # each call starts with the same statistics
        return objective(model(images), labels)[0]

    value = loss()
    slopes = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, slopes, strict=True))
    used = {name: parameters[name] for name, gradient in gradients.items() if gradient is not None}
    generator = torch.Generator().manual_seed(0)
    if not used or _error(used, gradients, loss, generator) < TOLERANCE:
        return {}
    errors, began = {}, time.monotonic()
    for name in used:
        error = _error({name: used[name]}, gradients, loss, generator)
        if error >= TOLERANCE_OF_ONE:
            errors[name] = min(error, _error({name: used[name]}, gradients, loss, generator))  # another direction
        if time.monotonic() - began > seconds:
            break
    return {name: error for name, error in errors.items() if error >= TOLERANCE_OF_ONE}


def without_dropout(model: nn.Module) -> None:
    """Switch off the dropout layers of a model in training mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


@torch.no_grad()
def _error(
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor | None],
    loss: Callable[[], Tensor],
    generator: torch.Generator,
) -> float:
    """Return the smallest relative error of the slope over the step sizes, along one random direction."""
    directions, slope = {}, 0.0
    for name, parameter in parameters.items():
        scale = parameter.pow(2).mean().sqrt().clamp(min=1e-3)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
        directions[name] = noise * scale
        gradient = gradients[name]
        assert gradient is not None
        slope += float((gradient * directions[name]).sum())
    errors = []
    for h in STEPS:
        ends = []
        for sign in (1, -1):
            _move(parameters, directions, sign * h)
            ends.append(float(loss()))
            _move(parameters, directions, -sign * h)
        numeric = (ends[0] - ends[1]) / (2 * h)
        errors.append(abs(numeric - slope) / max(abs(numeric), abs(slope), 1e-8))
    return min(errors)


def _move(parameters: Mapping[str, nn.Parameter], directions: Mapping[str, Tensor], size: float) -> None:
    for name, parameter in parameters.items():
        parameter.add_(directions[name], alpha=size)
