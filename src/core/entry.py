"""How every script starts: Hydra composes, the schema checks, the script's function runs, errors become exit codes.

    command line -> compose (or, with resume=RUN, the run's own config) -> check -> main(config) -> exit code

Nothing here imports torch, so a mistake in a config is told in under a second.
"""

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from core.config import Config, resumed, resumed_folder, settle
from core.errors import (
    ConfigError,
    NumericalError,
    PreceptorError,
    StopSignal,
    StorageError,
    is_out_of_memory,
    suggest,
)
from core.schema import Rule, leaves

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FLAGS = (  # of Hydra's, less --experimental-rerun, which opens a pickle
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r"),
    *("--multirun", "-m", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--info", "-i"),
    *("--shell-completion", "-sc"),
)


def launch(main: Callable[[Config], object], *, config_name: str, rules: Mapping[str, Rule]) -> None:
    """Run a script to its exit code (DESIGN.md: exit codes and errors)."""
    try:
        run(main, config_name=config_name, rules=rules)
    except StopSignal as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exception:
        error = as_error(exception, rules)
        if any(item.lower() == "traceback=true" for item in sys.argv):
            traceback.print_exception(exception)
        if not getattr(exception, "reported", False):
            print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def run(main: Callable[[Config], object], *, config_name: str, rules: Mapping[str, Rule]) -> None:
    """Compose and run; a grid (-m) runs `main` once for each job."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through; `launch` puts them in one line
    # OpenMP's threads wait by spinning, so two runs that share cores slow each other down a hundredfold. (An MLP's step
    # on two cores: 2 ms alone, 184 ms beside another; with 10,000 spins 2.2 and 17 ms.) Torch reads it when it loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    folder = resumed_folder(sys.argv[1:])
    if folder is not None:
        _run_one(main, resumed(folder, sys.argv[1:], rules))
        return

    failures: list[Exception] = []

    def job(composed: DictConfig) -> object:
        # What is raised here Hydra would report in its own words, and only when all jobs are done.
        hydra_config = HydraConfig.get()
        number = hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None
        try:
            return _run_one(main, settle(composed, rules, choices=hydra_config.runtime.choices, job=number))
        except Exception as exception:
            failures.append(exception)
            if number is not None:
                print(f"job {number}: {as_error(exception, rules)}", file=sys.stderr, flush=True)
                exception.reported = True  # type: ignore[attr-defined]
            return None

    with _argv_for_hydra():
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _argv_for_hydra() -> Iterator[None]:
    """Flags first, as Hydra's argparse wants them; and the multirun.yaml that Hydra writes for a grid goes and is lost:
    our run folders hold all there is to know of its jobs."""
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
            yield
        finally:
            sys.argv[:] = before


def _run_one(main: Callable[[Config], object], config: Config) -> object:
    """Call `main`; what it raises beside our own errors is the machine's storage or memory, or a bug of ours."""
    try:
        return main(config)
    except PreceptorError:
        raise
    except OSError as exception:
        raise StorageError(str(exception.filename or "storage"), exception.strerror or str(exception)) from exception
    except Exception as exception:
        if is_out_of_memory(exception):
            raise NumericalError("memory", "out of memory; a smaller data.batch_size needs less") from exception
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
    if message.startswith("Config group override"):  # model=null, trainer=3
        for group, given in (item.split("=", 1) for item in sys.argv[1:] if "=" in item[1:]):
            if (CONFIGS / group).is_dir() and not (CONFIGS / group / f"{given}.yaml").exists():
                options = sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))
                return ConfigError(group, f"must name one of {', '.join(options)}", value=given)
    key = getattr(exception, "full_key", None) or getattr(exception, "override", None)
    return ConfigError(key or "command line", message.partition("\n")[0] if key else message)
