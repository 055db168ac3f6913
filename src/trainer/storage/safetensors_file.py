"""The safetensors format: serialise tensors without a copy, and check the header of a file before it is read.

    8 bytes, the header's length | header, JSON: name -> dtype, shape, [begin, end) | the tensors' bytes

Format: github.com/huggingface/safetensors, README. `read_header` refuses all other content, in bounded time and memory.
So the library's parser gets only files whose tensors fill the file without gaps.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import CheckpointError, SecurityError

LARGEST_HEADER = 16 * 2**20  # bytes; the header of a checkpoint with 1,000 class names has tens of kilobytes
MOST_BRACKETS = 100_000  # three per tensor: 33,000 tensors, which take two seconds to read
GIT_LFS = b"version h"  # the start of a Git LFS pointer: "version https://git-lfs.github.com/spec/v1"
MOST_DIMENSIONS = 64  # as in torch
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def serialise(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file: the header, then the bytes of each tensor, the widest dtypes first.

    Contiguous tensors on the CPU are not copied. The library's writer copies all data twice, which takes as long as
    writing it to a disk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    memory: list[memoryview] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [offset, offset + len(flat)]
        memory.append(flat.numpy().data)
        offset += len(flat)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return [len(text).to_bytes(8, "little") + text, *memory]


def refuse_foreign_format(head: bytes, source: Path) -> None:
    """Raise an error unless `head`, the first 9 bytes of a file, can start a safetensors file: 8 bytes and JSON.

    Raises SecurityError for another format, as it may contain code; CheckpointError for a file that is too short or a
    Git LFS pointer.
    """
    if len(head) < 9:
        raise CheckpointError(str(source), f"not a safetensors file: it has {len(head)} bytes")
    if head.startswith(GIT_LFS):
        raise CheckpointError(str(source), "is a Git LFS pointer, not the file itself; get it with: git lfs pull")
    if head[8:9] != b"{":
        command = f"python scripts/convert.py input={source} output={source.with_suffix('.safetensors')}"
        explanation = "not safetensors; pickle, torch.save and zip files are not opened here, as they can run code."
        raise SecurityError(str(source), f"{explanation} To convert the weights: {command}")


def read_header(content: bytes, *, source: Path) -> dict[str, Any]:
    """Return the header of a file. Raises SecurityError for another format, CheckpointError for an invalid header."""
    refuse_foreign_format(content[:9], source)
    length = int.from_bytes(content[:8], "little")
    if length > min(LARGEST_HEADER, len(content) - 8):
        limit = f"must be at most {LARGEST_HEADER:,}, and within the file"
        raise CheckpointError(str(source), f"not a safetensors file: a header of {length:,} bytes {limit}")
    text = content[8 : 8 + length]
    try:
        if text.count(b"{") + text.count(b"[") > MOST_BRACKETS:
            raise ValueError("too many entries")
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
        _check_tensors(header, size=len(content) - 8 - length)
    except (ValueError, RecursionError) as exception:
        raise CheckpointError(str(source), f"not a safetensors file: {exception}") from None
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("its header has a duplicate key")
    return unique


def _check_tensors(header: dict[str, Any], *, size: int) -> None:
    """Raise ValueError unless the tensors fill `size` bytes without gaps, each as long as its shape and dtype need."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata must be text")
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name[:80]!r} must have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name[:80]!r} has an unknown dtype")
        if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name[:80]!r} must have a shape and two offsets of integers >= 0")
        if math.prod(max(1, side) for side in shape) * DTYPES[dtype].itemsize >= 2**63:
            raise ValueError(f"{name[:80]!r} has a shape that is too large")
        if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
            raise ValueError(f"{name[:80]!r} has a number of bytes that does not match its shape and dtype")
        ranges.append(offsets)
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,} of {size:,}")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
