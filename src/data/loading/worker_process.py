"""The loader worker: a process that prepares batches of one source until its socket is closed.

A reading is one pass over a list of batches. Each worker prepares every `stride`-th batch of it, from `first` on, and
writes them in turn to its slots, which are files in memory. Messages on the worker's socket:

    received   a reading: JSON {"first": 1, "stride": 3}, and the parcel (task, rows of all batches, their sizes)
    received   empty (SLOT_IS_FREE): the main process has copied the oldest batch, and its slot can be overwritten
    sent       a batch is in its slot: pickled (shape and dtype of each tensor, problems of single images)
    sent       a pickled exception, as the last message
"""

import json
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError, PreceptorError, is_out_of_memory
from core.server_process import receive_message, send_message
from data.loading.parcels import bytes_of, unpack, write
from data.sources.images import Problems

BatchTensors = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), labels (B,) or (B, K), rows (B,)
Fetch = Callable[[Any, Tensor], tuple[BatchTensors, Problems]]  # (task of the reading, rows of a batch (B,)) -> batch
SLOT_IS_FREE = b""  # message of the main process


def work(payload: bytes, descriptors: Sequence[int]) -> None:
    """Run a loader worker until the main process closes the socket. Errors are sent to the main process.

    payload:      JSON {"deterministic": bool}: torch's setting, which can change results
    descriptors:  the socket, the parcel of the `Fetch` function, and one file in memory per slot
    """
    socket_descriptor, source, *slots = descriptors
    connection = socket.socket(fileno=socket_descriptor)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(json.loads(payload)["deterministic"])
    files = [FileIO(slot, "r+b") for slot in slots]
    try:
        fetch: Fetch = _unpacked(source)
        while message := receive_message(connection):
            content, parcels = message
            if content != SLOT_IS_FREE:  # between readings, slots of the last reading may still be reported as free
                _read(connection, files, fetch, parcels[0], **json.loads(content))
    except PreceptorError as error:
        _send(connection, error)
    except ConnectionError:
        return  # the main process closed the socket or ended
    except Exception as error:
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        # OSError is sent unchanged: its report is the same with and without workers. Other messages get the traceback,
        # which pickling would lose.
        is_storage = isinstance(error, OSError)
        _send(connection, error if is_storage else kind(f"in a loader worker: {traceback.format_exc()}"))


def _read(
    connection: socket.socket, slots: Sequence[FileIO], fetch: Fetch, parcel: int, *, first: int, stride: int
) -> None:
    """Prepare every `stride`-th batch of a reading, from the batch `first` on.

    Raises ConnectionError if the main process closes the socket, and ConfigError if the parcel cannot be unpickled.
    """
    try:
        task, rows, sizes = _unpacked(parcel)
    except Exception as error:
        explanation = f"cannot be sent to loader workers: {type(error).__name__}: {error}; set data.num_workers=0"
        raise ConfigError("augment", explanation) from error
    for number, batch_rows in enumerate(rows.split(sizes)[first::stride]):
        if number >= len(slots) and receive_message(connection) is None:  # waits until a slot is free
            raise ConnectionError
        tensors, problems = fetch(task, batch_rows)
        slot = slots[number % len(slots)]
        slot.seek(0)
        for tensor in tensors:
            if tensor.numel():
                write(slot, bytes_of(tensor))
        _send(connection, ([(tuple(tensor.shape), tensor.dtype) for tensor in tensors], problems))


def _unpacked(descriptor: int) -> Any:
    """Return the object in a parcel, and close its descriptor."""
    try:
        return unpack(descriptor)
    finally:
        os.close(descriptor)


def _send(connection: socket.socket, content: object) -> None:
    send_message(connection, pickle.dumps(content))
