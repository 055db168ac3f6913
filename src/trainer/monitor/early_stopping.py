"""Early stopping: decide after each evaluation whether training should stop.

Patience (Prechelt 1998): training stops `patience` epochs after the best epoch. Geometric patience, as in the Theano
tutorials ("patience_increase"): a late best epoch extends the run, and training stops after epoch e if

    e >= max(patience, geometric x best epoch)
"""

from collections.abc import Mapping
from typing import Any

from trainer.monitor.metrics import improves


class EarlyStopping:
    """Monitors one metric; with `patience=None` it never stops. Epochs are epochs done, and may be fractions."""

    def __init__(
        self, *, monitor: str, mode: str, patience: int | None, min_delta: float = 0.0, geometric: float | None = None
    ) -> None:
        self.monitor, self.mode = monitor, mode
        self.patience, self.min_delta, self.geometric = patience, min_delta, geometric
        self.best: float | None = None
        self.best_epoch = 0.0
        self.epoch = 0.0  # of the last evaluation

    def observe(self, value: float, epoch: float) -> None:
        """Process the monitored metric of an evaluation after `epoch` epochs; NaN counts as no improvement."""
        self.epoch = epoch
        if improves(value, self.best, mode=self.mode, min_delta=self.min_delta):
            self.best, self.best_epoch = value, epoch

    @property
    def stopped(self) -> bool:
        """Return whether training should stop after the last evaluation."""
        if self.patience is None:
            return False
        if self.geometric is None:
            end = self.best_epoch + self.patience
        else:
            end = max(self.patience, self.geometric * self.best_epoch)
        return self.epoch >= end - 1e-6  # a tolerance for rounding: 14/3 - 8/3 may be slightly less than 2

    @property
    def reason(self) -> str:
        """Return why training stopped, as one sentence for the log."""
        best = "" if self.best is None else f" ({self.best:.4f})"
        return f"early stopping: {self.monitor} has not improved since epoch {self.best_epoch:g}{best}"

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. If the monitored metric or its mode has changed, patience starts at that epoch."""
        self.epoch = self.best_epoch = state["epoch"]
        if (state["monitor"], state["mode"]) == (self.monitor, self.mode):
            self.best, self.best_epoch = state["best"], state["best_epoch"]
