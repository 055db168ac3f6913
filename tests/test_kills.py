"""A run that is killed, again and again and at any moment, ends as one that was not (docs/reliability.md: 2, 7, 8, 12).

The runs are those of scripts/train.py, each in a forked process of its own, which writes where it is into memory that
this process shares: so a kill can be aimed at a phase, and it is known where it landed. What is compared is
`conftest.last_state`: sha256 of weights, buffers, average, optimizer and all else that is kept, and metrics.jsonl.
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
import torch._inductor  # noqa: F401  which each process would import again, for seconds
from conftest import ended, forked, last_state
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
    """Memory shared with the run: which phase it is in, whether a save is under way behind it, and its step."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 32)

    def clear(self) -> None:
        struct.pack_into("qqq", self.memory, 0, 0, 0, -1)

    def read(self) -> tuple[str, bool, int]:
        phase, saving, step = struct.unpack_from("qqq", self.memory)
        return PHASES[phase], bool(saving), step

    def install(self, patched: pytest.MonkeyPatch, *, slowness: float) -> None:
        """In the run's own process; each phase is drawn out by `slowness` seconds, so that there is time to hit it."""

        def around(owner: Any, name: str, *, place: int, inside: int, after: int) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **named: Any) -> Any:
                struct.pack_into("q", self.memory, place, inside)
                time.sleep(slowness)
                try:
                    return real(*arguments, **named)
                finally:
                    struct.pack_into("q", self.memory, place, after)

            patched.setattr(owner, name, call)

        def conclude(loop: Any, real: Any = trainer.loop.Loop.conclude) -> str | None:
            struct.pack_into("qq", self.memory, 16, loop.state.step, 0)
            return real(loop)

        around(NonFiniteGuard, "remember", place=0, inside=1, after=1)
        around(trainer.training, "evaluate", place=0, inside=2, after=1)
        around(CheckpointFolder, "save", place=8, inside=1, after=0)
        patched.setattr(trainer.loop.Loop, "conclude", conclude)


def start(watch: Watch, folder: Path, *arguments: str, number: int = 0, slowness: float = 0.0) -> int:
    """scripts/train.py in a process of its own; its pid. What it says goes to FOLDER.out."""
    watch.clear()
    output = folder.with_suffix(".out")
    output.unlink(missing_ok=True)

    def patch(patched: pytest.MonkeyPatch) -> None:
        watch.install(patched, slowness=slowness)
        # TensorBoard orders event files by the second in their names; these processes live for less.
        patched.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: 1_800_000_000.0 + number))

    return forked(TRAIN_SCRIPT, *arguments, output=output, patch=patch)


def wait_for(child: int, watch: Watch, phase: str, *, steps: int, draw: random.Random) -> bool:
    """Until a run has made `steps` steps and is in a phase, and a random moment longer; False when it ends before."""
    first = None
    pause = draw.random() * (0.1 if phase == "set-up" else 0.004)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now, saving, step = watch.read()
        first = step if first in (None, -1) else first
        is_there = now == phase if phase != "save" else saving
        if phase == "set-up" or (is_there and step >= (first or 0) + steps):
            until = time.monotonic() + pause
            while time.monotonic() < until and (phase != "set-up" or watch.read()[0] == phase):
                time.sleep(0.0002)  # a set-up that is over ends the wait, or its trials would make most of the steps
            return True
        time.sleep(0.0002)
    return False


def where(watch: Watch) -> list[str]:
    phase, saving, _ = watch.read()
    return [phase, *(["save"] if saving else [])]


def newest_step(folder: Path) -> int:
    """Of the newest good checkpoint; -1 before there is a folder."""
    try:
        return CheckpointFolder(folder / "checkpoints").load("last", "best", "step")[0].step
    except CheckpointError:
        return -1


def scalars(folder: Path) -> dict[str, list[int]]:
    """The steps of each tag, as TensorBoard's own reader shows them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def strays(folder: Path) -> list[str]:
    """Files beside a run folder, or in it, that no run should leave behind."""
    names = {"config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "train.log", "checkpoints", ".lock"}
    beside = [path.name for path in folder.parent.iterdir() if path.name not in (folder.name, folder.name + ".out")]
    inside = [path.name for path in folder.iterdir() if path.name not in names and ".tfevents." not in path.name]
    return beside + inside + [path.name for path in (folder / "checkpoints").glob(".*")]


def children_of_session(session: int) -> list[int]:
    """Processes of a session that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (", 1)
        except OSError:
            continue
        state, _, _, its_session = rest.rpartition(") ")[2].split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(int(pid))
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Any, dict[str, list[int]]]:
    """The undisturbed run: its state at the end, and what TensorBoard shows of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(start(Watch(), folder, *RUN, f"run_dir={folder}")) == 0, folder.with_suffix(".out").read_text()
    assert len(read_lines(folder / "metrics.jsonl")) == 23
    return last_state(folder), scalars(folder)


def killed_until_done(
    folder: Path, *, number: signal.Signals, times: int, after: Callable[[int, int, int], None]
) -> collections.Counter[str]:
    """Start, send a signal in one phase after the other, go on, ..., until it is done; where the signals landed.

    `after` is called behind each end with (exit code, the last step that the run began with, the newest on the disk).
    """
    watch, draw = Watch(), random.Random(int(number))
    landed: collections.Counter[str] = collections.Counter()
    for trial in itertools.count():
        resumes = folder.exists()
        child = start(
            *(watch, folder, *((f"resume={folder}",) if resumes else (*RUN, f"run_dir={folder}"))),
            number=trial,
            slowness=0.003,
        )
        # Two in three of what a run goes forward by would be done by the end; the last process runs to it.
        phase = PHASES[trial % len(PHASES)]
        steps = draw.randrange(1, 2 + 2 * 110 // times)
        if trial >= times or not wait_for(child, watch, phase, steps=steps, draw=draw):
            break
        before = where(watch)
        os.kill(child, number)
        code = ended(child)
        landed.update(where(watch) if number == signal.SIGKILL else before)  # a signal that is caught lets it go on
        after(code, watch.read()[2], newest_step(folder))
    else:
        raise AssertionError
    assert ended(child) == 0, folder.with_suffix(".out").read_text()
    return landed


def test_killed_at_random_moments_until_done(tmp_path, reference, full, promise):
    folder, times = tmp_path / "run", 60 if full else 12
    lost: list[int] = []

    def after(code: int, step: int, saved: int) -> None:
        assert code == -signal.SIGKILL
        lost.append(step - saved)

    landed = killed_until_done(folder, number=signal.SIGKILL, times=times, after=after)
    state, shown = reference
    assert last_state(folder) == state
    assert scalars(folder) == shown and all(len(steps) == len(set(steps)) for steps in shown.values())
    assert len(lost) == times and all(landed[phase] > 0 for phase in PHASES), landed
    assert max(lost) <= 2 * EVERY and strays(folder) == []
    told = ", ".join(f"{count} in {phase}" for phase, count in landed.items())
    promise(2, "killed at random moments: the end is bit-identical", f"{times} kills ({told})")
    promise(2, "steps that a kill costs, saving every 5", f"at most {max(lost)}")
    promise(8, "stray files after the next start", f"0 after {times} kills")
    promise(12, "metrics.jsonl and TensorBoard show each step once", f"after {times} kills")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_at_random_moments_cost_no_step(tmp_path, reference, full, promise, number, code):
    folder, times = tmp_path / "run", 24 if full else 8
    lost: list[int] = []

    def after(ended_with: int, step: int, saved: int) -> None:
        assert ended_with in (code, -number), folder.with_suffix(".out").read_text()  # the latter before Python is up
        assert "Traceback" not in folder.with_suffix(".out").read_text()
        if folder.exists():
            assert strays(folder) == []
            lost.append(max(step, 0) - saved)
        else:
            assert [path.name for path in tmp_path.iterdir()] == ["run.out"]

    landed = killed_until_done(folder, number=number, times=times, after=after)
    assert last_state(folder) == reference[0] and scalars(folder) == reference[1]
    assert all(landed[phase] > 0 for phase in PHASES), landed
    assert max(lost) <= 0  # the step that was under way is made and saved
    told = ", ".join(f"{count} in {phase}" for phase, count in landed.items())
    promise(7, f"{number.name}: saved, exit {code}, nothing lost", f"{times} of {times} ({told})")


def test_ten_interrupts_in_50_ms_end_the_run_once(tmp_path):
    """stop now, without a traceback; what was saved before is whole."""
    watch, folder = Watch(), tmp_path / "run"
    child = start(watch, folder, *RUN, f"run_dir={folder}", slowness=0.003)
    assert wait_for(child, watch, "step", steps=20, draw=random.Random(0))
    for _ in range(10):
        os.kill(child, signal.SIGINT)
        time.sleep(0.005)
    assert ended(child) == 130
    assert "Traceback" not in folder.with_suffix(".out").read_text()
    assert newest_step(folder) >= watch.read()[2] - 2 * EVERY
    assert ended(start(watch, folder, f"resume={folder}", "trainer.max_steps=60")) == 0


# Workers


@pytest.fixture(scope="module")
def image_root(tmp_path_factory) -> Path:
    draw, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for index in range(60):
        path = root / f"class {index % 3}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 8), dtype=np.uint8)).save(path)
    return root


def test_no_process_outlives_its_run(tmp_path, image_root, full, promise):
    watch, times = Watch(), 10 if full else 3
    given = (
        "data=image_folder",
        f"data.root={image_root}",
        "data.image_size=8",
        "data.channels=1",
        "data.batch_size=4",
    )
    given += ("data.memory_budget=0", "data.num_workers=2", "model=mlp", "trainer.threads=1", "trainer.log_graph=false")
    given += ("trainer.max_epochs=1000", "trainer.device=cpu", "trainer.early_stopping.patience=null")
    for trial in range(times):
        folder = tmp_path / str(trial)
        child = start(watch, folder, *given, f"run_dir={folder}", number=trial)
        assert wait_for(child, watch, "step", steps=1 + 3 * trial, draw=random.Random(trial))
        deadline = time.monotonic() + 20  # between two epochs there are none for a moment
        while len(before := children_of_session(child)) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(2)
        assert len(before) >= 3 and children_of_session(child) == []
    promise(8, "processes 2 s after their run's death", f"0 after {times} kills of a run with 2 workers")


# One folder, one run


def race(folder: Path, arguments: list[str], *, meet: tuple[Any, str]) -> list[tuple[int, str, float]]:
    """Two runs that meet before `meet`'s call, and make it at once: exit code, what was said, seconds from there."""
    owner, name = meet
    times = mmap.mmap(-1, 16)
    ready, go = os.pipe(), os.pipe()
    runs = []
    for index in range(2):
        child = os.fork()
        if child == 0:
            real = getattr(owner, name)

            def call(*given: Any, index: int = index, real: Any = real, **named: Any) -> Any:
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                started = time.monotonic()
                try:
                    return real(*given, **named)
                finally:
                    struct.pack_into("d", times, 8 * index, time.monotonic() - started)

            setattr(owner, name, call)
            os._exit(ended(start(Watch(), folder.with_name(f"{folder.name}-{index}"), *arguments)))
        runs.append(child)
    for _ in runs:
        os.read(ready[0], 1)
    os.write(go[1], b"xx")
    found = []
    for index, child in enumerate(runs):
        code = ended(child)
        told = folder.with_name(f"{folder.name}-{index}.out").read_text()
        found.append((code, told, struct.unpack_from("d", times, 8 * index)[0]))
    for descriptor in (*ready, *go):
        os.close(descriptor)
    return found


def test_two_runs_in_one_folder(tmp_path, monkeypatch, full, promise):
    races, slowest = 10 if full else 3, 0.0
    for trial in range(races):
        folder = tmp_path / str(trial) / "run"
        folder.parent.mkdir()
        short = [*RUN, "trainer.max_steps=20", f"run_dir={folder}"]
        (won, _, _), (lost, told, seconds) = sorted(race(folder, short, meet=(RunFolder, "create")))
        assert (won, lost) == (0, 5), told
        assert "error[storage]" in told and ("in use by process" in told or "exists already" in told)
        slowest = max(slowest, seconds)
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [7, 14, 20]
        again = [f"resume={folder}", "trainer.max_steps=100"]
        (won, _, _), (lost, told, seconds) = sorted(race(folder, again, meet=(RunFolder, "open")))
        assert (won, lost) == (0, 5) and "in use by process" in told and f" on {os.uname().nodename}" in told
        slowest = max(slowest, seconds)
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-2:] == [98, 100]
    assert slowest < 1
    promise(12, "one folder, one run: races with one winner", f"{2 * races} of {2 * races}")
    promise(12, "the loser is reported after", f"{slowest:.2f} s at most")


# A save that fails behind the training's back


def exit_code_on_a_full_disk(folder: Path) -> int:
    """A run whose first checkpoint fits and whose later ones, with Adam's state, do not."""
    from test_durability import limited

    watch = Watch()
    child = os.fork()
    if child == 0:
        limited(100_000)
        os._exit(ended(start(watch, folder, *RUN, "trainer.max_steps=40", f"run_dir={folder}")))
    return ended(child)


def test_a_full_disk_ends_the_run(tmp_path):
    folder = tmp_path / "run"
    assert exit_code_on_a_full_disk(folder) == 5
    told = folder.with_suffix(".out").read_text()
    assert "error[storage]" in told and "are free there" in told and "Traceback" not in told
    assert newest_step(folder) == 0 and strays(folder) == []


def test_full_disk_check_detects_a_swallowed_exception(tmp_path, monkeypatch):
    monkeypatch.setattr(BackgroundSaver, "wait", lambda saver: None)
    monkeypatch.setattr(BackgroundSaver, "check", lambda saver: None)
    assert exit_code_on_a_full_disk(tmp_path / "run") != 5


def test_forked_script_is_the_one_that_users_start():
    assert core.composition.CONFIGS.parent == TRAIN_SCRIPT.parents[1]
