"""Loader workers under kills, crashes, hangs and errors. The tests send real signals to real processes."""

import contextlib
import faulthandler
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from core.errors import ConfigError, DataError
from data.augment.per_sample import PerSampleTransform
from data.augment.pipeline import Augmentations
from data.loading.loaders import TrainLoader
from data.loading.normalisation import Normalisation
from data.loading.parcels import pack, unpack
from data.loading.server import worker_server
from data.sources.images import Files, Images
from data.sources.listing import PackedPaths

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")
LAUNCHER = """
import sys, torch
sys.path.append({tests!r})
from data.loading.workers import WorkerPool
from test_workers import {fetch}, children

if __name__ == "__main__":
    batches = list(torch.arange(12).split(1))
    pool = WorkerPool({fetch}, num_workers=3, timeout_s=60, pin_memory=False)
    results = pool.read({task}, batches)
"""


def launcher(fetch: str, task: object, then: str) -> str:
    program = LAUNCHER.format(tests=str(Path(__file__).parent), fetch=fetch, task=task)
    return program + "".join(f"    {line}\n" for line in then.splitlines())


def multiples(count: int, rows: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[int, str]]:
    images = (torch.arange(count, dtype=torch.float32) * (1 + rows[0])).view(1, 1, -1, 1)
    return (images, rows, rows), {}


def fails(error: str, rows: Tensor) -> None:
    if error == "MemoryError":
        raise MemoryError("on purpose")
    raise ValueError(1 / 0)


def children(process: int) -> list[int]:
    """Return the running child processes of a process."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process and fields[0] != "Z":
                pids.append(int(path.parent.name))
    return sorted(pids)


def workers() -> list[int]:
    """Return the pids of the loader workers of this process."""
    server = worker_server().pid
    return children(server) if server is not None else []


@pytest.fixture(autouse=True)
def check_no_workers_remain() -> Iterator[None]:
    """Check that no workers run before and after a test: workers end with their loader."""
    gc.collect()
    assert workers() == []
    yield
    gc.collect()
    assert workers() == []


def read(transform: object, **changes: object) -> list[bytes]:
    """Return the images of an epoch of eight batches, loaded by three workers that apply `transform`."""
    return [batch.images.numpy().tobytes() for [batch] in loader(pixels_of(32), transform, **changes).steps(0)]


def loader(pixels: Tensor, transform: object, **changes: object) -> TrainLoader:
    settings = {"batch_size": 4, "accumulate": 1, "seed": 1, "device": CPU, "num_workers": 3} | changes
    steps = {"mine": PerSampleTransform(transform, name="augment.mine")}
    return TrainLoader(
        Images(pixels, torch.arange(len(pixels)) % 3),
        augmentations=Augmentations(steps, seed=1, num_classes=3),
        normalisation=Normalisation({"mean": torch.tensor([0.4]), "std": torch.tensor([0.2])}),
        **settings,
    )


class Faulty:
    """A transform that mirrors an image; in workers, the first `times` calls also run `fault`."""

    def __init__(self, folder: Path, *, times: int, fault: object) -> None:
        self.folder, self.times, self.fault, self.main = folder, times, fault, os.getpid()

    def __call__(self, image: Tensor) -> Tensor:
        for number in range(self.times if os.getpid() != self.main else 0):
            try:
                (self.folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            self.fault()
        return image.flip(2)


def pixels_of(count: int, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)


def die(number: signal.Signals) -> None:
    faulthandler.disable()  # pytest's handler would print long tracebacks
    os.kill(os.getpid(), number)


def have_exited(pids: list[int], *, within: float) -> bool:
    """Return whether these processes end within the time limit; zombies count as ended."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat").read_text() for pid in pids if Path(f"/proc/{pid}/stat").exists()]
        if all(state.rpartition(")")[2].split()[0] == "Z" for state in states):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_dead_worker_is_replaced_and_batches_are_bit_identical(tmp_path, caplog, number):
    mirror = Faulty(tmp_path, times=0, fault=None)
    expected = read(mirror, num_workers=0)
    assert read(mirror) == expected and not caplog.records
    with caplog.at_level(logging.WARNING, "preceptor.data"):
        assert read(Faulty(tmp_path, times=1, fault=partial(die, number))) == expected
    [record] = caplog.records
    assert record.name == "preceptor.data"
    assert record.getMessage().startswith("loader worker (pid ")
    assert re.search(rf"\) was killed by {number.name}[^;]*; the workers are replaced", record.getMessage())
    assert not workers()


def test_worker_killed_within_an_epoch_is_replaced(tmp_path, caplog):
    mirror, pixels = Faulty(tmp_path, times=0, fault=None), pixels_of(96)  # more batches than are prefetched
    expected = [batch.images.numpy().tobytes() for [batch] in loader(pixels, mirror, num_workers=0).steps(0)]
    for victims in (slice(1), slice(None)):
        images = []
        for [batch] in loader(pixels, mirror).steps(0):
            images.append(batch.images.numpy().tobytes())
            if len(images) == 2:
                for worker in workers()[victims]:
                    os.kill(worker, signal.SIGKILL)
        assert images == expected
    assert len(caplog.records) == 2


def test_workers_that_keep_dying_are_an_error(tmp_path, caplog):
    with pytest.raises(DataError) as caught:
        read(Faulty(tmp_path, times=100, fault=partial(die, signal.SIGBUS)))
    assert caught.value.subject.startswith("loader worker (pid ")
    assert "killed by SIGBUS, after 3 other workers died" in str(caught.value) and "memory" in str(caught.value)
    assert len(caplog.records) == 3
    assert not workers()


def test_main_process_has_no_sigchld_handler(tmp_path):
    """A handler could run anywhere, also during an optimizer step."""
    read(Faulty(tmp_path, times=0, fault=None))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_exit_code_of_a_worker_is_logged(tmp_path, caplog):
    read(Faulty(tmp_path, times=1, fault=partial(os._exit, 7)))
    assert "exited with code 7" in caplog.text


def test_hanging_worker_is_an_error_after_timeout_s(tmp_path):
    with pytest.raises(DataError, match=r"data.timeout_s = 0.3: a loader worker \(pid \d+\) took longer"):
        read(Faulty(tmp_path, times=1, fault=partial(time.sleep, 600)), timeout_s=0.3)
    assert not workers()
    with pytest.raises(ConfigError, match="timeout_s = 0: must be > 0"):
        read(Faulty(tmp_path, times=0, fault=None), timeout_s=0)


def test_error_in_a_worker_is_raised_with_its_traceback(full):
    for error in (MemoryError, RuntimeError) if full else (RuntimeError,):
        program = launcher("fails", repr(error.__name__), "next(results)")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        last = done.stderr.strip().splitlines()
        assert any(line.startswith(f"{error.__name__}: in a loader worker: Traceback") for line in last), done.stderr
        assert "in fails" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl (Linux)")
def test_workers_end_with_a_killed_parent():
    statements = "next(results), next(results), next(results)\nimport os\n[server] = children(os.getpid())\n"
    statements += "print(server, *children(server), flush=True)\n"
    program = launcher("multiples", 9, statements + "sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 4 and not have_exited(pids, within=0.1)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert have_exited(pids, within=2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/shm (Linux)")
def test_batches_do_not_go_through_dev_shm():
    """Batches of 4 MB are loaded although /dev/shm has 1 MB."""
    program = launcher(
        "multiples",
        1_000_000,
        "import os, hashlib\nspace = os.statvfs('/dev/shm')\n"
        "for (images, labels, rows), _ in results:\n"
        "    print(hashlib.sha256(images.numpy()).hexdigest(), *rows.tolist())\n"
        "print(space.f_blocks * space.f_frsize, file=sys.stderr)\n",
    )
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"']
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("needs permission to mount")
    plain, small = (
        subprocess.run(command, capture_output=True, text=True, timeout=60)
        for command in ([sys.executable, "-c", program], [*mount, sys.executable, program])
    )
    assert plain.returncode == small.returncode == 0, small.stderr
    assert small.stderr == "1048576\n"  # no warning
    assert plain.stdout == small.stdout and len(plain.stdout.splitlines()) == 12


# Workers persist


def mirror(folder: Path) -> Faulty:
    return Faulty(folder, times=0, fault=None)


def test_workers_persist_over_epochs_and_end_with_their_loader(tmp_path):
    streamed = loader(pixels_of(32), mirror(tmp_path))
    expected = loader(pixels_of(32), mirror(tmp_path), num_workers=0)
    pids = []
    for epoch in range(3):
        images = [batch.images for [batch] in streamed.steps(epoch)]
        assert all(
            torch.equal(actual, batch.images) for actual, [batch] in zip(images, expected.steps(epoch), strict=True)
        )
        pids.append(workers())
    assert len(pids[0]) == 3 and pids[0] == pids[1] == pids[2]
    list(streamed.steps(3, 7))  # one batch needs one worker; the others stay
    assert workers() == pids[0]
    server = worker_server().pid
    del streamed
    gc.collect()
    assert workers() == [] and worker_server().pid == server and worker_server().is_alive()


def test_abandoned_epoch_ends_its_workers_and_the_next_epoch_starts_new_ones(tmp_path):
    streamed = loader(pixels_of(32), mirror(tmp_path))
    steps = streamed.steps(0)
    for _ in range(3):
        next(steps)
    first_workers = workers()
    steps.close()
    assert len(first_workers) == 3 and workers() == []
    images = [batch.images for [batch] in streamed.steps(0)]
    assert len(images) == 8 and len(workers()) == 3 and not set(workers()) & set(first_workers)


def test_workers_of_an_executed_server_give_bit_identical_batches(tmp_path, monkeypatch):
    """A process with threads or CUDA uses an executed server."""
    expected = read(mirror(tmp_path), num_workers=0)
    monkeypatch.setattr("core.fork_server.can_fork", lambda: False)
    for _ in range(2):
        worker_server().close()  # the next server starts in the other way
        assert read(mirror(tmp_path)) == expected
        monkeypatch.undo()


def test_two_concurrent_epochs_of_one_loader_give_the_same_batches(tmp_path):
    streamed = loader(pixels_of(32), mirror(tmp_path), num_workers=2)
    expected = [[batch.images for [batch] in streamed.steps(epoch)] for epoch in (0, 1)]
    pairs = list(zip(streamed.steps(0), streamed.steps(1), strict=True))
    for number, ([first], [second]) in enumerate(pairs):
        assert torch.equal(first.images, expected[0][number]) and torch.equal(second.images, expected[1][number])
    assert len(workers()) == 2


def test_worker_killed_between_two_epochs_is_replaced(tmp_path, caplog):
    streamed = loader(pixels_of(32), mirror(tmp_path))
    list(streamed.steps(0))
    os.kill(workers()[1], signal.SIGKILL)
    actual = [batch.images for [batch] in streamed.steps(1)]
    expected = loader(pixels_of(32), mirror(tmp_path), num_workers=0).steps(1)
    assert all(torch.equal(images, batch.images) for images, [batch] in zip(actual, expected, strict=True))
    assert "was killed by SIGKILL, as the system does if memory is exhausted; the workers are replaced" in caplog.text


def test_killed_worker_server_is_replaced(tmp_path, caplog):
    streamed = loader(pixels_of(96), mirror(tmp_path))
    steps = streamed.steps(0)
    batches = [next(steps)]
    first_pid = worker_server().pid
    os.kill(first_pid, signal.SIGKILL)
    while worker_server().is_alive():
        time.sleep(0.001)
    batches += list(steps)
    expected = loader(pixels_of(96), mirror(tmp_path), num_workers=0).steps(0)
    assert all(
        torch.equal(actual.images, reference.images) for [actual], [reference] in zip(batches, expected, strict=True)
    )
    assert worker_server().pid != first_pid and len(caplog.records) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc (Linux)")
def test_pixels_in_memory_are_shared_with_the_workers_and_not_copied(tmp_path):
    """This process and its workers map the same memory, so that the pixels exist once."""
    pixels = pixels_of(64, side=1024)  # 64 MiB
    streamed = loader(pixels, mirror(tmp_path), num_workers=2)
    images = {int(row): image for [batch] in streamed.steps(0) for row, image in zip(batch.indices, batch.images)}
    assert len(images) == 64
    assert streamed.source.images.pixels.data_ptr() != pixels.data_ptr()
    assert torch.equal(streamed.source.images.pixels, pixels)
    for worker in (os.getpid(), *workers()):
        maps = Path(f"/proc/{worker}/smaps").read_text().split("VmFlags")
        [sizes] = [
            {line.split(":")[0]: int(line.split()[1]) for line in section.splitlines() if line.endswith(" kB")}
            for section in maps
            if "memfd:parcel" in section and int(section.partition("Size:")[2].split()[0]) >= 64 * 1024
        ]
        assert sizes["Anonymous"] == 0 and sizes["Rss"] > 0


class UnpicklableTransform:
    """A transform with a lock, which cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, image: Tensor) -> Tensor:
        return image


def test_transform_that_cannot_be_pickled_is_a_config_error_with_its_key():
    assert len(list(loader(pixels_of(8), UnpicklableTransform(), num_workers=0).steps(0))) == 2
    with pytest.raises(ConfigError) as caught:
        list(loader(pixels_of(8), UnpicklableTransform()).steps(0))
    assert caught.value.subject == "augment.mine"
    assert "cannot be sent to loader workers: cannot pickle '_thread.lock' object" in str(caught.value)
    assert str(caught.value).endswith("; set data.num_workers=0")


def test_transform_that_workers_cannot_import_is_a_config_error(monkeypatch):
    worker_server().warm_up()  # before the module exists
    module = ModuleType("only_here")
    exec("class Here:\n    def __call__(self, image):\n        return image", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    streamed = loader(pixels_of(8), module.Here())
    with pytest.raises(ConfigError, match="augment: cannot be sent to loader workers: ModuleNotFoundError.*only_here"):
        list(streamed.steps(0))


def test_importing_the_workers_has_no_side_effects():
    program = (
        "import atexit, os, signal, sys, torch, PIL.Image\n"  # Pillow registers an atexit hook
        "before = atexit._ncallbacks(), [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "import data.loading.workers, data.loading.loaders, core.fork_server\n"
        "assert before == (atexit._ncallbacks(), [signal.getsignal(n) for n in signal.valid_signals()])\n"
        "from test_workers import children\n"
        "assert children(os.getpid()) == []\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


def test_parcels_keep_every_kind_of_tensor():
    base = torch.arange(24).view(4, 6)
    content = {
        "transposed": base.t(),
        "twice": base.t(),
        "empty": torch.empty(0, 3),
        "bits": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "files": Files(PackedPaths.of([Path("a/ä.png"), Path("b.png")]), image_size=4, channels=1),
    }
    with pack(content) as parcel:
        unpacked = unpack(parcel.fileno())
    files, original_files = unpacked.pop("files"), content.pop("files")
    assert list(files.paths) == list(original_files.paths) and len(files) == 2 and files.image_size == 4
    for name, tensor in content.items():
        assert torch.equal(unpacked[name], tensor) and unpacked[name].dtype == tensor.dtype, name
    unpacked["transposed"].zero_()  # an independent copy
    assert base.sum() == 276
