"""Trust: a config in a run folder may come from another person, so it may instantiate only trusted classes.

The check uses the module that defines the object, not the name in the config. A config of the user is not restricted.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from core.config import Config
from core.errors import SecurityError
from core.options.declarations import TrainConfig
from trainer.build.instantiate import locate

# Of the built-in modules, only those that configs name: others read and write files.
TRUSTED = (
    *("models", "data.sources.datasets", "data.sources.image_folder", "data.sources.synthetic"),
    *("trainer.optim.schedules", "trainer.optim.scheduling", "trainer.optim.losses", "trainer.optim.muon"),
    *("data.augment.geometry", "data.augment.color", "data.augment.corruptions", "data.augment.mixing"),
    *("torch.nn", "torch.optim", "torchvision.models", "torchvision.transforms"),
)
HYDRA_KEYS = {"_args_", "_convert_", "_recursive_"}
DOWNLOADS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")


def trusted_values(config: Config[TrainConfig]) -> TrainConfig:
    """Return the values to build. Raises SecurityError if the config of a run names a class that is not trusted."""
    if not config.from_run:
        return config.values
    given = {override.lstrip("+").partition("=")[0] for override in config.overrides}
    return restricted(config.values, trust=config.values["trust"], given=given)


def restricted(config: TrainConfig, *, trust: list[str], given: Collection[str] = ()) -> TrainConfig:
    """Return the config of a run with only what it may do: trusted classes, no download, no file outside its folder.

    `given` are the keys that the user sets on the command line; these are not restricted. Raises SecurityError for a
    class that is not trusted.
    """
    values = without_downloads(config)
    refuse_untrusted(values, trust=trust)
    data: Any = dict(values["data"])
    if "download" in data and "data.download" not in given:
        data["download"] = False
    if "cache_dir" in data and "data.cache_dir" not in given:
        data["create_cache"] = False
    return {**values, "model": _without_default_weights(values["model"]), "data": data}


def _without_default_weights(node: Any) -> Any:
    """Return a model's config in which no class of torchvision downloads weights that the config does not mention."""
    if isinstance(node, list):
        return [_without_default_weights(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    filled = {key: _without_default_weights(value) for key, value in node.items()}
    if str(node.get("_target_", "")).startswith("torchvision."):
        parameters = inspect.signature(locate(node["_target_"])).parameters  # type: ignore[arg-type]
        absent = {key: None for key in DOWNLOADS if key in parameters and key not in node}
        filled |= {key: value for key, value in absent.items() if parameters[key].default is not None}
    return filled


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
    found = locate(target)
    module = getattr(found, "__module__", None) or ""
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _within(module, allowed):
        raise SecurityError(name, f"leads to {module or 'nothing'}, which is not trusted", value=target)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)
