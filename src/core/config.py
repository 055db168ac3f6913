"""Where a script's config comes from: what Hydra composed, or a run's own file; plain values, checked.

composed -> resolved, and once more without the environment's values -> check
RUN/config.yaml -> the overrides given by hand, where they may change -> check
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from core.errors import CheckpointError, ConfigError, spell, suggest
from core.schema import ADDED_LATER, FREE_ON_RESUME, Rule, check, leaves

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


def settle(
    composed: DictConfig, rules: Mapping[str, Rule], *, choices: Mapping[str, Any], job: int | None = None
) -> Config:
    """Resolve a composed config and check it; `choices` are the names of the options that were chosen, by group."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(missing[0], f"mandatory; set it on the command line: {missing[0]}=...", value="???")
    values = _plain(composed)
    record = _without_environment(composed)
    if "augment" in rules:  # augment=[] chooses no file at all
        values.setdefault("augment", {})
        record.setdefault("augment", {})
    if "choices" in rules:
        named = {group: str(option) for group, option in choices.items() if group in values}
        values["choices"] = record["choices"] = named
    check(values, rules, shown=record)
    return Config(values=values, record=record, changes={}, job=job)


def _without_environment(composed: DictConfig) -> dict[str, Any]:
    """The config resolved once more, with a marker wherever an environment variable would have been read."""

    def marker(name: str, default: Any = None) -> Any:
        return f"{FROM_ENVIRONMENT}{name}" if name in os.environ else default

    OmegaConf.register_new_resolver("oc.env", marker, replace=True)
    try:
        OmegaConf.clear_cache(composed)
        return _plain(composed)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
        OmegaConf.clear_cache(composed)


def _plain(composed: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def resumed_folder(arguments: list[str]) -> Path | None:
    """The folder of a `resume=` among the arguments; it is needed before anything is composed."""
    values = [item.partition("=")[2] for item in arguments if item.partition("=")[0].lstrip("+") == "resume"]
    named = [value.strip("'\"") for value in values if value.strip("'\"") not in ("", "null")]
    return Path(named[-1]) if named else None


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
    for name, before in ADDED_LATER.items():
        section, _, key = name.rpartition(".")
        if isinstance(record.get(section), dict):
            record[section].setdefault(key, before)
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
    root = values.get("data", {}).get("root")
    if root == f"{FROM_ENVIRONMENT}PRECEPTOR_DATA":
        values["data"]["root"] = os.environ.get("PRECEPTOR_DATA", "datasets")
    for name, value in leaves(values):
        if isinstance(value, str) and value.startswith(FROM_ENVIRONMENT):
            variable = value.removeprefix(FROM_ENVIRONMENT)
            raise ConfigError(name, f"came from the environment variable {variable}; give it again: {name}=...")
    return values


def resumed(folder: Path, arguments: list[str], rules: Mapping[str, Rule]) -> Config:
    """The config of a run to go on with: the run's own, and the overrides given by hand, where they may be changed."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(flags[0], "not together with resume=; a run is resumed by itself")
    record = read_run_config(folder)
    values = copy.deepcopy(record)
    changes: dict[str, list[Any]] = {}
    own: dict[str, Any] = {"resume": str(folder), "trust": [], "traceback": False}
    known = dict(leaves(record))
    for override in OverridesParser.create().parse_overrides(arguments):
        name, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(name, "takes one value on resume", value=str(override.input_line).partition("=")[2])
        if name in own:
            own[name] = value
        elif name not in known:
            raise ConfigError(name, f"unknown key; {suggest(name, known)}", value=value)
        elif known[name] != value:
            changes[name] = [known[name], value]
    refused = {name: change for name, change in changes.items() if name not in FREE_ON_RESUME}
    if refused:
        diff = "; ".join(f"{name}: {_brief(before)} -> {_brief(now)}" for name, (before, now) in refused.items())
        raise CheckpointError(
            f"resume={folder}",
            f"a resumed run may not change {diff}. Free to change: {', '.join(FREE_ON_RESUME)}; "
            "for anything else start anew, with init_from= for its weights",
        )
    if "optimizer.momentum" in changes and values["schedule"].get("momentum") is not None:
        raise ConfigError("optimizer.momentum", "is what schedule.momentum moves, from its own lowest to its highest")
    for name, (_, value) in changes.items():
        parent, _, key = name.rpartition(".")
        for config in (values, record):
            section = config
            for part in parent.split("."):
                section = section[part]
            section[key] = value
    values = fill_environment(values)
    values |= own
    check(values, rules, shown=record | own)
    return Config(values=values, record=record, changes=changes, job=None, from_run=True)


def _brief(value: Any) -> str:
    return value.get("_target_", "...") if isinstance(value, dict) else spell(value)
