"""Makes a network from elsewhere fit the data: torchvision's, or a class of the user's own.

    first convolution (or linear layer)        refitted to `in_channels`, its weights kept
    last linear layer (or 1x1 convolution)     replaced if its number of outputs is not `num_classes`

Refitting keeps what the network says about grey images (all channels equal), pretrained or not: for each filter the
weights of all channels have the same sum as before. Fewer channels: they are added up. More: they are repeated, and the
copies share the weight.

    RGB -> grey  [r+g+b]        RGB -> 4  [r/2, g, b, r/2]        RGB -> 6  [r/2, g/2, b/2, r/2, g/2, b/2]

Layers are changed in place, so parameters keep the network's own names. "First" and "last" go by the order in which
the network registered its layers, which is the order of use in all of torchvision's classifiers.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import require_count


def adapt(*, network: nn.Module, in_channels: int, num_classes: int) -> nn.Module:
    """The same network, taking images (B, in_channels, H, W) and giving logits (B, num_classes)."""
    require_count(in_channels=in_channels, num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ConfigError("network", "must be a torch.nn.Module", value=type(network).__name__)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if not layers:
        raise ConfigError("network", "has no convolution and no linear layer to fit", value=type(network).__name__)
    _refit_first(layers[0], in_channels)
    _refit_last(layers[-1], num_classes)
    return network


def _refit_first(layer: nn.Conv2d | nn.Linear, in_channels: int) -> None:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        if layer.in_channels == in_channels:
            return
        if layer.groups != 1:
            raise ConfigError("network", f"its first convolution is grouped, so it cannot take {in_channels} channels")
        refitted = _refit_channels(weight, in_channels)
        layer.in_channels = in_channels
    else:
        channels = _channels_of_flat(layer.in_features)
        if channels is None or channels == in_channels:
            return
        pixels = layer.in_features // channels
        by_channel = weight.reshape(-1, channels, pixels)  # flattened images are (C, H, W): channels first
        refitted = _refit_channels(by_channel, in_channels).reshape(-1, in_channels * pixels)
        layer.in_features = in_channels * pixels
    layer.weight = nn.Parameter(refitted, requires_grad=layer.weight.requires_grad)


def _refit_channels(weight: Tensor, channels: int) -> Tensor:
    """Filters (O, old, ...) to (O, channels, ...): both lists of channels go round until the longer one is used up."""
    old = weight.shape[1]
    pairs = torch.arange(max(old, channels), device=weight.device)
    mixing = weight.new_zeros(channels, old)
    mixing[pairs % channels, pairs % old] = 1
    mixing /= mixing.sum(dim=0)  # the copies of a channel share its weight
    return torch.einsum("nc,oc...->on...", mixing, weight).contiguous()


def _channels_of_flat(features: int) -> int | None:
    """1 or 3 when this is the size of a square image, grey or RGB (never both); None leaves the layer alone."""
    for channels in (1, 3):
        pixels, rest = divmod(features, channels)
        if rest == 0 and isqrt(pixels) ** 2 == pixels:
            return channels
    return None


def _refit_last(layer: nn.Conv2d | nn.Linear, num_classes: int) -> None:
    if layer.weight.shape[0] == num_classes:
        return
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1) or layer.groups != 1:
            raise ConfigError("network", f"its last layer, {layer}, is no linear layer or 1x1 convolution")
        layer.out_channels = num_classes
    else:
        layer.out_features = num_classes
    layer.weight = nn.Parameter(layer.weight.new_empty(num_classes, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(num_classes))
    layer.reset_parameters()
