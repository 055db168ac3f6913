"""Parameter groups: what an optimizer treats alike.

all                       every parameter, if weight decay acts on all of them
weights, no_decay         matrices and filters; biases and normalisation layers, which weight decay leaves alone
muon, adamw, no_decay     with Muon: matrices inside the model, other weights, biases and normalisation layers
"""

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from core.errors import ConfigError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def decayed_parameters(model: nn.Module, weight_decay_on: str) -> list[nn.Parameter]:
    """What weight decay and L1 act on: `all`, or `weights` alone, as biases and norms are vectors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [parameter for parameter in parameters if parameter.ndim > 1 or weight_decay_on == "all"]


def group_parameters(model: nn.Module, *, decayed: Collection[nn.Parameter], with_muon: bool) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, as dictionaries with `name` and `params`.

    Raises ConfigError if Muon is to train a model that has no matrix for it.
    """
    decays = set(decayed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    no_decay = [parameter for parameter in parameters if parameter not in decays]
    matrices = set(hidden_matrices(model)) if with_muon else set()
    if with_muon and not matrices:
        explanation = (
            "is for matrices inside a network, between its first convolution and what is as wide as its outputs"
        )
        raise ConfigError("_target_", f"{explanation}: this one has none; try optimizer=adamw")
    others = "adamw" if with_muon else "weights" if no_decay else "all"
    groups: list[dict[str, Any]] = [
        {"name": "muon", "params": [parameter for parameter in parameters if parameter in matrices]},
        {"name": others, "params": [parameter for parameter in parameters if parameter in decays - matrices]},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def scale_biases(optimizer: Optimizer, factor: float, weight_decay_on: str) -> None:
    """Multiply the learning rate of the group `no_decay` by `factor` (Jordan 2024, section 3.4 takes 64)."""
    if factor != 1 and weight_decay_on == "all":
        explanation = "other than 1 needs trainer.weight_decay_on=weights, which sets biases and norms apart"
        raise ConfigError("trainer.bias_lr_factor", explanation, value=factor)
    for group in optimizer.param_groups:
        group["lr"] *= factor if group["name"] == "no_decay" else 1


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon is for: of linear layers and convolutions inside the network.

    The first layer and the last go by the order in which the network registered them. Auxiliary heads give logits too:
    a layer counts as an output where it is as wide as the last one, and linear or a 1x1 convolution.
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
    """Momentum from zero. Fused SGD allocates it unfilled at its first step, and a skipped step leaves
    it so; zeros change nothing else, as momentum x 0 + gradient is what the first step takes (dampening 0)."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] and not group["dampening"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
