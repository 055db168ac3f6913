"""Overrides of a command line: parsed by Hydra's own parser, and checked before Hydra composes them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from core.errors import ConfigError, nearest, suggest
from core.options.files import keys_of_options, options_of_group, options_with
from core.options.schema import Option, Schema, options_of


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Return the parsed overrides of a command line. Raises ConfigError for an argument that is not KEY=VALUE."""
    overrides = []
    for argument in arguments:
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException as exception:
            problem = str(exception).partition("\n")[0]
            raise ConfigError(argument, f"must be KEY=VALUE in Hydra's syntax: {problem}") from None
    return overrides


def with_quoted_paths(arguments: Sequence[str], schema: Schema) -> list[str]:
    """Return the arguments with `~` expanded in paths, and with quotes around paths that Hydra would read otherwise.

    So `data.root=~/photos`, `run_dir=a=b` and `resume=Läufe/[1]` can be typed like any other path. Values in quotes,
    interpolations and grids stay as they are.
    """
    options = options_of(schema)
    is_grid = bool({"-m", "--multirun"} & set(arguments))
    return [_with_quoted_path(argument, options, is_grid=is_grid) for argument in arguments]


def _with_quoted_path(argument: str, options: Mapping[str, Option], *, is_grid: bool) -> str:
    key, equals, value = argument.partition("=")
    option = options.get(key.lstrip("+"))
    if not equals or option is None or not option.is_path or value == "null" or "${" in value or value[:1] in "'\"":
        return argument
    if option.takes_lists and value.startswith("[") and value.endswith("]"):
        return argument
    path = expanded_home(value)
    try:
        (override,) = OverridesParser.create().parse_overrides([f"{key}={path}"])
        if is_grid if override.is_sweep_override() else override.value() == path:
            return f"{key}={path}"
    except HydraException:
        pass  # a character that Hydra's grammar does not allow outside quotes
    return f"{key}={QuotedString(path, Quote.single).with_quotes()}"


def expanded_home(path: str) -> str:
    """Return a path with the home folder of the user in place of a leading `~`."""
    return os.path.expanduser(path)  # noqa: PTH111  keeps an unknown user's name, where Path raises


def check_overrides(overrides: Sequence[Override], schema: Schema | None, *, folders: Sequence[Path] = ()) -> None:
    """Raise ConfigError for the first override that is invalid for every config.

    Such overrides choose an option that the group does not have, set a key that is not declared, or set a section to a
    single value. `folders` are the folders of --config-dir.
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
    """Return the options of a group in configs/ and in the folders of the user; empty if it is not a group."""
    from_user = {path.stem for folder in folders for path in (folder / group).glob("[!_]*.yaml")}
    return sorted({*options_of_group(group), *from_user})


def _check_choice(group: str, override: Override, options: Sequence[str], schema: Schema) -> None:
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return
    is_section = any(name.startswith(f"{group}.") for name in options_of(schema))
    for value in values_of(override):
        names = value if isinstance(value, list) else [value]
        if isinstance(value, str) and "${" in value:
            continue
        if any(not isinstance(name, str) for name in names) and (is_section or value is not None):
            raise ConfigError(group, f"must be one of {', '.join(options)}", value=value)
        for name in names:
            if name is not None and name not in options:
                raise no_such_option(group, name, options)


def no_such_option(group: str, name: str, options: Sequence[str]) -> ConfigError:
    """Return the error for an option that a group does not have."""
    hint = suggest(name, options)
    known = ", ".join(options)
    text = f"no such option; {hint} One of: {known}" if hint else f"no such option; one of: {known}"
    return ConfigError(group, text, value=name)


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
        raise ConfigError(name, "is a key, not a group: type it without @", value=override.package)


def values_of(override: Override) -> Iterator[Any]:
    """Yield the value of an override, or each value of a grid."""
    if override.is_discrete_sweep():
        yield from override.sweep_iterator()
    elif not override.is_sweep_override():
        yield override.value()


def key_hint(name: str, schema: Schema) -> str:
    """Return a hint for an unknown key: another spelling, section, or option of its group."""
    declared = options_of(schema)
    known = {*declared, *keys_of_options()}
    if name in known:
        options = options_with(name)
        where = f"the chosen option does not have it, but {options} does; " if options else ""
        return f"{where}to pass it to the class: +{name}=..."
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
    return f"known keys: {', '.join(key for key in near if key in declared)}"
