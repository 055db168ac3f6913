"""Processes that make batches for the loop, and what happens if one of them fails.

    worker w of W    makes batches w, w + W, w + 2W, ...    ->  writes them to its slots, files in memory, in turn
                     and reports each over its socket       ->  the main process copies it out, and frees the slot

Workers are forked by a server (core/fork_server.py says why). They get their source once and persist over epochs;
each reading sends them its rows and its augmentation. Between readings they wait. A reading that is abandoned kills its
workers.

A batch is a pure function of its rows, so nothing is lost with a worker: if one dies, all are replaced, and continue
with the first batch that was not given out. Each has a socket of its own and shares no lock, so that none can hold up
another; and its slots are not in /dev/shm, which is small in many containers. (torch's DataLoader does both, and sets
a handler for SIGCHLD that would raise an error in the middle of an optimizer's step.)
"""

import contextlib
import functools
import json
import logging
import os
import pickle
import resource
import select
import socket
import sys
import weakref
from collections.abc import Generator, Sequence
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from core.errors import DataError
from core.processes import describe_exit
from core.server_process import receive_message, send_message
from data.loading.parcels import file_in_memory, pack, unpack
from data.loading.server import worker_server
from data.loading.worker_process import SLOT_IS_FREE, Fetch, Parts
from data.sources.images import Problems

AHEAD = 2  # batches that a worker makes before the first of them is taken
REPLACEMENTS = 3  # in one reading; workers that die more often do so for a reason
# Imported by the server if the process has imported it: it takes a second, and each worker would need it again.
COSTLY = "torchvision.transforms.v2"
LOADERS = 3  # of a run: train, val and test
OTHER_FILES = 128  # open files that a run needs besides those of its workers, at most
log = logging.getLogger("preceptor.data")


@functools.cache  # one warning per process
def usable_workers(num_workers: int) -> int:
    """Return the number of workers to start; a warning is logged if it is smaller than `num_workers`.

    It is bounded by the processor cores and by the limit on open files (`ulimit -n`). Results do not depend on it.
    """
    cores, (open_files, _) = os.cpu_count() or 1, resource.getrlimit(resource.RLIMIT_NOFILE)
    by_cores = max(16, 4 * cores)
    by_files = max(1, (open_files - OTHER_FILES) // (LOADERS * (AHEAD + 1)))
    usable = min(num_workers, by_cores, by_files)
    if usable < num_workers:
        reason = f"{cores} processor cores" if by_cores <= by_files else f"{open_files} open files (ulimit -n)"
        log.warning(f"data.num_workers = {num_workers}: {usable} workers are started: this machine allows {reason}")
    return usable


class WorkerDied(Exception):
    """A worker ended before its batch was made."""

    def __init__(self, pid: int | None, exit_code: int | None) -> None:
        self.worker = f"loader worker (pid {pid})"
        self.how = describe_exit(exit_code)
        super().__init__(f"{self.worker} {self.how}")


class WorkerPool:
    """The workers of one source: `fetch` and all that it holds is sent to each of them once."""

    def __init__(self, fetch: Fetch, *, num_workers: int, timeout_s: float, pin_memory: bool) -> None:
        self.fetch, self.num_workers, self.timeout_s, self.pin_memory = fetch, num_workers, timeout_s, pin_memory
        self._source: list[FileIO] = []  # the parcel of `fetch`, as soon as there is one
        self._idle: list[Worker] = []
        self._owner = os.getpid()
        weakref.finalize(self, _close, self._idle, self._source)

    def share(self) -> Any:
        """Return `fetch` with the tensors that the workers map, so that this process can drop its own copy of them."""
        self.fetch = unpack(self._parcel().fileno())
        return self.fetch

    def _parcel(self) -> FileIO:
        if not self._source:
            self._source.append(pack(self.fetch))
        return self._source[0]

    def read(self, task: object, batches: Sequence[Tensor]) -> Generator[tuple[Parts, Problems], None, None]:
        """Give what `fetch(task, rows)` makes of each batch of rows, in their order."""
        if not batches:
            return
        given, replaced = 0, 0
        with pack((task, torch.cat(list(batches)), [len(rows) for rows in batches])) as parcel:
            while given < len(batches):
                workers: list[Worker] = []
                try:
                    for number in range(min(self.num_workers, len(batches) - given)):
                        workers.append(self._idle_or_new())
                        workers[-1].begin(parcel, first=given + number, stride=self.num_workers)
                    for number in range(len(batches) - given):
                        worker = workers[number % self.num_workers]
                        batch = worker.take(timeout_s=self.timeout_s, pin_memory=self.pin_memory)
                        given += 1
                        yield batch
                    while workers and len(self._idle) < self.num_workers:  # more, if two readings ran at once
                        self._idle.append(workers.pop())
                except WorkerDied as death:
                    replaced += 1
                    if replaced > REPLACEMENTS:
                        explanation = f"{death.how}, and so were {REPLACEMENTS} before it; if memory runs out, the"
                        hint = "system kills workers: fewer of them (data.num_workers) or smaller batches"
                        raise DataError(death.worker, f"{explanation} {hint} (data.batch_size) need less") from None
                    log.warning(f"{death}; the workers are replaced, and no batch is lost or changed")
                finally:
                    _end(workers)

    def _idle_or_new(self) -> "Worker":
        if self._owner != os.getpid():  # in a fork of the process that has started them
            _end(self._idle)
            self._owner = os.getpid()
        if self._idle:
            return self._idle.pop()
        return Worker(self._parcel())


class Worker:
    """A process that makes batches, seen from the main process."""

    def __init__(self, source: FileIO) -> None:
        self.slots = [file_in_memory("batch") for _ in range(AHEAD)]
        self.taken = 0
        self.pipe, theirs = socket.socketpair()
        descriptors = [theirs.fileno(), source.fileno(), *(slot.fileno() for slot in self.slots)]
        preload = [COSTLY] if COSTLY in sys.modules else []
        settings = json.dumps({"deterministic": torch.are_deterministic_algorithms_enabled()}).encode()
        with theirs:  # then the worker alone holds that end: if it dies, the socket reports it
            self.child = worker_server().start(
                "data.loading.worker_process.work", settings, descriptors, preload=preload
            )

    def begin(self, parcel: FileIO, *, first: int, stride: int) -> None:
        """Have it make each `stride`-th batch of a reading, from the batch `first` on."""
        self.taken = 0
        with contextlib.suppress(OSError):  # it is dead: seen when its first batch is due
            send_message(self.pipe, json.dumps({"first": first, "stride": stride}).encode(), [parcel.fileno()])

    def take(self, *, timeout_s: float, pin_memory: bool) -> tuple[Parts, Problems]:
        """Its next batch, copied out of its slot."""
        pid = self.child.pid  # waits until the server has started, which takes as long as an import of torch
        poll = select.poll()
        poll.register(self.pipe, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            explanation = f"a loader worker (pid {pid}) has taken longer for a batch: is the data's place"
            raise DataError("data.timeout_s", f"{explanation} reachable? Or allow more", value=timeout_s)
        try:
            message = receive_message(self.pipe)
        except OSError:
            message = None
        if message is None:
            raise WorkerDied(pid, self.child.exit_code(1)) from None
        answer = pickle.loads(message[0])  # noqa: S301  our own process has sent it
        if isinstance(answer, Exception):
            raise answer
        kinds, problems = answer
        slot = self.slots[self.taken % AHEAD]
        slot.seek(0)
        images, labels, rows = (_copied(slot, *kind, pin_memory=pin_memory) for kind in kinds)
        self.taken += 1
        with contextlib.suppress(OSError):  # it is dead: seen when its next batch is due
            send_message(self.pipe, SLOT_IS_FREE)
        return (images, labels, rows), problems


def _end(workers: list[Worker]) -> None:
    """Kill them, as SIGTERM is blocked in them; there is nothing in them to be saved."""
    for worker in workers:
        worker.child.kill()
    while workers:
        worker = workers.pop()
        worker.child.end()
        worker.pipe.close()
        for slot in worker.slots:
            slot.close()


def _close(workers: list[Worker], source: list[FileIO]) -> None:
    """End what a pool has, when it is garbage or the process exits."""
    _end(workers)
    for parcel in source:
        parcel.close()


def _copied(slot: FileIO, shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """The slot's next tensor."""
    part = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    content = part.numpy().data.cast("B") if part.numel() else memoryview(b"")
    while content:
        content = content[slot.readinto(content) :]
    return part
