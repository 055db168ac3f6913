"""How every script starts: Hydra composes, the schema checks, the script's function runs, errors become exit codes.

    command line -> compose (or, with resume=RUN, the run's own config) -> check -> main(config) -> exit code

Nothing here imports torch, so a mistake in a config is told in under a second.
"""

import contextlib
import gc
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import Template
from types import FrameType

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from core.config import Config, resumed, resumed_folder, settle
from core.errors import (
    STOP_SIGNALS,
    ConfigError,
    PreceptorError,
    StopSignal,
    as_ours,
    is_hung_up_in_vain,
    suggest,
)
from core.schema import Rule, leaves

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HELP = {"--help", "-h"}
FLAGS = (  # of Hydra's, less --experimental-rerun, which opens a pickle
    *sorted(HELP),
    *("--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i"),
    *("--shell-completion", "-sc"),
)


def launch(main: Callable[[Config], object], *, config_name: str, rules: Mapping[str, Rule]) -> None:
    """Run a script to its exit code (DESIGN.md: exit codes and errors)."""
    global _asked_for
    _asked_for = None
    for number in STOP_SIGNALS:
        if not is_hung_up_in_vain(number):
            signal.signal(number, _end)
    os.umask(os.umask(0o022) | 0o022)  # what a run leaves is written by its user alone
    try:
        run(main, config_name=config_name, rules=rules)
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
    """Python's traceback, where the command line asks for it."""
    if any(item.lower() == "traceback=true" for item in sys.argv):
        traceback.print_exception(exception)


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


def run(main: Callable[[Config], object], *, config_name: str, rules: Mapping[str, Rule]) -> None:
    """Compose and run; a grid (-m) runs `main` once for each job."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; `launch` puts them in one line
    # OpenMP's threads wait by spinning, so two runs that share cores slow each other down a hundredfold. (An MLP's step
    # on two cores: 2 ms alone, 184 ms beside another; with 10,000 spins 2.2 and 17 ms.) Torch reads it when it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if asks_for_help(sys.argv[1:]):
        with _argv_for_hydra():
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(_help)()
        return
    folder = resumed_folder(sys.argv[1:])
    if folder is not None:
        _run_one(main, resumed(folder, sys.argv[1:], rules))
        return

    failures: list[Exception] = []

    def job(composed: DictConfig) -> object:
        # What is raised here Hydra would report in its own words, and only when all jobs are done.
        hydra_config = HydraConfig.get()
        shutil.rmtree(scratch, ignore_errors=True)  # a kill during the job must not leave it
        number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
        try:
            return _run_one(main, settle(composed, rules, choices=hydra_config.runtime.choices, job=number))
        except Exception as exception:
            if _asked_for is not None:
                raise StopSignal(_asked_for) from None
            if number is None:
                failures.append(exception)
                return None
            error = as_error(exception, rules)
            _trace(exception)
            print(f"job {number}: {error}", file=sys.stderr, flush=True)
            # Without its traceback, which holds on to all that the job had: the next one needs the memory.
            failures.append(type(error)(error.subject, error.explanation, value=error.value))
            failures[-1].reported = True  # type: ignore[attr-defined]
            if "BasicLauncher" not in hydra_config.launcher["_target_"]:
                raise failures[-1] from None  # from another process Hydra brings it here, when all jobs are done
        gc.collect()
        return None

    with _argv_for_hydra() as scratch:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    if failures:
        raise failures[0]


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


def _run_one(main: Callable[[Config], object], config: Config) -> object:
    """Call `main`; what it raises beside our own errors is the machine's storage or memory, or a bug of ours."""
    try:
        return main(config)
    except PreceptorError:
        raise
    except Exception as exception:
        if (error := as_ours(exception)) is not exception:
            raise error from exception
        what = f"{type(exception).__name__}: {exception}"
        raise PreceptorError("internal", f"{what}; traceback=true shows where. Please report it") from exception


def _hint(name: str, rules: Mapping[str, Rule]) -> str:
    """The known key nearest to a misspelt one, or those of its section; the groups' files know more than the rules."""
    known = set(rules)
    for path in CONFIGS.glob("*/*.yaml"):
        known |= {f"{path.parent.name}.{key}" for key, _ in leaves(yaml.safe_load(path.read_text()) or {})}
    section = name.partition(".")[0] + "." if "." in name else ""
    if name in known:
        return f"not in the options chosen; add it as +{name}=..."
    near = sorted(key for key in known if key.startswith(section) and ("." in key) == ("." in name))
    return suggest(name, near) or f"known there: {', '.join(key for key in near if key in rules)}"


def as_error(exception: Exception, rules: Mapping[str, Rule]) -> PreceptorError:
    """What Hydra says of a command line or a YAML file, in one line: key first, the nearest match behind."""
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
    if message.startswith("Error merging override "):  # trainer.early_stopping=[0]
        name, _, given = message.removeprefix("Error merging override ").partition("=")
        return ConfigError(name.lstrip("+"), str(exception.__cause__ or "does not fit there"), value=given)
    key = getattr(exception, "full_key", None) or getattr(exception, "override", None)
    told = message.partition("\n")[0] if key else message
    return ConfigError(key or "command line", told.strip() or f"cannot be read ({type(exception).__name__})")
