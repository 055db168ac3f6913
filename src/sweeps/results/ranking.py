"""The order of finished trials, and their values as text for tables."""

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.define.plan import Plan


def outcome(trial: FrozenTrial) -> str:
    """Return the outcome of a trial, or its state if it has not finished.

    Outcomes: complete, infeasible (complete, but violates a constraint), pruned, diverged, failed. States: waiting,
    running.
    """
    if not trial.state.is_finished():
        return trial.state.name.lower()
    result: str = trial.user_attrs.get("outcome", "")
    return "infeasible" if result == "complete" and not is_feasible(trial) else result


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial violates no constraint. True for a trial whose constraints have not been measured."""
    return all(violation <= 0 for violation in trial.constraints.values())


def ranked(plan: Plan, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the complete trials: feasible ones, then infeasible ones; both by the first objective, the best first."""
    sign = -1 if plan.objectives[0][0] == "maximize" else 1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (not is_feasible(trial), sign * trial.values[0], trial.number))


def by_last_value(plan: Plan, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return pruned trials sorted by their last report of the first objective, the best first.

    Trials without a report come last.
    """
    sign = -1 if plan.objectives[0][0] == "maximize" else 1

    def key(trial: FrozenTrial) -> tuple[bool, float, int]:
        values = trial.intermediate_values
        return not values, sign * values[max(values)] if values else 0.0, trial.number

    return sorted(trials, key=key)


def pareto_front(plan: Plan, feasible: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the Pareto front: no other trial is better in one objective and worse in none.

    `feasible` are complete trials without a violated constraint.
    """
    signs = [-1 if direction == "maximize" else 1 for direction, _ in plan.objectives]
    points = {trial.number: [sign * value for sign, value in zip(signs, trial.values)] for trial in feasible}

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other))

    return [trial for trial in feasible if not any(beats(other, points[trial.number]) for other in points.values())]


def metric_names(plan: Plan) -> list[str]:
    """Return the metrics of the objectives, then those of the constraints, each once."""
    bounded = [constraint.metric for constraint in plan.constraints]
    return list(dict.fromkeys([metric for _, metric in plan.objectives] + bounded))


def spread(trial: FrozenTrial, name: str) -> str:
    """Return the mean of a metric over seeds as text, with ± its standard deviation if the trial has several seeds.

    Return "" if the trial has no value. `parameters` is an integer without a standard deviation.
    """
    mean, sd = (trial.user_attrs.get(part, {}).get(name) for part in ("metrics", "spread"))
    if mean is None:
        return ""
    shown = f"{mean:,.0f}" if name == "parameters" else f"{mean:.4f}"
    return shown if sd is None or name == "parameters" else f"{shown} ± {sd:.4f}"


def brief(value: Any) -> str:
    """Return a value as text for a table: floats with three significant digits, others without spaces."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")
