"""MXFP4: e2m1 codes with one power-of-two (e8m0) scale per 32 consecutive inputs.

Two codes a byte along the input dimension, the low nibble first. Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the
sign. Values halfway between two codes go to the even code, as in IEEE rounding (architecture notes section 2 and 3.5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautile.quant.fp8 import power_of_two_at_least

__all__ = ["decode", "encode", "fake_quant"]

_LARGEST = 6.0
_GROUP = 32


def _scales(grouped: Tensor) -> Tensor:
    amax = grouped.abs().amax(-1, keepdim=True).float().clamp_min(_LARGEST * 2.0**-126)
    return power_of_two_at_least(amax / _LARGEST)


def _round(x: Tensor) -> Tensor:
    """Nearest e2m1 value of |x| <= 6, ties to the even code, sign kept: the step is 0.5 below 2, 1 below 4, 2 above."""
    size = x.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)


def _codes(rounded: Tensor) -> Tensor:
    size = rounded.abs()
    code = torch.where(size < 2.0, size * 2, torch.where(size < 4.0, size + 2, size / 2 + 4)).to(torch.uint8)
    return code | (torch.signbit(rounded).to(torch.uint8) << 3)


def encode(x: Tensor, group: int = _GROUP) -> tuple[Tensor, Tensor]:
    """float [..., i] -> (int8 [..., i / 2], float8_e8m0fnu [..., i / group])."""
    grouped = x.unflatten(-1, (-1, group)).float()
    scales = _scales(grouped)
    codes = _codes(_round(grouped / scales)).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), scales.squeeze(-1).to(torch.float8_e8m0fnu)


def decode(packed: Tensor, scales: Tensor) -> Tensor:
    """(int8 or uint8 [..., i / 2], float8_e8m0fnu [..., i / group]) -> float32 [..., i], exact."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=packed.device)
    table = torch.cat((table, -table))
    octets = packed.view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    values = table[codes.long()]
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)).flatten(-2)


def fake_quant(x: Tensor, group: int = _GROUP) -> Tensor:
    """x rounded to MXFP4 in groups of the last dimension; the gradient passes straight through."""
    with torch.no_grad():
        grouped = x.unflatten(-1, (-1, group)).float()
        scales = _scales(grouped)
        rounded = (_round(grouped / scales) * scales).flatten(-2).to(x.dtype)
    return x + (rounded - x).detach()
