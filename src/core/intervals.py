"""Statistics of results that need no torch."""

import math


def margin_of(accuracy: float, samples: int) -> float:
    """Return the half width of the 95% interval of an accuracy measured on N samples.

    It is 1.96 sqrt(p (1 - p) / N), the normal approximation of a binomial share, or 3 / N (rule of three) if all or no
    predictions are correct.
    """
    if accuracy in (0, 1):
        return min(1.0, 3 / samples)
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / samples)
