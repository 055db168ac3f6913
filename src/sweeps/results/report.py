"""The report of a sweep: sweep.html (see `page`), trials.csv, and the best trials as experiment cards (see `card`)."""

import csv
import io
import math
import warnings
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from core.durable import write_durably
from sweeps.define.plan import Plan
from sweeps.define.space import point
from sweeps.execute.database import experimental
from sweeps.execute.store import Store
from sweeps.results.card import command, write_card
from sweeps.results.page import render
from sweeps.results.ranking import is_feasible, outcome, pareto_front, ranked
from sweeps.results.table import leaderboard


def write_report(plan: Plan, store: Store, console: Console) -> None:
    """Write the page, the table and the cards of all trials that are in the store so far."""
    trials = store.trials()
    order = ranked(plan, trials)
    feasible = [trial for trial in order if is_feasible(trial)]
    front = pareto_front(plan, feasible)
    write_table(plan, trials, plan.folder / "trials.csv")
    cards = {}
    if feasible:
        cards["best"] = feasible[0]
        if len(plan.objectives) > 1:
            cards |= {f"trial-{trial.number:04}": trial for trial in front}
    for name, trial in cards.items():
        write_card(plan, trial, name)
    page = render(plan, trials, order, front, importance_of(store), has_card=bool(cards))
    write_durably(plan.folder / "sweep.html", page.encode())
    if order:
        console.print(leaderboard(plan, trials, rows=5))
    console.print(f"report  {plan.folder / 'sweep.html'}", markup=False)
    if feasible:
        console.print(f"best    {command(plan, 'best')}", markup=False)
    elif order:
        console.print("best    none: no trial meets every constraint")


def write_table(plan: Plan, trials: list[FrozenTrial], path: Path) -> None:
    """Write trials.csv: one row per trial, each metric with its standard deviation over seeds."""
    names = sorted({name for trial in trials for name in trial.user_attrs.get("metrics", {})})
    content = io.StringIO()
    table = csv.writer(content)
    columns = [column for name in names for column in (name, f"{name} sd")]
    table.writerow(
        ["trial", "outcome", "feasible", *(each.key for each in plan.space), *columns, "wall seconds", "error"]
    )
    for trial in trials:
        known = trial.user_attrs
        values = point(plan.space, trial.params)
        metrics = [known.get(part, {}).get(name, "") for name in names for part in ("metrics", "spread")]
        head = [trial.number, outcome(trial), is_feasible(trial), *(values.get(each.key, "") for each in plan.space)]
        table.writerow([*head, *metrics, known.get("wall", ""), known.get("error", "")])
    write_durably(path, content.getvalue().encode())


def importance_of(store: Store) -> dict[str, float]:
    """Return the share of each dimension in the variance of the objective, by fANOVA (Hutter et al. 2014).

    Returns {} for fewer than four complete trials, or if all have the same value.
    """
    complete = [trial for trial in store.trials() if trial.state == TrialState.COMPLETE]
    if len(complete) < 4 or len({trial.values[0] for trial in complete}) == 1:
        return {}
    with experimental(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(
            store.study, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
    return {name: share for name, share in found.items() if math.isfinite(share)}
