"""Prefetch on CUDA: the GPU prepares the next batch on a separate stream while it computes a step.

    data stream       batch 1   batch 2      batch 3      ...
    model's stream              step 1       step 2       ...

On a CPU, batches are not prefetched: a thread that prepares them would take cores from the model (docs/performance.md).
"""

from collections.abc import Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def prefetched(batches: Iterator[Tensors], *, device: torch.device) -> Iterator[Tensors]:
    """Return an iterator of the same batches. On CUDA, the next batch is queued before a batch is returned.

    An error that `batches` raises is raised when its batch is requested.
    """
    return _prefetched_on_cuda(batches, device) if device.type == "cuda" else batches


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the data stream of a device.

    All epochs and loaders use the same one, as torch's caching allocator keeps separate memory for each stream.
    """
    return torch.cuda.Stream(device)


def _prefetched_on_cuda(batches: Iterator[Tensors], device: torch.device) -> Iterator[Tensors]:
    data_stream = stream_of(device)
    # The tensors that batches are made from may still be computed or copied on the model's stream.
    data_stream.wait_stream(torch.cuda.current_stream(device))

    def queue_next() -> Tensors | Exception | None:
        """Queue the next batch on the data stream; return it, the error that it raised, or None after the last one."""
        try:
            with torch.cuda.stream(data_stream):
                return next(batches, None)
        except Exception as exception:
            return exception  # raised when this batch is requested: after the steps of the batches before it

    upcoming = queue_next()
    while upcoming is not None and not isinstance(upcoming, Exception):
        model_stream = torch.cuda.current_stream(device)
        model_stream.wait_stream(data_stream)  # before the next batch is queued: the step must not wait for that one
        for tensor in upcoming:
            tensor.record_stream(
                model_stream
            )  # the allocator does not reuse its memory while the model's stream uses it
        batch, upcoming = upcoming, queue_next()
        yield batch
    if upcoming is not None:
        raise upcoming
