"""Batches for the loop: the same ones wherever the pixels lie.

    TrainLoader.steps(epoch, start)  ->  [Batch, ...] for one optimizer step: `accumulate` micro-batches
    iter(EvalLoader)                 ->  Batch, in the data's order, nothing dropped

The order of an epoch is randperm(N) of fold(seed, "order", epoch); step k has the samples order[k B A : (k + 1) B A],
cut into A micro-batches of B. So a run can go on at any step, and the number of workers changes no number.
"""

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.errors import ConfigError, DataError
from core.seeding import fold
from data.augmentations import Augmentations
from data.images import Files, Images
from data.normalisation import Standardise


class Batch(NamedTuple):
    """Pictures ready for the network, on its device."""

    images: Tensor  # float32 (B, C, H, W), standardised
    labels: Tensor  # int64 (B,)
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
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        num_workers: int = 0,
        drop_last: bool | str = "auto",
        channels_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        _check_sizes(batch_size=batch_size, accumulate=accumulate, num_workers=num_workers)
        if drop_last not in ("auto", True, False):
            raise ConfigError("drop_last", "must be auto, true or false", value=drop_last)
        samples = len(images)
        if samples < batch_size:
            explanation = f"must be at most {samples}, the number of training samples"
            raise DataError("data.batch_size", explanation, value=batch_size)
        # A last micro-batch of one sample has no variance for BatchNorm: `auto` leaves out that one, and no other.
        odd = samples % batch_size
        self.samples_per_epoch = samples - (odd if drop_last is True or (drop_last == "auto" and odd == 1) else 0)
        self.steps_per_epoch = -(-self.samples_per_epoch // (batch_size * accumulate))
        self.samples = samples
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.shuffle = shuffle
        self.device = device
        self.augmentations = augmentations
        self.standardise = Standardise(mean, std, device=device, channels_last=channels_last)
        self.source = _source(images, device=device, num_workers=num_workers)

    def order(self, epoch: int) -> Tensor:
        """Positions of this epoch's samples, in the order in which they are seen."""
        if not self.shuffle:
            return torch.arange(self.samples_per_epoch)
        generator = torch.Generator().manual_seed(fold(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)[: self.samples_per_epoch]

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """One list of micro-batches for each optimizer step of this epoch, from step `start` on."""
        rest = self.order(epoch)[start * self.accumulate * self.batch_size :]
        if len(rest) == 0:
            return
        self.augmentations.draw(epoch=epoch, samples=self.samples, device=self.device)
        batches = (self._finish(batch, epoch) for batch in self.source.read(rest.split(self.batch_size)))
        while step := list(islice(batches, self.accumulate)):
            yield step

    def _finish(self, batch: Batch, epoch: int) -> Batch:
        images = self.augmentations(batch.images, batch.indices, epoch)
        return batch._replace(images=self.standardise(images))


class EvalLoader:
    """A part in its own order, without augmentation."""

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        num_workers: int = 0,
        channels_last: bool = False,
    ) -> None:
        _check_sizes(eval_batch_size=batch_size, num_workers=num_workers)
        self.batches = torch.arange(len(images)).split(batch_size)
        self.standardise = Standardise(mean, std, device=device, channels_last=channels_last)
        self.source = _source(images, device=device, num_workers=num_workers)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source.read(self.batches):
            yield batch._replace(images=self.standardise(batch.images))


class Resident:
    """Pixels that lie whole on the device, as uint8; a batch is gathered there."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, device: torch.device) -> None:
        self.pixels, self.labels, self.device = pixels.to(device), labels.to(device), device

    def read(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for indices in torch.cat(list(batches)).to(self.device).split([len(batch) for batch in batches]):
            # index_select copies whole pictures; plain indexing takes ten times as long.
            images, labels = self.pixels.index_select(0, indices), self.labels.index_select(0, indices)
            yield Batch(images=images, labels=labels, indices=indices)


class Streamed(Dataset[Tensor]):
    """Files that are decoded when their batch is due, by this process or by workers."""

    def __init__(self, files: Files, labels: Tensor, *, device: torch.device, num_workers: int) -> None:
        self.files, self.labels, self.device, self.num_workers = files, labels, device, num_workers

    def __getitems__(self, indices: list[int]) -> Tensor | DataError:
        # Returned, not raised: a DataLoader would pass only the text of a worker's exception.
        try:
            return torch.stack([self.files[index] for index in indices])
        except DataError as error:
            return error

    def read(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # a DataLoader draws a seed for its workers: never from the global generator
        )
        with _signals_held():
            fetched = iter(loader)
        for indices, images in zip(batches, fetched, strict=True):
            if isinstance(images, DataError):
                raise images
            yield Batch(
                images=images.to(self.device, non_blocking=True),
                labels=self.labels[indices].to(self.device),
                indices=indices.to(self.device),
            )


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Workers are born with SIGINT and SIGTERM blocked: one to the whole process group asks the run to save and stop,
    and they serve it until it has. Here they are only held up meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _kill_workers() -> None:
    """Those that are left when the process ends; multiprocessing would send SIGTERM, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _source(images: Images, *, device: torch.device, num_workers: int) -> Resident | Streamed:
    if isinstance(images.pixels, Files):
        return Streamed(images.pixels, images.labels, device=device, num_workers=num_workers)
    return Resident(images.pixels, images.labels, device=device)


def _check_sizes(*, num_workers: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(name, "must be >= 1", value=value)
    if num_workers < 0:
        raise ConfigError("num_workers", "must be >= 0", value=num_workers)
