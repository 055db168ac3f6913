"""Instantiation: from a node of the config to the object that it names, with errors that name the key.

A node is a mapping with `_target_`, the dotted name of a class or function. Its other keys are arguments; nodes among
them are instantiated first. `_partial_`, `_args_` and `_recursive_` work as in Hydra; `_convert_` has no effect, as all
values are plain. Hydra itself is not needed: a notebook that loads a run does not import it.
"""

import functools
import inspect
import pydoc
from collections.abc import Collection, Mapping
from typing import Any

from core.errors import ConfigError, PreceptorError, suggest
from core.options.files import options_with

SPECIAL_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")

# No config may instantiate these, not even the user's: a card or a YAML file may come from another person. This is no
# sandbox, as an installed class can do anything. A config of a run folder is limited to what `build.trust` lists.
REFUSED_MODULES = {
    *("_operator", "_pickle", "code", "codeop", "ctypes", "importlib", "inspect", "marshal", "nt", "operator", "os"),
    *("pickle", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser"),
}
REFUSED_BUILTINS = {
    *("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "exit", "filter", "getattr", "globals", "help"),
    *("input", "locals", "map", "open", "quit", "setattr", "type", "vars"),
}


def construct(node: Mapping[str, Any], section: str, **extra: Any) -> Any:
    """Return the object that a config node names; `extra` are further arguments.

    Raises ConfigError, which names the key, for an argument that the class does not take or refuses.
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
    """The class or function of a node raised an error, which is the cause of this one."""


def _instantiate(node: Mapping[str, Any], section: str, extra: Mapping[str, Any]) -> Any:
    is_partial, is_recursive, positional = (
        node.get(key, default) for key, default in (("_partial_", False), ("_recursive_", True), ("_args_", []))
    )
    for key, value in (("_partial_", is_partial), ("_recursive_", is_recursive)):
        if not isinstance(value, bool):
            raise ConfigError(f"{section}.{key}", "must be true or false", value=value)
    if not isinstance(positional, list):
        raise ConfigError(f"{section}._args_", "must be a list", value=positional)
    named = {key: value for key, value in node.items() if key not in SPECIAL_KEYS}
    if is_recursive:
        named = {key: _build_within(value, f"{section}.{key}") for key, value in named.items()}
        positional = _build_within(positional, f"{section}._args_")
    target = resolve(section, node["_target_"])
    try:
        make = functools.partial(target, *positional, **named | dict(extra))
        return make if is_partial else make()
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


def locate(name: str) -> object:
    """Return the object with a dotted name; None if there is none. Raises pydoc.ErrorDuringImport."""
    found = pydoc.locate(name)
    if inspect.ismodule(found):
        # From Python 3.12 on, pydoc finds the module torchvision/models/alexnet.py, not the function of the same name.
        parent, _, attribute = name.rpartition(".")
        return getattr(pydoc.locate(parent), attribute, found) if parent else found
    return found


def resolve(section: str, target: Any) -> Any:
    """Return the class or function of a dotted name. Raises ConfigError, with the nearest name, if there is none."""
    key = f"{section}._target_"
    if not isinstance(target, str) or not target:
        raise ConfigError(key, "must be the dotted name of a class or function", value=target)
    try:
        found = locate(target)
    except pydoc.ErrorDuringImport as error:
        raise ConfigError(key, f"cannot be imported: {error.exc}: {error.value}", value=target) from None
    if found is None:
        parent, _, name = target.rpartition(".")
        hint = suggest(name, dir(pydoc.locate(parent)) if parent else ())
        raise ConfigError(key, f"cannot be imported: there is no such class or function; {hint}", value=target)
    module = str(getattr(found, "__module__", None) or "")
    if module.partition(".")[0] in REFUSED_MODULES or (
        module == "builtins" and getattr(found, "__name__", "") in REFUSED_BUILTINS
    ):
        raise ConfigError(key, "is refused: it runs commands or code, or changes files", value=target)
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
        if isinstance(value, Mapping) and "_target_" in value and node.get("_recursive_", True):
            check_arguments(value, f"{section}.{key}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key, value in node.items():
        if not key.startswith("_") and key not in parameters and key not in also:
            known = [*(name for name in parameters if name not in given), *also]
            hint = suggest(key, known) or f"it takes {', '.join(known)}"
            if options := options_with(f"{section}.{key}"):
                hint = f"{options} {'has' if ',' not in options else 'have'} it; {hint}"
            raise ConfigError(f"{section}.{key}", f"{node['_target_']} takes no such argument; {hint}", value=value)
