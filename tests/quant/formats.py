"""The two payload formats a second time, as tables of every code: nothing here comes from ``src/nautile`` or from torch."""

from __future__ import annotations

import math

import numpy as np


def e4m3_value(code: int) -> float:
    """OCP e4m3 "fn": 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, 0x7f and 0xff are NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e2m1_value(code: int) -> float:
    """OCP e2m1: 1 sign, 2 exponent (bias 1), 1 mantissa bit."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e8m0_value(code: int) -> float:
    """2^(code - 127); 255 is NaN."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


E4M3 = np.array([e4m3_value(code) for code in range(256)])
E2M1 = np.array([e2m1_value(code) for code in range(16)])


def nearest_code(table: np.ndarray, x: float) -> int:
    """Code of the positive table entry nearest to |x|, halfway to the even code; the sign bit is left to the caller."""
    codes = [code for code in range(len(table) // 2) if not math.isnan(table[code])]
    return min(codes, key=lambda code: (abs(table[code] - abs(x)), code & 1))


def ceil_power(amax: float, largest: float, floor: float) -> float:
    """2^ceil(log2(max(amax, floor) / largest)) by search, in exact arithmetic on powers of two."""
    scale = 2.0**-126
    while scale * largest < max(amax, floor):
        scale *= 2
    return scale
