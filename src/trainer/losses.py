"""What is minimised: modules called as loss(logits (B, K), labels (B,)) -> scalar, the mean over the batch."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class CrossEntropy(nn.Module):
    """-sum_k q_k log softmax(logits)_k with q the smoothed one-hot label (Szegedy 2016, section 7).

    With class weights w it is -sum_k w_k q_k log softmax(logits)_k, and the mean is over samples. (Torch divides by the
    batch's sum of weights instead, so that the same samples in other batches would give another loss.)
    """

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, K), labels (B,) of integers in [0, K) -> scalar."""
        smoothing = self.label_smoothing
        losses = functional.cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """One weight a class, inverse to how often it occurs: n / (K n_k), so that the mean weight of a sample is 1."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return (len(labels) / (num_classes * counts.double())).tolist()
