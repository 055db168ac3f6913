"""What a loader worker does: it makes the batches of one source, reading after reading, until its socket is closed.

socket   <- a reading: JSON {"first": 1, "stride": 3}, and the parcel (task, rows of all batches, their sizes)
         <- nothing: the oldest filled slot is free again
         -> a batch is in its slot: (shape and dtype of its tensors, problems of single images); or an error
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

Parts = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), labels (B,) or (B, K), rows (B,)
Fetch = Callable[[Any, Tensor], tuple[Parts, Problems]]  # of the reading's task and the rows of a batch
SLOT_IS_FREE = b""


def work(payload: bytes, descriptors: Sequence[int]) -> None:
    """Serve one loader.

    payload:      the settings of torch that the results depend on, as JSON
    descriptors:  the socket, the parcel of the `Fetch`, one file in memory for each slot
    """
    connection, source, *slots = descriptors
    pipe = socket.socket(fileno=connection)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(json.loads(payload)["deterministic"])
    files = [FileIO(slot, "r+b") for slot in slots]
    try:
        fetch: Fetch = _unpacked(source)
        while message := receive_message(pipe):
            content, parcels = message
            if content != SLOT_IS_FREE:  # else it is the last one's of the reading before
                _read(pipe, files, fetch, parcels[0], **json.loads(content))
    except PreceptorError as error:
        _send(pipe, error)
    except ConnectionError:
        return  # the loader is gone
    except Exception as error:  # its traceback would be lost on the way
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        is_storage = isinstance(error, OSError)  # sent as it is, to be reported as without workers
        _send(pipe, error if is_storage else kind(f"in a loader worker: {traceback.format_exc()}"))


def _read(pipe: socket.socket, slots: Sequence[FileIO], fetch: Fetch, parcel: int, *, first: int, stride: int) -> None:
    """Make each `stride`-th batch of a reading, from the batch `first` on."""
    try:
        task, rows, sizes = _unpacked(parcel)
    except Exception as error:
        explanation = f"cannot be sent to loader workers: {type(error).__name__}: {error}; set data.num_workers=0"
        raise ConfigError("augment", explanation) from error
    for turn, batch in enumerate(rows.split(sizes)[first::stride]):
        if turn >= len(slots) and receive_message(pipe) is None:
            raise ConnectionError
        parts, problems = fetch(task, batch)
        slot = slots[turn % len(slots)]
        slot.seek(0)
        for part in parts:
            if part.numel():
                write(slot, bytes_of(part))
        _send(pipe, ([(tuple(part.shape), part.dtype) for part in parts], problems))


def _unpacked(descriptor: int) -> Any:
    try:
        return unpack(descriptor)
    finally:
        os.close(descriptor)


def _send(pipe: socket.socket, content: object) -> None:
    send_message(pipe, pickle.dumps(content))
