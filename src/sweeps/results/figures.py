"""The figures of sweep.html, drawn by matplotlib.

The argument `best` is the number of the trial that is drawn in red: the best one, or -1 if no trial is feasible.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from sweeps.define.plan import Plan
from sweeps.define.space import Dimension
from sweeps.results.ranking import brief, is_feasible

WIDTH = 7.5  # inches; narrow, so that its text is readable on a phone
BEST, OTHER, PRUNED, INFEASIBLE = "#c0392b", "#2471a3", "#aeb6bf", "#e59866"  # red, blue, grey, orange


def learning_curves(
    curves: Mapping[int, Sequence[Mapping[str, Any]]], trials: Mapping[int, FrozenTrial], name: str, best: int
) -> Figure:
    """Return the plot of a metric over the epochs: one curve per trial, with a dot at the end of a pruned one.

    `curves` has the lines of metrics.jsonl by trial number, and `name` is the metric. Diverged trials are left out.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    minima: list[float] = []
    for number, lines in sorted(curves.items(), key=lambda item: item[0] == best):  # the best last, on top
        points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
        if not points or trials[number].user_attrs.get("outcome") == "diverged":  # its huge values would set the scale
            continue
        minima.append(min(value for _, value in points))
        is_pruned = trials[number].state == TrialState.PRUNED
        color = BEST if number == best else PRUNED if is_pruned else OTHER
        width = 2.2 if number == best else 0.9
        axes.plot(*zip(*points), color=color, linewidth=width, label="best" if number == best else None)
        if is_pruned:
            axes.plot(*points[-1], "o", color=color, markersize=3)
    axes.set(xlabel="epoch", ylabel=name)
    if name.endswith("loss") and minima:
        # The axis ends above the largest minimum of a trial, because a loss can be 1e16 after the first epoch.
        axes.set(yscale="log", ylim=(None, 1.5 * max(minima)))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def importances(shares: Mapping[str, float]) -> Figure:
    """Return the bar chart of importances: the share of the objective's variance that each dimension explains."""
    figure = Figure(figsize=(WIDTH, 0.7 + 0.34 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names, values = list(shares)[::-1], list(shares.values())[::-1]
    bars = axes.barh(names, values, color=OTHER)
    axes.bar_label(bars, labels=[f"{value:.0%}" for value in values], padding=3, fontsize="small")
    axes.set(xlim=(0, 1.08), xlabel="share of the variance (fANOVA)")
    return figure


def slices(plan: Plan, trials: Sequence[FrozenTrial], metric: str, best: int) -> Figure:
    """Return one plot per dimension: the metric over its sampled value. Dots are trials, crosses pruned trials."""
    columns = min(2, len(plan.space))
    rows = -(-len(plan.space) // columns)
    figure = Figure(figsize=(WIDTH, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, dimension in zip(panels, plan.space):
        for trial in trials:
            value = finite_metric(trial, metric)
            if dimension.name not in trial.params or value is None:
                continue
            color = BEST if trial.number == best else _color(trial)
            marker = "x" if trial.state == TrialState.PRUNED else "o"
            axes.plot(_axis_value(dimension, trial), value, marker, color=color, markersize=4.5, alpha=0.8)
        axes.set_xlabel(dimension.name)
        _set_scale(axes, dimension)
        axes.grid(alpha=0.3)
    for axes in panels[len(plan.space) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(metric)
    return figure


def parallel_coordinates(plan: Plan, trials: Sequence[FrozenTrial], metric: str, *, sign: float, best: int) -> Figure:
    """Return the parallel coordinates: one line per trial, through its value in each dimension and its metric.

    Better trials have darker lines. `sign` is 1 if the metric is maximised, and -1 if it is minimised. At least one
    trial must have a finite metric.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    measured = [(trial, value) for trial in trials if (value := finite_metric(trial, metric)) is not None]
    scores = sorted(sign * value for _, value in measured)
    low, high = min(value for _, value in measured), max(value for _, value in measured)
    for trial, value in sorted(measured, key=lambda pair: sign * pair[1]):
        heights = [_relative_position(dimension, trial) for dimension in plan.space]
        heights.append((value - low) / ((high - low) or 1))
        rank = scores.index(sign * value) / max(1, len(scores) - 1)  # 0: the worst trial, 1: the best
        style: dict[str, Any] = (
            {"color": BEST, "linewidth": 2.2}
            if trial.number == best
            else {"color": OTHER, "alpha": 0.08 + 0.7 * rank**3}
        )
        axes.plot(range(len(heights)), heights, **style)
    for index, dimension in enumerate(plan.space):
        axes.axvline(index, color="black", linewidth=0.6)
        for height, text in _axis_labels(dimension):
            axes.text(index + 0.02, height, text, fontsize="small", va="bottom" if height > 0.5 else "top")
    axes.axvline(len(plan.space), color="black", linewidth=0.6)
    for height, value in ((0.0, low), (1.0, high)):
        axes.text(len(plan.space) + 0.02, height, f"{value:.4g}", fontsize="small", va="bottom" if height else "top")
    names = [dimension.name for dimension in plan.space] + [metric]
    axes.set_xticks(range(len(names)), names, fontsize="small", rotation=20, ha="right")
    axes.set(yticks=[], ylim=(-0.08, 1.08))
    axes.spines[:].set_visible(False)
    return figure


def trade_off(plan: Plan, trials: Sequence[FrozenTrial], names: tuple[str, str], front: Sequence[int]) -> Figure:
    """Return the plot of two metrics, one dot per complete trial, labelled with its number.

    `names` are the metrics of the horizontal and the vertical axis. A red line joins the trials of the Pareto front,
    whose numbers are in `front`. Dashed lines are constraints. Infeasible trials are orange.
    """
    x_name, y_name = names
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    measured = [(trial, finite_metric(trial, x_name), finite_metric(trial, y_name)) for trial in complete]
    for trial, x, y in measured:
        if x is not None and y is not None:
            axes.plot(x, y, "o", color=BEST if trial.number in front else _color(trial), markersize=5, alpha=0.85)
            axes.annotate(str(trial.number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize="x-small")
    points = sorted((x, y) for trial, x, y in measured if trial.number in front and x is not None and y is not None)
    if len(points) > 1:
        axes.plot(*zip(*points), color=BEST, linewidth=1, drawstyle="steps-post")
    for constraint in plan.constraints:
        draw_line = {x_name: axes.axvline, y_name: axes.axhline}.get(constraint.metric)
        if draw_line is not None:
            draw_line(constraint.bound, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel=x_name, ylabel=y_name)
    values = [x for _, x, _ in measured if x is not None and x > 0]
    if values and max(values) > 30 * min(values):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    return figure


def finite_metric(trial: FrozenTrial, metric: str) -> float | None:
    """Return a trial's mean of a metric over its seeds; None if the trial has no finite value."""
    value = trial.user_attrs.get("metrics", {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def _color(trial: FrozenTrial) -> str:
    if trial.state == TrialState.PRUNED:
        return PRUNED
    return OTHER if is_feasible(trial) else INFEASIBLE


def _axis_value(dimension: Dimension, trial: FrozenTrial) -> float:
    """Return the position on the dimension's axis: the sampled number, or the index of the option of a choice."""
    value = trial.params[dimension.name]
    return dimension.labels.index(value) if dimension.kind == "choice" else value


def _set_scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.kind == "choice":
        axes.set_xticks(
            range(len(dimension.options)), [brief(option) for option in dimension.options], fontsize="small"
        )
        axes.set_xlim(-0.5, len(dimension.options) - 0.5)
    elif dimension.distribution.log:  # type: ignore[attr-defined]
        axes.set_xscale("log")


def _relative_position(dimension: Dimension, trial: FrozenTrial) -> float:
    """Return the position between the bounds, 0 to 1, on the dimension's scale; NaN if the trial does not use it."""
    if dimension.name not in trial.params:
        return math.nan
    value = _axis_value(dimension, trial)
    if dimension.kind == "choice":
        return value / max(1, len(dimension.options) - 1)
    distribution: Any = dimension.distribution
    low, high = distribution.low, distribution.high
    if distribution.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    position: float = (value - low) / ((high - low) or 1)
    return position


def _axis_labels(dimension: Dimension) -> list[tuple[float, str]]:
    """Return the labels of an axis as (relative position, text): all options of a choice, or the two bounds."""
    if dimension.kind == "choice":
        last = max(1, len(dimension.options) - 1)
        return [(index / last, brief(option)) for index, option in enumerate(dimension.options)]
    distribution: Any = dimension.distribution
    return [(0.0, brief(distribution.low)), (1.0, brief(distribution.high))]
