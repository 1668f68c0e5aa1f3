"""What the formats share: power-of-two scales and the straight-through gradient.

Scales are computed on exponent bits: no logarithm, no division, so no rounding can move a scale by one step.
2^ceil(log2(amax / L)) for the largest payload value L = (1 + f) 2^e is 2^(exponent(amax) - e), doubled when the mantissa of
amax exceeds 1 + f. All of it is integer arithmetic on the float32 bits, which eager, compiled and CUDA code do alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["power_of_two_scale", "straight_through"]

_MANTISSA_BITS = 23
_SMALLEST, _LARGEST = 1, 254  # biased exponents of normal float32 numbers; both are e8m0 codes as well


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two s with amax / s <= largest, elementwise: float32, same shape, within 2^-126 .. 2^127.

    Args: amax, float32 and not negative; largest, a positive number that float32 holds exactly.
    """
    fraction, exponent = math.frexp(largest)
    limit = int((2 * fraction - 1) * (1 << _MANTISSA_BITS))
    bits = amax.float().view(torch.int32)
    above = ((bits & ((1 << _MANTISSA_BITS) - 1)) > limit).to(torch.int32)
    biased = ((bits >> _MANTISSA_BITS) - (exponent - 1) + above).clamp(_SMALLEST, _LARGEST)
    return (biased << _MANTISSA_BITS).view(torch.float32)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of ``rounded`` with the gradient of ``x``: dL/dx = dL/dy.

    x + (q - x) is exactly q in floating point when q is zero or within a factor of two of x, which both formats guarantee
    (Sterbenz: the difference is then exact).
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return x + (rounded - x).detach()
    return rounded
