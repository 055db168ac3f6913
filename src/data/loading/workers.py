"""Processes that make batches for the loop, and what may happen to them.

    worker w of W    makes batches w, w + W, w + 2W, ...  ->  writes them to its slots, files in memory, in turn
                     and sends a word through its pipe    ->  the main process copies the batch out, and answers

A batch is a pure function of its rows, so nothing is lost with a worker: when one dies, all are replaced, and go on
from the first batch that was not given out. Each has a pipe of its own and shares no lock, so that none can hold up
another; and its slots are not in /dev/shm, which is small in many containers. (torch's DataLoader does both, and sets
a handler for SIGCHLD that would raise an error in the middle of an optimizer's step.)
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from io import FileIO
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from core.errors import STOP_SIGNALS, DataError, PreceptorError, is_out_of_memory
from core.processes import death, die_with

Parts = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), labels (B,) or (B, K), rows (B,)
Bad = dict[int, str]  # pictures that could not be used, by position
Fetch = Callable[[Tensor], tuple[Parts, Bad]]

AHEAD = 2  # batches that a worker makes before the first of them is taken
REPLACEMENTS = 3  # in one reading; who dies more often does so for a reason
FORK = multiprocessing.get_context("fork")
log = logging.getLogger("preceptor.data")


class WorkerDied(Exception):
    """A worker ended before its batch was there."""

    def __init__(self, pid: int | None, exit_code: int | None) -> None:
        self.worker = f"loader worker (pid {pid})"
        self.how = death(exit_code)
        super().__init__(f"{self.worker} was {self.how}")


def fetched(
    fetch: Fetch, batches: Sequence[Tensor], *, num_workers: int, timeout_s: float, pin_memory: bool
) -> Generator[tuple[Parts, Bad], None, None]:
    """What `fetch` makes of each batch of rows, in their order; by this process if `num_workers` is 0."""
    if num_workers == 0:
        for rows in batches:
            (images, labels, rows), bad = fetch(rows)
            if pin_memory:
                images, labels, rows = images.pin_memory(), labels.pin_memory(), rows.pin_memory()
            yield (images, labels, rows), bad
        return
    given, replaced = 0, 0
    while given < len(batches):
        rest = batches[given:]
        workers: list[Worker] = []
        try:
            for number in range(min(num_workers, len(rest))):
                workers.append(Worker(fetch, rest[number::num_workers]))
            for number in range(len(rest)):
                batch = workers[number % num_workers].take(timeout_s=timeout_s, pin_memory=pin_memory)
                given += 1
                yield batch
        except WorkerDied as death:
            replaced += 1
            if replaced > REPLACEMENTS:
                explanation = f"{death.how}, and so were {REPLACEMENTS} before it; if memory runs out, the system kills"
                hint = "workers: fewer of them (data.num_workers) or smaller batches (data.batch_size) need less"
                raise DataError(death.worker, f"{explanation} {hint}") from None
            log.warning(f"{death}; the workers are replaced, and no batch is lost or changed")
        finally:
            for worker in workers:
                worker.end()


class Worker:
    """A process that makes batches, seen from the main process."""

    def __init__(self, fetch: Fetch, batches: Sequence[Tensor]) -> None:
        self.slots = [_file_in_memory() for _ in range(AHEAD)]
        self.taken = 0
        self.pipe, theirs = FORK.Pipe()
        arguments = (fetch, batches, self.slots, theirs, os.getpid())
        self.process = FORK.Process(target=_work, args=arguments, daemon=True)
        with _signals_held():
            self.process.start()
        theirs.close()  # now the worker alone holds that end: if it dies, the pipe says so

    def take(self, *, timeout_s: float, pin_memory: bool) -> tuple[Parts, Bad]:
        """Its next batch, copied out of its slot."""
        if not self.pipe.poll(timeout_s):
            explanation = f"a loader worker (pid {self.process.pid}) has taken longer for a batch: is the data's place"
            raise DataError("data.timeout_s", f"{explanation} reachable? Or allow more", value=timeout_s)
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            raise WorkerDied(self.process.pid, self.process.exitcode) from None
        if isinstance(answer, Exception):
            raise answer
        kinds, bad = answer
        slot = self.slots[self.taken % AHEAD]
        slot.seek(0)
        images, labels, rows = (_copied(slot, *kind, pin_memory=pin_memory) for kind in kinds)
        self.taken += 1
        with contextlib.suppress(OSError):  # it is done, or dead: seen when its next batch is due
            self.pipe.send_bytes(b"taken")
        return (images, labels, rows), bad

    def end(self) -> None:
        """Kill it, as SIGTERM is blocked there; there is nothing in it to be saved."""
        self.process.kill()
        self.process.join(5)  # not for ever: one that waits for a dead network drive cannot even be killed
        self.pipe.close()
        for slot in self.slots:
            slot.close()


def _work(fetch: Fetch, batches: Sequence[Tensor], slots: Sequence[FileIO], pipe: Connection, parent: int) -> None:
    """What a worker does."""
    die_with(parent)
    torch.set_num_threads(1)
    for turn, rows in enumerate(batches):
        if turn >= AHEAD:
            pipe.recv_bytes()  # the slot is free again
        try:
            parts, bad = fetch(rows)
            slot = slots[turn % AHEAD]
            slot.seek(0)
            for part in parts:
                content = part.contiguous().numpy().data.cast("B")
                while content:
                    content = content[slot.write(content) :]
            pipe.send(([(part.shape, part.dtype) for part in parts], bad))
        except PreceptorError as error:
            pipe.send(error)
            return
        except Exception as error:  # where it happened would be lost on the way
            kind = MemoryError if is_out_of_memory(error) else RuntimeError
            is_storage = isinstance(error, OSError)  # told as such, as where there are no workers
            pipe.send(error if is_storage else kind(f"in a loader worker: {traceback.format_exc()}"))
            return


def _copied(slot: FileIO, shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """The slot's next tensor."""
    part = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    content = part.numpy().data.cast("B")
    while content:
        content = content[slot.readinto(content) :]
    return part


def _file_in_memory() -> FileIO:
    """Without a name, and not in /dev/shm: bounded by the memory alone."""
    if sys.platform == "linux":
        return FileIO(os.memfd_create("batch"), "r+b")
    return tempfile.TemporaryFile(buffering=0)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Workers are born with them blocked: one to the whole process group asks the run to save and stop, and they serve
    it until it has. Here they are only held up meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _kill_workers() -> None:
    """Those that are left when the process ends; multiprocessing would send SIGTERM, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()
