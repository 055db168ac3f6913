"""Configs made by Hydra: composed, resolved, checked; and the config of a run to resume.

composed by Hydra -> resolved, and resolved again without the environment's values -> check -> Config
RUN/config.yaml   -> overrides from the command line, where a change is allowed    -> check -> Config
"""

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from core.config import FROM_ENVIRONMENT, Config, fill_environment, leaves, read_run_config
from core.errors import CheckpointError, ConfigError, PreceptorError, spell, suggest
from core.rules import Rule
from core.schema import FREE_ON_RESUME, check

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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
    return Config(values=values, record=record, changes=changes, job=None, from_run=True, overrides=list(arguments))


def _brief(value: Any) -> str:
    return value.get("_target_", "...") if isinstance(value, dict) else spell(value)


def _hint(name: str, rules: Mapping[str, Rule]) -> str:
    """The known key nearest to a misspelt one, or those of its section; the groups' files know more than the rules."""
    known = set(rules)
    for path in CONFIGS.glob("*/*.yaml"):
        known |= {f"{path.parent.name}.{key}" for key, _ in leaves(yaml.safe_load(path.read_text()) or {})}
    section = name.partition(".")[0] + "." if "." in name else ""
    if name in known:
        return f"not in the options chosen; add it as +{name}=..."
    near = sorted(key for key in known if key.startswith(section) and ("." in key) == ("." in name))
    return suggest(name, near) or f"known there: {', '.join(key for key in near if key in rules)}"


def as_error(exception: Exception, rules: Mapping[str, Rule]) -> PreceptorError:
    """What Hydra says of a command line or a YAML file, in one line: key first, the nearest match behind."""
    if isinstance(exception, PreceptorError):
        return exception
    message = str(exception)
    if isinstance(exception, MissingConfigException) and "/" in str(exception.missing_cfg_file):
        group, _, option = str(exception.missing_cfg_file).rpartition("/")
        found = exception.options or [path.stem for path in (CONFIGS / group).glob("*.yaml")]
        options = sorted(name for name in found if not name.startswith("_"))
        hint = suggest(option, options)
        return ConfigError(group, f"no such option; {hint} One of: {', '.join(options)}", value=option)
    name = message.split("'")[1].lstrip("+~") if message.startswith("Could not") and "'" in message else ""
    if name:
        name = name.partition("=")[0].partition("@")[0]
        given = next((item for item in sys.argv[1:] if item.lstrip("+~").startswith(f"{name}=")), None)
        hint = _hint(name, rules)
        value = {} if given is None else {"value": given.partition("=")[2]}
        if "not in struct" in f"{message} {exception.__cause__}" or "No match" in message:
            return ConfigError(name, f"unknown key; {hint}", **value)
        return ConfigError(name, str(exception.__cause__ or message), **value)
    if message.startswith("Config group override") or isinstance(exception, TypeError):  # model=null, trainer=[3]
        for group, given in (item.lstrip("+").split("=", 1) for item in sys.argv[1:] if "=" in item.lstrip("+")[1:]):
            if (CONFIGS / group).is_dir() and not (CONFIGS / group / f"{given}.yaml").exists():
                options = sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))
                return ConfigError(group, f"must name one of {', '.join(options)}", value=given)
    if message.startswith("Error merging override "):  # trainer.early_stopping=[0]
        name, _, given = message.removeprefix("Error merging override ").partition("=")
        return ConfigError(name.lstrip("+"), str(exception.__cause__ or "does not fit there"), value=given)
    key = getattr(exception, "full_key", None) or getattr(exception, "override", None)
    told = message.partition("\n")[0] if key else message
    return ConfigError(key or "command line", told.strip() or f"cannot be read ({type(exception).__name__})")
