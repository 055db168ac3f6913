"""The content of summary.json."""

from collections.abc import Mapping
from typing import Any

from trainer.training import Training


def summary_of(
    training: Training, *, status: str, reason: str, test: Mapping[str, float], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the summary of a run that has ended or was stopped; `reason` is why."""
    state, clock = training.state, training.state.clock
    return {
        "status": status,
        "stop_reason": reason,
        "step": state.step,
        "epoch": state.epoch,
        "best": state.best,
        "test": dict(test),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "samples": training.samples,
        "seconds": round(clock.seconds, 3),
        "training_seconds": round(clock.training, 3),  # of the steps alone
        "samples_per_second": round(clock.samples_per_second, 1),
        "seed": training.settings.seed,
        "provenance": dict(provenance),
    }
