"""Protocols of the data as the loop sees it. `data.loading.loaders` and `data.loading.normalisation` implement them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # images (B, C, H, W), labels (B,), sample indices (B,)


class StepLoader(Protocol):
    """The training data as the loop sees it."""

    steps_per_epoch: int
    samples_per_epoch: int

    @property
    def reading(self) -> str:
        """Where the pictures come from, for the log."""

    def steps(self, epoch: int, start: int = 0) -> Iterable[Sequence[tuple[Tensor, Tensor, Tensor]]]:
        """The batches of each step of an epoch, from its step `start` on; their labels may be probabilities (B, K)."""

    def pictures(self, epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """The batches of an epoch, augmented, but with pixels of 0 to 255 still."""


class Normalisation(Protocol):
    """What turns pixels into the network's input."""

    tensors: dict[str, Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of 0 to 255 to float32."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the one with these tensors."""
