"""Training losses: modules called as loss(logits (B, K), targets) -> scalar, the mean over the batch.

Targets are labels, integers (B,), or, if samples are mixed (mixup, CutMix), probabilities (B, K). All losses compute in
float32, also if autocast passes logits of 16 bits, or in float64 for such logits. With K classes:

    q = (1 - label_smoothing) target + label_smoothing / K        the smoothed target; a label is a one-hot row
    p = softmax(logits)
    w_y                                                           the class weight of the sample's label y

Class weights mean the same in all losses: the loss of a sample is multiplied by w_y, or by sum_k w_k target_k if it is
mixed. (Torch's cross-entropy instead weights each term of the smoothed target, and divides by the batch's sum of
weights. With smoothing, samples of a common class then mostly learn the rare class.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError


class Objective:
    """What a step minimises: loss(logits) + auxiliary_weight * the sum of loss(auxiliary logits).

    In training, a model with auxiliary heads returns a tuple: the logits, then the logits of each auxiliary head. These
    heads add gradient to lower layers (Szegedy et al. 2014, section 5: weight 0.3). The logged loss is that of the
    logits alone, so that training and validation losses are comparable.
    """

    def __init__(self, loss_function: nn.Module, *, auxiliary_weight: float) -> None:
        self.loss_function, self.auxiliary_weight = loss_function, auxiliary_weight

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value to minimise, the loss of the logits alone, and the logits (B, K)."""
        logits, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = minimised = self.loss_function(logits, targets)
        for others in auxiliary:
            minimised = minimised + self.auxiliary_weight * self.loss_function(others, targets)
        return minimised, loss, logits


class Loss(nn.Module):
    """Base class: label smoothing (Szegedy et al. 2016, section 7) and class weights."""

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)  # moves to the device with the module

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss (scalar) for logits (B, K) and labels (B,) or probabilities (B, K)."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = self.of_samples(logits, targets)
        if self.class_weights is not None:
            losses = losses * (as_probabilities(targets, logits.shape[1]) * self.class_weights).sum(1)
        return losses.mean()

    def of_samples(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample (B,), without class weights, for logits in float32."""
        target = as_probabilities(targets, logits.shape[1])
        smoothed = (1 - self.label_smoothing) * target + self.label_smoothing / logits.shape[1]
        return self.of_classes(logits, smoothed).sum(1)

    def of_classes(self, logits: Tensor, smoothed: Tensor) -> Tensor:
        """Return the terms (B, K) of a sample's loss, for logits and smoothed targets (B, K)."""
        raise NotImplementedError


class CrossEntropy(Loss):
    """-sum_k q_k log p_k."""

    def of_samples(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each sample (B,), by torch's fused function."""
        return functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="none")


class SquaredError(Loss):
    """sum_k (p_k - q_k)^2, the Brier score: 0 for a confident correct prediction, 2 for a confident wrong one.

    It is bounded, so a wrong label costs little. Its gradient vanishes for confident wrong predictions.

    Source: Brier 1950, Verification of Forecasts Expressed in Terms of Probability, equation 2.
    """

    def of_classes(self, logits: Tensor, smoothed: Tensor) -> Tensor:
        """Return the squared differences (B, K)."""
        return (logits.softmax(1) - smoothed).square()


class Huber(Loss):
    """sum_k h(p_k - q_k), with h(d) = d^2 / 2 if |d| <= delta, and delta (|d| - delta / 2) otherwise.

    It is between squared and absolute error: the gradient of a large difference, as wrong labels cause, is at most
    delta.

    Source: Huber 1964, Robust Estimation of a Location Parameter.
    """

    def __init__(
        self, *, delta: float = 0.5, label_smoothing: float = 0.0, class_weights: list[float] | None = None
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, class_weights=class_weights)
        if not 0 < delta <= 1:  # probabilities differ by at most 1
            raise ConfigError("delta", "must be in (0, 1]", value=delta)
        self.delta = delta

    def of_classes(self, logits: Tensor, smoothed: Tensor) -> Tensor:
        """Return the Huber losses (B, K)."""
        return functional.huber_loss(logits.softmax(1), smoothed, delta=self.delta, reduction="none")


class BinaryCrossEntropy(Loss):
    """-sum_k [q_k log s_k + (1 - q_k) log(1 - s_k)], s = sigmoid(logits): one binary classification per class.

    It is the sum over classes, not their mean, so that the gradient of a logit is s_k - q_k, like cross-entropy's
    p_k - q_k. With many classes, the first steps are therefore large, as every s_k starts near 1/2: use a warm-up.

    Source: Beyer et al. 2020, Are We Done with ImageNet?; Wightman et al. 2021, ResNet Strikes Back (which uses the
    mean).
    """

    def of_classes(self, logits: Tensor, smoothed: Tensor) -> Tensor:
        """Return the binary cross-entropies (B, K)."""
        return functional.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Return the sigmoids (B, K), which need not sum to 1. With all other losses, probabilities are the softmax."""
        return logits.sigmoid()


def as_probabilities(targets: Tensor, num_classes: int) -> Tensor:
    """Return labels (B,) as one-hot rows (B, K); probabilities (B, K) are returned unchanged."""
    if targets.ndim == 2:
        return targets
    return (targets[:, None] == torch.arange(num_classes, device=targets.device)).float()


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """Return class weights n / (K n_k) for n labels (N,), n_k of class k: inverse to the class counts.

    If no class is empty, the mean weight over the samples is 1.
    """
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return (len(labels) / (num_classes * counts.double())).tolist()
