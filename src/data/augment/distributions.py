"""Random values of other distributions, computed from uniform ones: augmentation steps draw nothing themselves.

    normal(u)           N(0, 1), by its quantile function: sqrt(2) erfinv(2u - 1)
    SymmetricBeta(a)(u) Beta(a, a), by a table of its quantile function
    per_pixel(u, n)     n integers: a hash of u and of a pixel's position, so that a sample needs one random value
                        instead of one per pixel

Uniform values are float32 in [0, 1), integer multiples of 2^-24, as torch.rand draws them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError
from data.device import widest_float


def normal(uniform: Tensor) -> Tensor:
    """Return standard normal float32 values of the same shape: at most 5.4, as uniform values have steps of 2^-24."""
    # Adding half a step keeps 0 from becoming -inf. The last bits of erfinv may depend on a value's position in its
    # batch: in double precision, they are lost in the rounding to float32.
    wide = uniform.to(widest_float(uniform.device))
    return (math.sqrt(2) * torch.erfinv((2 * wide - 1) + 2**-24)).float()


class SymmetricBeta:
    """Quantile function of Beta(a, a): values near 0 or 1 for a small a, uniform for a = 1, near 1/2 for a large a.

    The distribution function for x <= 1/2 is an integral with a pole at 0 if a < 1. Substituting t = x^e,
    e = min(a, 1), removes the pole:

        integral of x^(a-1) (1 - x)^(a-1) dx  =  1/e integral of t^(a/e - 1) (1 - t^(1/e))^(a-1) dt

    It is computed by the trapezoidal rule and inverted on a grid of u. Between the grid's points the quantiles are
    interpolated linearly in u; up to the first point, linearly in u^(1/a).
    """

    intervals = 4096  # of the table, from u = 0 to 1/2; the other half is its mirror image

    def __init__(self, name: str, a: float) -> None:
        if isinstance(a, bool) or not isinstance(a, int | float) or not 0.01 <= a <= 100:
            raise ConfigError(name, "must be within 0.01 to 100", value=a)
        exponent = min(a, 1.0)
        grid = np.linspace(0, 0.5**exponent, 16 * self.intervals + 1)
        density = grid ** (a / exponent - 1) * (1 - grid ** (1 / exponent)) ** (a - 1)
        integral = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
        probabilities = np.linspace(0, 0.5, self.intervals + 1)
        quantiles = np.interp(probabilities, integral / integral[-1] / 2, grid) ** (1 / exponent)
        self.quantiles = torch.from_numpy(quantiles).float()
        self.exponent = 1 / a

    def __call__(self, uniform: Tensor) -> Tensor:
        """Return float32 values in [0, 1] for uniform values, of the same shape."""
        self.quantiles = self.quantiles.to(uniform.device)  # copied once: each copy would wait for the device
        position = torch.minimum(uniform, 1 - uniform) * (2 * self.intervals)  # 0 to `intervals`
        below = position.long().clamp(max=self.intervals - 1)
        low, high = self.quantiles[below], self.quantiles[below + 1]
        fraction = position - below
        # In the first interval u grows as x^a: linear interpolation would miss the tail of a large a.
        wide = fraction.to(widest_float(fraction.device))
        fraction = torch.where(below == 0, wide.pow(self.exponent).float(), fraction)
        value = low + (high - low) * fraction
        return torch.where(uniform < 0.5, value, 1 - value)


def per_pixel(uniform: Tensor, count: int) -> Tensor:
    """Return int32 (B, count) for uniform values (B,): evenly distributed over int32, by hashing value and position."""
    position = torch.arange(count, dtype=torch.int32, device=uniform.device)
    return _mix(_mix((uniform * 2**24).to(torch.int32))[:, None] ^ position)


def _mix(bits: Tensor) -> Tensor:
    """Apply a permutation of the int32 range, in place: every bit of the result depends on every bit of `bits`.

    Multiplications wrap around, shifts fill with zeros. Source: C. Wellons, Prospecting for Hash Functions (2018).
    """
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x21F0AAAD
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x735A2D97
    bits ^= (bits >> 15) & 0x1FFFF
    return bits
