"""A trial that this sweep runs: its process, and the last messages that it sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import Trial

from sweeps.execute.pool import Process


@dataclass
class Running:
    """A trial that this sweep runs."""

    trial: Trial
    point: dict[str, Any]  # the sampled config values by key
    process: Process
    begun: float  # start time, in seconds of time.monotonic()
    last_report: Mapping[str, Any] = field(default_factory=dict)  # message of the last evaluation
    outcome: Mapping[str, Any] | None = None  # message with the key "result", "error" or "stopped"; None before it

    def keep_report(self, message: Mapping[str, Any]) -> None:
        """Store the report of an evaluation; it replaces the previous report."""
        self.last_report = message

    def keep_outcome(self, message: Mapping[str, Any]) -> None:
        """Store the outcome of the trial. The sweep evaluates it after the process has ended."""
        self.outcome = message
