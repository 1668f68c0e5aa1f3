"""FP8: e4m3 payload with power-of-two (e8m0) scales, one per 128 x 128 tile of a weight or per group of an activation.

real = e4m3 * 2^k. Tiles at the edge are whatever is left (ceil division). Scales are 2^ceil(log2(amax / 448)), computed on
exponent bits so that no rounding of a logarithm can move them (architecture notes section 2 and 3.3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["decode_blocks", "encode_blocks", "fake_quant_blocks", "fake_quant_groups", "power_of_two_at_least"]

_LARGEST = 448.0  # of e4m3fn
_TILE = 128
_FLOOR = 1e-4  # smallest amax of an activation group (official code)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """Smallest power of two >= x, elementwise, for positive float32 x."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def _round(x: Tensor) -> Tensor:
    """Nearest e4m3 value, saturating."""
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def _tile_scales(weight: Tensor) -> Tensor:
    """One scale per tile, [ceil(o / 128), ceil(i / 128)]."""
    rows, columns = weight.shape
    padded = F.pad(weight.abs(), (0, -columns % _TILE, 0, -rows % _TILE))
    amax = padded.unflatten(0, (-1, _TILE)).unflatten(2, (-1, _TILE)).amax((1, 3)).float()
    return power_of_two_at_least((amax / _LARGEST).clamp_min(2.0**-126))


def _spread(scales: Tensor, shape: torch.Size) -> Tensor:
    wide = scales.repeat_interleave(_TILE, 0).repeat_interleave(_TILE, 1)
    return wide[: shape[0], : shape[1]]


def encode_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [o, i] -> (float8_e4m3fn [o, i], float8_e8m0fnu [ceil(o / 128), ceil(i / 128)])."""
    scales = _tile_scales(weight)
    payload = (weight.float() / _spread(scales, weight.shape)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return payload, scales.to(torch.float8_e8m0fnu)


def decode_blocks(payload: Tensor, scales: Tensor) -> Tensor:
    """(float8_e4m3fn [o, i], float8_e8m0fnu [ceil(o / 128), ceil(i / 128)]) -> float32 [o, i], exact."""
    expected = (-(-payload.shape[0] // _TILE), -(-payload.shape[1] // _TILE))
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales have shape {tuple(scales.shape)}; {tuple(payload.shape)} needs {expected}")
    return payload.float() * _spread(scales.float(), payload.shape)


def fake_quant_blocks(weight: Tensor) -> Tensor:
    """The weight rounded to its 128 x 128 grid; the gradient passes straight through."""
    with torch.no_grad():
        scales = _spread(_tile_scales(weight), weight.shape)
        rounded = _round(weight.float() / scales) * scales
    return weight + (rounded.to(weight.dtype) - weight).detach()


def fake_quant_groups(x: Tensor, group: int = 64) -> Tensor:
    """x rounded to e4m3 in groups of the last dimension, scale 2^ceil(log2(max(amax, 1e-4) / 448)); straight-through."""
    with torch.no_grad():
        grouped = x.unflatten(-1, (-1, group)).float()
        scales = power_of_two_at_least(grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR) / _LARGEST)
        rounded = (_round(grouped / scales) * scales).flatten(-2).to(x.dtype)
    return x + (rounded - x).detach()
