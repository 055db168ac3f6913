"""Augmentation of whole batches, with separate random values for each sample.

A step is an object with `num_random_values`, the number of uniform random values per sample, and a call
(images, random_values) -> images. It draws nothing itself. All random values of an epoch are drawn at once:

    random_values = rand(N, k) of fold(seed, "augment", step's name, epoch);  sample i gets row i

So the augmentation of a sample depends on seed, epoch and sample alone: not on its batch, the workers, or other steps.
A step that alternates (`alternates = True`) gets the values of epoch 0 in each epoch, and in odd epochs 1/2 is added,
modulo 1. Pixels stay uint8 until a step returns floats, and are on the scale 0 to 255 throughout.

A step that mixes two samples (`mixes = True`) gets a partner for each sample, which depends on the same three:

    partners = randint(N, (N,)) of fold(seed, "partner", step's name, epoch)

A partner may belong to another batch. It is read with the batch, and passes through the steps before the mixing step
with its own random values. `rows` visits the mixing steps in reverse order, and each doubles the rows that are read.
In the forward order, each mixing step mixes the second half of the rows into the first half:

    samples a b    rows a b p(a) p(b)    crop, flip: 4 images    mixup: 2 images, and labels (2, K) that sum to 1
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from core.seeding import fold
from data.device import upload


class Step(Protocol):
    """One augmentation.

    Optional: a method `fit(mean, covariance)`, which gets the colours of the train split, (C,) and (C, C), on the scale
    0 to 1. `mirrors = True` marks a step that flips images horizontally.
    """

    num_random_values: int  # uniform random values per sample

    def __call__(self, images: Tensor, random_values: Tensor) -> Tensor:
        """Return augmented images for images (B, C, H, W), uint8 or float, and random values (B, k) in [0, 1).

        The shape stays the same. If images are stored larger than the model's input, one step reduces them to it.
        """
        ...


class Mix(Protocol):
    """One augmentation that mixes each image and its label with those of a partner."""

    num_random_values: int
    mixes: bool  # True

    def __call__(self, images: Tensor, labels: Tensor, random_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return B mixed images and labels for images (2B, C, H, W) and labels (2B, K): B samples, then B partners."""
        ...


class Augmentations:
    """Augmentation steps, applied in their order; without steps, images are unchanged."""

    def __init__(self, steps: Mapping[str, Step | Mix], *, seed: int, num_classes: int) -> None:
        self.steps: dict[str, Any] = dict(steps)
        self.seed = seed
        self.num_classes = num_classes

    @property
    def one_at_a_time(self) -> bool:
        """Return whether a step takes single images: then loader workers should apply the augmentation."""
        return any(getattr(step, "one_at_a_time", False) for step in self.steps.values())

    @property
    def mixes(self) -> bool:
        """Return whether a step mixes samples: then labels become probabilities."""
        return any(getattr(step, "mixes", False) for step in self.steps.values())

    def draw(self, *, epoch: int, samples: int, device: torch.device) -> "Drawn":
        """Return an epoch's random values. They are drawn on the CPU, so that they are the same for every device."""

        def generator(purpose: str, name: str, epoch: int) -> torch.Generator:
            return torch.Generator().manual_seed(fold(self.seed, purpose, name, epoch))

        random_values: dict[str, Tensor] = {}
        for name, step in self.steps.items():
            alternates = getattr(step, "alternates", False)
            drawn = torch.rand(
                samples, step.num_random_values, generator=generator("augment", name, 0 if alternates else epoch)
            )
            if alternates and epoch % 2:
                drawn = torch.where(drawn < 0.5, drawn + 0.5, drawn - 0.5)  # both are exact in float32
            random_values[name] = upload(drawn, device)
        partners = {
            name: torch.randint(samples, (samples,), generator=generator("partner", name, epoch))
            for name, step in self.steps.items()
            if getattr(step, "mixes", False)
        }
        return Drawn(self, random_values, partners)


class Drawn:
    """Augmentation of one epoch, with its random values. It is deterministic, so workers can have copies of it."""

    def __init__(
        self, augmentations: Augmentations, random_values: dict[str, Tensor], partners: dict[str, Tensor]
    ) -> None:
        self.steps, self.num_classes = augmentations.steps, augmentations.num_classes
        self.random_values = random_values  # step's name -> (N, k), on the device
        self.partners = partners  # mixing step's name -> (N,), on the CPU

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows to read, on the CPU: the samples (B,), followed by all samples that they are mixed with."""
        for name in reversed(self.partners):
            indices = torch.cat([indices, self.partners[name][indices]])
        return indices

    def __call__(self, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return augmented images, labels and indices of B samples, for uint8 images (R, C, H, W) and labels (R,).

        `rows` (R,) are the result of `self.rows`. Labels stay integers (B,), or become probabilities (B, K) if samples
        are mixed.
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
