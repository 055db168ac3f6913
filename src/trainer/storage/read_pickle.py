"""Convert a pickle file with tensors (.pth, .pt) to a safetensors file; this script runs in a separate process.

    python -P read_pickle.py INPUT OUTPUT

A pickle file can run code when it is loaded. `torch.load(weights_only=True)` refuses everything but tensors and plain
containers; a fault in it could harm this process only. This file imports nothing of Preceptor. It prints one line of
JSON: {"tensors": count, "from": key or null, "skipped": [names]}, or {"error": text}.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Keys under which other trainers save the state dict; the first key whose value has tensors is used.
STATE_DICTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module", "params", "weights", "ema")


def state_dict_of(content: Any) -> tuple[Mapping[str, Any], str | None]:
    """Return the state dict in the content of a file, and its key (None if the content is the state dict).

    Raises TypeError if the content is not a mapping.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"contains {type(content).__name__}, not a mapping of names to tensors")
    for key in STATE_DICTS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner, key
    return content, None


def main(source: str, target: str) -> dict[str, Any]:
    """Convert the file `source` to `target`, and return the report to print; no error is raised."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        weights, key = state_dict_of(content)
        tensors = {
            str(name): value.detach().clone().contiguous()  # safetensors refuses tensors that share memory
            for name, value in weights.items()
            if isinstance(value, Tensor)
        }
        if not tensors:
            raise TypeError("contains no tensors")
        save_file(tensors, target)
    except Exception as exception:  # a damaged file can raise any error of pickle, zip and torch
        return {"error": f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"}
    return {
        "tensors": len(tensors),
        "from": key,
        "skipped": [str(name) for name in weights if str(name) not in tensors],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
