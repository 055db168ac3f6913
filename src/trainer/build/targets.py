"""What a config's `_target_` names, and the arguments it takes; mistakes are told by their key."""

import inspect
import pydoc
from collections.abc import Collection, Mapping
from typing import Any

from core.errors import ConfigError, suggest


def resolve(section: str, target: Any) -> Any:
    """What a dotted name leads to; ConfigError, with the nearest name, where it leads nowhere."""
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
    """The arguments that a class or function takes; None for one that keeps them to itself, as some of Python's own."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def check_arguments(
    node: Mapping[str, Any], section: str, *, given: Collection[str] = (), also: Collection[str] = ()
) -> None:
    """Refuse a key that is no argument of the node's class; `given` are filled in by us, `also` are read by others."""
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
