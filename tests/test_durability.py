"""What is saved is never lost: kills, power cuts, flipped bits, cut files, full disks (docs/reliability.md: 1, 5, 6).

Each check is a function that counts what was lost, so that it can be turned on ways of saving that are known to be bad:
then it must count something.
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

KEEP = {"last": 2, "best": 2, "step": None}
KINDS = ["best", "last"]
Save = Callable[[CheckpointFolder, int], None]


def snapshot(step: int, *, size: int = 3_000) -> Snapshot:
    tensors = {f"model.{name}": torch.full((size,), float(step)) for name in "abc"}
    return Snapshot(tensors, {"step": step, "best": {}})


def save(folder: CheckpointFolder, step: int) -> None:
    folder.save(KINDS, snapshot(step), keep=KEEP)


def newest(folder: Path, kind: str) -> int:
    """The step of the newest good checkpoint, compared bit by bit; -1 if none is left."""
    try:
        found = CheckpointFolder(folder).load(kind)[0]
    except CheckpointError:
        return -1
    assert packed(found) == packed(snapshot(found.step)), "a checkpoint was taken for good that is not"
    return found.step


# Ways of saving that are known to be bad


def in_place(path: Path, *content: bytes | memoryview) -> None:
    """Open and write, over the existing file."""
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
    """The older generations go before the new one is there."""
    for file in folder.files(*KINDS):
        os.unlink(file.path)  # noqa: PTH108
    save(folder, step)


def one_name(folder: CheckpointFolder, step: int) -> None:
    """One file, no hash, no generations, as most trainers do."""
    checkpoint.write_durably(folder.path / "last.safetensors", packed(snapshot(step)))


def newest_of_one_name(folder: Path, kind: str) -> int:
    try:
        return checkpoint.unpack((folder / "last.safetensors").read_bytes(), source=folder).step
    except Exception:
        return -1


# At every system call

CALLS = ("open", "write", "fsync", "replace", "link", "unlink")


class Dead(BaseException):
    """A process that ends here."""


def die_at(number: int, patched: pytest.MonkeyPatch, *, half: bool = False) -> None:
    """The process ends at its number-th system call that changes the disk; `half`: a write gets half through."""
    calls = itertools.count()
    for name in CALLS:
        real = getattr(os, name)

        def call(*arguments: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            if next(calls) == number:
                if half and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(9)
            return real(*arguments, **named)

        patched.setattr(os, name, call)


def lost_at_calls(folder: Path, *, save: Save, newest: Callable[[Path, str], int], half: bool) -> tuple[int, int]:
    """(states lost, calls tried): two saves, and a third one that ends at each of its calls in turn."""
    lost = 0
    for number in itertools.count():
        place = folder / f"{number}-{half}"
        place.mkdir(parents=True)
        for step in (1, 2):
            save(CheckpointFolder(place), step)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patched:
                die_at(number, patched, half=half)
                save(CheckpointFolder(place), 3)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        lost += min(newest(place, kind) for kind in KINDS) < (2 if died else 3)
        durable.remove_leftovers(place)
        lost += any(path.name.endswith(".tmp") for path in place.iterdir())
        shutil.rmtree(place)
        if not died:
            return lost, number
    raise AssertionError


def test_a_kill_at_every_system_call_of_a_save(tmp_path, promise):
    lost, tried = zip(
        *(lost_at_calls(tmp_path, save=save, newest=newest, half=half) for half in (False, True)), strict=True
    )
    assert sum(lost) == 0 and min(tried) >= 10
    promise(1, "a kill inside a save: at every system call", f"{sum(lost)} lost of {sum(tried)}")


def test_kill_at_every_system_call_detects_unsafe_saves(tmp_path, monkeypatch):
    assert lost_at_calls(tmp_path / "unlink", save=unlink_first, newest=newest, half=False)[0] > 0
    monkeypatch.setattr(checkpoint, "write_durably", in_place)
    assert lost_at_calls(tmp_path / "place", save=one_name, newest=newest_of_one_name, half=True)[0] > 0


# At random moments


def lost_at_random(folder: Path, *, save: Save, newest: Callable[[Path, str], int], kills: int) -> tuple[int, int]:
    """(states lost, kills inside a save): a process that does nothing but save, killed after 0 to 30 ms, again."""
    shared = mmap.mmap(-1, 16)  # the last step that was saved, and whether a save is under way
    draw, lost, inside = random.Random(0), 0, 0
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
        time.sleep(0.001 + 0.03 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved, saving = struct.unpack_from("qq", shared)
        inside += saving
        found = min(newest(folder, kind) for kind in KINDS)
        lost += found < saved
        struct.pack_into("qq", shared, 0, max(found, 1), 0)
        if found < 1:  # so that a bad way of saving can go on losing
            save(CheckpointFolder(folder), 1)
        durable.remove_leftovers(folder)
    assert len(list(folder.iterdir())) <= 6  # two generations of each kind, and one that a kill kept from going
    return lost, inside


def test_kills_at_random_moments_of_a_save(tmp_path, full, promise):
    kills = 1000 if full else 80
    lost, inside = lost_at_random(tmp_path / "run", save=save, newest=newest, kills=kills)
    assert lost == 0 and inside > 0.5 * kills
    promise(1, "a kill inside a save: at random moments", f"{lost} lost of {kills}, {inside} of them inside a save")


def test_random_kills_detect_a_file_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_durably", in_place)
    lost, _ = lost_at_random(tmp_path / "run", save=one_name, newest=newest_of_one_name, kills=40)
    assert lost > 4


# Power cuts, argued from the order of system calls


@dataclass
class Journal:
    """What a process asked of the disk, in order: data and names are there for sure only behind an fsync."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @contextmanager
    def written(self) -> Any:
        real = {name: getattr(os, name) for name in CALLS}
        opened: dict[int, Path] = {}

        def note(name: str, *facts: Any) -> None:
            self.calls.append((name, *facts))

        def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            descriptor = real["open"](path, flags, *rest, **named)
            opened[descriptor] = Path(path)
            if flags & os.O_CREAT:
                note("create", Path(path))
            return descriptor

        def write(descriptor: int, content: Any) -> int:
            note("write", opened[descriptor], bytes(content))
            return real["write"](descriptor, content)

        def fsync(descriptor: int) -> None:
            note("fsync", opened[descriptor])
            real["fsync"](descriptor)

        def two(name: str) -> Any:
            def call(one: Any, other: Any) -> None:
                real[name](one, other)
                note(name, Path(one), Path(other))

            return call

        def unlink(path: Any) -> None:
            real["unlink"](path)
            note("unlink", Path(path))

        with pytest.MonkeyPatch.context() as patched:
            for name, call in {"open": open_, "write": write, "fsync": fsync, "unlink": unlink}.items():
                patched.setattr(os, name, call)
            for name in ("replace", "link"):
                patched.setattr(os, name, two(name))
            yield

    def disks(self, before: dict[str, bytes], root: Path) -> Any:
        """The files that a power cut may leave after each call: names that were not made sure are new or old, each for
        itself; data that was not made sure is gone."""
        for number in range(len(self.calls) + 1):
            data = {Path(name): content for name, content in before.items()}  # by file, not by name
            sure: dict[Path, Path] = {root / name: Path(name) for name in before}  # name -> file
            names = dict(sure)
            loose: list[tuple[Path, Path | None]] = []  # names that changed since their folder was made sure
            synced = set(data)
            for name, first, *rest in self.calls[:number]:
                if name == "create":
                    names[first] = first
                    data[first] = b""
                    loose.append((first, first))
                elif name == "write":
                    data[names[first]] += rest[0]
                    synced.discard(names[first])
                elif name == "fsync" and first == root:
                    sure, loose = dict(names), []
                elif name == "fsync":
                    synced.add(names[first])
                elif name == "unlink":
                    names.pop(first)
                    loose.append((first, None))
                else:  # replace, link
                    file = names[first] if name == "link" else names.pop(first)
                    names[rest[0]] = file
                    loose.append((rest[0], file))
                    if name == "replace":
                        loose.append((first, None))
            for chosen in itertools.product((False, True), repeat=len(loose)):
                after = dict(sure)
                for (name, file), happened in zip(loose, chosen, strict=True):
                    if happened and file is None:
                        after.pop(name, None)
                    elif happened:
                        after[name] = file
                yield (
                    number,
                    {
                        name.name: data[file] if file in synced else data[file][: len(data[file]) // 2]
                        for name, file in after.items()
                    },
                )


def lost_by_power_cuts(folder: Path, *, save: Save) -> tuple[int, int]:
    """(states lost, states of the disk tried): two saves, and a power cut at each call of a third one, or behind it."""
    folder.mkdir()
    for step in (1, 2):
        save(CheckpointFolder(folder), step)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    journal = Journal()
    with journal.written():
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


def test_a_power_cut_at_every_system_call(tmp_path, promise):
    lost, tried = lost_by_power_cuts(tmp_path / "run", save=save)
    assert lost == 0 and tried > 30
    promise(1, "a power cut inside a save: every state the disk may be in", f"{lost} lost of {tried}")


@pytest.mark.parametrize("mutant", ["no fsync of the file", "no fsync of the folder", "unlink first"])
def test_power_cut_detects_a_missing_fsync(tmp_path, monkeypatch, mutant):
    if mutant == "no fsync of the file":
        monkeypatch.setattr(checkpoint, "write_durably", without_fsync)
    if mutant == "no fsync of the folder":
        monkeypatch.setattr(durable, "sync_folder", lambda _: None)
    chosen = unlink_first if mutant == "unlink first" else save
    assert lost_by_power_cuts(tmp_path / "run", save=chosen)[0] > 0


# Damage


def unnoticed_damage(folder: Path, *, flips: int, cuts: int) -> tuple[int, int]:
    """How many flipped bits and how many cuts of the newest file are not noticed, or not made good by the older."""
    folder.mkdir()
    for step in (1, 2):
        CheckpointFolder(folder).save(["last"], snapshot(step, size=300), keep=KEEP)
    path = CheckpointFolder(folder).files("last")[0].path
    good, draw = path.read_bytes(), random.Random(1)

    def is_noticed() -> bool:
        try:
            found, _, damaged = CheckpointFolder(folder).load("last")
        except Exception:
            return False
        return found.step == 1 and list(damaged) == [path]

    unnoticed = [0, 0]
    for _ in range(flips):
        place = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        unnoticed[0] += not is_noticed()
    for length in [0, 1, len(good) - 1, *draw.sample(range(len(good)), cuts - 3)]:
        path.write_bytes(good[:length])
        unnoticed[1] += not is_noticed()
    path.write_bytes(good)
    assert CheckpointFolder(folder).load("last")[0].step == 2
    return unnoticed[0], unnoticed[1]


def test_damage_is_noticed_and_the_generation_before_takes_over(tmp_path, full, promise):
    flips, cuts = (1000, 200) if full else (300, 60)
    unnoticed = unnoticed_damage(tmp_path / "run", flips=flips, cuts=cuts)
    assert unnoticed == (0, 0)
    promise(5, "damage is noticed: flipped bits", f"{flips - unnoticed[0]} of {flips}")
    promise(5, "damage is noticed: cut files", f"{cuts - unnoticed[1]} of {cuts}")


def test_damage_detects_a_reader_that_trusts_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "digest", lambda *content: "0123456789abcdef")
    flips, _ = unnoticed_damage(tmp_path / "run", flips=50, cuts=10)
    assert flips > 25


# Full disks


def limited(size: int) -> None:
    """Files of this process can grow to so many bytes: a write beyond fails half-way, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def lost_on_full_disks(folder: Path, *, save: Save, offsets: list[int]) -> int:
    lost = 0
    for offset in offsets:
        place = folder / str(offset)
        place.mkdir(parents=True)
        for step in (1, 2):
            save(CheckpointFolder(place), step)
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        child = os.fork()
        if child == 0:
            limited(offset)
            try:
                save(CheckpointFolder(place), 3)
            except StorageError as error:
                told = str(error)
                said = all(part in told for part in (str(place), "bytes", "are free there", "File too large"))
                os._exit(0 if said else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, offset
        lost += {path.name: path.read_bytes() for path in place.iterdir()} != before
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
            raise StorageError(str(path), durable._told(path, len(content), full)) from None
        if path.stat().st_size < len(content):
            raise StorageError(str(path), durable._told(path, len(content), full))

    monkeypatch.setattr(checkpoint, "write_durably", cut)
    assert lost_on_full_disks(tmp_path / "run", save=one_name, offsets=[0, 100]) == 2


ON_A_SMALL_DISK = """
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


def test_tmpfs_that_is_full_keeps_the_older_checkpoint(tmp_path):
    """A tmpfs of 200 KiB in a mount namespace of its own, where that is permitted."""
    mount = f"mount -t tmpfs -o size=200k none {tmp_path} && "
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent / "src")}
    if subprocess.run(["unshare", "-m", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("no mounts here")
    script = tmp_path.with_name("small.py")
    script.write_text(ON_A_SMALL_DISK)
    command = f"{mount}{sys.executable} {script} {tmp_path} {tests}; ls -A {tmp_path}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env=environment)
    told, *files = done.stdout.splitlines()
    step = int(told.split()[0])
    assert step == 5 and "No space left on device" in told, done
    assert f"cannot write {len(packed(snapshot(step))):,} bytes (" in told and "are free there" in told
    assert [name[:13] for name in sorted(files)] == [f"step-{number:08d}" for number in range(step)]
