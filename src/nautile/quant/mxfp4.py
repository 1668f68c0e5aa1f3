"""MXFP4: e2m1 codes with one power-of-two (e8m0) scale per 32 consecutive inputs.

Two codes a byte along the input dimension, the low nibble first. Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the
sign. Values halfway between two codes go to the even code, as in IEEE rounding. Source: architecture notes, sections 2, 3.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.quant.scales import power_of_two_scale, straight_through

__all__ = ["decode", "encode", "fake_quant"]

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = 6.0
_FLOOR = 6.0 * 2.0**-126  # smallest amax of a group: its scale is the smallest normal float32
_GROUP = 32


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., i] -> (int8 [..., i / 2], float8_e8m0fnu [..., i / 32]). i is a multiple of 32.

    e2m1 has neither NaN nor infinity: callers check for them first.
    """
    grouped = _groups(x, _GROUP)
    scales = _scales(grouped)
    codes = _codes(_round(grouped / scales)).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), scales.squeeze(-1).to(torch.float8_e8m0fnu)


def decode(packed: Tensor, scales: Tensor) -> Tensor:
    """(int8 or uint8 [..., i / 2], float8_e8m0fnu [..., i / 32]) -> float32 [..., i], exact.

    Raises ValueError when the two shapes do not belong together.
    """
    expected = (*packed.shape[:-1], 2 * packed.shape[-1] // _GROUP)
    if tuple(scales.shape) != expected or 2 * packed.shape[-1] % _GROUP:
        raise ValueError(f"MXFP4 scales have shape {tuple(scales.shape)}; a payload of {tuple(packed.shape)} needs {expected}")
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # [256, 2]: what each byte stands for
    real = F.embedding(packed.view(torch.uint8).int(), pairs).flatten(-2)
    grouped = torch.unflatten(real, -1, (scales.shape[-1], _GROUP))
    return grouped.mul_(scales.float().unsqueeze(-1)).flatten(-2)


def fake_quant(x: Tensor, group: int = _GROUP) -> Tensor:
    """x rounded to MXFP4 in groups of the last dimension; the gradient passes straight through.

    Scale 2^ceil(log2(max(amax, 6 * 2^-126) / 6)). Raises ValueError when ``group`` does not divide the last dimension.
    """
    with torch.no_grad():
        grouped = _groups(x, group)
        scales = _scales(grouped)
        rounded = _round(grouped / scales).mul_(scales).flatten(-2).to(x.dtype)
    return straight_through(x, rounded)


def _groups(x: Tensor, group: int) -> Tensor:
    if x.shape[-1] % group:
        raise ValueError(f"MXFP4 groups of {group} do not divide a last dimension of {x.shape[-1]}")
    return torch.unflatten(x, -1, (x.shape[-1] // group, group)).float()


def _scales(grouped: Tensor) -> Tensor:
    return power_of_two_scale(grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR), _LARGEST)


def _round(x: Tensor) -> Tensor:
    """Nearest e2m1 value of |x| <= 6, ties to the even code, sign kept. The step is 0.5 below 2, 1 below 4, 2 above: half
    the power of two that the exponent bits spell, and never less than 0.5."""
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min_(1.0).mul_(0.5)
    return (x / step).round_().mul_(step)


def _codes(rounded: Tensor) -> Tensor:
    size = rounded.abs()
    code = torch.where(size < 2.0, size * 2, torch.where(size < 4.0, size + 2, size / 2 + 4)).to(torch.uint8)
    return code | (torch.signbit(rounded).to(torch.uint8) << 3)
