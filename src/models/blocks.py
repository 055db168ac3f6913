"""What the networks share: layers by name, starting weights, and checks of what a user can type.

Starting weights keep the size of the signal the same from layer to layer. With n_in inputs and n_out outputs a unit:

    he_*      variance 2 / n_in             for ReLU, which lets half of the signal through
    xavier_*  variance 2 / (n_in + n_out)   for tanh and other symmetric activations
    paper     whatever the network's own paper states
    default   torch's own: uniform in +-1/sqrt(n_in), biases too

`_normal` draws from a bell curve, `_uniform` from an interval of the same variance.

Sources: He et al. 2015, Delving Deep into Rectifiers, section 2.2; Glorot and Bengio 2010, Understanding the Difficulty
of Training Deep Feedforward Neural Networks, section 4.2.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import nn

from core.errors import ConfigError, suggest

T = TypeVar("T")
Scheme = Callable[[nn.Conv2d | nn.Linear], object]


# ---- Layers

# In place saves a pass over memory, and is safe behind convolutions, linear layers, norms and pools: their gradients
# never look at their own output. The others need their input for the gradient.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, negative_slope=0.01, inplace=True),
    "elu": partial(nn.ELU, inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """A fresh activation layer by its name in the config."""
    return choose("activation", name, ACTIVATIONS)()


def convolution(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that a norm follows: padded so that stride 1 keeps the size, no bias (the norm would cancel it)."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


# ---- Starting weights

SCHEMES: dict[str, Scheme] = {
    "default": lambda layer: None,
    "he_normal": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),
    "he_uniform": lambda layer: nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu"),
    "xavier_normal": lambda layer: nn.init.xavier_normal_(layer.weight),
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight),
}


def initialise(model: nn.Module, init: str, *, paper: Scheme | None = None) -> None:
    """Fills the weights of every convolution and linear layer, and sets their biases to zero (all but `default`).

    Norms keep weight 1 and bias 0, as torch builds them. `paper` is the network's own scheme: it gets one layer at a
    time, its bias zero by then, and may leave a layer as it is.
    """
    if init == "paper" and paper is None:
        raise ConfigError("init", f"this network has none; must be one of {', '.join(SCHEMES)}", value=init)
    fill = choose("init", init, SCHEMES | ({"paper": paper} if paper else {}))
    if init == "default":
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            fill(layer)


# ---- Checks of constructor arguments. The subject is the argument's name; the builder puts `model.` before it.


def choose(subject: str, value: object, choices: Mapping[str, T]) -> T:
    """The entry of that name, or an error that lists the names and the one nearest to a misspelling."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    hint = suggest(value, choices) if isinstance(value, str) else ""
    raise ConfigError(subject, f"must be one of {', '.join(choices)}" + (f"; {hint}" if hint else ""), value=value)


def require_count(**arguments: object) -> None:
    """Each must be a whole number >= 1, as in `require_count(num_classes=num_classes)`."""
    for subject, value in arguments.items():
        if not _is_count(value):
            raise ConfigError(subject, "must be a whole number >= 1", value=value)


def require_counts(**arguments: object) -> None:
    """Each must be a list of whole numbers >= 1; an empty list passes. (OmegaConf's lists are sequences too.)"""
    for subject, value in arguments.items():
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(_is_count, value)):
            raise ConfigError(subject, "must be a list of whole numbers >= 1, such as [64, 32]", value=value)


def require_dropout(dropout: object) -> None:
    """The share of values set to zero: 0 (none) or more, below 1 (all)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError("dropout", "must be a number >= 0 and < 1", value=dropout)


def require_image_size(image_size: int, *, network: str, minimum: int) -> None:
    """The side of the square images in pixels must be large enough for the network's convolutions and pools."""
    require_count(image_size=image_size)
    if image_size < minimum:
        raise ConfigError("image_size", f"{network} needs at least {minimum} px", value=image_size)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
