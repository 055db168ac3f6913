"""How every script starts: Hydra composes, the schema checks, the script's function runs, errors become exit codes.

    command line -> compose (or, with resume=RUN, read the run's own config) -> check -> function(config) -> exit code

Nothing here imports torch, so a mistake in a config is reported in under a second. The frames of a single run are the
script, `launch` and the function; in a grid (-m) Hydra calls the function, through `job`.
"""

import contextlib
import gc
import importlib
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from core.composition import facts_of, resumed, resumed_folder, settle
from core.config import CONFIGS, Config
from core.errors import (
    STOP_SIGNALS,
    ConfigError,
    PreceptorError,
    StopSignal,
    StorageError,
    as_ours,
    internal_error,
    is_hung_up_in_vain,
    suggest,
)
from core.hydra_errors import as_error
from core.rules import Rule

HELP = {"--help", "-h"}
FLAGS = (  # of Hydra's, less --experimental-rerun, which opens a pickle
    *sorted(HELP),
    *("--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i"),
    *("--shell-completion", "-sc"),
)


def launch(main: str, *, config_name: str, rules: Mapping[str, Rule], before_import: str | None = None) -> None:
    """Call the function with the dotted name `main` with a checked config, and exit.

    The function's module is imported after the check, because it imports torch. The function `before_import` gets the
    config before that, to start what can run while torch is imported. A grid (-m) calls both once per job.
    """
    with _exit_code(rules):
        _prepare_environment()
        sys.argv[1:] = named_arguments(sys.argv[1:], rules)
        folder = resumed_folder(sys.argv[1:])
        wants_help = asks_for_help(sys.argv[1:])
        if folder is not None and not wants_help:
            config: Config | None = resumed(folder, sys.argv[1:], rules)
        else:
            jobs = Jobs()
            with _argv_for_hydra() as scratch:
                task = _help if wants_help else _job(main, before_import, rules, jobs, scratch=scratch)
                hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
            if jobs.failures:
                raise jobs.failures[0]
            config = jobs.single
            os.environ.update(jobs.environment)
        if config is not None:
            with _function(main, before_import, config) as function:
                function(config)


@dataclass
class Jobs:
    """What Hydra's calls of `job` leave for `launch`."""

    single: Config | None = None  # the config of a single run; None for a grid, and if Hydra only shows something
    environment: dict[str, str] = field(default_factory=dict)  # hydra.job.env_set of a single run
    failures: list[Exception] = field(default_factory=list)


def _job(
    main: str, before_import: str | None, rules: Mapping[str, Rule], jobs: Jobs, *, scratch: str
) -> Callable[[DictConfig], object]:
    """Return what Hydra calls with a composed config: it keeps that of a single run, and runs one of a grid."""

    def job(composed: DictConfig) -> object:
        # Hydra would report what is raised here in its own words, and only after all jobs.
        hydra_config = HydraConfig.get()
        shutil.rmtree(scratch, ignore_errors=True)  # a kill during the job must not leave it
        number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
        try:
            config = settle(composed, rules, **facts_of(hydra_config), job=number)
            if number is not None:
                with _function(main, before_import, config) as function:
                    return function(config)
            jobs.single = config
            jobs.environment |= hydra_config.job.env_set
        except Exception as exception:
            if _asked_for is not None:
                raise StopSignal(_asked_for) from None
            if number is None:
                jobs.failures.append(exception)
                return None
            error = as_error(exception, rules)
            _trace(exception)
            print(f"job {number}: {error}", file=sys.stderr, flush=True)
            # Without its traceback, which holds on to all that the job had: the next one needs the memory.
            jobs.failures.append(type(error)(error.subject, error.explanation, value=error.value))
            jobs.failures[-1].reported = True  # type: ignore[attr-defined]
            if "BasicLauncher" not in hydra_config.launcher["_target_"]:
                raise jobs.failures[-1] from None  # from another process Hydra brings it here, when all jobs are done
        gc.collect()
        return None

    return job


@contextlib.contextmanager
def _function(main: str, before_import: str | None, config: Config) -> Iterator[Callable[[Config], Any]]:
    """Call the function `before_import` and import the function `main` by their dotted names, for a call within `with`.

    What it raises besides our own errors comes from the machine's storage or memory, or is an internal error.
    """
    global _wants_traceback
    _wants_traceback = bool(config.values.get("traceback"))
    try:
        if before_import is not None:
            _imported(before_import)(config)
        yield _imported(main)
    except PreceptorError:
        raise
    except Exception as exception:
        if (error := as_ours(exception)) is not exception:
            raise error from exception
        raise internal_error(exception) from exception


def _imported(dotted_name: str) -> Callable[[Config], Any]:
    module, _, name = dotted_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _prepare_environment() -> None:
    """Set the process's umask and the variables that libraries read when they are loaded."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("working directory", "does not exist any more; change to another one") from None
    os.umask(os.umask(0o022) | 0o022)  # what a run leaves is written by its user alone
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; `_exit_code` puts them in one line
    # OpenMP's threads wait by spinning, so two runs that share cores slow each other down a hundredfold. (An MLP's step
    # on two cores: 2 ms alone, 184 ms beside another; with 10,000 spins 2.2 and 17 ms.) Torch reads it when it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # NumPy's OpenBLAS starts a thread per core when it is loaded. Without them this process has one thread until torch
    # starts its own, so that worker processes can be forked before that. Built-in code computes with torch, which uses
    # MKL here; elsewhere torch may use OpenBLAS itself.
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextlib.contextmanager
def _exit_code(rules: Mapping[str, Rule]) -> Iterator[None]:
    """Handle stop signals, and turn what is raised within `with` into a line on stderr and the exit code."""
    global _asked_for, _wants_traceback
    _asked_for, _wants_traceback = None, False
    for number in STOP_SIGNALS:
        if not is_hung_up_in_vain(number):
            signal.signal(number, _end)
    try:
        yield
    except StopSignal as stop:
        _ignore_signals()
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _ignore_signals()
        sys.exit(130)
    except Exception as exception:
        _ignore_signals()  # it ends already
        if _asked_for is not None:
            sys.exit(_asked_for)
        error = as_error(exception, rules)
        if not getattr(exception, "reported", False):
            _trace(exception)
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    _ignore_signals()


def _trace(exception: Exception) -> None:
    """Print Python's traceback if the command line or the config asks for it."""
    if _wants_traceback or any(item.lower() == "traceback=true" for item in sys.argv):
        traceback.print_exception(exception)


_wants_traceback = False  # the value of the config's key, as soon as it is known
_last_signal = -math.inf
# The exit code that a signal asks for: code on the way may make an error of its own of what it raises, as imports do.
_asked_for: int | None = None


def _end(number: int, frame: FrameType | None) -> None:
    """While there is no run to save, a signal ends the process; what is begun is cleared away on the way out, for which
    those that follow within a second wait."""
    global _last_signal, _asked_for
    before, _last_signal = _last_signal, time.monotonic()
    _asked_for = 128 + number
    if _last_signal - before > 1:
        raise StopSignal(_asked_for)


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def named_arguments(arguments: list[str], rules: Mapping[str, Rule]) -> list[str]:
    """Return the arguments with their keys: `evaluate.py RUN` as `run=RUN`, `train.py resume RUN` as `resume=RUN`."""
    if "" in arguments:
        raise ConfigError("command line", "has an empty argument; write KEY=null for no value")
    if "resume" in arguments[:-1] and "resume" in rules:
        place = arguments.index("resume")
        return [*arguments[:place], f"resume={arguments[place + 1]}", *arguments[place + 2 :]]
    bare = [item for item in arguments if "=" not in item and not item.startswith(("-", "~"))]
    takes_value = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
    takes_value |= {"--cfg", "-c", "--info", "-i"}
    if "run" in rules and bare == arguments[:1] and not takes_value & set(arguments):
        return [f"run={bare[0]}", *arguments[1:]]
    return arguments


def asks_for_help(arguments: list[str]) -> bool:
    """For ours: together with other things that Hydra may be asked for, `--help` is left to it."""
    flags = {item.partition("=")[0] for item in arguments}
    others = {"--hydra-help", "--cfg", "-c", "--resolve", "--info", "-i", "--shell-completion", "-sc", "--version"}
    return bool(HELP & flags) and flags.isdisjoint(others) and not any(flag.startswith("hydra") for flag in flags)


def _help(composed: DictConfig) -> None:
    """What `--help` prints: the template of the script's config, filled in. Hydra's own help says the same, and takes
    half as long again: it searches all groups anew for each of them."""
    hydra_config = HydraConfig.get()
    groups: dict[str, set[str]] = {}
    for source in hydra_config.runtime.config_sources:
        for path in Path(source.path).glob("**/[!_]*.yaml") if source.schema == "file" else ():
            groups.setdefault(path.parent.relative_to(source.path).as_posix(), set()).add(path.stem)
    shown = sorted(group for group in groups if group != "." and not group.startswith("hydra/"))
    choices = "".join(f"{group}: {', '.join(sorted(groups[group]))}\n" for group in shown)
    text = Template(hydra_config.help.template)
    try:
        print(text.safe_substitute(APP_CONFIG_GROUPS=choices, CONFIG=OmegaConf.to_yaml(composed)), flush=True)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _argv_for_hydra() -> Iterator[str]:
    """Flags first, as Hydra's argparse wants them; and the multirun.yaml that Hydra writes for a grid goes and is lost:
    our run folders hold all there is to know of its jobs."""
    before = list(sys.argv)
    overrides = [item for item in before[1:] if item[0] != "-" and ("=" in item or item[0] == "~")]
    others = [item for item in before[1:] if item not in overrides]
    for flag in (item.partition("=")[0] for item in others if item.startswith("-")):
        if flag not in FLAGS:  # argparse would print its usage
            raise ConfigError(flag, f"unknown flag; {suggest(flag, FLAGS) or 'known: ' + ' '.join(FLAGS)}")
    if asks_for_help(before[1:]):
        others = [item for item in others if item not in (*HELP, "-m", "--multirun")]
    with tempfile.TemporaryDirectory(prefix="preceptor-") as scratch:
        if {"-m", "--multirun"} & set(others) and not any(item.startswith("hydra.sweep.dir=") for item in overrides):
            overrides.append(f"hydra.sweep.dir={scratch}")
        sys.argv[1:] = others + overrides
        try:
            yield scratch
        finally:
            sys.argv[:] = before
