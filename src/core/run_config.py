"""The config of a run folder: read as data, checked, completed with the values of this machine. Needs no Hydra.

RUN/config.yaml -> read_run_config (no interpolation) -> checked_run_config (declarations) -> fill_environment
"""

import copy
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

MOST_BYTES = 2**20  # of config.yaml; those of built-in options have about 4,000
MOST_VALUES = 10_000  # in a run's config; those of built-in options have about a hundred


def read_run_config(folder: Path) -> dict[str, Any]:
    """Return the config of a run folder as it is.

    The file may come from elsewhere, so no interpolation in it is resolved. Raises CheckpointError if there is none.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such run folder")
    try:
        text = read_regular(path, follow=False, limit=MOST_BYTES).decode()
        # Refused before anything is made of it: with aliases and merge keys a kilobyte can stand for 2^1000 values.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise CheckpointError(str(path), "holds a YAML alias (*name): a run's config holds values only")
        record = yaml.safe_load(text)
    except FileNotFoundError:
        raise CheckpointError(str(path), "missing, so this is no run folder") from None
    except OSError as exception:
        raise CheckpointError(str(path), f"cannot be read: {exception.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exception:
        raise CheckpointError(str(path), f"not YAML: {exception}") from None
    if not isinstance(record, dict):
        raise CheckpointError(str(path), "must hold a mapping of keys")
    found = list(islice(_everything(record), MOST_VALUES + 1))
    if len(found) > MOST_VALUES:
        raise CheckpointError(str(path), f"holds more than {MOST_VALUES:,} values")
    for name, value in found:
        if "${" in name or (isinstance(value, str) and "${" in value):
            raise CheckpointError(str(path), f"{name}: a run's config holds values only, no ${{...}}", value=value)
    return record


def checked_run_config(folder: Path) -> TrainConfig:
    """Return the config of a run folder; CheckpointError names the file and the key that is not allowed in it."""
    record = read_run_config(folder)
    try:
        check(record, TrainConfig, shown=record, markers=True)
    except ConfigError as error:
        raise CheckpointError(str(folder / "config.yaml"), error.described) from None
    return cast(TrainConfig, record)


def _everything(record: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its dotted name, in lists too, without recursion."""
    waiting: list[tuple[str, Any]] = [("", record)]
    while waiting:
        name, node = waiting.pop()
        yield name, node
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
        waiting += [(f"{name}.{key}".removeprefix("."), value) for key, value in pairs]


def fill_environment(record: TrainConfig) -> TrainConfig:
    """Return a run's config with the data root of this machine.

    Raises ConfigError for any other value that came from an environment variable: it must be given again.
    """
    values = copy.deepcopy(record)
    if values["data"].get("root") == f"{FROM_ENVIRONMENT}PRECEPTOR_DATA":
        values["data"]["root"] = os.environ.get("PRECEPTOR_DATA", "datasets")
    for name, value in leaves(values):
        if isinstance(value, str) and value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            raise ConfigError(name, f"came from the environment variable {variable}; give it again: {name}=...")
    return values
