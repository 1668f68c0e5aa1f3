"""y = W x for a few tokens, W as the checkpoint stores it: FP8 e4m3 with one power of two per 128 x 128 tile, or bfloat16.

The time is that of reading W once. Weights become the activations' type in registers; sums are float32, and a tile's power
of two multiplies its partial sum. With ``groups`` G the rows are cut into G equal parts and part g multiplies slice g of x
(the output projection wo_a).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.kernels.decode.chain import chain
from nautile.quant import fp8

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["MOST_TOKENS", "Matrix", "decoded", "linear", "linear_reference"]

MOST_TOKENS = 64  # above, a matrix product on decoded weights is the better way
_TILE = 128


@dataclass(frozen=True)
class Matrix:
    """Stored weights [o, i]: float8_e4m3fn with ``scales`` float8_e8m0fnu [ceil(o / 128), ceil(i / 128)], or bfloat16 or
    float32 without. ``groups``: see the module."""

    data: Tensor
    scales: Tensor | None = None
    groups: int = 1

    def rows(self, start: int, stop: int) -> Matrix:
        """Rows start .. stop - 1 as a matrix of its own, without a copy; FP8 starts at a multiple of 128."""
        if self.scales is None:
            return Matrix(self.data[start:stop])
        if start % _TILE:
            raise ValueError(f"row {start} of an FP8 matrix is no border of tiles of {_TILE}")
        return Matrix(self.data[start:stop], self.scales[start // _TILE : -(-stop // _TILE)])


def decoded(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as numbers [o, i]; exact in bfloat16 and wider."""
    if matrix.scales is None:
        return matrix.data.to(dtype)
    if dtype == torch.float32:
        return fp8.decode_blocks(matrix.data, matrix.scales)
    rows, columns = matrix.data.shape
    powers = matrix.scales.to(dtype).repeat_interleave(_TILE, 0)[:rows].repeat_interleave(_TILE, 1)[:, :columns]
    return matrix.data.to(dtype).mul_(powers)


def linear_reference(x: Tensor, matrix: Matrix) -> Tensor:
    """The meaning: x [T, G i] -> [T, o] in x's dtype or float32, whichever is wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    weight = decoded(matrix).to(wide.dtype)
    if matrix.groups == 1:
        return F.linear(wide, weight)
    slices = wide.unflatten(-1, (matrix.groups, -1)).transpose(0, 1)
    return torch.bmm(slices, weight.unflatten(0, (matrix.groups, -1)).transpose(1, 2)).transpose(0, 1).flatten(1)


def linear(x: Tensor, matrix: Matrix, *, chained: bool = False) -> Tensor:
    """``linear_reference`` for up to 64 tokens: in Triton on a GPU, x in bfloat16 or float32 -> float32 [T, o].

    ``chained``: see ``chain``; its weights then come into the L2 while the kernel before ends. Raises ValueError for more
    tokens or inputs that are no multiple of 128, on a GPU.
    """
    return launch(x, matrix, chained=chained) if x.is_cuda else linear_reference(x, matrix)


def launch(x: Tensor, matrix: Matrix, *, chained: bool = False) -> Tensor:
    """The kernel. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; linear_reference is the same in plain PyTorch")
    (tokens, width), (rows, inputs) = x.shape, matrix.data.shape
    if tokens > MOST_TOKENS or inputs % _TILE or width != matrix.groups * inputs or rows % (16 * matrix.groups):
        raise ValueError(f"x {tuple(x.shape)} and weights {rows} x {inputs} in {matrix.groups} groups do not fit this kernel")
    out = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    per_group = rows // matrix.groups
    block = 16 if rows < 8192 or per_group % 32 else 32
    packed = matrix.scales is not None
    scales = matrix.scales.view(torch.uint8) if matrix.scales is not None else matrix.data
    _linear_kernel[(rows // block,)](
        x.contiguous(), matrix.data, scales, out, tokens, rows, width, per_group, -(-inputs // _TILE),
        INPUTS=inputs, BLOCK_N=block, BLOCK_T=16 if tokens <= 16 else triton.next_power_of_2(tokens), FP8=packed,
        BLOCK_K=_TILE, ASM=packed and x.is_cuda and x.dtype == torch.bfloat16, num_warps=4, num_stages=5 if packed else 4,
        LINES=triton.next_power_of_2(-(-inputs * matrix.data.itemsize // 128)), **chain(x, chained),
    )  # fmt: skip
    return out


if triton is not None:
    # Four e4m3 codes -> four bfloat16. The code's exponent and mantissa, moved under a bfloat16's exponent, are its value /
    # 2^120. The conversions that the hardware has go through float16 and float32 and are slower than memory.
    _DECODE = tl.constexpr("""
    {
    .reg .b32 a, s, t, p, z;
    mov.b32 z, 0x80008000;
    mov.b32 p, 0x7B807B80;
    prmt.b32 a, $2, 0, 0x1404;
    and.b32 s, a, z;
    shr.b32 t, a, 4;
    and.b32 t, t, 0x07F007F0;
    or.b32 t, t, s;
    fma.rn.bf16x2 $0, t, p, z;
    prmt.b32 a, $2, 0, 0x3424;
    and.b32 s, a, z;
    shr.b32 t, a, 4;
    and.b32 t, t, 0x07F007F0;
    or.b32 t, t, s;
    fma.rn.bf16x2 $1, t, p, z;
    }
    """)

    @triton.jit
    def _linear_kernel(
        x, weights, scales, out, tokens, rows, width, per_group, scale_columns,
        INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, FP8: tl.constexpr, BLOCK_K: tl.constexpr,
        ASM: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows for all tokens; LINES of 128 bytes hold a row."""
        first = tl.program_id(0) * BLOCK_N
        row = first + tl.arange(0, BLOCK_N)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            size: tl.constexpr = weights.dtype.element_ty.primitive_bitwidth // 8
            element = tl.minimum(tl.arange(0, LINES) * (128 // size), INPUTS - 1)
            lines = (weights + row[:, None].to(tl.int64) * INPUTS + element[None, :]).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
            )
            tl.extra.cuda.gdc_wait()
        token, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        live = token < tokens
        source = x + (first // per_group) * INPUTS + token[None, :].to(tl.int64) * width
        acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            values = tl.load(source + start + column[:, None], mask=live[None, :], other=0.0)
            tile = tl.load(weights + row[:, None].to(tl.int64) * INPUTS + start + column[None, :])
            if FP8:
                scale = tl.load(scales + (first // 128) * scale_columns + start // 128).to(tl.int32)
                power = (scale << 23).to(tl.float32, bitcast=True)
                if ASM:
                    tile = tl.inline_asm_elementwise(
                        _DECODE, "=r,=r,r", [tile.to(tl.uint8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=4
                    )
                acc += tl.dot(tile.to(values.dtype), values, input_precision="ieee") * power
            else:
                acc = tl.dot(tile.to(values.dtype), values, acc, input_precision="ieee")
        tl.store(out + token[None, :].to(tl.int64) * rows + row[:, None], acc, mask=live[None, :])
