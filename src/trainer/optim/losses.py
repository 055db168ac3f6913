"""What is minimised: modules called as loss(logits (B, K), targets) -> scalar, the mean over the batch.

Targets are labels, whole numbers (B,), or, where samples are mixed (mixup, CutMix), probabilities (B, K). All losses
here are computed in 32 bits, also where the network's autocast hands over logits of 16. With K classes:

    q = (1 - label_smoothing) target + label_smoothing / K        the target, a one-hot row where it is a label
    p = softmax(logits)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import ConfigError


class Objective:
    """What a step minimises; the one place that knows of auxiliary heads.

        loss(logits) + auxiliary_weight * the sum of loss(auxiliary logits)

    In training a network with auxiliary heads returns a tuple: the logits, then those of each auxiliary head, which
    are there for the gradient they give the lower layers (Szegedy et al. 2014, section 5: weight 0.3). What the logs
    call the loss is that of the logits alone, so that training and validation are measured alike.
    """

    def __init__(self, loss_function: nn.Module, *, auxiliary_weight: float) -> None:
        self.loss_function, self.auxiliary_weight = loss_function, auxiliary_weight

    def __call__(self, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, the loss of the logits alone, and the logits (B, K)."""
        logits, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        loss = minimised = self.loss_function(logits, targets)
        for others in auxiliary:
            minimised = minimised + self.auxiliary_weight * self.loss_function(others, targets)
        return minimised, loss, logits


class Loss(nn.Module):
    """What the losses share: the target, smoothed as in Szegedy 2016, section 7, and the weights of the classes."""

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", as_buffer(class_weights))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K), labels (B,) or probabilities (B, K) -> scalar."""
        target = as_probabilities(targets, logits.shape[1])
        losses = self.of_classes(logits.float(), smooth(target, self.label_smoothing)).sum(1)
        return weighted_mean(losses, target, self.class_weights)

    def of_classes(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss of each class (B, K), from logits and probabilities (B, K)."""
        raise NotImplementedError


class CrossEntropy(Loss):
    """-sum_k q_k log p_k, with the target smoothed as in Szegedy 2016, section 7.

    With class weights w it is -sum_k w_k q_k log p_k, and the mean is over samples. (Torch divides by the batch's sum
    of weights instead, so that the same samples in other batches would give another loss.)
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K), labels (B,) or probabilities (B, K) -> scalar."""
        smoothing = self.label_smoothing
        losses = functional.cross_entropy(
            logits.float(), targets, weight=self.class_weights, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()


class SquaredError(Loss):
    """sum_k (p_k - q_k)^2, the Brier score: 0 for a certain and right answer, 2 for a certain and wrong one.

    It is bounded, so that a wrong label costs little; its gradient fades for answers that are certain and wrong.

    Source: Brier 1950, Verification of Forecasts Expressed in Terms of Probability, equation 2.
    """

    def of_classes(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return (logits.softmax(1) - wanted).square()


class Huber(Loss):
    """sum_k h(p_k - q_k): h(d) = d^2 / 2 where |d| <= delta, and delta (|d| - delta / 2) beyond.

    Between squared and absolute error: large differences, those of wrong labels, pull no harder than delta.

    Source: Huber 1964, Robust Estimation of a Location Parameter.
    """

    def __init__(
        self, *, delta: float = 0.5, label_smoothing: float = 0.0, class_weights: list[float] | None = None
    ) -> None:
        super().__init__(label_smoothing=label_smoothing, class_weights=class_weights)
        if not 0 < delta <= 1:  # no two probabilities are further apart
            raise ConfigError("delta", "must be in (0, 1]", value=delta)
        self.delta = delta

    def of_classes(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return functional.huber_loss(logits.softmax(1), wanted, delta=self.delta, reduction="none")


class BinaryCrossEntropy(Loss):
    """-sum_k [q_k log s_k + (1 - q_k) log(1 - s_k)], s = sigmoid(logits): each class a yes-or-no question of its own.

    The sum over classes, not their mean, so that a logit's gradient is s_k - q_k, as cross-entropy's is p_k - q_k. With
    many classes the first steps are large then, as every class starts at 1/2: a warm-up helps.

    Source: Beyer et al. 2020, Are We Done with ImageNet?; Wightman et al. 2021, ResNet Strikes Back (its mean).
    """

    def of_classes(self, logits: Tensor, wanted: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """What the network says of each class (B, K): they need not sum to 1. (All other losses take the softmax.)"""
        return logits.sigmoid()


def as_probabilities(targets: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as one-hot rows (B, K); what is (B, K) already stays."""
    if targets.ndim == 2:
        return targets
    return (targets[:, None] == torch.arange(num_classes, device=targets.device)).float()


def smooth(target: Tensor, label_smoothing: float) -> Tensor:
    """A share of the target (B, K) spread over all classes."""
    return (1 - label_smoothing) * target + label_smoothing / target.shape[1]


def weighted_mean(losses: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """The mean over samples (B,); with class weights w, a sample counts w_k times, or sum_k w_k target_k if mixed."""
    return losses.mean() if class_weights is None else (losses * (target * class_weights).sum(1)).mean()


def as_buffer(class_weights: list[float] | None) -> Tensor | None:
    """Class weights (K,), to go where the loss goes."""
    return None if class_weights is None else torch.tensor(class_weights)


def balanced_weights(labels: Tensor, num_classes: int) -> list[float]:
    """Class weights n / (K n_k), inverse to how often a class occurs; their mean over samples is 1 if none is empty."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return (len(labels) / (num_classes * counts.double())).tolist()
