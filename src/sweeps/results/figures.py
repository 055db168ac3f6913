"""Figures of a sweep, as matplotlib draws them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from sweeps.define.plan import Plan
from sweeps.define.space import Dimension
from sweeps.results.ranking import brief, is_feasible

WIDTH = 10.0  # inches
BEST, GOOD, PRUNED, INFEASIBLE = "#c0392b", "#2471a3", "#aeb6bf", "#e59866"


def learning_curves(
    curves: Mapping[int, Sequence[Mapping[str, Any]]], trials: Mapping[int, FrozenTrial], name: str, best: int
) -> Figure:
    """A metric over the epochs of each trial, from the lines of its metrics.jsonl; a dot where it was pruned."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    tops: list[float] = []
    for number, lines in sorted(curves.items(), key=lambda item: item[0] == best):  # the best on top
        points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
        if not points or trials[number].user_attrs.get("outcome") == "diverged":  # it would set the scale
            continue
        tops.append(min(value for _, value in points))
        is_pruned = trials[number].state == TrialState.PRUNED
        color = BEST if number == best else PRUNED if is_pruned else GOOD
        width = 2.2 if number == best else 0.9
        axes.plot(*zip(*points), color=color, linewidth=width, label="best" if number == best else None)
        if is_pruned:
            axes.plot(*points[-1], "o", color=color, markersize=3)
    axes.set(xlabel="epoch", ylabel=name)
    if name.endswith("loss") and tops:  # up to the worst trial's best: a first epoch may tell of 1e16
        axes.set(yscale="log", ylim=(None, 1.5 * max(tops)))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def importances(shares: Mapping[str, float]) -> Figure:
    """The share of the variance of the objective that each dimension explains."""
    figure = Figure(figsize=(WIDTH, 0.7 + 0.34 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names, values = list(shares)[::-1], list(shares.values())[::-1]
    bars = axes.barh(names, values, color=GOOD)
    axes.bar_label(bars, labels=[f"{value:.0%}" for value in values], padding=3, fontsize="small")
    axes.set(xlim=(0, 1.08), xlabel="share of the variance (fANOVA)")
    return figure


def slices(plan: Plan, trials: Sequence[FrozenTrial], metric: str, best: int) -> Figure:
    """The metric over each dimension by itself: a dot a trial, a cross where it was pruned."""
    columns = min(3, len(plan.space))
    rows = -(-len(plan.space) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, dimension in zip(panels, plan.space):
        for trial in trials:
            value = told(trial, metric)
            if dimension.name not in trial.params or value is None:
                continue
            color = BEST if trial.number == best else _color(trial)
            marker = "x" if trial.state == TrialState.PRUNED else "o"
            axes.plot(_place(dimension, trial), value, marker, color=color, markersize=4.5, alpha=0.8)
        axes.set_xlabel(dimension.name)
        _scale(axes, dimension)
        axes.grid(alpha=0.3)
    for axes in panels[len(plan.space) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(metric)
    return figure


def parallel_coordinates(plan: Plan, trials: Sequence[FrozenTrial], metric: str, *, sign: float, best: int) -> Figure:
    """A line a trial through its place on every dimension and its result; the darker, the better."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [(trial, value) for trial in trials if (value := told(trial, metric)) is not None]
    results = sorted(sign * value for _, value in found)
    low, high = min(value for _, value in found), max(value for _, value in found)
    for trial, value in sorted(found, key=lambda pair: sign * pair[1]):
        heights = [_share(dimension, trial) for dimension in plan.space]
        heights.append((value - low) / ((high - low) or 1))
        rank = results.index(sign * value) / max(1, len(results) - 1)
        style: dict[str, Any] = (
            {"color": BEST, "linewidth": 2.2}
            if trial.number == best
            else {"color": GOOD, "alpha": 0.08 + 0.7 * rank**3}
        )
        axes.plot(range(len(heights)), heights, **style)
    for index, dimension in enumerate(plan.space):
        axes.axvline(index, color="black", linewidth=0.6)
        for height, text in _ends(dimension):
            axes.text(index + 0.02, height, text, fontsize="x-small", va="bottom" if height > 0.5 else "top")
    axes.axvline(len(plan.space), color="black", linewidth=0.6)
    for height, value in ((0.0, low), (1.0, high)):
        axes.text(len(plan.space) + 0.02, height, f"{value:.4g}", fontsize="x-small", va="bottom" if height else "top")
    axes.set_xticks(range(len(plan.space) + 1), [each.name for each in plan.space] + [metric], fontsize="small")
    axes.set(yticks=[], ylim=(-0.08, 1.08))
    axes.spines[:].set_visible(False)
    return figure


def trade_off(plan: Plan, trials: Sequence[FrozenTrial], names: tuple[str, str], front: Sequence[int]) -> Figure:
    """Two metrics of every trial; the Pareto front joined, the constraints as lines, what breaks one in orange."""
    across, up = names
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [(trial, told(trial, across), told(trial, up)) for trial in trials if trial.state == TrialState.COMPLETE]
    for trial, x, y in found:
        if x is not None and y is not None:
            axes.plot(x, y, "o", color=BEST if trial.number in front else _color(trial), markersize=5, alpha=0.85)
            axes.annotate(str(trial.number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize="xx-small")
    points = sorted((x, y) for trial, x, y in found if trial.number in front and x is not None and y is not None)
    if len(points) > 1:
        axes.plot(*zip(*points), color=BEST, linewidth=1, drawstyle="steps-post")
    for constraint in plan.constraints:
        line = {across: axes.axvline, up: axes.axhline}.get(constraint.metric)
        if line is not None:
            line(constraint.bound, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel=across, ylabel=up)
    values = [x for _, x, _ in found if x is not None and x > 0]
    if values and max(values) > 30 * min(values):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    return figure


def told(trial: FrozenTrial, metric: str) -> float | None:
    """A trial's mean of a metric, where it got so far."""
    value = trial.user_attrs.get("metrics", {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def _color(trial: FrozenTrial) -> str:
    if trial.state == TrialState.PRUNED:
        return PRUNED
    return GOOD if is_feasible(trial) else INFEASIBLE


def _place(dimension: Dimension, trial: FrozenTrial) -> float:
    """On an axis: the number that was drawn, or the option's position."""
    value = trial.params[dimension.name]
    return dimension.labels.index(value) if dimension.kind == "choice" else value


def _scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.kind == "choice":
        axes.set_xticks(
            range(len(dimension.options)), [brief(option) for option in dimension.options], fontsize="x-small"
        )
        axes.set_xlim(-0.5, len(dimension.options) - 0.5)
    elif dimension.distribution.log:  # type: ignore[attr-defined]
        axes.set_xscale("log")


def _share(dimension: Dimension, trial: FrozenTrial) -> float:
    """From 0 to 1 along the dimension's own scale; NaN where it was not called for."""
    if dimension.name not in trial.params:
        return math.nan
    place = _place(dimension, trial)
    if dimension.kind == "choice":
        return place / max(1, len(dimension.options) - 1)
    distribution: Any = dimension.distribution
    low, high = distribution.low, distribution.high
    if distribution.log:
        place, low, high = math.log(place), math.log(low), math.log(high)
    share: float = (place - low) / ((high - low) or 1)
    return share


def _ends(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.kind == "choice":
        count = max(1, len(dimension.options) - 1)
        return [(index / count, brief(option)) for index, option in enumerate(dimension.options)]
    distribution: Any = dimension.distribution
    return [(0.0, brief(distribution.low)), (1.0, brief(distribution.high))]
