"""Predictions of a run's best weights on a sample of each split, and facts of each image of the sample."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from data.sources.images import Files, Images
from data.sources.pixels import brightness_and_contrast
from data.sources.splits import Splits
from diagnosis.run_evidence import SplitError
from trainer.inference.load_run import LoadedRun

BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The sample of one split. All tensors are on the CPU and in the same order.

    rows         int64 (N,): positions of the images in their split
    labels       int64 (N,)
    logits       float32 (N, K)
    brightness   float32 (N,): mean of all values of an image, 0 to 255
    contrast     float32 (N,): standard deviation of the values
    names        the files of the images, or their positions as text
    total        number of images of the split
    """

    rows: Tensor
    labels: Tensor
    logits: Tensor
    brightness: Tensor
    contrast: Tensor
    names: list[str]
    total: int

    @property
    def predicted(self) -> Tensor:
        """Return the predicted classes, int64 (N,)."""
        return self.logits.argmax(1)

    @property
    def wrong(self) -> Tensor:
        """Return which predictions are wrong, bool (N,)."""
        return self.predicted != self.labels

    @property
    def error(self) -> SplitError:
        """Return the error of the sample."""
        return SplitError(wrong=int(self.wrong.sum()), samples=len(self.labels))

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy."""
        return torch.nn.functional.cross_entropy(self.logits.double(), self.labels).item()


def measure_split(run: LoadedRun, images: Images, *, seed: int, most: int, seconds: float) -> Measured:
    """Return the predictions for a random sample of a split, which is a function of the seed.

    The sample ends after `most` images, or after the first batch that exceeds the time limit, in seconds.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:most]
    began = time.monotonic()
    rows: list[Tensor] = []
    facts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chosen in order.split(BATCH):
        pixels = images.read(chosen)  # uint8 (B, C, H, W)
        with torch.inference_mode(), run.autocast:
            logits = run.model(run.transform.normalisation(pixels.to(run.device))).float().cpu()
        rows.append(chosen)
        facts.append((logits, *brightness_and_contrast(pixels)))
        if time.monotonic() - began > seconds:
            break
    logits, brightness, contrast = (torch.cat(parts) for parts in zip(*facts, strict=True))
    measured = torch.cat(rows)
    paths = images.pixels.paths if isinstance(images.pixels, Files) else None
    return Measured(
        rows=measured,
        labels=images.labels[measured],
        logits=logits,
        brightness=brightness,
        contrast=contrast,
        names=[str(row) if paths is None else str(paths[row]) for row in measured.tolist()],
        total=len(images),
    )


def measure_splits(run: LoadedRun, splits: Splits, *, most: int, seconds: float) -> dict[str, Measured]:
    """Return the measured samples of the splits that exist, by name; the time limit applies to each split."""
    seed = run.config["seed"]
    return {
        name: measure_split(run, split, seed=seed, most=most, seconds=seconds) for name, split in splits.by_name.items()
    }
