"""Batches for the loop: the same ones wherever the pixels lie.

    TrainLoader.steps(epoch, start)  ->  [Batch, ...] for one optimizer step: `accumulate` micro-batches
    iter(EvalLoader)                 ->  Batch, in the data's order, nothing dropped

The order of an epoch is randperm(N) of fold(seed, "order", epoch); step k has the samples order[k B A : (k + 1) B A],
cut into A micro-batches of B. So a run can go on at any step, and the number of workers changes no number.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from core.errors import ConfigError
from core.seeding import fold
from data.augment.pipeline import Augmentations
from data.loading.normalisation import Normalisation
from data.loading.parcels import CannotPack, pack
from data.loading.prefetch import prefetched
from data.loading.worker_process import Parts
from data.loading.workers import WorkerPool, usable_workers
from data.sources.images import Files, Images, Problems

# Images (R, C, H, W), labels (R,) and rows (R,) to those of the batch.
Augment = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

# Pixels that are gathered, augmented and normalised by one call each, where they lie ready: as many as stay in a CPU's
# cache until their step; on CUDA, where starting a call takes as long as a small batch, more.
AT_ONCE = {"cpu": 2**20, "cuda": 2**24}


class Batch(NamedTuple):
    """Images ready for the network, on its device."""

    images: Tensor  # float32 (B, C, H, W), normalised
    labels: Tensor  # int64 (B,); where samples are mixed: float32 (B, K), probabilities
    indices: Tensor  # int64 (B,), positions in the part that is read


class TrainLoader:
    """The training part, a new order each epoch."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        augmentations: Augmentations,
        normalisation: Normalisation,
        device: torch.device,
        num_workers: int = 0,
        timeout_s: float = 300,
        drop_last: bool | str = "auto",
    ) -> None:
        _check_sizes(batch_size=batch_size, accumulate=accumulate, num_workers=num_workers)
        if drop_last not in ("auto", True, False):
            raise ConfigError("drop_last", "must be auto, true or false", value=drop_last)
        samples = len(images)
        if samples < batch_size:
            explanation = f"must be at most {samples}, the number of training samples"
            raise ConfigError("data.batch_size", explanation, value=batch_size)
        # A last micro-batch of one sample has no variance for BatchNorm: `auto` leaves out that one, and no other.
        odd = samples % batch_size
        self.samples_per_epoch = samples - (odd if drop_last is True or (drop_last == "auto" and odd == 1) else 0)
        self.steps_per_epoch = -(-self.samples_per_epoch // (batch_size * accumulate))
        self.smallest_batch = self.samples_per_epoch % batch_size or batch_size
        self.samples = samples
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.device = device
        self.augmentations = augmentations
        self.normalisation = normalisation
        # Transforms from elsewhere take one image after the other, on the CPU: all of augmentation goes to workers.
        in_workers = augmentations.one_at_a_time
        self.augment_on = torch.device("cpu") if in_workers else device
        self.source = _source(
            images, device=device, num_workers=num_workers, timeout_s=timeout_s, augment_in_workers=in_workers
        )
        numbers = batch_size * math.prod(images.pixels.shape[1:])  # of a batch
        at_once = AT_ONCE[device.type] // numbers
        self.batches_at_once = max(1, at_once) if isinstance(self.source, Resident) else 1

    @property
    def reading(self) -> str:
        """Where the images come from, for the log."""
        if isinstance(self.source, Resident):
            size = self.source.pixels.numel() / 2**20
            return f"{size:,.1f} MiB of images in memory, {self.batches_at_once} batches made at once"
        cached = isinstance(self.source.images.pixels, Files) and self.source.images.pixels.cache is not None
        by = f"{self.source.num_workers} workers" if self.source.num_workers else "the process itself"
        return f"images {'read from the image cache' if cached else 'read'} by {by}"

    def order(self, epoch: int) -> Tensor:
        """Positions of this epoch's samples, in the order in which they are seen."""
        generator = torch.Generator().manual_seed(fold(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)[: self.samples_per_epoch]

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """One list of micro-batches for each optimizer step of this epoch, from step `start` on."""
        # From the beginning of a group on: a batch lies at the same place in it, whose alignment may change last bits.
        start *= self.accumulate
        first = start - start % self.batches_at_once
        rest = self.order(epoch)[first * self.batch_size :]
        batches = self.show(rest.split(self.batch_size), epoch, then=self.normalisation) if len(rest) else iter(())
        batches = prefetched(islice(batches, start - first, None), device=self.device)
        while step := list(islice(batches, self.accumulate)):
            yield step

    def augmented_batches(self, epoch: int) -> Iterator[Batch]:
        """The micro-batches of this epoch, augmented, but with pixels of 0 to 255 still."""
        return self.show(self.order(epoch).split(self.batch_size), epoch)

    def show(
        self, batches: Sequence[Tensor], epoch: int, *, then: Callable[[Tensor], Tensor] = lambda images: images
    ) -> Iterator[Batch]:
        """Any samples, by their positions (B,) each, as this epoch shows them: pixels of 0 to 255, unless `then`
        makes something else of them.

        What happens to a sample does not depend on its batch: so several are made at once where they lie ready.
        """
        drawn = self.augmentations.draw(epoch=epoch, samples=self.samples, device=self.augment_on)
        groups = [
            batches[first : first + self.batches_at_once] for first in range(0, len(batches), self.batches_at_once)
        ]
        read = self.source.read([drawn.rows(torch.cat(list(group))) for group in groups], augment=drawn)
        for group, (images, labels, indices) in zip(groups, read, strict=True):
            sizes = [len(batch) for batch in group]
            yield from map(Batch, then(images).split(sizes), labels.split(sizes), indices.split(sizes))


class EvalLoader:
    """A part in its own order, without augmentation."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        normalisation: Normalisation,
        device: torch.device,
        num_workers: int = 0,
        timeout_s: float = 300,
    ) -> None:
        _check_sizes(eval_batch_size=batch_size, num_workers=num_workers)
        self.batches = torch.arange(len(images)).split(batch_size)
        self.normalisation = normalisation
        self.device = device
        self.source = _source(images, device=device, num_workers=num_workers, timeout_s=timeout_s)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.source.read(self.batches, augment=_unchanged)
        ready = (batch._replace(images=self.normalisation(batch.images)) for batch in batches)
        yield from prefetched(ready, device=self.device)


class Resident:
    """Pixels that lie whole on the device, as uint8; a batch is gathered there."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, device: torch.device) -> None:
        self.pixels, self.labels, self.device = pixels.to(device), labels.to(device), device

    def read(self, batches: Sequence[Tensor], *, augment: Augment) -> Iterator[Batch]:
        for rows in torch.cat(list(batches)).to(self.device).split([len(batch) for batch in batches]):
            # index_select copies whole images; plain indexing takes ten times as long.
            yield Batch(*augment(self.pixels.index_select(0, rows), self.labels.index_select(0, rows), rows))


class Streamed:
    """Images that are decoded, or only fetched, when their batch is due: by this process or by workers.

    They are augmented there too, or else on the device.
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
            if isinstance(images.pixels, Tensor):  # they are in memory once: this process maps the workers' copy too
                (self.images,) = self.workers.share().args

    def read(self, batches: Sequence[Tensor], *, augment: Augment) -> Iterator[Batch]:
        there, here = (augment, _unchanged) if self.augment_in_workers else (_unchanged, augment)
        results = (
            self._by_workers(self.workers, batches, there)
            if self.workers is not None
            else self._by_itself(batches, there)
        )
        # Closing ends the workers: an error that is raised keeps what is here until garbage is collected.
        with closing(results):
            for parts, problems in results:
                self.images.report(problems)
                yield Batch(*here(*(part.to(self.device, non_blocking=True) for part in parts)))

    def _by_itself(self, batches: Sequence[Tensor], augment: Augment) -> Generator[tuple[Parts, Problems], None, None]:
        for rows in batches:
            (images, labels, rows), problems = _fetch(self.images, augment, rows)
            if self.pin_memory:
                images, labels, rows = images.pin_memory(), labels.pin_memory(), rows.pin_memory()
            yield (images, labels, rows), problems

    def _by_workers(
        self, workers: WorkerPool, batches: Sequence[Tensor], augment: Augment
    ) -> Generator[tuple[Parts, Problems], None, None]:
        known = self.images.pixels.known if isinstance(self.images.pixels, Files) else Problems()
        try:
            yield from workers.read((augment, known), batches)
        except CannotPack as error:
            explanation = f"cannot be sent to loader workers: {error}; set data.num_workers=0"
            raise ConfigError(_unpicklable(augment), explanation) from error


def _fetch(images: Images, augment: Augment, rows: Tensor) -> tuple[Parts, Problems]:
    """Fetch or decode the images of a batch, and augment them."""
    pixels, problems = images.fetch(rows)
    return augment(pixels, images.labels[rows], rows), problems


def _fetch_in_worker(images: Images, task: tuple[Augment, Problems], rows: Tensor) -> tuple[Parts, Problems]:
    """What a worker does with its own copy of the images; the task has the problems that are known already."""
    augment, known = task
    if isinstance(images.pixels, Files):
        images.pixels.known.add(known)
    return _fetch(images, augment, rows)


def _unpicklable(augment: Augment) -> str:
    """The config key of the augmentation step that cannot be pickled."""
    for name, step in getattr(augment, "steps", {}).items():
        try:
            pack(step).close()
        except CannotPack:
            return f"augment.{name}"
    return "augment"


def _unchanged(images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return images, labels, rows


def _source(
    images: Images, *, device: torch.device, num_workers: int, timeout_s: float, augment_in_workers: bool = False
) -> Resident | Streamed:
    if timeout_s <= 0:
        raise ConfigError("timeout_s", "must be > 0", value=timeout_s)
    if isinstance(images.pixels, Tensor) and not augment_in_workers:
        return Resident(images.pixels, images.labels, device=device)
    return Streamed(
        images, device=device, num_workers=num_workers, timeout_s=timeout_s, augment_in_workers=augment_in_workers
    )


def _check_sizes(*, num_workers: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(name, "must be >= 1", value=value)
    if num_workers < 0:
        raise ConfigError("num_workers", "must be >= 0", value=num_workers)
