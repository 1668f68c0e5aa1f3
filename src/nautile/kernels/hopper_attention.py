"""Sparse attention for Hopper, in Gluon: packed rows are decoded once into shared memory and read there by both products.

``sparse_attention`` says what it computes and calls it where it fits. Beyond Triton's version it controls when things happen:
the decoding of the next tile runs beside the tensor cores' work on this one, and rows are fetched two tiles ahead, which
Triton's own pipeliner does not do for values that pass through registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.kernels.row_pool import RowPool

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:  # CPU-only installations have no Triton, older versions no Gluon
    gluon = None

__all__ = ["HopperTiles", "fits", "launch"]

_BYTES = 584  # of a row
_C, _ROTATED, _HEADS = 512, 64, 64


@dataclass(frozen=True)
class HopperTiles:
    """Rows of a tile, tiles in shared memory, warps that decode and registers of a thread of theirs. ``serial``: a tile's
    logits begin when the tile before it is done with, so that of two tiles in shared memory one is always free to be decoded
    into; else they run beside the tile before, which keeps both tiles busy. ``half``: sums of splits are kept in bfloat16
    until they are joined. The defaults are the fastest that were measured."""

    rows: int = 64
    stages: int = 2
    warps: int = 8
    registers: int = 72
    serial: bool = False
    half: bool = False


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
    partial: Tensor, weight: Tensor, numbers: tuple[int, int, float, int, int, int, int, int], tiles: HopperTiles,
) -> None:  # fmt: skip
    """Fill ``out`` [T, H, 512], or with several splits ``partial`` and ``weight``. ``numbers`` are the lengths of the lists,
    the scale of the logits times log2(e), heads, splits, tiles of a split, tiles of the window and of the entries."""
    splits = numbers[4]
    _attend_kernel[(q.shape[0], q.shape[1] // _HEADS, splits)](
        q, near.data.view(torch.int32), near_ids, far.data.view(torch.int32), far_ids, sink, out, partial, weight, *numbers,
        STRIDE=_BYTES // 4, SINGLE=splits == 1, N=tiles.rows, S=tiles.stages, W=tiles.warps, R=tiles.registers,
        SERIAL=tiles.serial, HALF=tiles.half, num_warps=8,
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
    def _names(near_ids, far_ids, token, near_count, far_count, near_tiles, tile, last, N: gl.constexpr):
        """Row numbers of one tile, -1 where there is none."""
        lane = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        if tile < near_tiles:
            ids = near_ids + token * near_count
            count = near_count
            at = tile * N + lane
        else:
            ids = far_ids + token * far_count
            count = far_count
            at = (tile - near_tiles) * N + lane
        return gl.load(ids + at, mask=(at < count) & (tile < last), other=-1)

    @gluon.jit
    def _fetch_part(base, ids, WORD: gl.constexpr, SCALE: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, L: gl.constexpr):
        """Words of G groups (16 words each, from WORD on) of the rows ``ids``, and their word of scales SCALE."""
        row = ids.load(gl.SliceLayout(1, gl.SliceLayout(2, L)))
        live = row >= 0
        start = row.to(gl.int64) * STRIDE
        group = gl.arange(0, G, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :]
        column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :]
        scale = gl.load(base + start + SCALE, mask=live, other=0)
        offset = start[:, None][:, :, None] + (WORD + group * 16)[:, :, None] + column[:, None, :]
        seen = live[:, None][:, :, None] & (column >= 0)[:, None, :] & (group >= 0)[:, :, None]
        return gl.load(base + offset, mask=seen, other=0), scale

    @gluon.jit
    def _fetch(
        near, far, ids, is_near, STRIDE: gl.constexpr, LA: gl.constexpr, LB: gl.constexpr, LD: gl.constexpr, LR: gl.constexpr
    ):
        """Rows of one tile in registers, still packed: 4 + 2 + 1 groups of codes, their scales, the rotated elements."""
        base = near if is_near else far
        row = ids.load(gl.SliceLayout(1, LR))
        column = gl.arange(0, 32, layout=gl.SliceLayout(0, LR))[None, :]
        start = row.to(gl.int64) * STRIDE + 112
        turned = gl.load(base + start[:, None] + column, mask=(row >= 0)[:, None] & (column >= 0), other=0)
        ca, pa = _fetch_part(base, ids, 0, 144, 4, STRIDE, LA)
        cb, pb = _fetch_part(base, ids, 64, 145, 2, STRIDE, LB)
        cd, pd = _fetch_part(base, ids, 96, 145, 1, STRIDE, LD)
        return ca, pa, cb, pb, cd, pd, turned

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
    def _produce(
        near, near_ids, far, far_ids, token, near_count, far_count, near_tiles, first, last, words, names, full, empty,
        STRIDE: gl.constexpr, N: gl.constexpr, S: gl.constexpr, W: gl.constexpr,
    ):  # fmt: skip
        """Decode tile after tile into shared memory, where both products read it. Rows are fetched a tile ahead of their
        decoding, their numbers two tiles ahead."""
        LA: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 4, 8], [W, 1, 1], [2, 1, 0])
        LB: gl.constexpr = gl.BlockedLayout([1, 1, 2], [2, 2, 8], [W, 1, 1], [2, 1, 0])
        LD: gl.constexpr = gl.BlockedLayout([1, 1, 2], [4, 1, 8], [W, 1, 1], [2, 1, 0])
        LR: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [W, 1], [1, 0])
        names.index(0).store(_names(near_ids, far_ids, token, near_count, far_count, near_tiles, first, last, N))
        names.index(1).store(_names(near_ids, far_ids, token, near_count, far_count, near_tiles, first + 1, last, N))
        later = _names(near_ids, far_ids, token, near_count, far_count, near_tiles, first + 2, last, N)
        raw = _fetch(near, far, names.index(0), first < near_tiles, STRIDE, LA, LB, LD, LR)
        for tile in range(first, last):
            step = tile - first
            k = words.index(step % S)
            hopper.mbarrier.wait(empty.index(step % S), ((step // S) & 1) ^ 1)
            k.slice(224, 32, dim=1).store(raw[6])
            k.slice(0, 128, dim=1).store(_decode(raw[0], raw[1], 0, N, 4, LA))
            k.slice(128, 64, dim=1).store(_decode(raw[2], raw[3], 0, N, 2, LB))
            k.slice(192, 32, dim=1).store(_decode(raw[4], raw[5], 2, N, 1, LD))
            hopper.fence_async_shared()
            gl.thread_barrier()
            hopper.mbarrier.arrive(full.index(step % S), count=1)
            # Loads come after the fence, which would wait for them.
            raw = _fetch(near, far, names.index((step + 1) & 7), tile + 1 < near_tiles, STRIDE, LA, LB, LD, LR)
            names.index((step + 2) & 7).store(later)
            later = _names(near_ids, far_ids, token, near_count, far_count, near_tiles, tile + 3, last, N)

    @gluon.jit
    def _weigh(s, top, total, names, scale, N: gl.constexpr, LS: gl.constexpr):
        """Weights of a tile's logits for the running softmax (base 2), and by how much earlier sums shrink."""
        ids = names.load(gl.SliceLayout(0, LS))
        logits = gl.where((ids >= 0)[None, :], s * scale, float("-inf"))
        higher = gl.maximum(top, gl.max(logits, axis=1))
        base = gl.where(higher == float("-inf"), 0.0, higher)
        weights = gl.exp2(logits - base[:, None])
        shrink = gl.exp2(top - base)
        return weights.to(gl.bfloat16), higher, total * shrink + gl.sum(weights, axis=1), shrink

    @gluon.jit
    def _add(p, k, left, right, shrink, LO: gl.constexpr):
        """Start the sums of a tile: in two halves, since one instruction for all of it needs 128 registers."""
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, LO))[:, None]
        left = hopper.warpgroup_mma(p, k.slice(0, 256, dim=1), left * shrink, is_async=True)
        right = hopper.warpgroup_mma(p, k.slice(256, 256, dim=1), right * shrink, is_async=True)
        return left, right

    @gluon.jit
    def _finish(
        sink, out, token, heads, head0, top, total, left, right, k_smem,
        LQ: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr,
    ):  # fmt: skip
        """Divide by the sum with the sink; the result passes the tiles' shared memory, so that whole lines are written."""
        row = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LQ))
        column = gl.arange(0, 512, layout=gl.SliceLayout(0, LQ))
        drain = gl.load(sink + head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LS))) * 1.4426950408889634
        base = gl.maximum(top, drain)
        shrink = gl.exp2(top - base)
        share = shrink / (total * shrink + gl.exp2(drain - base))
        share = gl.convert_layout(share, gl.SliceLayout(1, LO))[:, None]
        _write(out + (token * heads + row)[:, None] * 512 + column[None, :], left * share, right * share, k_smem, LQ)

    @gluon.jit
    def _write(target, left, right, k_smem, LQ: gl.constexpr):
        """Both halves in bfloat16, by way of the first tile's shared memory, which the other warpgroup may still read."""
        gl.thread_barrier()
        k = k_smem._reinterpret(gl.bfloat16, [64, 512], gl.NVMMASharedLayout(128, 16, 2))
        k.slice(0, 256, dim=1).store(left.to(gl.bfloat16))
        k.slice(256, 256, dim=1).store(right.to(gl.bfloat16))
        gl.store(target, k.load(LQ))

    @gluon.jit
    def _keep(
        partial, weight, slot, head0, top, total, left, right, k_smem,
        HALF: gl.constexpr, LQ: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr,
    ):  # fmt: skip
        """Keep one split's sums, its largest logits and totals for the kernel that joins splits."""
        if HALF:
            row = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LQ))
            column = gl.arange(0, 512, layout=gl.SliceLayout(0, LQ))
            _write(partial + (slot + row)[:, None] * 512 + column[None, :], left, right, k_smem, LQ)
        else:
            row = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LO))
            column = gl.arange(0, 256, layout=gl.SliceLayout(0, LO))
            target = partial + (slot + row)[:, None] * 512 + column[None, :]
            gl.store(target, left)
            gl.store(target + 256, right)
        row = head0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LS))
        gl.store(weight + (slot + row) * 2, top)
        gl.store(weight + (slot + row) * 2 + 1, total)

    @gluon.jit
    def _beside(
        q_smem, k_smem, p_smem, names, full, empty, top, total, left, right, zero, scale, first, last,
        N: gl.constexpr, S: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr,
    ):  # fmt: skip
        """All tiles; the logits of the next one beside the sums of this one."""
        hopper.mbarrier.wait(full.index(0), 0)
        s = hopper.warpgroup_mma(q_smem, k_smem.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        for tile in range(first, last - 1):
            step = tile - first
            hopper.mbarrier.wait(full.index((step + 1) % S), ((step + 1) // S) & 1)
            k = k_smem.index((step + 1) % S)
            s_next = hopper.warpgroup_mma(q_smem, k.permute([1, 0]), zero, use_acc=False, is_async=True)
            p, top, total, shrink = _weigh(s, top, total, names.index(step & 7), scale, N, LS)
            p_smem.store(p)
            hopper.fence_async_shared()
            left, right = _add(p_smem, k_smem.index(step % S), left, right, shrink, LO)
            left, right, s = hopper.warpgroup_mma_wait(0, deps=[left, right, s_next])
            gl.thread_barrier()
            hopper.mbarrier.arrive(empty.index(step % S), count=1)
        step = last - 1 - first
        p, top, total, shrink = _weigh(s, top, total, names.index(step & 7), scale, N, LS)
        p_smem.store(p)
        hopper.fence_async_shared()
        left, right = _add(p_smem, k_smem.index(step % S), left, right, shrink, LO)
        left, right = hopper.warpgroup_mma_wait(0, deps=[left, right])
        return top, total, left, right

    @gluon.jit
    def _one_by_one(
        q_smem, k_smem, p_smem, names, full, empty, top, total, left, right, zero, scale, first, last,
        N: gl.constexpr, S: gl.constexpr, LS: gl.constexpr, LO: gl.constexpr,
    ):  # fmt: skip
        """All tiles, each given back before the next one's logits begin."""
        for tile in range(first, last):
            step = tile - first
            hopper.mbarrier.wait(full.index(step % S), (step // S) & 1)
            k = k_smem.index(step % S)
            s = hopper.warpgroup_mma(q_smem, k.permute([1, 0]), zero, use_acc=False, is_async=True)
            s = hopper.warpgroup_mma_wait(0, deps=[s])
            p, top, total, shrink = _weigh(s, top, total, names.index(step & 7), scale, N, LS)
            p_smem.store(p)
            hopper.fence_async_shared()
            left, right = _add(p_smem, k, left, right, shrink, LO)
            left, right = hopper.warpgroup_mma_wait(0, deps=[left, right])
            gl.thread_barrier()
            hopper.mbarrier.arrive(empty.index(step % S), count=1)
        return top, total, left, right

    @gluon.jit
    def _consume(
        q, sink, out, partial, weight, token, split, scale, heads, splits, first, last, q_smem, k_smem, p_smem, names, full,
        empty, SINGLE: gl.constexpr, N: gl.constexpr, S: gl.constexpr, SERIAL: gl.constexpr, HALF: gl.constexpr,
    ):  # fmt: skip
        """Both products of every tile, the softmax between them, and the result."""
        C: gl.constexpr = 512
        H: gl.constexpr = 64
        LQ: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
        LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
        LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 128, 16])
        head0 = gl.program_id(1) * H
        row = head0 + gl.arange(0, H, layout=gl.SliceLayout(1, LQ))
        column = gl.arange(0, C, layout=gl.SliceLayout(0, LQ))
        q_smem.store(gl.load(q + (token * heads + row)[:, None] * C + column[None, :]))
        hopper.fence_async_shared()
        top = gl.full([H], float("-inf"), gl.float32, layout=gl.SliceLayout(1, LS))
        total = gl.full([H], 0.0, gl.float32, layout=gl.SliceLayout(1, LS))
        left = gl.full([H, C // 2], 0.0, gl.float32, layout=LO)
        right = gl.full([H, C // 2], 0.0, gl.float32, layout=LO)
        zero = gl.full([H, N], 0.0, gl.float32, layout=LS)
        gl.thread_barrier()
        if SERIAL:
            top, total, left, right = _one_by_one(
                q_smem, k_smem, p_smem, names, full, empty, top, total, left, right, zero, scale, first, last, N, S, LS, LO
            )
        else:
            top, total, left, right = _beside(
                q_smem, k_smem, p_smem, names, full, empty, top, total, left, right, zero, scale, first, last, N, S, LS, LO
            )
        if SINGLE:
            _finish(sink, out, token, heads, head0, top, total, left, right, k_smem, LQ, LS, LO)
        else:
            _keep(partial, weight, (token * splits + split) * heads, head0, top, total, left, right, k_smem, HALF, LQ, LS, LO)

    @gluon.jit
    def _attend_kernel(
        q, near, near_ids, far, far_ids, sink, out, partial, weight, near_count, far_count, scale, heads, splits, tiles,
        near_tiles, far_tiles,
        STRIDE: gl.constexpr, SINGLE: gl.constexpr, N: gl.constexpr, S: gl.constexpr, W: gl.constexpr, R: gl.constexpr,
        SERIAL: gl.constexpr, HALF: gl.constexpr,
    ):  # fmt: skip
        """One query, 64 heads, tiles [split * tiles, (split + 1) * tiles) of its two lists (window tiles first): two
        warpgroups multiply, W more warps decode for them into two halves of shared memory in turn."""
        SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        token = gl.program_id(0).to(gl.int64)
        split = gl.program_id(2)
        first = split * tiles
        last = gl.minimum(first + tiles, near_tiles + far_tiles)
        q_smem = gl.allocate_shared_memory(gl.bfloat16, [64, 512], SH)
        k_smem = gl.allocate_shared_memory(gl.bfloat16, [S, N, 512], SH)
        words = k_smem._reinterpret(gl.int32, [S, N, 256], gl.NVMMASharedLayout(128, 32, 2))
        p_smem = gl.allocate_shared_memory(gl.bfloat16, [64, N], gl.NVMMASharedLayout(2 * N, 16, 2))
        names = gl.allocate_shared_memory(gl.int32, [8, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        full = gl.allocate_shared_memory(gl.int64, [S, 1], hopper.mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [S, 1], hopper.mbarrier.MBarrierLayout())
        for half in gl.static_range(S):
            hopper.mbarrier.init(full.index(half), count=1)
            hopper.mbarrier.init(empty.index(half), count=1)
        gl.warp_specialize(
            [
                (_consume, (q, sink, out, partial, weight, token, split, scale, heads, splits, first, last,
                            q_smem, k_smem, p_smem, names, full, empty, SINGLE, N, S, SERIAL, HALF)),
                (_produce, (near, near_ids, far, far_ids, token, near_count, far_count, near_tiles, first, last,
                            words, names, full, empty, STRIDE, N, S, W)),
            ],
            [W], [R],
        )  # fmt: skip
