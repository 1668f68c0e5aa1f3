"""Routed experts for a few tokens, in Gluon: packed weights go from memory into the tensor cores' operand registers.

``fp4_experts`` says what it computes and calls it for decode. Reading the weights once is the floor, and unpacking them costs
almost as much time as reading them, so nothing else may be done per weight: no shared memory, no layout change. A thread loads
words of eight codes where the matrix instruction wants them and unpacks them to eight operands, operand j being code j of
every word; activations are turned to match.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautile.kernels.fp4_pairs import FP4_PAIRS

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import ampere
except ImportError:  # CPU-only installations have no Triton, older versions no Gluon
    gluon = None

__all__ = ["PAIRS", "fits", "launch"]

PAIRS = 8  # of a block: columns of the matrix instruction


def fits(x: Tensor) -> bool:
    """Whether the kernels run here: bfloat16 activations on a GPU that has their matrix instruction."""
    return (
        gluon is not None and x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def launch(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], shares: Tensor, table: tuple[Tensor, ...],
    top: int, limit: float, parts: Tensor, sizes: tuple[int, int, int, int], direct: bool,
) -> None:  # fmt: skip
    """Fill ``parts`` float32 [T k, d]: what each (token, expert) pair adds.

    x [T, d]; ``weights`` w1, s1, w3, s3, w2, s2; ``shares`` float32 [T, k]; ``table`` the pair, expert, first and count of
    ``ExpertBlocks``, or with ``direct`` four times the experts of a single token; ``sizes`` warps, words of a step of the
    first and of the second product, and in how many parts the inputs are cut, which other warps multiply (``direct`` only).
    With ``direct`` an expert whose share is zero is not read.
    """
    hidden, inner = weights[4].shape[1], weights[0].shape[1]
    middle = torch.empty(parts.shape[0], inner, dtype=x.dtype, device=x.device)
    w1, s1, w3, s3, w2, s2 = (part.view(torch.int32) for part in weights)
    warps, words, down_words, split = sizes
    blocks, rows = len(table[1]), 16 * warps // split
    pdl = torch.cuda.get_device_capability(x.device) >= (9, 0)
    options = {"ROWS": 16 * warps, "SPLIT": split, "ONE": direct, "PDL": pdl, "num_warps": warps, "launch_pdl": pdl}
    _gate_up_kernel[(inner // rows, blocks)](
        x.view(torch.int32),
        w1,
        s1,
        w3,
        s3,
        shares,
        middle,
        *table,
        inner,
        top,
        limit,
        HIDDEN=hidden,
        WORDS=words,
        **options,
    )
    _down_kernel[(hidden // rows, blocks)](
        middle.view(torch.int32), w2, s2, shares, parts, *table, hidden, INNER=inner, WORDS=down_words, **options
    )


if gluon is not None:
    _DECODE = gl.constexpr(FP4_PAIRS)

    # Eight activations of each of two words, as four pairs a word -> eight pairs, the pair j activation j of both words.
    _TURN = gl.constexpr("""
    prmt.b32 $0, $8, $9, 0x5410;
    prmt.b32 $1, $8, $9, 0x7632;
    prmt.b32 $2, $10, $11, 0x5410;
    prmt.b32 $3, $10, $11, 0x7632;
    prmt.b32 $4, $12, $13, 0x5410;
    prmt.b32 $5, $12, $13, 0x7632;
    prmt.b32 $6, $14, $15, 0x5410;
    prmt.b32 $7, $14, $15, 0x7632;
    """)

    @gluon.jit
    def _wait(PDL: gl.constexpr):
        """Until the kernel before has written what this one reads."""
        if PDL:
            gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def _release(PDL: gl.constexpr):
        """Let the next kernel's programs start."""
        if PDL:
            gl.inline_asm_elementwise(
                "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )

    @gluon.jit
    def _packed(weights, scales, line, start, WORDS: gl.constexpr, L: gl.constexpr):
        """WORDS words of codes of each line from word ``start`` on, and their words of four scales."""
        word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, L))[None, :]
        place = line[:, None]
        codes = gl.load(weights + place + start + word)
        scale = gl.load(scales + place // 16 + start // 16 + word // 16)
        return codes, scale

    @gluon.jit
    def _lines(first, WIDTH: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr, L: gl.constexpr):
        """Where each of ROWS lines of the tile begins: the rows from ``first`` on, then the same rows' next part, ..."""
        line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
        return (first + line % (ROWS // SPLIT)) * WIDTH + line // (ROWS // SPLIT) * (WIDTH // SPLIT)

    @gluon.jit
    def _inputs(x, live, start, WORDS: gl.constexpr, L: gl.constexpr):
        """The eight operands of the activations of words from ``start`` on; ``x`` points at the pairs' rows, as int32."""
        word = gl.arange(0, WORDS, layout=gl.SliceLayout(1, L))[:, None]
        at = x[None, :] + (start + word) * 4
        seen = live[None, :] & (word >= 0)
        return gl.inline_asm_elementwise(
            _TURN, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
            [gl.load(at, mask=seen, other=0), gl.load(at + 1, mask=seen, other=0),
             gl.load(at + 2, mask=seen, other=0), gl.load(at + 3, mask=seen, other=0)],
            dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip

    @gluon.jit
    def _added(acc, codes, scale, x, WORDS: gl.constexpr, L: gl.constexpr):
        """acc + weights times activations."""
        word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, L))[None, :]
        power = (scale >> (((word // 4) & 3) * 8)) & 255
        power = gl.minimum(power + 126, 254) * 0x00800080
        w = gl.inline_asm_elementwise(
            _DECODE, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [codes, power], dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2
        )
        for j in gl.static_range(8):
            acc = ampere.mma_v2(w[j], x[j], acc)
        return acc

    @gluon.jit
    def _gathered(acc, ROWS: gl.constexpr, SPLIT: gl.constexpr, M: gl.constexpr):
        """[ROWS, 8] of parts times parts -> sums over a row's own parts [ROWS / SPLIT]: line r is of part r / (ROWS / SPLIT),
        column n holds products with the activations of part n, and the others mean nothing."""
        part = gl.arange(0, ROWS, layout=gl.SliceLayout(1, M)) // (ROWS // SPLIT)
        column = gl.arange(0, 8, layout=gl.SliceLayout(0, M))
        own = gl.sum(gl.where(part[:, None] == column[None, :], acc, 0.0), axis=1)
        return gl.sum(gl.reshape(own, [SPLIT, ROWS // SPLIT]), axis=0)

    @gluon.jit
    def _activated(gate, up, limit):
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        return up * gate / (1.0 + gl.exp(-gate))

    @gluon.jit
    def _clear(target, SIZE: gl.constexpr):
        """SIZE zeros."""
        L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        gl.store(target + gl.arange(0, SIZE, layout=L), gl.full([SIZE], 0.0, gl.float32, layout=L))

    @gluon.jit
    def _block(expert, first, count, shares, ONE: gl.constexpr):
        """This program's block: expert, first place and number of pairs; with ONE token every pair is a block, of no pair
        where its share is zero."""
        block = gl.program_id(1)
        if ONE:
            begin = block
            number = (gl.load(shares + block) != 0.0).to(gl.int32)
        else:
            begin = gl.load(first + block)
            number = gl.load(count + block)
        return gl.load(expert + block).to(gl.int64), begin, number

    @gluon.jit
    def _pairs(pair, begin, slot, number, ONE: gl.constexpr):
        """The pairs at the block's places ``slot``."""
        return begin + slot * 0 if ONE else gl.load(pair + begin + slot, mask=slot < number, other=0)

    @gluon.jit
    def _gate_up_kernel(
        x, w1, s1, w3, s3, shares, middle, pair, expert, first, count, inner, top, limit,
        HIDDEN: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr, ONE: gl.constexpr,
        PDL: gl.constexpr,
    ):  # fmt: skip
        """ROWS / SPLIT rows of w1 and w3 for one block of pairs."""
        M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
        WIDTH: gl.constexpr = HIDDEN // 8
        PART: gl.constexpr = WIDTH // SPLIT
        _wait(PDL)
        _release(PDL)
        name, begin, number = _block(expert, first, count, shares, ONE)
        if number > 0:
            line = _lines(gl.program_id(0) * (ROWS // SPLIT), WIDTH, ROWS, SPLIT, A)
            slot = gl.arange(0, 8, layout=gl.SliceLayout(0, B))
            if ONE:
                live = slot < SPLIT
                rows = x + slot.to(gl.int64) * (PART * 4)
            else:
                live = slot < number
                rows = x + (_pairs(pair, begin, slot, number, ONE) // top).to(gl.int64) * (HIDDEN // 2)
            w1 += name * inner * WIDTH
            w3 += name * inner * WIDTH
            s1 += name * inner * (WIDTH // 16)
            s3 += name * inner * (WIDTH // 16)
            gate = gl.full([ROWS, 8], 0.0, gl.float32, layout=M)
            up = gl.full([ROWS, 8], 0.0, gl.float32, layout=M)
            codes1, scale1 = _packed(w1, s1, line, 0, WORDS, A)
            codes3, scale3 = _packed(w3, s3, line, 0, WORDS, A)
            for start in range(0, PART, WORDS):
                later = gl.minimum(start + WORDS, PART - WORDS)
                next1, power1 = _packed(w1, s1, line, later, WORDS, A)
                next3, power3 = _packed(w3, s3, line, later, WORDS, A)
                inputs = _inputs(rows, live, start, WORDS, B)
                gate = _added(gate, codes1, scale1, inputs, WORDS, A)
                up = _added(up, codes3, scale3, inputs, WORDS, A)
                codes1, scale1, codes3, scale3 = next1, power1, next3, power3
            if ONE:
                gate = _gathered(gate, ROWS, SPLIT, M)
                up = _gathered(up, ROWS, SPLIT, M)
                row = gl.program_id(0) * (ROWS // SPLIT) + gl.arange(0, ROWS // SPLIT, layout=gate.type.layout)
                value = gl.load(shares + begin) * _activated(gate, up, limit)
                gl.store(middle + begin.to(gl.int64) * inner + row, value.to(gl.bfloat16))
            else:
                slot = gl.arange(0, 8, layout=gl.SliceLayout(0, M))
                pairs = _pairs(pair, begin, slot, number, ONE)
                row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, M))
                share = gl.load(shares + pairs, mask=slot < number, other=0.0)
                value = share[None, :] * _activated(gate, up, limit)
                target = middle + pairs.to(gl.int64)[None, :] * inner + row[:, None]
                gl.store(target, value.to(gl.bfloat16), mask=(slot < number)[None, :] & (row >= 0)[:, None])

    @gluon.jit
    def _down_kernel(
        middle, w2, s2, shares, parts, pair, expert, first, count, hidden,
        INNER: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr, ONE: gl.constexpr,
        PDL: gl.constexpr,
    ):  # fmt: skip
        """ROWS / SPLIT rows of w2 for one block of pairs; each pair's result goes to its own row of ``parts``. The tables are
        older than the kernel before, so the first weights are on their way while it ends."""
        M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
        A: gl.constexpr = gl.DotOperandLayout(0, M, 2)
        B: gl.constexpr = gl.DotOperandLayout(1, M, 2)
        WIDTH: gl.constexpr = INNER // 8
        PART: gl.constexpr = WIDTH // SPLIT
        _release(PDL)
        name, begin, number = _block(expert, first, count, shares, ONE)
        if number > 0:
            line = _lines(gl.program_id(0) * (ROWS // SPLIT), WIDTH, ROWS, SPLIT, A)
            slot = gl.arange(0, 8, layout=gl.SliceLayout(0, B))
            if ONE:
                live = slot < SPLIT
                rows = middle + begin.to(gl.int64) * (INNER // 2) + slot.to(gl.int64) * (PART * 4)
            else:
                live = slot < number
                rows = middle + _pairs(pair, begin, slot, number, ONE).to(gl.int64) * (INNER // 2)
            w2 += name * hidden * WIDTH
            s2 += name * hidden * (WIDTH // 16)
            acc = gl.full([ROWS, 8], 0.0, gl.float32, layout=M)
            codes, scale = _packed(w2, s2, line, 0, WORDS, A)
            _wait(PDL)
            for start in range(0, PART, WORDS):
                later, power = _packed(w2, s2, line, gl.minimum(start + WORDS, PART - WORDS), WORDS, A)
                acc = _added(acc, codes, scale, _inputs(rows, live, start, WORDS, B), WORDS, A)
                codes, scale = later, power
            if ONE:
                acc = _gathered(acc, ROWS, SPLIT, M)
                row = gl.program_id(0) * (ROWS // SPLIT) + gl.arange(0, ROWS // SPLIT, layout=acc.type.layout)
                gl.store(parts + begin.to(gl.int64) * hidden + row, acc)
            else:
                slot = gl.arange(0, 8, layout=gl.SliceLayout(0, M))
                pairs = _pairs(pair, begin, slot, number, ONE)
                row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, M))
                target = parts + pairs.to(gl.int64)[None, :] * hidden + row[:, None]
                gl.store(target, acc, mask=(slot < number)[None, :] & (row >= 0)[:, None])
        elif ONE:
            _wait(PDL)
            _clear(parts + begin.to(gl.int64) * hidden + gl.program_id(0) * (ROWS // SPLIT), ROWS // SPLIT)
