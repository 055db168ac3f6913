"""Comparison of runs: experiments that differ in more than the seed, paired over their common seeds.

The difference of two experiments is the mean over common seeds of the difference of a metric. Its 95% interval is
t x sd / sqrt(n), with Student's t for n - 1 degrees of freedom; n is the number of common seeds. Pairing removes the
part of the noise that a seed has in common (split, order of the samples, initial weights).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats  # type: ignore[import-untyped]

from analysis.runs_table import add_differences, read_row
from core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that differ only in their seed. `by_seed` maps a seed to the metric of its run."""

    name: str
    runs: list[str]
    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Return the mean of the metric over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def spread(self) -> float:
        """Return the standard deviation over the seeds; NaN for one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The metric of an experiment minus that of the baseline. `margin` is NaN with fewer than two common seeds."""

    name: str
    baseline: str
    seeds: int
    mean: float
    margin: float
    sentence: str


def read_experiments(folders: Sequence[Path], metric: str) -> list[Experiment]:
    """Return the experiments of these runs, in the order of their first runs.

    An experiment is named by the options in which it differs from the others. Raises DataError for a folder that is not
    a run, or a run without the metric.
    """
    rows = []
    for folder in folders:
        row = read_row(folder, folder.parent)
        if row is None:
            raise DataError(str(folder), "is not a run folder")
        if metric not in row["metrics"]:
            known = ", ".join(row["metrics"]) or "none"
            raise DataError(str(folder), f"has no {metric}; its metrics: {known} (report.metric)")
        rows.append(row | {"folder": str(folder)})
    add_differences(rows)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["experiment"], []).append(row)
    return [
        Experiment(
            name=" ".join(filter(None, (group[0]["model"], group[0]["differs"]))),
            runs=[row["folder"] for row in group],
            by_seed={row["seed"]: row["metrics"][metric] for row in group},
        )
        for group in groups.values()
    ]


def compare(experiment: Experiment, baseline: Experiment, metric: str) -> Difference:
    """Return the difference of an experiment and the baseline, with a sentence that says what it means."""
    common = sorted(experiment.by_seed.keys() & baseline.by_seed.keys())
    differences = [experiment.by_seed[seed] - baseline.by_seed[seed] for seed in common]
    if not differences:
        differences = [experiment.mean - baseline.mean]
    mean, margin = statistics.fmean(differences), math.nan
    if len(common) > 1:
        quantile = float(stats.t.ppf(0.975, len(common) - 1))
        margin = quantile * statistics.stdev(differences) / math.sqrt(len(common))
    return Difference(
        name=experiment.name,
        baseline=baseline.name,
        seeds=len(common),
        mean=mean,
        margin=margin,
        sentence=_sentence(experiment.name, baseline.name, metric, mean, margin, len(common)),
    )


def _sentence(name: str, baseline: str, metric: str, mean: float, margin: float, seeds: int) -> str:
    is_accuracy = metric.endswith("accuracy")
    scale, unit, digits = (100, " points", 2) if is_accuracy else (1, "", 4)
    gain = mean if is_accuracy else -mean  # a lower loss is better
    size = f"{scale * abs(mean):.{digits}f}"
    if math.isnan(margin):
        reason = "they have no seed in common" if seeds == 0 else "one seed says nothing about chance"
        return f"{name} differs from {baseline} by {scale * mean:+.{digits}f}{unit} in {metric}, but {reason}."
    interval = f"{size} ± {scale * margin:.{digits}f}{unit} in {metric} on {seeds} seeds"
    if abs(mean) <= margin:
        return f"{name} and {baseline} cannot be told apart: they differ by {interval}."
    return f"{name} is {'better' if gain > 0 else 'worse'} than {baseline} by {interval}."
