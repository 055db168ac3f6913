"""Prefetch on CUDA: the next batch is made while a step computes, on a stream of its own and from pinned memory.

    stream of the data       batch 1   batch 2      batch 3      ...
    stream of the network              step 1       step 2       ...

A CPU has no time to spare: there a thread that makes batches takes it from the network (docs/performance.md).
"""

from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def prefetched(batches: Iterator[Tensors], *, device: torch.device) -> Iterator[Tensors]:
    """Give the same batches; on CUDA each is begun before the one in front of it is given out."""
    return _on_another_stream(batches, device) if device.type == "cuda" else batches


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The data's: one for all epochs and loaders, as each stream has a memory of its own."""
    return torch.cuda.Stream(device)


def _on_another_stream(batches: Iterator[Tensors], device: torch.device) -> Iterator[Tensors]:
    stream = stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what batches are made of may still be on its way

    def begin() -> Tensors | Exception | None:
        try:
            with torch.cuda.stream(stream):
                return next(batches, None)
        except Exception as exception:
            return exception  # to be raised in its turn: the steps before it shall be made

    begun = begin()
    while begun is not None and not isinstance(begun, Exception):
        network = torch.cuda.current_stream(device)
        network.wait_stream(stream)  # before the next one is begun, or it would wait for that too
        for tensor in begun:
            tensor.record_stream(network)  # its memory is not given to another batch while the network uses it
        batch, begun = begun, begin()
        yield batch
    if begun is not None:
        raise begun
