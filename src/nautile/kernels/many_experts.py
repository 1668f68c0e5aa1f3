"""Routed experts for many tokens on Hopper, in Gluon: warps that unpack weights work beside warps that multiply.

``fp4_experts`` says what it computes and calls it for prefill. A program multiplies up to 128 pairs of one expert with 256
rows of weights. A word of eight codes unpacks cheapest to the pairs (0, 4), (1, 5), (2, 6), (3, 7), so activations come in
that order: element 4 a + b of every eight lies at 2 b + a.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:  # CPU-only installations have no Triton, older versions no Gluon
    gluon = None

__all__ = ["PAIRS", "ManyTiles", "fits", "launch", "paired"]

PAIRS = 128  # of a block


@dataclass(frozen=True)
class ManyTiles:
    """``registers`` of a thread that unpacks; ``spread`` lays its loads out so that stores meet no bank conflicts. The
    defaults are the fastest that were measured."""

    registers: int = 96
    spread: bool = False


def fits(x: Tensor, inner: int) -> bool:
    """Whether the kernels run here: bfloat16 activations on sm_90, widths in multiples of 256 and 128."""
    hopper_gpu = gluon is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)
    return hopper_gpu and x.dtype == torch.bfloat16 and x.shape[1] % 256 == 0 and inner % 128 == 0


def paired(x: Tensor) -> Tensor:
    """x [T, d] with the elements of every eight in the order of unpacked words."""
    return x.view(x.shape[0], -1, 2, 4).transpose(2, 3).contiguous()


def launch(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], shares: Tensor, table: tuple[Tensor, ...],
    top: int, limit: float, parts: Tensor, tiles: ManyTiles,
) -> None:  # fmt: skip
    """Fill ``parts`` float32 [T k, d]: what each (token, expert) pair adds.

    x from ``paired``; ``weights`` w1, s1, w3, s3, w2, s2; ``shares`` float32 [T, k]; ``table`` the pair, expert, first and
    count of ``ExpertBlocks`` of at most 128 pairs.
    """
    hidden, inner = weights[4].shape[1], weights[0].shape[1]
    middle = torch.empty(parts.shape[0], inner, dtype=x.dtype, device=x.device)
    w1, s1, w3, s3, w2, s2 = (part.view(torch.int32) for part in weights)
    blocks = len(table[1])
    options = {"W": 8, "R": tiles.registers, "SPREAD": tiles.spread, "num_warps": 8}
    _experts_kernel[(inner // 128, blocks)](
        x, w1, s1, w3, s3, shares, middle, *table, inner, top, limit, WIDTH=hidden, GATED=True, **options
    )
    _experts_kernel[(hidden // 256, blocks)](
        middle, w2, s2, w2, s2, shares, parts, *table, hidden, 1, limit, WIDTH=inner, GATED=False, **options
    )


if gluon is not None:
    # A word of eight codes and the exponent of their scale (twice in a word, with 2^126) -> their four pairs of bfloat16.
    _DECODE = gl.constexpr("""
    {
    .reg .b32 t, u, z;
    mov.b32 z, 0x80008000;
    shl.b32 t, $4, 12;
    shl.b32 u, $4, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, t, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $0, t, $5, z;
    shl.b32 t, $4, 8;
    shl.b32 u, $4, 2;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, t, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $1, t, $5, z;
    shl.b32 t, $4, 4;
    shr.b32 u, $4, 2;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, t, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $2, t, $5, z;
    shr.b32 u, $4, 6;
    and.b32 u, u, 0x01C001C0;
    lop3.b32 t, $4, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $3, t, $5, z;
    }
    """)

    @gluon.jit
    def _packed(weights, scales, row, start, WIDTH: gl.constexpr, L: gl.constexpr):
        """16 words of codes from word ``start`` on of each row, and their word of four scales."""
        word = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
        codes = gl.load((weights + start + word) + row[:, None] * (WIDTH // 8))
        return codes, gl.load((scales + start // 16) + row * (WIDTH // 128))

    @gluon.jit
    def _unpacked(codes, scale, L: gl.constexpr):
        """Words of eight codes [128, 16] -> words of two bfloat16 [128, 64], exact."""
        word = gl.arange(0, 16, layout=gl.SliceLayout(0, L))[None, :]
        power = (scale[:, None] >> ((word // 4) * 8)) & 255
        power = gl.minimum(power + 126, 254) * 0x00800080
        a, b, c, d = gl.inline_asm_elementwise(
            _DECODE, "=r,=r,=r,=r,r,r", [codes, power], dtype=(gl.int32,) * 4, is_pure=True, pack=1
        )
        return gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [128, 64])

    @gluon.jit
    def _inputs(x, rows, live, start, L: gl.constexpr):
        """128 elements from word ``start`` of eight on of each pair's row."""
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
        return gl.load((x + start * 8 + column) + rows[:, None], mask=live[:, None] & (column >= 0), other=0.0)

    @gluon.jit
    def _produce(
        x, wa, sa, wb, sb, pair, begin, number, top, row_a, row_b, x_smem, a_smem, b_smem, full, empty,
        WIDTH: gl.constexpr, W: gl.constexpr, SPREAD: gl.constexpr,
    ):  # fmt: skip
        """Unpack weights and copy activations into two stages in turn; a step is 128 of the inputs."""
        L: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2] if SPREAD else [8, 4], [W, 1], [1, 0])
        LX: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8] if SPREAD else [2, 16], [W, 1], [1, 0])
        row = gl.arange(0, 128, layout=gl.SliceLayout(1, L))
        wa += row_a * (WIDTH // 8)
        wb += row_b * (WIDTH // 8)
        sa += row_a * (WIDTH // 128)
        sb += row_b * (WIDTH // 128)
        slot = gl.arange(0, 128, layout=gl.SliceLayout(1, LX))
        live = slot < number
        rows = (gl.load(pair + begin + slot, mask=live, other=0) // top) * WIDTH
        codes_a, scale_a = _packed(wa, sa, row, 0, WIDTH, L)
        codes_b, scale_b = _packed(wb, sb, row, 0, WIDTH, L)
        inputs = _inputs(x, rows, live, 0, LX)
        for step in range(WIDTH // 128):
            stage = step & 1
            later = gl.minimum(step + 1, WIDTH // 128 - 1) * 16
            hopper.mbarrier.wait(empty.index(stage), ((step >> 1) & 1) ^ 1)
            x_smem.index(stage).store(inputs)
            a_smem.index(stage).store(_unpacked(codes_a, scale_a, L))
            b_smem.index(stage).store(_unpacked(codes_b, scale_b, L))
            hopper.fence_async_shared()
            gl.thread_barrier()
            hopper.mbarrier.arrive(full.index(stage), count=1)
            # Loads come after the fence, which would wait for them.
            codes_a, scale_a = _packed(wa, sa, row, later, WIDTH, L)
            codes_b, scale_b = _packed(wb, sb, row, later, WIDTH, L)
            inputs = _inputs(x, rows, live, later, LX)

    @gluon.jit
    def _consume(
        shares, out, pair, begin, number, rows, limit, x_smem, a_smem, b_smem, full, empty,
        WIDTH: gl.constexpr, GATED: gl.constexpr,
    ):  # fmt: skip
        """Multiply stage after stage, then write the pairs' results."""
        M: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
        a = hopper.warpgroup_mma_init(gl.full([128, 128], 0.0, gl.float32, layout=M))
        b = hopper.warpgroup_mma_init(gl.full([128, 128], 0.0, gl.float32, layout=M))
        for step in range(WIDTH // 128):
            stage = step & 1
            hopper.mbarrier.wait(full.index(stage), (step >> 1) & 1)
            a, b = hopper.warpgroup_mma_wait(0, deps=[a, b])
            a = hopper.warpgroup_mma(x_smem.index(stage), a_smem.index(stage).permute([1, 0]), a, is_async=True)
            b = hopper.warpgroup_mma(x_smem.index(stage), b_smem.index(stage).permute([1, 0]), b, is_async=True)
            gl.thread_barrier()  # both warpgroups have passed the wait: the other stage is free
            hopper.mbarrier.arrive(empty.index(1 - stage), count=1, pred=step > 0)
        a, b = hopper.warpgroup_mma_wait(0, deps=[a, b])
        slot = gl.arange(0, 128, layout=gl.SliceLayout(1, M))
        live = slot < number
        pairs = gl.load(pair + begin + slot, mask=live, other=0)
        column = gl.arange(0, 128, layout=gl.SliceLayout(0, M))
        seen = live[:, None] & (column >= 0)[None, :]
        if GATED:
            gate = gl.minimum(a, limit)
            up = gl.minimum(gl.maximum(b, -limit), limit)
            share = gl.load(shares + pairs, mask=live, other=0.0)
            value = share[:, None] * up * gate / (1.0 + gl.exp(-gate))
            column += gl.program_id(0) * 128
            place = column // 8 * 8 + 2 * (column % 4) + (column // 4) % 2
            gl.store(out + pairs.to(gl.int64)[:, None] * rows + place[None, :], value.to(gl.bfloat16), mask=seen)
        else:
            target = out + pairs.to(gl.int64)[:, None] * rows + (gl.program_id(0) * 256 + column)[None, :]
            gl.store(target, a, mask=seen)
            gl.store(target + 128, b, mask=seen)

    @gluon.jit
    def _experts_kernel(
        x, wa, sa, wb, sb, shares, out, pair, expert, first, count, rows, top, limit,
        WIDTH: gl.constexpr, GATED: gl.constexpr, W: gl.constexpr, R: gl.constexpr, SPREAD: gl.constexpr,
    ):  # fmt: skip
        """One block of pairs times 128 rows of two matrices (GATED) or 256 rows of one."""
        block = gl.program_id(1)
        number = gl.load(count + block)
        if number > 0:
            begin = gl.load(first + block)
            base = gl.load(expert + block).to(gl.int64) * rows
            row_a = base + gl.program_id(0) * (128 if GATED else 256)
            row_b = row_a + (0 if GATED else 128)
            SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
            WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
            x_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 128], SHARED)
            a_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 128], SHARED)
            b_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 128], SHARED)
            full = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
            empty = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
            for stage in gl.static_range(2):
                hopper.mbarrier.init(full.index(stage), count=1)
                hopper.mbarrier.init(empty.index(stage), count=1)
            gl.warp_specialize(
                [
                    (_consume, (shares, out, pair, begin, number, rows, limit, x_smem, a_smem, b_smem, full, empty,
                                WIDTH, GATED)),
                    (_produce, (x, wa, sa, wb, sb, pair, begin, number, top, row_a, row_b, x_smem,
                                a_smem._reinterpret(gl.int32, [2, 128, 64], WORDS),
                                b_smem._reinterpret(gl.int32, [2, 128, 64], WORDS), full, empty, WIDTH, W, SPREAD)),
                ],
                [W], [R],
            )  # fmt: skip
