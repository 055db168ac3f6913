"""Alternating turns of contenders, with the throughput of each in each round; cases that several benchmarks measure.

A `Contender` is a greenlet: it runs only in its turns. Short turns of all contenders alternate in one thread, so a busy
machine slows all of them equally. (Separate threads would each start OpenMP threads, together more than the cores.)
"""

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from contenders import Seen
from tables import Line

BATCH = 128
CPU = ("trainer.device=cpu", f"data.batch_size={BATCH}")
CASES = {
    "MLP 784-256-256-10, MNIST": ("data=mnist", "model=mlp", "model.hidden=[256,256]", *CPU),
    "LeNet 20C5-50C5-FC256, MNIST": ("data=mnist", "model=lenet", *CPU),
    "LeNet 20C5-50C5-FC256, MNIST, crop_flip": ("data=mnist", "model=lenet", "augment=crop_flip", *CPU),
    "ResNet-20, CIFAR-10": ("data=cifar10", "model=resnet20", *CPU),
    "ResNet-20, CIFAR-10, crop_flip": ("data=cifar10", "model=resnet20", "augment=crop_flip", *CPU),
}
Turn = Callable[[float], float]  # seconds -> measured value, such as samples per second


class Contender:
    """Training loop that runs only in its turns; a context manager, whose exit ends the loop.

    Its worker processes are stopped between its turns. Otherwise they would slow down the other contenders, and the
    next turn would start with batches that were prepared outside the measured time.
    """

    def __init__(self, train: Callable[[Seen], object]) -> None:
        from greenlet import greenlet

        self._running = greenlet(lambda: train(self._seen))
        self._workers: set[int] = set()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGCONT)
        self._running.throw()

    def turn(self, seconds: float) -> float:
        """Continue for `seconds`, up to the end of a step; return samples per second."""
        others = worker_pids() - self._workers
        self._signal(signal.SIGCONT)
        self._seconds, self._samples, self._began = seconds, 0, time.perf_counter()
        throughput: float = self._running.switch()
        self._workers = worker_pids() - others
        self._signal(signal.SIGSTOP)
        return throughput

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _seen(self, samples: int) -> None:
        self._samples += samples
        if time.perf_counter() - self._began >= self._seconds:
            wait_for_device()
            duration = time.perf_counter() - self._began
            assert self._running.parent is not None
            self._running.parent.switch(self._samples / duration)


def worker_pids() -> set[int]:
    """Return the descendants of this process, except the fork server that all of Preceptor's loaders share."""
    from data.loading.server import worker_server

    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(") ")[2].split()[1])
    descendants, generation = set[int](), {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        descendants |= generation
    return descendants - {worker_server().pid}


def wait_for_device() -> None:
    """Wait for the kernels that the GPU has queued, so that they do not count in the next contender's turn."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(turns: Mapping[str, Turn], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the value of each turn in each round, after a warm-up round that is not counted."""
    values: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(-1, rounds):
        # In random order: the previous contender determines what is in the caches.
        for name in random.Random(number).sample(names, len(names)):
            value = turns[name](seconds)
            if number >= 0:
                values[name].append(value)
    return values


def race(
    trainings: Mapping[str, Callable[[Seen], object]], *, of: str, rounds: int, seconds: float, unit: str = "samples/s"
) -> Line:
    """Run contenders in turns and return their line of measurements."""
    with ExitStack() as stack:
        turns = {name: stack.enter_context(Contender(train)).turn for name, train in trainings.items()}
        return {"unit": unit, "of": of, **in_turns(turns, rounds=rounds, seconds=seconds)}


def epoch_of(samples: int, read: Callable[[], object], _: float) -> float:
    """Read all samples once and return samples per second."""
    start = time.perf_counter()
    read()
    return samples / (time.perf_counter() - start)
