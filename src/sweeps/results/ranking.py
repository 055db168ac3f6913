"""How finished trials compare, and how their values are written in tables."""

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.define.plan import Plan


def outcome(trial: FrozenTrial) -> str:
    """complete, pruned, diverged, failed, running or waiting."""
    return trial.user_attrs.get("outcome", "") if trial.state.is_finished() else trial.state.name.lower()


def is_feasible(trial: FrozenTrial) -> bool:
    """Does it meet every constraint?"""
    return all(violation <= 0 for violation in trial.constraints.values())


def ranked(plan: Plan, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials, feasible ones first, the best by the first objective in front."""
    sign = -1 if plan.objectives[0][0] == "maximize" else 1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (not is_feasible(trial), sign * trial.values[0], trial.number))


def pareto_front(plan: Plan, feasible: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that no other beats in every objective."""
    signs = [-1 if direction == "maximize" else 1 for direction, _ in plan.objectives]
    points = {trial.number: [sign * value for sign, value in zip(signs, trial.values)] for trial in feasible}

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other))

    return [each for each in feasible if not any(beats(other, points[each.number]) for other in points.values())]


def metric_names(plan: Plan) -> list[str]:
    """Return the metrics that objectives and constraints name, each once."""
    return list(dict.fromkeys([name for _, name in plan.objectives] + [each.metric for each in plan.constraints]))


def spread(trial: FrozenTrial, name: str) -> str:
    """A metric's mean, ± its standard deviation where there are several seeds."""
    mean, sd = (trial.user_attrs.get(part, {}).get(name) for part in ("metrics", "spread"))
    if mean is None:
        return ""
    shown = f"{mean:,.0f}" if name == "parameters" else f"{mean:.4f}"
    return shown if sd is None or name == "parameters" else f"{shown} ± {sd:.4f}"


def brief(value: Any) -> str:
    """A value in a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace(" ", "")
