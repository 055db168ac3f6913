"""Files of one JSON object a line, as a run's logs are."""

import json
import logging
from pathlib import Path
from typing import Any

from core.regular_files import read_regular

LOGGER = logging.getLogger("preceptor.json_lines")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A torn last line, as a crash leaves it, is left out; any other is told."""
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
            LOGGER.warning("%s: line %d cannot be read and is left out", path, number)
    return lines
