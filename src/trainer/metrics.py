"""Losses and accuracies as sums over seen samples; the sums stay on the device until somebody asks for them."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Sums = tuple[float, float, int]  # loss summed over samples, correct answers, samples


class RunningSums:
    """Loss and accuracy of the training steps since the last log line, and since the last evaluation.

    `window` (loss sum, correct, samples) is added to on the device at every step and read, which waits for the device,
    only when a log line or an evaluation is due; `read` moves it to the host's sums, which an evaluation empties.
    """

    def __init__(self, device: torch.device) -> None:
        self.window = torch.zeros(3, dtype=torch.float64, device=device)
        self.total: Sums = (0.0, 0.0, 0)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """A batch: its mean loss (scalar), logits (B, K), and labels (B,) or probabilities (B, K)."""
        count = len(targets)
        labels = targets if targets.ndim == 1 else targets.argmax(1)  # of a mixed sample, the larger part's
        self.window[0] += loss.detach() * count
        self.window[1] += (logits.detach().argmax(1) == labels).sum()
        self.window[2] += count

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy since the last log line, which this one ends; empty when nothing was seen."""
        loss, correct, samples = self.window.tolist()
        count = int(samples)
        self.total = (self.total[0] + loss, self.total[1] + correct, self.total[2] + count)
        self.window.zero_()
        return {"loss": loss / count, "accuracy": correct / count} if count else {}

    def read_total(self) -> dict[str, float]:
        """Mean loss and accuracy since the last evaluation, which this one ends."""
        self.read()
        loss, correct, count = self.total
        self.total = (0.0, 0.0, 0)
        return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loss_function: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    autocast: torch.autocast,
    abandon: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean loss and accuracy of a network in evaluation mode over every sample of `batches`.

    None when `abandon`, asked before each batch, says that there is no time for it.
    """
    was_training = model.training
    model.eval()
    loss_sum = correct = torch.zeros((), dtype=torch.float64)
    count = 0
    for images, labels, _ in batches:
        if abandon():
            return None
        with autocast:
            logits = model(images)
            loss = loss_function(logits, labels)
        loss_sum = loss_sum.to(loss.device) + loss.double() * len(labels)
        correct = correct.to(loss.device) + (logits.argmax(1) == labels).sum()
        count += len(labels)
    if abandon():
        return None
    model.train(was_training)
    return {"loss": float(loss_sum) / count, "accuracy": float(correct) / count}


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
