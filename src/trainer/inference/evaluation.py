"""Evaluation of a model on a split: loss and accuracy during training, and scikit-learn's metrics of its logits."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.monitor.metrics import MAX_PENDING_LOGITS


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loss_function: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    autocast: AbstractContextManager[object],
    abandon: Callable[[], bool] = lambda: False,
    observe: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
) -> dict[str, float] | None:
    """Return mean loss and accuracy of a model in evaluation mode over all samples of `batches`.

    `observe` is called with logits (B, K) and labels (B,) of each batch, on their device. Returns None if `abandon`,
    which is called before each batch, returns true.
    """
    was_training = model.training
    model.eval()
    loss_sum, correct, count = 0.0, 0, 0
    pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def sum_up() -> None:
        """Add the pending batches in their order, as Python numbers; waits for the device."""
        nonlocal loss_sum, correct, count
        losses, logits, labels = zip(*pending, strict=True)
        for loss, batch in zip(torch.stack(losses).tolist(), labels, strict=True):
            loss_sum, count = loss_sum + loss * len(batch), count + len(batch)
        correct += int((torch.cat(logits).argmax(1) == torch.cat(labels)).sum())
        pending.clear()

    for images, labels, _ in batches:
        if abandon():
            return None
        with autocast:
            logits = model(images)
            pending.append((loss_function(logits, labels), logits, labels))
        observe(logits, labels)
        if len(pending) * logits.numel() >= MAX_PENDING_LOGITS:
            sum_up()
    if pending:
        sum_up()
    if abandon():
        return None
    model.train(was_training)
    return {"loss": loss_sum / count, "accuracy": correct / count}


class Predictions:
    """Collects the predicted class, its probability, and the label of every sample of an evaluation."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K) and labels (B,)."""
        probability, predicted = logits.float().softmax(1).max(1)
        self._batches.append((predicted, probability, labels))

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return predicted classes, their probabilities and the labels, each (N,), on the CPU; waits for the device."""
        predicted, probability, labels = (torch.cat(parts).cpu() for parts in zip(*self._batches, strict=True))
        return predicted, probability, labels


def count_confusions(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Return int64 (K, K): the number of samples of each label (row) and predicted class (column)."""
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes * num_classes)
    return cells.reshape(num_classes, num_classes)


def worst_mistakes(predicted: Tensor, probability: Tensor, labels: Tensor, *, most: int) -> Tensor:
    """Return the positions of the wrong predictions with the highest probabilities, at most `most`; ties by position.

    `predicted` are the classes (N,), `probability` their probabilities (N,), and `labels` the true classes (N,).
    """
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[probability[wrong].argsort(descending=True, stable=True)[:most]]


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, object]],
    *,
    autocast: AbstractContextManager[object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and labels (N,) of all samples in order, on the CPU; the model is in evaluation mode."""
    with autocast or nullcontext():
        outputs = [(model(images).float().cpu(), labels.cpu()) for images, labels, _ in batches]
    logits, labels = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def measure(logits: Tensor, labels: Tensor, class_names: list[str]) -> dict[str, Any]:
    """Return accuracy, macro-F1, cross-entropy, one row per class, and the confusion matrix.

    With more than five classes, top-5 accuracy too: with at most five, it is always 1.
    Undefined metrics (of a class that was never predicted or never occurs) count as 0. Macro-F1 is the unweighted mean
    over the classes that occur or were predicted.
    """
    from sklearn import metrics  # 2 s to import, and training needs none of it

    count = len(class_names)
    predicted, truth = logits.argmax(1).numpy(), labels.numpy()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(count), zero_division=0.0
    )
    top5 = {}
    if count > 5:
        hits = logits.topk(5, dim=1).indices.eq(labels[:, None]).any(1)
        top5["top5_accuracy"] = hits.double().mean().item()
    return {
        "samples": len(labels),
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        **top5,
        "macro_f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "cross_entropy": functional.cross_entropy(logits.double(), labels).item(),
        "classes": {
            name: {
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "samples": int(support[index]),
            }
            for index, name in enumerate(class_names)
        },
        "confusion_matrix": metrics.confusion_matrix(truth, predicted, labels=range(count)).tolist(),
    }
