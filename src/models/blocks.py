"""What the networks share: layers by name, starting weights, and checks of what a user can type.

Starting weights keep the size of the signal the same from layer to layer. With n_in inputs and n_out outputs a unit:

    he_*      variance 2 / n_in             for ReLU, which lets half of the signal through
    xavier_*  variance 2 / (n_in + n_out)   for tanh and other symmetric activations
    paper     whatever the network's own paper states
    default   torch's own: uniform in +-1/sqrt(n_in), biases too

`_normal` draws from a bell curve, `_uniform` from an interval of the same variance.

They are random because equal weights stay equal. All units of a layer would compute the same value, so they would get
the same gradient and take the same step, for ever: a layer of any width would be worth one unit. `init: equal` is
therefore refused; `equal_anyway` builds it, each weight 1 / n_in, for those who want to watch.

Sources: He et al. 2015, Delving Deep into Rectifiers, section 2.2; Glorot and Bengio 2010, Understanding the Difficulty
of Training Deep Feedforward Neural Networks, section 4.2.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class Maxout(nn.Module):
    """The largest of `pieces` values: channel c of the output is that of channels c, c + C, c + 2C, ... of the input.

    The layer in front makes `pieces` times as many channels (Goodfellow et al. 2013, Maxout Networks, section 2).
    """

    def __init__(self, *, pieces: int) -> None:
        super().__init__()
        require_count(pieces=pieces)
        self.pieces = pieces

    def forward(self, values: Tensor) -> Tensor:
        """(B, pieces * C, ...) to (B, C, ...)."""
        # A maximum over a dimension of its own would take 20 times as long.
        return reduce(torch.maximum, values.chunk(self.pieces, dim=1))


def convolution(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that a norm follows: padded so that stride 1 keeps the size, no bias (the norm would cancel it)."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


class LocalResponseNorm(nn.Module):
    """Each value divided by (k + alpha * sum of the squares of the `size` channels around it)^beta, at its pixel.

    Torch's layer of that name divides alpha by `size`, and has no deterministic gradient on CUDA.
    """

    def __init__(self, *, size: int, alpha: float, beta: float, k: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        before = self.size // 2
        squares = maps.pow(2)  # autocast takes powers in 32 bits, where a square does not overflow
        squares = functional.pad(squares, (0, 0, 0, 0, before, self.size - 1 - before))
        channels = maps.shape[1]
        sums = sum((squares[:, first : first + channels] for first in range(1, self.size)), squares[:, :channels])
        return maps * (self.k + self.alpha * sums).pow(-self.beta)


# ---- Starting weights

SCHEMES: dict[str, Scheme] = {
    "default": lambda layer: None,
    "he_normal": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),
    "he_uniform": lambda layer: nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu"),
    "xavier_normal": lambda layer: nn.init.xavier_normal_(layer.weight),
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "equal_anyway": lambda layer: nn.init.constant_(layer.weight, 1 / layer.weight[0].numel()),
}


def initialise(model: nn.Module, init: str, *, paper: Scheme | None = None) -> None:
    """Fills the weights of every convolution and linear layer, and sets their biases to zero (all but `default`).

    Norms keep weight 1 and bias 0, as torch builds them. `paper` is the network's own scheme: it gets one layer at a
    time, its bias zero by then, and may leave a layer as it is.
    """
    if init == "equal":
        reason = "cannot break symmetry: all units of a layer compute the same and get the same gradient, for ever"
        raise ConfigError("init", f"{reason}; to see that happen, set equal_anyway", value=init)
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
        if not _is_list_of_counts(value):
            raise ConfigError(subject, "must be a list of whole numbers >= 1, such as [64, 32]", value=value)


def require_lists_of_counts(**arguments: object) -> None:
    """Each must be a list of one or more lists, each of one or more whole numbers >= 1."""
    for subject, value in arguments.items():
        lists = value if isinstance(value, Sequence) and not isinstance(value, str) else []
        if not lists or not all(_is_list_of_counts(counts) and len(counts) for counts in lists):
            raise ConfigError(subject, "must be lists of whole numbers >= 1, such as [[64], [128, 128]]", value=value)


def require_dropout(dropout: object) -> None:
    """The share of values set to zero: 0 (none) or more, below 1 (all)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError("dropout", "must be a number >= 0 and < 1", value=dropout)


def require_flag(**arguments: object) -> None:
    """Each must be true or false; the words no and off are text to YAML's newer readers, and text counts as true."""
    for subject, value in arguments.items():
        if not isinstance(value, bool):
            raise ConfigError(subject, "must be true or false", value=value)


def require_image_size(image_size: int, *, network: str, minimum: int) -> None:
    """The side of the square images in pixels must be large enough for the network's convolutions and pools."""
    require_count(image_size=image_size)
    if image_size < minimum:
        raise ConfigError("image_size", f"{network} needs at least {minimum} px", value=image_size)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list_of_counts(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_count, value))
