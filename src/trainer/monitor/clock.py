"""Clock: wall-clock time of a run over all its processes. Of the results, only `max_minutes` depends on it."""

import time
from collections.abc import Mapping
from typing import Any


class Clock:
    """Measures `seconds`, the time of the run, and `training`, the seconds of its steps: from `start` to `stop`."""

    def __init__(self) -> None:
        self.seconds_before = 0.0  # of earlier processes of this run
        self.born = time.perf_counter()
        self.training = 0.0
        self.samples = 0
        self._started: float | None = None
        self._lap = (0.0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return seconds and samples so far as plain values for a checkpoint."""
        return {"seconds": self.seconds, "training": self.training, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`: continue from the seconds and samples of earlier processes of the run."""
        self.seconds_before, self.training, self.samples = state["seconds"], state["training"], state["samples"]
        self._lap = (self.training, self.samples)

    def count(self, samples: int) -> None:
        """Add the samples of a training step."""
        self.samples += samples

    @property
    def seconds(self) -> float:
        """Return the seconds since the start of the run, without the time between its processes."""
        return self.seconds_before + time.perf_counter() - self.born

    def start(self) -> None:
        """Start to measure training time, before a step."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop to measure training time, for example before an evaluation; no effect if it is not measured."""
        if self._started is not None:
            self.training += time.perf_counter() - self._started
            self._started = None

    @property
    def samples_per_second(self) -> float:
        """Return training samples per second of training time, over the entire run; 0 before the first step."""
        return self.samples / self.training if self.training else 0.0

    def lap(self) -> float:
        """Return training samples per second since the last call, or 0 without steps; call it after `stop`."""
        seconds, samples = self.training - self._lap[0], self.samples - self._lap[1]
        self._lap = (self.training, self.samples)
        return samples / seconds if seconds > 0 else 0.0
