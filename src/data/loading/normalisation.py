"""From pixels to the network's input; what is fitted is fitted to the training part alone.

    none         x / 255
    per_channel  (x / 255 - mean) / std            a mean and a standard deviation for each channel
    zca          W (x / 255 - mean)                W = (S + epsilon I)^-1/2 = U (L + epsilon I)^-1/2 U^T
    pca          W (x / 255 - mean)                W =                            (L + epsilon I)^-1/2 U^T

For whitening x is a whole image, D = C H W numbers, S = U L U^T its covariance (D, D), eigenvalues L from the largest
to the smallest. Both make the numbers uncorrelated, each of variance l / (l + epsilon): what varies less than epsilon,
mostly noise, is not blown up. Among all such W the one of `zca` leaves images nearest to what they were, so that
neighbours stay neighbours. `pca` has the components in the pixels' place: for networks without convolutions.

The fit is exact: sums of whole numbers, divided once at the end, and an eigendecomposition in double precision. It is
to images as they are; augmentation comes before normalisation, and does not change it.

Sources: LeCun et al., Efficient BackProp (1998), section 4.3; Krizhevsky, Learning Multiple Layers of Features from
Tiny Images (2009), appendix A; Coates, Lee and Ng, An Analysis of Single-Layer Networks (2011), section 3.1. Their code
adds an epsilon of 0.1 to pixels of variance 1; on the scale 0 to 1 that of CIFAR-10 is 0.06, which makes it about 0.01.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from core.errors import ConfigError

WHITENING = ("pca", "zca")
KINDS = ("none", "per_channel", *WHITENING)
CHUNK = 1024  # images that are taken up at a time
VALUES = 2**22  # numbers that are widened to 64 bits at a time
LARGEST = 4096  # numbers of an image to whiten: its matrix has their square, 64 MiB in each checkpoint
CPU = torch.device("cpu")


class Normalisation:
    """Images of the scale 0 to 255, uint8 or float (B, C, H, W), to the float32 input of a network.

    `tensors` says it all: mean and std (C,), or mean (D,) and whitening (D, D), on the scale 0 to 1, on the CPU.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, device: torch.device = CPU, channels_last: bool = False
    ) -> None:
        self.device = device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.tensors = dict(tensors)
        self.whitens = "whitening" in tensors
        mean = tensors["mean"].double()
        if self.whitens:
            self.shift = (255 * mean).float().to(self.device)  # (D,)
            self.matrix = (tensors["whitening"] / 255).T.contiguous().to(self.device)  # (D, D), from the right
        else:
            std = tensors["std"].double()
            self.scale = (1 / (255 * std)).float().to(self.device)[:, None, None]  # (C, 1, 1)
            self.bias = (-mean / std).float().to(self.device)[:, None, None]

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Normalisation":
        """The same on a device, with results in this memory format."""
        return Normalisation(self.tensors, device=device, channels_last=channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        if self.whitens:
            ready = (images.flatten(1) - self.shift) @ self.matrix  # (B, D)
            ready = ready.view(images.shape)
        else:
            # Of uint8 as floats first: a product of two types takes 1.4 times as long on a CPU.
            scaled = images * self.scale if images.is_floating_point() else images.float().mul_(self.scale)
            ready = scaled.add_(self.bias)
        return ready.contiguous(memory_format=self.memory_format)


def fit_normalisation(
    images: Iterable[Tensor], *, kind: str, epsilon: float, shape: tuple[int, int, int]
) -> Normalisation:
    """A normalisation of images (C, H, W) of this shape, fitted to uint8 chunks (N, C, H, W)."""
    if kind not in KINDS:
        raise ConfigError("normalise", f"must be one of {', '.join(KINDS)}", value=kind)
    if kind == "none":
        return Normalisation({"mean": torch.zeros(shape[0]), "std": torch.ones(shape[0])})
    if kind == "per_channel":
        mean, std = statistics(images)
        return Normalisation({"mean": mean, "std": std})
    numbers = math.prod(shape)
    if numbers > LARGEST:
        explanation = (
            f"an image of {' x '.join(map(str, shape))} has {numbers:,} numbers, which takes a matrix of their square:"
            f" must be at most {LARGEST:,}; use per_channel, or a smaller data.image_size"
        )
        raise ConfigError("normalise", explanation, value=kind)
    if epsilon <= 0:
        raise ConfigError("whitening_epsilon", "must be > 0", value=epsilon)
    count, sums, products = _sums(chunk.flatten(1) for chunk in images)
    scale = 255.0 * count
    spread = (count * products - torch.outer(sums, sums)) / scale**2  # (D, D)
    matrix = whitening(spread, kind=kind, epsilon=epsilon)
    return Normalisation({"mean": (sums / scale).float(), "whitening": matrix.float()})


def whitening(covariance: Tensor, *, kind: str, epsilon: float) -> Tensor:
    """W (D, D) of `pca` or `zca`, for a covariance (D, D) in double precision."""
    values, vectors = torch.linalg.eigh(covariance)  # from the smallest eigenvalue; U's columns
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # An eigenvector's sign means nothing, and is left to chance: make its largest entry positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, D)
    vectors = vectors * largest.sign()
    scaled: Tensor = vectors * (values + epsilon).rsqrt()  # (D, D): U (L + epsilon I)^-1/2
    if kind == "pca":
        return scaled.T
    matrix = scaled @ vectors.T
    symmetric: Tensor = (matrix + matrix.T) / 2  # it is, but for the last bit
    return symmetric


def statistics(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,), on the scale 0 to 1, over all images of uint8 chunks (N, C, H, W)."""
    count, sums, spread = _colours(images)
    mean = torch.tensor([total / (255 * count) for total in sums], dtype=torch.float32)
    std = torch.tensor([math.sqrt(row[i]) / (255 * count) for i, row in enumerate(spread)], dtype=torch.float32)
    return mean, torch.where(std > 0, std, 1.0)  # a channel without contrast is only shifted


def exact_mean(images: Iterable[Tensor], *, per_pixel: bool) -> Tensor:
    """Return the `mean` that `fit_normalisation` finds for uint8 chunks (N, C, H, W), bit-identical: float32 (C,).

    With `per_pixel`, the one of whitening: (D,). Only whole numbers are summed: much faster than a fit.
    """
    count, sums = 0, torch.zeros((), dtype=torch.int64)
    for chunk in images:
        for piece in chunk.split(max(1, VALUES // chunk[0].numel())):
            count += len(piece)
            sums = sums + piece.sum(0, dtype=torch.int64)  # (C, H, W)
    if per_pixel:
        return (sums.flatten().double() / (255.0 * count)).float()
    pixels = count * sums[0].numel()
    return torch.tensor([int(total) / (255 * pixels) for total in sums.flatten(1).sum(1)], dtype=torch.float32)


def is_unfitted(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are the tensors of the kind `none`."""
    return "std" in tensors and not tensors["mean"].any() and bool((tensors["std"] == 1).all())


def covariance(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of the colours, on the scale 0 to 1, in double precision, over all pixels of
    uint8 chunks (N, C, H, W)."""
    count, sums, spread = _colours(images)
    mean = torch.tensor([total / (255 * count) for total in sums], dtype=torch.float64)
    return mean, torch.tensor([[value / (255 * count) ** 2 for value in row] for row in spread], dtype=torch.float64)


def _colours(images: Iterable[Tensor]) -> tuple[int, list[int], list[list[int]]]:
    """Of n pixels (C,) with values x: n, sum(x), and n sum(x x^T) - sum(x) sum(x)^T."""
    pixels = (piece.movedim(1, -1).flatten(0, -2) for chunk in images for piece in chunk.split(CHUNK))  # (N H W, C)
    count, totals, products = _sums(pixels)
    # Python's integers do not overflow: the difference is exact, and cancels nothing.
    sums = [int(total) for total in totals]
    squares = [[int(product) for product in row] for row in products]
    spread = [[count * squares[i][j] - sums[i] * sums[j] for j in range(len(sums))] for i in range(len(sums))]
    return count, sums, spread


def _sums(vectors: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Of n uint8 vectors x of (N, D): n, sum(x) (D,) and sum(x x^T) (D, D), exact in double precision."""
    count, sums, products = 0, torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for chunk in vectors:
        for piece in chunk.split(max(1, VALUES // chunk.shape[1])):
            wide = piece.double()  # whole numbers: below 2^53 their sums are the same in any order
            count += len(wide)
            sums = sums + wide.sum(0)
            products = torch.addmm(products, wide.T, wide)
    return count, sums, products
