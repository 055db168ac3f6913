"""Hydra's and OmegaConf's errors in one line: which key or file, what is allowed, what to type."""

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from core.config import CONFIGS, leaves
from core.errors import ConfigError, PreceptorError, internal_error, nearest, suggest
from core.rules import Rule


def _keys_of_options() -> dict[str, list[str]]:
    """Return the options of its group that have a key, as {"model.hidden": ["mlp"]}; a base of options is none."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        for key, _ in leaves(yaml.safe_load(path.read_text()) or {}):
            options = found.setdefault(f"{path.parent.name}.{key}", [])
            if not path.stem.startswith("_"):
                options.append(path.stem)
    return found


def _hint(name: str, rules: Mapping[str, Rule]) -> str:
    """Return what an unknown key may have been meant for: another spelling, section, or option of its group."""
    options = _keys_of_options()
    known = {*rules, *options}
    if name in known:
        having = ", ".join(options.get(name, ())[:6])
        where = f"not in the option chosen, but in {name.partition('.')[0]}={having}; " if having else ""
        return f"{where}+{name}=... adds it if the class takes it"
    section = name.rpartition(".")[0]
    near = sorted(key for key in known if key.startswith(section + ".") or (not section and "." not in key))
    if hint := suggest(name, near):
        return hint
    sections = {key.rpartition(".")[0] for key in known if "." in key}
    if section and section not in sections:  # optimiser.lr
        return suggest(name, known)
    if not section:  # lr, epochs
        by_last = {key.rpartition(".")[2]: key for key in sorted(known, reverse=True) if key in rules}
        if near_key := nearest(name, by_last):
            return f"did you mean {by_last[near_key]}?"
    return f"known there: {', '.join(key for key in near if key in rules)}"


def _unreadable_file() -> ConfigError | None:
    """Return the error of the first YAML file that cannot be read, among ours and those of --config-dir."""
    given = [item.partition("=")[2] for item in sys.argv[1:] if item.startswith(("--config-dir=", "-cd="))]
    given += [after for item, after in zip(sys.argv, sys.argv[1:], strict=False) if item in ("--config-dir", "-cd")]
    for folder in (*map(Path, given), CONFIGS):
        for path in sorted(folder.rglob("*.yaml")):
            try:
                yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeError, yaml.YAMLError) as error:
                return ConfigError(str(path), f"cannot be read as YAML in UTF-8: {error}")
    return None


def as_error(exception: BaseException, rules: Mapping[str, Rule]) -> PreceptorError:
    """Return what Hydra reports of a command line or a YAML file as one line: the key, its value, the nearest match.

    Any other exception is an internal error, unless a YAML file cannot be read.
    """
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
    if message.startswith("Config group override"):  # trainer.checkpoint=2 where a group is meant
        return ConfigError("command line", message)
    if message.startswith("Error merging override "):  # trainer.early_stopping=[0]
        name, _, given = message.removeprefix("Error merging override ").partition("=")
        return ConfigError(name.lstrip("+"), str(exception.__cause__ or "does not fit there"), value=given)
    if not isinstance(exception, HydraException | OmegaConfBaseException):
        return _unreadable_file() or internal_error(exception)
    while not str(exception) and (cause := exception.__cause__ or exception.__context__) is not None:
        exception, message = cause, str(cause)  # Hydra wraps some of OmegaConf's errors in one without a message
    key = getattr(exception, "full_key", None) or getattr(exception, "override", None)
    text = (message.partition("\n")[0] if key else message).strip()
    if not text and (error := _unreadable_file()):
        return error
    return ConfigError(key or "command line", text or f"cannot be read ({type(exception).__name__})")
