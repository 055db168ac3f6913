"""Wall-clock time of a run, resumes included. It is logged and saved; no result depends on it."""

import time
from collections.abc import Mapping
from typing import Any


class Clock:
    """`seconds` runs all the time; `training` only between `start` and `stop`: around the steps, not the evaluation."""

    def __init__(self) -> None:
        self.seconds_before = 0.0  # of earlier processes of this run
        self.born = time.perf_counter()
        self.training = 0.0
        self.samples = 0
        self._started: float | None = None
        self._lap = (0.0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the times and samples so far, as a checkpoint keeps them."""
        return {"seconds": self.seconds, "training": self.training, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add what earlier processes of the run took."""
        self.seconds_before, self.training, self.samples = state["seconds"], state["training"], state["samples"]
        self._lap = (self.training, self.samples)

    def count(self, samples: int) -> None:
        """Add the samples of a training step."""
        self.samples += samples

    @property
    def seconds(self) -> float:
        """Since the run began, less the time between its processes."""
        return self.seconds_before + time.perf_counter() - self.born

    def start(self) -> None:
        """Steps begin."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Steps pause."""
        if self._started is not None:
            self.training += time.perf_counter() - self._started
            self._started = None

    @property
    def samples_per_second(self) -> float:
        """Training samples a second of training time, over the whole run."""
        return self.samples / self.training if self.training else 0.0

    def lap(self) -> float:
        """Training samples a second since the last lap. Call it while stopped."""
        seconds, samples = self.training - self._lap[0], self.samples - self._lap[1]
        self._lap = (self.training, self.samples)
        return samples / seconds if seconds > 0 else 0.0
