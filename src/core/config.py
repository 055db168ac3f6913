"""A checked config as plain values. Imports neither Hydra nor OmegaConf."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from core.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FROM_ENVIRONMENT = "environment:"  # in config.yaml, marks a value that came from an environment variable

Values = TypeVar("Values", bound=Mapping[str, Any])  # TrainConfig, EvaluateConfig, ...: core.options.declarations


@dataclass(frozen=True)
class Config(Generic[Values]):
    """A checked config: plain dicts and lists without interpolations."""

    values: Values
    record: dict[str, Any]  # the values for files, with a marker in place of each value of an environment variable
    job: int | None  # the job's number in a grid (-m); None for a single run
    from_run: bool = False  # read from a run folder, so only trusted classes may be built
    overrides: list[str] = field(default_factory=list)  # as typed on the command line
    varied: list[str] = field(default_factory=list)  # in a grid, the overrides in which its jobs differ
    config_dirs: list[str] = field(default_factory=list)  # the folders of --config-dir

    def require_new_run(self, script: str) -> None:
        """Raise ConfigError for the config of a resumed run."""
        if self.from_run:
            explanation = f"is supported by train.py only; {script} takes the config of a new run"
            raise ConfigError("resume", explanation, value=self.values["resume"])


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its dotted name and its value; a section comes before its keys."""
    for key, value in config.items():
        yield prefix + str(key), value
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
