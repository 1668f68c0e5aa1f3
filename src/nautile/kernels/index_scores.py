"""Scores of the lightning indexer for single queries, in Gluon: keys go from memory into operand registers.

``index_select`` says what it computes and calls it for decode. As in ``few_experts`` a thread loads words of eight codes where
the matrix instruction wants them and unpacks them to eight operands; the query's operands stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautile.kernels.fp4_pairs import FP4_PAIRS

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import ampere, hopper
except ImportError:  # CPU-only installations have no Triton, older versions no Gluon
    gluon = None

__all__ = ["WARPS", "fits", "launch"]

WARPS = 8  # of a program; a tile is 16 keys for each


def fits(q: Tensor) -> bool:
    """Whether the kernel runs here: bfloat16 queries on a GPU that has its matrix instruction."""
    return (
        gluon is not None and q.is_cuda and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def launch(
    q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, scores: Tensor, best: Tensor, found: Tensor,
    sizes: tuple[int, int, int], *, warps: int = WARPS, warpgroup: bool = False,
) -> None:  # fmt: skip
    """Fill ``scores`` [T, n], ``best`` [T, maxima] and clear the counters in ``found``. keys int32 [n, 17] or [T, n, 17];
    ``sizes``: keys under one maximum, programs that share the keys of a query, words between two queries' keys.
    ``warpgroup`` takes sm_90's own matrix instruction, raising ValueError elsewhere."""
    (tokens, heads, _), (group, programs, stride) = q.shape, sizes
    capability = torch.cuda.get_device_capability(q.device)
    if warpgroup and capability != (9, 0):
        raise ValueError(f"sm_{capability[0]}{capability[1]} has no warpgroup instruction of sm_90")
    _score_kernel[(programs, tokens)](
        q, weights, keys, visible, scores, best, found, scores.shape[1], best.shape[1], stride,
        HEADS=heads, GROUP=group, HOPPER=warpgroup, PDL=capability >= (9, 0), num_warps=warps,
    )  # fmt: skip


if gluon is not None:
    _DECODE = gl.constexpr(FP4_PAIRS)

    @gluon.jit
    def _packed(keys, tile, seen, BLOCK: gl.constexpr, L: gl.constexpr):
        """The words of a tile's keys and their scales."""
        key = tile * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, L))
        live = (key < seen)[:, None]
        row = keys + key.to(gl.int64)[:, None] * 17
        word = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
        codes = gl.load(row + word, mask=live & (word >= 0), other=0)
        return codes, gl.load(row + 16, mask=live, other=0)

    @gluon.jit
    def _products(codes, scale, q, acc, HOPPER: gl.constexpr, L: gl.constexpr):
        """Products of a tile's keys with all heads."""
        word = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
        power = (scale >> ((word // 4) * 8)) & 255
        power = gl.minimum(power + 126, 254) * 0x00800080
        k = gl.inline_asm_elementwise(
            _DECODE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [codes, power], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2
        )
        if HOPPER:
            for j in gl.static_range(8):
                acc = hopper.warpgroup_mma(k[j], q.index(j).permute([1, 0]), acc, use_acc=j > 0, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc, k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]])[0]
        else:
            for j in gl.static_range(8):
                acc = ampere.mma_v2(k[j], q[j], acc)
        return acc

    @gluon.jit
    def _queries(q, HEADS: gl.constexpr, HOPPER: gl.constexpr, L: gl.constexpr):
        """The query's eight operands: in shared memory for Hopper's instruction, else in registers."""
        if HOPPER:
            S: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [gl.num_warps(), 1], [1, 0])
            head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, S))[:, None]
            word = gl.arange(0, 16, layout=gl.SliceLayout(0, S))[None, :]
            queries = gl.allocate_shared_memory(gl.bfloat16, [8, HEADS, 16], gl.NVMMASharedLayout(32, 16, 2))
            for j in gl.static_range(8):
                queries.index(j).store(gl.load(q + head * 128 + word * 8 + j))
            hopper.fence_async_shared()
        else:
            word = gl.arange(0, 16, layout=gl.SliceLayout(1, L))[:, None]
            head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, L))[None, :]
            at = q + head * 128 + word * 8
            queries = (
                gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
                gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7),
            )  # fmt: skip
        return queries

    @gluon.jit
    def _score_kernel(
        q, weights, keys, visible, scores, best, found, count, maxima, stride,
        HEADS: gl.constexpr, GROUP: gl.constexpr, HOPPER: gl.constexpr, PDL: gl.constexpr,
    ):  # fmt: skip
        """Every n-th tile of one query's keys: their scores and the maximum of every GROUP of them."""
        M: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0] if HOPPER else [2, 0], [gl.num_warps(), 1], [16, HEADS, 16] if HOPPER else [16, 8]
        )
        A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
        BLOCK: gl.constexpr = 16 * gl.num_warps()
        token = gl.program_id(1).to(gl.int64)
        if gl.program_id(0) == 0:
            gl.store(found + token * (2 * count + 1) + 2 * count, 0)
        keys += token * stride
        queries = _queries(q + token * HEADS * 128, HEADS, HOPPER, B)
        head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, M))
        weight = gl.load(weights + token * HEADS + head)[None, :]
        seen = gl.load(visible + token)
        tiles = (seen + BLOCK - 1) // BLOCK
        step = gl.num_programs(0)
        codes, scale = _packed(keys, gl.program_id(0), seen, BLOCK, A)
        zero = gl.full([BLOCK, HEADS], 0.0, gl.float32, layout=M)
        for tile in range(gl.program_id(0), tiles, step):
            later, power = _packed(keys, tile + step, seen, BLOCK, A)
            products = _products(codes, scale, queries, zero, HOPPER, A)
            total = gl.sum(gl.maximum(products, 0.0) * weight, axis=1)
            total = gl.where(total == 0, 0.0, total)  # minus zero is zero: they are equal and must tie
            key = tile * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, M))
            gl.store(scores + token * count + key, total, mask=key < seen)
            highest = gl.max(gl.reshape(gl.where(key < seen, total, float("-inf")), [BLOCK // GROUP, GROUP]), axis=1)
            lane = gl.arange(0, BLOCK // GROUP, layout=highest.type.layout)
            place = tile * (BLOCK // GROUP) + lane
            gl.store(best + token * maxima + place, highest, mask=place < maxima)
            codes, scale = later, power
        if PDL:
            gl.inline_asm_elementwise(
                "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
