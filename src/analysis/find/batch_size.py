"""Samples per second of each batch size, up to the largest that fits into memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, islice

from core.errors import is_out_of_memory
from trainer.device import synchronize
from trainer.training import Training

WARM_UP = 2  # untimed steps
ENOUGH = 0.95  # the suggestion has at least this share of the highest throughput


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Samples per second of a batch size; the median over steps."""

    batch_size: int
    samples_per_second: float


def measure(build: Callable[[int], Training], sizes: list[int], *, steps: int) -> tuple[list[Throughput], str]:
    """Return the throughput of each batch size, and why the list ends: "" or an explanation.

    `build` returns a new training with a batch size.
    """
    results: list[Throughput] = []
    for size in sizes:
        try:
            results.append(Throughput(batch_size=size, samples_per_second=throughput(build(size), steps=steps)))
        except Exception as exception:
            if not is_out_of_memory(exception):
                raise
            return results, f"batches of {size:,} do not fit into memory"
    return results, ""


def throughput(training: Training, *, steps: int) -> float:
    """Return the median samples per second of optimizer steps of a training, data included."""
    batches = chain.from_iterable(training.train_loader.steps(epoch) for epoch in count())
    training.state.model.train()
    rates = []
    for number, batch in enumerate(islice(batches, WARM_UP + steps)):
        began = time.perf_counter()
        samples = training.step(batch).samples
        training.step.clear_gradients()
        synchronize(training.device)
        if number >= WARM_UP:
            rates.append(samples / (time.perf_counter() - began))
    return statistics.median(rates)


def suggest(results: list[Throughput]) -> Throughput:
    """Return the smallest batch size with at least 95% of the highest throughput."""
    highest = max(result.samples_per_second for result in results)
    return next(result for result in results if result.samples_per_second >= ENOUGH * highest)
