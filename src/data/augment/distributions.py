"""Random numbers of other kinds, made of uniform ones: a step of augmentation draws nothing itself.

    normal(u)           N(0, 1), by its quantile function: sqrt(2) erfinv(2u - 1)
    SymmetricBeta(a)(u) Beta(a, a), by a table of its quantile function
    per_pixel(u, n)     n whole numbers from one: a hash of u and of a pixel's position, so that a sample brings one
                        number along instead of one for each of its pixels

Uniform numbers are float32 in [0, 1), whole multiples of 2^-24, as torch.rand draws them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from core.errors import ConfigError


def normal(uniform: Tensor) -> Tensor:
    """Standard normal float32 numbers of the same shape: 5.4 at most, as a uniform number comes in steps of 2^-24."""
    # In the middle of a step, so that 0 does not become -inf. In double precision, so that no last bit of erfinv,
    # which may depend on where in its batch a number stands, survives the rounding to float32.
    return (math.sqrt(2) * torch.erfinv(2 * (uniform.double() + 2**-25) - 1)).float()


class SymmetricBeta:
    """Beta(a, a): near 0 or 1 for a small a, uniform for a = 1, near 1/2 for a large one.

    The distribution function up to x <= 1/2 is an integral with a pole at 0 for a < 1. With t = x^e, e = min(a, 1), it
    has none:

        integral of x^(a-1) (1 - x)^(a-1) dx  =  1/e integral of t^(a/e - 1) (1 - t^(1/e))^(a-1) dt

    It is summed up by trapezia, inverted on a grid of u, and between the grid's points the quantiles are linear
    (in u^(1/a) up to the first one).
    """

    intervals = 4096  # of the table, from u = 0 to 1/2; the other half is its mirror image

    def __init__(self, name: str, a: float) -> None:
        if isinstance(a, bool) or not isinstance(a, int | float) or not 0.01 <= a <= 100:
            raise ConfigError(name, "must be within 0.01 to 100", value=a)
        exponent = min(a, 1.0)
        grid = np.linspace(0, 0.5**exponent, 16 * self.intervals + 1)
        density = grid ** (a / exponent - 1) * (1 - grid ** (1 / exponent)) ** (a - 1)
        integral = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
        wanted = np.linspace(0, 0.5, self.intervals + 1)
        quantiles = np.interp(wanted, integral / integral[-1] / 2, grid) ** (1 / exponent)
        self.quantiles = torch.from_numpy(quantiles).float()
        self.exponent = 1 / a

    def __call__(self, uniform: Tensor) -> Tensor:
        """Uniform numbers to float32 ones in [0, 1], of the same shape."""
        self.quantiles = self.quantiles.to(uniform.device)  # and there it stays: copying waits for the device
        place = torch.minimum(uniform, 1 - uniform) * (2 * self.intervals)  # 0 to `intervals`
        below = place.long().clamp(max=self.intervals - 1)
        low, high = self.quantiles[below], self.quantiles[below + 1]
        share = place - below
        # At the end of the table u grows as x^a, so that a straight line would miss the tail of a large a.
        share = torch.where(below == 0, share.double().pow(self.exponent).float(), share)
        value = low + (high - low) * share
        return torch.where(uniform < 0.5, value, 1 - value)


def per_pixel(uniform: Tensor, count: int) -> Tensor:
    """Numbers (B,) to int32 (B, count), evenly spread over all of int32: different for each number and position."""
    position = torch.arange(count, dtype=torch.int32, device=uniform.device)
    return _mix(_mix((uniform * 2**24).to(torch.int32))[:, None] ^ position)


def _mix(bits: Tensor) -> Tensor:
    """A permutation of int32 in which every bit of the result depends on every bit of `bits` (which is overwritten).

    Multiplications wrap around, shifts bring in zeros. Source: C. Wellons, Prospecting for Hash Functions (2018).
    """
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 0x21F0AAAD
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x735A2D97
    bits ^= (bits >> 15) & 0x1FFFF
    return bits
