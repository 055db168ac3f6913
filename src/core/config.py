"""A checked config as plain values. Needs neither Hydra nor OmegaConf."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FROM_ENVIRONMENT = "environment:"  # in config.yaml, in place of an environment variable's value

Values = TypeVar("Values", bound=Mapping[str, Any])  # TrainConfig, EvaluateConfig, ...: core.options.declarations


@dataclass(frozen=True)
class Config(Generic[Values]):
    """A checked config: plain dicts and lists, no interpolation left."""

    values: Values
    record: dict[str, Any]  # the values that may be written: a marker in place of each environment variable's value
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
