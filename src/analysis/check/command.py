"""The command check.py: findings on a training before its first step."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.check.data_evidence import measure_data
from analysis.check.model_evidence import measure_model
from analysis.findings import show_findings
from core.config import Config
from core.durable import write_durably
from core.errors import FindingsError, StorageError
from core.options.declarations import TrainConfig
from diagnosis.data_rules import data_findings
from diagnosis.finding import ranked
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
    config.require_new_run("check.py")
    configure_torch(config.values["trainer"])
    training, splits = build(config)
    findings = ranked(
        [
            *data_findings(measure_data(splits, values)),
            *model_findings(measure_model(training, values, seconds=SECONDS)),
        ]
    )
    content = [finding.as_json() for finding in findings]
    console = Console(highlight=False, soft_wrap=True)
    show_findings(content, console, healthy="model and data look healthy", text_of=_short)
    if values["run_dir"] is not None:
        write(content, Path(values["run_dir"]))
    errors = [finding.id for finding in findings if finding.severity == "error"]
    if errors:
        raise FindingsError("check", f"{len(errors)} of the findings are errors: {', '.join(errors)}")


def write(findings: list[dict[str, Any]], folder: Path) -> None:
    """Write the findings to check.json in a new or existing folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exception:
        raise StorageError(str(folder), f"cannot be created: {exception.strerror}") from None
    write_durably(folder / "check.json", (json.dumps({"findings": findings}, indent=2) + "\n").encode())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
