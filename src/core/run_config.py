"""Config of a run folder: read as data, checked, completed with values of this machine. Needs no Hydra.

RUN/config.yaml -> read_run_config (no interpolation) -> checked_run_config (declarations) -> fill_environment
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml

from core.config import FROM_ENVIRONMENT, leaves
from core.errors import CheckpointError, ConfigError
from core.options.declarations import TrainConfig
from core.options.schema import check
from core.regular_files import read_regular

MAX_BYTES = 2**20  # of config.yaml; a config of built-in options has about 4,000
MAX_VALUES = 10_000  # in config.yaml; a config of built-in options has about a hundred


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the config of a run folder without changes.

    The folder may come from another person, so interpolations are refused, not resolved. Raises CheckpointError if the
    file is missing, unreadable or too large.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such run folder")
    try:
        text = read_regular(path, follow=False, limit=MAX_BYTES).decode()
        # Aliases are refused before construction: with aliases and merge keys, a kilobyte can expand to 2^1000 values.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise CheckpointError(str(path), "contains a YAML alias (*name); a run's config must contain values only")
        record = yaml.safe_load(text)
    except FileNotFoundError:
        raise CheckpointError(str(path), "missing, so this is not a run folder") from None
    except OSError as exception:
        raise CheckpointError(str(path), f"cannot be read: {exception.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exception:
        raise CheckpointError(str(path), f"not YAML: {exception}") from None
    if not isinstance(record, dict):
        raise CheckpointError(str(path), "must hold a mapping of keys")
    nodes = list(islice(_nodes(record), MAX_VALUES + 1))
    if len(nodes) > MAX_VALUES:
        raise CheckpointError(str(path), f"contains more than {MAX_VALUES:,} values")
    for name, value in nodes:
        if "${" in name or (isinstance(value, str) and "${" in value):
            raise CheckpointError(
                str(path), f"{name}: a run's config must contain values only, no ${{...}}", value=value
            )
    return record


def checked_run_config(folder: Path) -> TrainConfig:
    """Return the checked config of a run folder. Raises CheckpointError, which names the file and the key."""
    record = read_run_config(folder)
    try:
        check(record, TrainConfig, record=record, markers=True)
    except ConfigError as error:
        raise CheckpointError(str(folder / "config.yaml"), error.described) from None
    return cast(TrainConfig, record)


def _nodes(record: Any) -> Iterator[tuple[str, Any]]:
    """Yield every value with its dotted name, also inside lists, without recursion."""
    waiting: list[tuple[str, Any]] = [("", record)]
    while waiting:
        name, node = waiting.pop()
        yield name, node
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
        waiting += [(f"{name}.{key}".removeprefix("."), value) for key, value in pairs]


def fill_environment(record: TrainConfig) -> TrainConfig:
    """Return the config of a run with the data root of this machine.

    Raises ConfigError for any other value that came from an environment variable: the user must type it again.
    """
    values = copy.deepcopy(record)
    if values["data"].get("root") == f"{FROM_ENVIRONMENT}PRECEPTOR_DATA":
        values["data"]["root"] = os.environ.get("PRECEPTOR_DATA", "datasets")
    for name, value in leaves(values):
        if isinstance(value, str) and value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            raise ConfigError(name, f"came from the environment variable {variable}; type it again: {name}=...")
    return values


def read_summary(run: Path) -> dict[str, Any]:
    """Return the summary.json of a run; an empty dict if the file does not exist or is damaged."""
    try:
        summary = json.loads(read_regular(run / "summary.json", follow=False))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}
