"""data.stored_size: images are stored larger than the model input, and random crops of them are resized.

Crops have the detail of torchvision's crops of the originals. Runs are bit-identical for any loading. Evaluation is
unchanged.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import built, composed, last_state, reopened, run_to_end, stop_after, trained
from PIL import Image
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import functional as reference

from analysis import look
from analysis.evaluate import evaluate_run
from core.config import Config
from core.errors import ConfigError, StopSignal
from core.seeding import fold
from data.augment.geometry import RandomResizedCrop, rectangles
from data.loading.normalisation import statistics
from data.loading.pixel_sources import Resident
from data.sources.decode import decode
from data.sources.images import Files
from data.sources.pixels import resize
from trainer.build.training import build
from trainer.inference.load_run import load_run

ORIGINAL, STORED, INPUT = 64, 32, 16  # image sides in pixels


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder of 24 lossless images in two classes: stripes along or across, with a period of 5 to 8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    position = np.arange(ORIGINAL)
    for index in range(24):
        wave = 127.5 + 120 * np.sin(2 * np.pi * position / (5 + index % 4) + index)
        shade = np.tile(wave, (ORIGINAL, 1)).T if index % 2 else np.tile(wave, (ORIGINAL, 1))
        colours = np.stack([shade, 255 - shade, shade / 2], axis=2).round().astype(np.uint8)
        path = folder / ("across" if index % 2 else "along") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours).save(path)
    return folder


def overrides(root: Path, cache: Path | None, *more: str) -> tuple[str, ...]:
    """Return overrides for an image folder with random crops of its images."""
    return (
        *("data=image_folder", f"data.root={root}", f"data.image_size={INPUT}", f"data.stored_size={STORED}"),
        *("data.test_fraction=0.25", "data.val_fraction=0.25", "data.batch_size=4", "data.num_workers=0"),
        *(f"data.cache_dir={cache or 'null'}", "augment=[random_resized_crop]", *more),
    )


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 16), (25, 40, 12), (16, 16, 16), (11, 15, 20)])
@pytest.mark.parametrize("as_float", [False, True])
def test_resized_crops_equal_torchvision_with_antialiasing(height, width, size, as_float):
    """Reduced, unchanged and enlarged crops; a single image gives a crop bit-identical to that in a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, height, width), generator=generator, dtype=torch.uint8)
    random_values = torch.rand(50, 4, generator=generator)
    images = images.float() if as_float else images
    random_values[0], random_values[1] = 0, 1 - 2**-24
    step = RandomResizedCrop(area=[0.08, 1.0], ratio=[3 / 4, 4 / 3], size=size)
    result = step(images, random_values)
    assert result.dtype == torch.float32 and result.shape == (50, 3, size, size)
    boxes = torch.stack(
        rectangles(random_values, area=step.area, ratio=step.ratio, height=height, width=width), dim=1
    ).long()
    for index, box in enumerate(boxes.tolist()):
        expected = reference.resized_crop(images[index].float(), *box, size=[size, size], antialias=True)
        assert (result[index] - expected).abs().max() < 0.001  # of 255
        assert torch.equal(step(images[index : index + 1], random_values[index : index + 1])[0], result[index])


def test_crops_of_the_output_size_are_copied():
    images = torch.randint(256, (30, 1, 23, 23), dtype=torch.uint8)
    random_values = torch.rand(30, 4)
    step = RandomResizedCrop(area=[(12 / 23) ** 2] * 2, ratio=[1, 1], size=12)
    boxes = torch.stack(rectangles(random_values, area=step.area, ratio=step.ratio, height=23, width=23), dim=1).long()
    for actual, image, (top, left, tall, wide) in zip(step(images, random_values), images, boxes.tolist(), strict=True):
        assert (tall, wide) == (12, 12)
        assert torch.equal(actual, image[:, top : top + 12, left : left + 12].float())


def augmented_images(run, epoch: int) -> dict[Path, torch.Tensor]:
    """Return the augmented image of each training image in an epoch, by path."""
    loader = run.training.train_loader
    paths = loader.source.images.pixels.paths
    return {
        paths[row]: image
        for batch in loader.augmented_batches(epoch)
        for row, image in zip(batch.indices, batch.images)
    }


def test_crops_of_larger_stored_images_keep_the_detail_of_the_original(root, tmp_path):
    """Compared with torchvision's crops of the original: stripes too fine for the input size are kept."""
    errors = {}
    for stored in (ORIGINAL, STORED, INPUT):
        more = (f"data.stored_size={stored}", "augment.resized_crop.area=[0.15,0.25]", "data.memory_budget=0")
        crops = augmented_images(built(tmp_path / str(stored), *overrides(root, None, *more)), epoch=1)
        generator = torch.Generator().manual_seed(fold(0, "augment", "resized_crop", 1))
        boxes = rectangles(
            torch.rand(len(crops), 4, generator=generator),
            area=(0.15, 0.25),
            ratio=(3 / 4, 4 / 3),
            height=stored,
            width=stored,
        )
        boxes = torch.stack(boxes, dim=1) * (ORIGINAL / stored)
        differences = []
        for path, box in zip(sorted(crops), boxes.long().tolist(), strict=True):
            original = decode(path, image_size=None, channels=3).float()
            expected = reference.resized_crop(original, *box, size=[INPUT, INPUT], antialias=True)
            differences.append((crops[path] - expected).abs().mean())
        errors[stored] = float(torch.stack(differences).mean())
    assert errors[ORIGINAL] < 0.001 and errors[STORED] < errors[INPUT] / 2 and errors[INPUT] > 20


def test_training_with_stored_size_is_bit_identical_for_any_loading(root, tmp_path):
    """Covers decoding, images in memory, the cache, workers, mixing partners and a resume within an epoch."""
    cache = tmp_path / "cache"
    more = ("augment=[flip,random_resized_crop,mixup]",)
    states = [
        last_state(trained(tmp_path / str(number), *overrides(root, cache_dir, *more, *loading)).folder.path)
        for number, (cache_dir, loading) in enumerate(
            [
                (None, ()),
                (cache, ()),  # created, then read into memory
                (cache, ("data.memory_budget=0",)),  # streamed from the cache
                (cache, ("data.memory_budget=0", "data.num_workers=2")),
            ]
        )
    ]
    stopped = built(tmp_path / "stopped", *overrides(root, cache, *more, "data.memory_budget=0"))
    stop_after(stopped, 5)
    with pytest.raises(StopSignal):
        run_to_end(stopped)
    resumed = reopened(tmp_path / "stopped", "data.num_workers=1")
    assert resumed is not None
    run_to_end(resumed)
    states.append(last_state(tmp_path / "stopped"))
    assert states == states[:1] * 5
    assert len(list(cache.glob("*.npy"))) == 2  # one per size


def test_only_training_images_are_stored_larger(root, tmp_path):
    """Validation and test images are as without the key, and statistics are those of images at the input size.

    A cache contains only sizes that are read.
    """
    split_root = tmp_path / "splits"
    for removed, split in enumerate(("train", "val", "test")):  # different images: equal splits would share a cache
        shutil.copytree(root, split_root / split)
        for path in list((split_root / split).rglob("*.png"))[:removed]:
            path.unlink()
    plain = built(tmp_path / "plain", *overrides(root, None, "data.stored_size=null"))
    for number, (image_root, sizes) in enumerate([(root, [STORED, INPUT]), (split_root, [STORED, INPUT, INPUT])]):
        cache = tmp_path / f"cache{number}"
        run = built(tmp_path / str(number), *overrides(image_root, cache, "data.memory_budget=0"))
        assert sorted((np.load(path).shape[2] for path in cache.glob("*.npy")), reverse=True) == sizes
        train = run.training.train_loader.source.images
        assert train.pixels.shape[2:] == (STORED, STORED)
        mean, std = statistics([resize(train.load(), image_size=INPUT, fit="resize")])
        assert torch.equal(run.state.normalisation.tensors["mean"], mean)
        assert torch.equal(run.state.normalisation.tensors["std"], std)
        for loader in (run.training.val_loader, run.training.test_loader):
            files = loader.source.images.pixels
            assert isinstance(files, Files) and files.cache is not None
            expected = torch.stack([decode(path, image_size=INPUT, channels=3) for path in files.paths])
            assert torch.equal(loader.source.images.load(), expected)
    assert (plain.state.normalisation.tensors["mean"] - mean).abs().max() < 0.01


def test_memory_budget_counts_images_at_their_stored_size(root, tmp_path):
    train, val, test = 14, 4, 6  # of 24: a quarter for test, then a quarter for validation, stratified
    bytes_needed = 3 * (train * STORED**2 + (val + test) * INPUT**2)
    for spare, resident in ((0, True), (-1, False)):
        budget = f"data.memory_budget={(bytes_needed + spare) / 2**30!r}"
        run = built(tmp_path / str(resident), *overrides(root, None, budget))
        sources = [
            loader.source for loader in (run.training.train_loader, run.training.val_loader, run.training.test_loader)
        ]
        assert [isinstance(source, Resident) for source in sources] == [resident] * 3
        if resident:
            assert [len(source.pixels) for source in sources] == [train, val, test]


@pytest.mark.parametrize(("more", "message"), [
    ((f"data.stored_size={INPUT - 1}",), "data.stored_size = 15: must be an integer >= data.image_size = 16, or null"),
    (("data.fit=pad",), "data.stored_size = 32: needs data.fit = resize"),
    (("augment=flip",), "data.stored_size = 32: augmentation gives images of 32 x 32, but data.image_size = 16"),
    (("augment.resized_crop.size=20",), "data.stored_size = 32: augmentation gives images of 20 x 20"),
    (("data.stored_size=null", "augment.resized_crop.size=20"), "data.stored_size = null: augmentation gives"),
    (("augment.resized_crop.size=0",), "augment.resized_crop.size = 0: must be an integer >= 1, or null"),
])  # fmt: skip
def test_invalid_stored_size_is_refused_before_decoding(root, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("data.sources.images.decode", None)
    monkeypatch.setattr("data.sources.cache_creation.decode_file", None)
    with pytest.raises(ConfigError) as caught:
        built(tmp_path / "run", *overrides(root, tmp_path / "cache", *more))
    assert message in str(caught.value) and not (tmp_path / "cache").exists()


def test_stored_size_must_be_an_integer_or_null(root):
    for value in ("large", "0", "1e12"):
        with pytest.raises(ConfigError, match="data.stored_size = .*: must be an integer >= 1 and <= 16384, or null"):
            composed(*overrides(root, None, f"data.stored_size={value}"))


def test_torchvision_crop_reduces_images_to_image_size(root, tmp_path):
    transform = "{_target_:torchvision.transforms.v2.RandomResizedCrop,size:16,antialias:true}"
    run = built(tmp_path / "run", *overrides(root, None, "augment=[flip]", f"+augment.torchvision={transform}"))
    assert next(iter(run.training.train_loader.augmented_batches(0))).images.shape == (4, 3, INPUT, INPUT)
    shrunk = built(tmp_path / "more", *overrides(root, None, "augment=[random_resized_crop,trivial_augment,cutmix]"))
    assert next(iter(shrunk.training.train_loader.augmented_batches(0))).images.shape == (4, 3, INPUT, INPUT)


def test_look_and_evaluate_use_the_input_size_of_the_model(root, tmp_path):
    """evaluate.py split=train uses images at the input size; look.py shows all images at one size."""
    training, splits = build(composed(*overrides(root, None, "data.memory_budget=0")))
    images = look.augmented_images(training.train_loader, splits, image_size=INPUT)["images"]
    assert images.shape == (2, 1 + look.EPOCHS, INPUT, INPUT, 3)

    run = load_run(trained(tmp_path / "run", *overrides(root, None)).folder.path)
    values = {"run": str(tmp_path / "run"), "split": "train", "checkpoint": "best", "device": "cpu", "root": None}
    evaluate_run(Config(values=values | {"trust": [], "tta": None, "output": None}, record={}, job=None))
    report = json.loads((tmp_path / "run" / "evaluation-train.json").read_text())
    with torch.no_grad():
        logits = run.model(torch.stack([run.transform(path) for path in splits.train.pixels.paths]))
    assert report["samples"] == 14
    assert report["cross_entropy"] == pytest.approx(float(cross_entropy(logits, splits.train.labels)), rel=1e-5)
