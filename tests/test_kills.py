"""A run that is killed repeatedly, at any moment, ends like an uninterrupted one (docs/reliability.md: 2, 7, 8, 12).

Each run is scripts/train.py in a forked process. It writes its phase to memory shared with this process, so that a kill
can target a phase and the phase that it hit is known. `conftest.last_state` is compared: sha256 of weights, buffers,
average, optimizer and all other saved state, and metrics.jsonl.
"""

import collections
import itertools
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch._inductor  # noqa: F401  otherwise each process spends seconds on this import
from conftest import fork_script, last_state, wait_for_exit
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import core.composition
import trainer.loop
import trainer.training
from core.errors import CheckpointError
from core.json_lines import read_lines
from trainer.monitor.nonfinite import NonFiniteGuard
from trainer.storage.background_saver import BackgroundSaver
from trainer.storage.checkpoint import CheckpointFolder
from trainer.storage.run_folder import RunFolder

pytestmark = pytest.mark.thorough

TRAIN_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train.py"
EVERY = 5  # steps between saves, at most
RUN = (
    *("data=synthetic", "data.train_samples=200", "data.test_samples=64", "data.val_fraction=0.2", "data.image_size=8"),
    *("data.channels=1", "data.num_classes=4", "data.batch_size=8", "model=mlp", "model.hidden=[64,64]"),
    *("model.dropout=0.2", "model.batch_norm=true", "augment=[crop_flip,mixup]", "optimizer=adam", "optimizer.lr=0.01"),
    *("trainer.ema_decay=0.99", "trainer.accumulate=2", "trainer.clip_norm=1", "trainer.threads=1"),
    *("trainer.device=cpu", "trainer.log_graph=false", "trainer.log_every=3 steps", "trainer.evaluate_every=7 steps"),
    *(f"trainer.checkpoint.every_steps={EVERY}", "trainer.early_stopping.patience=null", "trainer.max_steps=160"),
    "trainer.max_epochs=1000",
)
PHASES = ("set-up", "step", "validation", "save")


class Watch:
    """Memory shared with a run: its phase, whether a background save is running, and its step."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 32)

    def clear(self) -> None:
        struct.pack_into("qqq", self.memory, 0, 0, 0, -1)

    def read(self) -> tuple[str, bool, int]:
        phase, saving, step = struct.unpack_from("qqq", self.memory)
        return PHASES[phase], bool(saving), step

    def install(self, patched: pytest.MonkeyPatch, *, slowness: float) -> None:
        """Record phases in the run's process; each phase sleeps `slowness` seconds, so that a signal can hit it."""

        def record_phase(owner: Any, name: str, *, offset: int, inside: int, after: int) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                struct.pack_into("q", self.memory, offset, inside)
                time.sleep(slowness)
                try:
                    return real(*arguments, **options)
                finally:
                    struct.pack_into("q", self.memory, offset, after)

            patched.setattr(owner, name, call)

        def conclude(loop: Any, real: Any = trainer.loop.Loop.conclude) -> str | None:
            struct.pack_into("qq", self.memory, 16, loop.state.step, 0)
            return real(loop)

        record_phase(NonFiniteGuard, "remember", offset=0, inside=1, after=1)
        record_phase(trainer.training, "evaluate", offset=0, inside=2, after=1)
        record_phase(CheckpointFolder, "save", offset=8, inside=1, after=0)
        patched.setattr(trainer.loop.Loop, "conclude", conclude)


def start(watch: Watch, folder: Path, *arguments: str, number: int = 0, slowness: float = 0.0) -> int:
    """Start scripts/train.py in a new process and return its pid. Its output goes to FOLDER.out."""
    watch.clear()
    output = folder.with_suffix(".out")
    output.unlink(missing_ok=True)

    def patch(patched: pytest.MonkeyPatch) -> None:
        watch.install(patched, slowness=slowness)
        # TensorBoard orders event files by the second in their names; these processes run for less than a second.
        patched.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: 1_800_000_000.0 + number))

    return fork_script(TRAIN_SCRIPT, *arguments, output=output, patch=patch)


def wait_for(child: int, watch: Watch, phase: str, *, steps: int, generator: random.Random) -> bool:
    """Wait until a run has done `steps` steps and is in a phase, plus a random time. Return False if it ends first."""
    first = None
    pause = generator.random() * (0.1 if phase == "set-up" else 0.004)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        current_phase, saving, step = watch.read()
        first = step if first in (None, -1) else first
        is_reached = current_phase == phase if phase != "save" else saving
        if phase == "set-up" or (is_reached and step >= (first or 0) + steps):
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline and (phase != "set-up" or watch.read()[0] == phase):
                time.sleep(0.0002)  # the wait ends with the set-up: otherwise these kills would allow most of the steps
            return True
        time.sleep(0.0002)
    return False


def current_phases(watch: Watch) -> list[str]:
    phase, saving, _ = watch.read()
    return [phase, *(["save"] if saving else [])]


def newest_step(folder: Path) -> int:
    """Return the step of the newest valid checkpoint, or -1 if there is no folder yet."""
    try:
        return CheckpointFolder(folder / "checkpoints").load("last", "best", "step")[0].step
    except CheckpointError:
        return -1


def scalars(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each tag, as read by TensorBoard's reader."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def stray_files(folder: Path) -> list[str]:
    """Return files in or beside a run folder that no run should leave."""
    names = {"config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "train.log", "checkpoints", ".lock"}
    beside = [path.name for path in folder.parent.iterdir() if path.name not in (folder.name, folder.name + ".out")]
    inside = [path.name for path in folder.iterdir() if path.name not in names and ".tfevents." not in path.name]
    return beside + inside + [path.name for path in (folder / "checkpoints").glob(".*")]


def children_of_session(session: int) -> list[int]:
    """Return the pids of the running processes of a session."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = path.read_text().split(" (", 1)
        except OSError:
            continue
        state, _, _, its_session = fields.rpartition(") ")[2].split()[:4]
        if int(its_session) == session and state != "Z":
            pids.append(int(pid))
    return pids


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Any, dict[str, list[int]]]:
    """Return the final state of an uninterrupted run and its steps in TensorBoard."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert wait_for_exit(start(Watch(), folder, *RUN, f"run_dir={folder}")) == 0, folder.with_suffix(".out").read_text()
    assert len(read_lines(folder / "metrics.jsonl")) == 23
    return last_state(folder), scalars(folder)


def signal_until_done(
    folder: Path, *, number: signal.Signals, times: int, after: Callable[[int, int, int], None]
) -> collections.Counter[str]:
    """Start a run, send a signal, resume, ..., until it finishes; return how many signals hit each phase.

    The signals target the phases in turn. `after` is called after each end with the exit code, the last step that the
    run reported, and the newest step on the disk.
    """
    watch, generator = Watch(), random.Random(int(number))
    hit_phases: collections.Counter[str] = collections.Counter()
    for trial in itertools.count():
        resumes = folder.exists()
        child = start(
            *(watch, folder, *((f"resume={folder}",) if resumes else (*RUN, f"run_dir={folder}"))),
            number=trial,
            slowness=0.003,
        )
        # The signalled processes do about two thirds of the steps; the last process does the others.
        phase = PHASES[trial % len(PHASES)]
        steps = generator.randrange(1, 2 + 2 * 110 // times)
        if trial >= times or not wait_for(child, watch, phase, steps=steps, generator=generator):
            break
        phases_before = current_phases(watch)
        os.kill(child, number)
        code = wait_for_exit(child)
        hit_phases.update(
            current_phases(watch) if number == signal.SIGKILL else phases_before
        )  # after a handled signal the run still advances
        after(code, watch.read()[2], newest_step(folder))
    else:
        raise AssertionError
    assert wait_for_exit(child) == 0, folder.with_suffix(".out").read_text()
    return hit_phases


def test_run_killed_at_random_moments_ends_bit_identically(tmp_path, reference, full, promise):
    folder, times = tmp_path / "run", 60 if full else 12
    lost: list[int] = []

    def after(code: int, step: int, saved: int) -> None:
        assert code == -signal.SIGKILL
        lost.append(step - saved)

    hit_phases = signal_until_done(folder, number=signal.SIGKILL, times=times, after=after)
    state, tensorboard_steps = reference
    assert last_state(folder) == state
    assert scalars(folder) == tensorboard_steps and all(
        len(steps) == len(set(steps)) for steps in tensorboard_steps.values()
    )
    assert len(lost) == times and all(hit_phases[phase] > 0 for phase in PHASES), hit_phases
    assert max(lost) <= 2 * EVERY and stray_files(folder) == []
    summary = ", ".join(f"{count} in {phase}" for phase, count in hit_phases.items())
    promise(2, "killed at random moments: the end is bit-identical", f"{times} kills ({summary})")
    promise(2, "steps that a kill costs, saving every 5", f"at most {max(lost)}")
    promise(8, "stray files after the next start", f"0 after {times} kills")
    promise(12, "metrics.jsonl and TensorBoard show each step once", f"after {times} kills")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_at_random_moments_lose_no_step(tmp_path, reference, full, promise, number, code):
    folder, times = tmp_path / "run", 24 if full else 8
    lost: list[int] = []

    def after(exit_code: int, step: int, saved: int) -> None:
        assert exit_code in (code, -number), folder.with_suffix(
            ".out"
        ).read_text()  # the latter before Python handles signals
        assert "Traceback" not in folder.with_suffix(".out").read_text()
        if folder.exists():
            assert stray_files(folder) == []
            lost.append(max(step, 0) - saved)
        else:
            assert [path.name for path in tmp_path.iterdir()] == ["run.out"]

    hit_phases = signal_until_done(folder, number=number, times=times, after=after)
    assert last_state(folder) == reference[0] and scalars(folder) == reference[1]
    assert all(hit_phases[phase] > 0 for phase in PHASES), hit_phases
    assert max(lost) <= 0  # the step in progress is completed and saved
    summary = ", ".join(f"{count} in {phase}" for phase, count in hit_phases.items())
    promise(7, f"{number.name}: saved, exit {code}, nothing lost", f"{times} of {times} ({summary})")


def test_ten_interrupts_in_50_ms_end_the_run_once(tmp_path):
    """The run stops at once without a traceback; the checkpoints saved before are intact."""
    watch, folder = Watch(), tmp_path / "run"
    child = start(watch, folder, *RUN, f"run_dir={folder}", slowness=0.003)
    assert wait_for(child, watch, "step", steps=20, generator=random.Random(0))
    for _ in range(10):
        os.kill(child, signal.SIGINT)
        time.sleep(0.005)
    assert wait_for_exit(child) == 130
    assert "Traceback" not in folder.with_suffix(".out").read_text()
    assert newest_step(folder) >= watch.read()[2] - 2 * EVERY
    assert wait_for_exit(start(watch, folder, f"resume={folder}", "trainer.max_steps=60")) == 0


# Workers


@pytest.fixture(scope="module")
def image_root(tmp_path_factory) -> Path:
    generator, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for index in range(60):
        path = root / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 8), dtype=np.uint8)).save(path)
    return root


def test_no_process_outlives_its_run(tmp_path, image_root, full, promise):
    watch, times = Watch(), 10 if full else 1
    overrides = (
        "data=image_folder",
        f"data.root={image_root}",
        "data.image_size=8",
        "data.channels=1",
        "data.batch_size=4",
    )
    overrides += (
        "data.memory_budget=0",
        "data.num_workers=2",
        "model=mlp",
        "trainer.threads=1",
        "trainer.log_graph=false",
    )
    overrides += ("trainer.max_epochs=1000", "trainer.device=cpu", "trainer.early_stopping.patience=null")
    for trial in range(times):
        folder = tmp_path / str(trial)
        child = start(watch, folder, *overrides, f"run_dir={folder}", number=trial)
        assert wait_for(child, watch, "step", steps=1 + 3 * trial, generator=random.Random(trial))
        deadline = time.monotonic() + 20  # between two epochs there are briefly no workers
        while len(processes := children_of_session(child)) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(2)
        assert len(processes) >= 3 and children_of_session(child) == []
    promise(8, "processes 2 s after their run's death", f"0 after {times} kills of a run with 2 workers")


# One folder, one run


def race(folder: Path, arguments: list[str], *, meet: tuple[Any, str]) -> list[tuple[int, str, float]]:
    """Start two runs that call `meet` at the same time; return (exit code, output, seconds in `meet`) of each."""
    owner, name = meet
    times = mmap.mmap(-1, 16)
    ready, go = os.pipe(), os.pipe()
    runs = []
    for index in range(2):
        child = os.fork()
        if child == 0:
            real = getattr(owner, name)

            def call(*positional: Any, index: int = index, real: Any = real, **options: Any) -> Any:
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                started = time.monotonic()
                try:
                    return real(*positional, **options)
                finally:
                    struct.pack_into("d", times, 8 * index, time.monotonic() - started)

            setattr(owner, name, call)
            os._exit(wait_for_exit(start(Watch(), folder.with_name(f"{folder.name}-{index}"), *arguments)))
        runs.append(child)
    for _ in runs:
        os.read(ready[0], 1)
    os.write(go[1], b"xx")
    results = []
    for index, child in enumerate(runs):
        code = wait_for_exit(child)
        output = folder.with_name(f"{folder.name}-{index}.out").read_text()
        results.append((code, output, struct.unpack_from("d", times, 8 * index)[0]))
    for descriptor in (*ready, *go):
        os.close(descriptor)
    return results


def test_second_of_two_concurrent_runs_in_a_folder_is_refused(tmp_path, monkeypatch, full, promise):
    races, slowest = 10 if full else 3, 0.0
    for trial in range(races):
        folder = tmp_path / str(trial) / "run"
        folder.parent.mkdir()
        short = [*RUN, "trainer.max_steps=20", f"run_dir={folder}"]
        (winner, _, _), (loser, output, seconds) = sorted(race(folder, short, meet=(RunFolder, "create")))
        assert (winner, loser) == (0, 5), output
        assert "error[storage]" in output and ("in use by process" in output or "exists already" in output)
        slowest = max(slowest, seconds)
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [7, 14, 20]
        resume = [f"resume={folder}", "trainer.max_steps=100"]
        (winner, _, _), (loser, output, seconds) = sorted(race(folder, resume, meet=(RunFolder, "open")))
        assert (winner, loser) == (0, 5) and "in use by process" in output and f" on {os.uname().nodename}" in output
        slowest = max(slowest, seconds)
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-2:] == [98, 100]
    assert slowest < 1
    promise(12, "one folder, one run: races with one winner", f"{2 * races} of {2 * races}")
    promise(12, "the loser is reported after", f"{slowest:.2f} s at most")


# A background save that fails


def exit_code_on_a_full_disk(folder: Path) -> int:
    """Return the exit code of a run whose first checkpoint fits on the disk but whose later ones, with Adam, do not."""
    from test_durability import limit_file_size

    watch = Watch()
    child = os.fork()
    if child == 0:
        limit_file_size(100_000)
        os._exit(wait_for_exit(start(watch, folder, *RUN, "trainer.max_steps=40", f"run_dir={folder}")))
    return wait_for_exit(child)


def test_full_disk_ends_the_run_with_a_storage_error(tmp_path):
    folder = tmp_path / "run"
    assert exit_code_on_a_full_disk(folder) == 5
    output = folder.with_suffix(".out").read_text()
    assert "error[storage]" in output and "bytes are free" in output and "Traceback" not in output
    assert newest_step(folder) == 0 and stray_files(folder) == []


def test_full_disk_check_detects_a_swallowed_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(BackgroundSaver, "wait", lambda saver: None)
    monkeypatch.setattr(BackgroundSaver, "check", lambda saver: None)
    assert exit_code_on_a_full_disk(tmp_path / "run") != 5


def test_forked_script_uses_the_repositorys_configs():
    assert core.composition.CONFIGS.parent == TRAIN_SCRIPT.parents[1]
