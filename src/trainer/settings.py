"""The loop's numbers, as a run's config and its data determine them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every duration is in steps."""

    seed: int
    total_steps: int
    max_minutes: float | None
    evaluate_every: int
    log_every: int
    histograms_every: int | None
    checkpoint_every: int | None
    checkpoint_keep: int | None
    monitor: str | None  # the metric by which a checkpoint is the best
    monitor_mode: str
    clip_norm: float | None
    l1: float
    skips: bool  # a step that is not finite is skipped, rather than the run stopped
    tta: str  # none or mirror
    budget: str  # max_epochs or max_steps: which of them total_steps is
