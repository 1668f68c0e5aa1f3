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

__all__ = ["RowPool", "SplitPlan", "sparse_attention", "sparse_attention_reference"]

_GROUP = 64  # FP8 elements under one scale
_LOG2E = 1.4426950408889634


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
        """Enough splits of ``tiles_per_split`` tiles for lists of these lengths; lengths only, so batch plays no part."""
        tiles = -(-near // block) + -(-far // block)
        per = max(1, tiles_per_split)
        return cls(max(1, -(-tiles // per)), per, block)


def tile_sizes(capability: tuple[int, int]) -> tuple[int, int]:
    """Heads of a program and rows of a tile for a compute capability (major, minor).

    64 heads are a warpgroup's rows on sm_90. On sm_100 the sums of 64 heads and the logits do not fit the tensor memory, and
    Triton 3.6 compiles such a kernel to a trap; before sm_90 64 heads spill registers without end.
    """
    return (64, 64) if capability[0] == 9 else (32, 64) if capability[0] >= 10 else (32, 32)


def sparse_attention(
    q: Tensor, near: RowPool, near_ids: Tensor, far: RowPool, far_ids: Tensor, sink: Tensor, *, tiles_per_split: int = 0
) -> Tensor:
    """``sparse_attention_reference`` in Triton: products in q's dtype with float32 sums, one or several programs a query.

    ``tiles_per_split`` 0 takes all tiles in one program (prefill); small numbers suit few queries (decode). H must be a
    multiple of 16, c a power of two. Raises ValueError for shapes the kernel does not take, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("sparse_attention needs Triton; sparse_attention_reference is the same in plain PyTorch")
    tokens, heads, c = q.shape
    if heads % 16 or c & (c - 1) or near.packed != far.packed or (near.c, near.rotated) != (c, far.rotated):
        raise ValueError(f"{heads} heads must be a multiple of 16, c={c} a power of two, and both pools of one format")
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    most, block_n = tile_sizes(capability)
    block_h = min(most, heads)
    near_tiles, far_tiles = -(-near_ids.shape[1] // block_n), -(-far_ids.shape[1] // block_n)
    plan = SplitPlan.of(near_ids.shape[1], far_ids.shape[1], block_n, tiles_per_split or near_tiles + far_tiles)
    out = torch.empty_like(q)
    single = plan.splits == 1
    shape = (tokens, plan.splits, heads)
    partial = q.new_empty(1 if single else (*shape, c), dtype=torch.float32)
    weight = q.new_empty(1 if single else (*shape, 2), dtype=torch.float32)
    native = capability >= (8, 9)
    _attend_kernel[(tokens, heads // block_h, plan.splits)](
        q.contiguous(), near.data, near_ids.contiguous(), far.data, far_ids.contiguous(), sink.float().contiguous(),
        out, partial, weight, near_ids.shape[1], far_ids.shape[1], c**-0.5 * _LOG2E,
        heads, plan.splits, plan.tiles, near_tiles, far_tiles, C=c, PLAIN=c - near.rotated, BLOCK_H=block_h,
        BLOCK_N=block_n, PACKED=near.packed, SINGLE=single, NATIVE=native,
        NEAR_STRIDE=near.stride, FAR_STRIDE=far.stride, num_warps=8, num_stages=2,
    )  # fmt: skip
    if not single:
        _join_kernel[(tokens, heads // 8)](
            partial, weight, sink.float().contiguous(), out, heads, plan.splits, C=c, BLOCK_H=8, num_warps=4
        )
    return out


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
        if not PACKED:
            return tl.load(data + start[:, None] + column[None, :], mask=live[:, None], other=0.0)
        head = _load_plain(data, start, live, HALF * (C // 2), C // 2, C, PLAIN, NATIVE)
        if HALF == 0 and PLAIN >= C // 2:
            return head
        turned = (data + start[:, None] + PLAIN).to(tl.pointer_type(tl.bfloat16))
        tail = tl.load(turned + (column - PLAIN)[None, :], mask=live[:, None] & (column >= PLAIN)[None, :], other=0.0)
        return head + tail.to(tl.float32)

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
    def _join_kernel(partial, weight, sink, out, heads, splits, C: tl.constexpr, BLOCK_H: tl.constexpr):
        """Join the splits of one query in their order, then the sink."""
        token = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        column = tl.arange(0, C)
        base = tl.load(sink + head) * 1.4426950408889634
        total = tl.full((BLOCK_H,), 1.0, tl.float32)
        acc = tl.zeros((BLOCK_H, C), tl.float32)
        for split in range(splits):
            slot = (token * splits + split) * heads + head
            top, part = tl.load(weight + slot * 2), tl.load(weight + slot * 2 + 1)
            higher = tl.maximum(base, top)
            old, new = tl.exp2(base - higher), tl.exp2(top - higher)
            acc = acc * old[:, None] + tl.load(partial + slot[:, None] * C + column[None, :]) * new[:, None]
            total = total * old + part * new
            base = higher
        at = (token * heads + head)[:, None] * C + column[None, :]
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty))
