"""FP8: e4m3 payload with power-of-two (e8m0) scales, one per 128 x 128 tile of a weight or per group of an activation.

real = e4m3 * 2^k with 2^k = 2^ceil(log2(amax / 448)), so the largest element of a tile lands in 224 .. 448 and nothing
saturates. Tiles at the edge are whatever is left (ceil division). Source: architecture notes, sections 2 and 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.quant.scales import power_of_two_scale, straight_through

__all__ = ["decode_blocks", "decode_groups", "encode_blocks", "encode_groups", "fake_quant_blocks", "fake_quant_groups"]

_LARGEST = 448.0  # of e4m3fn
_TILE = 128
_FLOOR = 1e-4  # smallest amax of an activation group (official code)


def encode_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [o, i] -> (float8_e4m3fn [o, i], float8_e8m0fnu [ceil(o / 128), ceil(i / 128)]).

    Payloads round to nearest, ties to even. NaN stays NaN; infinities saturate, so callers check for them first.
    """
    tiles = _tiles(weight)
    scales = _tile_scales(tiles)
    payload = _saturate(tiles / scales).to(torch.float8_e4m3fn)
    return _untile(payload, weight.shape), scales[:, 0, :, 0].to(torch.float8_e8m0fnu)


def decode_blocks(payload: Tensor, scales: Tensor) -> Tensor:
    """(float8_e4m3fn [o, i], float8_e8m0fnu [ceil(o / 128), ceil(i / 128)]) -> float32 [o, i], exact.

    Raises ValueError when the two shapes do not belong together. Needs one float32 matrix of the result's size, no more.
    """
    rows, columns = payload.shape
    expected = (-(-rows // _TILE), -(-columns // _TILE))
    if tuple(scales.shape) != expected:
        raise ValueError(f"FP8 scales have shape {tuple(scales.shape)}; a weight of {rows} x {columns} needs {expected}")
    real = payload.float()
    wide = scales.float().repeat_interleave(_TILE, 1)[:, :columns]
    for index, factor in enumerate(wide):
        real[index * _TILE : (index + 1) * _TILE] *= factor
    return real


def fake_quant_blocks(weight: Tensor) -> Tensor:
    """The weight [o, i] rounded to its 128 x 128 grid; the gradient passes straight through."""
    with torch.no_grad():
        tiles = _tiles(weight)
        scales = _tile_scales(tiles)
        rounded = _untile(_round(tiles / scales).mul_(scales), weight.shape).to(weight.dtype)
    return straight_through(weight, rounded)


def encode_groups(x: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """float [..., i] -> (float8_e4m3fn [..., i], float8_e8m0fnu [..., i / group]): what ``fake_quant_groups`` rounds to.

    Raises ValueError when ``group`` does not divide the last dimension.
    """
    if x.shape[-1] % group:
        raise ValueError(f"FP8 groups of {group} do not divide a last dimension of {x.shape[-1]}")
    grouped = torch.unflatten(x, -1, (x.shape[-1] // group, group)).float()
    scales = power_of_two_scale(grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR), _LARGEST)
    payload = _saturate(grouped / scales).to(torch.float8_e4m3fn).flatten(-2)
    return payload, scales.squeeze(-1).to(torch.float8_e8m0fnu)


def decode_groups(payload: Tensor, scales: Tensor) -> Tensor:
    """(float8_e4m3fn [..., i], float8_e8m0fnu [..., groups]) -> float32 [..., i], exact."""
    grouped = torch.unflatten(payload.float(), -1, (scales.shape[-1], payload.shape[-1] // scales.shape[-1]))
    return grouped.mul_(scales.float().unsqueeze(-1)).flatten(-2)


def fake_quant_groups(x: Tensor, group: int = 64) -> Tensor:
    """x rounded to e4m3 in groups of the last dimension, scale 2^ceil(log2(max(amax, 1e-4) / 448)); straight-through.

    Raises ValueError when ``group`` does not divide the last dimension.
    """
    if x.shape[-1] % group:
        raise ValueError(f"FP8 groups of {group} do not divide a last dimension of {x.shape[-1]}")
    with torch.no_grad():
        grouped = torch.unflatten(x, -1, (x.shape[-1] // group, group)).float()
        scales = power_of_two_scale(grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR), _LARGEST)
        rounded = _round(grouped / scales).mul_(scales).flatten(-2).to(x.dtype)
    return straight_through(x, rounded)


def _saturate(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST)


def _round(x: Tensor) -> Tensor:
    """Nearest e4m3 value, ties to even, as float32."""
    return _saturate(x).to(torch.float8_e4m3fn).float()


def _tiles(weight: Tensor) -> Tensor:
    """[o, i] -> float32 [ceil(o / 128), 128, ceil(i / 128), 128], edge tiles filled with zeros."""
    rows, columns = weight.shape
    wide = weight.float()
    if rows % _TILE or columns % _TILE:
        wide = F.pad(wide, (0, -columns % _TILE, 0, -rows % _TILE))
    return torch.unflatten(torch.unflatten(wide, 1, (-1, _TILE)), 0, (-1, _TILE))


def _tile_scales(tiles: Tensor) -> Tensor:
    """One scale per tile, [R, 1, C, 1]."""
    return power_of_two_scale(tiles.abs().amax((1, 3), keepdim=True), _LARGEST)


def _untile(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]
