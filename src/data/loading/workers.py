"""WorkerPool: starts the loader workers of one source, receives their batches, and replaces workers that die.

    worker w of W    prepares batches w, w + W, w + 2W, ... and writes them to its slots (files in memory), in turn
                     sends one message per batch over its socket; the main process copies the batch and frees the slot

Workers are forked by a server (core/fork_server.py explains why). Each gets its source once and persists over epochs.
For each reading, one pass over a list of batches, it gets the rows and the augmentation. Between readings it waits. If
a reading is abandoned, its workers are killed.

A batch is a pure function of its rows, so no batch is lost with a worker. If a worker dies, all workers are replaced.
The new ones continue with the first batch that was not yielded.

torch's DataLoader is not used, for three reasons. Its workers share locks, so a dead worker can block the others: here
each worker has its own socket. It sends tensors through /dev/shm, which is small in many containers. It also sets a
SIGCHLD handler, which can raise an error in the middle of an optimizer step.
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
from data.loading.worker_process import SLOT_IS_FREE, BatchTensors, Fetch
from data.sources.images import Problems

PREFETCH = 2  # batches that a worker prepares in advance: the number of its slots
MAX_REPLACEMENTS = 3  # in one reading; if workers die more often, the cause is probably permanent
# The fork server imports this module if the main process has imported it. The import takes a second, and otherwise each
# worker would repeat it when it unpickles a transform.
SLOW_IMPORT = "torchvision.transforms.v2"
LOADERS = 3  # of a run: train, val and test
OTHER_FILES = 128  # upper bound on the open files of a run without its workers
log = logging.getLogger("preceptor.data")


@functools.cache  # one warning per process
def usable_workers(num_workers: int) -> int:
    """Return the number of workers to start, at most `num_workers`; log a warning if it is smaller.

    The processor cores and the limit on open files (`ulimit -n`) bound it. Results do not depend on it.
    """
    cores, (open_files, _) = os.cpu_count() or 1, resource.getrlimit(resource.RLIMIT_NOFILE)
    by_cores = max(16, 4 * cores)
    by_files = max(1, (open_files - OTHER_FILES) // (LOADERS * (PREFETCH + 1)))
    usable = min(num_workers, by_cores, by_files)
    if usable < num_workers:
        has_cores = f"this machine has {cores} processor cores"
        reason = has_cores if by_cores <= by_files else f"the system allows {open_files} open files (ulimit -n)"
        log.warning(f"data.num_workers = {num_workers}: only {usable} workers are started, as {reason}")
    return usable


class WorkerDied(Exception):
    """A worker ended before it had prepared its next batch."""

    def __init__(self, pid: int | None, exit_code: int | None) -> None:
        self.worker = f"loader worker (pid {pid})"
        self.how = describe_exit(exit_code)
        super().__init__(f"{self.worker} {self.how}")


class WorkerPool:
    """The workers of one source. Each of them gets `fetch`, with the tensors that it refers to, when it starts.

    timeout_s:    seconds that a worker may take for a batch
    pin_memory:   copy batches to pinned memory, from which CUDA copies asynchronously
    """

    def __init__(self, fetch: Fetch, *, num_workers: int, timeout_s: float, pin_memory: bool) -> None:
        self.fetch, self.num_workers, self.timeout_s, self.pin_memory = fetch, num_workers, timeout_s, pin_memory
        self._source: list[FileIO] = []  # the parcel of `fetch`; empty until it is needed
        self._idle: list[Worker] = []
        self._owner = os.getpid()
        weakref.finalize(self, _close, self._idle, self._source)

    def share(self) -> Any:
        """Return a copy of `fetch` whose tensors use the memory that the workers map.

        So the caller can release its own copy of the tensors. Raises CannotPack.
        """
        self.fetch = unpack(self._parcel().fileno())
        return self.fetch

    def _parcel(self) -> FileIO:
        if not self._source:
            self._source.append(pack(self.fetch))
        return self._source[0]

    def read(self, task: object, batches: Sequence[Tensor]) -> Generator[tuple[BatchTensors, Problems], None, None]:
        """Yield the result of `fetch(task, rows)` for each tensor of rows (B,), in their order.

        Closing the generator before its end kills its workers. Raises CannotPack if `task` cannot be pickled, and the
        errors that `fetch` raises. Raises DataError if a worker exceeds `timeout_s`, or after too many replacements.
        """
        if not batches:
            return
        yielded, replacements = 0, 0
        with pack((task, torch.cat(list(batches)), [len(rows) for rows in batches])) as parcel:
            while yielded < len(batches):
                workers: list[Worker] = []
                try:
                    for number in range(min(self.num_workers, len(batches) - yielded)):
                        workers.append(self._idle_or_new())
                        workers[-1].begin(parcel, first=yielded + number, stride=self.num_workers)
                    for number in range(len(batches) - yielded):
                        worker = workers[number % self.num_workers]
                        batch = worker.take(timeout_s=self.timeout_s, pin_memory=self.pin_memory)
                        yielded += 1
                        yield batch
                    # If readings overlap, there are more workers than are kept: `finally` ends the others.
                    while workers and len(self._idle) < self.num_workers:
                        self._idle.append(workers.pop())
                except WorkerDied as death:
                    replacements += 1
                    if replacements > MAX_REPLACEMENTS:
                        explanation = f"{death.how}, after {MAX_REPLACEMENTS} other workers died"
                        hint = "if memory ran out, set a smaller data.num_workers or data.batch_size"
                        raise DataError(death.worker, f"{explanation}; {hint}") from None
                    log.warning(f"{death}; the workers are replaced, and no batch is lost or changed")
                finally:
                    _end(workers)

    def _idle_or_new(self) -> "Worker":
        """Return a worker that waits for a reading."""
        if self._owner != os.getpid():  # in a forked process: the idle workers belong to its parent
            _end(self._idle)
            self._owner = os.getpid()
        if self._idle:
            return self._idle.pop()
        return Worker(self._parcel())


class Worker:
    """A loader worker, as the main process controls it. The main process and the worker share its slots."""

    def __init__(self, source: FileIO) -> None:
        self.slots = [file_in_memory("batch") for _ in range(PREFETCH)]
        self.taken = 0  # batches of the current reading that were taken
        self.connection, worker_end = socket.socketpair()
        descriptors = [worker_end.fileno(), source.fileno(), *(slot.fileno() for slot in self.slots)]
        preload = [SLOW_IMPORT] if SLOW_IMPORT in sys.modules else []
        settings = json.dumps({"deterministic": torch.are_deterministic_algorithms_enabled()}).encode()
        with worker_end:  # closed here, so that only the worker holds it: its death closes the connection
            self.child = worker_server().start(
                "data.loading.worker_process.work", settings, descriptors, preload=preload
            )

    def begin(self, parcel: FileIO, *, first: int, stride: int) -> None:
        """Request every `stride`-th batch of the reading in a parcel, from the batch `first` on."""
        self.taken = 0
        with contextlib.suppress(OSError):  # the worker is dead: `take` reports it
            send_message(self.connection, json.dumps({"first": first, "stride": stride}).encode(), [parcel.fileno()])

    def take(self, *, timeout_s: float, pin_memory: bool) -> tuple[BatchTensors, Problems]:
        """Return its next batch, copied from its slot, and problems of single images.

        Raises WorkerDied, DataError after `timeout_s` seconds, and the error that the worker sent.
        """
        # The pid is read first: that waits until the server runs, which must not count for the timeout. Starting the
        # server takes as long as importing torch.
        pid = self.child.pid
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            explanation = f"a loader worker (pid {pid}) took longer for a batch"
            hint = "check that the storage of the data is reachable, or set a larger value"
            raise DataError("data.timeout_s", f"{explanation}; {hint}", value=timeout_s)
        try:
            message = receive_message(self.connection)
        except OSError:
            message = None
        if message is None:
            raise WorkerDied(pid, self.child.exit_code(1)) from None
        result = pickle.loads(message[0])  # noqa: S301  it comes from our own worker process
        if isinstance(result, Exception):
            raise result
        layouts, problems = result  # (shape, dtype) of each tensor
        slot = self.slots[self.taken % PREFETCH]
        slot.seek(0)
        images, labels, rows = (_read_tensor(slot, *layout, pin_memory=pin_memory) for layout in layouts)
        self.taken += 1
        with contextlib.suppress(OSError):  # the worker is dead: the next `take` reports it
            send_message(self.connection, SLOT_IS_FREE)
        return (images, labels, rows), problems


def _end(workers: list[Worker]) -> None:
    """Kill workers, wait for their ends, and close their files. They hold no data that must be saved."""
    for worker in workers:
        worker.child.kill()  # all before the first wait; SIGTERM would not end them, as they block it
    while workers:
        worker = workers.pop()
        worker.child.end()
        worker.connection.close()
        for slot in worker.slots:
            slot.close()


def _close(workers: list[Worker], source: list[FileIO]) -> None:
    """Release the workers and the parcel of a pool: when it is garbage-collected, or when the process exits."""
    _end(workers)
    for parcel in source:
        parcel.close()


def _read_tensor(slot: FileIO, shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Return a copy of the tensor at the current position of a slot, and move the position behind it."""
    tensor = torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    content = tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
    while content:  # a system call may read only some of the bytes
        content = content[slot.readinto(content) :]
    return tensor
