"""Loaders: every sample once per epoch; the batches do not depend on workers or on the start position."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from test_workers import workers
from torchvision.transforms import v2

from core.errors import ConfigError, DataError, as_preceptor_error
from core.seeding import fold
from data.augment.geometry import RandomAffine, RandomCrop
from data.augment.mixing import CutMix, Mixup
from data.augment.per_sample import PerSampleTransform
from data.augment.pipeline import Augmentations
from data.loading.loaders import Batch, EvalLoader, TrainLoader
from data.loading.normalisation import Normalisation
from data.loading.prefetch import prefetched
from data.loading.workers import usable_workers
from data.sources.images import Files, Images
from data.sources.listing import PackedPaths

CPU = torch.device("cpu")
NORMALISATION = Normalisation({"mean": torch.tensor([0.4]), "std": torch.tensor([0.2])})


def images(count: int) -> Images:
    pixels = torch.randint(0, 256, (count, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 3)


STEPS = {"crop": RandomCrop(padding=2), "affine": RandomAffine(0.1, [0.8, 1.2], 20, 10, 0.5)}
MIX = {"mixup": Mixup(alpha=1, probability=0.8), "cutmix": CutMix(alpha=1, probability=0.8)}
TRANSFORM = {"transform": PerSampleTransform(v2.TrivialAugmentWide(), name="augment.transform")}


def augmentations(**steps: object) -> Augmentations:
    return Augmentations(steps, seed=1, num_classes=3)


def train_loader(data: Images, **changes: object) -> TrainLoader:
    settings = {"batch_size": 4, "accumulate": 1, "seed": 1, "augmentations": augmentations(**STEPS)}
    return TrainLoader(data, **(settings | {"normalisation": NORMALISATION, "device": CPU} | changes))


def indices_of(steps: list[list[Batch]]) -> list[list[list[int]]]:
    return [[batch.indices.tolist() for batch in step] for step in steps]


def are_equal(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(
        torch.equal(tensor, other_tensor)
        for step, other_step in pairs
        for batch, other_batch in zip(step, other_step, strict=True)
        for tensor, other_tensor in zip(batch, other_batch, strict=True)
    )


@pytest.mark.parametrize(
    ("count", "accumulate", "drop_last", "sizes"),
    [
        (12, 1, "auto", [[4], [4], [4]]),
        (14, 1, "auto", [[4], [4], [4], [2]]),
        (13, 1, "auto", [[4], [4], [4]]),
        (13, 1, False, [[4], [4], [4], [1]]),
        (14, 1, True, [[4], [4], [4]]),
        (22, 2, "auto", [[4, 4], [4, 4], [4, 2]]),
        (17, 2, "auto", [[4, 4], [4, 4]]),
        (18, 2, "auto", [[4, 4], [4, 4], [2]]),
        (22, 2, True, [[4, 4], [4, 4], [4]]),
        (4, 3, "auto", [[4]]),
    ],
)
def test_steps_have_the_expected_batch_sizes_and_drop_the_remainder(count, accumulate, drop_last, sizes):
    loader = train_loader(images(count), accumulate=accumulate, drop_last=drop_last)
    steps = list(loader.steps(0))
    assert [[len(batch.labels) for batch in step] for step in steps] == sizes
    assert loader.steps_per_epoch == len(sizes)
    assert loader.samples_per_epoch == sum(map(sum, sizes))
    for step in steps:
        for batch in step:
            assert len(batch.images) == len(batch.labels) == len(batch.indices)


def test_batch_size_1_drops_no_sample():
    assert train_loader(images(5), batch_size=1).samples_per_epoch == 5


def test_each_epoch_contains_every_sample_once_in_an_order_of_seed_and_epoch():
    loader = train_loader(images(22), accumulate=2)
    orders = {}
    for epoch in (0, 1):
        flat = [index for step in indices_of(list(loader.steps(epoch))) for batch in step for index in batch]
        assert sorted(flat) == list(range(22))
        generator = torch.Generator().manual_seed(fold(1, "order", epoch))
        assert flat == torch.randperm(22, generator=generator).tolist()
        orders[epoch] = flat
    assert orders[0] != orders[1]
    other = train_loader(images(22), accumulate=2, seed=2)
    assert indices_of(list(other.steps(0))) != indices_of(list(loader.steps(0)))
    small = train_loader(images(6))
    assert indices_of(list(small.steps(3))) == [[small.order(3)[:4].tolist()], [small.order(3)[4:].tolist()]]


def test_accumulation_and_batch_size_do_not_change_the_order():
    flat = [index for step in indices_of(list(train_loader(images(24)).steps(0))) for batch in step for index in batch]
    for batch_size, accumulate in ((8, 1), (2, 3), (5, 2)):
        loader = train_loader(images(24), batch_size=batch_size, accumulate=accumulate)
        assert [index for step in indices_of(list(loader.steps(0))) for batch in step for index in batch] == flat


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_start_within_an_epoch_gives_bit_identical_batches(start):
    steps = list(train_loader(images(22), accumulate=2).steps(5))
    assert are_equal(list(train_loader(images(22), accumulate=2).steps(5, start)), steps[start:])


def test_labels_and_pixels_belong_to_the_indices():
    data = images(14)
    for [batch] in train_loader(data, augmentations=augmentations()).steps(0):
        assert torch.equal(batch.labels, data.labels[batch.indices])
        expected = (data.pixels[batch.indices].double() / 255 - 0.4) / 0.2
        assert batch.images.dtype == torch.float32
        assert (batch.images - expected).abs().max() < 1e-5


def test_prefetch_starts_a_batch_before_the_previous_one_is_returned(monkeypatch):
    """Checks the order of the calls on two dummy streams that record them; test_cuda.py uses real streams."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "data"

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class DummyTensor:
        def __init__(self, number: int) -> None:
            self.number = number

        def record_stream(self, stream: Stream) -> None:
            calls.append(f"{self.number} is recorded on {stream.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    def batches() -> Iterator[tuple[DummyTensor]]:
        for number in (1, 2):
            calls.append(f"{number} is created")
            yield (DummyTensor(number),)
        raise DataError("3.png", "is gone")

    monkeypatch.setattr("data.loading.prefetch.stream_of", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("model"))
    prefetching = prefetched(batches(), device=torch.device("cuda"))
    assert calls == []
    for number in (1, 2):  # the third fails only when it is requested, after the step of the second
        assert next(prefetching)[0].number == number
        calls.append(f"step {number}")
    with pytest.raises(DataError, match=r"3\.png"):
        next(prefetching)
    first = ["data waits for model", "on data", "1 is created", "off data"]
    second = ["model waits for data", "1 is recorded on model", "on data", "2 is created", "off data", "step 1"]
    assert calls == [*first, *second, "model waits for data", "2 is recorded on model", "on data", "step 2"]
    on_cpu = iter([(torch.ones(1),)])
    assert prefetched(on_cpu, device=CPU) is on_cpu


def test_both_loaders_prefetch(monkeypatch):
    devices = []
    monkeypatch.setattr("data.loading.loaders.prefetched", lambda batches, *, device: devices.append(device) or batches)
    data = images(8)
    loaders = [train_loader(data).steps(0), EvalLoader(data, batch_size=4, normalisation=NORMALISATION, device=CPU)]
    assert [len(list(loader)) for loader in loaders] == [2, 2] and devices == [CPU, CPU]


def test_images_of_a_batch_are_channels_last_if_configured():
    data = Images(images(8).pixels.repeat(1, 3, 1, 1), images(8).labels)
    for [batch] in train_loader(data, normalisation=NORMALISATION.to(CPU, channels_last=True)).steps(0):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def files(tmp_path):
    paths = []
    for index, image in enumerate(images(22).pixels):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image[0].numpy()).save(paths[-1])
    return Images(Files(PackedPaths.of(paths), image_size=6, channels=1), images(22).labels)


@pytest.mark.parametrize(
    "steps", [STEPS, STEPS | MIX, STEPS | TRANSFORM | MIX], ids=["built-in", "mixed", "torchvision"]
)
def test_files_and_workers_give_bit_identical_batches(files, steps):
    expected = list(train_loader(images(22), accumulate=2, augmentations=augmentations(**steps)).steps(1))
    for batch in (batch for step in expected for batch in step):
        assert len(batch.images) == len(batch.labels) == len(batch.indices)
        assert batch.labels.dtype == (torch.float32 if MIX.keys() <= steps.keys() else torch.int64)
    state = torch.get_rng_state()
    for data in (images(22), files):
        for num_workers in (0, 1, 2):
            loader = train_loader(data, accumulate=2, augmentations=augmentations(**steps), num_workers=num_workers)
            assert are_equal(list(loader.steps(1, 1)), expected[1:])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [STEPS | MIX, STEPS | TRANSFORM | MIX], ids=["mixed", "torchvision"])
def test_batch_size_does_not_change_a_sample(steps):
    """Includes mixing partners, which may be in any batch or be samples that drop_last drops."""

    def sample_by_sample(**changes: object) -> dict[int, tuple[bytes, list[float]]]:
        loader = train_loader(images(23), augmentations=augmentations(**steps), **changes)
        return {
            index: (image.numpy().tobytes(), label.tolist())
            for step in loader.steps(3)
            for batch in step
            for image, label, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True)
        }

    reference = sample_by_sample(batch_size=23)
    assert len(reference) == 23
    for batch_size, accumulate in ((1, 1), (3, 2), (8, 1)):
        assert sample_by_sample(batch_size=batch_size, accumulate=accumulate) == reference
    fewer = sample_by_sample(batch_size=8, drop_last=True)
    assert len(fewer) == 16 and all(reference[index] == sample for index, sample in fewer.items())


class WorkerDetector:
    def __init__(self) -> None:
        self.main = os.getpid()

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.full_like(image, os.getpid() != self.main)


def test_transforms_run_in_the_workers():
    for num_workers in (0, 1):
        steps = augmentations(mine=PerSampleTransform(WorkerDetector(), name="augment.mine"))
        loader = train_loader(images(8), augmentations=steps, num_workers=num_workers)
        assert {batch.images.unique().item() for batch in loader.augmented_batches(0)} == {num_workers}


class FailingTransform:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failing_transform_is_named_also_if_it_runs_in_a_worker(num_workers):
    failing = augmentations(mine=PerSampleTransform(FailingTransform(), name="augment.mine"))
    with pytest.raises(ConfigError) as caught:
        list(train_loader(images(22), augmentations=failing, num_workers=num_workers).steps(0))
    message = "error[config] augment.mine: fails on an image (1, 6, 6): RuntimeError: on purpose"
    assert str(caught.value) == message
    assert not workers()  # although `caught` holds the frames of the error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_file_is_named_also_if_it_is_read_in_a_worker(files, num_workers):
    files.pixels.paths[7].write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(train_loader(files, num_workers=num_workers).steps(0))
    assert str(caught.value).startswith(f"error[data] {files.pixels.paths[7]}: is not an image")


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_loader_keeps_the_order_and_drops_no_sample(files, streamed):
    data = files if streamed else images(22)
    loader = EvalLoader(data, batch_size=7, normalisation=NORMALISATION, device=CPU)
    for _ in range(2):
        batches = list(loader)
        assert len(loader) == len(batches) == 4
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(22))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), images(22).labels)
        expected = (images(22).pixels.double() / 255 - 0.4) / 0.2
        assert (torch.cat([batch.images for batch in batches]) - expected).abs().max() < 1e-5


def test_batch_size_above_the_number_of_samples_is_a_config_error():
    with pytest.raises(ConfigError, match="data.batch_size = 4: must be at most 3, the number of training samples"):
        train_loader(images(3))


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 0), ("accumulate", 0), ("num_workers", -1), ("drop_last", "maybe")]
)
def test_config_error_names_the_key_of_loading(key, value):
    with pytest.raises(ConfigError, match="must be") as caught:
        train_loader(images(8), **{key: value})
    assert caught.value.subject == key


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mixing", [{}, MIX])
def test_batches_assembled_in_groups_equal_batches_assembled_singly(mixing, accumulate):
    """The storage offset within a group must not depend on the start position: matrix products may depend on it."""
    steps = augmentations(**STEPS, **mixing)
    single, grouped = (train_loader(images(43), augmentations=steps, accumulate=accumulate) for _ in range(2))
    single.batches_at_once = 1
    assert grouped.batches_at_once > 43
    for group_size in (3, 4, grouped.batches_at_once):
        grouped.batches_at_once = group_size
        steps_of_epoch = list(grouped.steps(5))
        assert are_equal(steps_of_epoch, list(single.steps(5)))
        for start in range(len(steps_of_epoch)):
            remaining = list(grouped.steps(5, start))
            assert are_equal(remaining, steps_of_epoch[start:])
            for step, other_step in zip(remaining, steps_of_epoch[start:], strict=True):
                for batch, other_batch in zip(step, other_step, strict=True):
                    assert batch.images.storage_offset() == other_batch.images.storage_offset()


def test_large_batches_are_assembled_singly():
    large = Images(torch.zeros(8, 3, 512, 512, dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    assert train_loader(large, augmentations=augmentations()).batches_at_once == 1


def test_number_of_workers_is_bounded_by_cores_and_open_files(files, monkeypatch, caplog):
    usable_workers.cache_clear()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert usable_workers(16) == 16 and not caplog.records
    loader = EvalLoader(files, batch_size=5, normalisation=NORMALISATION, device=CPU, num_workers=10_000)
    assert loader.source.num_workers == 16
    (record,) = caplog.records
    assert record.getMessage() == (
        "data.num_workers = 10000: only 16 workers are started, as this machine has 2 processor cores"
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        assert usable_workers(12) == 8 and "200 open files (ulimit -n)" in caplog.messages[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        usable_workers.cache_clear()


def test_too_many_open_files_names_workers_and_ulimit():
    error = as_preceptor_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "Too many open files; set a smaller data.num_workers" in str(error) and "ulimit -n" in str(error)
