"""Learning-rate range test: the learning rate grows geometrically from step to step until the loss explodes.

Source: Smith 2017, Cyclical Learning Rates for Training Neural Networks, section 3.3.

The loss is smoothed by an exponential moving average. The suggestion is the learning rate at the lowest smoothed loss,
divided by DIVISOR: at the lowest loss itself, the steps are about to diverge, and a schedule keeps its peak for many
steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count

from core.errors import NumericalError
from core.seeding import fold
from data.loading.loaders import TrainLoader
from trainer.loop import reseed
from trainer.training import Training

SMOOTHING = 0.9  # share of the moving average that a step keeps
EXPLODED = 3.0  # the test ends if the smoothed loss is this many times its minimum
DIVISOR = 2.5


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """The suggested learning rate and why."""

    lr: float
    reason: str


def range_test(training: Training, *, lowest: float, highest: float, steps: int) -> list[tuple[float, float]]:
    """Return (learning rate, loss) of each step; the list ends early if the loss explodes or is not finite.

    The training is used up: its weights are those after the test.
    """
    state, loader = training.state, training.train_loader
    assert isinstance(loader, TrainLoader)
    batches = chain.from_iterable(loader.steps(epoch) for epoch in count())
    base = [group["lr"] for group in state.optimizer.param_groups]
    curve: list[tuple[float, float]] = []
    state.model.train()
    for step in range(steps):
        lr = lowest * (highest / lowest) ** (step / max(1, steps - 1))
        for group, of_group in zip(state.optimizer.param_groups, base, strict=True):
            group["lr"] = lr * of_group / base[0]
        reseed(fold(training.settings.seed, "dropout", step), training.device)
        try:
            state.advance(training.step(next(batches)).samples)
            loss = float(state.sums.read()["loss"])
        except NumericalError:
            break
        training.step.clear_gradients()
        if not math.isfinite(loss):
            break
        curve.append((lr, loss))
        smoothed = smooth([loss for _, loss in curve])
        if step > 10 and smoothed[-1] > EXPLODED * min(smoothed):
            break
    return curve


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average of losses, corrected for its start."""
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**number))
    return smoothed


def suggest(curve: Sequence[tuple[float, float]]) -> Suggestion | None:
    """Return the suggestion from the curve of a range test; None if the loss does not fall by 2%."""
    if len(curve) < 10:
        return None
    rates, smoothed = [lr for lr, _ in curve], smooth([loss for _, loss in curve])
    best = min(range(len(smoothed)), key=smoothed.__getitem__)
    if smoothed[best] > 0.98 * max(smoothed[: best + 1]):
        return None
    reason = f"1 / {DIVISOR:g} of {rates[best]:.2g}, where the smoothed loss is lowest"
    return Suggestion(lr=float(f"{rates[best] / DIVISOR:.2g}"), reason=reason)
