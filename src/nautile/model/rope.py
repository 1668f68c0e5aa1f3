"""Rotary positions: interleaved pairs in the LAST ``qk_rope_head_dim`` dimensions, two bases, YaRN by parts.

Window-only layers turn with base 10,000 and no YaRN; everything inside a layer with a compressor (queries, window keys,
compressed entries, indexer, output de-rotation) turns with base 160,000 and YaRN. V4 has no magnitude correction: cosines
and sines keep amplitude one and the softmax scale stays c^-1/2 (tech report section 2.3; architecture notes 3.2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.config import ModelConfig, RopeScaling

__all__ = ["Rotation", "inverse_frequencies", "rotate", "rotation"]


@dataclass(frozen=True)
class Rotation:
    """cos and sin of some positions: each [..., rope_dim / 2], float32."""

    cos: Tensor
    sin: Tensor

    @functools.cached_property
    def phase(self) -> Tensor:
        """cos + i sin."""
        return torch.complex(self.cos, self.sin)

    def inverse(self) -> Rotation:
        """The rotation by minus the angle, used to de-rotate attention outputs."""
        return Rotation(self.cos, -self.sin)


def inverse_frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    """Angle per position of each pair, [rope_dim / 2] float32.

    theta_i = base^(-2i/r); with YaRN, theta'_i = theta_i (1 - ramp_i) + (theta_i / factor) ramp_i, where ramp rises from 0
    to 1 between the pairs that turn ``beta_fast`` and ``beta_slow`` times within the original context.
    """
    dim = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    theta = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if compressed and config.rope_scaling is not None:
        ramp = _yarn_ramp(config.rope_scaling, base, dim)
        theta = theta * (1 - ramp) + theta / config.rope_scaling.factor * ramp
    return theta.float()


def _yarn_ramp(scaling: RopeScaling, base: float, dim: int) -> Tensor:
    def pair_with_turns(turns: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), dim - 1)
    span = max(high - low, 1e-3)  # a tiny dimension can make both ends meet
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)


def rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """The rotation at integer ``positions`` [...]: angles are float32 products, as in the official code."""
    angles = positions.to(frequencies.dtype).unsqueeze(-1) * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last dimensions of x [..., c]; ``turn`` broadcasts over [..., rope_dim / 2]."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32:
        return _rotate_complex(x, turn)
    dim = 2 * turn.cos.shape[-1]
    plain, turned = x[..., :-dim], x[..., -dim:].unflatten(-1, (-1, 2))
    even, odd = turned.unbind(-1)
    pairs = torch.stack((even * turn.cos - odd * turn.sin, even * turn.sin + odd * turn.cos), dim=-1)
    return torch.cat((plain, pairs.flatten(-2).to(x.dtype)), dim=-1)


def _rotate_complex(x: Tensor, turn: Rotation) -> Tensor:
    """The same as one complex product: a third of the operations, which is what a decode step on a CPU spends its time on."""
    dim = 2 * turn.cos.shape[-1]
    out = x.contiguous().clone()
    pairs = torch.view_as_complex(out[..., -dim:].unflatten(-1, (-1, 2)))
    pairs.mul_(turn.phase)
    return out
