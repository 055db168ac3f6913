"""Loss and accuracy as sums over samples. The host waits for the device only when the sums are read."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Sums = tuple[float, int, int]  # loss summed over samples, correct answers, samples
MAX_PENDING_LOGITS = 2**24  # logits that are noted before they are summed up: 64 MiB


class RunningSums:
    """Loss and accuracy of the training steps since the last log line, and since the last evaluation.

    A step only notes what it has: its few operations would take longer than many a network's own. They are summed up
    together when a log line, an evaluation or a checkpoint asks for them, which waits for the device: in Python's
    numbers, one batch after the other, so that it makes no difference when. `read` moves the sums of the log line to
    those of the evaluation, which empties them.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []
        self._window: Sums = (0.0, 0, 0)
        self._total: Sums = (0.0, 0, 0)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """A batch: its mean loss (scalar), logits (B, K), and labels (B,) or probabilities (B, K)."""
        self._noted.append((loss.detach(), logits.detach(), targets))

    def take_back(self, batches: int, where: Tensor) -> None:
        """The last so many batches do not count where this flag (scalar), which may lie on the device, is true."""
        self._noted[-batches:] = [
            (torch.where(where, math.nan, loss), logits, targets) for loss, logits, targets in self._noted[-batches:]
        ]

    def sum_up(self, *, at_least: int = 1) -> None:
        """Sum up what is noted, if it is so many logits."""
        if len(self._noted) * (self._noted[0][1].numel() if self._noted else 0) < at_least:
            return
        logits, targets = (torch.cat(parts) for parts in list(zip(*self._noted, strict=True))[1:])
        labels = targets if targets.ndim == 1 else targets.argmax(1)  # of a mixed sample, the larger part's
        counts = [len(targets) for _, _, targets in self._noted]
        ends = torch.tensor(counts).cumsum(0).to(labels.device) - 1
        right = (logits.argmax(1) == labels).cumsum(0)[ends].diff(prepend=labels.new_zeros(1)).tolist()
        losses = torch.stack([loss for loss, _, _ in self._noted]).tolist()
        loss_sum, correct, samples = self._window
        for loss, answers, count in zip(losses, right, counts, strict=True):
            if not math.isnan(loss):
                loss_sum, correct, samples = loss_sum + loss * count, correct + answers, samples + count
        self._window = loss_sum, correct, samples
        self._noted.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums for a checkpoint: [loss summed, correct predictions, samples] each; waits for the device."""
        self.sum_up()
        return {"window": list(self._window), "total": list(self._total)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        loss, correct, samples = state["window"]
        self._window = loss, correct, samples
        loss, correct, samples = state["total"]
        self._total = loss, correct, samples

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy since the last log line, which this one ends; empty when nothing was seen."""
        self.sum_up()
        (loss, correct, count), self._window = self._window, (0.0, 0, 0)
        self._total = (self._total[0] + loss, self._total[1] + correct, self._total[2] + count)
        return {"loss": loss / count, "accuracy": correct / count} if count else {}

    def read_total(self) -> dict[str, float]:
        """Mean loss and accuracy since the last evaluation, which this one ends."""
        self.read()
        (loss, correct, count), self._total = self._total, (0.0, 0, 0)
        return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}


def resolve_mode(mode: str, monitor: str) -> str:
    """`auto` means min for a loss and max for everything else that is measured here."""
    return ("min" if monitor.endswith("loss") else "max") if mode == "auto" else mode


def improves(value: float, best: float | None, *, mode: str, min_delta: float = 0.0) -> bool:
    """Is a value better than the best so far by more than min_delta? One that is not finite never is."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta
