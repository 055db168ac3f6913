"""Start of every script: Hydra composes, the schema checks, the script's function runs, errors become exit codes.

    command line -> compose (or, with resume=RUN, read the run's own config) -> check -> function(config) -> exit code

Nothing here imports torch, so an error in a config is reported in under a second. A single run has three stack frames:
the script, `launch` and the function. In a grid (-m) Hydra calls the function through `job`.
"""

import atexit
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
from core.composition import error_to_report, hydra_errors_explained, hydra_facts, resolve_and_check
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
from core.options.files import check_yaml_files
from core.options.help import help_text
from core.options.overrides import check_overrides, parse_overrides, with_quoted_paths
from core.options.schema import Schema
from core.resume import resumed_config, resumed_folder


def launch(main: str, *, config_name: str, schema: Schema, before_import: str | None = None) -> None:
    """Call the function with the dotted name `main` with a checked config, and exit.

    The function's module is imported after the check, because it imports torch. Before that import, the function
    `before_import` is called with the config, to start work that can run while torch is imported. A grid (-m) calls
    both functions once per job.
    """
    with _exit_code():
        if "--version" in sys.argv[1:]:
            print(_version())
            return
        _prepare_environment()
        sys.argv[1:] = with_quoted_paths(named_arguments(sys.argv[1:], schema), schema)
        folder, wants_help = resumed_folder(sys.argv[1:]), asks_for_help(sys.argv[1:])
        jobs = Jobs()
        if folder is not None and not wants_help:
            jobs.single = resumed_config(folder, sys.argv[1:], schema)
        else:
            with argv_for_hydra() as (scratch, arguments):
                overrides, folders = parse_overrides(arguments), config_folders(sys.argv[1:])
                check_yaml_files(folders)
                check_overrides(overrides, schema, folders=folders)
                if wants_help:
                    sys.argv[1:] = [item for item in sys.argv[1:] if item not in (*HELP, "-m", "--multirun")]
                    task: Callable[[DictConfig], object] = _help(config_name, schema, jobs)
                else:
                    grid_keys = [override.key_or_group for override in overrides if override.is_sweep_override()]
                    task = _job(main, before_import, schema, jobs, scratch=scratch, grid_keys=grid_keys)
                with hydra_errors_explained(overrides, config_name, schema, folders=folders):
                    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()
        if jobs.help:
            _print_help(jobs.help)
        if jobs.failures:
            raise jobs.failures[0]
        if jobs.single is not None:
            os.environ.update(jobs.environment)
            with _function(main, before_import, jobs.single) as function:
                function(jobs.single)


@dataclass
class Jobs:
    """The results of Hydra's calls of `job`, which `launch` reads."""

    single: Config[Any] | None = None  # the config of a single run; None for a grid, or if Hydra only prints
    environment: dict[str, str] = field(default_factory=dict)  # hydra.job.env_set of a single run
    failures: list[Exception] = field(default_factory=list)
    help: str = ""


def _job(
    main: str, before_import: str | None, schema: Schema, jobs: Jobs, *, scratch: str, grid_keys: list[str]
) -> Callable[[DictConfig], object]:
    """Return the function that Hydra calls: it stores the config of a single run, or runs a job of a grid."""

    def job(composed: DictConfig) -> object:
        # Exceptions are caught here: Hydra would report them in its own format, and only after all jobs.
        hydra_config = HydraConfig.get()
        in_this_process = "BasicLauncher" in hydra_config.launcher["_target_"]
        if in_this_process:  # other launchers keep files of their jobs in it
            shutil.rmtree(scratch, ignore_errors=True)  # now, so that a kill during the job does not leave it behind
        number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
        try:
            facts = hydra_facts(hydra_config, grid_keys=grid_keys)
            config = resolve_and_check(composed, schema, **facts, job=number)
            if number is not None:
                with _function(main, before_import, config) as function:
                    return function(config)
            jobs.single = config
            jobs.environment |= hydra_config.job.env_set
        except Exception as exception:
            if _signal_exit_code is not None:
                raise StopSignal(_signal_exit_code) from None
            if number is None:
                jobs.failures.append(exception)
                return None
            error = error_to_report(exception)
            _print_traceback(exception)
            print(f"job {number}: {error}", file=sys.stderr, flush=True)
            # A copy without the traceback, which keeps all objects of the job alive: the next job needs the memory.
            jobs.failures.append(type(error)(error.subject, error.explanation, value=error.value))
            jobs.failures[-1].reported = True  # type: ignore[attr-defined]
            if not in_this_process:
                raise jobs.failures[-1] from None  # in another process; Hydra re-raises it here after all jobs
        gc.collect()
        return None

    return job


@contextlib.contextmanager
def _function(main: str, before_import: str | None, config: Config[Any]) -> Iterator[Callable[[Config[Any]], Any]]:
    """Call the function `before_import`, import the function `main` (both by dotted name) and yield `main`.

    An exception within `with` that is no PreceptorError becomes one: a storage, memory or internal error.
    """
    global _wants_traceback
    _wants_traceback = bool(config.values.get("traceback"))
    try:
        if before_import is not None:
            _import_function(before_import)(config)
        yield _import_function(main)
    except PreceptorError:
        raise
    except Exception as exception:
        if (error := as_preceptor_error(exception)) is not exception:
            raise error from exception
        raise internal_error(exception) from exception


def _import_function(dotted_name: str) -> Callable[[Config[Any]], Any]:
    module, _, name = dotted_name.rpartition(".")
    function: Callable[[Config[Any]], Any] = getattr(importlib.import_module(module), name)
    return function


def _prepare_environment() -> None:
    """Set the process's umask and the environment variables that libraries read when they are loaded."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise StorageError("working directory", "no longer exists; change to another one") from None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, for example under cron
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  stays open until the process ends
        getattr(sys, name).reconfigure(errors="backslashreplace")  # an ASCII terminal can show every class name
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # for a launcher's `python -m`: no imports from the working directory
    os.umask((os.umask(0o022) | 0o022) & 0o077)  # only the user can write to the files of a run, and the user can
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions pass through Hydra; `_exit_code` prints them as one line
    # OpenMP's threads wait by spinning, so two runs that share cores slow each other down by a factor of 100. (Step
    # time of an MLP on two cores: 2 ms alone, 184 ms with a second run; with 10,000 spins 2.2 ms and 17 ms.) Torch
    # reads the variable when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # NumPy's OpenBLAS starts one thread per core when it is loaded. With this setting, the process has one thread until
    # torch starts threads, so worker processes can be forked before that. Built-in code computes with torch, which uses
    # MKL on x86-64; on other machines torch may use OpenBLAS itself.
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextlib.contextmanager
def _exit_code() -> Iterator[None]:
    """Handle stop signals; turn an exception within `with` into one line on stderr and an exit code."""
    global _signal_exit_code, _wants_traceback
    _signal_exit_code, _wants_traceback = None, False
    atexit.unregister(_ignore_signals)
    atexit.register(_ignore_signals)  # before other modules register theirs, so it is called after them
    for number in STOP_SIGNALS:
        if not sighup_is_ignored(number):
            signal.signal(number, _on_signal)
    try:
        yield
    except StopSignal as stop:
        _exit_on_repeated_signal(stop.exit_code)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        _exit_on_repeated_signal(130)
        sys.exit(130)
    except Exception as exception:
        _exit_on_repeated_signal(_signal_exit_code or 1)  # explaining the error may take time
        if _signal_exit_code is not None:
            sys.exit(_signal_exit_code)
        error = error_to_report(exception)
        if not getattr(exception, "reported", False):
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                _print_traceback(exception)
                print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    _ignore_signals()


def _print_traceback(exception: Exception) -> None:
    """Print Python's traceback if the command line or the config has traceback=true."""
    if _wants_traceback or any(item.lower() == "traceback=true" for item in sys.argv):
        traceback.print_exception(exception)


_wants_traceback = False  # the config's key `traceback`, once the config is known
_last_signal = -math.inf
# The exit code after a signal, stored because other code, such as an import, may replace StopSignal by its own error.
_signal_exit_code: int | None = None


def _on_signal(number: int, frame: FrameType | None) -> None:
    """End the process while there is no run to save.

    Signals that follow within a second of another are ignored, so that clean-up handlers can finish.
    """
    global _last_signal, _signal_exit_code
    previous_signal, _last_signal = _last_signal, time.monotonic()
    _signal_exit_code = 128 + number
    if _last_signal - previous_signal > 1:
        raise StopSignal(_signal_exit_code)


def _exit_on_repeated_signal(exit_code: int) -> None:
    """Let a signal end the process at once, unless it follows within a second of another.

    From here on the process only reports and cleans up. Signals are ignored only when Python itself shuts down, after
    all that could take long.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - _last_signal > 1:
            os._exit(exit_code)

    for number in STOP_SIGNALS:
        signal.signal(number, end)


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _version() -> str:
    """Return the versions of Preceptor and of its main dependencies, without importing torch."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "hydra-core"))
    return f"preceptor {version('preceptor')} ({packages}, Python {platform.python_version()})"


def _help(config_name: str, schema: Schema, jobs: Jobs) -> Callable[[DictConfig], None]:
    """Return the function that Hydra calls with the composed config: it stores the text of the help."""

    def task(composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        folders = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
        jobs.help = help_text(
            hydra_config.help.template,
            cast(dict[str, Any], OmegaConf.to_container(composed)),
            schema=schema,
            choices=dict(hydra_config.runtime.choices),
            config_name=config_name,
            folders=folders,
        )

    return task


def _print_help(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it exits
        raise StorageError("standard output", f"cannot be written: {error.strerror}") from error
