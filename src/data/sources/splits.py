"""From a collection to what is trained on: checked labels, a validation part, one picture size, statistics.

The validation part is drawn class by class (stratified), so that each class has its share of it; the share is a pure
function of the seed and of the labels. A collection that brings its own validation part keeps it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from core.errors import ConfigError, DataError
from core.seeding import fold
from data.loading.normalisation import CHUNK, VALUES, Normalisation, fit_normalisation
from data.sources.datasets import Collection
from data.sources.images import Files, Images
from data.sources.stratification import split, stratified

STREAMED_STATISTICS = 10_000  # pictures that stand for a training part that does not fit into memory


@dataclass(frozen=True)
class Splits:
    """What a run trains, validates and tests on."""

    train: Images  # of stored_size, where there is one
    val: Images | None  # of image_size
    test: Images | None
    class_names: list[str]
    normalisation: Normalisation  # from pixels to the network's input, fitted to the training part
    fingerprint: str  # of the data as it was found, before any split: another one means that the data has changed
    counts: dict[str, int]  # pictures of each part, likewise


def prepare(
    collection: Collection,
    *,
    seed: int,
    val_fraction: float,
    image_size: int,
    channels: int,
    fit: str,
    limit_train: int | None,
    limit_eval: int | None = None,
    num_classes: int | None,
    memory_budget: float,
    normalise: str = "per_channel",
    whitening_epsilon: float = 0.01,
    stored_size: int | None = None,
) -> Splits:
    """Check, split, convert and measure a collection."""
    _check(val_fraction=val_fraction, image_size=image_size, channels=channels, fit=fit)
    found = {"train": collection.train, "val": collection.val, "test": collection.test}
    for part, images in found.items():
        if images is not None:
            check_labels(images, part=part, num_classes=len(collection.class_names))
            check_pixels(images, part=part)
    if num_classes is not None and num_classes != len(collection.class_names):
        raise ConfigError("num_classes", f"the data has {len(collection.class_names)} classes", value=num_classes)

    train, val = collection.train, collection.val
    if val is None and val_fraction > 0:
        train, val = split(train, fraction=val_fraction, seed=fold(seed, "val"), part="val")
    limits = {"limit_train": limit_train, "limit_eval": limit_eval}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ConfigError(name, "must be >= 1, or null for all", value=limit)
    seen = (("train", train, limit_train), ("val", val, limit_eval), ("test", collection.test, limit_eval))
    parts = {part: _limited(images, limit, seed=seed) for part, images, limit in seen if images is not None}
    sizes = dict.fromkeys(parts, image_size) | {"train": stored_size or image_size}
    resident = _fits(parts, sizes=sizes, channels=channels, memory_budget=memory_budget)
    ready = {
        part: convert(images, image_size=sizes[part], channels=channels, fit=fit, load=resident)
        for part, images in parts.items()
    }
    normalisation = fit_normalisation(
        measured(ready["train"], image_size=image_size, seed=seed),
        kind=normalise,
        epsilon=whitening_epsilon,
        shape=(channels, image_size, image_size),
    )
    return Splits(
        train=ready["train"],
        val=ready.get("val"),
        test=ready.get("test"),
        class_names=collection.class_names,
        normalisation=normalisation,
        fingerprint=fingerprint(collection),
        counts={part: len(images) for part, images in found.items() if images is not None},
    )


def _limited(images: Images, limit: int | None, *, seed: int) -> Images:
    """A stratified part of so many pictures, or all of them."""
    if limit is None or limit >= len(images):
        return images
    return images.take(_stratified_part(images, count=limit, seed=fold(seed, "limit")))


def _check(*, val_fraction: float, image_size: int, channels: int, fit: str) -> None:
    if not 0 <= val_fraction < 1:
        raise ConfigError("val_fraction", "must be >= 0 and < 1", value=val_fraction)
    if image_size < 1:
        raise ConfigError("image_size", "must be >= 1", value=image_size)
    if channels not in (1, 3):
        raise ConfigError("channels", "must be 1 (grey) or 3 (RGB)", value=channels)
    if fit not in ("resize", "pad"):
        raise ConfigError("fit", "must be resize or pad", value=fit)


def _fits(parts: dict[str, Images], *, sizes: dict[str, int], channels: int, memory_budget: float) -> bool:
    """Whether all parts, at their sizes, may lie in memory. What lies there already may not outgrow it."""
    bytes_each = {part: channels * size**2 for part, size in sizes.items()}
    needed = sum(len(images) * bytes_each[part] for part, images in parts.items()) / 2**30
    grows = any(
        isinstance(images.pixels, Tensor) and images.pixels[0].numel() < bytes_each[part]
        for part, images in parts.items()
    )
    if needed > memory_budget and grows:
        explanation = (
            f"the data at {max(sizes.values())} pixels takes {needed:.2g} GiB; allow more, or shrink the pictures"
        )
        raise ConfigError("memory_budget", explanation, value=memory_budget)
    return needed <= memory_budget


def check_labels(images: Images, *, part: str, num_classes: int) -> None:
    """Refuse labels that are not one whole number, 0 to num_classes - 1, for each picture."""
    labels, count = images.labels, len(images.pixels)
    if labels.dim() != 1 or len(labels) != count:
        raise DataError(f"{part} labels", f"must be one for each of the {count} images", value=tuple(labels.shape))
    if count == 0:
        raise DataError(f"{part} data", "is empty: must have at least one image")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{part} labels", "must be whole numbers", value=labels.dtype)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{part} labels", f"go from {low} to {high}: must be within 0 to {num_classes - 1}")


def check_pixels(images: Images, *, part: str) -> None:
    """Refuse pixels in memory that are not uint8 (N, C, H, W)."""
    pixels, subject = images.pixels, f"{part} pixels"
    if isinstance(pixels, Files):
        return
    if pixels.is_floating_point() and not (finite := torch.isfinite(pixels).flatten(1).all(1)).all():
        index = int((~finite).nonzero()[0])
        raise DataError(subject, f"NaN or infinity in image {index}: must be torch.uint8, 0 to 255")
    if pixels.dtype != torch.uint8:
        raise DataError(subject, "must be torch.uint8, 0 to 255", value=pixels.dtype)
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise DataError(subject, "must be (N, C, H, W) with 1 or 3 channels", value=tuple(pixels.shape))


def convert(images: Images, *, image_size: int, channels: int, fit: str, load: bool) -> Images:
    """The images with the channels and the size that the network is to see."""
    if isinstance(images.pixels, Files):
        if fit != "resize":
            raise ConfigError("fit", "must be resize for picture files", value=fit)
        files = Images(replace(images.pixels, image_size=image_size, channels=channels), images.labels)
        return Images(files.load(), images.labels) if load else files
    if images.pixels.shape[1:] == (channels, image_size, image_size):
        return images
    chunks = [
        resize(recolour(chunk, channels=channels), image_size=image_size, fit=fit)
        for chunk in images.pixels.split(CHUNK)
    ]
    return Images(pixels=torch.cat(chunks), labels=images.labels)


def recolour(pixels: Tensor, *, channels: int) -> Tensor:
    """uint8 (N, C, H, W) with 1 or 3 channels: grey is repeated, colour becomes ITU-R 601 luma, as Pillow rounds it."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def resize(pixels: Tensor, *, image_size: int, fit: str) -> Tensor:
    """uint8 (N, C, H, W) to (N, C, image_size, image_size): bilinear and antialiased, or centred on black."""
    height, width = pixels.shape[2:]
    if (height, width) == (image_size, image_size):
        return pixels
    if fit == "resize":
        size = (image_size, image_size)
        larger = functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        return larger.round().clamp(0, 255).to(torch.uint8)
    if image_size < max(height, width):
        explanation = f"must be >= {max(height, width)}, the size of the data, with fit: pad"
        raise ConfigError("image_size", explanation, value=image_size)
    left, top = (image_size - width) // 2, (image_size - height) // 2
    return functional.pad(pixels, (left, image_size - width - left, top, image_size - height - top))


def measured(train: Images, *, image_size: int, seed: int) -> Iterator[Tensor]:
    """The pictures to measure, as the network sees them in evaluation, at image_size: all of a part in memory, else
    those of a stratified subset, decoded piece by piece."""
    if isinstance(train.pixels, Tensor):
        pieces = iter([train.pixels])
    else:
        chosen = _stratified_part(train, count=STREAMED_STATISTICS, seed=fold(seed, "statistics"))
        pieces = (train.read(piece) for piece in chosen.split(CHUNK))
    for pixels in pieces:
        yield from _at_size(pixels, image_size)


def _at_size(pixels: Tensor, image_size: int) -> Iterator[Tensor]:
    """The same pictures (N, C, H, W), uint8, at the network's size: in one piece, or in several if they are resized."""
    if pixels.shape[2:] == (image_size, image_size):
        yield pixels
        return
    few = max(1, VALUES // pixels[0].numel())  # they are widened to floats
    yield from (resize(piece, image_size=image_size, fit="resize") for piece in pixels.split(few))


def sample(train: Images, *, count: int, image_size: int, seed: int) -> Tensor:
    """A stratified subset of so many pictures, or all, as the network sees them: uint8 (N, C, H, W)."""
    return torch.cat(list(_at_size(train.read(_stratified_part(train, count=count, seed=seed)), image_size)))


def _stratified_part(images: Images, *, count: int, seed: int) -> Tensor:
    return stratified(images.labels, count=min(len(images), count), seed=seed, spare=0)


def fingerprint(collection: Collection) -> str:
    """A hash of counts, class names, labels, picture shapes and file names; of no pixel, so that it is cheap."""
    digest = hashlib.blake2b(repr(collection.class_names).encode(), digest_size=16)
    for part, images in (("train", collection.train), ("val", collection.val), ("test", collection.test)):
        if images is None:
            continue
        if isinstance(images.pixels, Files):
            digest.update(repr((part, len(images), [path.name for path in images.pixels.paths])).encode())
        else:
            digest.update(repr((part, tuple(images.pixels.shape))).encode())
        digest.update(images.labels.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
