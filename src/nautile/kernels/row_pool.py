"""Rows of keys (which are values too) that lie anywhere in one allocation: what the attention kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowPool"]

_GROUP = 64  # FP8 elements under one scale


@dataclass(frozen=True)
class RowPool:
    """Rows that lie anywhere in one allocation, ``stride`` elements of ``data`` apart; row i begins at ``data[i * stride]``.

    ``data``: 1-D (or contiguous) uint8 for packed rows, else float32 or bfloat16. ``width`` is the elements of a row that
    count, ``c`` the key dimensions, the last ``rotated`` of them in bfloat16 when packed.
    """

    data: Tensor
    stride: int
    c: int
    rotated: int

    @property
    def packed(self) -> bool:
        """Whether rows are FP8 and bfloat16 with scales."""
        return self.data.dtype == torch.uint8

    def rows(self, ids: Tensor) -> Tensor:
        """The rows ids [...] as float32 [..., c], exact. Negative ids give row 0 (callers mask them)."""
        at = ids.clamp_min(0).long().unsqueeze(-1) * self.stride
        flat = self.data.flatten()
        if not self.packed:
            return flat[at + torch.arange(self.c, device=flat.device)].float()
        plain = self.c - self.rotated
        payload = flat[at + torch.arange(plain, device=flat.device)].view(torch.float8_e4m3fn).float()
        turned = flat[at + plain + torch.arange(2 * self.rotated, device=flat.device)].view(torch.bfloat16).float()
        scale = flat[at + plain + 2 * self.rotated + torch.arange(plain // _GROUP, device=flat.device)]
        power = torch.exp2(scale.float() - 127).repeat_interleave(_GROUP, -1)
        return torch.cat((payload * power, turned), dim=-1)
