"""A config from a run folder may come from anybody, so it builds only what is known to be harmless.

What counts is the module of the object that a name leads to, not the name. A config that the user wrote runs freely.
"""

import inspect
import pydoc
from collections.abc import Iterator, Mapping
from typing import Any

from core.config import Config
from core.errors import SecurityError
from core.options.declarations import TrainConfig

# Of ours those modules alone whose classes and functions a config is meant to name: others read and write files.
TRUSTED = (
    *("models", "data.sources.datasets", "data.sources.image_folder", "data.sources.synthetic"),
    *("trainer.optim.schedules", "trainer.optim.scheduling", "trainer.optim.losses", "trainer.optim.muon"),
    *("data.augment.geometry", "data.augment.color", "data.augment.corruptions", "data.augment.mixing"),
    *("torch.nn", "torch.optim", "torchvision.models", "torchvision.transforms"),
)
HYDRA_KEYS = {"_args_", "_convert_", "_recursive_"}
DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def trusted_values(config: Config[TrainConfig]) -> TrainConfig:
    """Return the values that may be built; SecurityError if the config of a run names what is not trusted."""
    if not config.from_run:
        return config.values
    values = without_downloads(config.values)
    refuse_untrusted(values, trust=values["trust"])
    return values


def refuse_untrusted(config: Mapping[str, Any], *, trust: list[str]) -> None:
    """Raise SecurityError for a `_target_` whose own module is neither in TRUSTED nor in `trust`."""
    for name, key, value in _nodes(config):
        if key in HYDRA_KEYS:
            raise SecurityError(name, "not allowed in a run's config", value=value)
        if key in DOWNLOADS and value:
            raise SecurityError(
                name, "pretrained weights would be downloaded; the checkpoint has the run's", value=value
            )
        if key == "_target_":
            _refuse_target(name, value, (*TRUSTED, *trust))


def without_downloads(config: TrainConfig) -> TrainConfig:
    """The config with no pretrained weights asked for: those of the run are in its checkpoint."""

    def clean(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: None if key in DOWNLOADS else clean(value) for key, value in node.items()}
        return [clean(value) for value in node] if isinstance(node, list) else node

    return {**config, "model": clean(config["model"])}


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every key in mappings and lists, as (dotted name, key, value): Hydra instantiates within lists too."""
    pairs = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        name = f"{prefix}{key}"
        yield name, str(key), value
        yield from _nodes(value, f"{name}.")


def _refuse_target(name: str, target: Any, allowed: tuple[str, ...]) -> None:
    package = str(target).partition(".")[0]
    named = isinstance(target, str) and _within(target, allowed)
    if not named or any(part.startswith("_") for part in target.split(".")):  # before an import, which runs code
        raise SecurityError(name, f"not trusted in a run's config; trust=[{package}] allows it", value=target)
    found = pydoc.locate(target)
    module = getattr(found, "__module__", None) or ""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _within(module, allowed):
        raise SecurityError(name, f"leads to {module or 'nothing'}, which is not trusted", value=target)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)
