"""Normalisation: converts pixels to the model's input. Only the train split is used to fit it.

    none         x / 255
    per_channel  (x / 255 - mean) / std            mean and standard deviation of each channel
    zca          W (x / 255 - mean)                W = (S + epsilon I)^-1/2 = U (L + epsilon I)^-1/2 U^T
    pca          W (x / 255 - mean)                W =                            (L + epsilon I)^-1/2 U^T

`zca` and `pca` are whitening: x is a flattened image of D = C H W values, and S = U L U^T is the covariance (D, D) of
x / 255 with eigenvalues L in descending order. Whitening decorrelates the values. A component of variance l gets the
variance l / (l + epsilon), so components of a variance far below epsilon, mostly noise, are not amplified to 1.

Of all such W, that of `zca` changes the images least, so neighbouring pixels stay neighbours. `pca` replaces the pixels
by the components, so it suits only models without convolutions.

The fit sums integers, so the sums are exact, and divides them once at the end. The eigendecomposition uses float64. The
fit uses images without augmentation. During training, augmentation is applied before normalisation.

Sources: LeCun et al., Efficient BackProp (1998), section 4.3; Krizhevsky, Learning Multiple Layers of Features from
Tiny Images (2009), appendix A; Coates, Lee and Ng, An Analysis of Single-Layer Networks (2011), section 3.1. The code
of Coates et al. adds an epsilon of 0.1 to pixels of variance 1. CIFAR-10's variance is 0.06 on the scale 0 to 1, where
that epsilon is about 0.01.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from core.errors import ConfigError

WHITENING = ("pca", "zca")
KINDS = ("none", "per_channel", *WHITENING)
CHUNK = 1024  # images that are processed at a time
MAX_CONVERTED_VALUES = 2**22  # uint8 values that are converted to a wider type at a time: limits the memory
MAX_WHITENED_VALUES = 4096  # values of an image for whitening: 4096 x 4096 floats are 64 MiB in each checkpoint
CPU = torch.device("cpu")


class Normalisation:
    """Converts images on the scale 0 to 255, uint8 or float (B, C, H, W), to the model's input, float32.

    `tensors` defines it completely, and is what a checkpoint stores: {"mean": (C,), "std": (C,)}, or for whitening
    {"mean": (D,), "whitening": (D, D)}. They are float32 on the CPU, on the scale 0 to 1.
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
            self.matrix = (
                (tensors["whitening"] / 255).T.contiguous().to(self.device)
            )  # (D, D), W^T: multiplied from the right
        else:
            std = tensors["std"].double()
            self.scale = (1 / (255 * std)).float().to(self.device)[:, None, None]  # (C, 1, 1)
            self.bias = (-mean / std).float().to(self.device)[:, None, None]

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Normalisation":
        """Return a copy on a device; its results are channels-last in memory if `channels_last`."""
        return Normalisation(self.tensors, device=device, channels_last=channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 (B, C, H, W) for images (B, C, H, W) on the scale 0 to 255, on this device."""
        if self.whitens:
            normalised = (images.flatten(1) - self.shift) @ self.matrix  # (B, D)
            normalised = normalised.view(images.shape)
        else:
            # uint8 is converted first: a product of two dtypes takes 1.4 times as long on a CPU.
            scaled = images * self.scale if images.is_floating_point() else images.float().mul_(self.scale)
            normalised = scaled.add_(self.bias)
        return normalised.contiguous(memory_format=self.memory_format)


def fit_normalisation(
    images: Iterable[Tensor], *, kind: str, epsilon: float, shape: tuple[int, int, int]
) -> Normalisation:
    """Return a normalisation of a kind (of KINDS), fitted to uint8 chunks (N, C, H, W).

    `shape` is (C, H, W). `epsilon` is used by whitening only. Raises ConfigError for an unknown kind, for whitening of
    images with more than MAX_WHITENED_VALUES values, and for an epsilon that is not positive.
    """
    if kind not in KINDS:
        raise ConfigError("normalise", f"must be one of {', '.join(KINDS)}", value=kind)
    if kind == "none":
        return Normalisation({"mean": torch.zeros(shape[0]), "std": torch.ones(shape[0])})
    if kind == "per_channel":
        mean, std = statistics(images)
        return Normalisation({"mean": mean, "std": std})
    values_per_image = math.prod(shape)
    if values_per_image > MAX_WHITENED_VALUES:
        explanation = (
            f"an image of {' x '.join(map(str, shape))} has {values_per_image:,} values: must be at most"
            f" {MAX_WHITENED_VALUES:,} for whitening; set data.normalise=per_channel or a smaller data.image_size"
        )
        raise ConfigError("normalise", explanation, value=kind)
    if epsilon <= 0:
        raise ConfigError("whitening_epsilon", "must be > 0", value=epsilon)
    count, sums, products = _sums(chunk.flatten(1) for chunk in images)
    scale = 255.0 * count
    covariance_matrix = (count * products - torch.outer(sums, sums)) / scale**2  # (D, D)
    matrix = whitening(covariance_matrix, kind=kind, epsilon=epsilon)
    return Normalisation({"mean": (sums / scale).float(), "whitening": matrix.float()})


def whitening(covariance: Tensor, *, kind: str, epsilon: float) -> Tensor:
    """Return W, float64 (D, D), of `pca` or `zca` for a covariance, float64 (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)  # eigenvalues (D,), ascending; eigenvectors (D, D), in columns
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # The sign of an eigenvector is arbitrary, and can differ between machines: make its largest entry positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, D)
    vectors = vectors * largest.sign()
    scaled: Tensor = vectors * (values + epsilon).rsqrt()  # (D, D): U (L + epsilon I)^-1/2
    if kind == "pca":
        return scaled.T
    matrix = scaled @ vectors.T
    symmetric: Tensor = (matrix + matrix.T) / 2  # removes the asymmetry of rounding
    return symmetric


def statistics(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 chunks (N, C, H, W).

    Both are float32 (C,), on the scale 0 to 1. The standard deviation of a constant channel is replaced by 1, so that
    `per_channel` only shifts it.
    """
    count, sums, scaled_covariance = _colour_sums(images)
    mean = torch.tensor([total / (255 * count) for total in sums], dtype=torch.float32)
    std = torch.tensor(
        [math.sqrt(row[i]) / (255 * count) for i, row in enumerate(scaled_covariance)], dtype=torch.float32
    )
    return mean, torch.where(std > 0, std, 1.0)


def exact_mean(images: Iterable[Tensor], *, per_pixel: bool) -> Tensor:
    """Return the tensor `mean` of `fit_normalisation` for uint8 chunks (N, C, H, W), bit-identical.

    It is float32: (C,), or (D,) with `per_pixel`, as for whitening. Only integers are summed, which is much faster than
    a fit.
    """
    count, sums = 0, torch.zeros((), dtype=torch.int64)
    for chunk in images:
        for piece in chunk.split(max(1, MAX_CONVERTED_VALUES // chunk[0].numel())):
            count += len(piece)
            sums = sums + piece.sum(0, dtype=torch.int64)  # (C, H, W)
    if per_pixel:
        return (sums.flatten().double() / (255.0 * count)).float()
    pixels = count * sums[0].numel()
    return torch.tensor([int(total) / (255 * pixels) for total in sums.flatten(1).sum(1)], dtype=torch.float32)


def is_unfitted(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these tensors are those of the kind `none`: means 0 and standard deviations 1."""
    return "std" in tensors and not tensors["mean"].any() and bool((tensors["std"] == 1).all())


def covariance(images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and covariance (C, C) of the colours of all pixels in uint8 chunks (N, C, H, W).

    Both are float64, on the scale 0 to 1.
    """
    count, sums, scaled_covariance = _colour_sums(images)
    mean = torch.tensor([total / (255 * count) for total in sums], dtype=torch.float64)
    rows = [[value / (255 * count) ** 2 for value in row] for row in scaled_covariance]
    return mean, torch.tensor(rows, dtype=torch.float64)


def _colour_sums(images: Iterable[Tensor]) -> tuple[int, list[int], list[list[int]]]:
    """Return n, sum(x) and n sum(x x^T) - sum(x) sum(x)^T for n pixels x, (C,), of uint8 chunks (N, C, H, W).

    The last one is the covariance times n^2.
    """
    pixels = (piece.movedim(1, -1).flatten(0, -2) for chunk in images for piece in chunk.split(CHUNK))  # (N H W, C)
    count, totals, products = _sums(pixels)
    # The integers of Python do not overflow, so the difference of large products loses no digits.
    sums = [int(total) for total in totals]
    squares = [[int(product) for product in row] for row in products]
    channels = range(len(sums))
    return count, sums, [[count * squares[i][j] - sums[i] * sums[j] for j in channels] for i in channels]


def _sums(vectors: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Return n, sum(x), float64 (D,), and sum(x x^T), float64 (D, D), for n uint8 vectors x in chunks (N, D)."""
    count, sums, products = 0, torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for chunk in vectors:
        for piece in chunk.split(max(1, MAX_CONVERTED_VALUES // chunk.shape[1])):
            wide = piece.double()  # float64 sums of integers are exact below 2^53, in any order
            count += len(wide)
            sums = sums + wide.sum(0)
            products = torch.addmm(products, wide.T, wide)
    return count, sums, products
