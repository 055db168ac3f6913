"""The config of a run to resume: that of its folder, with the command line's overrides if their keys are free.

Which options are free is part of their declaration. The checkpoint holds the config that it was trained with, so that a
config.yaml that was edited by hand is compared with it (`changes_between`).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from core.config import Config, leaves
from core.errors import CheckpointError, ConfigError, spell, suggest
from core.options.declarations import BATCHES, SweepConfig, TrainConfig
from core.options.overrides import parse_overrides
from core.options.schema import Schema, check, names_of
from core.run_config import checked_run_config, fill_environment

OF_A_START = {*names_of(TrainConfig, free_on_resume=False, compared=False)}
Changes = dict[str, list[Any]]  # key -> [before, now]


def resumed_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of a `resume=` among the arguments; it is needed before anything is composed."""
    values = [item.partition("=")[2] for item in arguments if item.partition("=")[0].lstrip("+") == "resume"]
    named = [value.strip("'\"") for value in values if value.strip("'\"") not in ("", "null")]
    return Path(named[-1]) if named else None


def resumed(folder: Path, arguments: Sequence[str], schema: Schema = TrainConfig) -> Config[TrainConfig]:
    """Return the config of a run to resume: the run's own, with the command line's overrides.

    Raises CheckpointError if an override changes a key that is not free.
    """
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(flags[0], "cannot be combined with resume=")
    if schema is SweepConfig:
        raise ConfigError("resume", "is for train.py; the same command line resumes a sweep", value=str(folder))
    record = cast(dict[str, Any], checked_run_config(folder))
    values = copy.deepcopy(record)
    own: dict[str, Any] = {"resume": str(folder), "trust": [], "traceback": False}
    known, changes = dict(leaves(record)), Changes()
    for override in parse_overrides(arguments):
        name, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(name, "takes one value on resume", value=override.get_value_string())
        if name in own:
            own[name] = value
        elif name not in known:
            raise ConfigError(name, f"unknown key; {suggest(name, known)}", value=value)
        elif known[name] != value:
            changes[name] = [known[name], value]
    refuse_changes(changes, known, source=f"resume={folder}")
    if "optimizer.momentum" in changes and values["schedule"].get("momentum") is not None:
        raise ConfigError("optimizer.momentum", "is what schedule.momentum moves, from its own lowest to its highest")
    for name, (_, value) in changes.items():
        parent, _, key = name.rpartition(".")
        for config in (values, record):
            section = config
            for part in filter(None, parent.split(".")):
                section = section[part]
            section[key] = value
    filled = {**fill_environment(cast(TrainConfig, values)), **own}
    check(filled, TrainConfig, shown=record | own)
    return Config(values=cast(TrainConfig, filled), record=record, job=None, from_run=True, overrides=list(arguments))


def refuse_changes(changes: Changes, before: Mapping[str, Any], *, source: str) -> None:
    """Raise CheckpointError, with a diff, if a change is of a key that is not free on resume.

    `before` are the values of all keys before the changes, by dotted name.
    """
    free = names_of(TrainConfig, free_on_resume=True)
    allowed = {*free, *(BATCHES if _same_samples_per_step(before, changes) else ())}
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
    """Return the options that differ between two configs of a run; "absent" stands for a key that one lacks.

    Sections, and what belongs to a single start (`run_dir`, `trust`, ...), are left out.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    changes = Changes()
    for name in {**old, **new}:
        then, value = old.get(name, "absent"), new.get(name, "absent")
        is_section = isinstance(then, Mapping) or isinstance(value, Mapping)
        if then != value and not is_section and name not in OF_A_START:
            changes[name] = [then, value]
    return changes


def _same_samples_per_step(before: Mapping[str, Any], changes: Mapping[str, list[Any]]) -> bool:
    """Return whether a step has as many samples as before, in batches of another size perhaps."""
    then = [before.get(name) for name in BATCHES]
    now = [changes[name][1] if name in changes else before.get(name) for name in BATCHES]
    numbers = [number for number in (*then, *now) if type(number) is int]
    return len(numbers) == 4 and math.prod(numbers[:2]) == math.prod(numbers[2:])


def _brief(value: Any) -> str:
    return value.get("_target_", "...") if isinstance(value, dict) else spell(value)
