"""The lightning indexer over stored FP4 keys: scores of all keys for a few queries, and the exact top-k of them.

I_i = sum_h w_h relu(q_h . k_i) (tech report section 2.3; V3.2 for the form). A key is uint8 [68] for 128 dimensions: 64 bytes
of two e2m1 codes each, the lower nibble for the even dimension, then 4 scale bytes (e8m0), one for 32 dimensions. Among
equal scores the lowest index wins. The result is sorted by index, so that attention adds its rows in the same order
whichever way they were found.

The selection is by radix: a histogram of the upper 11 bits of all scores names the bin in which the k-th one lies; what is
above is taken, and the candidates in that bin are settled 11 bits at a time, their index last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautile.quant import mxfp4

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["index_scores_reference", "index_select", "index_select_reference"]

_BINS = 2048
_TILE = 4096  # scores a program looks at in the selection


def index_scores_reference(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The meaning: q [T, H, ci], weights [T, H], keys uint8 [n, ci / 2 + ci / 32] -> scores [T, n] in float64."""
    half = q.shape[-1] // 2
    scales = keys[:, half:].contiguous().view(torch.float8_e8m0fnu)
    values = mxfp4.decode(keys[:, :half].contiguous(), scales).double()
    return torch.einsum("thn,th->tn", torch.einsum("thc,nc->thn", q.double(), values).relu(), weights.double())


def index_select_reference(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best of the first visible[t] scores of each row [T, n], ties to the lowest index: int32 [T, k], sorted by index,
    the rest -1 where fewer are visible."""
    out = torch.full((scores.shape[0], k), -1, dtype=torch.int32, device=scores.device)
    for row, count in enumerate(visible.tolist()):
        best = scores[row, :count].sort(descending=True, stable=True).indices[:k].sort().values
        out[row, : len(best)] = best.to(torch.int32)
    return out


def index_select(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores float32 [T, n] and the selection int32 [T, k] of ``index_select_reference``, in Triton.

    Args: q [T, H, ci] bfloat16 or float32 whose values lie on the FP4 grid (products are exact then), weights [T, H] float32,
    keys uint8 [n, ci / 2 + ci / 32] contiguous, visible [T] int32. Scores of invisible keys are not written; k is at most
    4,096.
    Raises ValueError for shapes the kernel does not take, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("index_select needs Triton; the reference functions are the same in plain PyTorch")
    tokens, heads, ci = q.shape
    if heads < 16 or heads & (heads - 1) or ci & (ci - 1) or not 0 < k <= _TILE or keys.shape[1] != ci // 2 + ci // 32:
        raise ValueError(f"{heads} heads (16 or more) and ci={ci} must be powers of two, k={k} at most {_TILE}")
    count = keys.shape[0]
    scores = torch.empty(tokens, count, dtype=torch.float32, device=q.device)
    counts = torch.empty(tokens, _BINS + 2, dtype=torch.int32, device=q.device)  # histogram, taken, candidates
    taken = torch.empty(tokens, k, dtype=torch.int32, device=q.device)
    candidates = torch.empty(tokens, count, dtype=torch.int32, device=q.device)
    tiles, parts = triton.cdiv(count, 128), triton.cdiv(count, _TILE)
    per = max(1, triton.cdiv(tiles * tokens, 4 * 132))
    q, weights, visible = q.contiguous(), weights.contiguous(), visible.to(torch.int32)
    _score_kernel[(triton.cdiv(tiles, per), tokens)](
        q, weights, keys, visible, scores, counts, count, per,
        HEADS=heads, HALF=ci // 2, BLOCK=128, BINS=_BINS, num_warps=4, num_stages=3,
    )  # fmt: skip
    _histogram_kernel[(parts, tokens)](scores, visible, counts, count, BINS=_BINS, TILE=_TILE, num_warps=8)
    _split_kernel[(parts, tokens)](scores, visible, counts, taken, candidates, count, k, BINS=_BINS, TILE=_TILE, num_warps=8)
    _settle_kernel[(tokens,)](
        scores, counts, taken, candidates, count, k, BINS=_BINS, TILE=1024, K=triton.next_power_of_2(k), num_warps=8
    )
    return scores, taken


if triton is not None:

    @triton.jit
    def _order(scores):
        """float32 -> int64 in 0 .. 2^32 - 1 of the same order."""
        bits = scores.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)

    @triton.jit
    def _from_e2m1(codes, power):
        """4-bit codes times 2^126 times a scale: the code's exponent and mantissa, moved into a float32, are value / 2^126."""
        moved = ((codes & 8) << 28) | ((codes & 7) << 22)
        return moved.to(tl.float32, bitcast=True) * power

    @triton.jit
    def _score_kernel(
        q, weights, keys, visible, scores, counts, count, per,
        HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    ):  # fmt: skip
        """``per`` tiles of BLOCK keys for one query. The first program of a query clears its counters."""
        token = tl.program_id(1).to(tl.int64)
        head, byte = tl.arange(0, HEADS), tl.arange(0, HALF)
        group = tl.arange(0, HALF // 16)
        if tl.program_id(0) == 0:
            tl.store(counts + token * (BINS + 2) + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
            tl.store(counts + token * (BINS + 2) + BINS + tl.arange(0, 2), tl.zeros((2,), tl.int32))
        place = token * HEADS * 2 * HALF + head[None, :] * (2 * HALF) + 2 * byte[:, None]
        even, odd = tl.load(q + place), tl.load(q + place + 1)
        weight = tl.load(weights + token * HEADS + head)
        seen = tl.load(visible + token)
        for step in range(per):
            key = (tl.program_id(0) * per + step) * BLOCK + tl.arange(0, BLOCK)
            live = key < seen
            start = key.to(tl.int64) * (HALF + HALF // 16)
            codes = tl.load(keys + start[:, None] + byte[None, :], mask=live[:, None], other=0).to(tl.int32)
            scale = tl.load(keys + start[:, None] + HALF + group[None, :], mask=live[:, None], other=127).to(tl.int32)
            # 2^126 * 2^(scale - 127) in one float32, exact for scale 1 .. 254
            power = (tl.minimum(scale + 126, 254) << 23).to(tl.float32, bitcast=True)
            power = tl.reshape(tl.broadcast_to(power[:, :, None], (BLOCK, HALF // 16, 16)), (BLOCK, HALF))
            low = _from_e2m1(codes & 15, power).to(q.dtype.element_ty)
            high = _from_e2m1(codes >> 4, power).to(q.dtype.element_ty)
            products = tl.dot(low, even, input_precision="ieee")
            products = tl.dot(high, odd, products, input_precision="ieee")
            total = tl.sum(tl.maximum(products, 0.0) * weight[None, :], axis=1)
            total = tl.where(total == 0, 0.0, total)  # minus zero is zero: they are equal and must tie
            tl.store(scores + token * count + key, total, mask=live)

    @triton.jit
    def _histogram_kernel(scores, visible, counts, count, BINS: tl.constexpr, TILE: tl.constexpr):
        """How many of TILE scores fall into each bin of their upper 11 bits, added to the query's histogram."""
        token = tl.program_id(1).to(tl.int64)
        place = tl.program_id(0) * TILE + tl.arange(0, TILE)
        seen = tl.load(visible + token)
        if tl.program_id(0) * TILE < seen:
            live = place < seen
            bins = (_order(tl.load(scores + token * count + place, mask=live, other=0.0)) >> 21).to(tl.int32)
            found = tl.histogram(bins, BINS, mask=live)
            bin_ = tl.arange(0, BINS)
            tl.atomic_add(counts + token * (BINS + 2) + bin_, found, mask=found > 0, sem="relaxed")

    @triton.jit
    def _threshold(histogram, k, BINS: tl.constexpr):
        """The bin that holds the k-th largest, and how many lie in bins above it; bin -1 when there are fewer than k."""
        bin_ = tl.arange(0, BINS)
        above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # in bins above each
        fits = above + histogram >= k
        border = tl.max(tl.where(fits, bin_, -1), axis=0)
        return border, tl.sum(tl.where(bin_ > border, histogram, 0), axis=0)

    @triton.jit
    def _append(values, chosen, target, counter, room):
        """Write the chosen values behind each other from where ``counter`` stands."""
        number = chosen.to(tl.int32)
        first = tl.atomic_add(counter, tl.sum(number, axis=0), sem="relaxed")
        place = first + tl.cumsum(number, axis=0) - number
        tl.store(target + place, values, mask=chosen & (place < room))

    @triton.jit
    def _split_kernel(
        scores, visible, counts, taken, candidates, count, k, BINS: tl.constexpr, TILE: tl.constexpr
    ):  # fmt: skip
        """What lies above the border bin is taken, what lies in it is a candidate."""
        token = tl.program_id(1).to(tl.int64)
        seen = tl.load(visible + token)
        if tl.program_id(0) * TILE < seen:
            own = counts + token * (BINS + 2)
            border, _ = _threshold(tl.load(own + tl.arange(0, BINS)), k, BINS)
            place = tl.program_id(0) * TILE + tl.arange(0, TILE)
            live = place < seen
            bins = (_order(tl.load(scores + token * count + place, mask=live, other=0.0)) >> 21).to(tl.int32)
            _append(place, live & (bins > border), taken + token * k, own + BINS, k)
            _append(place, live & (bins == border), candidates + token * count, own + BINS + 1, count)

    @triton.jit
    def _key(scores, index):
        """55 bits in which candidates of one bin differ: the lower 21 of the score, 32 of the inverted index, two zeros."""
        return ((_order(scores) & 0x1FFFFF) << 34) | ((0xFFFFFFFF - index.to(tl.int64)) << 2)

    @triton.jit
    def _narrow(scores, candidates, number, lowest, missing, shift, BINS: tl.constexpr, TILE: tl.constexpr):
        """Settle 11 more bits of the smallest chosen key: returns it and how many are missing among those that share it."""
        histogram = tl.zeros((BINS,), tl.int32)
        for first in range(0, number, TILE):
            place = first + tl.arange(0, TILE)
            index = tl.load(candidates + place, mask=place < number, other=0)
            key = _key(tl.load(scores + index), index)
            inside = (place < number) & ((key >> (shift + 11)) == (lowest >> (shift + 11)))
            histogram += tl.histogram(((key >> shift) & 0x7FF).to(tl.int32), BINS, mask=inside)
        border, above = _threshold(histogram, missing, BINS)
        return lowest | (border.to(tl.int64) << shift), missing - above

    @triton.jit
    def _settle_kernel(
        scores, counts, taken, candidates, count, k, BINS: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr
    ):  # fmt: skip
        """Choose the rest from the candidates, whose keys are all different, and sort the whole selection by index."""
        token = tl.program_id(0).to(tl.int64)
        own = counts + token * (BINS + 2)
        already = tl.load(own + BINS)
        number = tl.load(own + BINS + 1)
        wanted = tl.minimum(k - already, number)
        own_scores, own_candidates = scores + token * count, candidates + token * count
        if wanted > 0:
            lowest = tl.zeros((), tl.int64)  # keys from here on are chosen, as far as the digits so far say
            missing = wanted
            for digit in range(5):
                lowest, missing = _narrow(own_scores, own_candidates, number, lowest, missing, 44 - 11 * digit, BINS, TILE)
            for first in range(0, number, TILE):
                place = first + tl.arange(0, TILE)
                index = tl.load(own_candidates + place, mask=place < number, other=0)
                key = _key(tl.load(own_scores + index), index)
                _append(index, (place < number) & (key >= lowest), taken + token * k, own + BINS, k)
        tl.debug_barrier()
        lane = tl.arange(0, K)
        have = already + wanted
        chosen = tl.load(taken + token * k + lane, mask=lane < tl.minimum(have, k), other=0x7FFFFFFF)
        chosen = tl.sort(chosen)
        tl.store(taken + token * k + lane, tl.where(chosen == 0x7FFFFFFF, -1, chosen), mask=lane < k)
