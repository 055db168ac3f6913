"""The embedded digits and torchvision's official data sets: each function returns a Collection.

    digits                  1,797 digits of 8 x 8, embedded here (UCI Optical Recognition of Handwritten Digits,
                            Alpaydin and Kaynak, 1998, CC BY 4.0; the part that scikit-learn carries, in its order)
    mnist, fashion_mnist    60,000 + 10,000 of 28 x 28 grey (LeCun et al., 1998; Xiao et al., 2017)
    kmnist                  the same of cursive Japanese (Clanuwat et al., 2018)
    cifar10, cifar100       50,000 + 10,000 of 32 x 32 RGB (Krizhevsky, 2009)
    svhn                    73,257 + 26,032 of 32 x 32 RGB, house numbers (Netzer et al., 2011)

torchvision downloads and reads the official archives. It is imported only there: the import takes seconds.
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import DataError
from data.sources.collection import Collection, with_test
from data.sources.images import Images

DIGITS = Path(__file__).with_name("digits.npz")  # pixels uint8 (1797, 8, 8), 0 to 16; labels uint8 (1797,)
DIGITS_TEST_FRACTION = 0.2
DIGIT_NAMES = [str(label) for label in range(10)]

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
CIFAR100_FILES = ("train", "test", "meta")
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


def digits() -> Collection:
    """The embedded digits. They have no official test set: a fixed, stratified fifth of them serves as one."""
    with np.load(DIGITS, allow_pickle=False) as file:
        levels, labels = torch.from_numpy(file["pixels"]), torch.from_numpy(file["labels"]).long()
    pixels = (levels * (255 / 16)).round().to(torch.uint8)[:, None]  # (N, 1, 8, 8)
    return with_test(Images(pixels=pixels, labels=labels), fraction=DIGITS_TEST_FRACTION, class_names=DIGIT_NAMES)


def mnist(*, root: str, download: bool) -> Collection:
    return _official("MNIST", root=root, folder="MNIST/raw", files=IDX_FILES, download=download)


def fashion_mnist(*, root: str, download: bool) -> Collection:
    return _official("FashionMNIST", root=root, folder="FashionMNIST/raw", files=IDX_FILES, download=download)


def kmnist(*, root: str, download: bool) -> Collection:
    return _official("KMNIST", root=root, folder="KMNIST/raw", files=IDX_FILES, download=download)


def cifar10(*, root: str, download: bool) -> Collection:
    return _official("CIFAR10", root=root, folder="cifar-10-batches-py", files=CIFAR10_FILES, download=download)


def cifar100(*, root: str, download: bool) -> Collection:
    """With its 100 fine labels."""
    return _official("CIFAR100", root=root, folder="cifar-100-python", files=CIFAR100_FILES, download=download)


def svhn(*, root: str, download: bool) -> Collection:
    """The cropped digits, without the easier `extra` ones. torchvision reads MATLAB's files with SciPy, which
    scikit-learn installs; and it would put them in ROOT itself, beside the files of other data sets."""
    place, parts = str(Path(root) / "svhn"), ({"split": "train"}, {"split": "test"})
    return _official("SVHN", root=place, folder=".", files=SVHN_FILES, download=download, parts=parts)


def _official(
    name: str,
    *,
    root: str,
    folder: str,
    files: tuple[str, ...],
    download: bool,
    parts: tuple[dict[str, Any], ...] = ({"train": True}, {"train": False}),
) -> Collection:
    """One of torchvision's data sets, downloaded first where it is missing and that is allowed.

    `parts` are its arguments for the training and the test part.
    """
    base = Path(root).expanduser()
    place = base / folder
    above = next(path for path in (base, *base.absolute().parents) if path.exists())
    if not above.is_dir():
        raise DataError(str(above), "is not a folder; set data.root")
    missing = [file for file in files if not (place / file).is_file()]
    if missing and not download:
        explanation = f"lacks {', '.join(missing)}; put {name} there, set data.root, or set data.download=true"
        raise DataError(str(place), explanation)

    from torchvision import datasets

    source = getattr(datasets, name)
    if missing:
        _download(source, parts, base=base, place=place, above=above)
    try:
        found = [source(root=base, **part) for part in parts]
        train_images, test_images = (_images(part) for part in found)
    except Exception as error:  # torchvision raises nearly anything for a damaged file, assertions too
        explanation = f"holds damaged files ({error or type(error).__name__}); remove it and set data.download=true"
        raise DataError(str(place), explanation) from error
    names = list(getattr(found[0], "classes", DIGIT_NAMES))
    return Collection(train=train_images, val=None, test=test_images, class_names=names)


def _images(part: Any) -> Images:
    """What torchvision has read: (N, H, W) of MNIST and its like, (N, H, W, 3) of CIFAR, (N, 3, H, W) of SVHN."""
    pixels = torch.as_tensor(part.data)
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return Images(pixels=pixels.contiguous(), labels=torch.as_tensor(labels))


def _download(source: Any, parts: Iterable[dict[str, Any]], *, base: Path, place: Path, above: Path) -> None:
    """Download into a hidden folder that only a complete data set leaves, so that a failure leaves nothing behind."""
    if hasattr(source, "split_list"):  # of SVHN, by part: address, file, digest
        archives = [tuple(source.split_list[part["split"]][1:]) for part in parts]
    else:
        archives = getattr(source, "resources", None) or [(source.filename, source.tgz_md5)]
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=above) as hidden:
            fresh = Path(hidden) / place.relative_to(base)
            for archive, digest in archives:
                _reuse(archive, digest=digest, base=base, place=place, hidden=Path(hidden), fresh=fresh)
            # Whatever torchvision prints is progress; standard output belongs to the caller.
            with contextlib.redirect_stdout(sys.stderr):
                for part in parts:
                    source(root=hidden, **part, download=True)
            place.mkdir(parents=True, exist_ok=True)
            for file in fresh.iterdir():
                if file.is_file() and file.suffix not in (".gz", ".tar"):
                    file.replace(place / file.name)
    except DataError:
        raise
    except Exception as error:  # no network, no permission, a wrong digest, a full disk, ...
        reason = "the digest of what came does not match" if "corrupted" in str(error) else str(error).strip()
        explanation = f"cannot be downloaded ({reason}); put the files there, or set data.root to where they are"
        raise DataError(str(place), explanation) from error


def _reuse(archive: str, *, digest: str, base: Path, place: Path, hidden: Path, fresh: Path) -> None:
    """Use an archive that exists already, if its digest is right."""
    from torchvision.datasets.utils import check_integrity

    for old, new in {base / archive: hidden / archive, place / archive: fresh / archive}.items():
        if not old.is_file():
            continue
        if not check_integrity(old, digest):
            raise DataError(str(old), f"is damaged: its digest does not match {digest}; remove it and try again")
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old, new)
