"""Calibration: whether a predicted probability of 90% is right in 90% of the cases.

    expected calibration error = sum over bins of (share of the images) x |accuracy - mean probability|

The temperature T minimises the cross-entropy of softmax(logits / T) on the same images. T > 1: the model is too
confident. Source: Guo et al. 2017, On Calibration of Modern Neural Networks, sections 2 and 4.2.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from torch import Tensor

BINS = 15  # as in the paper


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The reliability of the probabilities of the predicted classes.

    confidence, accuracy, counts   of each bin of equal width: (BINS,); NaN in an empty bin
    error                          expected calibration error, 0 to 1
    temperature                    the T that minimises the cross-entropy
    error_after                    expected calibration error with that temperature
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    error: float
    temperature: float
    error_after: float


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """Return the calibration of logits (N, K) on labels (N,)."""
    confidence, accuracy, counts = reliability(logits, labels)
    temperature = best_temperature(logits, labels)
    return Calibration(
        confidence=confidence,
        accuracy=accuracy,
        counts=counts,
        error=expected_error(confidence, accuracy, counts),
        temperature=temperature,
        error_after=expected_error(*reliability(logits / temperature, labels)),
    )


def reliability(logits: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean probability, accuracy and number of images of each bin of the predicted class's probability."""
    probability, predicted = logits.double().softmax(1).max(1)
    bins = (probability * BINS).ceil().clamp(
        1, BINS
    ).long() - 1  # bin m has probabilities in (m / BINS, (m + 1) / BINS]
    counts = bins.bincount(minlength=BINS)
    correct = (predicted == labels).double()
    confidence = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, probability) / counts
    accuracy = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct) / counts
    return confidence.numpy(), accuracy.numpy(), counts.numpy()


def expected_error(confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray) -> float:
    """Return the expected calibration error of bins; empty bins count as 0."""
    return float(np.nansum(np.abs(accuracy - confidence) * counts) / counts.sum())


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature, 0.05 to 20, that minimises the cross-entropy of logits (N, K) on labels (N,)."""
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits / float(np.exp(log_temperature)), labels).item()

    result = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(result.x))
