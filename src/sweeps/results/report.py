"""The report of a sweep: sweep.html (page.py), trials.csv, and experiment cards of the best trials (card.py)."""

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
    """Write trials.csv, the cards and sweep.html to the sweep's folder, and print the best trials.

    The report contains all trials of the store, including unfinished ones. The card `best` is the best feasible trial.
    With several objectives, each trial of the Pareto front gets a card too.
    """
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
    write_durably(plan.folder / "sweep.html", page.encode(errors="backslashreplace"))  # a name may not be UTF-8
    if order:
        console.print(leaderboard(plan, trials, rows=5))
    console.print(f"report  {plan.folder / 'sweep.html'}", markup=False)
    if feasible:
        console.print(f"best    {command(plan, 'best')}", markup=False)
    elif order:
        console.print("best    none: no trial meets every constraint")


def write_table(plan: Plan, trials: list[FrozenTrial], path: Path) -> None:
    """Write a CSV file with one row per trial: outcome, sampled values, metrics (mean and sd over seeds), error.

    Metrics are those of the best checkpoint. The wall time is in seconds.
    """
    names = sorted({name for trial in trials for name in trial.user_attrs.get("metrics", {})})
    content = io.StringIO()
    table = csv.writer(content)
    columns = [column for name in names for column in (name, f"{name} sd")]
    table.writerow(
        [
            "trial",
            "outcome",
            "feasible",
            *(dimension.key for dimension in plan.space),
            *columns,
            "wall seconds",
            "error",
        ]
    )
    for trial in trials:
        results, values = trial.user_attrs, point(plan.space, trial.params)
        sampled = [values.get(dimension.key, "") for dimension in plan.space]
        metrics = [results.get(part, {}).get(name, "") for name in names for part in ("metrics", "spread")]
        head = [trial.number, outcome(trial), is_feasible(trial), *sampled]
        table.writerow([*head, *metrics, results.get("wall", ""), results.get("error", "")])
    write_durably(path, content.getvalue().encode(errors="surrogateescape"))


def importance_of(store: Store) -> dict[str, float]:
    """Return the share of the first objective's variance that each dimension explains, 0 to 1.

    Return {} if fewer than four trials are complete, or if all have the same value. Source: fANOVA, Hutter, Hoos &
    Leyton-Brown 2014, An Efficient Approach for Assessing Hyperparameter Importance.
    """
    complete = [trial for trial in store.trials() if trial.state == TrialState.COMPLETE]
    if len(complete) < 4 or len({trial.values[0] for trial in complete}) == 1:
        return {}
    with experimental(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(
            store.study, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
    return {name: share for name, share in shares.items() if math.isfinite(share)}
