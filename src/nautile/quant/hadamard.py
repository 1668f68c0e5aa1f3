"""The normalised Walsh-Hadamard transform in Sylvester order: an orthogonal rotation that spreads outliers before FP4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["transform"]


def transform(x: Tensor) -> Tensor:
    """H x / sqrt(n) over the last dimension n, a power of two. Its own inverse. Raises ValueError for other sizes."""
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {n}")
    shape, out = x.shape, x
    half = 1
    while half < n:
        pairs = out.reshape(*shape[:-1], n // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        out = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    return out.reshape(shape) * (1.0 / math.sqrt(n))
