"""TrainLoader and EvalLoader: the batches do not depend on where the pixels are stored.

    TrainLoader.steps(epoch, start)  ->  list of Batch for each optimizer step: `accumulate` micro-batches
    iter(EvalLoader)                 ->  Batch, in the order of the split; no sample is dropped

The sample order of an epoch is randperm(N), seeded by fold(seed, "order", epoch). Step k has the samples
order[k B A : (k + 1) B A], split into A micro-batches of B samples. So a run can resume at any step, and the number of
workers does not change the results.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from core.errors import ConfigError
from core.seeding import fold
from data.augment.pipeline import Augmentations
from data.loading.normalisation import Normalisation
from data.loading.pixel_sources import Batch, Resident, source_of, unchanged
from data.loading.prefetch import prefetched
from data.sources.images import Files, Images

# Pixel values of a group of batches. A `Resident` source gathers a group in one call; augmentation and normalisation
# are one call each. On a CPU, a group stays in the processor's cache until its steps. On CUDA, groups are larger, as
# launching a kernel takes as long as computing a small batch.
GROUP_VALUES = {"cpu": 2**20, "cuda": 2**24}


class TrainLoader:
    """Loads the train split, augmented, in a new order in each epoch.

    Raises ConfigError for a batch size, a count, a timeout or a `drop_last` that is out of range.
    """

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
        # BatchNorm cannot compute a variance of one sample: `auto` drops a last micro-batch of one sample, no other.
        remainder = samples % batch_size
        is_dropped = drop_last is True or (drop_last == "auto" and remainder == 1)
        self.samples_per_epoch = samples - (remainder if is_dropped else 0)
        self.steps_per_epoch = -(-self.samples_per_epoch // (batch_size * accumulate))
        self.smallest_batch = self.samples_per_epoch % batch_size or batch_size
        self.samples, self.seed, self.device = samples, seed, device
        self.batch_size, self.accumulate = batch_size, accumulate
        self.augmentations = augmentations
        self.normalisation = normalisation
        # Callables such as torchvision's transforms take single images on the CPU. Then workers run all augmentation.
        in_workers = augmentations.one_at_a_time
        self.augment_on = torch.device("cpu") if in_workers else device
        self.source = source_of(
            images, device=device, num_workers=num_workers, timeout_s=timeout_s, augment_in_workers=in_workers
        )
        values_per_batch = batch_size * math.prod(images.pixels.shape[1:])
        group_size = GROUP_VALUES.get(device.type, GROUP_VALUES["cuda"]) // values_per_batch
        self.batches_at_once = max(1, group_size) if isinstance(self.source, Resident) else 1

    @property
    def reading(self) -> str:
        """Return for the log where the images come from, and which process reads them."""
        if isinstance(self.source, Resident):
            size = self.source.pixels.numel() / 2**20
            return f"{size:,.1f} MiB of images in memory, {self.batches_at_once} batches per group"
        cached = isinstance(self.source.images.pixels, Files) and self.source.images.pixels.cache is not None
        reader = f"{self.source.num_workers} loader workers" if self.source.num_workers else "the main process"
        return f"images {'read from the image cache' if cached else 'read'} by {reader}"

    def order(self, epoch: int) -> Tensor:
        """Return the positions of an epoch's samples in their order: int64 (samples_per_epoch,), on the CPU."""
        generator = torch.Generator().manual_seed(fold(self.seed, "order", epoch))
        return torch.randperm(self.samples, generator=generator)[: self.samples_per_epoch]

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield a list of micro-batches for each optimizer step of an epoch, from its step `start` on."""
        # Reading starts with the first batch of a group. So each batch has the same memory offset in its group as in a
        # complete epoch. Another alignment could change the last bits of results.
        first_wanted = start * self.accumulate
        first_read = first_wanted - first_wanted % self.batches_at_once
        rows = self.order(epoch)[first_read * self.batch_size :]
        if not len(rows):
            return
        batches = self.read_augmented(rows.split(self.batch_size), epoch, transform=self.normalisation)
        batches = prefetched(islice(batches, first_wanted - first_read, None), device=self.device)
        while step := list(islice(batches, self.accumulate)):
            yield step

    def augmented_batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch, augmented but not normalised: values on the scale 0 to 255."""
        return self.read_augmented(self.order(epoch).split(self.batch_size), epoch)

    def read_augmented(
        self, batches: Sequence[Tensor], epoch: int, *, transform: Callable[[Tensor], Tensor] = lambda images: images
    ) -> Iterator[Batch]:
        """Yield a Batch for each tensor of positions (B,), with the augmentation of an epoch.

        `transform` is applied to the augmented images (R, C, H, W), on the scale 0 to 255; the default returns them
        unchanged. A sample's augmentation does not depend on its batch, so a group of batches is processed in one call.
        """
        drawn = self.augmentations.draw(epoch=epoch, samples=self.samples, device=self.augment_on)
        groups = [
            batches[first : first + self.batches_at_once] for first in range(0, len(batches), self.batches_at_once)
        ]
        read = self.source.read([drawn.rows(torch.cat(list(group))) for group in groups], augment=drawn)
        for group, (images, labels, indices) in zip(groups, read, strict=True):
            sizes = [len(batch) for batch in group]
            yield from map(Batch, transform(images).split(sizes), labels.split(sizes), indices.split(sizes))


class EvalLoader:
    """Loads a split in its own order, without augmentation. Raises ConfigError as `TrainLoader` does."""

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
        self.source = source_of(images, device=device, num_workers=num_workers, timeout_s=timeout_s)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.source.read(self.batches, augment=unchanged)
        normalised = (batch._replace(images=self.normalisation(batch.images)) for batch in batches)
        yield from prefetched(normalised, device=self.device)

    def read_pixels(self, rows: Tensor) -> Tensor:
        """Return the images at these positions (R,) as the model's normalisation gets them: (R, C, H, W), 0 to 255."""
        (batch,) = self.source.read([rows], augment=unchanged)
        return batch.images


def _check_sizes(*, num_workers: int, **sizes: int) -> None:
    """Raise ConfigError, which names the key, for a size below 1 or a negative number of workers."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(name, "must be >= 1", value=value)
    if num_workers < 0:
        raise ConfigError("num_workers", "must be >= 0", value=num_workers)
