"""Adapter that fits other models (torchvision's, the user's) to the channels and classes of the data.

    first convolution (or linear layer)        resized to `in_channels`; its weights are kept
    last linear layer (or 1x1 convolution)     replaced if its number of outputs is not `num_classes`

The resized layer has the same output for grey images (all channels equal) as before, pretrained or not: for each
filter, the sum of the weights over the channels stays the same. For fewer channels, weights of old channels are added.
For more channels, old channels are repeated and the copies share the weight.

    RGB -> grey  [r+g+b]        RGB -> 4  [r/2, g, b, r/2]        RGB -> 6  [r/2, g/2, b/2, r/2, g/2, b/2]

Layers are changed in place, so parameters keep their names. "First" and "last" refer to the order in which the model
registered its layers. In all of torchvision's classifiers, this is the order of use.
"""

from math import isqrt

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from models.blocks import require_count


def adapt(*, network: nn.Module, in_channels: int, num_classes: int) -> nn.Module:
    """Return the same model, changed to read images (B, in_channels, H, W) and return logits (B, num_classes).

    Raises ConfigError if the model has no layer that can be adapted.
    """
    require_count(in_channels=in_channels, num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ConfigError("network", "must be a torch.nn.Module", value=type(network).__name__)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if not layers:
        raise ConfigError("network", "must contain a convolution or a linear layer", value=type(network).__name__)
    _refit_first(layers[0], in_channels)
    _refit_last(layers[-1], num_classes)
    return network


def _refit_first(layer: nn.Conv2d | nn.Linear, in_channels: int) -> None:
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        if layer.in_channels == in_channels:
            return
        if layer.groups != 1:
            reason = f"its first convolution is grouped, so it cannot be adapted to {in_channels} channels"
            raise ConfigError("network", reason)
        refitted = _refit_channels(weight, in_channels)
        layer.in_channels = in_channels
    else:
        channels = _channels_of_flat_image(layer.in_features)
        if channels is None or channels == in_channels:
            return
        pixels = layer.in_features // channels
        by_channel = weight.reshape(-1, channels, pixels)  # flattened images have the order (C, H, W)
        refitted = _refit_channels(by_channel, in_channels).reshape(-1, in_channels * pixels)
        layer.in_features = in_channels * pixels
    layer.weight = nn.Parameter(refitted, requires_grad=layer.weight.requires_grad)


def _refit_channels(weight: Tensor, channels: int) -> Tensor:
    """Return filters (O, channels, ...) made of the filters (O, old_channels, ...).

    New and old channels are paired in order; the shorter list repeats until the longer one ends.
    """
    old_channels = weight.shape[1]
    pairs = torch.arange(max(old_channels, channels), device=weight.device)
    mixing = weight.new_zeros(channels, old_channels)
    mixing[pairs % channels, pairs % old_channels] = 1
    mixing /= mixing.sum(dim=0)  # the copies of a channel share its weight
    return torch.einsum("nc,oc...->on...", mixing, weight).contiguous()


def _channels_of_flat_image(features: int) -> int | None:
    """Return 1 or 3 if a square grey or RGB image has `features` values (never both), else None: no resizing."""
    for channels in (1, 3):
        pixels, remainder = divmod(features, channels)
        if remainder == 0 and isqrt(pixels) ** 2 == pixels:
            return channels
    return None


def _refit_last(layer: nn.Conv2d | nn.Linear, num_classes: int) -> None:
    if layer.weight.shape[0] == num_classes:
        return
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size != (1, 1) or layer.groups != 1:
            reason = f"its last layer must be a linear layer or an ungrouped 1x1 convolution, not {layer}"
            raise ConfigError("network", reason)
        layer.out_channels = num_classes
    else:
        layer.out_features = num_classes
    layer.weight = nn.Parameter(layer.weight.new_empty(num_classes, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(num_classes))
    layer.reset_parameters()
