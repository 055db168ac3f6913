"""Sources of batches: all pixels of a split in the memory of the device, or images that are decoded batch by batch.

`source_of` chooses one. Both have the method `read`, so the loaders do not depend on where the pixels are.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from core.errors import ConfigError
from data.device import require_memory, upload
from data.loading.parcels import CannotPack, pack
from data.loading.worker_process import BatchTensors
from data.loading.workers import WorkerPool, usable_workers
from data.sources.images import Files, Images, Problems

# (images (R, C, H, W), labels (R,), rows (R,)) -> the same of the B samples of a batch; R > B if samples are mixed.
Augment = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Batch(NamedTuple):
    """A batch on the device of the model."""

    images: Tensor  # float32 (B, C, H, W), normalised
    labels: Tensor  # int64 (B,), or probabilities if samples are mixed: float32 (B, K)
    indices: Tensor  # int64 (B,): positions of the samples in their split


class Resident:
    """All pixels of a split, uint8 (N, C, H, W), in the memory of the device, which gathers the batches."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, device: torch.device) -> None:
        require_memory(pixels, device)
        self.pixels, self.labels, self.device = pixels.to(device), labels.to(device), device

    def read(self, batches: Sequence[Tensor], *, augment: Augment) -> Iterator[Batch]:
        """Yield a Batch for each tensor of rows (R,). Its images are augmented, on the scale 0 to 255."""
        for rows in upload(torch.cat(list(batches)), self.device).split([len(batch) for batch in batches]):
            # index_select copies whole images, which takes a tenth of the time of plain indexing.
            yield Batch(*augment(self.pixels.index_select(0, rows), self.labels.index_select(0, rows), rows))


class Streamed:
    """Images that this process or its workers decode or copy batch by batch.

    With `augment_in_workers`, the process that reads a batch also augments it, on the CPU. Otherwise this process
    augments it on the device.
    """

    def __init__(
        self, images: Images, *, device: torch.device, num_workers: int, timeout_s: float, augment_in_workers: bool
    ) -> None:
        num_workers = usable_workers(num_workers)
        self.images, self.device, self.num_workers, self.timeout_s = images, device, num_workers, timeout_s
        self.augment_in_workers = augment_in_workers
        self.pin_memory = device.type == "cuda"
        self.workers: WorkerPool | None = None
        if num_workers:
            fetch = partial(_fetch_in_worker, images)
            self.workers = WorkerPool(fetch, num_workers=num_workers, timeout_s=timeout_s, pin_memory=self.pin_memory)
            if isinstance(images.pixels, Tensor):  # this process maps the memory of the workers, and needs no own copy
                (self.images,) = self.workers.share().args

    def read(self, batches: Sequence[Tensor], *, augment: Augment) -> Iterator[Batch]:
        """Yield a Batch for each tensor of rows (R,). Its images are augmented, on the scale 0 to 255.

        Logs problems of single images. Raises DataError if too many images are bad or workers fail, and ConfigError if
        the augmentation cannot be sent to workers.
        """
        on_cpu, on_device = (augment, unchanged) if self.augment_in_workers else (unchanged, augment)
        results = (
            self._read_in_workers(self.workers, batches, on_cpu)
            if self.workers is not None
            else self._read_here(batches, on_cpu)
        )
        # Closing the generator ends workers that are still reading. Without it, an error that was raised would keep the
        # generator alive, through its traceback, until garbage is collected.
        with closing(results):
            for tensors, problems in results:
                self.images.report(problems)
                yield Batch(*on_device(*(tensor.to(self.device, non_blocking=True) for tensor in tensors)))

    def _read_here(
        self, batches: Sequence[Tensor], augment: Augment
    ) -> Generator[tuple[BatchTensors, Problems], None, None]:
        """Read the batches in this process."""
        for rows in batches:
            (images, labels, rows), problems = _fetch(self.images, augment, rows)
            if self.pin_memory:
                images, labels, rows = images.pin_memory(), labels.pin_memory(), rows.pin_memory()
            yield (images, labels, rows), problems

    def _read_in_workers(
        self, workers: WorkerPool, batches: Sequence[Tensor], augment: Augment
    ) -> Generator[tuple[BatchTensors, Problems], None, None]:
        """Read the batches in worker processes. They skip the bad images that are known."""
        known = self.images.pixels.known if isinstance(self.images.pixels, Files) else Problems()
        try:
            yield from workers.read((augment, known), batches)
        except CannotPack as error:
            explanation = f"cannot be sent to loader workers: {error}; set data.num_workers=0"
            raise ConfigError(_unpicklable_key(augment), explanation) from error


def _fetch(images: Images, augment: Augment, rows: Tensor) -> tuple[BatchTensors, Problems]:
    """Copy or decode the images of a batch on the CPU, augment them, and return them with problems of single images."""
    pixels, problems = images.fetch(rows)
    return augment(pixels, images.labels[rows], rows), problems


def _fetch_in_worker(images: Images, task: tuple[Augment, Problems], rows: Tensor) -> tuple[BatchTensors, Problems]:
    """Read a batch in a worker process. `task` has the problems that the main process knew when the reading started."""
    augment, known = task
    if isinstance(images.pixels, Files):
        images.pixels.known.add(known)
    return _fetch(images, augment, rows)


def _unpicklable_key(augment: Augment) -> str:
    """Return the config key of the first augmentation step that cannot be pickled, or `augment` if all can."""
    for name, step in getattr(augment, "steps", {}).items():
        try:
            pack(step).close()
        except CannotPack:
            return f"augment.{name}"
    return "augment"


def unchanged(images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return images, labels, rows


def source_of(
    images: Images, *, device: torch.device, num_workers: int, timeout_s: float, augment_in_workers: bool = False
) -> Resident | Streamed:
    """Return a `Resident` source if the pixels are in memory and workers do not augment them, else `Streamed`."""
    if timeout_s <= 0:
        raise ConfigError("timeout_s", "must be > 0", value=timeout_s)
    if isinstance(images.pixels, Tensor) and not augment_in_workers:
        return Resident(images.pixels, images.labels, device=device)
    return Streamed(
        images, device=device, num_workers=num_workers, timeout_s=timeout_s, augment_in_workers=augment_in_workers
    )
