"""Error over the number of training images, and a forecast for twice as many.

The validation error of a model often follows a power law, error = a n^-b, until it nears the error of the labels
(Hestness et al. 2017, Deep Learning Scaling is Predictable, Empirically). So log(error) is a straight line over log(n).
Least squares give the line, and Student's t for m - 2 degrees of freedom the 95% interval of the mean at 2 n; m is the
number of trainings. A floor of the error is not part of the model: the forecast is a lower bound near it.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from core.config import Config
from core.options.declarations import TrainConfig
from trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The error with `samples` training images: an estimate and its 95% interval, all 0 to 1."""

    samples: int
    error: float
    low: float
    high: float
    exponent: float  # b
    r_squared: float

    @property
    def is_reliable(self) -> bool:
        """Return whether the points follow a falling power law: r^2 of at least 0.8."""
        return self.exponent > 0 and self.r_squared >= 0.8


def train_part(config: Config[TrainConfig], *, samples: int, seed: int) -> float:
    """Return the lowest validation error of a training on the first `samples` images; its run folder is deleted.

    The terminal output of the training is discarded.
    """
    with tempfile.TemporaryDirectory(prefix="preceptor-find-") as scratch:
        changes: dict[str, Any] = {"run_dir": str(Path(scratch) / "run"), "seed": seed}
        values: Any = {**config.values, **changes, "data": {**config.values["data"], "limit_train": samples}}
        trainer = {**values["trainer"], "log_graph": False, "log_images": False}
        part = replace(config, values=cast(TrainConfig, {**values, "trainer": trainer}), job=None, varied=[])
        with contextlib.redirect_stdout(io.StringIO()):
            run = Run.create(part)
            with run:
                run.finish(run.loop.fit())
        return 1 - float(run.state.best["metrics"]["val/accuracy"])


def forecast(samples: Sequence[int], errors: Sequence[float], *, at: int) -> Forecast:
    """Return the forecast of the error at `at` training images, from errors measured with `samples` images.

    An error of 0 counts as half a wrong image of 1,000.
    """
    x = np.log(np.asarray(samples, dtype=float))
    y = np.log(np.maximum(np.asarray(errors, dtype=float), 0.0005))
    line = stats.linregress(x, y)
    degrees = len(x) - 2
    residual = y - (line.intercept + line.slope * x)
    variance = float((residual**2).sum()) / degrees
    place = math.log(at)
    spread = float(((x - x.mean()) ** 2).sum())
    error_of_mean = math.sqrt(variance * (1 / len(x) + (place - float(x.mean())) ** 2 / spread))
    center = float(line.intercept + line.slope * place)
    margin = float(stats.t.ppf(0.975, degrees)) * error_of_mean
    return Forecast(
        samples=at,
        error=math.exp(center),
        low=math.exp(center - margin),
        high=min(1.0, math.exp(center + margin)),
        exponent=-float(line.slope),
        r_squared=float(line.rvalue) ** 2,
    )
