"""Read the tensors of a pickle file (.pth, .pt) and write them to a safetensors file; run in a process of its own.

    python -P read_pickle.py INPUT OUTPUT

A pickle file can execute code when it is loaded. `torch.load(weights_only=True)` refuses everything but tensors and
plain containers, and a fault in it could harm this process only. This file imports nothing of Preceptor. It prints one
line of JSON, {"tensors": number, "from": key or null, "skipped": [names]}, or {"error": text}.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Keys under which other trainers save the state dict; the first one that is present is used.
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module", "params", "weights", "ema")


def state_dict_of(content: Any) -> tuple[Mapping[str, Any], str | None]:
    """Return the mapping of names to tensors in the content of a file, and the key that holds it."""
    if not isinstance(content, Mapping):
        raise TypeError(f"holds {type(content).__name__}, not a mapping of names to tensors")
    for key in STATE_DICTS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner, key
    return content, None


def main(source: str, target: str) -> dict[str, Any]:
    """Convert a file and return the report."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        weights, key = state_dict_of(content)
        tensors = {
            str(name): value.detach().clone().contiguous()  # copies: tensors of one file may share memory
            for name, value in weights.items()
            if isinstance(value, Tensor)
        }
        if not tensors:
            raise TypeError("holds no tensors")
        save_file(tensors, target)
    except Exception as exception:  # pickle, zip and torch raise any of them for a damaged file
        return {"error": f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"}
    return {
        "tensors": len(tensors),
        "from": key,
        "skipped": [str(name) for name in weights if str(name) not in tensors],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
