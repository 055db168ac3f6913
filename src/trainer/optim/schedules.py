"""Learning-rate schedules: functions of (step, total steps, warm-up steps) -> factor on a group's learning rate.

    1 |    /‾‾‾\\__           the factor at `step` applies to the update that leads to `step + 1`;
      |   /       \\_         the warm-up increases linearly; the shape covers the steps after it
    0 |__/          \\__
       warm-up   shape

Shapes are stretched over the run: their parameters are shares, from 0 to 1, of the steps after the warm-up. So a run
that is resumed with a larger `max_epochs` continues with the learning rates of the longer run, which may be higher than
its last one. Only constant and plateau do not depend on the length. (For schedules in epochs: schedule=torch.)

`optim.scheduling` applies them to an optimizer, and has the schedules with state: plateau and torch's.
"""

import math
from collections.abc import Callable, Sequence

from core.errors import ConfigError

Factor = Callable[[int, int, int], float]


def ramp(step: int, warmup_steps: int) -> float:
    """Return the factor of the warm-up: (step + 1) / (warm-up steps + 1) during the warm-up, then 1."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the share of the steps after the warm-up that are done: 0 at its end, 1 at the end of the run."""
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))


def constant(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return 1 after the warm-up."""
    return ramp(step, warmup_steps)


def step_decay(step: int, total_steps: int, warmup_steps: int, *, every: float, gamma: float) -> float:
    """Return gamma^k after k reductions, one per `every`, a share in (0, 1] of the run after the warm-up."""
    require("every", every, 0 < every <= 1, "must be a share of the run in (0, 1]")
    require("gamma", gamma, 0 < gamma <= 1, "must be in (0, 1]")
    # A small tolerance: with every=0.3333, the reduction is at the intended step.
    reductions = math.floor(progress(step, total_steps, warmup_steps) / every + 1e-6)
    return ramp(step, warmup_steps) * gamma**reductions


def multistep(
    step: int, total_steps: int, warmup_steps: int, *, milestones: Sequence[float], gamma: float = 0.1
) -> float:
    """Return gamma^k after the first k milestones, each a share of the run after the warm-up."""
    in_order = isinstance(milestones, Sequence) and all(
        type(share) in (int, float) and 0 < share < 1 and low < share
        for low, share in zip([0, *milestones], milestones, strict=False)
    )
    require("milestones", milestones, in_order, "must be a list of increasing shares of the run, each in (0, 1)")
    require("gamma", gamma, 0 < gamma <= 1, "must be in (0, 1]")
    done = progress(step, total_steps, warmup_steps) + 1e-6  # a small tolerance, as in step_decay
    return ramp(step, warmup_steps) * gamma ** sum(share <= done for share in milestones)


def exponential(step: int, total_steps: int, warmup_steps: int, *, final: float = 0.01) -> float:
    """Return final^progress: each step multiplies the learning rate by the same factor; the run ends at `final`."""
    require("final", final, 0 < final <= 1, "must be in (0, 1]")
    factor: float = final ** progress(step, total_steps, warmup_steps)
    return ramp(step, warmup_steps) * factor


def inverse_time(step: int, total_steps: int, warmup_steps: int, *, decay: float = 99.0) -> float:
    """Return 1 / (1 + decay progress), which ends at 1 / (1 + decay): it decreases fast at first, then more slowly.

    Source: Bottou 2012, Stochastic Gradient Descent Tricks, section 5.2: lr / (1 + lr lambda t).
    """
    require("decay", decay, decay >= 0, "must be >= 0")
    return ramp(step, warmup_steps) / (1 + decay * progress(step, total_steps, warmup_steps))


def polynomial(
    step: int,
    total_steps: int,
    warmup_steps: int,
    *,
    power: float = 1.0,
    final: float = 0.0,
    warmup_start: float = 0.0,
) -> float:
    """Return final + (1 - final) (1 - progress)^power, a line for power 1; the warm-up begins near `warmup_start`."""
    require("warmup_start", warmup_start, 0 <= warmup_start < 1, "must be in [0, 1)")
    require("power", power, power > 0, "must be > 0")
    require("final", final, 0 <= final <= 1, "must be in [0, 1]")
    left: float = (1 - progress(step, total_steps, warmup_steps)) ** power
    warmup = warmup_start + (1 - warmup_start) * ramp(step, warmup_steps)
    return warmup * (final + (1 - final) * left)


def cosine(step: int, total_steps: int, warmup_steps: int, *, final: float = 0.0) -> float:
    """Return final + (1 - final) (1 + cos(pi progress)) / 2 (Loshchilov & Hutter 2017, equation 5)."""
    require("final", final, 0 <= final <= 1, "must be in [0, 1]")
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
    """Return half cosines in sequence, each `multiplier` times as long as the previous one; the last ends with the run.

    SGDR (Loshchilov & Hutter 2017, equation 5 and section 3). The paper sets the length of the first period, which here
    is the run's times (m - 1) / (m^periods - 1): periods 3 and multiplier 2 are T_0 = 10 and T_mult = 2 at 70 epochs.
    """
    require("periods", periods, type(periods) is int and periods >= 1, "must be an integer >= 1")
    require("multiplier", multiplier, multiplier >= 1, "must be >= 1")
    require("final", final, 0 <= final <= 1, "must be in [0, 1]")
    lengths = [multiplier**number for number in range(periods)]  # in units of the first period
    position = progress(step, total_steps, warmup_steps) * sum(lengths)
    while len(lengths) > 1 and position > lengths[0] - 1e-6:  # a small tolerance, as in step_decay
        position -= lengths.pop(0)
    half_wave = (1 + math.cos(math.pi * position / lengths[0])) / 2
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
    """Return the one-cycle factor (Smith 2018), with cosines as in torch's OneCycleLR.

    It goes from 1 / start_divisor to 1, and then to 1 / (start_divisor * final_divisor).
    """
    require("rise", rise, 0 < rise < 1, "must be a share of the run in (0, 1)")
    require("start_divisor", start_divisor, start_divisor >= 1, "must be >= 1")
    require("final_divisor", final_divisor, final_divisor >= 1, "must be >= 1")
    start, end = 1 / start_divisor, 1 / (start_divisor * final_divisor)
    position, turn = _cycle(step, total_steps, warmup_steps, rise)
    if position <= turn:
        return _cosine_between(start, 1.0, position / turn)
    return _cosine_between(1.0, end, (position - turn) / (1 - turn))


def one_cycle_momentum(
    step: int, total_steps: int, warmup_steps: int, *, low: float, high: float, rise: float = 0.3
) -> float:
    """Return the momentum of one-cycle, opposite to the learning rate: high -> low -> high."""
    position, turn = _cycle(step, total_steps, warmup_steps, rise)
    if position <= turn:
        return _cosine_between(high, low, position / turn)
    return _cosine_between(low, high, (position - turn) / (1 - turn))


def _cycle(step: int, total_steps: int, warmup_steps: int, rise: float) -> tuple[float, float]:
    """Return the position in the cycle and that of its maximum, as shares in [0, 1]; the last step is at 1."""
    last = max(1, total_steps - 1)
    turn = (warmup_steps or rise * total_steps - 1) / last
    return min(1.0, step / last), min(max(turn, 1e-9), 1 - 1e-9)


def _cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def require(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise ConfigError for the argument `name` unless `holds`."""
    if not holds:
        raise ConfigError(name, allowed, value=value)
