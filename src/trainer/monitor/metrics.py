"""Loss and accuracy as sums over samples. The host waits for the device only when the sums are read."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Sums = tuple[float, int, int]  # loss summed over samples, correct predictions, samples
MAX_PENDING_LOGITS = 2**24  # logits that are kept before they are summed up: 64 MiB


class RunningSums:
    """Loss and accuracy of the training steps since the last log line, and since the last evaluation.

    A step only keeps its tensors: computing sums at each step can take longer than the step of a small model. They are
    summed up when a log line, an evaluation or a checkpoint needs them, which waits for the device. The sums are Python
    numbers, added batch by batch, so the result does not depend on when this happens. `read` moves the sums of the log
    line to those of the evaluation, which `read_total` empties.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._window: Sums = (0.0, 0, 0)
        self._total: Sums = (0.0, 0, 0)
        self.first: float | None = None  # mean loss of the first batch of the run

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss (scalar), logits (B, K), and labels (B,) or probabilities (B, K)."""
        self._pending.append((loss.detach(), logits.detach(), targets))

    def discard(self, batches: int, flag: Tensor) -> None:
        """Leave the last `batches` batches out of the sums if `flag` (scalar on the device, 0.0 or 1.0) is 1.0."""
        is_left_out = flag.bool()
        self._pending[-batches:] = [
            (torch.where(is_left_out, math.nan, loss), logits, targets)
            for loss, logits, targets in self._pending[-batches:]
        ]

    def sum_up(self, *, at_least: int = 1) -> None:
        """Sum up the batches that were added, if they have at least this many logits."""
        if len(self._pending) * (self._pending[0][1].numel() if self._pending else 0) < at_least:
            return
        logits, targets = (torch.cat(parts) for parts in list(zip(*self._pending, strict=True))[1:])
        labels = (
            targets if targets.ndim == 1 else targets.argmax(1)
        )  # of a mixed sample: the image with the larger share
        counts = [len(targets) for _, _, targets in self._pending]
        ends = torch.tensor(counts).cumsum(0).to(labels.device) - 1
        right = (logits.argmax(1) == labels).cumsum(0)[ends].diff(prepend=labels.new_zeros(1)).tolist()
        losses = torch.stack([loss for loss, _, _ in self._pending]).tolist()
        self.first = losses[0] if self.first is None else self.first
        loss_sum, correct, samples = self._window
        for loss, hits, count in zip(losses, right, counts, strict=True):
            if not math.isnan(loss):
                loss_sum, correct, samples = loss_sum + loss * count, correct + hits, samples + count
        self._window = loss_sum, correct, samples
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums for a checkpoint: [loss summed, correct predictions, samples] each; waits for the device."""
        self.sum_up()
        return {"window": list(self._window), "total": list(self._total), "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.first = state["first"]
        loss, correct, samples = state["window"]
        self._window = loss, correct, samples
        loss, correct, samples = state["total"]
        self._total = loss, correct, samples

    def read(self) -> dict[str, float]:
        """Return mean loss and accuracy since the last call, or {} if no sample counts; waits for the device."""
        self.sum_up()
        (loss, correct, count), self._window = self._window, (0.0, 0, 0)
        self._total = (self._total[0] + loss, self._total[1] + correct, self._total[2] + count)
        return {"loss": loss / count, "accuracy": correct / count} if count else {}

    def read_total(self) -> dict[str, float]:
        """Return mean loss and accuracy since the last call of this method; waits for the device."""
        self.read()
        (loss, correct, count), self._total = self._total, (0.0, 0, 0)
        return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}


def resolve_mode(mode: str, monitor: str) -> str:
    """Return min or max; `auto` means min for a loss, and max for all other metrics."""
    return ("min" if monitor.endswith("loss") else "max") if mode == "auto" else mode


def improves(value: float, best: float | None, *, mode: str, min_delta: float = 0.0) -> bool:
    """Return whether a value is better than the best so far by more than `min_delta`; NaN and infinity never are."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta
