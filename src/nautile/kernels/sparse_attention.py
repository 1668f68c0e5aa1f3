"""Attention of each query over its own list of rows in two paged pools, with a sink: the core of CSA and HCA at full size.

A query sees rows of the window pool and rows of the entry pool (those the indexer picked, or all of them in HCA). Rows are
keys and values at once. They are bfloat16 or float32 [rows, c], or packed: uint8 [rows, 584] for c = 512, of which 448
bytes are FP8 (e4m3), 128 are 64 bfloat16 values under RoPE, 7 are power-of-two scales (e8m0) and 1 is padding (tech report
section 2.3; ``state/formats.py``). Decode and prefill are the same kernel: decode has few queries and splits each list over
several programs, prefill has many and does not split.

Splits are a function of the lengths of the lists alone, and their sums are joined in order, so a query's result does not
depend on which other queries run beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

from nautile.kernels import hopper_attention
from nautile.kernels.hopper_attention import HopperTiles
from nautile.kernels.row_pool import RowPool

__all__ = [
    "AttentionTiles",
    "HopperTiles",
    "RowPool",
    "SplitPlan",
    "fast_split",
    "sparse_attention",
    "sparse_attention_reference",
]

_LOG2E = 1.4426950408889634


def sparse_attention_reference(
    q: Tensor, near: RowPool, near_ids: Tensor, far: RowPool, far_ids: Tensor, sink: Tensor
) -> Tensor:
    """The meaning: o_h = (sum_j e^l_hj k_j) / (sum_j e^l_hj + e^sink_h), l_hj = q_h . k_j / sqrt(c), over both lists.

    Args: q [T, H, c]; near_ids [T, n] and far_ids [T, m] int32 row numbers, negative ones stand for nothing; sink [H].
    Returns [T, H, c] in q's dtype, computed in float64.
    """
    keys = torch.cat((near.rows(near_ids), far.rows(far_ids)), dim=1).double()
    seen = torch.cat((near_ids, far_ids), dim=1) >= 0
    logits = torch.einsum("thc,tnc->thn", q.double(), keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen.unsqueeze(1), -torch.inf)
    column = sink.double().view(1, -1, 1).expand(q.shape[0], -1, 1)
    weights = torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("thn,tnc->thc", weights, keys).to(q.dtype)


@dataclass(frozen=True)
class SplitPlan:
    """How a list is cut: ``splits`` programs of ``tiles`` tiles of ``block`` rows each."""

    splits: int
    tiles: int
    block: int

    @classmethod
    def of(cls, near: int, far: int, block: int, tiles_per_split: int) -> SplitPlan:
        """Enough splits of ``tiles_per_split`` tiles (0: one split) for lists of these lengths; batch plays no part."""
        tiles = -(-near // block) + -(-far // block)
        per = max(1, tiles_per_split or tiles)
        return cls(max(1, -(-tiles // per)), per, block)


def fast_split(tokens: int, heads: int, near: int, far: int, programs: int = 132, block: int = 64) -> int:
    """Tiles a split with which ``tokens`` queries of lists of these lengths ran fastest on a card of ``programs``
    multiprocessors: these are filled once, by half where lists are short and many, because splits must be joined.

    It looks at the batch, so results differ in the last bits between batches; pass a constant to ``sparse_attention`` where
    they must not.
    """
    tiles = -(-near // block) + -(-far // block)
    queries = max(1, tokens * -(-heads // 64))
    share = 1 if tiles >= programs // 2 or queries <= 8 else 2
    room = max(1, programs // (share * queries))
    return max(1, -(-tiles // min(room, programs // 2)))


@dataclass(frozen=True)
class AttentionTiles:
    """Sizes of the portable kernel: heads of a program, rows of a tile, warps, stages of its pipeline."""

    heads: int
    rows: int
    warps: int
    stages: int

    @classmethod
    def of(cls, capability: tuple[int, int]) -> AttentionTiles:
        """64 heads are a warpgroup's rows on sm_90. On sm_100 the sums of 64 heads and the logits do not fit the tensor memory,
        and Triton 3.6 compiles such a kernel to a trap; before sm_90 64 heads spill registers without end."""
        if capability[0] == 9:
            return cls(64, 64, 8, 2)
        return cls(32, 64 if capability[0] >= 10 else 32, 8, 2)


def sparse_attention(
    q: Tensor, near: RowPool, near_ids: Tensor, far: RowPool, far_ids: Tensor, sink: Tensor, *,
    tiles_per_split: int = 0, tiles: AttentionTiles | HopperTiles | None = None,
) -> Tensor:  # fmt: skip
    """``sparse_attention_reference`` on a GPU: products in q's dtype with float32 sums, one or several programs a query.

    ``tiles_per_split`` 0 takes all tiles in one program (prefill); small numbers suit few queries (decode, ``fast_split``).
    ``tiles`` None takes Hopper's own kernel where it fits, else Triton's portable one; HopperTiles or AttentionTiles choose
    between them and set their sizes. H must be a multiple of 16, c a power of two. Raises ValueError for shapes the kernel does
    not take, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("sparse_attention needs Triton; sparse_attention_reference is the same in plain PyTorch")
    tokens, heads, c = q.shape
    if heads % 16 or c & (c - 1) or near.packed != far.packed or (near.c, near.rotated) != (c, far.rotated):
        raise ValueError(f"{heads} heads must be a multiple of 16, c={c} a power of two, and both pools of one format")
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    some = near_ids.shape[1] + far_ids.shape[1] > 0
    fits = some and q.is_cuda and hopper_attention.fits(q, near, far, capability)
    if isinstance(tiles, HopperTiles) and not fits:
        raise ValueError("HopperTiles need sm_90, bfloat16 queries of 512, heads in 64s and packed rows of 584 bytes")
    tiles = tiles or (HopperTiles() if fits else AttentionTiles.of(capability))
    block = tiles.rows
    plan = SplitPlan.of(near_ids.shape[1], far_ids.shape[1], block, tiles_per_split)
    out = torch.empty_like(q)
    single = plan.splits == 1
    shape = (tokens, plan.splits, heads)
    kept = torch.bfloat16 if isinstance(tiles, HopperTiles) and tiles.half else torch.float32
    partial = q.new_empty(1 if single else (*shape, c), dtype=kept)
    weight = q.new_empty(1 if single else (*shape, 2), dtype=torch.float32)
    q, near_ids, far_ids, sink = q.contiguous(), near_ids.contiguous(), far_ids.contiguous(), sink.float().contiguous()
    numbers = (
        near_ids.shape[1], far_ids.shape[1], c**-0.5 * _LOG2E, heads, plan.splits, plan.tiles,
        -(-near_ids.shape[1] // block), -(-far_ids.shape[1] // block),
    )  # fmt: skip
    if isinstance(tiles, HopperTiles):
        hopper_attention.launch(q, near, near_ids, far, far_ids, sink, out, partial, weight, numbers, tiles)
    else:
        block_h = min(tiles.heads, heads)
        _attend_kernel[(tokens, heads // block_h, plan.splits)](
            q, near.data, near_ids, far.data, far_ids, sink, out, partial, weight, *numbers,
            C=c, PLAIN=c - near.rotated, BLOCK_H=block_h, BLOCK_N=tiles.rows, PACKED=near.packed, SINGLE=single,
            NATIVE=capability >= (8, 9), NEAR_STRIDE=near.stride, FAR_STRIDE=far.stride,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    if not single:
        _join(partial, weight, sink, out, plan.splits, capability)
    return out


def _join(partial: Tensor, weight: Tensor, sink: Tensor, out: Tensor, splits: int, capability: tuple[int, int]) -> None:
    tokens, heads, c = out.shape
    width = min(c, 128)
    pdl = out.is_cuda and capability >= (9, 0)
    _join_kernel[(tokens, heads, c // width)](
        partial, weight, sink, out, heads, splits, C=c, SPLITS=triton.next_power_of_2(splits), WIDTH=width, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _from_e4m3(bits, NATIVE: tl.constexpr):
        """uint8 codes of e4m3 -> float32, exact. Without FP8 hardware: the code's bits, moved into a float32, are the value
        divided by 2^120."""
        if NATIVE:
            return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        wide = bits.to(tl.int32)
        moved = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120

    @triton.jit
    def _load_plain(
        data, start, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, PLAIN: tl.constexpr, NATIVE: tl.constexpr
    ):
        """FP8 elements FIRST .. FIRST + WIDTH - 1 of the rows that begin at ``start`` -> float32 [N, WIDTH]; those from PLAIN
        on come out as 0. One scale is loaded for every 64."""
        column = FIRST + tl.arange(0, WIDTH)
        group = FIRST // 64 + tl.arange(0, WIDTH // 64)
        seen = live[:, None] & (column < PLAIN)[None, :]
        codes = tl.load(data + start[:, None] + column[None, :], mask=seen, other=0)
        used = live[:, None] & (group < PLAIN // 64)[None, :]
        scale = tl.load(data + start[:, None] + (2 * C - PLAIN) + group[None, :], mask=used, other=127)
        power = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        values = tl.reshape(_from_e4m3(codes, NATIVE), (start.shape[0], WIDTH // 64, 64)) * power[:, :, None]
        return tl.reshape(values, (start.shape[0], WIDTH))

    @triton.jit
    def _load_half(
        data, start, live, HALF: tl.constexpr, C: tl.constexpr, PLAIN: tl.constexpr, PACKED: tl.constexpr, NATIVE: tl.constexpr
    ):
        """Half of the columns of rows that begin at ``start``: 0 the first C / 2, 1 the last -> [N, C / 2]; dead rows are 0."""
        column = tl.arange(0, C // 2) + HALF * (C // 2)
        if PACKED:
            row = _load_plain(data, start, live, HALF * (C // 2), C // 2, C, PLAIN, NATIVE)
            if HALF * (C // 2) + C // 2 > PLAIN:
                turned = (data + start[:, None] + PLAIN).to(tl.pointer_type(tl.bfloat16))
                seen = live[:, None] & (column >= PLAIN)[None, :]
                row += tl.load(turned + (column - PLAIN)[None, :], mask=seen, other=0.0).to(tl.float32)
        else:
            row = tl.load(data + start[:, None] + column[None, :], mask=live[:, None], other=0.0)
        return row

    @triton.jit
    def _tile(
        queries, state, data, ids, STRIDE: tl.constexpr, scale,
        C: tl.constexpr, PLAIN: tl.constexpr, PACKED: tl.constexpr, NATIVE: tl.constexpr,
    ):  # fmt: skip
        """One tile of rows into the running softmax (base 2). The columns come in two halves, which halves the registers
        that decoding needs; state is (top, total, sums of the first half, sums of the second)."""
        low, high = queries
        top, total, left, right = state
        live = ids >= 0
        start = ids.to(tl.int64) * STRIDE
        first = _load_half(data, start, live, 0, C, PLAIN, PACKED, NATIVE).to(low.dtype)
        logits = tl.dot(low, tl.trans(first), input_precision="ieee")
        second = _load_half(data, start, live, 1, C, PLAIN, PACKED, NATIVE).to(low.dtype)
        logits = tl.dot(high, tl.trans(second), logits, input_precision="ieee") * scale
        logits = tl.where(live[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(low.dtype)
        left = tl.dot(weights, first, left * shrink[:, None], input_precision="ieee")
        right = tl.dot(weights, second, right * shrink[:, None], input_precision="ieee")
        return higher, total, left, right

    @triton.jit
    def _attend_kernel(
        q, near, near_ids, far, far_ids, sink, out, partial, weight, near_count, far_count, scale,
        heads, splits, tiles, near_tiles, far_tiles, C: tl.constexpr, PLAIN: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_N: tl.constexpr, PACKED: tl.constexpr, SINGLE: tl.constexpr, NATIVE: tl.constexpr,
        NEAR_STRIDE: tl.constexpr, FAR_STRIDE: tl.constexpr,
    ):  # fmt: skip
        """One query, BLOCK_H heads, tiles [split * tiles, (split + 1) * tiles) of its two lists (window tiles first)."""
        token, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        column, lane = tl.arange(0, C // 2), tl.arange(0, BLOCK_N)
        at = head[:, None] * C + column[None, :]
        queries = (tl.load(q + token * heads * C + at), tl.load(q + token * heads * C + C // 2 + at))
        top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        left = tl.zeros((BLOCK_H, C // 2), tl.float32)
        right = tl.zeros((BLOCK_H, C // 2), tl.float32)
        first = split * tiles
        last = tl.minimum(first + tiles, near_tiles + far_tiles)
        for tile in range(first, tl.minimum(last, near_tiles)):
            place = tile * BLOCK_N + lane
            ids = tl.load(near_ids + token * near_count + place, mask=place < near_count, other=-1)
            top, total, left, right = _tile(
                queries, (top, total, left, right), near, ids, NEAR_STRIDE, scale, C, PLAIN, PACKED, NATIVE
            )
        for tile in range(tl.maximum(first, near_tiles) - near_tiles, last - near_tiles):
            place = tile * BLOCK_N + lane
            ids = tl.load(far_ids + token * far_count + place, mask=place < far_count, other=-1)
            top, total, left, right = _tile(
                queries, (top, total, left, right), far, ids, FAR_STRIDE, scale, C, PLAIN, PACKED, NATIVE
            )
        if SINGLE:
            drain = tl.load(sink + head) * 1.4426950408889634
            base = tl.maximum(top, drain)
            shrink = tl.exp2(top - base)
            share = shrink / (total * shrink + tl.exp2(drain - base))
            target = out + token * heads * C
            tl.store(target + at, (left * share[:, None]).to(out.dtype.element_ty))
            tl.store(target + C // 2 + at, (right * share[:, None]).to(out.dtype.element_ty))
        else:
            slot = (token * splits + split) * heads
            tl.store(partial + slot * C + at, left)
            tl.store(partial + slot * C + C // 2 + at, right)
            tl.store(weight + (slot + head) * 2, top)
            tl.store(weight + (slot + head) * 2 + 1, total)

    @triton.jit
    def _join_kernel(
        partial, weight, sink, out, heads, splits, C: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
    ):  # fmt: skip
        """WIDTH columns of one head of one query: all splits at once, added in a fixed order, then the sink."""
        if PDL:
            tl.extra.cuda.gdc_wait()
        token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        split = tl.arange(0, SPLITS)
        column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        slot = (token * splits + split) * heads + head
        live = split < splits
        top = tl.load(weight + slot * 2, mask=live, other=float("-inf"))
        total = tl.load(weight + slot * 2 + 1, mask=live, other=0.0)
        sums = tl.load(partial + slot[:, None] * C + column[None, :], mask=live[:, None], other=0.0)
        drain = tl.load(sink + head) * 1.4426950408889634
        base = tl.maximum(tl.max(top, axis=0), drain)
        share = tl.exp2(top - base)
        whole = tl.sum(total * share, axis=0) + tl.exp2(drain - base)
        value = tl.sum(sums * share[:, None], axis=0) / whole
        tl.store(out + (token * heads + head) * C + column, value.to(out.dtype.element_ty))
