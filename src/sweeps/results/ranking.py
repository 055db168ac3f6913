"""The order of finished trials, and their values as text for tables."""

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.define.plan import Plan


def outcome(trial: FrozenTrial) -> str:
    """Return complete, infeasible (complete, but violates a constraint), pruned, diverged, failed, running, waiting."""
    if not trial.state.is_finished():
        return trial.state.name.lower()
    result: str = trial.user_attrs.get("outcome", "")
    return "infeasible" if result == "complete" and not is_feasible(trial) else result


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial meets every constraint."""
    return all(violation <= 0 for violation in trial.constraints.values())


def ranked(plan: Plan, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the complete trials, feasible ones first, each part sorted by the first objective, the best first."""
    sign = -1 if plan.objectives[0][0] == "maximize" else 1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (not is_feasible(trial), sign * trial.values[0], trial.number))


def by_last_value(plan: Plan, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return pruned trials, sorted by the last value of the first objective, the best first; without a value last."""
    sign = -1 if plan.objectives[0][0] == "maximize" else 1

    def key(trial: FrozenTrial) -> tuple[bool, float, int]:
        values = trial.intermediate_values
        return not values, sign * values[max(values)] if values else 0.0, trial.number

    return sorted(trials, key=key)


def pareto_front(plan: Plan, feasible: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials of the Pareto front: no other trial is at least as good in all objectives and better in one."""
    signs = [-1 if direction == "maximize" else 1 for direction, _ in plan.objectives]
    points = {trial.number: [sign * value for sign, value in zip(signs, trial.values)] for trial in feasible}

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other))

    return [each for each in feasible if not any(beats(other, points[each.number]) for other in points.values())]


def metric_names(plan: Plan) -> list[str]:
    """Return the metrics that objectives and constraints name, each once."""
    return list(dict.fromkeys([name for _, name in plan.objectives] + [each.metric for each in plan.constraints]))


def spread(trial: FrozenTrial, name: str) -> str:
    """Return the mean of a metric as text, with ± its standard deviation if there are several seeds."""
    mean, sd = (trial.user_attrs.get(part, {}).get(name) for part in ("metrics", "spread"))
    if mean is None:
        return ""
    shown = f"{mean:,.0f}" if name == "parameters" else f"{mean:.4f}"
    return shown if sd is None or name == "parameters" else f"{shown} ± {sd:.4f}"


def brief(value: Any) -> str:
    """Return a value as text for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")
