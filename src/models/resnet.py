"""Residual networks: each block adds a learned correction to its input, so an unneeded block can stay the identity.

    basic       x -> 3x3 -> ReLU -> 3x3 ----------------> (+) -> ReLU         a norm after every convolution
    bottleneck  x -> 1x1 -> ReLU -> 3x3 -> ReLU -> 1x1 -> (+) -> ReLU         4x as many output as inner channels
                 \\______________ shortcut ______________/

One class covers the ImageNet forms (ResNet-18 to -152), the CIFAR forms (ResNet-20 to -110) and their plain
counterparts, which have no shortcuts:

    image -> stem -> layer1 (stride 1) -> layer2 (stride 2) -> ... -> mean over pixels -> fc -> logits
    stem `imagenet`: 7x7 with stride 2 and a 3x3 max pool with stride 2; `small`: 3x3 with stride 1

In a block that changes the shape, shortcut `A` takes every second pixel and sets new channels to zero, without
parameters. Shortcut `B` is a 1x1 convolution and a norm. `none` removes the shortcuts of all blocks: the plain network.

The stride of the bottleneck is in its 3x3 convolution, as in torchvision (v1.5), which is more accurate. In the paper
it is in the first 1x1. Parameters have torchvision's names, so its weights can be loaded.

Source: He, Zhang, Ren and Sun 2015, Deep Residual Learning for Image Recognition: section 3.3 (shortcuts and plain
networks), table 1 (ImageNet), section 4.2 (CIFAR-10).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError
from models.blocks import activation, choose, convolution, initialise, require_count, require_counts

STEMS = {"imagenet": 7, "small": 3}  # side of the first filters
SHORTCUTS = {"A": "A", "B": "B", "none": "none"}


class ResNet(nn.Module):
    """Residual network: `depths` are the blocks of each stage, `widths` the channels of their 3x3 convolutions."""

    minimum_size = 1  # all layers are padded, and the mean accepts any size

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        block: str = "basic",
        stem: str = "imagenet",
        shortcut: str = "B",
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_counts(depths=depths, widths=widths)
        if not depths or len(depths) != len(widths):
            raise ConfigError("depths", f"must have one integer for each of widths = {list(widths)}", value=depths)
        block_class = choose("block", block, BLOCKS)
        kernel_size = choose("stem", stem, STEMS)
        choose("shortcut", shortcut, SHORTCUTS)

        channels = widths[0]
        self.conv1 = convolution(in_channels, channels, kernel_size=kernel_size, stride=2 if stem == "imagenet" else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = activation("relu")
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

        self.stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        for stage, depth, width in zip(self.stages, depths, widths, strict=True):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if index == 0 and stage != "layer1" else 1  # the first block of a stage halves the size
                blocks.append(block_class(channels, width, stride=stride, shortcut=shortcut))
                channels = width * block_class.expansion
            self.add_module(stage, nn.Sequential(*blocks))

        self.fc = nn.Linear(channels, num_classes)
        initialise(self, init, paper=_he_normal_fan_out)

    def features(self, images: Tensor) -> Tensor:
        """Return the maps of the last stage (B, channels, h, w) for images (B, C, H, W)."""
        maps: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            maps = getattr(self, stage)(maps)
        return maps

    def head(self, maps: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of feature maps (B, channels, h, w)."""
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return self.head(self.features(images))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, H, W) -> (B, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, kernel_size=3, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, kernel_size=3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = activation("relu")
        self.downsample = _shortcut(in_channels, width, stride=stride, option=shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, width, H/stride, W/stride) for maps (B, in_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            out += self.downsample(maps)
        output: Tensor = self.relu(out)
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: (B, in_channels, H, W) -> (B, 4 * width, H/stride, W/stride).

    The 1x1 convolutions reduce the channels of the 3x3 convolution, and so its cost.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = convolution(in_channels, width, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, kernel_size=3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, out_channels, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = activation("relu")
        self.downsample = _shortcut(in_channels, out_channels, stride=stride, option=shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, 4 * width, H/stride, W/stride) for maps (B, in_channels, H, W)."""
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            out += self.downsample(maps)
        output: Tensor = self.relu(out)
        return output


class PaddedShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel unchanged, and zeros for the channels that the block adds."""

    def __init__(self, *, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C + extra_channels, H/stride, W/stride), rounded up as by the convolution, for (B, C, H, W)."""
        maps = maps[:, :, :: self.stride, :: self.stride]  # a view: only the padding copies data
        return functional.pad(maps, (0, 0, 0, 0, 0, self.extra_channels))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _shortcut(in_channels: int, out_channels: int, *, stride: int, option: str) -> nn.Module | None:
    """Return the layer that brings a block's input to the shape of its output; None in a plain network."""
    if option == "none":
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if option == "A":
        return PaddedShortcut(extra_channels=out_channels - in_channels, stride=stride)
    return nn.Sequential(
        convolution(in_channels, out_channels, kernel_size=1, stride=stride), nn.BatchNorm2d(out_channels)
    )


def _he_normal_fan_out(layer: nn.Conv2d | nn.Linear) -> None:
    """Fill convolutions with variance 2 / fan-out, which keeps the scale of gradients; the paper omits `fc`."""
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
