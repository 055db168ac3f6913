"""The HTML page sweep.html. It embeds its figures as PNG, so the page is a single file.

Sections: summary, trade-offs, learning curves, importance, slices, parallel coordinates, leaderboard.
"""

import base64
import html
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version

from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from core.json_lines import read_lines
from sweeps.define.plan import EVALUATED, Plan
from sweeps.define.space import point
from sweeps.results import figures
from sweeps.results.card import command
from sweeps.results.ranking import brief, by_last_value, is_feasible, metric_names, outcome, spread

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2833; max-width: 1040px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 0.3em } p { margin: 0.3em 0; max-width: 52em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
table { display: block; overflow-x: auto }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e5e8e8; white-space: nowrap }
th { background: #f4f6f6 } tr.best { background: #fdedec; font-weight: 600 } tr.pruned, tr.diverged { color: #909497 }
tr.infeasible { color: #ba4a00 } tr.failed { color: #922b21 } code { background: #f4f6f6; padding: 1px 4px }
div { overflow-x: auto } img { width: 100%; min-width: 560px; max-width: 825px }
"""


def render(
    plan: Plan,
    trials: Sequence[FrozenTrial],
    order: Sequence[FrozenTrial],
    front: Sequence[FrozenTrial],
    shares: Mapping[str, float],
    *,
    has_card: bool,
) -> str:
    """Return the HTML text of the page.

    trials:    all trials of the study
    order:     the complete trials by rank, the best first
    front:     the trials of the Pareto front
    shares:    the importance of each dimension, 0 to 1; empty if it is unknown
    has_card:  whether experiment/best.yaml exists; then the page shows the command that trains it
    """
    best = order[0].number if order and is_feasible(order[0]) else -1
    parts = [
        *_summary(plan, trials, has_card=has_card),
        *_trade_offs(plan, trials, order, front),
        *_learning_curves(plan, trials, best),
        *_importance(plan, trials, shares),
        *_dimensions(plan, trials, best),
        "<h2>Leaderboard</h2>",
        _leaderboard(plan, trials, order, best),
    ]
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<title>Sweep {html.escape(plan.name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _summary(plan: Plan, trials: Sequence[FrozenTrial], *, has_card: bool) -> list[str]:
    """Return the heading, the settings of the sweep, the number of trials per outcome, and the commands."""
    counts = {kind: sum(outcome(trial) == kind for trial in trials) for kind in map(outcome, trials)}
    facts = [
        ", ".join(f"{direction} {metric}" for direction, metric in plan.objectives),
        *(["subject to " + ", ".join(map(str, plan.constraints))] if plan.constraints else []),
        f"{plan.options['sampler']} search, pruner {plan.options['pruner']}, {plan.options['seeds']} seed(s) per trial",
        ", ".join(f"{count} {kind}" for kind, count in counts.items()),
        f"{datetime.now():%Y-%m-%d %H:%M}, Preceptor {version('preceptor')}",
        shlex.join(["python", "scripts/sweep.py", *sys.argv[1:]]),
    ]
    parts = [f"<h1>Sweep {html.escape(plan.name)}</h1>", *(f"<p>{html.escape(fact)}</p>" for fact in facts)]
    if has_card:
        text = "experiment/best.yaml is the config of the best trial. Train it with other seeds to confirm its result:"
        parts += [f"<p>{text}</p>", f"<p><code>{html.escape(command(plan, 'best'))}</code></p>"]
    return parts


def _trade_offs(
    plan: Plan, trials: Sequence[FrozenTrial], order: Sequence[FrozenTrial], front: Sequence[FrozenTrial]
) -> list[str]:
    """Return one plot per further metric, over which the first objective is plotted."""
    names, metric = metric_names(plan), plan.objectives[0][1]
    if len(names) == 1 or not order:
        return []
    front_numbers = [trial.number for trial in front]
    if len(plan.objectives) > 1:
        title = "Pareto front"
        meaning_of_red = "the Pareto front (no other feasible trial is better in one objective and worse in none)"
    else:
        title, meaning_of_red = "Objective and constraints", "the best feasible trial"
    return [
        f"<h2>{title}</h2><p>Dots are complete trials; red: {meaning_of_red}; orange: infeasible trials.</p>",
        *(_figure(figures.trade_off(plan, trials, (other, metric), front_numbers), title) for other in names[1:]),
    ]


def _learning_curves(plan: Plan, trials: Sequence[FrozenTrial], best: int) -> list[str]:
    """Return the learning curves of the first seed of each trial, if evaluations measure the first objective."""
    metric = plan.objectives[0][1]
    if metric not in EVALUATED:
        return []
    by_number = {trial.number: trial for trial in trials if trial.params}  # without: never started
    curves = {number: read_lines(plan.run_folder(number, 0) / "metrics.jsonl") for number in by_number}
    return [
        "<h2>Learning curves</h2><p>Red: the best trial; grey: pruned trials, with a dot at their end; "
        "blue: all others. Diverged trials are left out.</p>",
        _figure(figures.learning_curves(curves, by_number, metric, best), "learning curves"),
    ]


def _importance(plan: Plan, trials: Sequence[FrozenTrial], shares: Mapping[str, float]) -> list[str]:
    if not shares:
        return []
    metric = plan.objectives[0][1]
    text = f"Share of the variance of {metric} that each dimension explains alone (fANOVA over complete trials)."
    if any(outcome(trial) == "pruned" for trial in trials):
        text += " Pruned trials are left out. So the importance of dimensions that made trials poor is underestimated."
    if any(dimension.when for dimension in plan.space):
        text += " Dimensions with a condition are left out."
    return ["<h2>Importance</h2>", f"<p>{html.escape(text)}</p>", _figure(figures.importances(shares), "importance")]


def _dimensions(plan: Plan, trials: Sequence[FrozenTrial], best: int) -> list[str]:
    """Return the slices and the parallel coordinates of the first objective."""
    direction, metric = plan.objectives[0]
    if all(figures.finite_metric(trial, metric) is None for trial in trials):
        return []
    sign = 1 if direction == "maximize" else -1
    coordinates = figures.parallel_coordinates(plan, trials, metric, sign=sign, best=best)
    return [
        "<h2>Slices</h2><p>One plot per dimension; crosses are pruned trials, at their best value.</p>",
        _figure(figures.slices(plan, trials, metric, best), "slices"),
        "<h2>Parallel coordinates</h2><p>One line per trial; darker lines are better.</p>",
        _figure(coordinates, "parallel coordinates"),
    ]


def _leaderboard(plan: Plan, trials: Sequence[FrozenTrial], order: Sequence[FrozenTrial], best: int) -> str:
    """Return the table of all trials: complete ones by rank, pruned ones by their last value, then all others."""
    names = metric_names(plan)
    pruned = by_last_value(plan, [trial for trial in trials if trial.state == TrialState.PRUNED])
    others = [trial for trial in trials if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED)]
    rows = [*order, *pruned, *others]
    columns = ["trial", "outcome", *names, *(dimension.key for dimension in plan.space), "seconds"]
    lines = [f"<tr>{''.join(f'<th>{html.escape(column)}</th>' for column in columns)}</tr>"]
    for trial in rows:
        values = point(plan.space, trial.params)
        kind = outcome(trial)
        metrics = [spread(trial, name) for name in names]
        cells = [kind, *metrics, *(brief(values.get(dimension.key, "")) for dimension in plan.space)]
        cells.append(str(trial.user_attrs.get("wall", "")))
        folder = plan.run_folder(trial.number, 0).name
        row = f"<td><a href='{folder}'>{trial.number}</a></td>"
        row += "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        tooltip = html.escape(trial.user_attrs.get("error", ""))
        lines.append(f"<tr class='{'best' if trial.number == best else kind}' title='{tooltip}'>{row}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _figure(figure: Figure, title: str) -> str:
    """Return a figure as an <img> element with embedded PNG; `title` is its alternative text.

    On a phone the figure keeps a readable width, and its <div> scrolls.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    text = base64.b64encode(content.getvalue()).decode()
    return f"<div><img alt='{html.escape(title)}' src='data:image/png;base64,{text}'></div>"
