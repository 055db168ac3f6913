"""The command check.py: findings on a training before its first step."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.check.data_evidence import measure_data
from analysis.check.model_evidence import measure_model
from core.config import Config
from core.durable import write_durably
from core.errors import ConfigError, FindingsError, StorageError, printable
from core.options.declarations import TrainConfig
from diagnosis.data_rules import data_findings
from diagnosis.finding import Finding, ranked
from diagnosis.model_rules import model_findings
from trainer.build.training import build
from trainer.device import configure_torch

SECONDS = 10.0  # limit of each of the slow checks of the model


def check_training(config: Config[TrainConfig]) -> None:
    """Check model and data of a config, and print the findings. Nothing is trained, and no run folder is created.

    With `run_dir`, the findings are also written to run_dir/check.json. Raises FindingsError (exit code 8) if a finding
    is an error, ConfigError for the config of a resumed run, and StorageError if the file cannot be written.
    """
    values: dict[str, Any] = {**config.values}
    if config.from_run:
        raise ConfigError("resume", "is supported by train.py only; check.py takes the config of a new run")
    configure_torch(config.values["trainer"])
    training, splits = build(config)
    findings = ranked(
        [
            *data_findings(measure_data(splits, values)),
            *model_findings(measure_model(training, values, seconds=SECONDS)),
        ]
    )
    show(findings)
    if values["run_dir"] is not None:
        write(findings, Path(values["run_dir"]))
    errors = [finding.id for finding in findings if finding.severity == "error"]
    if errors:
        raise FindingsError("check", f"{len(errors)} of the findings are errors: {', '.join(errors)}")


def show(findings: list[Finding]) -> None:
    """Print the findings, or that there are none."""
    console = Console(highlight=False, soft_wrap=True)
    if not findings:
        console.print("no finding: model and data look healthy")
    for finding in findings:
        numbers = ", ".join(f"{name} {_short(value)}" for name, value in finding.evidence.items())
        console.print(printable(f"{finding.severity}: {finding.id} ({numbers})"), markup=False)
        console.print(printable(f"  {finding.explanation}"), markup=False)
        for override in finding.remedy:
            console.print(printable(f"  try: {override}"), markup=False)


def write(findings: list[Finding], folder: Path) -> None:
    """Write the findings to check.json in a new or existing folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exception:
        raise StorageError(str(folder), f"cannot be created: {exception.strerror}") from None
    content = {"findings": [finding.as_json() for finding in findings]}
    write_durably(folder / "check.json", (json.dumps(content, indent=2) + "\n").encode())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
