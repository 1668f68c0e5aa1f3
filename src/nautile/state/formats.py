"""How a row of the state is laid out in memory: float32, bfloat16, or the packed rows of the official caches.

A packed key-value row is the FP8 payload of the dimensions that are not rotated, then the rotated ones in bfloat16, then
one power-of-two scale byte (e8m0) per 64 payload elements, padded to a multiple of 8 bytes: 448 + 128 + 8 = 584 bytes for
c = 512. A packed indexer key is two FP4 codes a byte, then one scale byte per 32 elements: 64 + 4 = 68 bytes for 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.quant import mxfp4
from nautile.quant.fp8 import decode_groups, encode_groups

__all__ = ["IndexFormat", "PlainFormat", "RowFormat", "RowName", "index_format", "index_row_bytes", "row_bytes", "row_format"]

RowName = Literal["float32", "bfloat16", "packed"]

_FP8_GROUP = 64  # elements of a packed row under one scale byte
_FP4_GROUP = 32
_SIZES = {"float32": 4, "bfloat16": 2}


def row_bytes(c: int, rotated: int, rows: RowName) -> int:
    """Bytes of one key-value row of ``c`` elements, the last ``rotated`` of them under RoPE."""
    if rows != "packed":
        return c * _SIZES[rows]
    plain = c - rotated
    scales = -(-plain // _FP8_GROUP)
    return plain + 2 * rotated + -(-scales // 8) * 8


def index_row_bytes(ci: int, rows: RowName) -> int:
    """Bytes of one indexer key of ``ci`` elements."""
    if rows != "packed":
        return ci * _SIZES[rows]
    return -(-ci // 2) + -(-ci // _FP4_GROUP)


@dataclass(frozen=True)
class PlainFormat:
    """Rows of ``width`` elements of one floating-point type."""

    dtype: torch.dtype
    width: int

    def encode(self, x: Tensor) -> Tensor:
        """float [..., width] -> stored [..., width]."""
        return x.to(self.dtype)

    def decode(self, stored: Tensor) -> Tensor:
        """stored [..., width] -> the same values, in the stored type."""
        return stored


@dataclass(frozen=True)
class RowFormat:
    """Packed key-value rows of c elements, ``rotated`` of them in bfloat16: ``width`` bytes each."""

    c: int
    rotated: int
    width: int
    dtype: torch.dtype = torch.uint8

    def encode(self, x: Tensor) -> Tensor:
        """float [..., c] -> uint8 [..., width]. Exact for what the model's FP8 rounding leaves, but for the rotated
        dimensions, which become bfloat16."""
        plain = self.c - self.rotated
        payload, scales = encode_groups(x[..., :plain], _FP8_GROUP)
        out = torch.zeros(*x.shape[:-1], self.width, dtype=torch.uint8, device=x.device)
        out[..., :plain] = payload.view(torch.uint8)
        out[..., plain : plain + 2 * self.rotated] = x[..., plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
        out[..., plain + 2 * self.rotated : plain + 2 * self.rotated + scales.shape[-1]] = scales.view(torch.uint8)
        return out

    def decode(self, stored: Tensor) -> Tensor:
        """uint8 [..., width] -> float32 [..., c], exact."""
        plain, end = self.c - self.rotated, self.c + self.rotated
        scales = stored[..., end : end + plain // _FP8_GROUP].contiguous().view(torch.float8_e8m0fnu)
        payload = stored[..., :plain].contiguous().view(torch.float8_e4m3fn)
        rotated = stored[..., plain:end].contiguous().view(torch.bfloat16).float()
        return torch.cat((decode_groups(payload, scales), rotated), dim=-1)


@dataclass(frozen=True)
class IndexFormat:
    """Packed indexer keys of ``ci`` elements: ``width`` bytes each."""

    ci: int
    width: int
    dtype: torch.dtype = torch.uint8

    def encode(self, x: Tensor) -> Tensor:
        """float [..., ci] -> uint8 [..., width]; exact for keys that are on the FP4 grid already."""
        codes, scales = mxfp4.encode(x)
        return torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=-1)

    def decode(self, stored: Tensor) -> Tensor:
        """uint8 [..., width] -> float32 [..., ci], exact."""
        half = self.ci // 2
        return mxfp4.decode(stored[..., :half].contiguous(), stored[..., half:].contiguous().view(torch.float8_e8m0fnu))


def row_format(config: ModelConfig, rows: RowName) -> PlainFormat | RowFormat:
    """The format of window rows and compressed entries. Raises ValueError where packed rows would change the answer."""
    c, rotated = config.head_dim, config.qk_rope_head_dim
    if rows != "packed":
        return PlainFormat(torch.float32 if rows == "float32" else torch.bfloat16, c)
    if not config.fake_quant_kv:
        raise ValueError('packed rows store what fake_quant_kv leaves, and this model has it off: use "float32" or "bfloat16"')
    return RowFormat(c, rotated, row_bytes(c, rotated, rows))


def index_format(config: ModelConfig, rows: RowName) -> PlainFormat | IndexFormat:
    """The format of indexer keys. Raises ValueError where packed keys would change the answer."""
    ci = config.index_head_dim
    if rows != "packed":
        return PlainFormat(torch.float32 if rows == "float32" else torch.bfloat16, ci)
    if not config.fake_quant_indexer:
        raise ValueError('packed keys store what fake_quant_indexer leaves: it is off here, use "float32" or "bfloat16"')
    return IndexFormat(ci, index_row_bytes(ci, rows))
