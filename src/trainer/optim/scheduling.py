"""Schedules as the loop uses them: they set the learning rate of each parameter group before a step.

FactorSchedule    a pure function of `optim.schedules`; it has no state
Plateau           lowers the factor if a metric stops improving
TorchScheduler    wraps a scheduler of `torch.optim.lr_scheduler`
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trainer.monitor.metrics import improves
from trainer.optim.schedules import Factor, ramp, require


class Schedule(Protocol):
    """The methods of a schedule that the loop calls."""

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rates for the update that leads to `step + 1`."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Use the metrics of an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""


class FactorSchedule:
    """A pure factor on the base learning rate of each group, and for one-cycle also a momentum; it has no state.

    The momentum of a group stays unchanged if the group has none, or 0.
    """

    def __init__(
        self,
        factor: Factor,
        *,
        base_lrs: list[float],
        total_steps: int,
        warmup_steps: int,
        momentum: Factor | None = None,
    ) -> None:
        self.factor, self.momentum = factor, momentum
        self.base_lrs, self.total_steps, self.warmup_steps = base_lrs, total_steps, warmup_steps

    def apply(self, optimizer: Optimizer, step: int) -> None:
        factor = self.factor(step, self.total_steps, self.warmup_steps)
        for group, base_lr in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
            if self.momentum is not None and momentum_of(group):
                set_momentum(group, self.momentum(step, self.total_steps, self.warmup_steps))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: a pure function uses no metrics."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""


class Plateau:
    """Reduces the factor if `monitor` has not improved for more than `patience` evaluations, as ReduceLROnPlateau."""

    def __init__(
        self,
        *,
        monitor: str,
        mode: str,
        factor: float,
        patience: int,
        min_delta: float,
        minimum: float = 0.0,
        base_lrs: list[float],
        warmup_steps: int,
    ) -> None:
        require("factor", factor, 0 < factor < 1, "must be in (0, 1)")
        require("patience", patience, patience >= 0, "must be an integer >= 0")
        require("min_delta", min_delta, min_delta >= 0, "must be >= 0")
        require("minimum", minimum, 0 <= minimum < 1, "must be in [0, 1)")
        self.monitor, self.mode = monitor, mode
        self.decay, self.patience, self.min_delta, self.minimum = factor, patience, min_delta, minimum
        self.base_lrs, self.warmup_steps = base_lrs, warmup_steps
        self.current, self.waited = 1.0, 0
        self.best: float | None = None

    def apply(self, optimizer: Optimizer, step: int) -> None:
        for group, base_lr in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * ramp(step, self.warmup_steps) * self.current

    def observe(self, metrics: Mapping[str, float]) -> None:
        value = metrics[self.monitor]
        if improves(value, self.best, mode=self.mode, min_delta=self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.current, self.waited = max(self.minimum, self.current * self.decay), 0

    def state_dict(self) -> dict[str, Any]:
        return {"current": self.current, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.current, self.best, self.waited = state["current"], state["best"], state["waited"]


class TorchScheduler:
    """A scheduler of torch, stepped at each step or epoch. A checkpoint has its state and the learning rates."""

    def __init__(self, scheduler: LRScheduler, *, interval: str, steps_per_epoch: int) -> None:
        self.scheduler = scheduler
        self.every = steps_per_epoch if interval == "epoch" else 1
        self.momenta = [momentum_of(group) for group in scheduler.optimizer.param_groups]  # the initial values

    def apply(self, optimizer: Optimizer, step: int) -> None:
        # The scheduler has counted step // every intervals, or one fewer at the start of an interval.
        if step // self.every > self.scheduler.last_epoch:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # a resumed optimizer has made steps before
            self.scheduler.step()

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: these schedulers use no metrics."""

    def state_dict(self) -> dict[str, Any]:
        # No dicts: JSON would turn the integer keys of MultiStepLR's milestones, which the config has, into text.
        plain = (int, float, str, bool, list, tuple, type(None))
        own = {key: value for key, value in self.scheduler.state_dict().items() if isinstance(value, plain)}
        own.pop("base_lrs", None)  # the config has them, and a resume may change them
        groups = [
            {"lr": group["lr"], "initial_lr": group["initial_lr"], "momentum": momentum_of(group), "from": momentum}
            for group, momentum in zip(self.scheduler.optimizer.param_groups, self.momenta, strict=True)
        ]
        return {"scheduler": own, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        for group, saved in zip(self.scheduler.optimizer.param_groups, state["groups"], strict=True):
            # In this order: if the base learning rate is the same, the ratio is exactly 1 and no bit changes.
            group["lr"] = saved["lr"] * (group["initial_lr"] / saved["initial_lr"])
            if saved["momentum"] != saved.get("from"):  # else the config has it, and a resume may change it
                set_momentum(group, saved["momentum"])


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Set the momentum of a group; for Adam and its variants, this is beta1."""
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


def momentum_of(group: Mapping[str, Any]) -> float | None:
    """Return the momentum or beta1 of a group; None for an update rule without momentum."""
    return group["betas"][0] if "betas" in group else group.get("momentum")
