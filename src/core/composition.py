"""Configs made by Hydra: composed, resolved, checked; and the config of a run to resume.

composed by Hydra -> resolved, and resolved again without the environment's values -> check -> Config
RUN/config.yaml   -> overrides from the command line, where a change is allowed    -> check -> Config
"""

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.resolvers import oc

from core.config import CONFIGS, FROM_ENVIRONMENT, Config, fill_environment, leaves, read_run_config
from core.errors import CheckpointError, ConfigError, spell, suggest
from core.hydra_errors import as_error
from core.rules import Rule
from core.schema import BATCHES, FREE_ON_RESUME, check


def compose_config(
    config_name: str | None,
    overrides: Sequence[str],
    rules: Mapping[str, Rule],
    *,
    without: Sequence[str] = (),
    missing: Any = "???",
) -> Config:
    """Compose a config as the command line does, without the sections `without`, and check it.

    If `config_name` is None, only the groups that the overrides add are composed. Mandatory keys without a value get
    the value `missing`; by default they are an error.
    """
    GlobalHydra.instance().clear()  # the command line's own composition is done and no longer needed
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            composed = hydra.compose(config_name, list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as exception:
            raise as_error(exception, rules) from None
        facts = facts_of(composed.hydra)
        with open_dict(composed):
            for section in ("hydra", *without):
                del composed[section]
        for key in OmegaConf.missing_keys(composed) if missing != "???" else ():
            OmegaConf.update(composed, key, missing)
        return settle(composed, rules, **facts)


def facts_of(hydra_config: Any) -> dict[str, Any]:
    """Return the arguments of `settle` that Hydra's own section of a composed config knows."""
    return {
        "choices": dict(hydra_config.runtime.choices),
        "overrides": OmegaConf.to_container(hydra_config.overrides.task),  # as typed: an interpolation stays one
        "config_dirs": [each.path for each in hydra_config.runtime.config_sources if each.provider == "command-line"],
    }


def settle(
    composed: DictConfig,
    rules: Mapping[str, Rule],
    *,
    choices: Mapping[str, Any],
    job: int | None = None,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
) -> Config:
    """Resolve a composed config and check it; `choices` maps each group to the name of the option that was chosen."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(missing[0], f"mandatory; set it on the command line: {missing[0]}=...", value="???")
        values = _plain(composed)
    except InterpolationResolutionError:
        if cycle := _cycle(cast(dict[str, Any], OmegaConf.to_container(composed))):
            explanation = f"refers to itself: {' -> '.join([*cycle, cycle[0]])}; give one of them a value"
            raise ConfigError(cycle[0], explanation) from None
        raise
    record = _without_environment(composed)
    if "augment" in rules:  # augment=[] chooses no file at all
        values.setdefault("augment", {})
        record.setdefault("augment", {})
    if "choices" in rules:
        named = {group: str(option) for group, option in choices.items() if group in values}
        values["choices"] = record["choices"] = named
    check(values, rules, shown=record)
    return Config(
        values=values, record=record, changes={}, job=job, overrides=list(overrides), config_dirs=list(config_dirs)
    )


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


def _cycle(unresolved: Mapping[str, Any]) -> list[str]:
    """Return the first keys that are interpolated from one another in a circle."""
    references = {key: re.findall(r"\$\{([\w.]+)\}", str(value)) for key, value in leaves(unresolved)}

    def follow(path: list[str]) -> list[str]:
        for name in references.get(path[-1], ()):
            if name in path:
                return path[path.index(name) :]
            if found := follow([*path, name]):
                return found
        return []

    return next(filter(None, (follow([key]) for key in references)), [])


def resumed_folder(arguments: list[str]) -> Path | None:
    """Return the folder of a `resume=` among the arguments; it is needed before anything is composed."""
    values = [item.partition("=")[2] for item in arguments if item.partition("=")[0].lstrip("+") == "resume"]
    named = [value.strip("'\"") for value in values if value.strip("'\"") not in ("", "null")]
    return Path(named[-1]) if named else None


def resumed(folder: Path, arguments: list[str], rules: Mapping[str, Rule]) -> Config:
    """Return the config of a run to resume: the run's own, with the command line's overrides where a change is allowed.

    Raises CheckpointError if an override changes anything else.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(flags[0], "not together with resume=; a run is resumed by itself")
    if "sweep" in rules:
        raise ConfigError("resume", "is for train.py; the same command line resumes a sweep", value=str(folder))
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
    free = {*FREE_ON_RESUME, *(BATCHES if _same_samples_per_step(known, changes) else ())}
    refused = {name: change for name, change in changes.items() if name not in free}
    if refused:
        diff = "; ".join(f"{name}: {_brief(before)} -> {_brief(now)}" for name, (before, now) in refused.items())
        raise CheckpointError(
            f"resume={folder}",
            f"a resumed run may not change {diff}. Free to change: {', '.join(FREE_ON_RESUME)}, "
            "data.batch_size if data.batch_size x trainer.accumulate stays equal; "
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
    return Config(values=values, record=record, changes=changes, job=None, from_run=True, overrides=list(arguments))


def _same_samples_per_step(before: Mapping[str, Any], changes: Mapping[str, list[Any]]) -> bool:
    """Return whether a step has as many samples as before, in batches of another size perhaps."""
    then = [before.get(name) for name in BATCHES]
    now = [changes[name][1] if name in changes else before.get(name) for name in BATCHES]
    numbers = [number for number in (*then, *now) if type(number) is int]
    return len(numbers) == 4 and math.prod(numbers[:2]) == math.prod(numbers[2:])


def _brief(value: Any) -> str:
    return value.get("_target_", "...") if isinstance(value, dict) else spell(value)
