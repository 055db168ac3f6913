"""Evidence on a run that has ended: learning curves, errors per split, config. `run_rules` turns it into findings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.intervals import margin_of


@dataclass(frozen=True, kw_only=True)
class SplitError:
    """The error of a model on a split: the share of wrong predictions among `samples` images."""

    wrong: int
    samples: int

    @property
    def share(self) -> float:
        """Return the error, 0 to 1."""
        return self.wrong / self.samples

    @property
    def margin(self) -> float:
        """Return half the width of the error's 95% interval."""
        return margin_of(self.share, self.samples)

    @property
    def variance(self) -> float:
        """Return the variance of the error, with one wrong and one right prediction added: it is never 0."""
        share = (self.wrong + 1) / (self.samples + 2)
        return share * (1 - share) / (self.samples + 2)


@dataclass(frozen=True, kw_only=True)
class RunEvidence:
    """What the rules know of a run.

    lines             the lines of metrics.jsonl
    status            of summary.json; None for a run that is running or was killed
    failure           the error of a failed run, or ""
    progress          share of the planned steps that were made, 0 to 1
    evaluated_step    the step of the evaluated weights
    errors            SplitError of the best weights by split, in evaluation mode, without augmentation
    losses            mean cross-entropy, likewise
    chance_error      the error of always predicting the most frequent class of the train split
    num_classes       number of classes
    predicted_share   share of the evaluated images that get the most predicted class
    human_error       0 to 1, or None if it is unknown
    config            the config of the run, as in config.yaml
    """

    lines: Sequence[Mapping[str, Any]]
    status: str | None
    failure: str = ""
    progress: float = 1.0
    evaluated_step: int = 0
    errors: Mapping[str, SplitError] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    chance_error: float
    num_classes: int
    predicted_share: float | None = None
    human_error: float | None = None
    config: Mapping[str, Any]

    def curve(self, name: str) -> list[float]:
        """Return a metric of every evaluation that has it."""
        return [float(line[name]) for line in self.lines if isinstance(line.get(name), int | float)]

    @property
    def lr(self) -> float:
        """Return the learning rate of the config."""
        return float(self.config["optimizer"]["lr"])

    @property
    def uniform_loss(self) -> float:
        """Return the cross-entropy of a uniform prediction."""
        return math.log(self.num_classes)

    @property
    def train_loss_of_steps(self) -> float | None:
        """Return the loss of the training steps in the epoch of the evaluated weights, if it was logged."""
        losses = [line.get("train/loss") for line in self.lines if line["step"] == self.evaluated_step]
        return float(losses[-1]) if losses and isinstance(losses[-1], int | float) else None

    @property
    def held_out(self) -> SplitError | None:
        """Return the error on other images of the training distribution; None if no such split was evaluated."""
        return next((self.errors[name] for name in ("train_dev", "val", "test") if name in self.errors), None)
