"""The arguments of a command: run folders without a key, flags, overrides, and the order that Hydra requires."""

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from core.errors import ConfigError, suggest
from core.options.files import options_of_group
from core.options.schema import Schema, options_of

HELP = {"--help", "-h"}
FLAGS = (  # Hydra's flags, without --experimental-rerun, which opens a pickle
    *sorted(HELP),
    *("--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i"),
    *("--shell-completion", "-sc"),
)
FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
FLAGS_WITH_VALUE |= {"--cfg", "-c", "--info", "-i"}
EXCLUSIVE_FLAGS = {"--run", "-r", "--multirun", "-m", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}


def named_arguments(arguments: list[str], schema: Schema) -> list[str]:
    """Return the arguments with their keys: `evaluate.py RUN` as `run=RUN`, `train.py resume RUN` as `resume=RUN`.

    Raises ConfigError for any other argument that is neither a flag nor KEY=VALUE.
    """
    if "" in arguments:
        raise ConfigError("command line", "has an empty argument; for no value type KEY=null")
    declared = options_of(schema)
    if "resume" in arguments[:-1] and "resume" in declared:
        index = arguments.index("resume")
        return [*arguments[:index], f"resume={arguments[index + 1]}", *arguments[index + 2 :]]
    bare = [
        item
        for flag, item in itertools.pairwise(["", *arguments])
        if "=" not in item and not item.startswith(("-", "~")) and flag not in FLAGS_WITH_VALUE
    ]
    if "run" in declared and bare and bare == arguments[:1]:
        return [f"run={bare[0]}", *arguments[1:]]
    if bare:
        raise ConfigError(bare[0], f"must be KEY=VALUE{_key_for(bare[0], declared)}")
    return arguments


def _key_for(word: str, declared: Mapping[str, object]) -> str:
    """Return a hint for a word without a key: the key itself, or the group that has an option of this name."""
    groups = [group for group in declared if "." not in group and word in options_of_group(group)]
    near = f"{word}=..." if word in declared else f"{groups[0]}={word}" if groups else ""
    return f"; did you mean {near}?" if near else ""


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether to print the built-in help. Hydra handles `--help` if another of its options is present."""
    flags = {item.partition("=")[0] for item in arguments}
    others = {"--hydra-help", "--cfg", "-c", "--resolve", "--info", "-i", "--shell-completion", "-sc"}
    return bool(HELP & flags) and flags.isdisjoint(others) and not any(flag.startswith("hydra") for flag in flags)


def config_folders(arguments: list[str]) -> list[Path]:
    """Return the folders of --config-dir."""
    folders = [item.partition("=")[2] for item in arguments if item.startswith(("--config-dir=", "-cd="))]
    folders += [value for item, value in itertools.pairwise(arguments) if item in ("--config-dir", "-cd")]
    return [Path(folder).absolute() for folder in folders]


@contextlib.contextmanager
def argv_for_hydra() -> Iterator[tuple[str, list[str]]]:
    """Put flags first in `sys.argv`, as Hydra's argparse requires; yield a folder for Hydra's files, and the overrides.

    Hydra writes multirun.yaml of a grid to that folder, which is deleted: the run folders contain all information about
    the jobs.
    """
    original_argv = list(sys.argv)
    of_flags = {item for flag, item in itertools.pairwise(original_argv) if flag in FLAGS_WITH_VALUE}  # may contain `=`
    free = [item for item in original_argv[1:] if item not in of_flags]
    overrides = [item for item in free if item[0] != "-" and ("=" in item or item[0] == "~")]
    others = [item for item in original_argv[1:] if item not in overrides]
    for flag in (item.partition("=")[0] for item in others if item.startswith("-")):
        if flag not in FLAGS:  # argparse would print its usage
            raise ConfigError(flag, f"unknown flag; {suggest(flag, FLAGS) or 'known: ' + ' '.join(FLAGS)}")
    if len(exclusive := [item for item in others if item.partition("=")[0] in EXCLUSIVE_FLAGS]) > 1:
        raise ConfigError(exclusive[1], f"cannot be combined with {exclusive[0]}")
    with tempfile.TemporaryDirectory(prefix="preceptor-") as scratch:
        if {"-m", "--multirun"} & set(others) and not any(item.startswith("hydra.sweep.dir=") for item in overrides):
            overrides.append(f"hydra.sweep.dir={scratch}")
        sys.argv[1:] = others + overrides
        try:
            yield scratch, overrides
        finally:
            sys.argv[:] = original_argv
