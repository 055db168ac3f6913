"""Durations in optimizer steps. The step is the only counter: durations are converted when a training is built."""

import math

from core.options.rules import DURATION


def to_steps(duration: str, *, steps_per_epoch: int, samples_per_epoch: int, total_steps: int) -> int:
    """Return a duration in optimizer steps, at least 1: "2 epochs", "100 steps", "5000 samples" or "10%" of the run."""
    match = DURATION.match(duration)
    if match is None:
        raise ValueError(f"no duration: {duration!r}")
    amount = float(match[1])
    per_unit = {
        "step": 1.0,
        "epoch": float(steps_per_epoch),
        "sample": steps_per_epoch / samples_per_epoch,
        "%": total_steps / 100,
    }[match[2].rstrip("s")]
    steps = amount * per_unit
    # Shares are rounded up, so that ten times "10%" ends at the end of the run, not some steps before it.
    return max(1, math.ceil(steps - 1e-9) if match[2] == "%" else round(steps))


def due(step: int, every: int | None, *, total_steps: int | None = None) -> bool:
    """Return whether `step` is a multiple of `every`, or the last step if `total_steps` is given."""
    return every is not None and (step % every == 0 or step == total_steps)


def total_steps(*, max_epochs: int | None, max_steps: int | None, steps_per_epoch: int) -> int | None:
    """Return the smaller of the two limits in steps, or None if neither is set."""
    budgets = [max_epochs and max_epochs * steps_per_epoch, max_steps]
    return min((budget for budget in budgets if budget), default=None)


def warmup_steps(epochs: float, *, steps_per_epoch: int) -> int:
    """Return a warm-up in steps; epochs may be a fraction."""
    return math.ceil(epochs * steps_per_epoch)


def epochs_at(step: int, steps_per_epoch: int) -> float:
    """Return the epochs done after a step: 3 after the third, 2.5 in the middle of the third."""
    epochs = step / steps_per_epoch
    return int(epochs) if epochs.is_integer() else round(epochs, 4)


def step_name(step: int, steps_per_epoch: int) -> str:
    """Return the name of a step in errors, with the epochs done before it."""
    return f"step {step} (epoch {epochs_at(step - 1, steps_per_epoch)})"
