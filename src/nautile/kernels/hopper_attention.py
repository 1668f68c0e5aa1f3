"""Sparse attention for Hopper, in Gluon: packed rows are decoded once into shared memory and read there by both products.

``sparse_attention`` says what it computes and calls it where it fits. Beyond Triton's version it controls when things happen:
the decoding of the next tile runs beside the tensor cores' work on this one, and rows are fetched two tiles ahead, which
Triton's own pipeliner does not do for values that pass through registers.
"""

from __future__ import annotations

from torch import Tensor

import torch

from nautile.kernels.row_pool import RowPool

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:  # CPU-only installations have no Triton, older versions no Gluon
    gluon = None

__all__ = ["ROWS", "fits", "launch"]

ROWS = 64  # of a tile
_BYTES = 584  # of a row
_C, _ROTATED, _HEADS = 512, 64, 64


def fits(q: Tensor, near: RowPool, far: RowPool, capability: tuple[int, int]) -> bool:
    """Whether the kernel takes these inputs: sm_90, bfloat16 queries of 512, heads in 64s, packed rows of 584 bytes."""
    pools = all(
        pool.packed and pool.stride == _BYTES and pool.rotated == _ROTATED and pool.data.data_ptr() % 16 == 0
        for pool in (near, far)
    )
    right = q.dtype == torch.bfloat16 and q.shape[2] == _C and q.shape[1] % _HEADS == 0
    return gluon is not None and capability == (9, 0) and right and pools


def launch(
    q: Tensor, near: RowPool, near_ids: Tensor, far: RowPool, far_ids: Tensor, sink: Tensor, out: Tensor,
    partial: Tensor, weight: Tensor, numbers: tuple[int, int, float, int, int, int, int, int],
) -> None:  # fmt: skip
    """Fill ``out`` [T, H, 512], or with several splits ``partial`` and ``weight``. ``numbers`` are the lengths of the lists,
    the scale of the logits times log2(e), heads, splits, tiles of a split, tiles of the window and of the entries."""
    splits = numbers[4]
    _attend_kernel[(q.shape[0], q.shape[1] // _HEADS, splits)](
        q, near.data.view(torch.int32), near_ids, far.data.view(torch.int32), far_ids, sink, out, partial, weight, *numbers,
        STRIDE=_BYTES // 4, SINGLE=splits == 1, N=ROWS, PDL=splits > 1, num_warps=8,
    )  # fmt: skip


if gluon is not None:
    _DECODE = gl.constexpr("""
    {
    .reg .b32 a, b, t, u, z;
    mov.b32 z, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 t, a, 4;
    and.b32 t, t, 0x07F007F0;
    lop3.b32 t, a, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $0, t, $3, z;
    shr.b32 u, b, 4;
    and.b32 u, u, 0x07F007F0;
    lop3.b32 u, b, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $1, u, $3, z;
    }
    """)

    @gluon.jit
    def _fetch_part(base, start, live, WORD: gl.constexpr, SCALE: gl.constexpr, G: gl.constexpr, L: gl.constexpr):
        """Words of G groups (16 words each, from WORD on) of rows that begin at ``start``, and the word of scales SCALE."""
        group = gl.arange(0, G, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :]
        scale = gl.load(base + start + SCALE, mask=live, other=0)
        offset = start[:, None][:, :, None] + (WORD + group * 16)[:, :, None] + column[:, None, :]
        codes = gl.load(
            base + offset, mask=live[:, None][:, :, None] & (column >= 0)[:, None, :] & (group >= 0)[:, :, None], other=0
        )
        return codes, scale

    @gluon.jit
    def _start(ids, token, count, tile, N: gl.constexpr, STRIDE: gl.constexpr, L: gl.constexpr):
        """Where the rows of a tile begin, in words, and which of them there are."""
        place = tile * N + gl.arange(0, N, layout=L)
        row = gl.load(ids + token * count + place, mask=place < count, other=-1)
        return row.to(gl.int64) * STRIDE, row >= 0

    @gluon.jit
    def _fetch(
        near,
        near_ids,
        far,
        far_ids,
        token,
        near_count,
        far_count,
        near_tiles,
        tile,
        N: gl.constexpr,
        STRIDE: gl.constexpr,
        LA: gl.constexpr,
        LB: gl.constexpr,
        LD: gl.constexpr,
        LR: gl.constexpr,
    ):
        """Rows of one tile in registers, still packed: 4 + 2 + 1 groups of codes with their scales, and the rotated elements."""
        if tile < near_tiles:
            base = near
            ids = near_ids
            count = near_count
            at = tile
        else:
            base = far
            ids = far_ids
            count = far_count
            at = tile - near_tiles
        sa, va = _start(ids, token, count, at, N, STRIDE, gl.SliceLayout(1, gl.SliceLayout(2, LA)))
        sb, vb = _start(ids, token, count, at, N, STRIDE, gl.SliceLayout(1, gl.SliceLayout(2, LB)))
        sd, vd = _start(ids, token, count, at, N, STRIDE, gl.SliceLayout(1, gl.SliceLayout(2, LD)))
        sr, vr = _start(ids, token, count, at, N, STRIDE, gl.SliceLayout(1, LR))
        ca, pa = _fetch_part(base, sa, va, 0, 144, 4, LA)
        cb, pb = _fetch_part(base, sb, vb, 64, 145, 2, LB)
        cd, pd = _fetch_part(base, sd, vd, 96, 145, 1, LD)
        column = gl.arange(0, 32, layout=gl.SliceLayout(0, LR))[None, :]
        r = gl.load(base + (sr + 112)[:, None] + column, mask=vr[:, None] & (column >= 0), other=0)
        return ca, pa, cb, pb, cd, pd, r

    @gluon.jit
    def _decode(codes, scale, FIRST: gl.constexpr, N: gl.constexpr, G: gl.constexpr, L: gl.constexpr):
        """Words of four e4m3 codes [N, G, 16] -> words of two bfloat16 [N, 32 G], exact; scales from the byte FIRST on."""
        group = gl.arange(0, G, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
        power = (scale[:, None] >> ((FIRST + group) * 8)) & 255
        power = gl.minimum(power + 120, 254) * 0x00800080
        codes, power = gl.broadcast(codes, power[:, :, None])
        low, high = gl.inline_asm_elementwise(
            _DECODE, "=r,=r,r,r", [codes, power], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        return gl.reshape(gl.join(low, high), [N, 32 * G])

    @gluon.jit
    def _put(k, raw, N: gl.constexpr, LA: gl.constexpr, LB: gl.constexpr, LD: gl.constexpr):
        """Decode a tile into shared memory, where both products read it."""
        k.slice(0, 128, dim=1).store(_decode(raw[0], raw[1], 0, N, 4, LA))
        k.slice(128, 64, dim=1).store(_decode(raw[2], raw[3], 0, N, 2, LB))
        k.slice(192, 32, dim=1).store(_decode(raw[4], raw[5], 2, N, 1, LD))
        k.slice(224, 32, dim=1).store(raw[6])
        hopper.fence_async_shared()

    @gluon.jit
    def _weigh(
        s,
        top,
        total,
        near_ids,
        far_ids,
        token,
        near_count,
        far_count,
        near_tiles,
        tile,
        scale,
        N: gl.constexpr,
        LS: gl.constexpr,
    ):
        """Weights of a tile's logits for the running softmax (base 2), and by how much earlier sums shrink."""
        lane: gl.constexpr = gl.SliceLayout(0, LS)
        place = gl.arange(0, N, layout=lane)
        if tile < near_tiles:
            at = tile * N + place
            ids = gl.load(near_ids + token * near_count + at, mask=at < near_count, other=-1)
        else:
            at = (tile - near_tiles) * N + place
            ids = gl.load(far_ids + token * far_count + at, mask=at < far_count, other=-1)
        logits = gl.where((ids >= 0)[None, :], s * scale, float("-inf"))
        higher = gl.maximum(top, gl.max(logits, axis=1))
        base = gl.where(higher == float("-inf"), 0.0, higher)
        weights = gl.exp2(logits - base[:, None])
        shrink = gl.exp2(top - base)
        total = total * shrink + gl.sum(weights, axis=1)
        return weights.to(gl.bfloat16), higher, total, shrink

    @gluon.jit
    def _attend_kernel(
        q,
        near,
        near_ids,
        far,
        far_ids,
        sink,
        out,
        partial,
        weight,
        near_count,
        far_count,
        scale,
        heads,
        splits,
        tiles,
        near_tiles,
        far_tiles,
        STRIDE: gl.constexpr,
        SINGLE: gl.constexpr,
        N: gl.constexpr,
        PDL: gl.constexpr,
    ):
        """One query, 64 heads, tiles [split * tiles, (split + 1) * tiles) of its two lists (window tiles first).

        While the tensor cores add tile t, the same warps decode tile t + 1 into the other half of shared memory, and the packed
        rows of tile t + 2 are on their way into registers.
        """
        C: gl.constexpr = 512
        H: gl.constexpr = 64
        LA: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 4, 8], [8, 1, 1], [2, 1, 0])
        LB: gl.constexpr = gl.BlockedLayout([1, 1, 2], [2, 2, 8], [8, 1, 1], [2, 1, 0])
        LD: gl.constexpr = gl.BlockedLayout([1, 1, 2], [4, 1, 8], [8, 1, 1], [2, 1, 0])
        LR: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [8, 1], [1, 0])
        LQ: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
        LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
        LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
        SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        token = gl.program_id(0).to(gl.int64)
        split = gl.program_id(2)
        head0 = gl.program_id(1) * H
        q_smem = gl.allocate_shared_memory(gl.bfloat16, [H, C], SH)
        k_smem = gl.allocate_shared_memory(gl.bfloat16, [2, N, C], SH)
        w_smem = k_smem._reinterpret(gl.int32, [2, N, C // 2], gl.NVMMASharedLayout(128, 32, 2))
        p_smem = gl.allocate_shared_memory(gl.bfloat16, [H, N], SH)
        first = split * tiles
        last = gl.minimum(first + tiles, near_tiles + far_tiles)
        raw = _fetch(near, near_ids, far, far_ids, token, near_count, far_count, near_tiles, first, N, STRIDE, LA, LB, LD, LR)
        qrow = head0 + gl.arange(0, H, layout=gl.SliceLayout(1, LQ))
        qcol = gl.arange(0, C, layout=gl.SliceLayout(0, LQ))
        at = (token * heads + qrow)[:, None] * C + qcol[None, :]
        q_smem.store(gl.load(q + at))
        top = gl.full([H], float("-inf"), gl.float32, layout=gl.SliceLayout(1, LS))
        total = gl.full([H], 0.0, gl.float32, layout=gl.SliceLayout(1, LS))
        o = gl.full([H, C], 0.0, gl.float32, layout=LO)
        zero = gl.full([H, N], 0.0, gl.float32, layout=LS)
        _put(w_smem.index(0), raw, N, LA, LB, LD)
        s = hopper.warpgroup_mma(q_smem, k_smem.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
        raw = _fetch(
            near,
            near_ids,
            far,
            far_ids,
            token,
            near_count,
            far_count,
            near_tiles,
            gl.minimum(first + 1, last),
            N,
            STRIDE,
            LA,
            LB,
            LD,
            LR,
        )
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        buf = 0
        for tile in range(first, last - 1):
            p, top, total, shrink = _weigh(
                s, top, total, near_ids, far_ids, token, near_count, far_count, near_tiles, tile, scale, N, LS
            )
            p_smem.store(p)
            hopper.fence_async_shared()
            o = o * gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
            o_later = hopper.warpgroup_mma(p_smem, k_smem.index(buf), o, is_async=True)
            _put(w_smem.index(1 - buf), raw, N, LA, LB, LD)
            s_later = hopper.warpgroup_mma(q_smem, k_smem.index(1 - buf).permute([1, 0]), zero, use_acc=False, is_async=True)
            raw = _fetch(
                near, near_ids, far, far_ids, token, near_count, far_count, near_tiles, tile + 2, N, STRIDE, LA, LB, LD, LR
            )
            o, s = hopper.warpgroup_mma_wait(0, deps=[o_later, s_later])
            buf = 1 - buf
        p, top, total, shrink = _weigh(
            s, top, total, near_ids, far_ids, token, near_count, far_count, near_tiles, last - 1, scale, N, LS
        )
        p_smem.store(p)
        hopper.fence_async_shared()
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
        o = hopper.warpgroup_mma(p_smem, k_smem.index(buf), o, is_async=True)
        o = hopper.warpgroup_mma_wait(0, deps=[o])
        orow = head0 + gl.arange(0, H, layout=gl.SliceLayout(1, LO))
        srow = head0 + gl.arange(0, H, layout=gl.SliceLayout(1, LS))
        if SINGLE:
            drain = gl.load(sink + srow) * 1.4426950408889634
            base = gl.maximum(top, drain)
            shrink = gl.exp2(top - base)
            share = shrink / (total * shrink + gl.exp2(drain - base))
            o = o * gl.convert_layout(share, gl.SliceLayout(1, LO))[:, None]
            k_smem.index(buf).store(o.to(gl.bfloat16))
            gl.store(out + at, k_smem.index(buf).load(LQ))
        else:
            slot = (token * splits + split) * heads
            ocol = gl.arange(0, C, layout=gl.SliceLayout(0, LO))
            gl.store(partial + (slot + orow)[:, None] * C + ocol[None, :], o)
            gl.store(weight + (slot + srow) * 2, top)
            gl.store(weight + (slot + srow) * 2 + 1, total)
        if PDL:
            gl.inline_asm_elementwise(
                "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
