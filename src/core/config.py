"""A checked config as plain values, and the config file of a run folder. Needs neither Hydra nor OmegaConf.

RUN/config.yaml -> read_run_config (data only, no interpolation) -> fill_environment (values of this machine)
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from core.errors import CheckpointError, ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FROM_ENVIRONMENT = "environment:"  # stands in config.yaml where an environment variable's value was used
MOST_VALUES = 10_000  # in a run's config; ours have about a hundred


@dataclass(frozen=True)
class Config:
    """A checked config: plain dicts and lists, no interpolation left."""

    values: dict[str, Any]
    record: dict[str, Any]  # what may be written down: the same, with a marker for each environment variable's value
    changes: dict[str, list[Any]]  # on resume: key -> [before, now]
    job: int | None  # the number within a grid (-m)
    from_run: bool = False  # it comes with a run folder, so it builds only classes that are trusted
    overrides: list[str] = field(default_factory=list)  # as given on the command line
    config_dirs: list[str] = field(default_factory=list)  # the folders of --config-dir


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its dotted name and its value; a section comes before its keys."""
    for key, value in config.items():
        yield prefix + str(key), value
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")


def read_run_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder; a file from elsewhere perhaps, so it is data: no interpolation in it is resolved."""
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such run folder")
    try:
        record = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(str(path), "missing, so this is no run folder") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exception:
        raise CheckpointError(str(path), f"not YAML: {exception}") from None
    if not isinstance(record, dict):
        raise CheckpointError(str(path), "must hold a mapping of keys")
    # With YAML's aliases a kilobyte can stand for 2^1000 values, or hold itself.
    found = list(islice(_everything(record), MOST_VALUES + 1))
    if len(found) > MOST_VALUES:
        raise CheckpointError(str(path), f"holds more than {MOST_VALUES:,} values, or itself")
    for name, value in found:
        if "${" in name or (isinstance(value, str) and "${" in value):
            raise CheckpointError(str(path), f"{name}: a run's config holds values only, no ${{...}}", value=value)
    return record


def _everything(record: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its dotted name, in lists too, without recursion."""
    waiting: list[tuple[str, Any]] = [("", record)]
    while waiting:
        name, node = waiting.pop()
        yield name, node
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
        waiting += [(f"{name}.{key}".removeprefix("."), value) for key, value in pairs]


def fill_environment(record: dict[str, Any]) -> dict[str, Any]:
    """A run's config, its data root taken from this machine; other values from an environment must be given again."""
    values = copy.deepcopy(record)
    data = values.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    if root == f"{FROM_ENVIRONMENT}PRECEPTOR_DATA":
        values["data"]["root"] = os.environ.get("PRECEPTOR_DATA", "datasets")
    for name, value in leaves(values):
        if isinstance(value, str) and value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            raise ConfigError(name, f"came from the environment variable {variable}; give it again: {name}=...")
    return values
