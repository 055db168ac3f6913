"""Parcels: one parcel sends one Python object with its tensors to other processes, without copying the tensors.

A parcel is an anonymous file in memory. The receiving processes map it, so all of them share the memory of the tensors.

    parcel   header | tensor | tensor | ... | pickle that has (offset, dtype, shape) instead of each tensor

The file is not in /dev/shm, which is small in many containers. Its size is limited only by the memory. (An image cache
is pickled as its path, see `data.sources.cache.Cache`; its pixels are not in the parcel.)
"""

import io
import math
import mmap
import os
import pickle
import struct
import sys
import tempfile
from io import FileIO
from typing import Any

import torch
from torch import Tensor

HEADER = struct.Struct("!QQ")  # offset and length of the pickle
ALIGNMENT = 64  # bytes, of each tensor: torch aligns its CPU tensors in the same way


class CannotPack(Exception):
    """An object cannot be pickled, as a whole or in a part."""


def pack(content: object) -> FileIO:
    """Return a parcel of an object, as an open file. The caller closes it.

    Raises CannotPack if a part of the object cannot be pickled.
    """
    file = file_in_memory("parcel")
    try:
        file.seek(ALIGNMENT)
        stream = io.BytesIO()
        try:
            _Packer(stream, file).dump(content)
        except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
            raise CannotPack(str(error)) from error
        start = file.tell()
        write(file, stream.getbuffer())
        file.seek(0)
        write(file, memoryview(HEADER.pack(start, stream.tell())))
    except BaseException:
        file.close()
        raise
    return file


def unpack(descriptor: int) -> Any:
    """Return the object in a parcel. The descriptor may be closed afterwards.

    The mapping is copy-on-write: a process that changes a tensor does not change it in other processes.
    """
    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    start, length = HEADER.unpack_from(content)
    return _Unpacker(io.BytesIO(content[start : start + length]), content).load()


def file_in_memory(name: str) -> FileIO:
    """Return an anonymous file. On Linux it is in memory, elsewhere it is a temporary file."""
    if sys.platform == "linux":
        return FileIO(os.memfd_create(name), "r+b")
    return tempfile.TemporaryFile(buffering=0)


def write(file: FileIO, content: memoryview) -> None:
    """Write all bytes. A system call may write only some of them, so it is repeated."""
    content = content.cast("B")
    while content:
        content = content[file.write(content) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in row-major order: its own memory if it is contiguous, else a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, file: FileIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.file = file
        self.written: dict[int, tuple[Tensor, object]] = {}  # by id; keeping the tensor prevents reuse of its id

    def persistent_id(self, content: object) -> object:
        """Write a tensor to the file and return (offset, dtype, shape); None for all that the pickle itself holds."""
        if type(content) is not Tensor or content.device.type != "cpu" or content.layout != torch.strided:
            return None
        if content.requires_grad or content.is_quantized:
            return None
        if id(content) not in self.written:
            offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
            if content.numel():
                self.file.seek(offset)
                write(self.file, bytes_of(content))
            self.written[id(content)] = content, (offset, content.dtype, tuple(content.shape))
        return self.written[id(content)][1]


class _Unpacker(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(stream)
        self.memory = memory

    def persistent_load(self, reference: Any) -> Tensor:
        """Return a tensor that uses the mapped memory, for (offset, dtype, shape)."""
        offset, dtype, shape = reference
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)
