"""Checks of the arguments of augmentation steps; errors name the argument."""

import math
from collections.abc import Sequence

from core.errors import ConfigError


def require_within(name: str, value: float, low: float, high: float) -> float:
    """Return the value as a float. Raises ConfigError unless it is a number from low to high, both included."""
    if not _is_number(value) or not low <= value <= high:
        raise ConfigError(name, f"must be within {low} to {high}", value=value)
    return float(value)


def require_interval(name: str, value: Sequence[float], *, high: float = math.inf) -> tuple[float, float]:
    """Return [lowest, highest] as floats. Raises ConfigError unless 0 < lowest <= highest <= high."""
    condition = "0 < lowest <= highest" + ("" if high == math.inf else f" <= {high}")
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(_is_number(end) for end in value)
    if not is_pair or not 0 < value[0] <= value[1] <= high:
        raise ConfigError(name, f"must be [lowest, highest] with {condition}", value=value)
    return float(value[0]), float(value[1])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
