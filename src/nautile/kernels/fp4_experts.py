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

from nautile.kernels import few_experts, many_experts
from nautile.kernels.many_experts import ManyTiles
from nautile.quant import mxfp4

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["ExpertBlocks", "ExpertTiles", "FP4Experts", "FewTiles", "ManyTiles", "fp4_experts", "fp4_experts_reference"]


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
        bounds = torch.searchsorted(order.values, torch.arange(experts + 1, device=flat.device, dtype=flat.dtype))
        counts = bounds[1:] - bounds[:-1]
        blocks = (counts + size - 1) // size
        ends = blocks.cumsum(0)
        number = torch.arange(cls.most(len(flat), experts, size), device=flat.device)
        expert = torch.searchsorted(ends, number, right=True).clamp_max(experts - 1)
        inside = number - (ends - blocks)[expert]
        first = bounds[expert] + inside * size
        count = (counts[expert] - inside * size).clamp(0, size).masked_fill(number >= ends[-1], 0)
        pair, expert, first, count = (part.to(torch.int32) for part in (order.indices, expert, first, count))
        return cls(pair, expert, first, count, size)

    @staticmethod
    def most(pairs: int, experts: int, size: int) -> int:
        """Blocks that this many pairs can fall into, whatever the routing."""
        return min(pairs, experts) + pairs // size


@dataclass(frozen=True)
class ExpertTiles:
    """Sizes of Triton's programs: ``pairs`` of a block, ``rows`` of the two products, ``bytes`` of codes of a step."""

    pairs: int
    rows: int
    down_rows: int
    bytes: int
    warps: int
    stages: int

    @classmethod
    def of(cls, pairs: int, experts: int) -> ExpertTiles:
        """Small blocks while experts see few tokens each, else blocks that decode a weight once for many tokens."""
        if pairs <= 16 * experts:
            return cls(16, 32, 64, 64, 4, 4)
        return cls(128, 64, 128, 64, 8, 3)


@dataclass(frozen=True)
class FewTiles:
    """Sizes of the programs of ``few_experts``: warps of 16 rows each, words of codes of a step of the two products.
    ``direct`` makes every pair of a single token a block of its own, without a kernel that sorts pairs, and reads no expert
    whose share is zero; ``split`` cuts its inputs in so many parts for other warps (1 but for ``direct``)."""

    warps: int = 2
    words: int = 32
    down_words: int = 32
    direct: bool = False
    split: int = 1


Tiles = ExpertTiles | FewTiles | ManyTiles

_FEW = 1024  # pairs that one program can sort


def fp4_experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts, *, tiles: Tiles | None = None) -> Tensor:
    """``fp4_experts_reference`` on a GPU, activations in x's dtype: x [T, d] -> float32 [T, d].

    d and I must be multiples of 128. ``tiles`` overrides the choice of kernel and the sizes of its programs: ``FewTiles`` and
    ``ManyTiles`` need what ``few_experts.fits`` and ``many_experts.fits`` say. Nothing synchronises with the host, so a graph
    may hold it. Raises ValueError for other widths, RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("fp4_experts needs Triton; fp4_experts_reference is the same in plain PyTorch")
    (tokens, hidden), top, inner = x.shape, chosen.shape[1], experts.w1.shape[1]
    if hidden % 128 or inner % 128:
        raise ValueError(f"d={hidden} and I={inner} must be multiples of 128")
    pairs, count = tokens * top, experts.w1.shape[0]
    choice = tiles or _best_tiles(x, pairs, count, inner)
    if isinstance(choice, FewTiles):
        return _few(x, chosen, weights, experts, choice)
    if isinstance(choice, ManyTiles):
        return _many(x, chosen, weights, experts, choice)
    return _portable(x, chosen, weights, experts, choice)


def _portable(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts, tiles: ExpertTiles) -> Tensor:
    """The path in Triton."""
    (tokens, hidden), top, inner = x.shape, chosen.shape[1], experts.w1.shape[1]
    pairs, count = tokens * top, experts.w1.shape[0]
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    blocks, halves = _prepared(x, chosen, count, tiles.pairs, 2, pdl)
    middle = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(pairs, hidden, dtype=torch.float32, device=x.device)
    table = (blocks.pair, blocks.expert, blocks.first, blocks.count)
    s1, s3, s2 = (scales.view(torch.int32) for scales in (experts.s1, experts.s3, experts.s2))
    options = {
        "BLOCK_P": tiles.pairs, "BYTES": tiles.bytes, "ASM": x.is_cuda, "PDL": pdl,
        "num_warps": tiles.warps, "num_stages": tiles.stages, "launch_pdl": pdl,
    }  # fmt: skip
    _gate_up_kernel[(inner // tiles.rows, len(blocks.expert))](
        halves, experts.w1, s1, experts.w3, s3, weights.float().contiguous(), middle, *table,
        inner, top, experts.limit, HIDDEN=hidden, BLOCK_N=tiles.rows, **options,
    )  # fmt: skip
    _down_kernel[(hidden // tiles.down_rows, len(blocks.expert))](
        middle, experts.w2, s2, parts, *table, hidden, INNER=inner, BLOCK_N=tiles.down_rows, **options
    )
    return _summed(parts, tokens, pdl)


def _best_tiles(x: Tensor, pairs: int, experts: int, inner: int) -> Tiles:
    """The fastest kernel of those that run here."""
    if few_experts.fits(x) and pairs <= min(8 * experts, _FEW) and x.shape[1] % 256 == 0 and inner % 256 == 0:
        return FewTiles()
    return ManyTiles() if many_experts.fits(x, inner) else ExpertTiles.of(pairs, experts)


def _many(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts, tiles: ManyTiles) -> Tensor:
    """The path of ``many_experts``."""
    blocks = ExpertBlocks.of(chosen, experts.w1.shape[0], many_experts.PAIRS)
    parts = torch.empty(chosen.numel(), x.shape[1], dtype=torch.float32, device=x.device)
    many_experts.launch(
        many_experts.paired(x), _tensors(experts), weights.float().contiguous(),
        (blocks.pair, blocks.expert, blocks.first, blocks.count), chosen.shape[1], experts.limit, parts, tiles,
    )  # fmt: skip
    return _summed(parts, x.shape[0], True)


def _tensors(experts: FP4Experts) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return experts.w1, experts.s1, experts.w3, experts.s3, experts.w2, experts.s2


def _few(x: Tensor, chosen: Tensor, weights: Tensor, experts: FP4Experts, tiles: FewTiles) -> Tensor:
    """The path of ``few_experts``."""
    (tokens, hidden), top = x.shape, chosen.shape[1]
    direct = tokens == 1 and tiles.direct
    split = tiles.split if direct else 1
    inner = experts.w1.shape[1]
    if hidden % (8 * split * tiles.words) or inner % (8 * split * tiles.down_words):
        raise ValueError(f"d={hidden} and I={inner} do not divide into {split} parts of steps as long as {tiles} says")
    pdl = torch.cuda.get_device_capability(x.device) >= (9, 0)
    if direct:
        table = (chosen.flatten(),) * 4  # every pair is a block of its own
    else:
        blocks = _prepared(x, chosen, experts.w1.shape[0], few_experts.PAIRS, 0, pdl)[0]
        table = (blocks.pair, blocks.expert, blocks.first, blocks.count)
    parts = torch.empty(tokens * top, hidden, dtype=torch.float32, device=x.device)
    few_experts.launch(
        x.contiguous(), _tensors(experts), weights.float().contiguous(), table, top, experts.limit, parts,
        (tiles.warps, tiles.words, tiles.down_words, split), direct,
    )  # fmt: skip
    return _summed(parts, tokens, pdl)


def _summed(parts: Tensor, tokens: int, pdl: bool) -> Tensor:
    """A token's pairs, added in the order of its choices."""
    hidden = parts.shape[1]
    out = torch.empty(tokens, hidden, dtype=torch.float32, device=parts.device)
    _sum_kernel[(tokens, triton.cdiv(hidden, 512))](
        parts, out, hidden, TOP=parts.shape[0] // tokens, BLOCK=512, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out


def _prepared(x: Tensor, chosen: Tensor, experts: int, size: int, ways: int, pdl: bool) -> tuple[ExpertBlocks, Tensor]:
    """The blocks, and x with every ``ways``-th element side by side [T, ways, d / ways] (``ways`` 0: x as it is): one kernel
    for few pairs, else PyTorch."""
    tokens, hidden = x.shape
    pairs = chosen.numel()
    if pairs > _FEW:
        halves = x.view(tokens, hidden // ways, ways).transpose(1, 2).contiguous() if ways else x
        return ExpertBlocks.of(chosen, experts, size), halves
    halves = torch.empty(tokens, ways, hidden // ways, dtype=x.dtype, device=x.device) if ways else x
    most = ExpertBlocks.most(pairs, experts, size)
    table = torch.empty(pairs + 3 * most, dtype=torch.int32, device=x.device)
    pair, expert, first, count = table.split([pairs, most, most, most])
    _prepare_kernel[(1 + tokens if ways else 1,)](
        x.contiguous(), chosen.contiguous(), halves, pair, expert, first, count, pairs, most, hidden, experts, size,
        PAIRS=max(16, triton.next_power_of_2(pairs)), BLOCKS=triton.next_power_of_2(most),
        EXPERTS=triton.next_power_of_2(experts), WAYS=max(1, ways), PDL=pdl, num_warps=8,
    )  # fmt: skip
    return ExpertBlocks(pair, expert, first, count, size), halves


if triton is not None:
    # Four bytes of codes and their scale (a pair of bfloat16) -> the low and the high codes as bfloat16. The bits of a code,
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
    fma.rn.bf16x2 $1, t, $5, z;
    shr.b32 u, a, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, a, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $2, t, $5, z;
    shr.b32 u, b, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, b, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $3, t, $5, z;
    }
    """)

    @triton.jit
    def _from_e2m1(codes, power):
        """One 4-bit code times a scale that brings 2^126 with it, in float32."""
        return (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True) * power

    @triton.jit
    def _decoded(codes, scale, ROWS: tl.constexpr, BYTES: tl.constexpr, ASM: tl.constexpr, DTYPE: tl.constexpr):
        """uint8 codes [ROWS, BYTES], words of four e8m0 scales [ROWS, BYTES / 64] -> even and odd inputs' weights
        [ROWS, BYTES], exact."""
        field = (scale[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
        field = tl.minimum(field + 126, 254)  # the exponent of 2^126 2^(scale - 127)
        power = field * 0x00800080 if ASM else field << 23
        power = tl.broadcast_to(power[:, :, :, None], (ROWS, BYTES // 64, 4, 16))
        power = tl.reshape(power, (ROWS, BYTES))
        if ASM:
            return tl.inline_asm_elementwise(
                _DECODE, "=r,=r,=r,=r,r,r,r,r,r", [codes, power],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        wide = power.to(tl.float32, bitcast=True)
        bits = codes.to(tl.int32)
        return _from_e2m1(bits & 15, wide).to(DTYPE), _from_e2m1(bits >> 4, wide).to(DTYPE)

    @triton.jit
    def _product(
        acc, weights, scales, even, row, live, start, BYTES: tl.constexpr, WIDTH: tl.constexpr,
        ROWS: tl.constexpr, ASM: tl.constexpr,
    ):  # fmt: skip
        """acc [ROWS, pairs] += weights [ROWS, BYTES bytes from ``start``] times activations; ``even`` points at the pairs'
        even halves [pairs], whose odd halves follow WIDTH elements later."""
        byte, word = tl.arange(0, BYTES), tl.arange(0, BYTES // 64)
        codes = tl.load(weights + row[:, None] * WIDTH + start + byte[None, :])
        scale = tl.load(scales + row[:, None] * (WIDTH // 64) + start // 64 + word[None, :])
        x_even = tl.load(even[None, :] + start + byte[:, None], mask=live[None, :], other=0.0)
        x_odd = tl.load(even[None, :] + WIDTH + start + byte[:, None], mask=live[None, :], other=0.0)
        low, high = _decoded(codes, scale, ROWS, BYTES, ASM, x_even.dtype)
        acc = tl.dot(low, x_even, acc, input_precision="ieee")
        return tl.dot(high, x_odd, acc, input_precision="ieee")

    @triton.jit
    def _prepare_kernel(
        x, chosen, halves, pair, expert, first, count, pairs, most, hidden, experts, size,
        PAIRS: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr, WAYS: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Program 0: the tables of ExpertBlocks. Program 1 + t: token t with every WAYS-th element side by side."""
        if tl.program_id(0) > 0:
            token = (tl.program_id(0) - 1).to(tl.int64)
            for start in range(0, hidden, 4096):
                place = start + tl.arange(0, 4096)
                source = (place % (hidden // WAYS)) * WAYS + place // (hidden // WAYS)
                value = tl.load(x + token * hidden + source, mask=place < hidden, other=0.0)
                tl.store(halves + token * hidden + place, value, mask=place < hidden)
        else:
            slot, name = tl.arange(0, PAIRS), tl.arange(0, EXPERTS)
            own = tl.load(chosen + slot, mask=slot < pairs, other=0).to(tl.int32)
            rank = tl.zeros((PAIRS,), tl.int32)  # pairs that come before: a lower expert, or the same one and an earlier place
            for start in range(0, pairs, 16):
                other = start + tl.arange(0, 16)
                their = tl.load(chosen + other, mask=other < pairs, other=experts).to(tl.int32)
                before = (their[None, :] == own[:, None]) & (other[None, :] < slot[:, None])
                rank += tl.sum(((their[None, :] < own[:, None]) | before).to(tl.int32), axis=1)
            tl.store(pair + rank, slot, mask=slot < pairs)
            counts = tl.histogram(own, EXPERTS, mask=slot < pairs)
            blocks = (counts + size - 1) // size
            at = tl.cumsum(blocks, axis=0) - blocks
            begin = tl.cumsum(counts, axis=0) - counts
            for part in range(0, tl.max(blocks, axis=0)):
                here = part < blocks
                tl.store(expert + at + part, name, mask=here)
                tl.store(first + at + part, begin + part * size, mask=here)
                tl.store(count + at + part, tl.minimum(counts - part * size, size), mask=here)
            block = tl.arange(0, BLOCKS)
            empty = (block < most) & (block >= tl.sum(blocks, axis=0))
            tl.store(expert + block, tl.zeros((BLOCKS,), tl.int32), mask=empty)
            tl.store(first + block, tl.zeros((BLOCKS,), tl.int32), mask=empty)
            tl.store(count + block, tl.zeros((BLOCKS,), tl.int32), mask=empty)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def _gate_up_kernel(
        x, w1, s1, w3, s3, weights, middle, pair, expert, first, count, inner, top, limit,
        HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, BYTES: tl.constexpr, BLOCK_P: tl.constexpr, ASM: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows of w1 and w3 for one block of pairs; the result is stored split into even and odd elements."""
        if PDL:
            tl.extra.cuda.gdc_wait()
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
            s1 += base * (width // 64)
            s3 += base * (width // 64)
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
        PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows of w2 for one block of pairs; each pair's result goes to its own row of ``parts``."""
        if PDL:
            tl.extra.cuda.gdc_wait()
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
            s2 += base * (width // 64)
            acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            for start in range(0, width, BYTES):
                acc = _product(acc, w2, s2, even, row, live, start, BYTES, width, BLOCK_N, ASM)
            tl.store(parts + pairs.to(tl.int64)[None, :] * hidden + row[:, None], acc, mask=live[None, :])

    @triton.jit
    def _sum_kernel(parts, out, hidden, TOP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """Add a token's pairs in the order of its choices."""
        if PDL:
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for choice in tl.static_range(TOP):
            total += tl.load(parts + (token * TOP + choice) * hidden + column, mask=column < hidden, other=0.0)
        tl.store(out + token * hidden + column, total, mask=column < hidden)
