"""A trial's config, composed by Hydra; apart from the rest, as a trial's process needs neither Optuna nor the store."""

import re
from pathlib import Path
from typing import Any

from core.composition import compose_config
from core.config import Config
from core.errors import spell
from core.options.declarations import TrainConfig

BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")  # text that Hydra's grammar takes without quotes


def compose_trial(arguments: list[str], config_dirs: list[str]) -> Config[TrainConfig]:
    """A trial's config: the sweep's own with its overrides, less the section `sweep`."""
    return compose_config("sweep", arguments, TrainConfig, folders=list(map(Path, config_dirs)), without=["sweep"])


def search_path(config_dirs: list[str]) -> list[str]:
    """The override that makes Hydra look in the user's own folders too."""
    return [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []


def written(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    if isinstance(value, str) and not BARE.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value) if isinstance(value, float) else spell(value)
