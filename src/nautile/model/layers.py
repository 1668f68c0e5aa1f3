"""The three small layers everything is made of: RMSNorm, Linear, and the block-diagonal linear of the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.quant import fp8

__all__ = ["GroupedLinear", "Linear", "RMSNorm", "unit_rms"]


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in at least float32 and cast back."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), shapes [..., dim]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        if x.dtype == self.weight.dtype and not x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return (unit_rms(x, self.eps) * self.weight).to(x.dtype)


class Linear(nn.Module):
    """y = W x without bias. ``qat`` makes the weight pass through its FP8 128x128 grid with a straight-through gradient."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.qat = False

    def effective_weight(self) -> Tensor:
        """The weight that multiplies: as stored, or on the FP8 grid while quantisation-aware training is on."""
        return fp8.fake_quant_blocks(self.weight) if self.qat else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.effective_weight())


class GroupedLinear(Linear):
    """g independent linears on g contiguous slices: weight [g * r, k / g], input [..., k], output [..., g * r].

    This is ``wo_a``: heads are split in g groups and each group is projected to r dimensions on its own, so the output
    projection costs H c r + g r d instead of H c d multiplications.
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__(inputs // groups, outputs)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] -> [..., g * r]."""
        weight = self.effective_weight().unflatten(0, (self.groups, -1))
        slices = x.reshape(-1, self.groups, weight.shape[-1]).transpose(0, 1)
        return torch.bmm(slices, weight.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], -1)
