"""The config of a trial, composed by Hydra.

The process of a trial imports this file. To start faster, it imports neither Optuna nor the store.
"""

import re
from pathlib import Path
from typing import Any

from core.composition import compose_config
from core.config import Config
from core.errors import spell
from core.options.declarations import TrainConfig

BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")  # text that needs no quotes in Hydra's grammar


def compose_trial(arguments: list[str], config_dirs: list[str]) -> Config[TrainConfig]:
    """Return the checked config of a trial, composed from sweep.yaml without the section `sweep`.

    arguments:    overrides of the trial, as on the command line
    config_dirs:  folders of --config-dir

    Raises ConfigError for an override that is not allowed.
    """
    return compose_config("sweep", arguments, TrainConfig, folders=list(map(Path, config_dirs)), without=["sweep"])


def search_path(config_dirs: list[str]) -> list[str]:
    """Return the override that adds the folders of --config-dir to Hydra's search path; [] if there are none."""
    return [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []


def written(value: Any) -> str:
    """Return a value as text for an override: Hydra's grammar parses this text to the same value."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and not BARE.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value) if isinstance(value, float) else spell(value)
