"""What the tests share: one thread, and trainings made in this process from the configs that users compose."""

import hashlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Tests fork this process, so it must have one thread: NumPy's BLAS would start others when it is imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import torch
from hydra import compose, initialize_config_dir

import trainer.run
from core.composition import settle
from core.config import CONFIGS, Config
from core.errors import STOP_SIGNALS
from core.json_lines import read_lines
from core.options.declarations import TrainConfig
from core.resume import resumed
from trainer.run import Run
from trainer.snapshot import Snapshot
from trainer.storage.checkpoint import CheckpointFolder, pack
from trainer.storage.provenance import provenance

del os.environ["OPENBLAS_NUM_THREADS"]  # processes that are executed are as a user's

# 44 training samples are 6 steps an epoch, the last one of half a batch; 12 steps, 11 for validation, 16 for the test.
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
    """configs/train.yaml with SMALL and these overrides, as the command line would compose it (0.1 s, so kept)."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    start = [*(() if "data" in given else SYNTHETIC), *(() if "model" in given else MLP)]
    choices = {"model": given.get("model", "mlp"), "data": given.get("data", "synthetic")}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return settle(compose("train", [*start, *SMALL, *overrides]), TrainConfig, choices=choices)


def built(folder: Path, *overrides: str) -> Run:
    """A new run in this folder, before its first step."""
    config = composed(*overrides)
    place = {"run_dir": str(folder)}
    return Run.create(replace(config, values=config.values | place, record=config.record | place))


def run_to_end(run: Run) -> float | None:
    """What `trainer.run.execute` does with a run that is built."""
    with run:
        run.finish(run.loop.fit())
    return run.best_value


def stop_after(run: Run, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal while the run makes this step."""
    run.state.optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), number) if run.state.step == step - 1 else None
    )


def trained(folder: Path, *overrides: str) -> Run:
    """A new run in this folder, trained to its end."""
    run = built(folder, *overrides)
    run_to_end(run)
    return run


def packed(snapshot: Snapshot) -> bytes:
    """The content of a checkpoint."""
    return b"".join(pack(snapshot))


def last_state(folder: Path) -> tuple[str, Any, list[dict[str, Any]]]:
    """Whatever a resumed run must have in common with an uninterrupted one.

    The wall clock is left out, and so is the config: it has the run's folder and number of workers in it.
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
    """What `resume=FOLDER` and these overrides restore: None for a finished run."""
    return Run.resume(resumed(folder, [f"resume={folder}", *overrides], TrainConfig))


# Command lines, in processes of their own that are forked from this one: torch is there already


def forked(script: Path, *arguments: str, output: Path, patch: Callable[[pytest.MonkeyPatch], None]) -> int:
    """A script in a process and session of its own, its pid; what it says goes behind what `output` holds."""
    # A signal that comes before the script's own handling is there waits until then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(descriptor)
        return child
    os.setsid()
    for each in (1, 2):
        os.dup2(descriptor, each)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = 1
    try:
        with pytest.MonkeyPatch.context() as patched:
            patch(patched)
            patched.setattr(sys, "argv", [script.name, *arguments])
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            runpy.run_path(str(script), run_name="__main__")
            code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, *, within: float = 120) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"not ended after {within} s")


@pytest.fixture(autouse=True)
def signals_left_alone() -> Iterator[None]:
    """A run that is built takes SIGINT and SIGTERM, and gives them back when it has run."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born with it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two runs that share cores would slow each other down, and the last bits depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_look_at_git() -> Iterator[None]:
    """Hundreds of runs are made here, and each would start git twice."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.run, "provenance", cache(provenance))
        yield


# The torture tests: the same code at a small and at its full size


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the torture tests at full size (make torture)")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether the torture tests run at full size."""
    return bool(pytestconfig.getoption("--full"))


KEPT = pytest.StashKey[list[tuple[int, str, str]]]()


@pytest.fixture(scope="session")
def promise(pytestconfig: pytest.Config) -> Callable[[int, str, str], None]:
    """Notes that a promise was kept, with a figure: `promise(3, "Resume is exact", "9 of 9 stops")`."""
    kept = pytestconfig.stash.setdefault(KEPT, [])
    return lambda number, text, figure: kept.append((number, text, figure))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With --full: the promises that were kept, as a table."""
    kept = sorted(config.stash.get(KEPT, []))
    if not kept or not config.getoption("--full"):
        return
    width = max(len(text) for _, text, _ in kept)
    terminalreporter.section("promises")
    for number, text, figure in kept:
        terminalreporter.line(f"{number:2}  {text:{width}}  {figure}")
