"""The embedded digits and torchvision's official data sets: each function returns a Collection.

    digits                  1,797 digits of 8 x 8, embedded here (UCI Optical Recognition of Handwritten Digits,
                            Alpaydin and Kaynak, 1998, CC BY 4.0; the subset in scikit-learn, in its order)
    mnist, fashion_mnist    60,000 + 10,000 of 28 x 28 grey (LeCun et al., 1998; Xiao et al., 2017)
    kmnist                  60,000 + 10,000 of 28 x 28 grey, cursive Japanese (Clanuwat et al., 2018)
    cifar10, cifar100       50,000 + 10,000 of 32 x 32 RGB (Krizhevsky, 2009)
    svhn                    73,257 + 26,032 of 32 x 32 RGB, house numbers (Netzer et al., 2011)

torchvision downloads and reads the official archives. It is imported only for these: the import takes seconds.
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
    """Return the embedded digits. They have no official test split: a fixed, stratified fifth of them is held out."""
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
    """Return CIFAR-100 with its 100 fine labels."""
    return _official("CIFAR100", root=root, folder="cifar-100-python", files=CIFAR100_FILES, download=download)


def svhn(*, root: str, download: bool) -> Collection:
    """Return the cropped digits, without the easier `extra` ones, from ROOT/svhn.

    torchvision would put the files in ROOT itself. It reads them with SciPy, which scikit-learn installs.
    """
    folder, splits = str(Path(root) / "svhn"), ({"split": "train"}, {"split": "test"})
    return _official("SVHN", root=folder, folder=".", files=SVHN_FILES, download=download, splits=splits)


def _official(
    name: str,
    *,
    root: str,
    folder: str,
    files: tuple[str, ...],
    download: bool,
    splits: tuple[dict[str, Any], ...] = ({"train": True}, {"train": False}),
) -> Collection:
    """Return one of torchvision's data sets; it is downloaded first if it is missing and `download` is true.

    `splits` are its arguments for the training and the test split. Raises DataError.
    """
    base = Path(root).expanduser()
    target = base / folder
    existing = next(path for path in (base, *base.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise DataError(str(existing), "is not a folder; set data.root")
    missing = [file for file in files if not (target / file).is_file()]
    if missing and not download:
        explanation = f"lacks {', '.join(missing)}; put {name} there, set data.root, or set data.download=true"
        raise DataError(str(target), explanation)

    from torchvision import datasets

    source = getattr(datasets, name)
    if missing:
        _download(source, splits, base=base, target=target, existing=existing)
    try:
        datasets_read = [source(root=base, **split) for split in splits]
        train_images, test_images = map(_images, datasets_read)
    except Exception as error:  # torchvision raises many kinds of exceptions for a damaged file
        explanation = f"contains damaged files ({error or type(error).__name__}); remove it and set data.download=true"
        raise DataError(str(target), explanation) from error
    names = list(getattr(datasets_read[0], "classes", DIGIT_NAMES))
    return Collection(train=train_images, val=None, test=test_images, class_names=names)


def _images(dataset: Any) -> Images:
    """Return the images of a torchvision data set: (N, H, W) of MNIST, (N, H, W, 3) of CIFAR, (N, 3, H, W) of SVHN."""
    pixels = torch.as_tensor(dataset.data)
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return Images(pixels=pixels.contiguous(), labels=torch.as_tensor(labels))


def _download(source: Any, splits: Iterable[dict[str, Any]], *, base: Path, target: Path, existing: Path) -> None:
    """Download into a hidden folder and move the files out when all are complete: a failure leaves no files."""
    if hasattr(source, "split_list"):  # SVHN, by split: address, file, digest
        archives = [tuple(source.split_list[split["split"]][1:]) for split in splits]
    else:
        archives = getattr(source, "resources", None) or [(source.filename, source.tgz_md5)]
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=existing) as hidden:
            fresh = Path(hidden) / target.relative_to(base)
            for archive, digest in archives:
                _reuse(archive, digest=digest, base=base, target=target, hidden=Path(hidden), fresh=fresh)
            # torchvision prints progress to standard output, which belongs to the caller.
            with contextlib.redirect_stdout(sys.stderr):
                for split in splits:
                    source(root=hidden, **split, download=True)
            target.mkdir(parents=True, exist_ok=True)
            for file in fresh.iterdir():
                if file.is_file() and file.suffix not in (".gz", ".tar"):
                    file.replace(target / file.name)
    except DataError:
        raise
    except Exception as error:  # no network, no permission, a wrong digest, a full disk, ...
        reason = "the digest of the downloaded file does not match" if "corrupted" in str(error) else str(error).strip()
        explanation = f"cannot be downloaded ({reason}); put the files there, or set data.root to where they are"
        raise DataError(str(target), explanation) from error


def _reuse(archive: str, *, digest: str, base: Path, target: Path, hidden: Path, fresh: Path) -> None:
    """Copy an archive that exists already, if its digest is right. Raises DataError if it is damaged."""
    from torchvision.datasets.utils import check_integrity

    for old, new in {base / archive: hidden / archive, target / archive: fresh / archive}.items():
        if not old.is_file():
            continue
        if not check_integrity(old, digest):
            raise DataError(str(old), f"is damaged: its digest does not match {digest}; remove it and try again")
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old, new)
