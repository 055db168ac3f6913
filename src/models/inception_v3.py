"""Inception v3: Inception blocks with large filters factorised into several smaller ones, which cost less.

    A   35x35, figure 5    maps -+-> 1x1 --------------------------------+->      two 3x3: receptive field of a 5x5
                                 +-> 1x1 -> 5x5 -------------------------+
                                 +-> 1x1 -> 3x3 -> 3x3 ------------------+
                                 +-> mean pool -> 1x1 -------------------+
    B   to 17x17, fig. 10  maps -+-> 3x3/2 ------------------------------+->      /2: stride 2
                                 +-> 1x1 -> 3x3 -> 3x3/2 ----------------+
                                 +-> max pool/2 -------------------------+
    C   17x17, figure 6    maps -+-> 1x1 --------------------------------+->      1x7 and 7x1: receptive field of a 7x7
                                 +-> 1x1 -> 1x7 -> 7x1 ------------------+
                                 +-> 1x1 -> 7x1 -> 1x7 -> 7x1 -> 1x7 ----+
                                 +-> mean pool -> 1x1 -------------------+
    D   to 8x8             maps -+-> 1x1 -> 3x3/2 -----------------------+->
                                 +-> 1x1 -> 1x7 -> 7x1 -> 3x3/2 ---------+
                                 +-> max pool/2 -------------------------+
    E   8x8, figure 7      maps -+-> 1x1 --------------------------------+->      1x3 and 3x1 in parallel, concatenated
                                 +-> 1x1 -> 1x3 | 3x1 -------------------+
                                 +-> 1x1 -> 3x3 -> 1x3 | 3x1 ------------+
                                 +-> mean pool -> 1x1 -------------------+

    image -> stem -> A A A -> B -> C C C C -> D -> E E -> mean over pixels -> dropout -> linear -> logits
                                            +-> auxiliary head, in training only

Batch norm (epsilon 0.001) and ReLU follow each convolution. In training mode, a model with the auxiliary head returns
(logits, auxiliary logits), and the auxiliary loss is multiplied by `auxiliary_weight`. In evaluation mode, the model
returns only the logits.

The paper's table 1 and text leave many details open. Where they differ from the authors' published code, this model
follows the code, as other implementations do: the stem, the 5x5 in A, block D, the weight of the auxiliary loss. The
initial weights also follow the code: `paper` is a normal distribution of standard deviation 0.1, truncated at two
standard deviations. Parameters have torchvision's names, so its weights can be loaded. Its ImageNet weights expect
images normalised with mean and standard deviation 0.5.

Source: Szegedy, Vanhoucke, Ioffe, Shlens and Wojna 2015, Rethinking the Inception Architecture for Computer Vision:
table 1, section 3 (factorised filters), section 4 and figure 8 (auxiliary head), section 5 (grid size reduction).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import activation, initialise, require_count, require_dropout, require_flag


class InceptionV3(nn.Module):
    """Inception v3: 27,161,264 parameters at 3 channels and 1000 classes; 23,834,568 without the auxiliary head."""

    minimum_size = 75  # leaves one pixel after D: 75 -> 37 -> 35 -> 17 -> 15 -> 7 -> 3 -> 1
    auxiliary_weight = 0.4  # factor of the auxiliary head's loss, as in the authors' code

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        auxiliary: bool = True,
        dropout: float = 0.5,
        init: str = "paper",
    ) -> None:
        super().__init__()
        require_count(num_classes=num_classes, in_channels=in_channels)
        require_dropout(dropout)
        require_flag(auxiliary=auxiliary)
        if auxiliary:
            self.minimum_size = 107  # leaves 5x5 pixels for the auxiliary head: 107 -> 53 -> 51 -> 25 -> 23 -> 11 -> 5

        # Sizes at 299 pixels.
        self.Conv2d_1a_3x3 = Unit(in_channels, 32, kernel_size=3, stride=2)  # (B, 32, 149, 149)
        self.Conv2d_2a_3x3 = Unit(32, 32, kernel_size=3)  # (B, 32, 147, 147)
        self.Conv2d_2b_3x3 = Unit(32, 64, kernel_size=3, padding=1)  # (B, 64, 147, 147)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)  # (B, 64, 73, 73)
        self.Conv2d_3b_1x1 = Unit(64, 80, kernel_size=1)  # (B, 80, 73, 73)
        self.Conv2d_4a_3x3 = Unit(80, 192, kernel_size=3)  # (B, 192, 71, 71)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)  # (B, 192, 35, 35)
        self.Mixed_5b = InceptionA(192, pooled=32)  # (B, 256, 35, 35)
        self.Mixed_5c = InceptionA(256, pooled=64)  # (B, 288, 35, 35)
        self.Mixed_5d = InceptionA(288, pooled=64)  # (B, 288, 35, 35)
        self.Mixed_6a = InceptionB(288)  # (B, 768, 17, 17)
        self.Mixed_6b = InceptionC(768, width=128)  # (B, 768, 17, 17)
        self.Mixed_6c = InceptionC(768, width=160)
        self.Mixed_6d = InceptionC(768, width=160)
        self.Mixed_6e = InceptionC(768, width=192)
        self.AuxLogits = AuxiliaryHead(768, num_classes) if auxiliary else None
        self.Mixed_7a = InceptionD(768)  # (B, 1280, 8, 8)
        self.Mixed_7b = InceptionE(1280)  # (B, 2048, 8, 8)
        self.Mixed_7c = InceptionE(2048)  # (B, 2048, 8, 8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        initialise(self, init, paper=_truncated_normal)
        if init == "paper" and self.AuxLogits is not None:  # its first logits are close to zero
            _truncated_normal(self.AuxLogits.conv1.conv, deviation=0.01)
            _truncated_normal(self.AuxLogits.fc, deviation=0.001)

    def features(self, images: Tensor) -> Tensor:
        """Return the maps of the last block (B, 2048, h, w) for images (B, C, H, W)."""
        return self._after_6e(self._to_6e(images))

    def head(self, maps: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of feature maps (B, 2048, h, w)."""
        logits: Tensor = self.fc(self.dropout(maps.mean(dim=(2, 3))))
        return logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, num_classes) of images (B, C, H, W); in training, a pair with the auxiliary logits."""
        maps = self._to_6e(images)
        logits = self.head(self._after_6e(maps))
        return (logits, self.AuxLogits(maps)) if self.training and self.AuxLogits is not None else logits

    def _to_6e(self, images: Tensor) -> Tensor:
        """Return the maps that the auxiliary head reads (B, 768, h, w), for images (B, C, H, W)."""
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(maps)))
        maps = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(maps))))
        maps = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(maps))))
        output: Tensor = self.Mixed_6e(maps)
        return output

    def _after_6e(self, maps: Tensor) -> Tensor:
        """Return the maps of the last block (B, 2048, (h - 1) / 2, (w - 1) / 2) for maps (B, 768, h, w)."""
        output: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(maps)))
        return output


class InceptionA(nn.Module):
    """Block A: (B, in_channels, H, W) -> (B, 64 + 64 + 96 + pooled, H, W)."""

    def __init__(self, in_channels: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(in_channels, 64, kernel_size=1)
        self.branch5x5_1 = Unit(in_channels, 48, kernel_size=1)
        self.branch5x5_2 = Unit(48, 64, kernel_size=5, padding=2)
        self.branch3x3dbl_1 = Unit(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = Unit(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, kernel_size=3, padding=1)
        self.branch_pool = Unit(in_channels, pooled, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the concatenation of 1x1 | 1x1 -> 5x5 | 1x1 -> 3x3 -> 3x3 | mean pool -> 1x1."""
        five = self.branch5x5_2(self.branch5x5_1(maps))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(maps)))
        return torch.cat((self.branch1x1(maps), five, threes, self.branch_pool(mean_pool(maps))), dim=1)


class InceptionB(nn.Module):
    """Block B: (B, in_channels, H, W) -> (B, 384 + 96 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(in_channels, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = Unit(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = Unit(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, kernel_size=3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the concatenation of 3x3/2 | 1x1 -> 3x3 -> 3x3/2 | max pool/2."""
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(maps)))
        return torch.cat((self.branch3x3(maps), threes, functional.max_pool2d(maps, 3, stride=2)), dim=1)


class InceptionC(nn.Module):
    """Block C: (B, in_channels, H, W) -> (B, 4 * 192, H, W); `width` channels in branches with 7-pixel filters."""

    def __init__(self, in_channels: int, *, width: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(in_channels, 192, kernel_size=1)
        self.branch7x7_1 = Unit(in_channels, width, kernel_size=1)
        self.branch7x7_2 = Unit(width, width, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = Unit(width, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = Unit(in_channels, width, kernel_size=1)
        self.branch7x7dbl_2 = Unit(width, width, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = Unit(width, width, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = Unit(width, width, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = Unit(width, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch_pool = Unit(in_channels, 192, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the concatenation of 1x1 | 1x1 -> 1x7 -> 7x1 | 1x1 -> 7x1 -> 1x7 -> 7x1 -> 1x7 | mean pool -> 1x1."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(maps)))
        sevens = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(maps)))
        sevens = self.branch7x7dbl_5(self.branch7x7dbl_4(sevens))
        return torch.cat((self.branch1x1(maps), seven, sevens, self.branch_pool(mean_pool(maps))), dim=1)


class InceptionD(nn.Module):
    """Block D: (B, in_channels, H, W) -> (B, 320 + 192 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(in_channels, 192, kernel_size=1)
        self.branch3x3_2 = Unit(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = Unit(in_channels, 192, kernel_size=1)
        self.branch7x7x3_2 = Unit(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, kernel_size=3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the concatenation of 1x1 -> 3x3/2 | 1x1 -> 1x7 -> 7x1 -> 3x3/2 | max pool/2."""
        three = self.branch3x3_2(self.branch3x3_1(maps))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(maps)))
        return torch.cat((three, self.branch7x7x3_4(seven), functional.max_pool2d(maps, 3, stride=2)), dim=1)


class InceptionE(nn.Module):
    """Block E: (B, in_channels, H, W) -> (B, 320 + 2 * 384 + 2 * 384 + 192, H, W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(in_channels, 320, kernel_size=1)
        self.branch3x3_1 = Unit(in_channels, 384, kernel_size=1)
        self.branch3x3_2a = Unit(384, 384, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, kernel_size=(3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(in_channels, 448, kernel_size=1)
        self.branch3x3dbl_2 = Unit(448, 384, kernel_size=3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, kernel_size=(3, 1), padding=(1, 0))
        self.branch_pool = Unit(in_channels, 192, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the concatenation of 1x1 | 1x1 -> 1x3 and 3x1 | 1x1 -> 3x3 -> 1x3 and 3x1 | mean pool -> 1x1."""
        three = self.branch3x3_1(maps)
        threes = self.branch3x3dbl_2(self.branch3x3dbl_1(maps))
        branches = (
            self.branch1x1(maps),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(threes),
            self.branch3x3dbl_3b(threes),
            self.branch_pool(mean_pool(maps)),
        )
        return torch.cat(branches, dim=1)


class AuxiliaryHead(nn.Module):
    """Small classifier on intermediate maps: (B, in_channels, H, W) -> logits (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = Unit(in_channels, 128, kernel_size=1)
        self.conv1 = Unit(128, 768, kernel_size=5)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of maps (B, in_channels, H, W)."""
        # From 17 pixels: windows of 5, stride 3. For fewer pixels: the windows that leave the 5 pixels conv1 needs.
        strides = [min(3, side // 5) for side in maps.shape[2:]]
        windows = [min(5, side - 4 * stride) for side, stride in zip(maps.shape[2:], strides, strict=True)]
        maps = functional.avg_pool2d(maps, windows, strides)  # (B, in_channels, 5, 5)
        maps = self.conv1(self.conv0(maps))  # (B, 768, 1, 1)
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))  # more than one pixel only for images of 347 pixels or more
        return logits


class Unit(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)
        self.relu = activation("relu")

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, out_channels, h, w) for maps (B, in_channels, H, W)."""
        output: Tensor = self.relu(self.bn(self.conv(maps)))
        return output


def mean_pool(maps: Tensor) -> Tensor:
    """Return the mean over 3x3 pixels, zero padding included, (B, C, H, W), for maps (B, C, H, W)."""
    return functional.avg_pool2d(maps, 3, stride=1, padding=1)


def _truncated_normal(layer: nn.Conv2d | nn.Linear, *, deviation: float = 0.1) -> None:
    """Fill the weights from a normal distribution truncated at two standard deviations, as in the authors' code."""
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
