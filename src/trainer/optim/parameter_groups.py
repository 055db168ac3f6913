"""Parameter groups: parameters with the same learning rate, weight decay and update rule.

all                       every parameter, if weight decay acts on all of them
weights, no_decay         matrices and filters; biases and normalisation layers, which get no weight decay
muon, adamw, no_decay     with Muon: matrices inside the model, other weights, biases and normalisation layers
a layer's name            the parameters of a layer that is frozen later (trainer.freeze_after)
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from core.errors import ConfigError, suggest

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decayed_parameters(model: nn.Module, weight_decay_on: str) -> list[nn.Parameter]:
    """Return the parameters that get weight decay and L1: `all`, or `weights`, which have more than one dimension."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if parameter.ndim > 1 or weight_decay_on == "all"]


def group_parameters(
    model: nn.Module,
    *,
    decayed: Collection[nn.Parameter],
    with_muon: bool,
    frozen_later: Mapping[str, Sequence[nn.Parameter]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, as dictionaries with `name` and `params`.

    `frozen_later` maps names of layers to their parameters: each layer gets a group of its own, with weight decay.
    Raises ConfigError if Muon is to train a model that has no matrix for it.
    """
    decays = set(decayed)
    in_own_group = {parameter for parameters in frozen_later.values() for parameter in parameters}
    parameters = [each for each in model.parameters() if each.requires_grad and each not in in_own_group]
    no_decay = [parameter for parameter in parameters if parameter not in decays]
    matrices = set(hidden_matrices(model)) if with_muon else set()
    if with_muon and not matrices:
        explanation = "is for matrices inside a model, between its first convolution and its output layers"
        raise ConfigError("_target_", f"{explanation}; this model has none; try optimizer=adamw")
    others = "adamw" if with_muon else "weights" if no_decay else "all"
    groups: list[dict[str, Any]] = [
        {"name": "muon", "params": [parameter for parameter in parameters if parameter in matrices]},
        {"name": others, "params": [parameter for parameter in parameters if parameter in decays - matrices]},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
        *({"name": layer, "params": list(own)} for layer, own in frozen_later.items()),
    ]
    return [group for group in groups if group["params"]]


def scale_biases(optimizer: Optimizer, factor: float, weight_decay_on: str) -> None:
    """Multiply the learning rate of the group `no_decay` by `factor` (Jordan 2024, section 3.4 takes 64)."""
    if factor != 1 and weight_decay_on == "all":
        needed = "trainer.weight_decay_on=weights, which gives biases and normalisation layers a group of their own"
        explanation = f"other than 1 needs {needed}"
        raise ConfigError("trainer.bias_lr_factor", explanation, value=factor)
    for group in optimizer.param_groups:
        group["lr"] *= factor if group["name"] == "no_decay" else 1


def trainable_parameters_of(model: nn.Module, layer: str) -> list[nn.Parameter]:
    """Return the trainable parameters of a layer: those with its name, or whose names start with it and a dot.

    Raises ConfigError if there are none.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [parameter for name, parameter in named.items() if name == layer or name.startswith(f"{layer}.")]
    if not found:
        layers = dict.fromkeys(name.partition(".")[0] for name in named)
        hint = suggest(layer, layers) or f"its layers: {', '.join(layers)}"
        explanation = f"the model has no trainable parameters in a layer of this name; {hint}"
        raise ConfigError(f"trainer.freeze_after.{layer}", explanation)
    return found


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon trains: those of linear layers and convolutions inside the model.

    First and last layer are the first and last that the model registered. Auxiliary heads return logits too: a layer
    counts as an output if it is as wide as the last layer, and linear or a 1x1 convolution.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    hidden = []
    for layer in layers:
        weight = cast(nn.Parameter, layer.weight)
        is_first = layer is layers[0] and not isinstance(layer, nn.Linear)
        is_output = len(weight) == len(layers[-1].weight) and weight[0].numel() == weight.shape[1]
        is_one_matrix = isinstance(layer, nn.Linear) or layer.groups == 1
        if is_one_matrix and weight.requires_grad and not (is_first or is_output):
            hidden.append(weight)
    return hidden


def fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Set the momentum of fused SGD to zero before its first step.

    Otherwise the first step allocates uninitialised momentum, and leaves it so if that step is skipped. Without
    dampening, zeros change no result: the first step's momentum is momentum x 0 + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] and not group["dampening"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
