"""The table of all runs under a folder, and the mean over seeds of runs that differ in nothing else.

scripts/runs.py [folder=outputs] [sort=test/accuracy] [output=FILE.csv] [curves=FILE.png]
"""

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from core.command_line import launch
from core.config import Config, read_run_config
from core.errors import ConfigError, DataError, PreceptorError
from core.schema import RUNS, leaves

# Two runs whose configs differ in these alone are seeds of one experiment.
NOT_THE_EXPERIMENT = ("seed", "run_dir", "resume", "traceback", "trainer.threads", "data.root", "data.num_workers")


def runs(config: Config) -> None:
    """Read every summary, sort, print, write."""
    values = config.values
    folder = Path(values["folder"])
    if values["curves"] and Path(values["curves"]).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError("curves", "must end in .png, .svg or .pdf", value=values["curves"])
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder")
    found = [row for path in sorted(folder.rglob("config.yaml")) if (row := read(path.parent, folder))]
    if not found:
        raise DataError(str(folder), "no runs in it")
    metric = values["sort"]
    known = sorted({name for row in found for name in row["metrics"]})
    if metric not in known:
        raise DataError(f"sort={metric}", f"no run has it; there are {', '.join(known) or 'no metrics yet'}")
    worst = float("inf") if metric.endswith("loss") else float("-inf")
    found.sort(key=lambda row: row["metrics"].get(metric, worst), reverse=not metric.endswith("loss"))
    show(found, metric)
    if values["output"]:
        with Path(values["output"]).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["run", "model", "data", "seed", "status", "parameters", "seconds", *known])
            for row in found:
                metrics = [row["metrics"].get(name, "") for name in known]
                table.writerow(
                    [row[key] for key in ("run", "model", "data", "seed", "status")]
                    + [row["parameters"], row["seconds"], *metrics]
                )
        print(f"written to {values['output']}")
    if values["curves"]:
        draw_curves(found, folder, name=metric.partition("/")[2], path=Path(values["curves"]))


def draw_curves(found: list[dict[str, Any]], folder: Path, *, name: str, path: Path) -> None:
    """The metric over the steps of every run that has it, named by its model where that tells them apart."""
    from analysis.figures import learning_curves, save
    from core.json_lines import read_lines

    models = [row["model"] for row in found]
    key = "model" if len(set(models)) == len(models) else "run"
    save(learning_curves({row[key]: read_lines(folder / row["run"] / "metrics.jsonl") for row in found}, name), path)
    print(f"written to {path}")


def read(run: Path, folder: Path) -> dict[str, Any] | None:
    """One run's row; None for a folder that is no run or is damaged."""
    try:
        config = read_run_config(run)
        summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    except (PreceptorError, ValueError):
        return None
    if not {"choices", "seed"} <= config.keys():
        return None
    best = summary.get("best") or {}
    test = {f"test/{name}": value for name, value in (summary.get("test") or {}).items()}
    same = [(name, value) for name, value in leaves(config) if name not in NOT_THE_EXPERIMENT]
    return {
        "run": str(run.relative_to(folder)),
        "model": config["choices"]["model"],
        "data": config["choices"]["data"],
        "seed": config["seed"],
        "status": summary.get("status", "running or killed"),
        "parameters": summary.get("parameters", ""),
        "seconds": summary.get("seconds", ""),
        "metrics": {**best.get("metrics", {}), **test},
        "experiment": repr([pair for pair in same if not isinstance(pair[1], dict)]),
    }


def show(found: list[dict[str, Any]], metric: str) -> None:
    """The table of runs and, where an experiment has several seeds, that of their means."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    run = Column("run", no_wrap=True)  # the name is what other commands take
    table = Table(run, "model", "data", "seed", "status", "seconds", metric)
    for row in found:
        value = row["metrics"].get(metric)
        figures = [str(row["seconds"]), "" if value is None else f"{value:.4f}"]
        table.add_row(row["run"], row["model"], row["data"], str(row["seed"]), row["status"], *figures)
    console.print(table)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in found:
        if metric in row["metrics"]:
            groups.setdefault(row["experiment"], []).append(row)
    means = Table("model", "data", "seeds", f"{metric} (mean ± sd)", "runs", title="Over seeds", title_justify="left")
    for rows in (rows for rows in groups.values() if len(rows) > 1):
        numbers = [row["metrics"][metric] for row in rows]
        spread = f"{statistics.mean(numbers):.4f} ± {statistics.stdev(numbers):.4f}"
        names = ", ".join(row["run"] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        means.add_row(rows[0]["model"], rows[0]["data"], str(len(rows)), spread, names)
    if means.rows:
        console.print(means)


if __name__ == "__main__":
    launch(runs, config_name="runs", rules=RUNS)
