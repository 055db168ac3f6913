"""What is left of a sweep: sweep.html with its pictures in it, trials.csv, and the best as experiment cards."""

import base64
import csv
import html
import io
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from core.durable import write_durably
from core.json_lines import read_lines
from sweeps.define.plan import EVALUATED, Plan
from sweeps.define.space import point
from sweeps.execute.store import Store, experimental
from sweeps.results import figures
from sweeps.results.card import command, write_card
from sweeps.results.table import brief, is_feasible, leaderboard, ranked, spread

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2833; max-width: 1040px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 0.3em } p { margin: 0.3em 0; max-width: 52em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e5e8e8; white-space: nowrap }
th { background: #f4f6f6 } tr.best { background: #fdedec; font-weight: 600 } tr.pruned, tr.diverged { color: #909497 }
tr.infeasible { color: #ba4a00 } tr.failed { color: #922b21 } code { background: #f4f6f6; padding: 1px 4px }
img { max-width: 100% }
"""


def write_report(plan: Plan, store: Store, console: Console) -> None:
    """Everything that the store and the run folders tell by now."""
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
    page = render(plan, store, trials, order, front, list(cards))
    write_durably(plan.folder / "sweep.html", page.encode())
    if order:
        console.print(leaderboard(plan, trials, rows=5))
    console.print(f"report  {plan.folder / 'sweep.html'}", markup=False)
    if feasible:
        console.print(f"best    {command(plan, 'best')}", markup=False)
    elif order:
        console.print("best    none: no trial meets every constraint")


def pareto_front(plan: Plan, feasible: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that no other beats in every objective."""
    signs = [-1 if direction == "maximize" else 1 for direction, _ in plan.objectives]
    points = {trial.number: [sign * value for sign, value in zip(signs, trial.values)] for trial in feasible}

    def beats(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other))

    return [each for each in feasible if not any(beats(other, points[each.number]) for other in points.values())]


def write_table(plan: Plan, trials: list[FrozenTrial], path: Path) -> None:
    """trials.csv: a row a trial, every metric with its standard deviation over seeds."""
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


def outcome(trial: FrozenTrial) -> str:
    """complete, pruned, diverged, failed, running or waiting."""
    return trial.user_attrs.get("outcome", "") if trial.state.is_finished() else trial.state.name.lower()


def render(
    plan: Plan,
    store: Store,
    trials: list[FrozenTrial],
    order: list[FrozenTrial],
    front: list[FrozenTrial],
    cards: list[str],
) -> str:
    """The page."""
    direction, metric = plan.objectives[0]
    best = order[0].number if order and is_feasible(order[0]) else -1
    counts = {kind: sum(outcome(trial) == kind for trial in trials) for kind in map(outcome, trials)}
    infeasible = sum(not is_feasible(trial) for trial in order)
    facts = [
        f"{', '.join(f'{each} {name}' for each, name in plan.objectives)}",
        *(["subject to " + ", ".join(map(str, plan.constraints))] if plan.constraints else []),
        f"{plan.options['sampler']} search, pruner {plan.options['pruner']}, {plan.options['seeds']} seed(s) a trial",
        ", ".join(f"{count} {kind}" for kind, count in counts.items())
        + (f", {infeasible} infeasible" if infeasible else ""),
    ]
    parts = [f"<h1>Sweep {html.escape(plan.name)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    if cards:
        text = "The best configuration is written as an experiment card; retrain it on other seeds before you trust it:"
        parts += [f"<p>{text}</p>", f"<p><code>{html.escape(command(plan, 'best'))}</code></p>"]
    chosen = [trial.number for trial in front]
    names = list(dict.fromkeys([name for _, name in plan.objectives] + [each.metric for each in plan.constraints]))
    if len(names) > 1 and order:
        title = "Pareto front" if len(plan.objectives) > 1 else "What is sought, against what must hold"
        parts.append(
            f"<h2>{title}</h2><p>Red: the front (no trial is better in every respect); orange: infeasible.</p>"
        )
        parts += [_picture(figures.trade_off(plan, trials, (other, metric), chosen), title) for other in names[1:]]
    if metric in EVALUATED:
        runs = {each.number: plan.run_folder(each.number, 0) / "metrics.jsonl" for each in trials if each.params}
        curves = {number: read_lines(path) for number, path in runs.items()}
        parts.append("<h2>Learning curves</h2><p>Red: the best; grey: pruned, with a dot where.</p>")
        by_number = {trial.number: trial for trial in trials}
        parts.append(_picture(figures.learning_curves(curves, by_number, metric, best), "learning curves"))
    shares = importance_of(store, plan)
    if shares:
        told = f"Share of the variance of {metric} that each explains alone, by a random forest over complete trials."
        if counts.get("pruned"):
            told += " Pruned trials are not among them: what made those poor counts for less here than it should."
        if any(each.when for each in plan.space):
            told += " Dimensions that are drawn only under a condition are left out."
        parts += [
            "<h2>Importance</h2>",
            f"<p>{html.escape(told)}</p>",
            _picture(figures.importances(shares), "importance"),
        ]
    if any(figures.told(trial, metric) is not None for trial in trials):
        parts.append("<h2>Slices</h2><p>Each dimension by itself; crosses are pruned trials, at the best they had.</p>")
        parts.append(_picture(figures.slices(plan, trials, metric, best), "slices"))
        parts.append("<h2>Parallel coordinates</h2><p>A line a trial; the darker, the better.</p>")
        sign = 1 if direction == "maximize" else -1
        parts.append(
            _picture(figures.parallel_coordinates(plan, trials, metric, sign=sign, best=best), "parallel coordinates")
        )
    parts += ["<h2>Leaderboard</h2>", leaderboard_html(plan, trials, order, names, best)]
    head = f"<meta charset='utf-8'><title>Sweep {html.escape(plan.name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def leaderboard_html(
    plan: Plan, trials: list[FrozenTrial], order: list[FrozenTrial], names: list[str], best: int
) -> str:
    """Every trial, complete ones by rank; mean ± sd over seeds."""
    rows = order + [trial for trial in trials if trial.state != TrialState.COMPLETE]
    columns = ["trial", "outcome", *names, *(each.key for each in plan.space), "seconds"]
    lines = [f"<tr>{''.join(f'<th>{html.escape(column)}</th>' for column in columns)}</tr>"]
    for trial in rows:
        values = point(plan.space, trial.params)
        kind = outcome(trial) if is_feasible(trial) else "infeasible"
        figures_ = [spread(trial, name) for name in names]
        cells = [str(trial.number), kind, *figures_, *(brief(values.get(each.key, "")) for each in plan.space)]
        cells.append(str(trial.user_attrs.get("wall", "")))
        told = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        hint = html.escape(trial.user_attrs.get("error", ""))
        lines.append(f"<tr class='{'best' if trial.number == best else kind}' title='{hint}'>{told}</tr>")
    return f"<table>{''.join(lines)}</table>"


def importance_of(store: Store, plan: Plan) -> dict[str, float]:
    """fANOVA's shares by dimension (Hutter et al. 2014); none for a few trials, or where all have the same value."""
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


def _picture(figure: Figure, title: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, facecolor="white")
    text: Any = base64.b64encode(content.getvalue()).decode()
    return f"<img alt='{html.escape(title)}' src='data:image/png;base64,{text}'>"
