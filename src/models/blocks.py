"""Code shared by the models: layers by name, initial weights, and checks of config values.

Initial weights keep the scale of the signal the same from layer to layer. With fan-in n_in and fan-out n_out:

    he_*      variance 2 / n_in             for ReLU, which passes half of the signal
    xavier_*  variance 2 / (n_in + n_out)   for tanh and other symmetric activations
    paper     the scheme of the model's own paper
    default   torch's default: uniform in +-1/sqrt(n_in), biases too

`_normal` draws from a normal distribution, `_uniform` from a uniform distribution of the same variance.

Initial weights are random because equal weights stay equal. All units of a layer would compute the same value, get the
same gradient and take the same step, at every step: a layer of any width would be worth one unit. Therefore
`init: equal` is refused. `equal_anyway` sets each weight to 1 / n_in, to demonstrate the effect.

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

# `inplace` saves a pass over memory. It is safe after convolutions, linear layers, norms and pools, because their
# gradients do not need their output. The activations without `inplace` need their input for the gradient.
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
    """Return a new activation layer for its name in the config."""
    return choose("activation", name, ACTIVATIONS)()


class Maxout(nn.Module):
    """Maximum of `pieces` values: output channel c is the maximum of the input channels c, c + C, c + 2C, ...

    The previous layer has `pieces` times as many channels (Goodfellow et al. 2013, Maxout Networks, section 2).
    """

    def __init__(self, *, pieces: int) -> None:
        super().__init__()
        require_count(pieces=pieces)
        self.pieces = pieces

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, C, ...) for values (B, pieces * C, ...)."""
        # A maximum over a separate dimension would take 20 times as long.
        return reduce(torch.maximum, values.chunk(self.pieces, dim=1))


def convolution(in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution for use before a norm.

    Its padding keeps the size at stride 1. It has no bias, because the norm would cancel it.
    """
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


class LocalResponseNorm(nn.Module):
    """Division of each value by (k + alpha * sum of the squares of the `size` channels around it)^beta, at its pixel.

    Torch's layer of the same name divides alpha by `size` and has no deterministic gradient on CUDA.
    """

    def __init__(self, *, size: int, alpha: float, beta: float, k: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, maps: Tensor) -> Tensor:
        """Return the normalised maps (B, C, H, W) for maps (B, C, H, W)."""
        before = self.size // 2
        squares = maps.pow(2)  # autocast computes powers in float32, where a square does not overflow
        squares = functional.pad(squares, (0, 0, 0, 0, before, self.size - 1 - before))
        channels = maps.shape[1]
        sums = sum((squares[:, first : first + channels] for first in range(1, self.size)), squares[:, :channels])
        return maps * (self.k + self.alpha * sums).pow(-self.beta)


# ---- Initial weights

SCHEMES: dict[str, Scheme] = {
    "default": lambda layer: None,
    "he_normal": lambda layer: nn.init.kaiming_normal_(layer.weight, nonlinearity="relu"),
    "he_uniform": lambda layer: nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu"),
    "xavier_normal": lambda layer: nn.init.xavier_normal_(layer.weight),
    "xavier_uniform": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "equal_anyway": lambda layer: nn.init.constant_(layer.weight, 1 / layer.weight[0].numel()),
}


def initialise(model: nn.Module, init: str, *, paper: Scheme | None = None) -> None:
    """Fill the weights of all convolutions and linear layers and set their biases to zero, except with `default`.

    Norms keep torch's weight 1 and bias 0. `paper` is the scheme of the model's own paper. It is called with one layer
    at a time, after the bias is set to zero, and may leave the weights unchanged.
    """
    if init == "equal":
        reason = "cannot break symmetry: all units of a layer always compute the same value and get the same gradient"
        raise ConfigError("init", f"{reason}; to see this effect, set equal_anyway", value=init)
    if init == "paper" and paper is None:
        reason = "is not defined for this model"
        raise ConfigError("init", f"{reason}; must be one of {', '.join(SCHEMES)}", value=init)
    fill = choose("init", init, SCHEMES | ({"paper": paper} if paper else {}))
    if init == "default":
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            fill(layer)


# ---- Checks of constructor arguments. The subject is the argument's name; the builder adds the prefix `model.`.


def choose(subject: str, value: object, choices: Mapping[str, T]) -> T:
    """Return the entry named `value`.

    Raises ConfigError with the list of names, and the nearest name for a misspelled one.
    """
    if isinstance(value, str) and value in choices:
        return choices[value]
    hint = suggest(value, choices) if isinstance(value, str) else ""
    raise ConfigError(subject, f"must be one of {', '.join(choices)}" + (f"; {hint}" if hint else ""), value=value)


def require_count(**arguments: object) -> None:
    """Raise ConfigError unless each argument is an integer >= 1, as in `require_count(num_classes=num_classes)`."""
    for subject, value in arguments.items():
        if not _is_count(value):
            raise ConfigError(subject, "must be an integer >= 1", value=value)


def require_counts(**arguments: object) -> None:
    """Raise ConfigError unless each argument is a list of integers >= 1; an empty list is allowed.

    OmegaConf's lists are sequences too, so they are accepted.
    """
    for subject, value in arguments.items():
        if not _is_list_of_counts(value):
            raise ConfigError(subject, "must be a list of integers >= 1, such as [64, 32]", value=value)


def require_lists_of_counts(**arguments: object) -> None:
    """Raise ConfigError unless each argument is a non-empty list of non-empty lists of integers >= 1."""
    for subject, value in arguments.items():
        lists = value if isinstance(value, Sequence) and not isinstance(value, str) else []
        if not lists or not all(_is_list_of_counts(counts) and len(counts) for counts in lists):
            reason = "must be a list of lists of integers >= 1, such as [[64], [128, 128]]"
            raise ConfigError(subject, reason, value=value)


def require_dropout(dropout: object) -> None:
    """Raise ConfigError unless the fraction of values set to zero is >= 0 (none) and < 1 (all)."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError("dropout", "must be a number >= 0 and < 1", value=dropout)


def require_flag(**arguments: object) -> None:
    """Raise ConfigError unless each argument is true or false.

    Newer YAML parsers read the words `no` and `off` as text, and Python treats text as true.
    """
    for subject, value in arguments.items():
        if not isinstance(value, bool):
            raise ConfigError(subject, "must be true or false", value=value)


def require_image_size(image_size: int, *, model: str, minimum: int) -> None:
    """Raise ConfigError if the side of the square images (in pixels) is too small for the model's layers."""
    require_count(image_size=image_size)
    if image_size < minimum:
        raise ConfigError("image_size", f"{model} needs at least {minimum} px", value=image_size)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list_of_counts(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_count, value))
