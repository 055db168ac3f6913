"""A trial that runs here: its process, and the newest messages that it sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import Trial

from sweeps.execute.pool import Process


@dataclass
class Running:
    """A trial that runs here."""

    trial: Trial
    point: dict[str, Any]
    process: Process
    begun: float
    last_report: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] | None = None  # its last message: a result, an error, or that it was stopped

    def keep_report(self, message: Mapping[str, Any]) -> None:
        """Keep the report of an evaluation in place of the one before."""
        self.last_report = message

    def keep_outcome(self, message: Mapping[str, Any]) -> None:
        """Keep how the trial ended, until its process has."""
        self.outcome = message
