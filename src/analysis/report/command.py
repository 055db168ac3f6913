"""The command report.py: a run folder -> report.html and report.json."""

import json
import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from analysis.evaluate import read_all_splits
from analysis.findings import show_findings
from analysis.report import figures
from analysis.report.calibration import calibrate
from analysis.report.comparison import compare, read_experiments
from analysis.report.decomposition import parts_of
from analysis.report.measurements import Measured, measure_splits
from analysis.report.page import render
from analysis.report.slices import confused_pairs, read_groups, slices_of
from core.config import Config
from core.durable import write_durably
from core.errors import CheckpointError, ConfigError, DataError, PreceptorError, printable
from core.json_lines import read_lines, without_nonfinite
from core.options.commands import ReportConfig
from core.run_config import checked_run_config, read_summary
from data.sources.splits import Splits, largest_share
from diagnosis.run_evidence import RunEvidence
from diagnosis.run_rules import run_findings
from trainer.device import configure_tf32
from trainer.inference.evaluation import count_confusions, worst_mistakes
from trainer.inference.load_run import LoadedRun, load_run, with_data_root

MAX_MISTAKES = 24


def write_report(config: Config[ReportConfig]) -> None:
    """Write report.html and report.json of a run, and print its findings; or compare several runs.

    A run without a usable checkpoint or without its data gets a report of what is left, with a notice. Raises
    CheckpointError if the folder is not a run, and StorageError if the files cannot be written.
    """
    values = config.values
    if isinstance(values["run"], list):
        folders = [Path(run) for run in values["run"]]
        report, images = gather_comparison(folders, values["report"]["metric"])
        template, target = "comparison.html.j2", folders[0].parent
    else:
        report, images = gather(Path(values["run"]), values)
        template, target = "report.html.j2", Path(values["run"])
    target = Path(values["output"]) if values["output"] else target
    report = without_nonfinite(report)
    target.mkdir(parents=True, exist_ok=True)
    write_durably(target / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_durably(target / "report.html", render(template, report, images).encode("utf-8", "replace"))
    show(report)
    print(f"written to {target / 'report.html'} and {target / 'report.json'}")


def gather_comparison(folders: list[Path], metric: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of report.json for several runs, and the figure of the page. Raises DataError."""
    if not folders:
        raise ConfigError("run", "must name at least one run folder", value=[])
    experiments = read_experiments(folders, metric)
    report = {
        "metric": metric,
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", "scripts/report.py", *sys.argv[1:]]),
        "experiments": [
            {**asdict(experiment), "mean": experiment.mean, "spread": experiment.spread} for experiment in experiments
        ],
        "differences": [asdict(compare(other, experiments[0], metric)) for other in experiments[1:]],
        "findings": [],
        "notices": [],
    }
    seeds = figures.metric_of_seeds({each.name: each.by_seed for each in experiments}, metric)
    return report, {"seeds": figures.data_url(seeds)}


def gather(folder: Path, values: ReportConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of report.json, and the figures of the page as data URLs by name."""
    record: dict[str, Any] = {**checked_run_config(folder)}
    summary, lines = read_summary(folder), read_lines(folder / "metrics.jsonl")
    notices: list[str] = []
    measured, splits, run = _measure(folder, values, notices)
    class_names = run.class_names if run else []
    analysed = next((name for name in ("val", "test") if name in measured), None)
    evidence = RunEvidence(
        lines=lines,
        status=summary.get("status"),
        failure=str(summary.get("stop_reason", "")) if summary.get("status") == "failed" else "",
        progress=_progress(record, lines, summary),
        evaluated_step=run.snapshot.step if run else 0,
        errors={name: split.error for name, split in measured.items()},
        losses={name: split.loss for name, split in measured.items()},
        chance_error=1 - largest_share(splits.train.labels) if splits else 1.0,
        num_classes=len(class_names) or int(record["data"]["num_classes"] or 2),
        predicted_share=_predicted_share(measured[analysed or "train"]) if measured else None,
        human_error=values["report"]["human_error"],
        config=record,
    )
    parts = parts_of(evidence.errors, human_error=evidence.human_error)
    report: dict[str, Any] = {
        "run": str(folder),
        "model": record["choices"]["model"],
        "data": record["choices"]["data"],
        "status": summary.get("status", "running or killed"),
        "stop_reason": summary.get("stop_reason", ""),
        "step": summary.get("step", lines[-1]["step"] if lines else 0),
        "seed": record["seed"],
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", "scripts/report.py", *sys.argv[1:]]),
        "findings": [finding.as_json() for finding in run_findings(evidence)],
        "notices": notices,
        "human_error": evidence.human_error,
        "errors": {
            name: {
                **asdict(split.error),
                "share": split.error.share,
                "margin": split.error.margin,
                "total": split.total,
            }
            for name, split in measured.items()
        },
        "parts": [asdict(part) | {"is_significant": part.is_significant} for part in parts],
        "analysed": analysed,
    }
    images = {"curves": figures.data_url(figures.learning_curves(lines)) if lines else ""}
    if measured:
        images["parts"] = figures.data_url(figures.error_parts(parts))
    if analysed and splits:
        _analyse(report, images, measured[analysed], splits, values, class_names)
    return report, images


def _measure(
    folder: Path, values: ReportConfig, notices: list[str]
) -> tuple[dict[str, Measured], Splits | None, LoadedRun | None]:
    """Return the measured splits, the splits and the run; what cannot be read is left out, with a notice."""
    try:
        run = load_run(folder, checkpoint=values["checkpoint"], device=values["device"], trust=values["trust"])
    except CheckpointError as error:
        notices.append(f"the model cannot be evaluated: {error.described}")
        return {}, None, None
    configure_tf32(run.config["trainer"]["tf32"], run.device)
    try:
        splits = read_all_splits(run, data_config=with_data_root(run, values["root"]))
    except (DataError, CheckpointError) as error:
        notices.append(f"the data cannot be read: {error.described}; root=FOLDER names its folder on this machine")
        return {}, None, run
    limits = values["report"]
    try:
        return measure_splits(run, splits, most=limits["images"], seconds=limits["seconds"]), splits, run
    except PreceptorError as error:
        notices.append(f"the images cannot be read: {error.described}")
        return {}, splits, run


def _analyse(
    report: dict[str, Any],
    images: dict[str, str],
    measured: Measured,
    splits: Splits,
    values: ReportConfig,
    class_names: list[str],
) -> None:
    """Add the error analysis of a split to the report and its figures."""
    slices = slices_of(measured, class_names, read_groups(values["report"]["groups"], measured))
    calibration = calibrate(measured.logits, measured.labels)
    report["confused"] = [
        {"label": label, "predicted": predicted, "images": number}
        for label, predicted, number in confused_pairs(measured, class_names)
    ]
    report["slices"] = [
        {"kind": each.kind, "name": each.name, "samples": each.error.samples, "error": each.error.share}
        | {"margin": each.error.margin, "gain": each.gain}
        for each in slices
    ]
    report["calibration"] = {key: getattr(calibration, key) for key in ("error", "temperature", "error_after")}
    report["mistakes"] = worst = _worst_mistakes(measured, class_names)
    images["reliability"] = figures.data_url(figures.reliability_diagram(calibration))
    images["mistakes"] = images["confusion"] = ""
    count = len(class_names)
    if count <= 100:
        cells = count_confusions(measured.labels, measured.predicted, count)
        images["confusion"] = figures.data_url(figures.confusion_matrix(cells.numpy(), class_names))
    if worst:
        split = splits.by_name[str(report["analysed"])]
        pixels = split.read(torch.tensor([mistake["row"] for mistake in worst]))  # uint8 (N, C, H, W)
        titles = [
            f"{mistake['label'][:12]}\n{mistake['predicted'][:12]} {mistake['probability']:.0%}" for mistake in worst
        ]
        sheet = figures.contact_sheet(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()), titles)
        images["mistakes"] = figures.data_url(sheet)


def _worst_mistakes(measured: Measured, class_names: list[str]) -> list[dict[str, Any]]:
    """Return the wrong predictions with the highest probabilities, at most MAX_MISTAKES."""
    probability = measured.logits.double().softmax(1).max(1).values
    worst = worst_mistakes(measured.predicted, probability, measured.labels, most=MAX_MISTAKES)
    return [
        {
            "image": measured.names[place],
            "row": int(measured.rows[place]),
            "label": class_names[int(measured.labels[place])],
            "predicted": class_names[int(measured.predicted[place])],
            "probability": round(float(probability[place]), 4),
        }
        for place in worst.tolist()
    ]


def _predicted_share(measured: Measured) -> float:
    """Return the share of images that get the most predicted class."""
    return float(measured.predicted.bincount().max()) / len(measured.labels)


def _progress(record: dict[str, Any], lines: list[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Return the share of the planned steps or epochs that were made."""
    trainer = record["trainer"]
    epoch = float(summary.get("epoch") or (lines[-1]["epoch"] if lines else 0))
    step = float(summary.get("step") or (lines[-1]["step"] if lines else 0))
    shares = [epoch / trainer["max_epochs"]] if trainer["max_epochs"] else []
    shares += [step / trainer["max_steps"]] if trainer["max_steps"] else []
    return min(1.0, max(shares, default=1.0))


def show(report: dict[str, Any]) -> None:
    """Print the comparison or the findings, and the notices."""
    console = Console(highlight=False, soft_wrap=True)
    for difference in report.get("differences", []):
        console.print(printable(difference["sentence"]), markup=False)
    if "differences" not in report:
        show_findings(report["findings"], console, healthy="the run looks healthy")
    for notice in report["notices"]:
        console.print(printable(f"note: {notice}"), markup=False)
