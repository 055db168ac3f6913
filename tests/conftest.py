"""Shared test helpers: run training in this process from the configs that users compose, in one thread."""

import hashlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Tests fork this process, so it must have one thread. NumPy's BLAS would start more threads when it is imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import torch
from hydra import compose, initialize_config_dir

import trainer.run
from core.composition import resolve_and_check
from core.config import CONFIGS, Config
from core.errors import STOP_SIGNALS
from core.json_lines import read_lines
from core.options.declarations import TrainConfig
from core.resume import resumed_config
from trainer.run import Run
from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder, pack
from trainer.storage.provenance import provenance

del os.environ["OPENBLAS_NUM_THREADS"]  # subprocesses get the same environment as a user's

# 44 training samples: 6 steps per epoch, the last with half a batch; 12 steps in all.
# 11 validation samples and 16 test samples.
SYNTHETIC = (
    *("data=synthetic", "data.train_samples=55", "data.test_samples=16", "data.val_fraction=0.2"),
    *("data.image_size=8", "data.channels=1", "data.num_classes=4", "data.batch_size=8"),
)
MLP = ("model=mlp", "model.hidden=[16]")
SMALL = (
    *("optimizer.lr=0.05", "trainer.max_epochs=2", "trainer.device=cpu"),
    *("trainer.log_every=1 steps", "trainer.log_graph=false", "trainer.log_images=false"),
)


@cache
def composed(*overrides: str) -> Config:
    """Return configs/train.yaml composed with SMALL and these overrides, as the command line does (cached: 0.1 s)."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    defaults = [*(() if "data" in chosen else SYNTHETIC), *(() if "model" in chosen else MLP)]
    choices = {"model": chosen.get("model", "mlp"), "data": chosen.get("data", "synthetic")}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return resolve_and_check(compose("train", [*defaults, *SMALL, *overrides]), TrainConfig, choices=choices)


def built(folder: Path, *overrides: str) -> Run:
    """Return a new run in this folder, before its first step."""
    config = composed(*overrides)
    run_dir = {"run_dir": str(folder)}
    return Run.create(replace(config, values=config.values | run_dir, record=config.record | run_dir))


def run_to_end(run: Run) -> float | None:
    """Train a run to its end, as `trainer.run.execute` does, and return the best monitored value."""
    with run:
        run.finish(run.loop.fit())
    return run.best_value


def stop_after(run: Run, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal during this step of the run."""
    run.state.optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), number) if run.state.step == step - 1 else None
    )


def trained(folder: Path, *overrides: str) -> Run:
    """Return a new run in this folder, trained to its end."""
    run = built(folder, *overrides)
    run_to_end(run)
    return run


@pytest.fixture(autouse=True)
def caplog_has_warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    """An open run also logs facts, such as the creation of an image cache; a test may leave its run open."""
    caplog.set_level(logging.WARNING)


def packed(snapshot: Snapshot) -> bytes:
    """Return the content of a checkpoint file."""
    return b"".join(pack(snapshot))


def last_state(folder: Path) -> tuple[str, Any, list[dict[str, Any]]]:
    """Return what a resumed run must have in common with an uninterrupted one: state hash, values, log lines.

    The wall clock and the config are left out: the config contains the run's folder and its number of workers.
    """
    checkpoints = CheckpointFolder(folder / "checkpoints")
    snapshot, _, damaged = checkpoints.load("last")
    assert not damaged
    tensors, values = dict(snapshot.tensors), {**snapshot.values, "clock": None, "config": None}
    if checkpoints.files("best"):
        best = checkpoints.load("best")[0]
        tensors |= {f"best.{name}": tensor for name, tensor in best.tensors.items()}
        values["best file"] = best.values | {"clock": None, "config": None}
    summary = json.loads((folder / "summary.json").read_text())
    values["summary"] = {key: summary[key] for key in ("status", "stop_reason", "step", "best", "test")}
    lines = [
        {key: value for key, value in line.items() if key not in ("seconds", "samples_per_second")}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    return hashlib.sha256(packed(Snapshot(tensors, values))).hexdigest(), values, lines


def reopened(folder: Path, *overrides: str) -> Run | None:
    """Return the run that `resume=FOLDER` and these overrides restore, or None for a finished run."""
    return Run.resume(resumed_config(folder, [f"resume={folder}", *overrides], TrainConfig))


# Command lines, each in a process forked from this one: torch is already imported


def fork_script(
    script: Path,
    *arguments: str,
    output: Path,
    errors: Path | None = None,
    patch: Callable[[pytest.MonkeyPatch], None],
) -> int:
    """Run a script in a new process and session and return its pid.

    Standard output is appended to the file `output`, and standard error to `errors`, or else to `output`.
    """
    # Block signals until the script has installed its own handlers.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (output, errors or output)]
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
        for descriptor in descriptors:
            os.close(descriptor)
        return child
    os.setsid()
    for stream, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = 1
    try:
        with pytest.MonkeyPatch.context() as patched:
            patch(patched)
            patched.setattr(sys, "argv", [script.name, *arguments])
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
            runpy.run_path(str(script), run_name="__main__")
            code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_script(
    script: Path, *arguments: str, cwd: Path, python_path: Path | None = None, within: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Run a script in a forked process, in the folder `cwd`, to its end."""

    def prepare(patched: pytest.MonkeyPatch) -> None:
        os.chdir(cwd)
        if python_path is not None:
            sys.path.insert(1, str(python_path))

    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch) / "out", Path(scratch) / "err"
        child = fork_script(script, *arguments, output=output, errors=errors, patch=prepare)
        code = wait_for_exit(child, within=within)
        return subprocess.CompletedProcess([script, *arguments], code, output.read_text(), errors.read_text())


def wait_for_exit(child: int, *, within: float = 120) -> int:
    """Wait for a process and return its exit code, or the negative number of the signal that ended it."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"process still running after {within} s")


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers after each test: a new run installs its own until it has finished."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Restore the environment variables after each test: a script that runs in this process sets some."""
    variables = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(variables)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one torch thread: runs that share cores slow each other down, and last bits depend on the thread count."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cached_provenance() -> Iterator[None]:
    """Read the git provenance once per session: the tests create hundreds of runs, and each would start git twice."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.run, "provenance", cache(provenance))
        yield


# The torture tests: the same code at a small or at full size


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the torture tests at full size (make torture)")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Return whether the torture tests run at full size."""
    return bool(pytestconfig.getoption("--full"))


KEPT = pytest.StashKey[list[tuple[int, str, str]]]()


@pytest.fixture(scope="session")
def promise(pytestconfig: pytest.Config) -> Callable[[int, str, str], None]:
    """Return a function that records a kept promise: `promise(3, "Resume is exact", "9 of 9 stops")`."""
    kept = pytestconfig.stash.setdefault(KEPT, [])
    return lambda number, text, measurement: kept.append((number, text, measurement))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the kept promises as a table (with --full)."""
    kept = sorted(config.stash.get(KEPT, []))
    if not kept or not config.getoption("--full"):
        return
    width = max(len(text) for _, text, _ in kept)
    terminalreporter.section("promises")
    for number, text, measurement in kept:
        terminalreporter.line(f"{number:2}  {text:{width}}  {measurement}")
