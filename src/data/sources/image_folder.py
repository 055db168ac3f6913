"""Data set of image files with one folder per class, such as ImageNet or images of the user.

check the arguments -> find the splits and classes -> list the files of each split -> open or create their caches
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from data.sources.collection import Collection, with_test
from data.sources.decode import MAX_PIXELS, largest_16_bit_value
from data.sources.images import Files, Images, with_cache
from data.sources.listing import SUFFIXES, PackedPaths, Skipped, is_skipped_folder, pack_class_folders

SAMPLED_FILES = 16  # that are read for the warning about data.bits
CACHE_NAME = ".preceptor"  # in the folder of the images; hidden, so it is not a class
SPLIT_NAMES = {  # usual names of split folders, in lower case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FOLDER_LAYOUT = (
    "expected one folder for each class (ROOT/cat/1.jpg, ROOT/dog/1.jpg), or ROOT/train, ROOT/val and ROOT/test "
    "with one for each class in them (val and test may be left out); set data.root"
)
log = logging.getLogger("preceptor.data")


def image_folder(
    *,
    root: str,
    image_size: int,
    channels: int,
    test_fraction: float,
    empty_class: str,
    on_bad_image: str = "error",
    max_pixels: int = MAX_PIXELS,
    bits: int | None = None,
    cache_dir: str | None = None,
    create_cache: bool = True,
    stored_size: int | None = None,
    limit_train: int | None = None,
) -> Collection:
    """Return the images of class folders in sorted order, read from their cache; with `limit_train` from the files.

    If ROOT has a folder for the training split (`train` or `training`, in any case), its folders are the splits. The
    validation split is `val`, `valid`, `validation`, `dev` or `eval`, and the test split `test` or `testing`. Without
    a test folder there is no test split. Without a validation folder, `val_fraction` of the training split is held out.

    Otherwise the folders of ROOT are the classes, and `test_fraction` is held out for the test split.

    The training split is cached at `stored_size`, and also at `image_size` if other splits are taken from it. With
    `create_cache=False`, only an existing cache is used. Raises ConfigError or DataError.
    """
    _check(empty_class=empty_class, on_bad_image=on_bad_image, max_pixels=max_pixels, test_fraction=test_fraction)
    base, skipped = Path(root).expanduser(), Skipped()
    folders, class_names = _layout(base)
    splits: dict[str, tuple[Files, Tensor]] = {}
    for name, folder in folders.items():
        _check_classes(folder, expected=class_names)
        paths, counts = pack_class_folders(folder, class_names, skipped)
        _check_counts(folder, dict(zip(class_names, counts, strict=True)), empty_class=empty_class)
        decoding: dict[str, Any] = {"on_bad_image": on_bad_image, "max_pixels": max_pixels, "bits": bits}
        files = Files(paths, image_size=image_size, channels=channels, **decoding)
        splits[name] = files, torch.arange(len(class_names)).repeat_interleave(torch.tensor(counts))
    if skipped.counts:
        log.warning(f"{base}: {skipped}")
    if bits is None:
        _warn_of_few_bits(splits["train"][0].paths)
    if cache_dir is not None and limit_train is None:  # after all other checks
        cache = base / CACHE_NAME if cache_dir == "auto" else Path(cache_dir).expanduser()
        train_sizes = {stored_size or image_size} | (set() if "val" in splits else {image_size})
        for name, (files, labels) in splits.items():
            for size in sorted(train_sizes if name == "train" else {image_size}):
                files = with_cache(replace(files, image_size=size), cache, create=create_cache)
            splits[name] = files, labels
    images = {name: Images(files, labels) for name, (files, labels) in splits.items()}
    if folders["train"] != base:
        return Collection(images["train"], images.get("val"), images.get("test"), class_names)
    return with_test(images["train"], fraction=test_fraction, class_names=class_names)


def _warn_of_few_bits(paths: PackedPaths) -> None:
    """Log one warning if the first 16-bit files use a small part of their range, as 12-bit cameras and scanners do."""
    largest = [largest_16_bit_value(path) for path in paths[:SAMPLED_FILES]] if len(paths) else []
    values = [value for value in largest if value is not None]
    needed = max(8, max(values, default=2**16 - 1).bit_length())
    if needed < 15:
        file = paths[largest.index(values[0])]
        text = (
            f"{file}: stored in 16 bits, but the largest value in the first {len(values)} such files is {max(values):,}"
        )
        log.warning(
            f"{text}; the images are dark and have few grey levels; if all values have {needed} bits, set "
            f"data.bits={needed}, else data.bits=16"
        )


def labelled_files(root: Path, class_names: Sequence[str]) -> tuple[PackedPaths, Tensor]:
    """Return all image files of a folder with one folder per class, and their labels (N,): positions in `class_names`.

    A class may have no folder. Raises DataError for a folder that is not a class, and if there are no images.
    """
    if not root.is_dir():
        raise DataError(str(root), "is not a folder" if root.exists() else "does not exist")
    names, skipped = _folders_in(root), Skipped()
    if unknown := [name for name in names if name not in class_names]:
        explanation = f"has folders that are not classes of the run: {_first(unknown)}; its classes: "
        explanation += _first(list(class_names))
        if splits := [name for name in unknown if name.lower() in SPLIT_NAMES]:
            explanation += f"; to evaluate the folder of one split: root={root / splits[-1]}"
        raise DataError(str(root), explanation)
    paths, counts = pack_class_folders(root, names, skipped)
    if not len(paths):
        raise DataError(str(root), f"has no images in folders of the classes {_first(list(class_names))}")
    if skipped.counts:
        log.warning(f"{root}: {skipped}")
    positions = torch.tensor([list(class_names).index(name) for name in names])
    return paths, positions.repeat_interleave(torch.tensor(counts))


def _check(*, empty_class: str, on_bad_image: str, max_pixels: int, test_fraction: float) -> None:
    if empty_class not in ("error", "keep"):
        raise ConfigError("empty_class", "must be error or keep", value=empty_class)
    if on_bad_image not in ("error", "skip"):
        raise ConfigError("on_bad_image", "must be error or skip", value=on_bad_image)
    if max_pixels < 1:
        raise ConfigError("max_pixels", "must be >= 1", value=max_pixels)
    if not 0 <= test_fraction < 1:
        raise ConfigError("test_fraction", "must be >= 0 and < 1", value=test_fraction)


def _layout(base: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split and the class names. Without a training folder, BASE is the training split."""
    if not base.is_dir():
        reason = "is not a folder" if base.exists() else "does not exist"
        raise DataError(str(base), f"{reason}; {FOLDER_LAYOUT}")
    names = _folders_in(base)
    folders: dict[str, Path] = {}
    for name in names:
        if split := SPLIT_NAMES.get(name.lower()):
            if split in folders and any(SPLIT_NAMES.get(other.lower()) == "train" for other in names):
                explanation = f"has {folders[split].name} and {name}: both are names of the {split} split; remove one"
                raise DataError(str(base), explanation)
            folders[split] = base / name
    if "train" in folders:
        others = [name for name in names if name.lower() not in SPLIT_NAMES]
        if others:
            explanation = f"has {_first(others)} beside the split folder {folders['train'].name}: move or remove them"
            raise DataError(str(base), f"{explanation}; {FOLDER_LAYOUT}")
        folders = {split: folders[split] for split in ("train", "val", "test") if split in folders}
    elif set(names) <= {folder.name for folder in folders.values()}:
        found = " and ".join(folder.name for folder in folders.values()) or "no class folders"
        raise DataError(str(base), f"has {found} but no train; {FOLDER_LAYOUT}")
    else:
        folders = {"train": base}
    class_names = _class_names(folders["train"])
    if len(class_names) < 2:
        raise DataError(str(folders["train"]), f"has one class only, {class_names[0]}; {FOLDER_LAYOUT}")
    return folders, class_names


def _folders_in(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden and system folders."""
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if not is_skipped_folder(entry.name.encode(errors="surrogateescape")))


def _class_names(folder: Path) -> list[str]:
    names = _folders_in(folder)
    if not names:
        raise DataError(str(folder), f"has no class folders; {FOLDER_LAYOUT}")
    return names


def _check_classes(folder: Path, *, expected: list[str]) -> None:
    """Raise DataError if a split has other class folders than the training split."""
    names = _class_names(folder)
    missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or extra:
        reasons = [f"lacks {_first(missing)}"] * bool(missing) + [f"also has {_first(extra)}"] * bool(extra)
        raise DataError(str(folder), f"{' and '.join(reasons)}: must have the same class folders as train")


def _check_counts(folder: Path, counts: dict[str, int], *, empty_class: str) -> None:
    """Raise DataError if a class has no images, unless empty classes are allowed and not all are empty."""
    empty = [name for name, count in counts.items() if not count]
    if empty and (empty_class == "error" or len(empty) == len(counts)):
        explanation = f"has no images for {_first(empty)} (looked for {' '.join(sorted(SUFFIXES))})"
        raise DataError(str(folder), f"{explanation}; fill or remove them, or set data.empty_class=keep")


def _first(names: list[str], count: int = 20) -> str:
    """Return the first names as text, and how many more there are."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
