"""Protocols: what the loop and the state require of the objects they are given.

`data.loading` implements the loaders and the normalisation, `trainer.steps` the step, `trainer.report` the recorder and
`trainer.storage` the saver.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), labels (B,), sample indices (B,)
Batches = Iterable[Batch]


class Stateful(Protocol):
    """A component of the state whose values survive a restart."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return plain values (JSON) for a checkpoint."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state_dict()`."""


class StepResult(NamedTuple):
    """What one optimizer step reports."""

    samples: int
    metrics: dict[str, Tensor]  # scalars on the device, by name; read only when a log line is due


class Step(Protocol):
    """One optimizer step: batches -> update, metrics."""

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """Update the weights once from the batches of a step (several with gradient accumulation)."""

    def clear_gradients(self) -> None:
        """Release the gradients, which the logs may read before."""


class EvalBatches(Protocol):
    """A split without augmentation, in its own order."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the split."""

    def read_pixels(self, rows: Tensor) -> Tensor:
        """Return the images at these positions (R,): (R, C, H, W), 0 to 255."""


class StepLoader(Protocol):
    """The training split as the loop sees it."""

    steps_per_epoch: int
    samples_per_epoch: int

    @property
    def reading(self) -> str:
        """Where the images come from, for the log."""

    def steps(self, epoch: int, start: int = 0) -> Iterable[Sequence[Batch]]:
        """Yield the batches of each step of an epoch, from its step `start` on; labels may be probabilities (B, K)."""

    def augmented_batches(self, epoch: int) -> Iterable[Batch]:
        """Yield the batches of an epoch, augmented, with pixel values of 0 to 255."""


class Normalisation(Protocol):
    """Turns pixels into the input of the model."""

    tensors: dict[str, Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of 0 to 255 to float32."""


class Recorder(Protocol):
    """Takes what a run reports, and passes it to metrics.jsonl, events.jsonl, TensorBoard and the terminal."""

    def progress(self, step: int, epoch: float) -> None:
        """Move the progress bar."""

    def step(self, step: int, epoch: float, measurements: Mapping[str, float]) -> None:
        """Record the measurements of the steps since the last log line."""

    def evaluation(self, line: Mapping[str, Any], metrics: Mapping[str, float], *, best: bool) -> None:
        """Record a line of metrics.jsonl; `metrics` are those of its values that are named split/metric."""

    def histograms(self, model: nn.Module, step: int) -> None:
        """Record every parameter and its gradient."""

    def warn(self, text: str, *, step: int) -> None:
        """Record a warning."""

    def flush(self) -> None:
        """Write what is buffered: a checkpoint must never count a step that TensorBoard does not show."""


class Saver(Protocol):
    """Writes checkpoints in the background."""

    def save(self, kinds: list[str], snapshot: Any, *, keep: Mapping[str, int | None]) -> None:
        """Start to write a snapshot under each of these kinds, after the previous write has ended."""

    def check(self) -> None:
        """Raise the error of a write that has failed meanwhile."""

    def wait(self) -> None:
        """Wait until everything is written."""
