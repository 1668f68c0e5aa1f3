"""Queries on their way in and outputs on their way out: unit RMS and rotation, de-rotation, and the indexer's queries.

q_h <- rotate(q_h / rms(q_h)); o_h <- rotate(o_h by minus the angle); an indexer query is rotated, goes through a normalised
Hadamard transform and is rounded to FP4 in groups of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautile.kernels.decode import rows
from nautile.kernels.decode.chain import chain
from nautile.kernels.decode.rows import Angles
from nautile.quant import hadamard, mxfp4

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["index_queries", "turn_heads"]


def turn_heads(
    x: Tensor, angles: Angles, dtype: torch.dtype, *, eps: float | None = None, back: bool = False, chained: bool = False
) -> Tensor:
    """x [T, H, c] (rows of a token contiguous) -> the same shape in ``dtype``, rotated (``back``: by minus the angle), before
    that divided by its RMS when ``eps`` is given. ``chained``: see ``chain``."""
    if x.is_cuda:
        return launch_turn(x, angles, dtype, eps=eps, back=back, chained=chained)
    wide = x.float()
    if eps is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    sin = -angles.sin if back else angles.sin
    return rows._turned(wide, Angles(angles.cos.unsqueeze(1), sin.unsqueeze(1))).to(dtype)


def index_queries(
    q: Tensor, weights: Tensor, angles: Angles, signs: Tensor, dtype: torch.dtype, *, chained: bool = False
) -> tuple[Tensor, Tensor]:
    """q [T, H, ci] and head weights [T, H], float32 -> queries on the FP4 grid in ``dtype``, and the weights times
    (ci H)^-1/2, contiguous. ``signs`` float32 [ci, ci] of the Hadamard transform.
    ``chained``: see ``chain``."""
    if q.is_cuda:
        return launch_index(q, weights, angles, signs, dtype, chained=chained)
    turned = rows._turned(q, Angles(angles.cos.unsqueeze(1), angles.sin.unsqueeze(1)))
    grid = mxfp4.fake_quant(hadamard.transform(turned)).to(dtype)
    return grid, weights * (q.shape[2] ** -0.5 * q.shape[1] ** -0.5)


def launch_turn(
    x: Tensor, angles: Angles, dtype: torch.dtype, *, eps: float | None, back: bool, chained: bool = False
) -> Tensor:
    """The kernel; see ``turn_heads``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; on the CPU turn_heads is the same in plain PyTorch")
    tokens, heads, c = x.shape
    out = torch.empty(tokens, heads, c, dtype=dtype, device=x.device)
    block = 4 if heads % 4 == 0 else 1
    _turn_kernel[(heads // block, tokens)](
        x, x.stride(0), angles.cos, angles.sin, out, heads, 0.0 if eps is None else eps,
        C=c, ROTATED=2 * angles.cos.shape[1], BLOCK=block, NORM=eps is not None, BACK=back, num_warps=4,
        **chain(x, chained),
    )  # fmt: skip
    return out


def launch_index(
    q: Tensor, weights: Tensor, angles: Angles, signs: Tensor, dtype: torch.dtype, *, chained: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernel; see ``index_queries``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; on the CPU index_queries is the same in plain PyTorch")
    tokens, heads, ci = q.shape
    out = torch.empty(tokens, heads, ci, dtype=dtype, device=q.device)
    scaled = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    _index_kernel[(heads // 16, tokens)](
        q, q.stride(0), weights, weights.stride(0), angles.cos, angles.sin, signs, out, scaled, heads,
        ci**-0.5, ci**-0.5 * heads**-0.5, C=ci, ROTATED=2 * angles.cos.shape[1], num_warps=4,
        **chain(q, chained),
    )  # fmt: skip
    return out, scaled


if triton is not None:

    @triton.jit
    def _turned_heads(x, cos, sin, C: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr):
        """Rotate the last ROTATED of x [BLOCK, C]."""
        even, odd = tl.split(tl.reshape(x, (BLOCK, C // 2, 2)))
        angle = tl.arange(0, C // 2) - (C - ROTATED) // 2
        c = tl.load(cos + angle, mask=angle >= 0, other=1.0)[None, :]
        s = tl.load(sin + angle, mask=angle >= 0, other=0.0)[None, :]
        even, odd = rows.turn_pairs(even, odd, c, s)
        return tl.reshape(tl.join(even, odd), (BLOCK, C))

    @triton.jit
    def _turn_kernel(
        x, stride, cos, sin, out, heads, eps,
        C: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, BACK: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK heads of one token. Turning back is turning with the halves of a pair exchanged."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(1).to(tl.int64)
        head, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C)
        at = head[:, None] * C + column[None, :]
        value = tl.load(x + token * stride + at).to(tl.float32)
        if NORM:
            value = value * tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)[:, None]
        even, odd = tl.split(tl.reshape(value, (BLOCK, C // 2, 2)))
        angle = tl.arange(0, C // 2) - (C - ROTATED) // 2
        c = tl.load(cos + token * (ROTATED // 2) + angle, mask=angle >= 0, other=1.0)[None, :]
        s = tl.load(sin + token * (ROTATED // 2) + angle, mask=angle >= 0, other=0.0)[None, :]
        if BACK:
            s = -s
        even, odd = even * c - odd * s, even * s + odd * c
        value = tl.reshape(tl.join(even, odd), (BLOCK, C))
        tl.store(out + token * heads * C + at, value.to(out.dtype.element_ty))

    @triton.jit
    def _index_kernel(
        q, stride, weights, weight_stride, cos, sin, signs, out, scaled, heads, shrink, factor,
        C: tl.constexpr, ROTATED: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """16 heads of one token."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(1).to(tl.int64)
        head, column = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, C)
        at = head[:, None] * C + column[None, :]
        value = tl.load(q + token * stride + at)
        value = _turned_heads(value, cos + token * (ROTATED // 2), sin + token * (ROTATED // 2), C, ROTATED, 16)
        line = tl.arange(0, C)
        matrix = tl.load(signs + line[:, None] * C + line[None, :])
        value = tl.dot(value, matrix, input_precision="tf32x3") * shrink  # signs are exact, x keeps 22 bits
        groups = tl.reshape(value, (16 * C // 32, 32))
        exponent = rows.exponent_of(tl.maximum(tl.max(tl.abs(groups), axis=1), 7.052966104933725e-38), 4194304, 2)
        power = (exponent << 23).to(tl.float32, bitcast=True)[:, None]
        _, size = rows.to_e2m1(groups, power)
        value = tl.reshape(tl.where(groups < 0, -size, size) * power, (16, C))
        tl.store(out + token * heads * C + at, value.to(out.dtype.element_ty))
        weight = tl.load(weights + token * weight_stride + head)
        tl.store(scaled + token * heads + head, weight * factor)
