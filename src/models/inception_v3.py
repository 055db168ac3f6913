"""Inception v3: Inception blocks whose large filters are taken apart into several small ones, which cost less.

    A   35x35, figure 5    maps -+-> 1x1 --------------------------------+->      two 3x3 see as far as one 5x5
                                 +-> 1x1 -> 5x5 -------------------------+
                                 +-> 1x1 -> 3x3 -> 3x3 ------------------+
                                 +-> mean pool -> 1x1 -------------------+
    B   to 17x17, fig. 10  maps -+-> 3x3/2 ------------------------------+->      /2: stride 2
                                 +-> 1x1 -> 3x3 -> 3x3/2 ----------------+
                                 +-> max pool/2 -------------------------+
    C   17x17, figure 6    maps -+-> 1x1 --------------------------------+->      1x7 and 7x1 see as far as one 7x7
                                 +-> 1x1 -> 1x7 -> 7x1 ------------------+
                                 +-> 1x1 -> 7x1 -> 1x7 -> 7x1 -> 1x7 ----+
                                 +-> mean pool -> 1x1 -------------------+
    D   to 8x8             maps -+-> 1x1 -> 3x3/2 -----------------------+->
                                 +-> 1x1 -> 1x7 -> 7x1 -> 3x3/2 ---------+
                                 +-> max pool/2 -------------------------+
    E   8x8, figure 7      maps -+-> 1x1 --------------------------------+->      1x3 and 3x1 side by side, joined
                                 +-> 1x1 -> 1x3 | 3x1 -------------------+
                                 +-> 1x1 -> 3x3 -> 1x3 | 3x1 ------------+
                                 +-> mean pool -> 1x1 -------------------+

    image -> stem -> A A A -> B -> C C C C -> D -> E E -> mean over pixels -> dropout -> linear -> logits
                                            +-> auxiliary head, in training only

Each convolution is followed by batch norm (epsilon 0.001) and ReLU. In training mode a network with the auxiliary head
returns (logits, auxiliary logits), and the head's loss counts `auxiliary_weight` times; in evaluation mode it returns
the logits alone.

The paper's table 1 and text leave much open; where they differ from the authors' published code (the stem, the 5x5 in
A, D, the weight of the head's loss), this is the code's network, as everywhere else. Starting weights, too, are the
code's: `paper` is a normal distribution of deviation 0.1, cut at two deviations. Parameters have torchvision's names,
so its weights load as they are; those trained on ImageNet expect images standardised with mean and deviation 0.5.

Source: Szegedy, Vanhoucke, Ioffe, Shlens and Wojna 2015, Rethinking the Inception Architecture for Computer Vision:
table 1, section 3 (taking filters apart), section 4 and figure 8 (auxiliary head), section 5 (grids made smaller).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.blocks import activation, initialise, require_count, require_dropout, require_flag


class InceptionV3(nn.Module):
    """27,161,264 parameters at 3 channels and 1000 classes; 23,834,568 without the auxiliary head."""

    minimum_size = 75  # leaves one pixel behind D: 75 -> 37 -> 35 -> 17 -> 15 -> 7 -> 3 -> 1
    auxiliary_weight = 0.4  # of the auxiliary head's loss, as in the authors' code

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
            self.minimum_size = 107  # leaves the head its 5x5 pixels: 107 -> 53 -> 51 -> 25 -> 23 -> 11 -> 5

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
        if init == "paper" and self.AuxLogits is not None:  # it starts by saying almost nothing
            _truncated_normal(self.AuxLogits.conv1.conv, deviation=0.01)
            _truncated_normal(self.AuxLogits.fc, deviation=0.001)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the maps of the last block (B, 2048, h, w)."""
        return self._behind_6e(self._to_6e(images))

    def head(self, maps: Tensor) -> Tensor:
        """Maps (B, 2048, h, w) to logits (B, num_classes)."""
        logits: Tensor = self.fc(self.dropout(maps.mean(dim=(2, 3))))
        return logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to logits (B, num_classes); in training a pair with those of the auxiliary head."""
        maps = self._to_6e(images)
        logits = self.head(self._behind_6e(maps))
        return (logits, self.AuxLogits(maps)) if self.training and self.AuxLogits is not None else logits

    def _to_6e(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the maps that the auxiliary head looks at (B, 768, h, w)."""
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(maps)))
        maps = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(maps))))
        maps = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(maps))))
        output: Tensor = self.Mixed_6e(maps)
        return output

    def _behind_6e(self, maps: Tensor) -> Tensor:
        """Maps (B, 768, h, w) to those of the last block (B, 2048, (h - 1) / 2, (w - 1) / 2)."""
        output: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(maps)))
        return output


class InceptionA(nn.Module):
    """(B, in_channels, H, W) to (B, 64 + 64 + 96 + pooled, H, W)."""

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
        """1x1 | 1x1 -> 5x5 | 1x1 -> 3x3 -> 3x3 | mean pool -> 1x1"""
        five = self.branch5x5_2(self.branch5x5_1(maps))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(maps)))
        return torch.cat((self.branch1x1(maps), five, threes, self.branch_pool(mean_pool(maps))), dim=1)


class InceptionB(nn.Module):
    """(B, in_channels, H, W) to (B, 384 + 96 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(in_channels, 384, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = Unit(in_channels, 64, kernel_size=1)
        self.branch3x3dbl_2 = Unit(64, 96, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, kernel_size=3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        """3x3/2 | 1x1 -> 3x3 -> 3x3/2 | max pool/2"""
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(maps)))
        return torch.cat((self.branch3x3(maps), threes, functional.max_pool2d(maps, 3, stride=2)), dim=1)


class InceptionC(nn.Module):
    """(B, in_channels, H, W) to (B, 4 * 192, H, W); `width` channels inside the branches of 7 pixels."""

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
        """1x1 | 1x1 -> 1x7 -> 7x1 | 1x1 -> 7x1 -> 1x7 -> 7x1 -> 1x7 | mean pool -> 1x1"""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(maps)))
        sevens = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(maps)))
        sevens = self.branch7x7dbl_5(self.branch7x7dbl_4(sevens))
        return torch.cat((self.branch1x1(maps), seven, sevens, self.branch_pool(mean_pool(maps))), dim=1)


class InceptionD(nn.Module):
    """(B, in_channels, H, W) to (B, 320 + 192 + in_channels, (H - 1) / 2, (W - 1) / 2), rounded down."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(in_channels, 192, kernel_size=1)
        self.branch3x3_2 = Unit(192, 320, kernel_size=3, stride=2)
        self.branch7x7x3_1 = Unit(in_channels, 192, kernel_size=1)
        self.branch7x7x3_2 = Unit(192, 192, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, kernel_size=(7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, kernel_size=3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        """1x1 -> 3x3/2 | 1x1 -> 1x7 -> 7x1 -> 3x3/2 | max pool/2"""
        three = self.branch3x3_2(self.branch3x3_1(maps))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(maps)))
        return torch.cat((three, self.branch7x7x3_4(seven), functional.max_pool2d(maps, 3, stride=2)), dim=1)


class InceptionE(nn.Module):
    """(B, in_channels, H, W) to (B, 320 + 2 * 384 + 2 * 384 + 192, H, W)."""

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
        """1x1 | 1x1 -> 1x3 and 3x1 | 1x1 -> 3x3 -> 1x3 and 3x1 | mean pool -> 1x1"""
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
    """A small classifier on the maps in the middle: (B, in_channels, H, W) to logits (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = Unit(in_channels, 128, kernel_size=1)
        self.conv1 = Unit(128, 768, kernel_size=5)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes)."""
        # From 17 pixels on, windows of 5 in steps of 3; on fewer, whatever leaves the 5 pixels that conv1 needs.
        steps = [min(3, side // 5) for side in maps.shape[2:]]
        windows = [min(5, side - 4 * step) for side, step in zip(maps.shape[2:], steps, strict=True)]
        maps = functional.avg_pool2d(maps, windows, steps)  # (B, in_channels, 5, 5)
        maps = self.conv1(self.conv0(maps))  # (B, 768, 1, 1)
        logits: Tensor = self.fc(maps.mean(dim=(2, 3)))  # more than one pixel only in images of 347 and more
        return logits


class Unit(nn.Module):
    """A convolution, batch norm and ReLU."""

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
        """(B, in_channels, H, W) to (B, out_channels, h, w)."""
        output: Tensor = self.relu(self.bn(self.conv(maps)))
        return output


def mean_pool(maps: Tensor) -> Tensor:
    """The mean over 3x3 pixels, zeros around the edge counted in: (B, C, H, W) to (B, C, H, W)."""
    return functional.avg_pool2d(maps, 3, stride=1, padding=1)


def _truncated_normal(layer: nn.Conv2d | nn.Linear, *, deviation: float = 0.1) -> None:
    """A bell curve cut at two deviations, as the authors' code draws them all."""
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
