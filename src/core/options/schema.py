"""Checks of a config against the declarations of its options (core.options.declarations); no torch."""

import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Required, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from core.config import CONFIGS, FROM_ENVIRONMENT, leaves
from core.errors import ConfigError, suggest
from core.options.declarations import TrainConfig
from core.options.rules import Rule, either, flag, list_of, mapping_of, one_of, optional, section, text
from core.options.value_types import FREE_ON_RESUME, IS_PATH, NOT_COMPARED

Schema = type  # a TypedDict of core.options.declarations


@dataclass(frozen=True)
class Option:
    """A declared option, or a section of them."""

    rule: Rule
    is_required: bool
    takes_arguments: bool  # a section whose other keys are arguments of its class, or any keys
    is_free_on_resume: bool
    is_compared: bool
    is_path: bool
    takes_lists: bool


@cache
def options_of(schema: Schema) -> dict[str, Option]:
    """Return the options that a TypedDict declares, by their dotted names; a section comes before its keys."""
    options: dict[str, Option] = {}
    for key, hint in get_type_hints(schema, include_extras=True).items():
        inner, marks = _unwrapped(hint)
        keys = options_of(inner) if is_typeddict(inner) else {}
        options[key] = Option(
            rule=_rule(hint),
            is_required=key in cast(Any, schema).__required_keys__,
            takes_arguments="_target_" in keys or any(get_origin(member) is dict for member in _members(inner)),
            is_free_on_resume=FREE_ON_RESUME in marks,
            is_compared=NOT_COMPARED not in marks,
            is_path=_is_path(hint),
            takes_lists=any(get_origin(_unwrapped(member)[0]) is list for member in _members(inner)),
        )
        options |= {f"{key}.{name}": option for name, option in keys.items()}
    return options


def _unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """Return a type without its annotations, and the annotations."""
    marks: list[Any] = []
    while get_origin(hint) in (Annotated, Required):
        marks += getattr(hint, "__metadata__", ())
        hint = get_args(hint)[0]
    return hint, marks


def _is_path(hint: Any) -> bool:
    inner, marks = _unwrapped(hint)
    return IS_PATH in marks or any(_is_path(member) for member in _members(inner) if member is not inner)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _rule(hint: Any) -> Rule:
    """Return the check of a value that a type and its annotations define."""
    hint, marks = _unwrapped(hint)
    if rules := [mark for mark in marks if isinstance(mark, types.FunctionType)]:
        return rules[-1]
    if get_origin(hint) in (Union, types.UnionType):
        first, *others = [_rule(member) for member in get_args(hint) if member is not type(None)]
        rule = either(first, *others) if others else first
        return optional(rule) if type(None) in get_args(hint) else rule
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    if get_origin(hint) is list:
        return list_of(_rule(get_args(hint)[0]))
    if get_origin(hint) is dict and (of := get_args(hint)[1]) is not Any:
        return section if of is str else mapping_of(_rule(of))
    if is_typeddict(hint) or get_origin(hint) is dict:
        return section
    return {bool: flag, str: text}[hint]


def names_of(schema: Schema, *, free_on_resume: bool | None = None, compared: bool | None = None) -> list[str]:
    """Return the names of the options with these properties; None stands for any value of the property."""
    return [
        name
        for name, option in options_of(schema).items()
        if free_on_resume in (None, option.is_free_on_resume) and compared in (None, option.is_compared)
    ]


def is_compared(name: str) -> bool:
    """Return whether two runs that differ in this key of the training config are different experiments."""
    option = options_of(TrainConfig).get(name)
    return option is None or option.is_compared


def check(config: Mapping[str, Any], schema: Schema, *, record: Mapping[str, Any], markers: bool = False) -> None:
    """Raise ConfigError for the first key that is not declared, or whose value its declaration does not allow.

    `record` is the same config without values of environment variables; errors show its values. With `markers=True`,
    the config itself may hold the markers that stand for these values.
    """
    options = options_of(schema)
    recorded = dict(leaves(record))
    for name, value in leaves(config):
        parent = name.rpartition(".")[0]
        option = options.get(name)
        if option is None and _is_closed(parent, options):
            siblings = [known for known in options if known.rpartition(".")[0] == parent]
            hint = suggest(name, siblings) or f"known here: {', '.join(siblings)}"
            if (CONFIGS / name).is_dir() and isinstance(value, Mapping):
                hint = "a file with keys of the whole config must start with the line # @package _global_"
            raise ConfigError(name, f"unknown key; {hint}", value=recorded[name])
        is_marker = markers and isinstance(value, str) and value.startswith(FROM_ENVIRONMENT)
        if option is not None and not is_marker and (allowed := option.rule(value)):
            raise ConfigError(name, allowed, value=recorded[name])
    for name, option in options.items():  # a required key that is missing in a file of the user
        parent, _, key = name.rpartition(".")
        if option.is_required and key not in _section(config, parent):
            raise ConfigError(name, "missing; see the comment beside this key in configs/")


def _is_closed(name: str, options: Mapping[str, Option]) -> bool:
    """Return whether a section holds only declared keys. A section with arguments of a class may hold others."""
    return not name or (name in options and not options[name].takes_arguments)


def _section(config: Mapping[str, Any], dotted: str) -> Mapping[str, Any]:
    for key in filter(None, dotted.split(".")):
        config = config[key]
    return config
