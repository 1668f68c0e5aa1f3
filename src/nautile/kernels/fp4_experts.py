"""Routed experts on MXFP4 weights as they are stored.

y = sum over the chosen e of w2_e (weight * silu(min(w1_e x, L)) * clip(w3_e x, -L, L)).

Weights stay packed in memory (two e2m1 codes a byte, one e8m0 scale per 32 inputs) and become bfloat16 in registers on the
way into the tensor cores. Decode is bound by reading the chosen experts once: at batch 1 Flash reads 6 x 13.4 MB a layer.
Because the two codes of a byte are neighbours along the input, activations come split into their even and odd elements, so
nothing is interleaved: w x = low . x_even + high . x_odd (tech report section 2.4; architecture notes 2 and 3.6).

(token, expert) pairs are sorted by expert and cut into blocks of pairs that share one; a program does a tile of outputs for
one block. Each pair's result is written on its own and a token's pairs are added in the order of its choices, so the result
does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.quant import mxfp4

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["ExpertBlocks", "FP4Experts", "fp4_experts", "fp4_experts_reference"]


@dataclass(frozen=True)
class FP4Experts:
    """Packed experts: codes uint8 w1, w3 [E, I, d / 2], w2 [E, d, I / 2]; scales uint8 (e8m0) s1, s3 [E, I, d / 32], s2
    [E, d, I / 32]; ``limit`` is the clamp L."""

    w1: Tensor
    s1: Tensor
    w3: Tensor
    s3: Tensor
    w2: Tensor
    s2: Tensor
    limit: float

    def decoded(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """float32 w1, w3 [I, d] and w2 [d, I] of one expert, exact."""
        pairs = ((self.w1, self.s1), (self.w3, self.s3), (self.w2, self.s2))
        one, three, two = (mxfp4.decode(w[expert], s[expert].view(torch.float8_e8m0fnu)) for w, s in pairs)
        return one, three, two


def fp4_experts_reference(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts) -> Tensor:
    """The meaning, in float64: x [T, d], chosen [T, k] expert numbers, weights [T, k] -> float64 [T, d]."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in chosen.unique().tolist():
        one, three, two = (matrix.double() for matrix in experts.decoded(expert))
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up = x[token].double() @ one.T, x[token].double() @ three.T
        hidden = F.silu(gate.clamp(max=experts.limit)) * up.clamp(-experts.limit, experts.limit)
        out.index_add_(0, token, (hidden * weights[token, choice].double().unsqueeze(1)) @ two.T)
    return out


@dataclass(frozen=True)
class ExpertBlocks:
    """Pairs sorted by expert. ``pair`` [P] int32 are positions in the flattened [T, k]; block b holds ``count[b]`` of them
    from ``first[b]`` on, all of expert ``expert[b]``. Blocks past the last have count 0."""

    pair: Tensor
    expert: Tensor
    first: Tensor
    count: Tensor
    size: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int, size: int) -> ExpertBlocks:
        """Blocks of up to ``size`` pairs; the number of blocks depends on shapes alone, so a graph may hold it."""
        flat = chosen.flatten()
        order = flat.sort(stable=True)
        counts = torch.bincount(flat, minlength=experts)
        blocks = (counts + size - 1) // size
        most = min(len(flat), experts) + len(flat) // size
        ends = blocks.cumsum(0)
        number = torch.arange(most, device=flat.device)
        expert = torch.searchsorted(ends, number, right=True).clamp_max(experts - 1)
        inside = number - (ends - blocks)[expert]
        first = (counts.cumsum(0) - counts)[expert] + inside * size
        count = (counts[expert] - inside * size).clamp(0, size).where(number < ends[-1], 0)
        pair, expert, first, count = (part.to(torch.int32) for part in (order.indices, expert, first, count))
        return cls(pair, expert, first, count, size)


def fp4_experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts) -> Tensor:
    """``fp4_experts_reference`` in Triton, activations in x's dtype: x [T, d] -> float32 [T, d].

    d and I must be multiples of 128. Raises ValueError for others, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("fp4_experts needs Triton; fp4_experts_reference is the same in plain PyTorch")
    (tokens, hidden), top, inner = x.shape, chosen.shape[1], experts.w1.shape[1]
    if hidden % 128 or inner % 128:
        raise ValueError(f"d={hidden} and I={inner} must be multiples of 128")
    pairs = tokens * top
    few = pairs <= 16 * experts.w1.shape[0]
    size = 16 if few else 64
    blocks = ExpertBlocks.of(chosen, experts.w1.shape[0], size)
    halves = x.view(tokens, hidden // 2, 2).transpose(1, 2).contiguous()
    middle = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    rows = 32 if few else 64
    table = (blocks.pair, blocks.expert, blocks.first, blocks.count)
    options = {"BLOCK_P": size, "ASM": x.is_cuda, "num_warps": 4, "num_stages": 4 if few else 3}
    _gate_up_kernel[(inner // rows, len(blocks.expert))](
        halves, experts.w1, experts.s1, experts.w3, experts.s3, weights.float().contiguous(), middle, *table,
        inner, top, experts.limit, HIDDEN=hidden, BLOCK_N=rows, BYTES=64, **options,
    )  # fmt: skip
    _down_kernel[(hidden // 64, len(blocks.expert))](
        middle, experts.w2, experts.s2, parts, *table, hidden, INNER=inner, BLOCK_N=64, BYTES=64, **options
    )
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=x.device)
    _sum_kernel[(tokens, triton.cdiv(hidden, 1024))](parts, out, hidden, TOP=top, BLOCK=1024, num_warps=4)
    return out


if triton is not None:
    # Four bytes of codes and their four scales (bfloat16) -> the low and the high codes as bfloat16. The bits of a code,
    # moved under a bfloat16's exponent, are its value / 2^126; the scale brings 2^126 with it. 2 integer instructions and
    # half a multiplication for each value.
    _DECODE = tl.constexpr("""
    {
    .reg .b32 a, b, t, u, z;
    mov.b32 z, 0x80008000;
    prmt.b32 a, $4, 0, 0x1404;
    prmt.b32 b, $4, 0, 0x3424;
    shl.b32 t, a, 4;
    shr.b32 u, a, 2;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, t, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $0, t, $5, z;
    shl.b32 t, b, 4;
    shr.b32 u, b, 2;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, t, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $1, t, $6, z;
    shr.b32 u, a, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, a, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $2, t, $5, z;
    shr.b32 u, b, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, b, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $3, t, $6, z;
    }
    """)

    @triton.jit
    def _from_e2m1(codes, power):
        """One 4-bit code times a scale that brings 2^126 with it, in float32."""
        return (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * power

    @triton.jit
    def _decoded(codes, scale, ROWS: tl.constexpr, BYTES: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
        """uint8 codes [ROWS, BYTES], e8m0 scales [ROWS, BYTES / 16] -> even and odd inputs' weights [ROWS, BYTES], exact."""
        power = (tl.minimum(scale.to(tl.int32) + 126, 254) << 23).to(tl.float32, bitcast=True)
        if ASM:
            wide = tl.broadcast_to(power.to(tl.bfloat16)[:, :, None], (ROWS, BYTES // 16, 16))
            return tl.inline_asm_elementwise(
                _DECODE, "=r,=r,=r,=r,r,r,r", [codes, tl.reshape(wide, (ROWS, BYTES))],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        wide = tl.reshape(tl.broadcast_to(power[:, :, None], (ROWS, BYTES // 16, 16)), (ROWS, BYTES))
        bits = codes.to(tl.int32)
        return _from_e2m1(bits & 15, wide).to(DTYPE), _from_e2m1(bits >> 4, wide).to(DTYPE)

    @triton.jit
    def _product(
        acc, weights, scales, even, row, live, start, BYTES: tl.constexpr, WIDTH: tl.constexpr,
        ROWS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """acc [ROWS, pairs] += weights [ROWS, BYTES bytes from ``start``] times activations; ``even`` points at the pairs'
        even halves [pairs], whose odd halves follow WIDTH elements later."""
        byte, group = tl.arange(0, BYTES), tl.arange(0, BYTES // 16)
        codes = tl.load(weights + row[:, None] * WIDTH + start + byte[None, :])
        scale = tl.load(scales + row[:, None] * (WIDTH // 16) + start // 16 + group[None, :])
        x_even = tl.load(even[None, :] + start + byte[:, None], mask=live[None, :], other=0.0)
        x_odd = tl.load(even[None, :] + WIDTH + start + byte[:, None], mask=live[None, :], other=0.0)
        low, high = _decoded(codes, scale, ROWS, BYTES, ASM, x_even.dtype)
        acc = tl.dot(low, x_even, acc, input_precision="ieee")
        return tl.dot(high, x_odd, acc, input_precision="ieee")

    @triton.jit
    def _gate_up_kernel(
        x, w1, s1, w3, s3, weights, middle, pair, expert, first, count, inner, top, limit,
        HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, BLOCK_P: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows of w1 and w3 for one block of pairs; the result is stored split into even and odd elements."""
        block = tl.program_id(1)
        number = tl.load(count + block)
        if number > 0:
            row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            slot = tl.arange(0, BLOCK_P)
            live = slot < number
            pairs = tl.load(pair + tl.load(first + block) + slot, mask=live, other=0)
            width: tl.constexpr = HIDDEN // 2
            even = x + (pairs // top).to(tl.int64) * HIDDEN
            base = tl.load(expert + block).to(tl.int64) * inner
            gate, up = tl.zeros((BLOCK_N, BLOCK_P), tl.float32), tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            w1 += base * width
            w3 += base * width
            s1 += base * (width // 16)
            s3 += base * (width // 16)
            for start in range(0, width, BYTES):
                gate = _product(gate, w1, s1, even, row, live, start, BYTES, width, BLOCK_N, ASM)
                up = _product(up, w3, s3, even, row, live, start, BYTES, width, BLOCK_N, ASM)
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            share = tl.load(weights + pairs, mask=live, other=0.0)
            value = share[None, :] * up * gate / (1.0 + tl.exp(-gate))
            place = (row % 2) * (inner // 2) + row // 2
            target = middle + pairs.to(tl.int64)[None, :] * inner + place[:, None]
            tl.store(target, value.to(middle.dtype.element_ty), mask=live[None, :])

    @triton.jit
    def _down_kernel(
        middle, w2, s2, parts, pair, expert, first, count, hidden,
        INNER: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, BLOCK_P: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows of w2 for one block of pairs; each pair's result goes to its own row of ``parts``."""
        block = tl.program_id(1)
        number = tl.load(count + block)
        if number > 0:
            row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
            slot = tl.arange(0, BLOCK_P)
            live = slot < number
            pairs = tl.load(pair + tl.load(first + block) + slot, mask=live, other=0)
            width: tl.constexpr = INNER // 2
            even = middle + pairs.to(tl.int64) * INNER
            base = tl.load(expert + block).to(tl.int64) * hidden
            w2 += base * width
            s2 += base * (width // 16)
            acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            for start in range(0, width, BYTES):
                acc = _product(acc, w2, s2, even, row, live, start, BYTES, width, BLOCK_N, ASM)
            tl.store(parts + pairs.to(tl.int64)[None, :] * hidden + row[:, None], acc, mask=live[None, :])

    @triton.jit
    def _sum_kernel(parts, out, hidden, TOP: tl.constexpr, BLOCK: tl.constexpr):
        """Add a token's pairs in the order of its choices."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for choice in tl.static_range(TOP):
            total += tl.load(parts + (token * TOP + choice) * hidden + column, mask=column < hidden, other=0.0)
        tl.store(out + token * hidden + column, total, mask=column < hidden)
