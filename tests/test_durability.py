"""Saved states survive kills, power cuts, flipped bits, truncation and full disks (docs/reliability.md: 1, 5, 6).

Each check is a function that counts lost states. It is also run on ways of saving that are known to be unsafe: then it
must count at least one loss.
"""

import errno
import itertools
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import packed

from core import durable
from core.errors import CheckpointError, StorageError
from trainer.snapshot import Snapshot
from trainer.storage import checkpoint
from trainer.storage.checkpoint import CheckpointFolder

pytestmark = pytest.mark.thorough

KEEP = {"last": 2, "best": 2, "step": None}
KINDS = ["best", "last"]
Save = Callable[[CheckpointFolder, int], None]


def snapshot(step: int, *, size: int = 3_000) -> Snapshot:
    tensors = {f"model.{name}": torch.full((size,), float(step)) for name in "abc"}
    return Snapshot(tensors, {"step": step, "best": {}})


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(KINDS, snapshot(step), keep=KEEP)


def newest(folder: Path, kind: str) -> int:
    """Return the step of the newest valid checkpoint after a bitwise comparison, or -1 if none exists."""
    try:
        loaded = CheckpointFolder(folder).load(kind)[0]
    except CheckpointError:
        return -1
    assert packed(loaded) == packed(snapshot(loaded.step)), "a damaged checkpoint was accepted"
    return loaded.step


# Unsafe ways of saving


def in_place(path: Path, *content: bytes | memoryview) -> None:
    """Write a file by overwriting the existing one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(descriptor, b"".join(content))
    os.fsync(descriptor)
    os.close(descriptor)


def without_fsync(path: Path, *content: bytes | memoryview) -> None:
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, b"".join(content))
    os.close(descriptor)
    os.replace(temporary, path)  # noqa: PTH105


def unlink_first(folder: CheckpointFolder, step: int) -> None:
    """Delete the older generations before writing the new one."""
    for file in folder.files(*KINDS):
        os.unlink(file.path)  # noqa: PTH108
    save(folder, step)


def one_name(folder: CheckpointFolder, step: int) -> None:
    """Save to one file name, without hash and generations, as most trainers do."""
    checkpoint.write_durably(folder.path / "last.safetensors", packed(snapshot(step)))


def newest_of_one_name(folder: Path, kind: str) -> int:
    try:
        return checkpoint.unpack((folder / "last.safetensors").read_bytes(), source=folder).step
    except Exception:
        return -1


# Kills at every system call

CALLS = ("open", "write", "fsync", "replace", "link", "unlink")


def exit_at_call(number: int, patched: pytest.MonkeyPatch, *, half: bool = False) -> None:
    """Exit at the disk-changing system call with this number; `half` writes half of the content first."""
    calls = itertools.count()
    for name in CALLS:
        real = getattr(os, name)

        def call(*arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            if next(calls) == number:
                if half and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(9)
            return real(*arguments, **options)

        patched.setattr(os, name, call)


def lost_at_calls(folder: Path, *, save: Save, newest: Callable[[Path, str], int], half: bool) -> tuple[int, int]:
    """Return (states lost, calls tried): after two saves, a third one is killed at each of its calls in turn."""
    lost = 0
    for number in itertools.count():
        run_folder = folder / f"{number}-{half}"
        run_folder.mkdir(parents=True)
        for step in (1, 2):
            save(CheckpointFolder(run_folder), step)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patched:
                exit_at_call(number, patched, half=half)
                save(CheckpointFolder(run_folder), 3)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        lost += min(newest(run_folder, kind) for kind in KINDS) < (2 if killed else 3)
        durable.remove_leftovers(run_folder)
        lost += any(path.name.endswith(".tmp") for path in run_folder.iterdir())
        shutil.rmtree(run_folder)
        if not killed:
            return lost, number
    raise AssertionError


def test_kill_at_every_system_call_of_a_save_loses_no_state(tmp_path, promise):
    lost, tried = zip(
        *(lost_at_calls(tmp_path, save=save, newest=newest, half=half) for half in (False, True)), strict=True
    )
    assert sum(lost) == 0 and min(tried) >= 10
    promise(1, "a kill inside a save: at every system call", f"{sum(lost)} lost of {sum(tried)}")


def test_kill_at_every_system_call_detects_unsafe_saves(tmp_path, monkeypatch):
    assert lost_at_calls(tmp_path / "unlink", save=unlink_first, newest=newest, half=False)[0] > 0
    monkeypatch.setattr(checkpoint, "write_durably", in_place)
    assert lost_at_calls(tmp_path / "in_place", save=one_name, newest=newest_of_one_name, half=True)[0] > 0


# Kills at random moments


def lost_at_random(folder: Path, *, save: Save, newest: Callable[[Path, str], int], kills: int) -> tuple[int, int]:
    """Return (states lost, kills inside a save) of a process that only saves and is killed every 1 to 31 ms."""
    shared = mmap.mmap(-1, 16)  # the last saved step, and whether a save is running
    generator, lost, inside = random.Random(0), 0, 0
    folder.mkdir()
    save(CheckpointFolder(folder), 1)
    struct.pack_into("qq", shared, 0, 1, 0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            for step in itertools.count(struct.unpack_from("q", shared)[0] + 1):
                struct.pack_into("q", shared, 8, 1)
                save(CheckpointFolder(folder), step)
                struct.pack_into("qq", shared, 0, step, 0)
        time.sleep(0.001 + 0.03 * generator.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved, saving = struct.unpack_from("qq", shared)
        inside += saving
        newest_step = min(newest(folder, kind) for kind in KINDS)
        lost += newest_step < saved
        struct.pack_into("qq", shared, 0, max(newest_step, 1), 0)
        if newest_step < 1:  # so that an unsafe way of saving can lose again
            save(CheckpointFolder(folder), 1)
        durable.remove_leftovers(folder)
    assert len(list(folder.iterdir())) <= 6  # two generations per kind, and one that a kill kept from being deleted
    return lost, inside


def test_kills_at_random_moments_of_a_save_lose_no_state(tmp_path, full, promise):
    kills = 1000 if full else 80
    lost, inside = lost_at_random(tmp_path / "run", save=save, newest=newest, kills=kills)
    assert lost == 0 and inside > 0.5 * kills
    promise(1, "a kill inside a save: at random moments", f"{lost} lost of {kills}, {inside} of them inside a save")


def test_random_kills_detect_a_file_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_durably", in_place)
    lost, _ = lost_at_random(tmp_path / "run", save=one_name, newest=newest_of_one_name, kills=40)
    assert lost > 4


# Power cuts, simulated from the order of system calls


@dataclass
class Journal:
    """The system calls of a process that change the disk, in order. Only an fsync makes data and names durable."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Any:
        real = {name: getattr(os, name) for name in CALLS}
        opened: dict[int, Path] = {}

        def record(name: str, *arguments: Any) -> None:
            self.calls.append((name, *arguments))

        def open_(path: Any, flags: int, *mode: Any, **options: Any) -> int:
            descriptor = real["open"](path, flags, *mode, **options)
            opened[descriptor] = Path(path)
            if flags & os.O_CREAT:
                record("create", Path(path))
            return descriptor

        def write(descriptor: int, content: Any) -> int:
            record("write", opened[descriptor], bytes(content))
            return real["write"](descriptor, content)

        def fsync(descriptor: int) -> None:
            record("fsync", opened[descriptor])
            real["fsync"](descriptor)

        def with_two_paths(name: str) -> Any:
            def call(source: Any, destination: Any) -> None:
                real[name](source, destination)
                record(name, Path(source), Path(destination))

            return call

        def unlink(path: Any) -> None:
            real["unlink"](path)
            record("unlink", Path(path))

        with pytest.MonkeyPatch.context() as patched:
            for name, call in {"open": open_, "write": write, "fsync": fsync, "unlink": unlink}.items():
                patched.setattr(os, name, call)
            for name in ("replace", "link"):
                patched.setattr(os, name, with_two_paths(name))
            yield

    def disks(self, before: dict[str, bytes], root: Path) -> Any:
        """Yield (number of calls, files) for each state that a power cut may leave after each call.

        Each name that was not synced is independently old or new. File content that was not synced is cut in half.
        """
        for number in range(len(self.calls) + 1):
            data = {Path(name): content for name, content in before.items()}  # key: file, not name
            durable_names: dict[Path, Path] = {root / name: Path(name) for name in before}  # name -> file
            names = dict(durable_names)
            unsynced: list[tuple[Path, Path | None]] = []  # names changed since the fsync of their folder
            synced = set(data)
            for name, first, *more in self.calls[:number]:
                if name == "create":
                    names[first] = first
                    data[first] = b""
                    unsynced.append((first, first))
                elif name == "write":
                    data[names[first]] += more[0]
                    synced.discard(names[first])
                elif name == "fsync" and first == root:
                    durable_names, unsynced = dict(names), []
                elif name == "fsync":
                    synced.add(names[first])
                elif name == "unlink":
                    names.pop(first)
                    unsynced.append((first, None))
                else:  # replace, link
                    file = names[first] if name == "link" else names.pop(first)
                    names[more[0]] = file
                    unsynced.append((more[0], file))
                    if name == "replace":
                        unsynced.append((first, None))
            for choices in itertools.product((False, True), repeat=len(unsynced)):
                after = dict(durable_names)
                for (name, file), is_new in zip(unsynced, choices, strict=True):
                    if is_new and file is None:
                        after.pop(name, None)
                    elif is_new:
                        after[name] = file
                yield (
                    number,
                    {
                        name.name: data[file] if file in synced else data[file][: len(data[file]) // 2]
                        for name, file in after.items()
                    },
                )


def lost_by_power_cuts(folder: Path, *, save: Save) -> tuple[int, int]:
    """Return (states lost, disk states tried): after two saves, a power cut at each call of a third, or after it."""
    folder.mkdir()
    for step in (1, 2):
        save(CheckpointFolder(folder), step)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    journal = Journal()
    with journal.recording():
        save(CheckpointFolder(folder), 3)
    lost = tried = 0
    disk = folder.with_name("disk")
    for number, files in journal.disks(before, folder):
        disk.mkdir()
        for name, content in files.items():
            (disk / name).write_bytes(content)
        tried += 1
        lost += min(newest(disk, kind) for kind in KINDS) < (3 if number == len(journal.calls) else 2)
        shutil.rmtree(disk)
    return lost, tried


def test_power_cut_at_every_system_call_loses_no_state(tmp_path, promise):
    lost, tried = lost_by_power_cuts(tmp_path / "run", save=save)
    assert lost == 0 and tried > 30
    promise(1, "a power cut inside a save: every state the disk may be in", f"{lost} lost of {tried}")


@pytest.mark.parametrize("mutant", ["no fsync of the file", "no fsync of the folder", "unlink first"])
def test_power_cuts_detect_unsafe_saves(tmp_path, monkeypatch, mutant):
    if mutant == "no fsync of the file":
        monkeypatch.setattr(checkpoint, "write_durably", without_fsync)
    if mutant == "no fsync of the folder":
        monkeypatch.setattr(durable, "sync_folder", lambda _: None)
    unsafe_save = unlink_first if mutant == "unlink first" else save
    assert lost_by_power_cuts(tmp_path / "run", save=unsafe_save)[0] > 0


# Damage


def undetected_damage(folder: Path, *, flips: int, cuts: int) -> tuple[int, int]:
    """Return how many bit flips and cuts of the newest file are undetected or not repaired from the older file."""
    folder.mkdir()
    for step in (1, 2):
        CheckpointFolder(folder).save(["last"], snapshot(step, size=300), keep=KEEP)
    path = CheckpointFolder(folder).files("last")[0].path
    intact, generator = path.read_bytes(), random.Random(1)

    def is_detected() -> bool:
        try:
            loaded, _, damaged = CheckpointFolder(folder).load("last")
        except Exception:
            return False
        return loaded.step == 1 and list(damaged) == [path]

    undetected = [0, 0]
    for _ in range(flips):
        bit = generator.randrange(8 * len(intact))
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        undetected[0] += not is_detected()
    for length in [0, 1, len(intact) - 1, *generator.sample(range(len(intact)), cuts - 3)]:
        path.write_bytes(intact[:length])
        undetected[1] += not is_detected()
    path.write_bytes(intact)
    assert CheckpointFolder(folder).load("last")[0].step == 2
    return undetected[0], undetected[1]


def test_damage_is_detected_and_the_older_generation_is_used(tmp_path, full, promise):
    flips, cuts = (1000, 200) if full else (300, 60)
    undetected = undetected_damage(tmp_path / "run", flips=flips, cuts=cuts)
    assert undetected == (0, 0)
    promise(5, "damage is detected: flipped bits", f"{flips - undetected[0]} of {flips}")
    promise(5, "damage is detected: cut files", f"{cuts - undetected[1]} of {cuts}")


def test_damage_check_detects_a_reader_that_ignores_the_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "digest", lambda *content: "0123456789abcdef")
    flips, _ = undetected_damage(tmp_path / "run", flips=50, cuts=10)
    assert flips > 25


# Full disks


def limit_file_size(size: int) -> None:
    """Limit the files of this process to `size` bytes: a longer write fails half-way, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def lost_on_full_disks(folder: Path, *, save: Save, offsets: list[int]) -> int:
    lost = 0
    for offset in offsets:
        run_folder = folder / str(offset)
        run_folder.mkdir(parents=True)
        for step in (1, 2):
            save(CheckpointFolder(run_folder), step)
        before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
        child = os.fork()
        if child == 0:
            limit_file_size(offset)
            try:
                save(CheckpointFolder(run_folder), 3)
            except StorageError as error:
                message = str(error)
                is_complete = all(
                    text in message for text in (str(run_folder), "bytes", "bytes are free", "File too large")
                )
                os._exit(0 if is_complete else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, offset
        lost += {path.name: path.read_bytes() for path in run_folder.iterdir()} != before
    return lost


def test_full_disk_keeps_the_older_checkpoint(tmp_path, promise):
    size = len(packed(snapshot(3)))
    offsets = sorted({0, 1, size // 4, size // 2, size * 99 // 100, size - 1, *range(97, size, size // 14)})[:20]
    assert len(offsets) == 20
    lost = lost_on_full_disks(tmp_path / "run", save=save, offsets=offsets)
    assert lost == 0
    promise(6, "a full disk destroys nothing", f"{len(offsets) - lost} of {len(offsets)} offsets")


def test_full_disk_detects_a_file_truncated_in_place(tmp_path, monkeypatch):
    def cut(path: Path, content: bytes) -> None:
        full = OSError(errno.EFBIG, "File too large")
        try:
            in_place(path, content)
        except OSError:
            raise StorageError(str(path), durable._write_failure(path, len(content), full)) from None
        if path.stat().st_size < len(content):
            raise StorageError(str(path), durable._write_failure(path, len(content), full))

    monkeypatch.setattr(checkpoint, "write_durably", cut)
    assert lost_on_full_disks(tmp_path / "run", save=one_name, offsets=[0, 100]) == 2


SMALL_DISK_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_durability import save, snapshot
from trainer.storage.checkpoint import CheckpointFolder
from core.errors import StorageError
folder = CheckpointFolder(Path(sys.argv[1]))
try:
    for step in range(100):
        folder.save(["step"], snapshot(step), keep={"step": None})
except StorageError as error:
    print(step, error)
"""


def test_full_tmpfs_keeps_the_older_checkpoints(tmp_path):
    """Uses a tmpfs of 200 KiB in a separate mount namespace, if the system permits that."""
    mount = f"mount -t tmpfs -o size=200k none {tmp_path} && "
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent / "src")}
    if subprocess.run(["unshare", "-m", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("needs permission to mount")
    script = tmp_path.with_name("small.py")
    script.write_text(SMALL_DISK_SCRIPT)
    command = f"{mount}{sys.executable} {script} {tmp_path} {tests}; ls -A {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env=environment)
    message, *files = done.stdout.splitlines()
    step = int(message.split()[0])
    assert step == 5 and "No space left on device" in message, done
    assert f"cannot write {len(packed(snapshot(step))):,} bytes (" in message and "bytes are free" in message
    assert [name[:13] for name in sorted(files)] == [f"step-{number:08d}" for number in range(step)]
