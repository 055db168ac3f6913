"""The user's own images, one folder per class. ImageNet too.

check the arguments -> find the splits and classes -> list each split's files -> open or create their caches
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from data.sources.collection import Collection, with_test
from data.sources.decode import MAX_PIXELS, SUFFIXES
from data.sources.images import Files, Images, with_cache

CACHE_NAME = ".preceptor"  # in the folder of the images; hidden, so that it is not taken for a class
FOLDER_LAYOUT = (
    "expected one folder for each class (ROOT/cat/1.jpg, ROOT/dog/1.jpg), or ROOT/train, ROOT/val and ROOT/test "
    "with one for each class in them (val and test may be left out); set data.root"
)


def image_folder(
    *,
    root: str,
    image_size: int,
    channels: int,
    test_fraction: float,
    empty_class: str,
    on_bad_image: str = "error",
    max_pixels: int = MAX_PIXELS,
    cache_dir: str | None = None,
    create_cache: bool = True,
    stored_size: int | None = None,
    limit_train: int | None = None,
) -> Collection:
    """Return the images of class folders, in sorted order, read from their cache (with `limit_train`: from the files).

    Without `create_cache`, which the config of a run folder implies, only a cache that exists is used.

    The training split is cached at `stored_size`, and at `image_size` too if other splits are taken from it.

    With ROOT/train, the splits are the folders that exist: no ROOT/test means no test split, and no ROOT/val means that
    `val_fraction` of train is held out. Without it, ROOT holds the classes, and `test_fraction` is held out for test.
    """
    _check(empty_class=empty_class, on_bad_image=on_bad_image, max_pixels=max_pixels, test_fraction=test_fraction)
    base = Path(root).expanduser()
    folders, class_names = _layout(base)
    splits: dict[str, tuple[Files, Tensor]] = {}
    for name, folder in folders.items():
        paths, labels = _labelled_paths(folder, class_names, empty_class=empty_class)
        files = Files(paths, image_size=image_size, channels=channels, on_bad_image=on_bad_image, max_pixels=max_pixels)
        splits[name] = files, labels
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


def image_files_in(folder: Path) -> list[Path]:
    """Return all image files below a folder except hidden ones, sorted by their path in it."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


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
    """Return the folder of each split and the class names. Without BASE/train, BASE itself is the training split's."""
    if not base.is_dir():
        reason = "is not a folder" if base.exists() else "does not exist"
        raise DataError(str(base), f"{reason}; {FOLDER_LAYOUT}")
    names = [name for name in ("train", "val", "test") if (base / name).is_dir()]
    folders = {name: base / name for name in names} if "train" in names else {"train": base}
    class_names = _class_names(folders["train"])
    if "train" not in names and set(class_names) <= {"val", "test"}:
        raise DataError(str(base), f"has {' and '.join(names) or 'no class folders'} but no train; {FOLDER_LAYOUT}")
    if len(class_names) < 2:
        raise DataError(str(folders["train"]), f"has one class only, {class_names[0]}; {FOLDER_LAYOUT}")
    return folders, class_names


def _labelled_paths(folder: Path, class_names: list[str], *, empty_class: str) -> tuple[list[Path], Tensor]:
    """Return the image files of a split's class folders, class after class, and their labels, int64 (N,)."""
    _same_classes(folder, expected=class_names, found=_class_names(folder))
    paths = [image_files_in(folder / name) for name in class_names]
    empty = [name for name, files in zip(class_names, paths, strict=True) if not files]
    if empty and (empty_class == "error" or len(empty) == len(class_names)):
        explanation = f"has no images for {', '.join(empty)} (looked for {' '.join(sorted(SUFFIXES))})"
        raise DataError(str(folder), f"{explanation}; fill or remove them, or set data.empty_class=keep")
    labels = torch.arange(len(class_names)).repeat_interleave(torch.tensor([len(files) for files in paths]))
    return [path for files in paths for path in files], labels


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(str(folder), f"has no class folders; {FOLDER_LAYOUT}")
    return names


def _same_classes(folder: Path, *, expected: list[str], found: list[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} besides"] * bool(extra)
        raise DataError(str(folder), f"{' and '.join(said)}: must have the same class folders as train")
