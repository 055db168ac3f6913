"""Learning-rate schedules: pure functions of (step, total steps, warm-up steps) -> factor on each group's own rate.

    1 |    /‾‾‾\\__           the factor at `step` holds for the update that leads to `step + 1`;
      |   /       \\_         warm-up climbs linearly, and the schedule's shape covers the steps behind it
    0 |__/          \\__
       warm-up   shape

Shapes are stretched over the run: their parameters are shares of the steps behind the warm-up, from 0 to 1. So a run
that is resumed with a larger `max_epochs` goes on where the longer run would be, at a higher rate perhaps than it had
come down to; only constant and plateau are the same for any length. (A curve that goes by epochs: schedule=torch.)

`Plateau` alone has a memory. A scheduler of `torch.optim.lr_scheduler` can be named instead (`TorchScheduler`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from core.errors import ConfigError
from trainer.monitor.metrics import improves

Factor = Callable[[int, int, int], float]


def ramp(step: int, warmup_steps: int) -> float:
    """The warm-up: (step + 1) / (warm-up steps + 1) while it lasts, then 1."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """The share of the steps behind the warm-up that is done, from 0 at its end to 1 at the end of the run."""
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))


def constant(step: int, total_steps: int, warmup_steps: int) -> float:
    """1, after the warm-up."""
    return ramp(step, warmup_steps)


def step_decay(step: int, total_steps: int, warmup_steps: int, *, every: float, gamma: float) -> float:
    """gamma^k after k falls, one at each `every` (a share in (0, 1]) of the run behind the warm-up."""
    _require("every", every, 0 < every <= 1, "must be a share of the run in (0, 1]")
    _require("gamma", gamma, 0 < gamma <= 1, "must be in (0, 1]")
    # A hair's breadth added: a third of the run, written 0.3333, falls at the step that is meant.
    falls = math.floor(progress(step, total_steps, warmup_steps) / every + 1e-6)
    return ramp(step, warmup_steps) * gamma**falls


def multistep(
    step: int, total_steps: int, warmup_steps: int, *, milestones: Sequence[float], gamma: float = 0.1
) -> float:
    """gamma^k after the first k milestones, each a share of the run behind the warm-up."""
    in_order = isinstance(milestones, Sequence) and all(
        type(share) in (int, float) and 0 < share < 1 and low < share
        for low, share in zip([0, *milestones], milestones, strict=False)
    )
    _require("milestones", milestones, in_order, "must be a list of growing shares of the run, each in (0, 1)")
    _require("gamma", gamma, 0 < gamma <= 1, "must be in (0, 1]")
    done = progress(step, total_steps, warmup_steps) + 1e-6  # a hair's breadth, as in step_decay
    return ramp(step, warmup_steps) * gamma ** sum(share <= done for share in milestones)


def exponential(step: int, total_steps: int, warmup_steps: int, *, final: float = 0.01) -> float:
    """final^progress: each step multiplies the rate by the same number, and the run ends at `final`."""
    _require("final", final, 0 < final <= 1, "must be in (0, 1]")
    return ramp(step, warmup_steps) * final ** progress(step, total_steps, warmup_steps)


def inverse_time(step: int, total_steps: int, warmup_steps: int, *, decay: float = 99.0) -> float:
    """1 / (1 + decay progress), ending at 1 / (1 + decay): fast at first, then slower and slower.

    Source: Bottou 2012, Stochastic Gradient Descent Tricks, section 5.2: rate / (1 + rate lambda t).
    """
    _require("decay", decay, decay >= 0, "must be >= 0")
    return ramp(step, warmup_steps) / (1 + decay * progress(step, total_steps, warmup_steps))


def polynomial(step: int, total_steps: int, warmup_steps: int, *, power: float = 1.0, final: float = 0.0) -> float:
    """final + (1 - final) (1 - progress)^power; power 1 is a straight line down."""
    _require("power", power, power > 0, "must be > 0")
    _require("final", final, 0 <= final <= 1, "must be in [0, 1]")
    left = (1 - progress(step, total_steps, warmup_steps)) ** power
    return ramp(step, warmup_steps) * (final + (1 - final) * left)


def cosine(step: int, total_steps: int, warmup_steps: int, *, final: float = 0.0) -> float:
    """final + (1 - final) (1 + cos(pi progress)) / 2 (Loshchilov & Hutter 2017, equation 5)."""
    _require("final", final, 0 <= final <= 1, "must be in [0, 1]")
    half_wave = (1 + math.cos(math.pi * progress(step, total_steps, warmup_steps))) / 2
    return ramp(step, warmup_steps) * (final + (1 - final) * half_wave)


def cosine_restarts(
    step: int,
    total_steps: int,
    warmup_steps: int,
    *,
    periods: int = 3,
    multiplier: float = 2.0,
    final: float = 0.0,
) -> float:
    """Half cosines one after the other, each `multiplier` times as long as the one before; the last ends with the run.

    SGDR (Loshchilov & Hutter 2017, equation 5 and section 3). The paper gives the first period's length instead, here
    the run's times (m - 1) / (m^periods - 1): periods 3 and multiplier 2 are its T_0 = 10 and T_mult = 2 at 70 epochs.
    """
    _require("periods", periods, type(periods) is int and periods >= 1, "must be an integer >= 1")
    _require("multiplier", multiplier, multiplier >= 1, "must be >= 1")
    _require("final", final, 0 <= final <= 1, "must be in [0, 1]")
    lengths = [multiplier**number for number in range(periods)]  # in units of the first one
    place = progress(step, total_steps, warmup_steps) * sum(lengths)
    while len(lengths) > 1 and place > lengths[0] - 1e-6:  # a hair's breadth, as in step_decay
        place -= lengths.pop(0)
    half_wave = (1 + math.cos(math.pi * place / lengths[0])) / 2
    return ramp(step, warmup_steps) * (final + (1 - final) * half_wave)


def one_cycle(
    step: int,
    total_steps: int,
    warmup_steps: int,
    *,
    rise: float = 0.3,
    start_divisor: float = 25.0,
    final_divisor: float = 1e4,
) -> float:
    """Smith 2018, with cosine flanks as in torch's OneCycleLR: 1/start_divisor -> 1 -> 1/(start x final_divisor)."""
    _require("rise", rise, 0 < rise < 1, "must be a share of the run in (0, 1)")
    _require("start_divisor", start_divisor, start_divisor >= 1, "must be >= 1")
    _require("final_divisor", final_divisor, final_divisor >= 1, "must be >= 1")
    start, end = 1 / start_divisor, 1 / (start_divisor * final_divisor)
    position, turn = _cycle(step, total_steps, warmup_steps, rise)
    if position <= turn:
        return _cosine_between(start, 1.0, position / turn)
    return _cosine_between(1.0, end, (position - turn) / (1 - turn))


def one_cycle_momentum(
    step: int, total_steps: int, warmup_steps: int, *, low: float, high: float, rise: float = 0.3
) -> float:
    """Momentum runs against the rate: high -> low -> high."""
    position, turn = _cycle(step, total_steps, warmup_steps, rise)
    if position <= turn:
        return _cosine_between(high, low, position / turn)
    return _cosine_between(low, high, (position - turn) / (1 - turn))


def _cycle(step: int, total_steps: int, warmup_steps: int, rise: float) -> tuple[float, float]:
    """Where in the cycle we are and where it turns, both as shares in [0, 1]; the last step is at 1."""
    last = max(1, total_steps - 1)
    turn = (warmup_steps or rise * total_steps - 1) / last
    return min(1.0, step / last), min(max(turn, 1e-9), 1 - 1e-9)


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(name, allowed, value=value)


class Schedule(Protocol):
    """What the loop knows of a schedule."""

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the rates for the update that leads to `step + 1`."""

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""

    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""


class FactorSchedule:
    """A pure factor on each group's base rate, and for one-cycle a momentum > 0; nothing to remember.

    A group without momentum, or whose own is 0, stays without.
    """

    def __init__(
        self,
        factor: Factor,
        *,
        base_rates: list[float],
        total_steps: int,
        warmup_steps: int,
        momentum: Factor | None = None,
    ) -> None:
        self.factor, self.momentum = factor, momentum
        self.base_rates, self.total_steps, self.warmup_steps = base_rates, total_steps, warmup_steps

    def apply(self, optimizer: Optimizer, step: int) -> None:
        factor = self.factor(step, self.total_steps, self.warmup_steps)
        for group, rate in zip(optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
            if self.momentum is not None and momentum_of(group):
                set_momentum(group, self.momentum(step, self.total_steps, self.warmup_steps))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """A pure function watches nothing."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is none."""


class Plateau:
    """The factor falls when `monitor` has not improved for more than `patience` evaluations (as ReduceLROnPlateau)."""

    def __init__(
        self,
        *,
        monitor: str,
        mode: str,
        factor: float,
        patience: int,
        min_delta: float,
        minimum: float = 0.0,
        base_rates: list[float],
        warmup_steps: int,
    ) -> None:
        _require("factor", factor, 0 < factor < 1, "must be in (0, 1)")
        _require("patience", patience, patience >= 0, "must be an integer >= 0")
        _require("min_delta", min_delta, min_delta >= 0, "must be >= 0")
        _require("minimum", minimum, 0 <= minimum < 1, "must be in [0, 1)")
        self.monitor, self.mode = monitor, mode
        self.decay, self.patience, self.min_delta, self.minimum = factor, patience, min_delta, minimum
        self.base_rates, self.warmup_steps = base_rates, warmup_steps
        self.current, self.waited = 1.0, 0
        self.best: float | None = None

    def apply(self, optimizer: Optimizer, step: int) -> None:
        for group, rate in zip(optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * ramp(step, self.warmup_steps) * self.current

    def observe(self, metrics: Mapping[str, float]) -> None:
        value = metrics[self.monitor]
        if improves(value, self.best, mode=self.mode, min_delta=self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.current, self.waited = max(self.minimum, self.current * self.decay), 0

    def state(self) -> dict[str, Any]:
        return {"current": self.current, "best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.current, self.best, self.waited = state["current"], state["best"], state["waited"]


class TorchScheduler:
    """A scheduler of torch's, stepped at each step or epoch; its own state and the groups' rates are kept."""

    def __init__(self, scheduler: LRScheduler, *, interval: str, steps_per_epoch: int) -> None:
        self.scheduler = scheduler
        self.every = steps_per_epoch if interval == "epoch" else 1
        self.momenta = [momentum_of(group) for group in scheduler.optimizer.param_groups]  # where it moves them from

    def apply(self, optimizer: Optimizer, step: int) -> None:
        # The scheduler has counted step // every intervals already, or is one behind at the start of a new one.
        if step // self.every > self.scheduler.last_epoch:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # it was; a resumed optimizer cannot know
            self.scheduler.step()

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Torch's schedulers of time watch nothing."""

    def state(self) -> dict[str, Any]:
        # No dict: MultiStepLR's milestones, which are the config's, would come back from JSON with keys of text.
        plain = (int, float, str, bool, list, tuple, type(None))
        own = {key: value for key, value in self.scheduler.state_dict().items() if isinstance(value, plain)}
        own.pop("base_lrs", None)  # the config's, which a resume may change
        groups = [
            {"lr": group["lr"], "initial_lr": group["initial_lr"], "momentum": momentum_of(group), "from": momentum}
            for group, momentum in zip(self.scheduler.optimizer.param_groups, self.momenta, strict=True)
        ]
        return {"scheduler": own, "groups": groups}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        for group, saved in zip(self.scheduler.optimizer.param_groups, state["groups"], strict=True):
            # In this order: where the base rate is the same, the ratio is exactly 1 and no bit is lost.
            group["lr"] = saved["lr"] * (group["initial_lr"] / saved["initial_lr"])
            if saved["momentum"] != saved.get("from"):  # or it is the config's, which a resume may change
                set_momentum(group, saved["momentum"])


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Momentum of a group; for Adam's kin that is beta1."""
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


def momentum_of(group: Mapping[str, Any]) -> float | None:
    """A group's momentum or beta1, or None for an update rule without."""
    return group["betas"][0] if "betas" in group else group.get("momentum")
