"""From a node of the config to the object it names, with errors that name the key.

A node is a mapping with `_target_`, the dotted name of a class or function; its other keys are arguments, and nodes
among them are instantiated first. `_partial_`, `_args_` and `_recursive_` mean what they mean in Hydra. Hydra itself is
not needed, so that a notebook that loads a run does not import it.
"""

import functools
import inspect
import pydoc
from collections.abc import Collection, Mapping
from typing import Any

from core.errors import ConfigError, PreceptorError, suggest

SPECIAL_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def construct(node: Mapping[str, Any], section: str, **extra: Any) -> Any:
    """Return the object that a config node names, `extra` among its arguments.

    Raises ConfigError, with its key, for an argument that the class does not take or refuses.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{section}._target_", "missing: the class or function to build")
    check_arguments(node, section, given=extra)
    try:
        return _instantiate(node, section, extra)
    except _Refused as refused:
        cause = refused.__cause__
        if isinstance(cause, ConfigError):
            raise cause.under(section) from None
        if isinstance(cause, PreceptorError):
            raise cause from None
        raise ConfigError(section, str(cause), value=node["_target_"]) from cause


class _Refused(Exception):
    """The target of a node raised the error that is the cause of this one."""


def _instantiate(node: Mapping[str, Any], section: str, extra: Mapping[str, Any]) -> Any:
    build = (lambda value, key: _build_within(value, f"{section}.{key}")) if node.get("_recursive_", True) else None
    given = {key: value for key, value in node.items() if key not in SPECIAL_KEYS}
    positional = list(node.get("_args_", ()))
    if build:
        given = {key: build(value, key) for key, value in given.items()}
        positional = [build(value, "_args_") for value in positional]
    target = resolve(section, node["_target_"])
    try:
        make = functools.partial(target, *positional, **given | dict(extra))
        return make if node.get("_partial_") else make()
    except Exception as exception:
        raise _Refused from exception


def _build_within(value: Any, section: str) -> Any:
    """Instantiate the nodes in a value, at any depth of its mappings and lists."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _instantiate(value, section, {})
        return {key: _build_within(item, f"{section}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_build_within(item, f"{section}.{index}") for index, item in enumerate(value)]
    return value


def resolve(section: str, target: Any) -> Any:
    """Return the class or function of a dotted name; ConfigError, with the nearest name, if there is none."""
    key = f"{section}._target_"
    if not isinstance(target, str) or not target:
        raise ConfigError(key, "must be the dotted name of a class or function", value=target)
    try:
        found = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(key, f"cannot be imported: {error.exc}: {error.value}", value=target) from None
    if found is None:
        parent, _, name = target.rpartition(".")
        hint = suggest(name, dir(pydoc.locate(parent)) if parent else ())
        raise ConfigError(key, f"cannot be imported: there is no such class or function; {hint}", value=target)
    if not callable(found):
        raise ConfigError(key, f"leads to a {type(found).__name__}, not to a class or function", value=target)
    return found


def parameters_of(target: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a class or function; None if it has no signature, as some of Python's own."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def check_arguments(
    node: Mapping[str, Any], section: str, *, given: Collection[str] = (), also: Collection[str] = ()
) -> None:
    """Raise ConfigError for a key that the target does not take.

    The builder adds the arguments `given`, and other code reads the keys `also`.
    """
    parameters = parameters_of(resolve(section, node["_target_"]))
    if parameters is None:
        return
    for key, value in node.items():
        if isinstance(value, Mapping) and "_target_" in value:
            check_arguments(value, f"{section}.{key}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key, value in node.items():
        if not key.startswith("_") and key not in parameters and key not in also:
            known = [*(name for name in parameters if name not in given), *also]
            hint = suggest(key, known) or f"it takes {', '.join(known)}"
            raise ConfigError(f"{section}.{key}", f"{node['_target_']} takes no such argument; {hint}", value=value)
