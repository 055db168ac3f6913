"""The config of a trial, composed by Hydra. A trial's process imports this file, but neither Optuna nor the store."""

import re
from pathlib import Path
from typing import Any

from core.composition import compose_config
from core.config import Config
from core.errors import spell
from core.options.declarations import TrainConfig

BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")  # text that needs no quotes in Hydra's grammar


def compose_trial(arguments: list[str], config_dirs: list[str]) -> Config[TrainConfig]:
    """Return the config of a trial: that of the sweep with the trial's overrides, without the section `sweep`."""
    return compose_config("sweep", arguments, TrainConfig, folders=list(map(Path, config_dirs)), without=["sweep"])


def search_path(config_dirs: list[str]) -> list[str]:
    """Return the override that adds the folders of --config-dir to Hydra's search path, or no override."""
    return [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []


def written(value: Any) -> str:
    """Return a value as text that Hydra's grammar parses to the same value."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and not BARE.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value) if isinstance(value, float) else spell(value)
