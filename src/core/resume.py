"""Config of a run to resume: the config of its folder, with overrides of the command line for options that are free.

The declaration of an option states whether it is free on resume. Each checkpoint holds the config that it was trained
with. It is compared with config.yaml (`changes_between`), because that file may have been edited by hand.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from core.config import Config, leaves
from core.errors import CheckpointError, ConfigError, spell, suggest
from core.options.commands import SweepConfig
from core.options.declarations import BATCH_SIZE_KEYS, TrainConfig
from core.options.overrides import parse_overrides
from core.options.schema import Schema, check, names_of
from core.run_config import checked_run_config, fill_environment

COMMAND_ONLY = {*names_of(TrainConfig, free_on_resume=False, compared=False)}
Changes = dict[str, list[Any]]  # key -> [before, now]


def resumed_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of `resume=` in the arguments, or None. It is needed before the config is composed."""
    overrides = parse_overrides([item for item in arguments if item.partition("=")[0].lstrip("+") == "resume"])
    folders = [override.value() for override in overrides if not override.is_sweep_override()]
    return Path(folders[-1]) if folders and isinstance(folders[-1], str) and folders[-1] else None


def resumed_config(folder: Path, arguments: Sequence[str], schema: Schema = TrainConfig) -> Config[TrainConfig]:
    """Return the config of a run to resume: the config in its folder, with the overrides of the command line.

    Raises CheckpointError if an override changes a key that is not free.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(flags[0], "cannot be combined with resume=")
    if schema is SweepConfig:
        raise ConfigError(
            "resume", "is an option of train.py; to resume a sweep, repeat its command line", value=str(folder)
        )
    record = cast(dict[str, Any], checked_run_config(folder))
    values = copy.deepcopy(record)
    start_options: dict[str, Any] = {"resume": str(folder), "trust": [], "traceback": False}
    known, changes = dict(leaves(record)), Changes()
    for override in parse_overrides(arguments):
        name, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(name, "must be a single value on resume", value=override.get_value_string())
        if name in start_options:
            start_options[name] = value
        elif name not in known:
            raise ConfigError(name, f"unknown key; {suggest(name, known)}", value=value)
        elif known[name] != value:
            changes[name] = [known[name], value]
    refuse_changes(changes, known, source=f"resume={folder}")
    if "optimizer.momentum" in changes and values["schedule"].get("momentum") is not None:
        raise ConfigError("optimizer.momentum", "cannot be changed: schedule.momentum sets the momentum of each step")
    for name, (_, value) in changes.items():
        parent, _, key = name.rpartition(".")
        for config in (values, record):
            section = config
            for part in filter(None, parent.split(".")):
                section = section[part]
            section[key] = value
    filled = {**fill_environment(cast(TrainConfig, values)), **start_options}
    check(filled, TrainConfig, record=record | start_options)
    return Config(values=cast(TrainConfig, filled), record=record, job=None, from_run=True, overrides=list(arguments))


def refuse_changes(changes: Changes, before: Mapping[str, Any], *, source: str) -> None:
    """Raise CheckpointError with a diff if a changed key is not free on resume.

    `before` maps the dotted name of each key to its value before the changes.
    """
    free = names_of(TrainConfig, free_on_resume=True)
    allowed = {*free, *(BATCH_SIZE_KEYS if _same_samples_per_step(before, changes) else ())}
    refused = {name: change for name, change in changes.items() if name not in allowed}
    if refused:
        diff = "; ".join(f"{name}: {_brief(then)} -> {_brief(now)}" for name, (then, now) in refused.items())
        raise CheckpointError(
            source,
            f"a resumed run may not change {diff}. Free to change: {', '.join(free)}, "
            "data.batch_size if data.batch_size x trainer.accumulate stays equal; "
            "for any other change start a new run, with init_from= for the weights",
        )


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return the options that differ between two configs of a run; "absent" stands for a missing key.

    Sections are left out, and so are options of a single start (`run_dir`, `trust`, ...).
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    changes = Changes()
    for name in {**old, **new}:
        then, value = old.get(name, "absent"), new.get(name, "absent")
        is_section = isinstance(then, Mapping) or isinstance(value, Mapping)
        if then != value and not is_section and name not in COMMAND_ONLY:
            changes[name] = [then, value]
    return changes


def _same_samples_per_step(before: Mapping[str, Any], changes: Mapping[str, list[Any]]) -> bool:
    """Return whether the number of samples per step stays equal."""
    then = [before.get(name) for name in BATCH_SIZE_KEYS]
    now = [changes[name][1] if name in changes else before.get(name) for name in BATCH_SIZE_KEYS]
    numbers = [number for number in (*then, *now) if type(number) is int]
    return len(numbers) == 4 and math.prod(numbers[:2]) == math.prod(numbers[2:])


def _brief(value: Any) -> str:
    return value.get("_target_", "...") if isinstance(value, dict) else spell(value)
