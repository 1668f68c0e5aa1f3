"""The lightning indexer over stored FP4 keys: scores of all keys for a few queries, and the exact top-k of them.

I_i = sum_h w_h relu(q_h . k_i) (tech report section 2.3; V3.2 for the form). A key is uint8 [68] for 128 dimensions: 64 bytes
of two e2m1 codes each, the lower nibble for the even dimension, then 4 scale bytes (e8m0), one for 32 dimensions. Among
equal scores the lowest index wins. The result is sorted by index, so that attention adds its rows in the same order
whichever way they were found.

The selection is exact and needs few passes: while scoring, the maximum of each group of neighbouring keys is kept. The k-th
largest of these maxima is a lower bound of the k-th largest score, which few scores reach (about 600 of 262,144 for k = 512);
those become candidates, and radix rounds over them settle the rest, ties by their index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nautile.kernels import index_scores
from nautile.kernels.fp4_pairs import FP4_PAIRS
from nautile.quant import mxfp4

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["Kernel", "Paging", "index_scores_reference", "index_select", "index_select_reference"]

Kernel = Literal["auto", "portable", "warpgroup", "many"]

_TILE = 4096  # scores a program looks at in the selection, and the largest k
_BLOCK = 128  # keys of a tile
_TALL, _QUERIES = 128, 64  # keys of a tile that stays while queries pass, and how many do


@dataclass(frozen=True)
class Paging:
    """Where entries lie: entry i of sequence t is row ``table[t, i // per] * stride + i % per``. table int64 [T, blocks]."""

    table: Tensor
    per: int
    stride: int

    def rows(self, entry: Tensor) -> Tensor:
        """int32 [T, k] numbers of entries -> their rows; -1 stays -1."""
        number = entry.clamp_min(0).long()
        rows = self.table.gather(1, number // self.per) * self.stride + number % self.per
        return rows.masked_fill(entry < 0, -1).to(torch.int32)


def index_scores_reference(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The meaning: q [T, H, ci], weights [T, H], keys uint8 [n, ci / 2 + ci / 32], or [T, n, ...] where every query has keys
    of its own -> scores [T, n] in float64."""
    half = q.shape[-1] // 2
    scales = keys[..., half:].contiguous().view(torch.float8_e8m0fnu)
    values = mxfp4.decode(keys[..., :half].contiguous(), scales).double()
    each = "thc,tnc->thn" if keys.dim() == 3 else "thc,nc->thn"
    return torch.einsum("thn,th->tn", torch.einsum(each, q.double(), values).relu(), weights.double())


def index_select_reference(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best of the first visible[t] scores of each row [T, n], ties to the lowest index: int32 [T, k], sorted by index,
    the rest -1 where fewer are visible."""
    out = torch.full((scores.shape[0], k), -1, dtype=torch.int32, device=scores.device)
    for row, count in enumerate(visible.tolist()):
        best = scores[row, :count].sort(descending=True, stable=True).indices[:k].sort().values
        out[row, : len(best)] = best.to(torch.int32)
    return out


def _group(count: int) -> int:
    """Keys under one maximum: at least 2,048 groups where there are that many keys, which keeps the bound close."""
    return 1 << max(0, min(7, (max(count, 1) // 2048).bit_length() - 1))


def index_select(
    q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int, *,
    kernel: Kernel = "auto", paging: Paging | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scores float32 [T, n] and the selection int32 [T, k] of ``index_select_reference``, in Triton.

    Args: q [T, H, ci] bfloat16 or float32 whose values lie on the FP4 grid (products are exact then), weights [T, H] float32,
    keys uint8 [n, ci / 2 + ci / 32], or [T, n, ...] where every query has keys of its own, visible [T] int32. ci is 128;
    scores of invisible keys are not written; k is at most 4,096. ``kernel`` "auto" scores with ``index_scores`` where it
    runs, else with Triton's "portable" kernel; "warpgroup" is the former with Hopper's own matrix instruction; "many" decodes
    a tile of keys once for many queries of the same keys (prompts). With ``paging`` the selection comes as rows, in the order
    of the entries.
    Raises ValueError for shapes the kernel does not take, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("index_select needs Triton; the reference functions are the same in plain PyTorch")
    tokens, heads, ci = q.shape
    if heads < 16 or heads & (heads - 1) or ci != 128 or not 0 < k <= _TILE or keys.shape[-1] != 68:
        raise ValueError(f"{heads} heads must be a power of two of at least 16, ci={ci} 128, k={k} at most {_TILE}")
    count = keys.shape[-2]
    stride = count * 17 if keys.dim() == 3 else 0  # words from one query's keys to the next one's
    group = _group(count)
    maxima = triton.next_power_of_2(max(16, triton.cdiv(count, group)))
    scores = torch.empty(tokens, count, dtype=torch.float32, device=q.device)
    best = torch.empty(tokens, maxima, dtype=torch.float32, device=q.device)
    found = torch.empty(tokens, 2 * count + 1, dtype=torch.int32, device=q.device)  # keys, indices, how many
    taken = torch.empty(tokens, k, dtype=torch.int32, device=q.device)
    pdl = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    q, weights, visible, keys = (
        q.contiguous(),
        weights.contiguous(),
        visible.to(torch.int32),
        keys.contiguous().view(torch.int32),
    )
    if kernel == "many":
        if stride:
            raise ValueError('queries with keys of their own share nothing that kernel="many" could save: use "auto"')
        tiles = triton.cdiv(count, _TALL)
        together = max(1, min(_QUERIES, triton.cdiv(tokens * tiles, 2 * 132)))
        _many_kernel[(tiles, triton.cdiv(tokens, together))](
            q, weights, keys, visible, scores, best, found, count, maxima, tokens, together,
            HEADS=heads, BLOCK=_TALL, GROUP=group, ASM=q.is_cuda, num_warps=8, num_stages=3,
        )  # fmt: skip
    elif kernel != "portable" and index_scores.fits(q):
        programs = max(1, min(triton.cdiv(count, _BLOCK), triton.cdiv(132, tokens)))
        index_scores.launch(
            q, weights, keys, visible, scores, best, found, (group, programs, stride), warpgroup=kernel == "warpgroup"
        )
    else:
        tiles = triton.cdiv(count, _BLOCK)
        per = max(1, triton.cdiv(tiles * tokens, 3 * 132))
        _score_kernel[(triton.cdiv(tiles, per), tokens)](
            q, weights, keys, visible, scores, best, found, count, per, maxima, stride,
            HEADS=heads, BLOCK=_BLOCK, GROUP=group, ASM=q.is_cuda, PDL=pdl, num_warps=4, num_stages=3,
        )  # fmt: skip
    _collect_kernel[(triton.cdiv(count, _TILE), tokens)](
        scores, best, visible, found, count, k,
        MAXIMA=maxima, GROUP=group, TILE=_TILE, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    table, blocks, per, rows = (paging.table, paging.table.shape[1], paging.per, paging.stride) if paging else (taken, 0, 1, 0)
    _settle_kernel[(tokens,)](
        found, taken, table, count, k, blocks, per, rows, TILE=1024, K=triton.next_power_of_2(k), PAGED=paging is not None,
        PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return scores, taken


if triton is not None:
    _DECODE = tl.constexpr(FP4_PAIRS)

    @triton.jit
    def _order(scores):
        """float32 -> uint32 of the same order."""
        bits = scores.to(tl.uint32, bitcast=True)
        return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)

    @triton.jit
    def _code(words, shift: tl.constexpr, power, DTYPE: tl.constexpr):
        """The 4-bit codes at ``shift`` of each word, times a scale that brings 2^126 with it."""
        code = (words >> shift) & 15
        return ((((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * power).to(DTYPE)

    @triton.jit
    def _decoded(words, power, ASM: tl.constexpr, DTYPE: tl.constexpr):
        """int32 words of eight codes [N, W] and the exponents of their scales -> eight [N, W], one for each code, exact."""
        if ASM:
            scale = (power << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
            return tl.inline_asm_elementwise(
                _DECODE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [words, scale],
                dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
        scale = (power << 23).to(tl.float32, bitcast=True)
        return (
            _code(words, 0, scale, DTYPE), _code(words, 4, scale, DTYPE), _code(words, 8, scale, DTYPE),
            _code(words, 12, scale, DTYPE), _code(words, 16, scale, DTYPE), _code(words, 20, scale, DTYPE),
            _code(words, 24, scale, DTYPE), _code(words, 28, scale, DTYPE),
        )  # fmt: skip

    @triton.jit
    def _score_kernel(
        q, weights, keys, visible, scores, best, found, count, per, maxima, stride,
        HEADS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """``per`` tiles of BLOCK keys for one query: their scores and the maximum of every GROUP of them."""
        token = tl.program_id(1).to(tl.int64)
        head, word = tl.arange(0, HEADS), tl.arange(0, 16)
        if tl.program_id(0) == 0:
            tl.store(found + token * (2 * count + 1) + 2 * count, 0)
        place = q + token * HEADS * 128 + head[None, :] * 128 + 8 * word[:, None]
        q0, q1, q2, q3 = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
        q4, q5, q6, q7 = tl.load(place + 4), tl.load(place + 5), tl.load(place + 6), tl.load(place + 7)
        weight = tl.load(weights + token * HEADS + head)
        seen = tl.load(visible + token)
        lane = tl.arange(0, BLOCK // GROUP)
        first = tl.program_id(0) * per
        for tile in range(first, tl.minimum(first + per, (seen + BLOCK - 1) // BLOCK)):
            key = tile * BLOCK + tl.arange(0, BLOCK)
            live = key < seen
            start = keys + token * stride + key.to(tl.int64) * 17
            words = tl.load(start[:, None] + word[None, :], mask=live[:, None], other=0)
            scale = tl.load(start + 16, mask=live, other=0)
            power = tl.minimum(((scale[:, None] >> ((word // 4) * 8)[None, :]) & 255) + 126, 254)  # 2^126 2^(scale - 127)
            k0, k1, k2, k3, k4, k5, k6, k7 = _decoded(words, power, ASM, q.dtype.element_ty)
            products = tl.dot(k0, q0, input_precision="ieee")
            products = tl.dot(k1, q1, products, input_precision="ieee")
            products = tl.dot(k2, q2, products, input_precision="ieee")
            products = tl.dot(k3, q3, products, input_precision="ieee")
            products = tl.dot(k4, q4, products, input_precision="ieee")
            products = tl.dot(k5, q5, products, input_precision="ieee")
            products = tl.dot(k6, q6, products, input_precision="ieee")
            products = tl.dot(k7, q7, products, input_precision="ieee")
            total = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
            total = tl.where(total == 0, 0.0, total)  # minus zero is zero: they are equal and must tie
            tl.store(scores + token * count + key, total, mask=live)
            highest = tl.max(tl.reshape(tl.where(live, total, float("-inf")), (BLOCK // GROUP, GROUP)), axis=1)
            at = tile * (BLOCK // GROUP) + lane
            tl.store(best + token * maxima + at, highest, mask=at < maxima)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _tile(keys, key, live, ASM: tl.constexpr, DTYPE: tl.constexpr):
        """Keys [N] as numbers [N, 128], dimensions in order."""
        word = tl.arange(0, 16)
        start = keys + key.to(tl.int64) * 17
        words = tl.load(start[:, None] + word[None, :], mask=live[:, None], other=0)
        scale = tl.load(start + 16, mask=live, other=0)
        power = tl.minimum(((scale[:, None] >> ((word // 4) * 8)[None, :]) & 255) + 126, 254)
        k0, k1, k2, k3, k4, k5, k6, k7 = _decoded(words, power, ASM, DTYPE)
        even = tl.join(tl.join(k0, k4), tl.join(k2, k6))
        odd = tl.join(tl.join(k1, k5), tl.join(k3, k7))
        return tl.reshape(tl.join(even, odd), (key.shape[0], 128))

    @triton.jit
    def _many_kernel(
        q, weights, keys, visible, scores, best, found, count, maxima, tokens, together,
        HEADS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """One tile of BLOCK keys for ``together`` queries, one after the other; the decoded keys stay where the products want
        them."""
        head, column, lane = tl.arange(0, HEADS), tl.arange(0, 128), tl.arange(0, BLOCK // GROUP)
        key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tile = _tile(keys, key, key < count, ASM, q.dtype.element_ty)
        at = tl.program_id(0) * (BLOCK // GROUP) + lane
        first = tl.program_id(1) * together
        for number in range(first, tl.minimum(first + together, tokens)):
            token = tl.cast(number, tl.int64)
            query = tl.load(q + token * HEADS * 128 + head[None, :] * 128 + column[:, None])
            weight = tl.load(weights + token * HEADS + head)
            live = key < tl.load(visible + token)
            products = tl.dot(tile, query, input_precision="ieee")
            total = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
            total = tl.where(total == 0, 0.0, total)  # minus zero is zero: they are equal and must tie
            tl.store(scores + token * count + key, total, mask=live)
            highest = tl.max(tl.reshape(tl.where(live, total, float("-inf")), (BLOCK // GROUP, GROUP)), axis=1)
            tl.store(best + token * maxima + at, highest, mask=at < maxima)
            if tl.program_id(0) == 0:
                tl.store(found + token * (2 * count + 1) + 2 * count, 0)

    @triton.jit
    def _threshold(histogram, k, BINS: tl.constexpr):
        """The bin that holds the k-th largest (0 if there are fewer) and how many lie in bins above it."""
        bin_ = tl.arange(0, BINS)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # in bins above each
        border = tl.maximum(tl.max(tl.where(above + histogram >= k, bin_, -1), axis=0), 0)
        return border, tl.sum(tl.where(bin_ > border, histogram, 0), axis=0)

    @triton.jit
    def _digit(keys, shift: tl.constexpr, prefix, live):
        """How often each value of the 8 bits at ``shift`` occurs among keys whose higher bits are the prefix's."""
        inside = live
        if shift < 24:
            inside = live & ((keys >> (shift + 8)) == (prefix >> (shift + 8)))
        return tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=inside)

    @triton.jit
    def _append(keys, index, chosen, room, own, count):
        """Write the chosen keys and indices behind those that are there, in any order."""
        number = chosen.to(tl.int32)
        first = tl.atomic_add(own + 2 * count, tl.sum(number, axis=0), sem="relaxed")
        place = first + tl.cumsum(number, axis=0) - number
        tl.store(own + place, keys.to(tl.int32, bitcast=True), mask=chosen & (place < room))
        tl.store(own + count + place, index, mask=chosen & (place < room))

    @triton.jit
    def _collect_kernel(
        scores, best, visible, found, count, k,
        MAXIMA: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Scores that reach the k-th largest maximum (its upper 16 bits) become candidates."""
        if PDL:
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(1).to(tl.int64)
        seen = tl.load(visible + token)
        if tl.program_id(0) * TILE < seen:
            place = tl.program_id(0) * TILE + tl.arange(0, TILE)
            live = place < seen
            keys = _order(tl.load(scores + token * count + place, mask=live, other=0.0))
            lane = tl.arange(0, MAXIMA)
            there = lane < (seen + GROUP - 1) // GROUP
            highest = _order(tl.load(best + token * MAXIMA + lane, mask=there, other=0.0))
            upper, above = _threshold(_digit(highest, 24, 0, there), k, 256)
            bound = upper.to(tl.uint32) << 24
            lower, above = _threshold(_digit(highest, 16, bound, there), k - above, 256)
            bound = bound | (lower.to(tl.uint32) << 16)
            _append(keys, place, live & (keys >= bound), count, found + token * (2 * count + 1), count)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _narrow(values, number, prefix, missing, shift: tl.constexpr, TILE: tl.constexpr):
        """Settle 8 more bits of the smallest chosen value: returns it, how many are missing among those that share it, and
        how many those are."""
        histogram = tl.zeros((256,), tl.int32)
        for first in range(0, number, TILE):
            place = first + tl.arange(0, TILE)
            keys = tl.load(values + place, mask=place < number, other=0).to(tl.uint32, bitcast=True)
            histogram += _digit(keys, shift, prefix, place < number)
        border, above = _threshold(histogram, missing, 256)
        share = tl.sum(tl.where(tl.arange(0, 256) == border, histogram, 0), axis=0)
        return prefix | (border.to(tl.uint32) << shift), missing - above, share

    @triton.jit
    def _narrow_tied(own, count, number, tied, prefix, missing, shift: tl.constexpr, TILE: tl.constexpr):
        """``_narrow`` for the inverted indices of the candidates whose key is ``tied``."""
        histogram = tl.zeros((256,), tl.int32)
        for first in range(0, number, TILE):
            place = first + tl.arange(0, TILE)
            live = place < number
            keys = tl.load(own + place, mask=live, other=0).to(tl.uint32, bitcast=True)
            index = tl.load(own + count + place, mask=live, other=0).to(tl.uint32, bitcast=True) ^ 0xFFFFFFFF
            histogram += _digit(index, shift, prefix, live & (keys == tied))
        border, above = _threshold(histogram, missing, 256)
        return prefix | (border.to(tl.uint32) << shift), missing - above

    @triton.jit
    def _settle_kernel(
        found, taken, table, count, k, blocks, per, stride,
        TILE: tl.constexpr, K: tl.constexpr, PAGED: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Choose k of the candidates and sort them by index; PAGED: then say in which row each lies."""
        if PDL:
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        own = found + token * (2 * count + 1)
        number = tl.load(own + 2 * count)
        wanted = tl.minimum(k, number)
        smallest = tl.zeros(
            (), tl.uint32
        )  # keys above it are chosen, and those equal to it whose inverted index reaches ``last``
        last = tl.zeros((), tl.uint32)
        if number > k:
            smallest, missing, share = _narrow(own, number, smallest, wanted, 24, TILE)
            smallest, missing, share = _narrow(own, number, smallest, missing, 16, TILE)
            smallest, missing, share = _narrow(own, number, smallest, missing, 8, TILE)
            smallest, missing, share = _narrow(own, number, smallest, missing, 0, TILE)
            if share > missing:
                last, missing = _narrow_tied(own, count, number, smallest, last, missing, 24, TILE)
                last, missing = _narrow_tied(own, count, number, smallest, last, missing, 16, TILE)
                last, missing = _narrow_tied(own, count, number, smallest, last, missing, 8, TILE)
                last, missing = _narrow_tied(own, count, number, smallest, last, missing, 0, TILE)
        written = 0
        for first in range(0, number, TILE):
            place = first + tl.arange(0, TILE)
            live = place < number
            keys = tl.load(own + place, mask=live, other=0).to(tl.uint32, bitcast=True)
            index = tl.load(own + count + place, mask=live, other=0)
            tied = (keys == smallest) & ((index.to(tl.uint32, bitcast=True) ^ 0xFFFFFFFF) >= last)
            chosen = live & ((keys > smallest) | tied)
            offset = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(taken + token * k + written + offset, index, mask=chosen)
            written += tl.sum(chosen.to(tl.int32), axis=0)
        tl.debug_barrier()
        lane = tl.arange(0, K)
        chosen = tl.sort(tl.load(taken + token * k + lane, mask=lane < wanted, other=0x7FFFFFFF))
        tl.debug_barrier()
        there = chosen != 0x7FFFFFFF
        if PAGED:
            block = tl.load(table + token * blocks + chosen // per, mask=there, other=0)
            chosen = (block * stride + chosen % per).to(tl.int32)
        tl.store(taken + token * k + lane, tl.where(there, chosen, -1), mask=lane < k)
