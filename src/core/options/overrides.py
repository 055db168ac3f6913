"""Overrides of a command line: parsed by Hydra's own parser, and checked before Hydra composes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from core.errors import ConfigError, nearest, suggest
from core.options.files import keys_of_options, options_of_group, options_with
from core.options.schema import Schema, options_of


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Return the overrides among which a command line's arguments are; ConfigError for one that is no override."""
    overrides = []
    for argument in arguments:
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException as exception:
            problem = str(exception).partition("\n")[0]
            raise ConfigError(argument, f"is not KEY=VALUE as Hydra reads it: {problem}") from None
    return overrides


def check_overrides(overrides: Sequence[Override], schema: Schema | None, *, folders: Sequence[Path] = ()) -> None:
    """Raise ConfigError for the first override that no config could take.

    That is an option that its group does not have, a key that is not declared, and a value in place of a section.
    `folders` are those of --config-dir.
    """
    for override in overrides:
        name = override.key_or_group
        if override.is_hydra_override() or schema is None:
            continue
        if options := options_in(name, folders):
            if not override.is_delete():
                _check_choice(name, override, options, schema)
        else:
            _check_key(name, override, schema)


def options_in(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the options of a group in configs/ and the user's own folders; none if it is no group."""
    own = {path.stem for folder in folders for path in (folder / group).glob("[!_]*.yaml")}
    return sorted({*options_of_group(group), *own})


def _check_choice(group: str, override: Override, options: Sequence[str], schema: Schema) -> None:
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return
    is_section = any(name.startswith(f"{group}.") for name in options_of(schema))
    for value in values_of(override):
        names = value if isinstance(value, list) else [value]
        if isinstance(value, str) and "${" in value:
            continue
        if any(not isinstance(name, str) for name in names) and (is_section or value is not None):
            raise ConfigError(group, f"must name one of {', '.join(options)}", value=value)
        for name in names:
            if name is not None and name not in options:
                raise no_such_option(group, name, options)


def no_such_option(group: str, name: str, options: Sequence[str]) -> ConfigError:
    """Return the error for an option that a group does not have."""
    return ConfigError(group, f"no such option; {suggest(name, options)} One of: {', '.join(options)}", value=name)


def _check_key(name: str, override: Override, schema: Schema) -> None:
    declared, parent = options_of(schema), name.rpartition(".")[0]
    # Below an option with arguments, only the composed config or the class knows the keys.
    takes_any = any(option.takes_arguments and name.startswith(f"{section}.") for section, option in declared.items())
    if name not in declared and not takes_any:
        values = {} if override.is_delete() else {"value": next(values_of(override), None)}
        raise ConfigError(name, f"unknown key; {key_hint(name, schema)}", **values)
    option = declared.get(name)
    is_section = option is not None and any(key.startswith(f"{name}.") for key in declared)
    if option is not None and (is_section or option.takes_arguments) and not override.is_delete():
        for value in values_of(override):
            if not (isinstance(value, str) and "${" in value) and (allowed := option.rule(value)):
                raise ConfigError(name, allowed, value=value)
    if not parent and override.package is not None:
        raise ConfigError(name, "is a key, not a group: leave out @", value=override.package)


def values_of(override: Override) -> Iterator[Any]:
    """Yield the value of an override, or each value of a grid."""
    if override.is_discrete_sweep():
        yield from override.sweep_iterator()
    elif not override.is_sweep_override():
        yield override.value()


def key_hint(name: str, schema: Schema) -> str:
    """Return what an unknown key may have been meant for: another spelling, section, or option of its group."""
    declared = options_of(schema)
    known = {*declared, *keys_of_options()}
    if name in known:
        options = options_with(name)
        where = f"not in the option chosen, but in {options}; " if options else ""
        return f"{where}+{name}=... adds it if the class takes it"
    section = name.rpartition(".")[0]
    near = sorted(key for key in known if key.startswith(section + ".") or (not section and "." not in key))
    if hint := suggest(name, near):
        return hint
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    if section and section not in sections:  # optimiser.lr
        return suggest(name, known)
    if not section:  # lr, epochs
        by_last = {key.rpartition(".")[2]: key for key in sorted(known, reverse=True) if key in declared}
        if near_key := nearest(name, by_last):
            return f"did you mean {by_last[near_key]}?"
    return f"known there: {', '.join(key for key in near if key in declared)}"
