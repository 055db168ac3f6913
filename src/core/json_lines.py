"""Files with one JSON object per line, such as the logs of a run."""

import json
import logging
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
