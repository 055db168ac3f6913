"""Contenders take turns: what each one reaches in each round, and the cases that several parts measure.

A `Contender` is a greenlet: it moves only in its turns, so that short turns of all of them alternate in one thread, and
what a busy machine does to one it does to all. (Threads of their own would each have OpenMP threads of their own, more
than there are cores.)
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
Turn = Callable[[float], float]  # seconds -> what it reached


class Contender:
    """One that moves in its turns only; within `with`, which ends it.

    So do its workers: between its turns they are stopped, or they would go on at the cost of the others, and begin the
    next turn with batches made for nothing.
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
        """Go on for so long, to the end of a step; returns samples a second."""
        others = worker_pids() - self._workers
        self._signal(signal.SIGCONT)
        self._seconds, self._samples, self._began = seconds, 0, time.perf_counter()
        reached: float = self._running.switch()
        self._workers = worker_pids() - others
        self._signal(signal.SIGSTOP)
        return reached

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _seen(self, samples: int) -> None:
        self._samples += samples
        if time.perf_counter() - self._began >= self._seconds:
            wait_for_device()
            took = time.perf_counter() - self._began
            assert self._running.parent is not None
            self._running.parent.switch(self._samples / took)


def worker_pids() -> set[int]:
    """Return the processes below this one, without the fork server that all our loaders share."""
    from data.loading.server import worker_server

    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(") ")[2].split()[1])
    found, rest = set[int](), {os.getpid()}
    while rest:
        rest = {pid for pid, parent in parents.items() if parent in rest}
        found |= rest
    return found - {worker_server().pid}


def wait_for_device() -> None:
    """Until it has done what it was asked to: the next contender is not to pay for it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(turns: Mapping[str, Turn], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """What each reached in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(-1, rounds):
        for name in random.Random(number).sample(names, len(names)):  # the previous contender leaves the caches
            reached = turns[name](seconds)
            if number >= 0:
                found[name].append(reached)
    return found


def race(
    trainings: Mapping[str, Callable[[Seen], object]], *, of: str, rounds: int, seconds: float, unit: str = "samples/s"
) -> Line:
    """A line of contenders that run until all have had their turns."""
    with ExitStack() as stack:
        turns = {name: stack.enter_context(Contender(train)).turn for name, train in trainings.items()}
        return {"unit": unit, "of": of, **in_turns(turns, rounds=rounds, seconds=seconds)}


def epoch_of(samples: int, read: Callable[[], object], _: float) -> float:
    """Samples a second of reading them all once."""
    start = time.perf_counter()
    read()
    return samples / (time.perf_counter() - start)
