"""Hand an object to other processes through one file in memory, which they map: its tensors are shared, not copied.

    parcel   header | tensor | tensor | ... | pickle, with (offset, dtype, shape) in place of each tensor

The file has no name, and is not in /dev/shm, which is small in many containers: only the memory bounds it. (Pixels in
an image cache are not copied: `data.sources.cache.Cache` pickles as its path.)
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
ALIGNMENT = 64  # bytes: of the tensors, as torch aligns its own


class CannotPack(Exception):
    """A part of the content cannot be pickled."""


def pack(content: object) -> FileIO:
    """Write a parcel; CannotPack if a part of the content cannot be pickled."""
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
    """Return the content of a parcel. The mapping is private: a change of a tensor changes a copy."""
    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    start, length = HEADER.unpack_from(content)
    return _Unpacker(io.BytesIO(content[start : start + length]), content).load()


def file_in_memory(name: str) -> FileIO:
    """Return a file without a path, bounded by the memory alone."""
    if sys.platform == "linux":
        return FileIO(os.memfd_create(name), "r+b")
    return tempfile.TemporaryFile(buffering=0)


def write(file: FileIO, content: memoryview) -> None:
    """Write all of it, however much the system takes at once."""
    content = content.cast("B")
    while content:
        content = content[file.write(content) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """The content of a tensor on the CPU, as bytes in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, file: FileIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.file = file
        self.written: dict[int, tuple[Tensor, object]] = {}  # by id; the tensor is kept, so that its id stays its own

    def persistent_id(self, content: object) -> object:
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

    def persistent_load(self, place: Any) -> Tensor:
        offset, dtype, shape = place
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)
