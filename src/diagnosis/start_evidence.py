"""Evidence on a training before its first step: model, first batch, splits. `model_rules` and `data_rules` use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """A layer with weights, in the order of the model.

    `gradient` is the root mean square of the gradient of its weights divided by that of the weights; `units_equal`:
    all output units have the same weights.
    """

    name: str
    gradient: float
    units_equal: bool


@dataclass(frozen=True, kw_only=True)
class ModelEvidence:
    """What is known of an initialised model.

    initial_loss      loss of the first batch, in evaluation mode for dropout
    overfit_loss      loss of one batch after some steps on it alone; None if it was not measured
    wrong_gradients   layers whose gradient is not that of the loss: {parameter: relative error}
    smallest_batch    samples of the smallest batch of an epoch
    has_batch_norm    whether a layer uses statistics of the batch
    input_mean, input_std   of the normalised first batch
    """

    layers: list[LayerEvidence]
    initial_loss: float
    overfit_loss: float | None
    wrong_gradients: Mapping[str, float]
    smallest_batch: int
    has_batch_norm: bool
    input_mean: float
    input_std: float
    num_classes: int
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataEvidence:
    """What is known of the splits.

    counts        number of images of each class: {split: {class: number}}
    duplicates    images of a held-out split that are also in the train split: {split: number of exact copies}
    near          likewise, of nearly equal images: {split: number}
    compared      images of each held-out split that were compared
    examples      pairs of duplicates, as text: {split: "a = b, ..."}
    constant      share of the images of a split whose pixels are all equal
    shifts        difference of the mean of an image statistic between a held-out split and the train split, in standard
                  deviations of the train split: {split: {statistic: difference}}
    """

    counts: Mapping[str, Mapping[str, int]]
    duplicates: Mapping[str, int] = field(default_factory=dict)
    near: Mapping[str, int] = field(default_factory=dict)
    compared: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    constant: Mapping[str, float] = field(default_factory=dict)
    shifts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    config: Mapping[str, Any]
