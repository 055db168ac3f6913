"""Table of all runs under a folder, and mean and standard deviation over seeds of runs that differ only in their seed.

RUN/config.yaml and RUN/summary.json -> one row per run -> sorted by a metric -> terminal, CSV, learning curves
"""

import csv
import fnmatch
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from core.config import Config, leaves
from core.durable import write_output
from core.errors import ConfigError, DataError, PreceptorError, printable
from core.intervals import margin_of
from core.json_lines import read_lines
from core.options.commands import RunsConfig, WhereOptions
from core.options.schema import is_compared
from core.run_config import read_run_config, read_summary

FINISHED = ("finished", "stopped_early")  # a mean over seeds does not count runs that were interrupted
ABSENT = object()  # stands for an option that a run does not have
CAPTION = "±: 95% interval of an accuracy, from the number of images"


def tabulate_runs(config: Config[RunsConfig]) -> None:
    """Print the runs under a folder, sorted by a metric; on request, write a CSV file and learning curves.

    Raises ConfigError for an unsupported figure format, and DataError if there are no runs or none has the metric.
    """
    values = config.values
    folder, metric = Path(values["folder"]), values["sort"]
    if values["curves"] and Path(values["curves"]).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError("curves", "must end in .png, .svg or .pdf", value=values["curves"])
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder")
    rows = [row for path in sorted(folder.rglob("config.yaml")) if (row := read_row(path.parent, folder))]
    if not rows:
        raise DataError(str(folder), "contains no runs (folder)")
    rows = select(rows, values["where"])
    shown = [row for row in rows if not row["debug"] or values["where"]["debug"]] or rows
    hidden, rows = len(rows) - len(shown), shown
    add_differences(rows)
    known = sorted({name for row in rows for name in row["metrics"]})
    if metric not in known:
        explanation = f"no run has this metric; choose one of {', '.join(known)}" if known else "no run has metrics yet"
        raise DataError(f"sort={metric}", explanation)
    worst = float("inf") if metric.endswith("loss") else float("-inf")
    rows.sort(key=lambda row: row["metrics"].get(metric, worst), reverse=not metric.endswith("loss"))
    show(rows, metric)
    if hidden:
        print(f"hidden: {hidden} with debug=...; where.debug=true shows them")
    if values["output"]:
        write_csv(rows, known, Path(values["output"]))
        print(f"written to {values['output']}")
    if values["curves"]:
        draw_curves(rows, folder, name=metric.partition("/")[2], path=Path(values["curves"]))


def write_csv(rows: list[dict[str, Any]], metrics: list[str], path: Path) -> None:
    """Write a CSV file with one line per run and one column per metric; a metric that a run lacks is empty."""
    content = io.StringIO(newline="")
    table = csv.writer(content)
    columns = ("run", "name", "tags", "model", "data", "differs", "seed", "status", "parameters", "seconds")
    table.writerow([*columns, *metrics])
    for row in rows:
        cells = [" ".join(row[key]) if key == "tags" else row[key] for key in columns]
        table.writerow(cells + [row["metrics"].get(name, "") for name in metrics])
    write_output(path, content.getvalue().encode(errors="surrogateescape"))  # a name may not be UTF-8


def select(rows: list[dict[str, Any]], where: WhereOptions) -> list[dict[str, Any]]:
    """Return the runs with this model, data, name and status (patterns with `*`) and all of these tags.

    Raises DataError if there are none.
    """
    wanted = {key: str(where[key]) for key in ("model", "data", "name", "status") if where[key] is not None}
    chosen = [
        row
        for row in rows
        if all(fnmatch.fnmatchcase(str(row[key]), pattern) for key, pattern in wanted.items())
        and set(where["tags"]) <= set(row["tags"])
    ]
    if not chosen:
        properties = [
            *(f"{key} {pattern}" for key, pattern in wanted.items()),
            *(f"tag {tag}" for tag in where["tags"]),
        ]
        raise DataError("where", f"none of {len(rows):,} runs has {', '.join(properties)}")
    return chosen


def add_differences(rows: list[dict[str, Any]]) -> None:
    """Set `differs` of each row: the options in which the runs of its model and data differ, as `optimizer.lr=0.1`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["data"]), []).append(row)
    for group in groups.values():
        names = dict.fromkeys(name for row in group for name in row["options"])
        varied = [name for name in names if len({repr(row["options"].get(name, ABSENT)) for row in group}) > 1]
        for row in group:
            shown = {name: row["options"][name] for name in varied if name in row["options"]}
            row["differs"] = " ".join(f"{name}={json.dumps(value)}" for name, value in shown.items())


def draw_curves(rows: list[dict[str, Any]], folder: Path, *, name: str, path: Path) -> None:
    """Write a figure of train/NAME and val/NAME over the steps of each run.

    The label of a run is its model if all models differ; else its folder, with the options in which it differs.
    """
    from analysis.figures import learning_curves, save  # only here: importing matplotlib takes half a second

    models = [row["model"] for row in rows]
    by_model = len(set(models)) == len(models)
    labels = {row["run"]: row["model"] if by_model else f"{row['run']}  {row['differs']}".strip() for row in rows}
    lines = {labels[row["run"]]: read_lines(folder / row["run"] / "metrics.jsonl") for row in rows}
    save(learning_curves(lines, name), path)
    print(f"written to {path}")


def read_row(run: Path, folder: Path) -> dict[str, Any] | None:
    """Return the table row of a run; None if the folder is not a run or its config is damaged."""
    try:
        config = read_run_config(run)
        summary = read_summary(run)
    except PreceptorError:
        return None
    choices = config.get("choices")
    if not isinstance(choices, dict) or not {"model", "data"} <= choices.keys() or "seed" not in config:
        return None
    best, test = (summary[key] if isinstance(summary.get(key), dict) else {} for key in ("best", "test"))
    metrics = {f"test/{name}": value for name, value in test.items()}
    metrics |= best["metrics"] if isinstance(best.get("metrics"), dict) else {}
    # Runs belong to one experiment if all compared options except the seed are equal.
    leaf_options = {name: value for name, value in leaves(config) if not isinstance(value, dict)}
    compared = {name: value for name, value in leaf_options.items() if name != "seed" and is_compared(name)}
    tags = config.get("tags")
    return {
        "run": str(run.relative_to(folder)),
        "name": config.get("name") or "",
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
        "debug": config["choices"].get("debug", ""),
        "model": config["choices"]["model"],
        "data": config["choices"]["data"],
        "seed": config["seed"],
        "status": summary.get("status", "running or killed"),
        "parameters": summary.get("parameters", ""),
        "seconds": summary.get("seconds", ""),
        "samples": summary["samples"] if isinstance(summary.get("samples"), dict) else {},
        "metrics": {name: value for name, value in metrics.items() if type(value) in (int, float)},
        "experiment": repr(list(compared.items())),
        "options": {name: value for name, value in compared.items() if not name.startswith("choices.")},
    }


def value_with_margin(row: dict[str, Any], metric: str) -> str:
    """Return a metric of a run, an accuracy with its 95% interval, or "" if the run lacks it."""
    value, (split, _, name) = row["metrics"].get(metric), metric.partition("/")
    samples = row["samples"].get(split)
    if value is None:
        return ""
    has_margin = name == "accuracy" and type(samples) is int and samples > 0 and 0 <= value <= 1
    return f"{value:.4f} ± {margin_of(value, samples):.4f}" if has_margin else f"{value:.4f}"


def show(rows: list[dict[str, Any]], metric: str) -> None:
    """Print the table of runs. If an experiment has several seeds, also print the table of means over seeds."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    run = Column("run", no_wrap=True)  # users copy the name into other commands
    shown_metrics = [metric, *(["test/accuracy"] if metric != "test/accuracy" else [])]
    optional = [key for key in ("name", "tags", "debug", "differs") if any(row[key] for row in rows)]
    columns = ("model", "data", *optional, "seed", "status", "seconds")
    table = Table(run, *columns, *shown_metrics, caption=CAPTION)
    for row in rows:
        shown = [" ".join(row[key]) if key == "tags" else row[key] for key in ("run", *columns)]
        cells = [Text(printable(str(cell))) for cell in shown]  # Text: brackets in a name are not markup
        table.add_row(*cells, *(value_with_margin(row, name) for name in shown_metrics))
    console.print(table)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if metric in row["metrics"] and row["status"] in FINISHED:
            groups.setdefault(row["experiment"], []).append(row)
    means = Table(
        "model", "data", "seeds", f"{metric} (mean ± sd)", "runs", title="Mean over seeds", title_justify="left"
    )
    for seeds in (group for group in groups.values() if len(group) > 1):
        values = [row["metrics"][metric] for row in seeds]
        spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        names = ", ".join(row["run"] for row in seeds[:3]) + (", ..." if len(seeds) > 3 else "")
        model, data = (Text(printable(str(seeds[0][key]))) for key in ("model", "data"))
        means.add_row(model, data, str(len(seeds)), spread, Text(printable(names)))
    if means.rows:
        console.print(means)
