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
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from core.arguments import HELP, argv_for_hydra, asks_for_help, config_folders, named_arguments
from core.composition import as_error, explained, facts_of, settle
from core.config import CONFIGS, Config
from core.errors import (
    STOP_SIGNALS,
    PreceptorError,
    StopSignal,
    StorageError,
    as_preceptor_error,
    internal_error,
    sighup_is_ignored,
)
from core.options.help import help_text
from core.options.overrides import check_overrides, parse_overrides
from core.options.schema import Schema
from core.resume import resumed, resumed_folder


def launch(main: str, *, config_name: str, schema: Schema, before_import: str | None = None) -> None:
    """Call the function with the dotted name `main` with a checked config, and exit.

    The function's module is imported after the check, because it imports torch. The function `before_import` gets the
    config before that, to start what can run while torch is imported. A grid (-m) calls both once per job.
    """
    with _exit_code():
        if "--version" in sys.argv[1:]:
            print(_version())
            return
        _prepare_environment()
        sys.argv[1:] = named_arguments(sys.argv[1:], schema)
        folder, wants_help = resumed_folder(sys.argv[1:]), asks_for_help(sys.argv[1:])
        jobs = Jobs()
        if folder is not None and not wants_help:
            jobs.single = resumed(folder, sys.argv[1:], schema)
        else:
            with argv_for_hydra() as (scratch, arguments):
                overrides, folders = parse_overrides(arguments), config_folders(sys.argv[1:])
                check_overrides(overrides, schema, folders=folders)
                if wants_help:
                    sys.argv[1:] = [item for item in sys.argv[1:] if item not in (*HELP, "-m", "--multirun")]
                    task: Callable[[DictConfig], object] = _help(config_name, schema)
                else:
                    task = _job(main, before_import, schema, jobs, scratch=scratch)
                with explained(overrides, config_name, schema, folders=folders):
                    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
        if jobs.failures:
            raise jobs.failures[0]
        if jobs.single is not None:
            os.environ.update(jobs.environment)
            with _function(main, before_import, jobs.single) as function:
                function(jobs.single)


@dataclass
class Jobs:
    """What Hydra's calls of `job` leave for `launch`."""

    single: Config[Any] | None = None  # the config of a single run; None for a grid, and if Hydra only shows something
    environment: dict[str, str] = field(default_factory=dict)  # hydra.job.env_set of a single run
    failures: list[Exception] = field(default_factory=list)


def _job(
    main: str, before_import: str | None, schema: Schema, jobs: Jobs, *, scratch: str
) -> Callable[[DictConfig], object]:
    """Return what Hydra calls with a composed config: it keeps that of a single run, and runs one of a grid."""

    def job(composed: DictConfig) -> object:
        # Hydra would report what is raised here in its own words, and only after all jobs.
        hydra_config = HydraConfig.get()
        shutil.rmtree(scratch, ignore_errors=True)  # a kill during the job must not leave it
        number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
        try:
            config = settle(composed, schema, **facts_of(hydra_config), job=number)
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
            error = as_error(exception)
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
def _function(main: str, before_import: str | None, config: Config[Any]) -> Iterator[Callable[[Config[Any]], Any]]:
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
        if (error := as_preceptor_error(exception)) is not exception:
            raise error from exception
        raise internal_error(exception) from exception


def _imported(dotted_name: str) -> Callable[[Config[Any]], Any]:
    module, _, name = dotted_name.rpartition(".")
    function: Callable[[Config[Any]], Any] = getattr(importlib.import_module(module), name)
    return function


def _prepare_environment() -> None:
    """Set the process's umask and the variables that libraries read when they are loaded."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("working directory", "does not exist any more; change to another one") from None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as under cron
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  for the rest of the process
        getattr(sys, name).reconfigure(errors="backslashreplace")  # an ASCII terminal shows any class name
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # a launcher's `python -m` imports nothing from the working directory
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
def _exit_code() -> Iterator[None]:
    """Handle stop signals, and turn what is raised within `with` into a line on stderr and the exit code."""
    global _asked_for, _wants_traceback
    _asked_for, _wants_traceback = None, False
    for number in STOP_SIGNALS:
        if not sighup_is_ignored(number):
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
        error = as_error(exception)
        if not getattr(exception, "reported", False):
            with contextlib.suppress(OSError):  # a full disk behind it
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


def _version() -> str:
    """Return the versions of Preceptor and of what it builds on, without importing torch."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "hydra-core"))
    return f"preceptor {version('preceptor')} ({packages}, Python {platform.python_version()})"


def _help(config_name: str, schema: Schema) -> Callable[[DictConfig], None]:
    """Return what Hydra calls to print the help of a composed config."""

    def task(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        folders = [Path(each.path) for each in hydra_config.runtime.config_sources if each.schema == "file"]
        text = help_text(
            hydra_config.help.template,
            cast(dict[str, Any], OmegaConf.to_container(composed)),
            schema=schema,
            choices=dict(hydra_config.runtime.choices),
            config_name=config_name,
            folders=folders,
        )
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return task
