"""The objects of a training that are built from a config, before any file is opened."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.inference.evaluation import Predictions, evaluate
from trainer.inference.tta import with_tta
from trainer.interfaces import Batches, EvalBatches, Step, StepLoader
from trainer.settings import Settings
from trainer.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects of a training; `trainer.build` creates them."""

    settings: Settings
    state: TrainState
    step: Step
    loss_function: nn.Module
    autocast: AbstractContextManager[object]
    train_loader: StepLoader
    val_loader: Batches | None
    test_loader: EvalBatches | None
    samples: Mapping[str, int]  # of each split that exists
    constant_accuracy: float | None  # on the test split, of always predicting its most frequent class
    device: torch.device
    channels_last: bool  # the memory layout of images and weights
    record: Mapping[str, Any]  # the config for files, without values of environment variables
    weights_report: list[str]  # what `init_from` loaded, one fact per line

    def measure(
        self, batches: Batches, *, abandon: Callable[[], bool], predictions: Predictions | None = None
    ) -> dict[str, float] | None:
        """Return loss and accuracy of the evaluated model, or None if `abandon` becomes true meanwhile.

        If there are `predictions`, those of each batch are added.
        """
        model = with_tta(self.state.evaluated_model, self.settings.tta)
        observers = {} if predictions is None else {"observe": predictions.add}
        return evaluate(model, self.loss_function, batches, autocast=self.autocast, abandon=abandon, **observers)
