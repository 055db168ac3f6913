"""Augmentation of whole batches, each sample with its own random values.

A step is an object with `num_random_values`, how many uniform random values a sample needs, and a call
(images, random_values) -> images; it draws nothing itself. All random values of an epoch are drawn at once:

    random_values = rand(N, k) of fold(seed, "augment", step's name, epoch);  sample i gets row i

so that what happens to a sample depends on seed, epoch and sample alone: not on its batch, the workers, or other steps.
For a step that alternates (`alternates = True`) they are those of epoch 0, in odd epochs moved by 1/2 on the circle.
Pixels stay uint8 as long as a step allows it, and are on the scale 0 to 255 throughout.

A step that mixes two samples (`mixes = True`) gets a partner for each sample, which follows from the same three:

    partners = randint(N, (N,)) of fold(seed, "partner", step's name, epoch)

A partner may belong to another batch. It is read with the batch, and goes through the steps before the mix with its own
random values. Backwards through the steps, each mix doubles the rows that a batch needs; forwards, it
folds the second half of them into the first:

    samples a b    rows a b p(a) p(b)    crop, flip: 4 images    mixup: 2 images, and labels (2, K) that sum to 1
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from core.seeding import fold


class Step(Protocol):
    """One augmentation. It may have a method `fit(mean, covariance)` too, of the training part's colours: (C,), (C, C)
    on the scale 0 to 1."""

    num_random_values: int  # uniform numbers a sample

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float, and numbers (B, k) in [0, 1) to images of the same shape; where larger
        ones are stored than the network sees, one step brings them down."""
        ...


class Mix(Protocol):
    """One augmentation that makes each image and its label of two."""

    num_random_values: int
    mixes: bool  # True

    def __call__(self, images: Tensor, labels: Tensor, random_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images (2B, C, H, W) and labels (2B, K), first the samples', then their partners', to (B, ...) of each."""
        ...


class Augmentations:
    """Steps in their order; an empty mapping changes nothing."""

    def __init__(self, steps: Mapping[str, Step | Mix], *, seed: int, num_classes: int) -> None:
        self.steps: dict[str, Any] = dict(steps)
        self.seed = seed
        self.num_classes = num_classes

    @property
    def one_at_a_time(self) -> bool:
        """Whether a step takes one image after the other, so that workers are better off with it."""
        return any(getattr(step, "one_at_a_time", False) for step in self.steps.values())

    @property
    def mixes(self) -> bool:
        """Whether a step mixes samples, so that labels become probabilities."""
        return any(getattr(step, "mixes", False) for step in self.steps.values())

    def draw(self, *, epoch: int, samples: int, device: torch.device) -> "Drawn":
        """An epoch's numbers: always drawn on the CPU, so that they are the same for every device."""

        def generator(purpose: str, name: str, epoch: int) -> torch.Generator:
            return torch.Generator().manual_seed(fold(self.seed, purpose, name, epoch))

        random_values: dict[str, Tensor] = {}
        for name, step in self.steps.items():
            alternates = getattr(step, "alternates", False)
            drawn = torch.rand(
                samples, step.num_random_values, generator=generator("augment", name, 0 if alternates else epoch)
            )
            if alternates and epoch % 2:
                drawn = torch.where(drawn < 0.5, drawn + 0.5, drawn - 0.5)  # both are exact
            random_values[name] = drawn.to(device)
        partners = {
            name: torch.randint(samples, (samples,), generator=generator("partner", name, epoch))
            for name, step in self.steps.items()
            if getattr(step, "mixes", False)
        }
        return Drawn(self, random_values, partners)


class Drawn:
    """What happens to each sample in one epoch; nothing is random any more, so workers may have copies."""

    def __init__(self, frame: Augmentations, random_values: dict[str, Tensor], partners: dict[str, Tensor]) -> None:
        self.steps, self.num_classes = frame.steps, frame.num_classes
        self.random_values = random_values  # step's name -> (N, k), on the device
        self.partners = partners  # mixing step's name -> (N,), on the CPU

    def rows(self, indices: Tensor) -> Tensor:
        """Samples (B,), and behind them all others that they are mixed with: what must be read, on the CPU."""
        for name in reversed(self.partners):
            indices = torch.cat([indices, self.partners[name][indices]])
        return indices

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The uint8 images (R, C, H, W) and labels (R,) of some `rows` to images, labels and indices of the samples.

        The labels stay whole numbers (B,), or become probabilities (B, K) where samples are mixed.
        """
        if self.partners:
            labels = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).float()  # (R, K)
        for name, step in self.steps.items():
            if name in self.partners:
                rows = rows[: len(rows) // 2]
                images, labels = step(images, labels, self.random_values[name].index_select(0, rows))
            else:
                images = step(images, self.random_values[name].index_select(0, rows))
        return images, labels, rows
