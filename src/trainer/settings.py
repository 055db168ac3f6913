"""The settings of the loop, as config and data determine them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every duration is in steps."""

    seed: int
    total_steps: int
    budget: str  # max_epochs or max_steps: the one that total_steps comes from
    max_minutes: float | None
    evaluate_every: int
    log_every: int
    histograms_every: int | None
    checkpoint_every: int | None
    checkpoint_keep: int | None
    monitor: str | None  # the metric that decides which checkpoint is the best
    monitor_mode: str
    tta: str  # none, mirror or mirror_shift
