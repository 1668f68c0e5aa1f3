"""From projections to stored rows: the window row of a token, and the compressed entry or indexer key that it completes.

Rows are those of ``state/formats.py``: a packed key-value row is FP8 payload, the rotated dimensions in bfloat16, a power of
two per 64; a packed key is FP4 after a Hadamard transform, a power of two per 32. The references are made of the functions
that define those formats; the kernels write the same bytes (float32 sums in another order can move a value across a rounding
border).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.kernels.decode.chain import chain
from nautile.quant import hadamard, mxfp4
from nautile.quant.fp8 import encode_groups

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["Angles", "CompressorRows", "compress", "compress_reference", "encode_row", "hadamard_signs", "store_window"]

_RING = {4: 8, 128: 128}  # tokens a compressor of this ratio may still need
_NEVER = -1e30


@dataclass(frozen=True)
class Angles:
    """cos and sin of one position of each token, float32 [T, r / 2]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class CompressorRows:
    """One compressor of one layer: its weights and where its state lies.

    ape float32 [m, w], norm float32 [dim]; ring_kv and ring_gate float32 [slots, layers, R, w]; pool uint8 [blocks, layers,
    entries, width]; ``layer`` the place among the layers of its kind. ``signs`` float32 [dim, dim] of the Hadamard transform
    for indexer keys, None for key-value rows.
    """

    ratio: int
    ape: Tensor
    norm: Tensor
    ring_kv: Tensor
    ring_gate: Tensor
    pool: Tensor
    layer: int
    norm_eps: float
    rotated: int
    signs: Tensor | None = None


def hadamard_signs(n: int, device: torch.device) -> Tensor:
    """The Sylvester matrix of +1 and -1, [n, n] float32, symmetric."""
    index = torch.arange(n, device=device)
    both = index.unsqueeze(0) & index.unsqueeze(1)
    parity = torch.zeros_like(both)
    for bit in range(n.bit_length()):
        parity ^= (both >> bit) & 1
    return 1.0 - 2.0 * parity.float()


def encode_row(row: Tensor, width: int, rotated: int) -> Tensor:
    """float32 [T, c] -> packed rows uint8 [T, width]; see ``RowFormat``."""
    plain = row.shape[1] - rotated
    payload, scales = encode_groups(row[:, :plain])
    out = torch.zeros(row.shape[0], width, dtype=torch.uint8, device=row.device)
    out[:, :plain] = payload.view(torch.uint8)
    out[:, plain : plain + 2 * rotated] = row[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
    out[:, plain + 2 * rotated : plain + 2 * rotated + scales.shape[1]] = scales.view(torch.uint8)
    return out


def store_window(
    projected: Tensor,
    norms: tuple[Tensor, Tensor],
    angles: Angles,
    window: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    chained: bool = False,
) -> Tensor:
    """Normalise the two halves of ``projected`` and store the second as window rows.

    Args: projected float32 [T, q + c]; norms of q and c; window uint8 [rows, width]; rows int64 [T], one for each token.
    Returns the low-rank query [T, q] in ``dtype``.
    """
    if projected.is_cuda:
        return launch_window(projected, norms, angles, window, rows, eps, dtype, chained=chained)
    split = norms[0].shape[0]
    low, kv = projected[:, :split], projected[:, split:]
    turned = _turned(_normal(kv, norms[1], eps), angles)
    window[rows] = encode_row(turned, window.shape[1], 2 * angles.cos.shape[1])
    return _normal(low, norms[0], eps).to(dtype)


def compress(
    kv: Tensor, gate: Tensor, where: CompressorRows, slots: Tensor, positions: Tensor, rows: Tensor, turn: Angles, *,
    chained: bool = False,
) -> None:  # fmt: skip
    """Take one token of each sequence into the rings; where it completes a block, write that block's entry.

    Args: kv, gate float32 [T, w] (rows may be slices of wider ones); slots, positions int64 [T]; rows int64 [T]: index of the
    entry among ``pool.flatten(0, 2)`` of layer 0 (the layer is added here); turn at the first position of the block.
    """
    if kv.is_cuda:
        launch_compress(kv, gate, where, slots, positions, rows, turn, chained=chained)
    else:
        compress_reference(kv, gate, where, slots, positions, rows, turn)


def compress_reference(
    kv: Tensor, gate: Tensor, where: CompressorRows, slots: Tensor, positions: Tensor, rows: Tensor, turn: Angles
) -> None:
    """The meaning; see ``compress``."""
    m, ring, dim = where.ratio, _RING[where.ratio], where.norm.shape[0]
    place = positions % ring
    where.ring_kv[slots, where.layer, place] = kv
    where.ring_gate[slots, where.layer, place] = gate
    done = (positions + 1) % m == 0
    if not bool(done.any()):
        return
    slots, block, rows = slots[done], positions[done] // m, rows[done]
    own = (block * m).unsqueeze(1) + torch.arange(m, device=kv.device)
    values, scores = _pick(where, slots, own, m, slice(dim, None) if m == 4 else slice(None))
    if m == 4:
        before, their = _pick(where, slots, own - m, m, slice(None, dim))
        their = torch.where((block > 0).view(-1, 1, 1), their, _NEVER)
        values, scores = torch.cat((before, values), 1), torch.cat((their, scores), 1)
    pooled = (scores.softmax(1) * values).sum(1)
    entry = _turned(_normal(pooled, where.norm, where.norm_eps), Angles(turn.cos[done], turn.sin[done]))
    flat = where.pool.flatten(0, 2)
    at = rows + where.layer * where.pool.shape[2]
    if where.signs is None:
        flat[at] = encode_row(entry, flat.shape[1], where.rotated)
    else:
        codes, scales = mxfp4.encode(hadamard.transform(entry))
        flat[at] = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)), dim=1)


def _pick(where: CompressorRows, slots: Tensor, positions: Tensor, m: int, half: slice) -> tuple[Tensor, Tensor]:
    """Values and biased scores of these positions [T, m], one half of the channels."""
    place = positions % _RING[m]
    values = where.ring_kv[slots.unsqueeze(1), where.layer, place][..., half]
    return values, where.ring_gate[slots.unsqueeze(1), where.layer, place][..., half] + where.ape[..., half]


def _normal(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _turned(x: Tensor, angles: Angles) -> Tensor:
    plain = x.shape[-1] - 2 * angles.cos.shape[-1]
    even, odd = x[..., plain::2], x[..., plain + 1 :: 2]
    pairs = torch.stack((even * angles.cos - odd * angles.sin, even * angles.sin + odd * angles.cos), dim=-1)
    return torch.cat((x[..., :plain], pairs.flatten(-2)), dim=-1)


def launch_window(
    projected: Tensor,
    norms: tuple[Tensor, Tensor],
    angles: Angles,
    window: Tensor,
    rows: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    chained: bool = False,
) -> Tensor:
    """The kernel; see ``store_window``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; on the CPU store_window is the same in plain PyTorch")
    tokens, width = projected.shape
    low, c = norms[0].shape[0], norms[1].shape[0]
    out = torch.empty(tokens, low, dtype=dtype, device=projected.device)
    _window_kernel[(tokens, 2)](
        projected, norms[0], norms[1], angles.cos, angles.sin, window, rows, out, width, eps,
        LOW=low, BLOCK_LOW=triton.next_power_of_2(low), C=c, ROTATED=2 * angles.cos.shape[1], ROW=window.shape[1], num_warps=4,
        **chain(projected, chained),
    )  # fmt: skip
    return out


def launch_compress(
    kv: Tensor, gate: Tensor, where: CompressorRows, slots: Tensor, positions: Tensor, rows: Tensor, turn: Angles, *,
    chained: bool = False,
) -> None:  # fmt: skip
    """The kernel; see ``compress``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; compress_reference is the same in plain PyTorch")
    tokens, width = kv.shape
    layers, entries, row = where.pool.shape[1:]
    key = where.signs is not None
    signs = where.signs if where.signs is not None else where.norm
    _compress_kernel[(tokens,)](
        kv, gate, kv.stride(0), gate.stride(0), where.ape, where.norm, where.ring_kv, where.ring_gate, where.pool, signs,
        slots, positions, rows, turn.cos, turn.sin, layers, where.layer, entries * where.layer, where.norm_eps,
        M=where.ratio, RING=_RING[where.ratio], WIDTH=width, C=where.norm.shape[0], ROTATED=where.rotated, ROW=row, KEY=key,
        LAYERS=where.ring_kv.shape[1], num_warps=4, **chain(kv, chained),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def normal_(x, weight, eps, C: tl.constexpr):
        return x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight

    @triton.jit
    def turn_pairs(even, odd, cos, sin):
        return even * cos - odd * sin, even * sin + odd * cos

    @triton.jit
    def turned_(x, cos, sin, C: tl.constexpr, ROTATED: tl.constexpr):
        """Rotate the last ROTATED of x [C]; cos and sin point at this token's ROTATED / 2 numbers."""
        even, odd = tl.split(tl.reshape(x, (C // 2, 2)))
        angle = tl.arange(0, C // 2) - (C - ROTATED) // 2
        c = tl.load(cos + angle, mask=angle >= 0, other=1.0)
        s = tl.load(sin + angle, mask=angle >= 0, other=0.0)
        even, odd = turn_pairs(even, odd, c, s)
        return tl.reshape(tl.join(even, odd), (C,))

    @triton.jit
    def exponent_of(amax, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
        """Biased exponent of the smallest power of two s with amax / s <= the format's largest value."""
        bits = amax.to(tl.int32, bitcast=True)
        biased = (bits >> 23) - SHIFT + ((bits & 0x7FFFFF) > LIMIT).to(tl.int32)
        return tl.minimum(tl.maximum(biased, 1), 254)

    @triton.jit
    def to_e4m3(x):
        """The code of x, round to nearest, ties to even, saturating: in integers, which every GPU has. From 2^-6 on the upper
        bits of a float32 are the code but for the exponent's bias; below, codes are multiples of 2^-9."""
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)

    @triton.jit
    def store_row(target, x, C: tl.constexpr, ROTATED: tl.constexpr):
        """x float32 [C] as a packed row at ``target``."""
        plain: tl.constexpr = C - ROTATED
        groups = tl.reshape(x, (C // 64, 64))
        exponent = exponent_of(tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-4), 6291456, 8)
        power = (exponent << 23).to(tl.float32, bitcast=True)
        scaled = tl.reshape(groups / power[:, None], (C,))
        payload = to_e4m3(scaled)
        column, group = tl.arange(0, C), tl.arange(0, C // 64)
        tl.store(target + column, payload, mask=column < plain)
        turned = (target + plain).to(tl.pointer_type(tl.bfloat16))
        tl.store(turned + (column - plain), x.to(tl.bfloat16), mask=column >= plain)
        tl.store(target + plain + 2 * ROTATED + group, exponent.to(tl.uint8), mask=group < plain // 64)

    @triton.jit
    def to_e2m1(x, power):
        """The 4-bit code of x / power, round to nearest, ties to even; a code's sign is that of x, zero included."""
        size = tl.abs(x) / power
        step = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(step, 1.0) * 0.5
        rounded = ((size / step + 12582912.0) - 12582912.0) * step
        code = tl.where(rounded < 2.0, rounded * 2, tl.where(rounded < 4.0, rounded + 2, rounded / 2 + 4)).to(tl.int32)
        return code | (((x.to(tl.int32, bitcast=True) >> 31) & 1) << 3), rounded

    @triton.jit
    def _store_key(target, x, signs, C: tl.constexpr):
        """x float32 [C] through Hadamard and FP4."""
        line = tl.arange(0, C)
        matrix = tl.load(signs + line[:, None] * C + line[None, :])
        x = tl.sum(matrix * x[None, :], axis=1) * (1.0 / tl.sqrt(C * 1.0))
        groups = tl.reshape(x, (C // 32, 32))
        exponent = exponent_of(tl.maximum(tl.max(tl.abs(groups), axis=1), 7.052966104933725e-38), 4194304, 2)
        power = (exponent << 23).to(tl.float32, bitcast=True)
        codes, _ = to_e2m1(groups, power[:, None])
        low, high = tl.split(tl.reshape(codes, (C // 2, 2)))
        tl.store(target + tl.arange(0, C // 2), (low | (high << 4)).to(tl.uint8))
        tl.store(target + C // 2 + tl.arange(0, C // 32), exponent.to(tl.uint8))

    @triton.jit
    def _window_kernel(
        projected, q_norm, kv_norm, cos, sin, window, rows, out, width, eps,
        LOW: tl.constexpr, BLOCK_LOW: tl.constexpr, C: tl.constexpr, ROTATED: tl.constexpr, ROW: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """Program 0 of a token: the low-rank query. Program 1: the window row."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        if tl.program_id(1) == 0:
            column = tl.arange(0, BLOCK_LOW)
            live = column < LOW
            x = tl.load(projected + token * width + column, mask=live, other=0.0)
            x = normal_(x, tl.load(q_norm + column, mask=live, other=0.0), eps, LOW)
            tl.store(out + token * LOW + column, x.to(out.dtype.element_ty), mask=live)
        else:
            lane = tl.arange(0, C)
            row = normal_(tl.load(projected + token * width + LOW + lane), tl.load(kv_norm + lane), eps, C)
            row = turned_(row, cos + token * (ROTATED // 2), sin + token * (ROTATED // 2), C, ROTATED)
            store_row(window + tl.load(rows + token) * ROW, row, C, ROTATED)

    @triton.jit(do_not_specialize=["layer", "first_row"])
    def _compress_kernel(
        kv, gate, kv_stride, gate_stride, ape, norm, ring_kv, ring_gate, pool, signs, slots, positions, rows, cos, sin,
        layers, layer, first_row, eps,
        M: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, ROTATED: tl.constexpr, ROW: tl.constexpr,
        KEY: tl.constexpr, LAYERS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One token: into the rings; then, at the end of a block, the block's entry (an online softmax over its slots)."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        position = tl.load(positions + token)
        own = (tl.load(slots + token) * LAYERS + layer) * RING * WIDTH
        every = tl.arange(0, WIDTH)
        place = own + (position % RING) * WIDTH + every
        tl.store(ring_kv + place, tl.load(kv + token * kv_stride + every))
        tl.store(ring_gate + place, tl.load(gate + token * gate_stride + every))
        if (position + 1) % M == 0:
            column = tl.arange(0, C)
            top = tl.full((C,), float("-inf"), tl.float32)
            total = tl.zeros((C,), tl.float32)
            value = tl.zeros((C,), tl.float32)
            for back in range(WIDTH // C * M):
                before = position - back
                if before >= 0:
                    # the last M tokens speak with their own half, those of the block before with the other
                    half = (1 - back // M) * (WIDTH // C - 1)
                    at = own + (before % RING) * WIDTH + half * C + column
                    score = tl.load(ape + (before % M) * WIDTH + half * C + column)
                    if back == 0:
                        score += tl.load(gate + token * gate_stride + half * C + column)
                        new = tl.load(kv + token * kv_stride + half * C + column)
                    else:
                        score += tl.load(ring_gate + at)
                        new = tl.load(ring_kv + at)
                    higher = tl.maximum(top, score)
                    old, fresh = tl.exp(top - higher), tl.exp(score - higher)
                    value = value * old + new * fresh
                    total = total * old + fresh
                    top = higher
            x = normal_(value / total, tl.load(norm + column), eps, C)
            x = turned_(x, cos + token * (ROTATED // 2), sin + token * (ROTATED // 2), C, ROTATED)
            target = pool + (tl.load(rows + token) + first_row) * ROW
            if KEY:
                _store_key(target, x, signs, C)
            else:
                store_row(target, x, C, ROTATED)
