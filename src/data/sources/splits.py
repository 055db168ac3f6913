"""Splits of a collection: checked, with a validation split, of one image size, with a fitted normalisation.

The validation split is stratified, so each class has its share of it. It is a pure function of the seed and the labels.
A collection that has a validation split keeps it.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from core.options.declarations import SPLITS
from core.seeding import fold
from data.loading.normalisation import CHUNK, Normalisation, exact_mean, fit_normalisation, is_unfitted
from data.sources.collection import Collection
from data.sources.images import Files, Images
from data.sources.pixels import at_size, check_pixels, recolour, resize
from data.sources.stratification import split, stratified

STREAMED_STATISTICS = 10_000  # images that statistics are taken of if the training split is not in memory
log = logging.getLogger("preceptor.data")


@dataclass(frozen=True)
class Splits:
    """The splits of a run."""

    train: Images  # at stored_size, if it is set
    val: Images | None  # at image_size
    test: Images | None
    class_names: list[str]
    normalisation: Normalisation  # fitted to the training split
    fingerprint: str  # of the data before it was split; another one means that the data has changed
    counts: dict[str, int]  # images of each split of the source, likewise

    @property
    def by_name(self) -> dict[str, Images]:
        """Return the splits that exist, in the order train, val, test."""
        return {name: split for name in SPLITS if (split := getattr(self, name)) is not None}

    @property
    def class_counts(self) -> dict[str, list[int]]:
        """Return the number of images of each class, {split: K numbers}, of the splits that exist."""
        count = len(self.class_names)
        return {name: split.labels.bincount(minlength=count).tolist() for name, split in self.by_name.items()}


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
    normalisation: Normalisation | None = None,
) -> Splits:
    """Check, split and convert a collection, and fit its normalisation unless a fitted one is passed.

    Raises ConfigError or DataError.
    """
    _check(val_fraction=val_fraction, image_size=image_size, channels=channels, fit=fit)
    _check_collection(collection, num_classes=num_classes)
    splits = _split(collection, seed=seed, val_fraction=val_fraction, limit_train=limit_train, limit_eval=limit_eval)
    sizes = dict.fromkeys(splits, image_size) | {"train": stored_size or image_size}
    resident = _fits(splits, sizes=sizes, channels=channels, memory_budget=memory_budget)
    ready = {
        name: convert(images, image_size=sizes[name], channels=channels, fit=fit, load=resident)
        for name, images in splits.items()
    }
    if normalisation is None:
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
        counts={name: len(images) for name, images in _splits_of(collection).items()},
    )


def _splits_of(collection: Collection) -> dict[str, Images]:
    """Return the splits that a collection has."""
    splits = {"train": collection.train, "val": collection.val, "test": collection.test}
    return {name: images for name, images in splits.items() if images is not None}


def _check_collection(collection: Collection, *, num_classes: int | None) -> None:
    """Raise DataError for invalid labels or pixels, and ConfigError for another number of classes."""
    count = len(collection.class_names)
    for name, images in _splits_of(collection).items():
        check_labels(images, split=name, num_classes=count)
        if isinstance(images.pixels, Tensor):
            check_pixels(images.pixels, split=name)
    if num_classes is not None and num_classes != count:
        raise ConfigError("num_classes", f"the data has {count} classes", value=num_classes)


def _split(
    collection: Collection, *, seed: int, val_fraction: float, limit_train: int | None, limit_eval: int | None
) -> dict[str, Images]:
    """Return the splits by name: `val` is held out of train if it is missing, and each split is limited."""
    splits = _splits_of(collection)
    if "val" not in splits and val_fraction > 0:
        train, val = split(collection.train, fraction=val_fraction, seed=fold(seed, "val"), name="val")
        splits = {"train": train, "val": val, **{name: splits[name] for name in splits if name == "test"}}
    for name, images in splits.items():
        _warn_of_missing_classes(images, split=name, class_names=collection.class_names)
    for key, limit in {"limit_train": limit_train, "limit_eval": limit_eval}.items():
        if limit is not None and limit < 1:
            raise ConfigError(key, "must be >= 1, or null for all", value=limit)
    limits = dict.fromkeys(splits, limit_eval) | {"train": limit_train}
    return {name: _limited(images, limits[name], seed=seed) for name, images in splits.items()}


def _warn_of_missing_classes(images: Images, *, split: str, class_names: list[str]) -> None:
    """Log a warning if a split has no image of some classes: its metrics do not cover them."""
    missing = (images.labels.bincount(minlength=len(class_names)) == 0).nonzero().flatten().tolist()
    if missing:
        names = ", ".join(class_names[label] for label in missing[:10]) + ", ..." * (len(missing) > 10)
        log.warning(f"the {split} split has no images of {len(missing):,} of {len(class_names):,} classes: {names}")


def _limited(images: Images, limit: int | None, *, seed: int) -> Images:
    """Return a stratified subset of `limit` images, or all images."""
    if limit is None or limit >= len(images):
        return images
    return images.take(_stratified_subset(images, count=limit, seed=fold(seed, "limit")))


def _check(*, val_fraction: float, image_size: int, channels: int, fit: str) -> None:
    if not 0 <= val_fraction < 1:
        raise ConfigError("val_fraction", "must be >= 0 and < 1", value=val_fraction)
    if image_size < 1:
        raise ConfigError("image_size", "must be >= 1", value=image_size)
    if channels not in (1, 3):
        raise ConfigError("channels", "must be 1 (grey) or 3 (RGB)", value=channels)
    if fit not in ("resize", "pad"):
        raise ConfigError("fit", "must be resize or pad", value=fit)


def _fits(splits: dict[str, Images], *, sizes: dict[str, int], channels: int, memory_budget: float) -> bool:
    """Return whether all splits fit into the memory budget.

    Raises ConfigError if splits that are in memory already would have to grow beyond it.
    """
    bytes_per_image = {name: channels * size**2 for name, size in sizes.items()}
    needed = sum(len(images) * bytes_per_image[name] for name, images in splits.items()) / 2**30
    grows = any(
        isinstance(images.pixels, Tensor) and images.pixels[0].numel() < bytes_per_image[name]
        for name, images in splits.items()
    )
    if needed > memory_budget and grows:
        explanation = (
            f"the data at {max(sizes.values())} pixels takes {needed:.2g} GiB; allow more, or shrink the images"
        )
        raise ConfigError("memory_budget", explanation, value=memory_budget)
    return needed <= memory_budget


def check_labels(images: Images, *, split: str, num_classes: int) -> None:
    """Raise DataError unless the labels are integers from 0 to num_classes - 1, one per image."""
    labels, count = images.labels, len(images.pixels)
    if labels.dim() != 1 or len(labels) != count:
        raise DataError(f"{split} labels", f"must be one per image, {count} in all", value=tuple(labels.shape))
    if count == 0:
        raise DataError(f"{split} data", "is empty: must have at least one image")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{split} labels", "must be integers", value=labels.dtype)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{split} labels", f"are {low} to {high}: must be within 0 to {num_classes - 1}")


def convert(images: Images, *, image_size: int, channels: int, fit: str, load: bool) -> Images:
    """Return the images with these channels at this size. With `load`, files are read into memory."""
    if isinstance(images.pixels, Files):
        if fit != "resize":
            raise ConfigError("fit", "must be resize for image files", value=fit)
        files = Images(replace(images.pixels, image_size=image_size, channels=channels), images.labels)
        return Images(files.load(), images.labels) if load else files
    if images.pixels.shape[1:] == (channels, image_size, image_size):
        return images
    chunks = [
        resize(recolour(chunk, channels=channels), image_size=image_size, fit=fit)
        for chunk in images.pixels.split(CHUNK)
    ]
    return Images(pixels=torch.cat(chunks), labels=images.labels)


def measured(train: Images, *, image_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the images that statistics are taken of, chunk by chunk, as the model sees them in evaluation.

    These are all images of a split in memory, or else a stratified subset.
    """
    if isinstance(train.pixels, Tensor):
        chunks = iter([train.pixels])
    else:
        chosen = _stratified_subset(train, count=STREAMED_STATISTICS, seed=fold(seed, "statistics"))
        chunks = (train.read(rows) for rows in chosen.split(CHUNK))
    for pixels in chunks:
        yield from at_size(pixels, image_size)


def same_mean(train: Images, tensors: Mapping[str, Tensor], *, image_size: int) -> bool:
    """Return whether the training images have the mean of a fitted normalisation, bit-identical.

    Only sums are taken; nothing is fitted. Also True for data that is not in memory, and for `normalise: none`.
    """
    if not isinstance(train.pixels, Tensor) or is_unfitted(tensors):
        return True
    mean = exact_mean(at_size(train.pixels, image_size), per_pixel="whitening" in tensors)
    return torch.equal(mean, tensors["mean"])


def sample(train: Images, *, count: int, image_size: int, seed: int) -> Tensor:
    """Return a stratified subset of `count` images, or all images, at image_size: uint8 (N, C, H, W)."""
    return torch.cat(list(at_size(train.read(_stratified_subset(train, count=count, seed=seed)), image_size)))


def _stratified_subset(images: Images, *, count: int, seed: int) -> Tensor:
    return stratified(images.labels, count=min(len(images), count), seed=seed, spare=0)


def fingerprint(collection: Collection) -> str:
    """Return a hash of counts, class names, labels, image shapes and file names; pixels are left out to save time."""
    digest = hashlib.blake2b(repr(collection.class_names).encode(), digest_size=16)
    for name, images in _splits_of(collection).items():
        if isinstance(images.pixels, Files):
            digest.update(repr((name, len(images))).encode())
            images.pixels.paths.update(digest)
        else:
            digest.update(repr((name, tuple(images.pixels.shape))).encode())
        digest.update(images.labels.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def largest_share(labels: Tensor) -> float:
    """Return the share of the most frequent of the labels (N,)."""
    return labels.bincount().max().item() / len(labels)
