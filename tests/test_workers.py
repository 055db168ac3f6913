"""What may happen to the processes that make batches: each test ends real ones, by real signals."""

import faulthandler
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from data.augment.per_sample import ASampleAtATime
from data.augment.pipeline import Augmentations
from data.loading.loaders import TrainLoader
from data.loading.normalisation import Normalisation
from data.sources.images import Images

CPU = torch.device("cpu")
LAUNCHER = """
import multiprocessing, sys, torch
from data.loading.workers import fetched

def fetch(rows):
    images = (torch.arange({numbers}, dtype=torch.float32) * (1 + rows[0])).view(1, 1, -1, 1)
    return (images, rows, rows), {{}}

batches = list(torch.arange(12).split(1))
results = fetched(fetch, batches, num_workers=3, timeout_s=60, pin_memory=False)
"""


def read(do: object, **changes: object) -> list[bytes]:
    """The pictures of an epoch of eight batches, as three workers give them while `do` happens to one of a worker."""
    pixels = torch.randint(0, 256, (32, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [batch.images.numpy().tobytes() for [batch] in loader(pixels, do, **changes).steps(0)]


def loader(pixels: Tensor, do: object, **changes: object) -> TrainLoader:
    settings = {"batch_size": 4, "accumulate": 1, "seed": 1, "device": CPU, "num_workers": 3} | changes
    steps = {"mine": ASampleAtATime(do, name="augment.mine")}
    return TrainLoader(
        Images(pixels, torch.arange(len(pixels)) % 3),
        augmentations=Augmentations(steps, seed=1, num_classes=3),
        normalisation=Normalisation({"mean": torch.tensor([0.4]), "std": torch.tensor([0.2])}),
        **settings,
    )


class Faulty:
    """Mirrors a picture; a worker that comes first to some of them does something else."""

    def __init__(self, folder: Path, *, times: int, fault: object) -> None:
        self.folder, self.times, self.fault = folder, times, fault

    def __call__(self, picture: Tensor) -> Tensor:
        for number in range(self.times if multiprocessing.parent_process() else 0):
            try:
                (self.folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            self.fault()
        return picture.flip(2)


def die(number: signal.Signals) -> None:
    faulthandler.disable()  # of pytest, which would write pages
    os.kill(os.getpid(), number)


def gone(pids: list[int], *, within: float) -> bool:
    """Whether these processes end in time; what is left for its parent to fetch has ended."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat").read_text() for pid in pids if Path(f"/proc/{pid}/stat").exists()]
        if all(state.rpartition(")")[2].split()[0] == "Z" for state in states):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_p07_a_worker_that_dies_is_replaced_and_no_bit_changes(tmp_path, caplog, number):
    mirror = Faulty(tmp_path, times=0, fault=None)
    expected = read(mirror, num_workers=0)
    assert read(mirror) == expected and not caplog.records
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "preceptor.data"):
        assert read(Faulty(tmp_path, times=1, fault=lambda: die(number))) == expected
    assert time.monotonic() - start < 2
    [record] = caplog.records
    assert record.name == "preceptor.data"
    assert record.getMessage().startswith("loader worker (pid ")
    assert f") was killed by {number.name}; the workers are replaced" in record.getMessage()
    assert not multiprocessing.active_children()


def test_p07_a_worker_killed_from_outside_in_the_middle(tmp_path, caplog):
    mirror = Faulty(tmp_path, times=0, fault=None)
    expected = read(mirror, num_workers=0)
    for victims in (slice(1), slice(None)):
        pixels = torch.randint(0, 256, (32, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        given = []
        for [batch] in loader(pixels, mirror).steps(0):
            given.append(batch.images.numpy().tobytes())
            if len(given) == 2:
                for worker in multiprocessing.active_children()[victims]:
                    os.kill(worker.pid, signal.SIGKILL)
        assert given == expected
    assert 1 <= len(caplog.records) <= 2  # the last batches may have been made before


def test_p07_workers_that_go_on_dying_are_an_error(tmp_path, caplog):
    with pytest.raises(DataError) as caught:
        read(Faulty(tmp_path, times=100, fault=lambda: die(signal.SIGBUS)))
    assert caught.value.subject.startswith("loader worker (pid ")
    assert "killed by SIGBUS, and so were 3 before it" in str(caught.value) and "memory" in str(caught.value)
    assert len(caplog.records) == 3
    assert not multiprocessing.active_children()


def test_p07_the_main_process_has_no_handler_for_the_death_of_a_child(tmp_path):
    """It would be called anywhere, also while an optimizer steps."""
    read(Faulty(tmp_path, times=0, fault=None))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_a_worker_that_exits_is_told_with_its_code(tmp_path, caplog):
    read(Faulty(tmp_path, times=1, fault=lambda: os._exit(7)))
    assert "was gone, with exit code 7" in caplog.text


def test_p08_a_worker_that_hangs(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"data.timeout_s = 0.3: a loader worker \(pid \d+\) has taken longer"):
        read(Faulty(tmp_path, times=1, fault=lambda: time.sleep(600)), timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()
    with pytest.raises(ConfigError, match="timeout_s = 0: must be > 0"):
        read(Faulty(tmp_path, times=0, fault=None), timeout_s=0)


def test_an_error_in_a_worker_comes_with_its_place(tmp_path):
    for error, do in ((MemoryError, "raise MemoryError('on purpose')"), (RuntimeError, "1 / 0")):
        program = LAUNCHER.format(numbers=9).replace("    return", f"    {do}\n    return") + "next(results)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        last = done.stderr.strip().splitlines()
        assert any(line.startswith(f"{error.__name__}: in a loader worker: Traceback") for line in last), done.stderr
        assert "in fetch" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_p06_workers_go_with_a_parent_that_is_killed():
    program = LAUNCHER.format(numbers=9) + (
        "next(results)\nprint(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and not gone(pids, within=0.1)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert gone(pids, within=2)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_p09_a_small_dev_shm_does_not_matter():
    """Batches of 4 MB, where there is 1 MB; they do not go through it."""
    program = LAUNCHER.format(numbers=1_000_000) + (
        "import os, hashlib\nspace = os.statvfs('/dev/shm')\n"
        "for (images, labels, rows), _ in results:\n"
        "    print(hashlib.sha256(images.numpy()).hexdigest(), *rows.tolist())\n"
        "print(space.f_blocks * space.f_frsize, file=sys.stderr)\n"
    )
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"']
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("may not mount")
    plain, small = (
        subprocess.run(command, capture_output=True, text=True, timeout=60)
        for command in ([sys.executable, "-c", program], [*mount, sys.executable, program])
    )
    assert plain.returncode == small.returncode == 0, small.stderr
    assert small.stderr == "1048576\n"  # and no warning
    assert plain.stdout == small.stdout and len(plain.stdout.splitlines()) == 12
