"""JSON: files with one object per line, such as the logs of a run, and values that JSON can store."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.regular_files import read_regular

LOGGER = logging.getLogger("preceptor.json_lines")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file.

    An incomplete last line is dropped. Other unreadable lines are logged and skipped.
    """
    lines: list[dict[str, Any]] = []
    texts = read_regular(path).decode(errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(texts):
            LOGGER.warning("%s: line %d is not a JSON object and is skipped", path, number)
    return lines


def without_nonfinite(node: Any) -> Any:
    """Return a value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(node, Mapping):
        return {key: without_nonfinite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_nonfinite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
