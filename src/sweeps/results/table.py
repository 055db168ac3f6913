"""The terminal output of a sweep: one line per event, and below them a live table if stdout is a terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid

from sweeps.define.plan import Plan
from sweeps.define.space import point
from sweeps.execute.running import Running
from sweeps.execute.store import Store
from sweeps.results.ranking import brief, is_feasible, metric_names, outcome, ranked, spread

LIVE_ROWS = 5  # best trials in the live table


class Table:
    """Prints messages, and shows the best trials so far, the running trials and the remaining time.

    Use it as a context manager: the live table exists only within `with`.
    """

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.begun = time.monotonic()
        self.last_update = self.begun  # of the live table
        self.done_here = 0  # trials that this process has finished

    def __enter__(self) -> "Table":
        done = sum(trial.state.is_finished() for trial in self.store.trials())
        self.say(f"{self.plan.trials} trials, {done} done -> {self.plan.folder}")
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a line above the live table."""
        self.console.print(text, markup=False)

    def print_outcome(self, running: Running, attributes: Mapping[str, Any]) -> None:
        """Print the line of a trial that has finished: outcome, objectives, wall time in seconds, sampled values.

        `attributes` are the user attributes of the trial in the store.
        """
        self.done_here += 1
        metrics = attributes.get("metrics", {})
        values = "  ".join(f"{name} {metrics[name]:.4f}" for _, name in self.plan.objectives if name in metrics)
        violated = any(
            constraint.violation(metrics[constraint.metric]) > 0
            for constraint in self.plan.constraints
            if constraint.metric in metrics
        )
        kind = "infeasible" if violated and attributes["outcome"] == "complete" else attributes["outcome"]
        point_text = "  ".join(f"{key}={brief(value)}" for key, value in running.point.items())
        number = running.trial.number
        self.say(f"trial {number:4} {kind:10} {values:22} {attributes['wall']:6.1f} s  {point_text}")

    def show(self, running: Mapping[int, Running]) -> None:
        """Update the live table, at most twice per second. `running` are the running trials by slot."""
        if self.live is None or time.monotonic() - self.last_update < 0.5:
            return
        self.last_update = time.monotonic()
        trials = self.store.trials()
        running_table = Grid(
            "trial", "running", "epoch", *(name for _, name in self.plan.objectives), "s", title="running"
        )
        for slot in running.values():
            report = slot.last_report.get("report", {})
            metrics = [f"{report[name]:.4f}" if name in report else "" for _, name in self.plan.objectives]
            point_text = " ".join(f"{key}={brief(value)}" for key, value in slot.point.items())
            seconds = f"{time.monotonic() - slot.begun:.0f}"
            running_table.add_row(str(slot.trial.number), point_text, str(report.get("epoch", "")), *metrics, seconds)
        best_table = leaderboard(self.plan, trials, rows=LIVE_ROWS)
        self.live.update(Group(best_table, running_table, self.progress(trials)), refresh=True)

    def progress(self, trials: list[FrozenTrial]) -> str:
        """Return the number of finished trials, the number per outcome, and the remaining time, as text.

        The remaining time is extrapolated from the trials that this process has finished.
        """
        outcomes = [outcome(trial) for trial in trials if trial.state.is_finished()]
        parts = [f"{len(outcomes)} of {self.plan.trials} done"]
        kinds = ("infeasible", "pruned", "diverged", "failed")
        parts += [f"{outcomes.count(kind)} {kind}" for kind in kinds if kind in outcomes]
        left = self.plan.trials - len(outcomes)
        if self.done_here and left > 0:
            seconds = (time.monotonic() - self.begun) / self.done_here * left
            parts.append(f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left")
        return ", ".join(parts)


def leaderboard(plan: Plan, trials: list[FrozenTrial], *, rows: int) -> Grid:
    """Return the table of the best `rows` complete trials: metrics, as mean ± sd over seeds, and sampled values."""
    names = metric_names(plan)
    table = Grid("trial", *names, *(dimension.key for dimension in plan.space), title="best", title_justify="left")
    for trial in ranked(plan, trials)[:rows]:
        values = point(plan.space, trial.params)
        metrics = [spread(trial, name) for name in names]
        number = str(trial.number) if is_feasible(trial) else f"{trial.number} infeasible"
        table.add_row(number, *metrics, *(brief(values.get(dimension.key, "")) for dimension in plan.space))
    return table
