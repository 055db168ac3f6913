"""The arguments of a command: bare names, flags, overrides, and the order that Hydra wants them in."""

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from core.errors import ConfigError, suggest
from core.options.schema import Schema, options_of

HELP = {"--help", "-h"}
FLAGS = (  # of Hydra's, less --experimental-rerun, which opens a pickle
    *sorted(HELP),
    *("--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i"),
    *("--shell-completion", "-sc"),
)


def named_arguments(arguments: list[str], schema: Schema) -> list[str]:
    """Return the arguments with their keys: `evaluate.py RUN` as `run=RUN`, `train.py resume RUN` as `resume=RUN`."""
    if "" in arguments:
        raise ConfigError("command line", "has an empty argument; write KEY=null for no value")
    declared = options_of(schema)
    if "resume" in arguments[:-1] and "resume" in declared:
        place = arguments.index("resume")
        return [*arguments[:place], f"resume={arguments[place + 1]}", *arguments[place + 2 :]]
    bare = [item for item in arguments if "=" not in item and not item.startswith(("-", "~"))]
    takes_value = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
    takes_value |= {"--cfg", "-c", "--info", "-i"}
    if "run" in declared and bare == arguments[:1] and not takes_value & set(arguments):
        return [f"run={bare[0]}", *arguments[1:]]
    return arguments


def asks_for_help(arguments: list[str]) -> bool:
    """For ours: together with other things that Hydra may be asked for, `--help` is left to it."""
    flags = {item.partition("=")[0] for item in arguments}
    others = {"--hydra-help", "--cfg", "-c", "--resolve", "--info", "-i", "--shell-completion", "-sc"}
    return bool(HELP & flags) and flags.isdisjoint(others) and not any(flag.startswith("hydra") for flag in flags)


def config_folders(arguments: list[str]) -> list[Path]:
    """Return the folders of --config-dir."""
    given = [item.partition("=")[2] for item in arguments if item.startswith(("--config-dir=", "-cd="))]
    given += [after for item, after in itertools.pairwise(arguments) if item in ("--config-dir", "-cd")]
    return [Path(each).absolute() for each in given]


@contextlib.contextmanager
def argv_for_hydra() -> Iterator[tuple[str, list[str]]]:
    """Put flags first, as Hydra's argparse wants them; yields a folder for Hydra's files, and the overrides.

    The multirun.yaml that Hydra writes for a grid goes to that folder, which is deleted: the run folders hold all there
    is to know of its jobs.
    """
    before = list(sys.argv)
    overrides = [item for item in before[1:] if item[0] != "-" and ("=" in item or item[0] == "~")]
    others = [item for item in before[1:] if item not in overrides]
    for flag in (item.partition("=")[0] for item in others if item.startswith("-")):
        if flag not in FLAGS:  # argparse would print its usage
            raise ConfigError(flag, f"unknown flag; {suggest(flag, FLAGS) or 'known: ' + ' '.join(FLAGS)}")
    with tempfile.TemporaryDirectory(prefix="preceptor-") as scratch:
        if {"-m", "--multirun"} & set(others) and not any(item.startswith("hydra.sweep.dir=") for item in overrides):
            overrides.append(f"hydra.sweep.dir={scratch}")
        sys.argv[1:] = others + overrides
        try:
            yield scratch, overrides
        finally:
            sys.argv[:] = before
