"""Data sets, decoding, splits and statistics, compared with independent readers and values computed by hand."""

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import built, trained
from PIL import Image

from analysis.evaluate import evaluate_run
from analysis.predict import predict_images
from core.config import Config
from core.errors import ConfigError, DataError
from data.sources import datasets, splits
from data.sources.collection import Collection
from data.sources.decode import decode
from data.sources.image_folder import image_folder
from data.sources.images import Files, Images
from data.sources.stratification import split, stratified
from data.sources.synthetic import synthetic
from trainer.inference.load_run import load_run


def prepare(collection: Collection, **changes: object) -> splits.Splits:
    settings = {
        "seed": 0,
        "val_fraction": 0.1,
        "image_size": 8,
        "channels": 1,
        "fit": "resize",
        "limit_train": None,
        "num_classes": None,
        "memory_budget": 1.0,
    }
    return splits.prepare(collection, **(settings | changes))


def distinct_images(sizes: list[int], channels: int = 1, size: int = 8) -> Collection:
    """Return a collection whose images all differ, so that the pixels identify an image."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (len(labels), channels, size, size), generator=generator, dtype=torch.uint8)
    return Collection(Images(pixels, labels), None, None, [f"class {label}" for label in range(len(sizes))])


def encoded_images(pixels: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in pixels]


# ---------------------------------------------------------------------------------------------------------- digits


def test_digits_equal_those_of_scikit_learn():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    reference = sklearn_datasets.load_digits()
    collection = datasets.digits()
    pixels = torch.cat([collection.train.pixels, collection.test.pixels])
    expected = np.rint(reference.images * 255 / 16).astype(np.uint8)
    pairs = sorted(zip(encoded_images(pixels), torch.cat([collection.train.labels, collection.test.labels]).tolist()))
    assert pairs == sorted((image.tobytes(), int(label)) for image, label in zip(expected, reference.target))
    assert pixels.max() == 255


def test_digits_test_split_is_a_stratified_fifth_for_every_seed():
    collection = datasets.digits()
    assert (len(collection.train), len(collection.test)) == (1438, 359)
    # Class sizes 178 182 177 183 181 182 181 179 174 180, times 359 / 1797: 35.560 36.360 35.361 36.559 36.160 36.360
    # 36.160 35.761 34.761 35.960. Rounded down, these sum to 354; classes 9, 7, 8, 0 and 3 get one more each.
    assert collection.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    first, second = prepare(collection, seed=1), prepare(collection, seed=2)
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert not torch.equal(first.val.labels, second.val.labels) or not torch.equal(first.val.pixels, second.val.pixels)


# ----------------------------------------------------------------------------------------- the official collections


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(folder: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    written = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        written[f"{prefix}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28))
        written[f"{prefix}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in written.items():
        write_idx(folder / name, array)
    return written


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_idx_files_in_the_official_layout_are_read(tmp_path, name, folder):
    written = write_mnist(tmp_path / folder / "raw")
    collection = getattr(datasets, name)(root=str(tmp_path), download=True)
    for images, prefix in ((collection.train, "train"), (collection.test, "t10k")):
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert np.array_equal(images.pixels.numpy()[:, 0], written[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(images.labels.numpy(), written[f"{prefix}-labels-idx1-ubyte"])
    assert len(collection.class_names) == 10 and collection.val is None


# Folder, training files, test files, key of the labels; file with the class names, its key, number of classes.
CIFAR = {
    "cifar10": (
        *("cifar-10-batches-py", [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]),
        *("labels", "batches.meta", "label_names", 10),
    ),
    "cifar100": ("cifar-100-python", ["train"], ["test"], "fine_labels", "meta", "fine_label_names", 100),
}


def write_cifar(root: Path, name: str, patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write small files in the official format, patch the expected digests, and return the planes by file."""
    from torchvision import datasets as official

    folder, train, test, key, meta, names_key, classes = CIFAR[name]
    (root / folder).mkdir()
    random = np.random.default_rng(2)
    planes = {}
    for file in (*train, *test):
        planes[file] = random.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
        labels = {key: list(range(classes)) * 2, "coarse_labels": [0] * classes * 2}
        (root / folder / file).write_bytes(pickle.dumps({"data": planes[file], **labels}))
    names = {names_key: [f"name {label}" for label in range(classes)], "coarse_label_names": ["none"]}
    (root / folder / meta).write_bytes(pickle.dumps(names))

    def with_digests(files: list[str]) -> list[list[str]]:
        return [[file, hashlib.md5((root / folder / file).read_bytes()).hexdigest()] for file in files]

    source = getattr(official, name.upper())
    patch.setattr(source, "train_list", with_digests(train))
    patch.setattr(source, "test_list", with_digests(test))
    patch.setitem(source.meta, "md5", with_digests([meta])[0][1])
    return planes


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_batches_in_the_official_layout_are_read(tmp_path, name):
    folder, train, test, *_, classes = CIFAR[name]
    read = getattr(datasets, name)
    with pytest.MonkeyPatch.context() as patch:
        planes = write_cifar(tmp_path, name, patch)
        collection = read(root=str(tmp_path), download=False)
        for images, files in ((collection.train, train), (collection.test, test)):
            assert np.array_equal(
                images.pixels.numpy(), np.concatenate([planes[file] for file in files]).reshape(-1, 3, 32, 32)
            )
            assert images.labels.tolist() == list(range(classes)) * 2 * len(files)
        assert collection.class_names == [f"name {label}" for label in range(classes)] and collection.val is None
    with pytest.raises(DataError, match="damaged") as caught:  # with the official digests
        read(root=str(tmp_path), download=False)
    assert caught.value.subject == str(tmp_path / folder)
    (tmp_path / folder / test[0]).unlink()
    with pytest.raises(DataError, match=f"lacks {test[0]}; .*data.download=true"):
        read(root=str(tmp_path), download=False)


def write_svhn(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write small MATLAB files, patch the expected digests, and return the pixels (N, H, W, C) by split."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    folder.mkdir()
    random = np.random.default_rng(3)
    written = {
        split_name: random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        for split_name, count in SVHN_SIZES.items()
    }
    split_list = {}
    for split_name, pixels in written.items():
        file = folder / f"{split_name}_32x32.mat"
        labels = np.arange(len(pixels))[:, None] % 10 + 1  # 1 to 10; 10 means the digit 0
        savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels.astype(np.uint8)})
        split_list[split_name] = [file.as_uri(), file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    patch.setattr(SVHN, "split_list", split_list)
    return written


SVHN_SIZES = {"train": 30, "test": 20}


def test_svhn_files_in_the_official_format_are_read(tmp_path, monkeypatch):
    written = write_svhn(tmp_path / "svhn", monkeypatch)
    collection = datasets.svhn(root=str(tmp_path), download=False)
    for split_name in SVHN_SIZES:
        images = getattr(collection, split_name)
        assert images.pixels.dtype == torch.uint8 and images.pixels.is_contiguous()
        assert np.array_equal(images.pixels.numpy(), written[split_name].transpose(0, 3, 1, 2))
        assert images.labels.tolist() == [(label + 1) % 10 for label in range(len(images))]
    assert collection.class_names == list("0123456789") and collection.val is None
    file = tmp_path / "svhn/test_32x32.mat"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged") as caught:
        datasets.svhn(root=str(tmp_path), download=True)
    assert caught.value.subject == str(tmp_path / "svhn")


@pytest.fixture
def server_url(tmp_path) -> Iterator[str]:
    """Yield the address of a local web server for the files in tmp_path."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_svhn_download_is_atomic(tmp_path, monkeypatch, capsys, server_url):
    from torchvision.datasets import SVHN

    written = write_svhn(tmp_path / "served", monkeypatch)
    for split_name, address in (("train", f"{server_url}/served/train_32x32.mat"), ("test", f"{server_url}/nowhere")):
        monkeypatch.setitem(SVHN.split_list, split_name, [address, *SVHN.split_list[split_name][1:]])
    with pytest.raises(DataError, match="cannot be downloaded.*404.*data.root") as caught:
        datasets.svhn(root=str(tmp_path / "root"), download=True)
    assert caught.value.subject == str(tmp_path / "root/svhn")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    # The file that exists is verified and used; the address of the other one works.
    (tmp_path / "root/svhn").mkdir(parents=True)
    content = (tmp_path / "served/test_32x32.mat").read_bytes()
    (tmp_path / "root/svhn/test_32x32.mat").write_bytes(content[:-1])
    with pytest.raises(DataError, match="digest does not match") as caught:
        datasets.svhn(root=str(tmp_path / "root"), download=True)
    assert caught.value.subject == str(tmp_path / "root/svhn/test_32x32.mat")
    (tmp_path / "root/svhn/test_32x32.mat").write_bytes(content)
    collection = datasets.svhn(root=str(tmp_path / "root"), download=True)
    assert np.array_equal(collection.train.pixels.numpy(), written["train"].transpose(0, 3, 1, 2))
    assert sorted(path.name for path in (tmp_path / "root/svhn").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["svhn"]
    assert capsys.readouterr().out == ""


def test_missing_files_without_download_are_named(tmp_path):
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.*data.root.*data.download=true") as caught:
        datasets.mnist(root=str(tmp_path / "nowhere"), download=False)
    assert caught.value.subject == str(tmp_path / "nowhere/MNIST/raw")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        datasets.mnist(root=str(tmp_path / "file"), download=True)
    with pytest.raises(DataError, match="is not a folder") as caught:
        datasets.svhn(root=str(tmp_path / "file"), download=True)
    assert caught.value.subject == str(tmp_path / "file")


@pytest.mark.parametrize("trouble", [OSError("no network"), RuntimeError("File not found or corrupted.")])
def test_failed_download_leaves_no_files(tmp_path, monkeypatch, capsys, trouble):
    from torchvision.datasets import MNIST

    def fail(self):
        Path(self.raw_folder).mkdir(parents=True)
        Path(self.raw_folder, "train-images-idx3-ubyte.gz").write_bytes(b"half")
        print("downloading")
        raise trouble

    monkeypatch.setattr(MNIST, "download", fail)
    message = "digest" if "corrupted" in str(trouble) else "no network"
    with pytest.raises(DataError, match=f"{message}.*data.root"):
        datasets.mnist(root=str(tmp_path / "new/root"), download=True)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_download_moves_the_files_into_the_root_folder(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    written = {}
    monkeypatch.setattr(MNIST, "download", lambda self: written.update(write_mnist(Path(self.raw_folder))))
    collection = datasets.mnist(root=str(tmp_path / "new"), download=True)
    assert np.array_equal(collection.train.pixels.numpy()[:, 0], written["train-images-idx3-ubyte"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sorted(path.name for path in (tmp_path / "new/MNIST/raw").iterdir()) == sorted(written)


def test_existing_archives_are_verified_and_used(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    write_mnist(tmp_path / "original")
    raw = tmp_path / "root/MNIST/raw"
    raw.mkdir(parents=True)
    resources = []
    for file in sorted((tmp_path / "original").iterdir()):
        packed = gzip.compress(file.read_bytes())
        (raw / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", ["file:///nowhere/"])
    broken = raw / "train-images-idx3-ubyte.gz"
    content = broken.read_bytes()
    broken.write_bytes(content[:-5])
    with pytest.raises(DataError, match="digest does not match") as caught:
        datasets.mnist(root=str(tmp_path / "root"), download=True)
    assert caught.value.subject == str(broken)
    assert not (raw / "train-images-idx3-ubyte").exists()
    broken.write_bytes(content)
    assert len(datasets.mnist(root=str(tmp_path / "root"), download=True).train) == 30


def test_truncated_idx_file_is_a_data_error(tmp_path):
    write_mnist(tmp_path / "MNIST/raw")
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="damaged"):
        datasets.mnist(root=str(tmp_path), download=True)


# ------------------------------------------------------------------------------------------------- folders of images


def write_folder(base: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (base / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (9, 7), (number, 50, 100)).save(base / name / f"{number:02}.png")


def folder(root: Path, **changes: object) -> Collection:
    settings = {"image_size": 6, "channels": 3, "test_fraction": 0.2, "empty_class": "error"}
    return image_folder(root=str(root), **(settings | changes))


def test_plain_class_folders_get_a_test_split(tmp_path):
    write_folder(tmp_path, {"dog": 10, "cat": 20})
    (tmp_path / "cat/deeper").mkdir()
    (tmp_path / "cat/00.png").rename(tmp_path / "cat/deeper/a.PNG")
    (tmp_path / "cat/notes.txt").write_text("not an image")
    (tmp_path / "cat/._01.png").write_text("a file that macOS creates")
    collection = folder(tmp_path)
    assert collection.class_names == ["cat", "dog"] and collection.val is None
    assert collection.train.labels.bincount().tolist() == [16, 8]
    assert collection.test.labels.bincount().tolist() == [4, 2]
    both = [*collection.train.pixels.paths, *collection.test.pixels.paths]
    assert sorted(both) == sorted([*tmp_path.rglob("[0-9]*.png"), tmp_path / "cat/deeper/a.PNG"])
    assert list(collection.train.pixels.paths) == sorted(collection.train.pixels.paths)
    for path, label in zip(collection.train.pixels.paths, collection.train.labels.tolist()):
        assert path.relative_to(tmp_path).parts[0] == collection.class_names[label]
    assert list(folder(tmp_path).test.pixels.paths) == list(collection.test.pixels.paths)
    assert folder(tmp_path, test_fraction=0).test is None


def test_train_val_and_test_folders_are_used_as_splits(tmp_path):
    write_folder(tmp_path / "train", {"a": 5, "b": 5})
    collection = folder(tmp_path)
    assert (len(collection.train), collection.val, collection.test) == (10, None, None)
    write_folder(tmp_path / "val", {"a": 2, "b": 3})
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    collection = folder(tmp_path)
    assert [len(collection.train), len(collection.val), len(collection.test)] == [10, 5, 2]
    prepared = prepare(collection, image_size=6, channels=3, val_fraction=0.5)
    assert [len(prepared.train), len(prepared.val), len(prepared.test)] == [10, 5, 2]


def test_invalid_folder_layouts_are_refused(tmp_path):
    for root, message in ((tmp_path / "none", "does not exist"), (tmp_path, "no class folders")):
        with pytest.raises(DataError, match=f"{message}.*ROOT/cat/1.jpg.*data.root") as caught:
            folder(root)
        assert caught.value.subject == str(root)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        folder(tmp_path / "file")
    write_folder(tmp_path / "one", {"only": 3})
    with pytest.raises(DataError, match="one class only, only"):
        folder(tmp_path / "one")
    write_folder(tmp_path / "two/val", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="has val but no train"):
        folder(tmp_path / "two")
    write_folder(tmp_path / "three/train", {"a": 1, "b": 1})
    write_folder(tmp_path / "three/val", {"a": 1, "c": 1})
    with pytest.raises(DataError, match="lacks b and also has c") as caught:
        folder(tmp_path / "three")
    assert caught.value.subject == str(tmp_path / "three/val")
    with pytest.raises(ConfigError, match="empty_class = maybe: must be error or keep"):
        folder(tmp_path, empty_class="maybe")
    with pytest.raises(ConfigError, match="test_fraction"):
        folder(tmp_path, test_fraction=1.0)


def test_empty_class_folder_is_refused_or_kept(tmp_path):
    write_folder(tmp_path, {"a": 4, "b": 0, "c": 4})
    with pytest.raises(DataError, match="no images for b .*data.empty_class=keep"):
        folder(tmp_path)
    collection = folder(tmp_path, empty_class="keep", test_fraction=0.25)
    assert collection.class_names == ["a", "b", "c"]
    assert collection.train.labels.bincount().tolist() == [3, 0, 3]
    write_folder(tmp_path / "all", {"a": 0, "b": 0})
    with pytest.raises(DataError, match="no images for a, b"):
        folder(tmp_path / "all", empty_class="keep")


# ------------------------------------------------------------------------------------------------- runs on these data


@pytest.mark.parametrize("name", ["kmnist", "cifar100", "svhn", "imagenet"])
def test_evaluation_and_prediction_need_only_the_run_folder(tmp_path, monkeypatch, capsys, name):
    root = tmp_path / "data"
    root.mkdir()
    overrides = [f"data={name}", f"data.root={root}", "data.batch_size=8", "data.val_fraction=0.5"]
    if name == "kmnist":
        write_mnist(root / "KMNIST/raw")
    elif name == "cifar100":
        write_cifar(root, name, monkeypatch)
    elif name == "svhn":
        write_svhn(root / "svhn", monkeypatch)
    else:
        for split_name in ("train", "val"):
            write_folder(root / split_name, {"n01440764": 9, "n01443537": 9})
        with pytest.raises(ConfigError, match="data.num_classes = 1000: the data has 2 classes"):
            built(tmp_path / "run", *overrides)
        overrides += ["data.num_classes=2", "data.image_size=6", "data.num_workers=1", "data.memory_budget=0"]
    run = trained(tmp_path / "run", *overrides, "trainer.max_epochs=1")
    loaded = load_run(tmp_path / "run")
    assert loaded.class_names == run.state.data["class_names"]

    # The source images, through the run's transform, equal the images that the trainer passed to the model.
    if name == "imagenet":
        split, images, [batch] = "val", folder(root).val, run.training.val_loader
        encoded_images = images.pixels.paths
    else:
        split, images, [batch] = (
            "test",
            getattr(datasets, name)(root=str(root), download=False).test,
            run.training.test_loader,
        )
        encoded_images = images.pixels
    assert torch.equal(torch.stack([loaded.transform(image) for image in encoded_images]), batch.images)
    with torch.inference_mode():
        probabilities = loaded.model(batch.images).softmax(1)

    shared = {"run": str(tmp_path / "run"), "checkpoint": "best", "device": "cpu", "trust": []}
    call(evaluate_run, shared | {"split": split, "root": None, "tta": None, "output": None})
    accuracy = (probabilities.argmax(1) == images.labels).float().mean().item()
    assert f"{len(images)} samples: accuracy {accuracy:.4f}" in capsys.readouterr().out

    (tmp_path / "images").mkdir()
    for number, image in enumerate(encoded_images[:3]):
        pixels = decode(image, image_size=None, channels=3) if isinstance(image, Path) else image
        Image.fromarray(pixels.permute(1, 2, 0).numpy().squeeze()).save(tmp_path / f"images/{number}.png")
    call(predict_images, shared | {"input": str(tmp_path / "images"), "output": str(tmp_path / "out")} | BATCHES)
    rows = [line.split(",") for line in (tmp_path / "out").read_text().splitlines()]
    assert rows[0][3:] == loaded.class_names
    written = torch.tensor([[float(value) for value in row[3:]] for row in rows[1:]])
    torch.testing.assert_close(written, probabilities[:3], rtol=0, atol=2e-6)  # six digits are written


BATCHES = {"batch_size": 2, "on_bad_image": "error"}


def call(command: Callable[[Config], None], values: dict[str, object]) -> None:
    """Call a script's function with a config that has these values."""
    command(Config(values, record={}, job=None))


# ------------------------------------------------------------------------------------------------------------ decoding

LUMA = (299 * 200 + 587 * 100 + 114 * 50 + 500) // 1000  # grey value of (200, 100, 50) by ITU-R 601: 124


def palette() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def transparent_palette() -> Image.Image:
    image = palette()
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "colour", "grey"),
    [
        (lambda: Image.new("L", (4, 4), 77), "png", (77, 77, 77), 77),
        (lambda: Image.new("1", (4, 4), 1), "png", (255, 255, 255), 255),
        (lambda: Image.new("RGB", (4, 4), (200, 100, 50)), "png", (200, 100, 50), LUMA),
        (lambda: Image.new("RGB", (4, 4), (200, 100, 50)), "bmp", (200, 100, 50), LUMA),
        (lambda: Image.new("LA", (4, 4), (100, 51)), "png", (224, 224, 224), 224),  # 255 + (100 - 255) / 5
        (lambda: Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "png", (255, 255, 255), 255),
        (lambda: Image.new("RGBA", (4, 4), (200, 100, 50, 51)), "png", (244, 224, 214), None),
        (palette, "png", (200, 100, 50), LUMA),
        (palette, "gif", (200, 100, 50), LUMA),
        (transparent_palette, "png", (255, 255, 255), 255),
        (lambda: Image.new("CMYK", (4, 4), (55, 155, 205, 0)), "tif", (200, 100, 50), LUMA),
        (lambda: Image.fromarray(np.full((4, 4), 65535, np.uint16)), "png", (255, 255, 255), 255),
        (lambda: Image.fromarray(np.full((4, 4), 257 * 93, np.uint16)), "png", (93, 93, 93), 93),
        (lambda: Image.fromarray(np.full((4, 4), 257 * 93 + 129, np.uint16)), "png", (94, 94, 94), 94),
        (lambda: Image.fromarray(np.full((4, 4), 257 * 93, np.int32)), "tif", (93, 93, 93), 93),
    ],
)
def test_each_image_mode_decodes_to_golden_pixels(tmp_path, image, suffix, colour, grey):
    path = tmp_path / f"image.{suffix}"
    image().save(path)
    pixels = decode(path, image_size=4, channels=3)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.uint8
    assert (pixels == torch.tensor(colour)[:, None, None]).all(), pixels[:, 0, 0]
    pixels = decode(path, image_size=4, channels=1)
    assert pixels.shape == (1, 4, 4)
    assert grey is None or (pixels == grey).all(), pixels[0, 0, 0]


def test_decode_applies_orientation_crop_and_size(tmp_path):
    ramp = np.zeros((4, 8, 3), np.uint8)
    ramp[:, :, 0] = np.arange(8) * 10  # red grows to the right
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", image_size=4, channels=3)[0, 0].tolist() == [20, 30, 40, 50]  # the centre
    assert decode(tmp_path / "wide.png", image_size=2, channels=3)[0, 0].tolist() == [25, 45]  # (10+3*20+3*30+40)/8
    exif = Image.Exif()
    exif[0x0112] = 6  # portrait photo: rotate by 90 degrees clockwise
    Image.fromarray(ramp).save(tmp_path / "rotated.png", exif=exif)
    rotated = decode(tmp_path / "rotated.png", image_size=4, channels=3)
    assert rotated[0, :, 0].tolist() == [20, 30, 40, 50] and rotated[0, 0].tolist() == [20] * 4
    Image.new("L", (1, 1), 9).save(tmp_path / "dot.png")
    assert (decode(tmp_path / "dot.png", image_size=5, channels=1) == 9).all()


def test_damaged_and_foreign_files_are_data_errors(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "whole.jpg")
    contents = {
        "truncated.jpg": (tmp_path / "whole.jpg").read_bytes()[:1000],
        "empty.png": b"",
        "text.jpg": b"<html>not found</html>",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            decode(tmp_path / name, image_size=4, channels=3)
        assert caught.value.subject == str(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="No such file"):
        decode(tmp_path / "gone.png", image_size=4, channels=3)
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match="70000.*0 to 65535"):
        decode(tmp_path / "deep.tif", image_size=4, channels=3)


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("sizes", "count", "spare", "expected"),
    [
        ([50, 30, 20], 10, 1, [5, 3, 2]),
        ([7, 7, 6], 9, 1, [3, 3, 3]),  # 3.15 3.15 2.7
        ([1, 1, 98], 3, 1, [0, 0, 3]),  # 0.03 0.03 2.94
        ([1, 3], 3, 1, [0, 2]),  # 0.75 2.25: spare=1 keeps the only sample of a class
        ([1, 3], 3, 0, [1, 2]),
        ([4, 0, 4], 2, 1, [1, 0, 1]),
    ],
)
def test_stratified_counts_follow_largest_remainders(sizes, count, spare, expected):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).flip(0)
    rows = stratified(labels, count=count, seed=3, spare=spare)
    assert labels[rows].bincount(minlength=len(sizes)).tolist() == expected
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_equal_remainders_are_distributed_by_the_seed():
    """1,200 classes of 3 images and a fifth for a split: 720 classes get one image, from the whole alphabet."""
    labels = torch.arange(1200).repeat_interleave(3)
    chosen = [labels[stratified(labels, count=720, seed=seed, spare=1)] for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    for classes in (chosen[0], chosen[2]):
        assert len(classes.unique()) == 720
        first_half = int((classes < 600).sum())  # hypergeometric: mean 360, standard deviation 8.5
        assert abs(first_half - 360) < 5 * 8.5


def test_classes_that_a_split_lacks_are_reported(caplog):
    prepare(distinct_images([40, 30, 30, 1, 1]), val_fraction=0.2)
    (record,) = caplog.records
    assert record.getMessage() == "the val split has no images of 2 of 5 classes: class 3, class 4"


def test_stratified_choice_is_uniform_within_a_class():
    labels = torch.arange(20) % 2
    counts = torch.zeros(20)
    for seed in range(500):
        counts[stratified(labels, count=4, seed=seed, spare=1)] += 1
    assert counts.sum() == 2000
    assert (counts - 100).abs().max() < 5 * (500 * 0.2 * 0.8) ** 0.5  # binomial: 5 standard deviations


def test_splits_are_disjoint_and_complete():
    collection = distinct_images([40, 30, 30])
    prepared = prepare(collection, val_fraction=0.2)
    assert prepared.val.labels.bincount().tolist() == [8, 6, 6]
    assert len(set(encoded_images(prepared.train.pixels)) & set(encoded_images(prepared.val.pixels))) == 0
    assert sorted(encoded_images(prepared.train.pixels) + encoded_images(prepared.val.pixels)) == sorted(
        encoded_images(collection.train.pixels)
    )
    label_of = dict(zip(encoded_images(collection.train.pixels), collection.train.labels.tolist()))
    assert [label_of[image] for image in encoded_images(prepared.val.pixels)] == prepared.val.labels.tolist()
    assert torch.equal(prepare(collection, val_fraction=0.2).val.pixels, prepared.val.pixels)
    assert not torch.equal(prepare(collection, val_fraction=0.2, seed=1).val.pixels, prepared.val.pixels)


def test_limit_train_and_limit_eval_do_not_change_other_splits():
    collection = distinct_images([40, 30, 30])
    full, limited = prepare(collection), prepare(collection, limit_train=9)
    limited_eval = prepare(collection, limit_eval=3)
    assert (len(limited_eval.train), len(limited_eval.val)) == (len(full.train), 3)
    assert limited.train.labels.bincount().tolist() == [3, 3, 3]  # of 36 27 27: 3.6 2.7 2.7, the last two rounded up
    assert torch.equal(full.val.pixels, limited.val.pixels)
    assert set(encoded_images(limited.train.pixels)) <= set(encoded_images(full.train.pixels))
    assert len(prepare(collection, limit_train=1000).train) == 90


def test_channel_conversion_equals_pillow():
    collection = distinct_images([30, 30], channels=3)
    prepared = prepare(collection, val_fraction=0)
    for actual, image in zip(prepared.train.pixels, collection.train.pixels):
        reference = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
        assert np.array_equal(actual[0].numpy(), np.asarray(reference))
    grey = distinct_images([5, 5])
    assert torch.equal(prepare(grey, channels=3, val_fraction=0).train.pixels, grey.train.pixels.repeat(1, 3, 1, 1))


def test_resizing_equals_pillow_within_one_level():
    collection = distinct_images([6, 6], size=8)
    for size in (5, 8, 20):
        prepared = prepare(collection, image_size=size, val_fraction=0)
        for actual, image in zip(prepared.train.pixels, collection.train.pixels):
            reference = Image.fromarray(image[0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
            assert np.abs(actual[0].numpy().astype(int) - np.asarray(reference)).max() <= 1  # Pillow rounds twice
    padded = prepare(collection, image_size=11, fit="pad", val_fraction=0).train.pixels
    assert torch.equal(padded[:, :, 1:9, 1:9], collection.train.pixels)
    assert padded.sum(dtype=torch.int64) == collection.train.pixels.sum(dtype=torch.int64)
    with pytest.raises(ConfigError, match="image_size = 7: must be >= 8"):
        prepare(collection, image_size=7, fit="pad")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, -1, 1]), "are -1 to 1: must be within 0 to 1"),
        (torch.tensor([0, 1, 2, 1]), "are 0 to 2: must be within 0 to 1"),
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), "torch.float32: must be integers"),
        (torch.tensor([0, 1, 1]), "one per image, 4 in all"),
    ],
)
def test_invalid_labels_are_refused(labels, message):
    images = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), labels)
    valid = Images(images.pixels, torch.tensor([0, 1, 0, 1]))
    for split_name in ("train", "val", "test"):
        collection = {"train": valid, "val": None, "test": None} | {split_name: images}
        with pytest.raises(DataError, match=message) as caught:
            prepare(Collection(**collection, class_names=["a", "b"]))
        assert caught.value.subject == f"{split_name} labels"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 9),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("channels", 2),
        ("fit", "stretch"),
        ("limit_train", 0),
        ("limit_eval", 0),
        ("image_size", 0),
        ("normalise", "zac"),
    ],
)
def test_config_error_names_the_key_of_splitting(key, value):
    with pytest.raises(ConfigError) as caught:
        prepare(distinct_images([5, 5]), **{key: value})
    assert (caught.value.subject, caught.value.value) == (key, value)


def test_split_that_would_be_empty_is_refused():
    with pytest.raises(DataError, match="data.val_fraction = 0.1: leaves the val split empty: there are 2 images"):
        prepare(distinct_images([1, 1]))
    with pytest.raises(DataError, match="train data: is empty"):
        prepare(Collection(Images(torch.zeros(0, 1, 8, 8), torch.zeros(0).long()), None, None, ["a", "b"]))
    assert prepare(distinct_images([1, 1]), val_fraction=0).val is None
    train, val = split(distinct_images([2, 2]).train, fraction=0.9, seed=0, name="val")
    assert (len(train), len(val)) == (2, 2)


def test_memory_budget_decides_between_memory_and_streaming(tmp_path):
    write_folder(tmp_path, {"a": 10, "b": 10})
    collection = folder(tmp_path)
    in_memory = prepare(collection, image_size=6, channels=3, memory_budget=20 * 108 / 2**30)
    streamed = prepare(collection, image_size=6, channels=3, memory_budget=(20 * 108 - 1) / 2**30)
    assert isinstance(streamed.train.pixels, Files)
    assert torch.equal(
        in_memory.train.pixels, torch.stack([streamed.train.pixels[index] for index in range(len(in_memory.train))])
    )
    for name, tensor in in_memory.normalisation.tensors.items():
        assert torch.equal(tensor, streamed.normalisation.tensors[name])
    assert in_memory.fingerprint == streamed.fingerprint
    with pytest.raises(ConfigError, match="fit = pad"):
        prepare(collection, fit="pad")
    with pytest.raises(ConfigError, match="memory_budget = 0.0: the data at 64 pixels"):
        prepare(distinct_images([5, 5]), image_size=64, memory_budget=0.0)


def test_fingerprint_depends_only_on_the_data(tmp_path):
    write_folder(tmp_path, {"a": 10, "b": 10})
    original = prepare(folder(tmp_path)).fingerprint
    assert prepare(folder(tmp_path), seed=7, val_fraction=0.3, image_size=4).fingerprint == original
    tmp_path = tmp_path.rename(tmp_path.with_name("moved"))
    assert prepare(folder(tmp_path)).fingerprint == original
    (tmp_path / "a/00.png").rename(tmp_path / "a/99.png")
    renamed = prepare(folder(tmp_path)).fingerprint
    (tmp_path / "a/99.png").unlink()
    fewer = prepare(folder(tmp_path)).fingerprint
    assert len({original, renamed, fewer}) == 3


# ----------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_images_are_reproducible_and_separable():
    settings = {"train_samples": 600, "test_samples": 100, "noise": 0.2, "image_size": 16, "num_classes": 5}
    first, second = (synthetic(**settings, channels=3) for _ in range(2))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert first.train.pixels.shape == (600, 3, 16, 16) and first.train.pixels.dtype == torch.uint8
    assert first.train.labels.bincount().tolist() == [120] * 5
    assert not set(encoded_images(first.train.pixels)) & set(encoded_images(first.test.pixels))
    # The position of the patch determines the class: nearest mean of |pixel - 128| is far above chance (20%).
    train, test = ((images.pixels.float() - 128).abs().mean(1).flatten(1) for images in (first.train, first.test))
    means = torch.stack([train[first.train.labels == label].mean(0) for label in range(5)])
    accuracy = (torch.cdist(test, means).argmin(1) == first.test.labels).float().mean()
    assert accuracy > 0.8
    with pytest.raises(ConfigError, match="noise = -1"):
        synthetic(**settings | {"noise": -1}, channels=3)
    with pytest.raises(ConfigError, match="num_classes = null"):
        synthetic(**settings | {"num_classes": None}, channels=3)
