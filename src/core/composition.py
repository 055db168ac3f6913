"""Compose configs with Hydra, resolve and check them, and explain composition errors in one line.

parse and check overrides -> Hydra composes -> resolve; resolve again without the environment's values
-> check against the declarations -> Config

Some errors depend on the composed config. They are explained after composition fails, by applying the overrides one by
one. No text of Hydra's messages is matched.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from omegaconf.resolvers import oc

from core.config import CONFIGS, FROM_ENVIRONMENT, Config, leaves
from core.errors import ConfigError, PreceptorError, internal_error
from core.options.files import first_unreadable_file, options_of_group
from core.options.overrides import (
    check_overrides,
    expanded_home,
    key_hint,
    no_such_option,
    options_in,
    parse_overrides,
    values_of,
)
from core.options.schema import Option, Schema, check, options_of


def compose_config(
    config_name: str | None,
    arguments: Sequence[str],
    schema: Schema | None,
    *,
    folders: Sequence[Path] = (),
    without: Sequence[str] = (),
    missing: Any = "???",
) -> Config[Any]:
    """Compose a config as the command line does, without the sections `without`, and check it.

    If `config_name` is None, only the groups that the overrides add are composed. If `schema` is None, nothing is
    checked. `folders` are the folders of --config-dir. Mandatory keys without a value are set to `missing`; with the
    default `missing`, they are an error.
    """
    overrides = parse_overrides(arguments)
    check_overrides(overrides, schema, folders=folders)
    with hydra_errors_explained(overrides, config_name, schema, folders=folders):
        composed = _compose(config_name, arguments, folders, return_hydra_config=True)
    facts = hydra_facts(composed.hydra)
    with open_dict(composed):
        for section in ("hydra", *without):
            del composed[section]
    for key in OmegaConf.missing_keys(composed) if missing != "???" else ():
        OmegaConf.update(composed, key, missing)
    return resolve_and_check(composed, schema, **facts)


def _compose(
    config_name: str | None, arguments: Sequence[str], folders: Sequence[Path], *, return_hydra_config: bool = False
) -> DictConfig:
    GlobalHydra.instance().clear()  # the composition of the command line is no longer needed
    quoted = [QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders]  # may contain `(`
    path = [f"hydra.searchpath=[{','.join(quoted)}]"] if folders else []
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, [*path, *arguments], return_hydra_config=return_hydra_config)


def hydra_facts(hydra_config: Any, *, grid_keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the arguments of `resolve_and_check` that come from Hydra's section of a composed config.

    `grid_keys` are the keys that have several values in a grid.
    """
    # As typed, with interpolations unresolved.
    overrides = cast(list[str], OmegaConf.to_container(hydra_config.overrides.task))
    return {
        "choices": dict(hydra_config.runtime.choices),
        "overrides": overrides,
        "varied": [override for override in overrides if override.partition("=")[0].lstrip("+") in grid_keys],
        "config_dirs": [
            source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"
        ],
    }


def resolve_and_check(
    composed: DictConfig,
    schema: Schema | None,
    *,
    choices: Mapping[str, Any],
    job: int | None = None,
    overrides: Sequence[str] = (),
    varied: Sequence[str] = (),
    config_dirs: Sequence[str] = (),
) -> Config[Any]:
    """Resolve a composed config and check it; `choices` maps each group to the name of the option that was chosen."""
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(missing[0], f"mandatory; set it on the command line: {missing[0]}=...", value="???")
        values = _plain(composed)
        values.pop("recommended", None)  # values that a model recommends; other keys refer to them
    except InterpolationResolutionError:
        if cycle := _cycle(cast(dict[str, Any], OmegaConf.to_container(composed))):
            explanation = f"refers to itself: {' -> '.join([*cycle, cycle[0]])}; set one of these keys to a value"
            raise ConfigError(cycle[0], explanation) from None
        raise
    record = _without_environment(composed)
    record.pop("recommended", None)
    if schema is not None:
        declared = options_of(schema)
        if "augment" in declared:  # augment=[] chooses no file, so the section is absent
            values.setdefault("augment", {})
            record.setdefault("augment", {})
        if "choices" in declared:
            named = {group: str(option) for group, option in choices.items() if group in values}
            if choices.get("debug"):
                named["debug"] = str(choices["debug"])  # `runs.py` hides debug runs
            values["choices"] = record["choices"] = named
        check(values, schema, record=record)
        for section in (values, record):
            _expand_paths(section, declared)
    return Config(
        values=values,
        record=record,
        job=job,
        overrides=list(overrides),
        varied=list(varied),
        config_dirs=list(config_dirs),
    )


def _expand_paths(config: dict[str, Any], options: Mapping[str, Option]) -> None:
    """Expand `~` in each path of a config, in place."""
    for name, option in options.items():
        *parents, key = name.split(".")
        section: Any = config
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if option.is_path and isinstance(section, dict):
            value = section.get(key)
            if isinstance(value, str):
                section[key] = expanded_home(value)
            elif isinstance(value, list):
                section[key] = [expanded_home(path) for path in value]


def _without_environment(composed: DictConfig) -> dict[str, Any]:
    """Return the config resolved again, with a marker in place of the value of each environment variable."""

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


# Errors


def _cycle(unresolved: Mapping[str, Any]) -> list[str]:
    """Return the first cycle of keys whose interpolations refer to one another."""
    references = {key: re.findall(r"\$\{([\w.]+)\}", str(value)) for key, value in leaves(unresolved)}

    def follow(path: list[str]) -> list[str]:
        for name in references.get(path[-1], ()):
            if name in path:
                return path[path.index(name) :]
            if cycle := follow([*path, name]):
                return cycle
        return []

    return next(filter(None, (follow([key]) for key in references)), [])


@contextlib.contextmanager
def hydra_errors_explained(
    overrides: Sequence[Override], config_name: str | None, schema: Schema | None, *, folders: Sequence[Path] = ()
) -> Iterator[None]:
    """Turn composition errors within `with` into a PreceptorError that names the key or file and what is allowed."""
    try:
        yield
    except PreceptorError:
        raise
    except Exception as exception:
        raise _explanation(exception, overrides, config_name, schema, folders) from exception


def _explanation(
    exception: Exception,
    overrides: Sequence[Override],
    config_name: str | None,
    schema: Schema | None,
    folders: Sequence[Path],
) -> PreceptorError:
    if isinstance(exception, MissingConfigException) and "/" in str(exception.missing_cfg_file):
        group, _, option = str(exception.missing_cfg_file).rpartition("/")
        options = sorted(name for name in exception.options or options_of_group(group) if not name.startswith("_"))
        if group == "hydra/launcher":
            explanation = "its plugin is not installed; type .venv/bin/uv pip install --editable '.[joblib,submitit]'"
            return ConfigError(group, explanation, value=option)
        return no_such_option(group, option, options)
    if error := first_unreadable_file(list(folders)):
        return error
    if schema is not None and (error := _first_misfit(overrides, config_name, schema, folders)):
        return error
    return error_to_report(exception)


def _first_misfit(
    overrides: Sequence[Override], config_name: str | None, schema: Schema, folders: Sequence[Path]
) -> ConfigError | None:
    """Return the error of the first override that does not fit the config that the chosen options compose."""
    choices = [item for item in overrides if item.is_hydra_override() or options_in(item.key_or_group, folders)]
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        composed = _compose(config_name, [str(override.input_line) for override in choices], folders)
        for override in overrides:
            if override not in choices and (error := _misfit(composed, override, schema)):
                return error
    return None


def _misfit(composed: DictConfig, override: Override, schema: Schema) -> ConfigError | None:
    """Apply an override to a composed config; return the error if it does not fit."""
    name, adds = override.key_or_group, override.is_add() or override.is_force_add()
    value_argument = {} if override.is_delete() else {"value": next(values_of(override), None)}
    exists = name in dict(leaves(cast(dict[str, Any], OmegaConf.to_container(composed))))
    if not exists and not adds:
        return ConfigError(name, f"unknown key; {key_hint(name, schema)}", **value_argument)
    if override.is_delete():
        return None
    value = value_argument["value"]
    if exists and override.is_add() and not isinstance(value, dict | list):
        return ConfigError(name, "exists already; leave out the +", value=value)
    try:
        OmegaConf.update(composed, name, value, merge=True, force_add=True)
    except (OmegaConfBaseException, TypeError, ValueError) as exception:
        return ConfigError(name, f"does not fit the config: {str(exception).partition(chr(10))[0]}", value=value)
    return None


def error_to_report(exception: BaseException) -> PreceptorError:
    """Return the PreceptorError for an exception: a ConfigError for Hydra's and OmegaConf's, else an internal error."""
    if isinstance(exception, PreceptorError):
        return exception
    if not isinstance(exception, HydraException | OmegaConfBaseException):
        return internal_error(exception)
    while not str(exception) and (cause := exception.__cause__ or exception.__context__) is not None:
        exception = cause  # Hydra wraps some OmegaConf errors in an error without a message
    key = getattr(exception, "full_key", None)
    text = (str(exception).partition("\n")[0] if key else str(exception)).strip()
    return ConfigError(key or "command line", text or f"cannot be read ({type(exception).__name__})")
