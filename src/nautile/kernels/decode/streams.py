"""Reading a sublayer's input from the residual streams and writing its output back (mHC), for a few tokens.

``mix``: z = (F v) / rms(v), pre = sigmoid(s0 z + b) + eps, post = 2 sigmoid(s1 z + b), M = Sinkhorn(s2 z + b), and the
sublayer's normalised input w x / rms(x) with x = sum_j pre_j X_j. ``join``: X'_k = post_k y + sum_j M_jk X_j, where y is the
sum of up to four parts. ``model/mhc.py`` has the formulas for any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.kernels.decode.chain import chain
from nautile.kernels.sinkhorn import sinkhorn_reference

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["Site", "collapse", "join", "join_reference", "mix", "mix_reference"]

_CHUNK = 512  # inputs of z that one program sums
_FEW = 64  # tokens, each of which may read all of fn


@dataclass(frozen=True)
class Site:
    """What one site owns: fn float32 [(2 + n) n, n d], base [(2 + n) n], scale [3], norm [d]; and the network's constants."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor
    iterations: int
    eps: float
    norm_eps: float


def mix_reference(streams: Tensor, site: Site, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning: streams float32 [T, n, d] -> (x [T, d] in ``dtype``, post [T, n], M [T, n, n]; M[j, k]: j to k)."""
    n = streams.shape[1]
    v = streams.flatten(1)
    z = F.linear(v, site.fn) * torch.rsqrt(v.square().mean(-1, keepdim=True) + site.norm_eps)
    pre = torch.sigmoid(site.scale[0] * z[:, :n] + site.base[:n]) + site.eps
    post = 2 * torch.sigmoid(site.scale[1] * z[:, n : 2 * n] + site.base[n : 2 * n])
    logits = (site.scale[2] * z[:, 2 * n :] + site.base[2 * n :]).unflatten(-1, (n, n))
    matrix = sinkhorn_reference(logits, site.iterations, site.eps)
    x = (pre.unsqueeze(-1) * streams).sum(1)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + site.norm_eps) * site.norm
    return x.to(dtype), post, matrix


def join_reference(streams: Tensor, parts: tuple[Tensor, ...], post: Tensor, matrix: Tensor) -> Tensor:
    """The meaning: streams [T, n, d], parts of y each [T, d] -> the new streams [T, n, d]."""
    y = sum(part.float() for part in parts)
    return post.unsqueeze(-1) * torch.as_tensor(y).unsqueeze(1) + torch.matmul(matrix.transpose(1, 2), streams)


def collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, eps: tuple[float, float]) -> Tensor:
    """The final collapse and norm: h = sum_j (sigmoid(scale z_j + base_j) + eps[0]) X_j -> normalised [T, d]; once a step."""
    v = streams.flatten(1)
    z = F.linear(v, fn) * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps[1])
    h = ((torch.sigmoid(scale * z + base) + eps[0]).unsqueeze(-1) * streams).sum(1)
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps[1]) * norm


def mix(streams: Tensor, site: Site, dtype: torch.dtype, *, chained: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """``mix_reference``; on a GPU in two Triton kernels (four streams). ``chained``: see ``chain``."""
    if not streams.is_cuda:
        return mix_reference(streams, site, dtype)
    return launch_mix(streams, site, dtype, chained=chained)


def join(streams: Tensor, parts: tuple[Tensor, ...], post: Tensor, matrix: Tensor, *, chained: bool = False) -> Tensor:
    """``join_reference``; on a GPU in one Triton kernel (four streams, one to four float32 parts)."""
    if not streams.is_cuda:
        return join_reference(streams, parts, post, matrix)
    return launch_join(streams, parts, post, matrix, chained=chained)


def launch_mix(streams: Tensor, site: Site, dtype: torch.dtype, *, chained: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels. Raises ValueError for other than four streams or d no multiple of 128, RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; mix_reference is the same in plain PyTorch")
    tokens, n, d = streams.shape
    if n != 4 or d % 128:
        raise ValueError(f"four streams of a multiple of 128, got {n} of {d}")
    options = chain(streams, chained)
    if tokens > _FEW:
        partial, chunks = _products(streams.flatten(1), site.fn), 1
    else:
        chunk = _CHUNK if n * d % _CHUNK == 0 else 128
        chunks = n * d // chunk
        partial = torch.empty(tokens, chunks, 32, dtype=torch.float32, device=streams.device)
        _partial_kernel[(chunks, tokens)](streams, site.fn, partial, n * d, chunks, CHUNK=chunk, num_warps=4, **options)
    lanes = max(2, triton.next_power_of_2(chunks))
    x = torch.empty(tokens, d, dtype=dtype, device=streams.device)
    post = torch.empty(tokens, n, dtype=torch.float32, device=streams.device)
    matrix = torch.empty(tokens, n, n, dtype=torch.float32, device=streams.device)
    _mix_kernel[(tokens,)](
        streams, partial, site.base, site.scale, site.norm, x, post, matrix, chunks, site.eps, site.norm_eps,
        D=d, BLOCK_D=triton.next_power_of_2(d), CHUNKS=lanes, STEPS=site.iterations - 1, num_warps=8,
        **options,
    )  # fmt: skip
    return x, post, matrix


def _products(v: Tensor, fn: Tensor) -> Tensor:
    """v [T, n d] -> [T, 1, 32]: the 24 products, then v's sum of squares; for many tokens, which would each read ``fn``."""
    out = torch.zeros(v.shape[0], 1, 32, dtype=torch.float32, device=v.device)
    out[:, 0, : fn.shape[0]] = F.linear(v, fn)
    out[:, 0, fn.shape[0]] = v.square().sum(-1)
    return out


def launch_join(streams: Tensor, parts: tuple[Tensor, ...], post: Tensor, matrix: Tensor, *, chained: bool = False) -> Tensor:
    """The kernel; see ``join``."""
    if triton is None:
        raise RuntimeError("this needs Triton; join_reference is the same in plain PyTorch")
    tokens, n, d = streams.shape
    if n != 4 or not 1 <= len(parts) <= 4 or any(part.dtype != torch.float32 for part in parts):
        raise ValueError("four streams and one to four float32 parts")
    out = torch.empty_like(streams)
    block = 512 if d % 512 == 0 else 128
    one, two, three, four = (*parts, *(parts[:1] * 3))[:4]
    _join_kernel[(triton.cdiv(d, block), tokens)](
        streams,
        one,
        two,
        three,
        four,
        post,
        matrix,
        out,
        d,
        PARTS=len(parts),
        BLOCK=block,
        num_warps=4,
        **chain(streams, chained),
    )
    return out


if triton is not None:

    @triton.jit
    def _partial_kernel(streams, fn, partial, width, chunks, CHUNK: tl.constexpr, PDL: tl.constexpr):
        """CHUNK elements of v: their share of the 24 products, and of the sum of squares (column 24)."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        chunk, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
        row, column = tl.arange(0, 32), tl.arange(0, 128)
        total = tl.zeros((32,), tl.float32)
        for start in range(0, CHUNK, 128):
            at = chunk * CHUNK + start + column
            v = tl.load(streams + token * width + at)
            weights = tl.load(fn + row[:, None] * width + at[None, :], mask=(row < 24)[:, None], other=0.0)
            total += tl.sum(weights * v[None, :], axis=1) + tl.where(row == 24, tl.sum(v * v, axis=0), 0.0)
        tl.store(partial + (token * chunks + chunk) * 32 + row, total)

    @triton.jit
    def _mix_kernel(
        streams, partial, base, scale, norm, x, post, matrix, chunks, eps, norm_eps,
        D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One token: finish z, make pre, post and M, then read the sublayer's input."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        chunk, row, line = tl.arange(0, CHUNKS), tl.arange(0, 4), tl.arange(0, 4)
        own = partial + token * chunks * 32 + chunk * 32
        seen = chunk < chunks
        factor = tl.rsqrt(tl.sum(tl.load(own + 24, mask=seen, other=0.0), axis=0) / (4 * D) + norm_eps)
        s0, s1, s2 = tl.load(scale), tl.load(scale + 1), tl.load(scale + 2)
        at = 8 + row[:, None] * 4 + line[None, :]
        three = own[:, None, None] + at[None, :, :]
        z = tl.sum(tl.load(three, mask=seen[:, None, None], other=0.0), axis=0) * factor
        logits = s2 * z + tl.load(base + at)
        m = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        m = m / tl.sum(m, axis=1)[:, None] + eps
        m = m / (tl.sum(m, axis=0)[None, :] + eps)
        for _ in range(STEPS):
            m = m / (tl.sum(m, axis=1)[:, None] + eps)
            m = m / (tl.sum(m, axis=0)[None, :] + eps)
        tl.store(matrix + token * 16 + row[:, None] * 4 + line[None, :], m)
        two = own[:, None] + row[None, :]
        z_pre = tl.sum(tl.load(two, mask=seen[:, None], other=0.0), axis=0) * factor
        z_post = tl.sum(tl.load(two + 4, mask=seen[:, None], other=0.0), axis=0) * factor
        pre = 1.0 / (1.0 + tl.exp(-(s0 * z_pre + tl.load(base + row)))) + eps
        tl.store(post + token * 4 + row, 2.0 / (1.0 + tl.exp(-(s1 * z_post + tl.load(base + 4 + row)))))
        column = tl.arange(0, BLOCK_D)
        live = column < D
        value = tl.zeros((BLOCK_D,), tl.float32)
        for j in tl.static_range(4):
            share = tl.sum(tl.where(row == j, pre, 0.0), axis=0)
            value += share * tl.load(streams + (token * 4 + j) * D + column, mask=live, other=0.0)
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + norm_eps)
        value = value * tl.load(norm + column, mask=live, other=0.0)
        tl.store(x + token * D + column, value.to(x.dtype.element_ty), mask=live)

    @triton.jit
    def _join_kernel(
        streams, one, two, three, four, post, matrix, out, d, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
    ):  # fmt: skip
        """BLOCK elements of every stream of one token."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = column < d
        y = tl.load(one + token * d + column, mask=live, other=0.0)
        if PARTS > 1:
            y += tl.load(two + token * d + column, mask=live, other=0.0)
        if PARTS > 2:
            y += tl.load(three + token * d + column, mask=live, other=0.0)
        if PARTS > 3:
            y += tl.load(four + token * d + column, mask=live, other=0.0)
        x0 = tl.load(streams + (token * 4 + 0) * d + column, mask=live, other=0.0)
        x1 = tl.load(streams + (token * 4 + 1) * d + column, mask=live, other=0.0)
        x2 = tl.load(streams + (token * 4 + 2) * d + column, mask=live, other=0.0)
        x3 = tl.load(streams + (token * 4 + 3) * d + column, mask=live, other=0.0)
        for k in tl.static_range(4):
            own = matrix + token * 16 + k
            value = tl.load(post + token * 4 + k) * y
            value += tl.load(own) * x0 + tl.load(own + 4) * x1 + tl.load(own + 8) * x2 + tl.load(own + 12) * x3
            tl.store(out + (token * 4 + k) * d + column, value, mask=live)
