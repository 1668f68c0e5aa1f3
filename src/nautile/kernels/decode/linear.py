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

_STEP = 4096  # bytes of a row that a program of ``_vector_kernel`` reads at once, at most

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


def linear(
    x: Tensor, matrix: Matrix, dtype: torch.dtype = torch.float32, *, chained: bool = False, vector: bool = False
) -> Tensor:
    """``linear_reference`` for up to 64 tokens, the result in ``dtype`` [T, o]: in Triton on a GPU, x in bfloat16 or float32.

    ``chained``: see ``chain``; its weights then come into the L2 while the kernel before ends. ``vector``: a single token is
    multiplied without the tensor cores, whose operands would pass shared memory; its last bits are then not those that it has
    among others. Raises ValueError for more tokens or inputs that are no multiple of 128, on a GPU.
    """
    if not x.is_cuda:
        return linear_reference(x, matrix).to(dtype)
    if vector and len(x) == 1:
        return launch_vector(x, matrix, dtype, chained=chained)
    return launch(x, matrix, dtype, chained=chained)


def launch_vector(x: Tensor, matrix: Matrix, dtype: torch.dtype = torch.float32, *, chained: bool = False) -> Tensor:
    """The kernel for a single token; see ``linear``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; linear_reference is the same in plain PyTorch")
    rows, inputs = matrix.data.shape
    per_group, size = rows // matrix.groups, matrix.data.itemsize
    if len(x) != 1 or inputs % _TILE or x.shape[1] != matrix.groups * inputs or per_group % 16:
        raise ValueError(f"x {tuple(x.shape)} and weights {rows} x {inputs} in {matrix.groups} groups do not fit this kernel")
    out = torch.empty(1, rows, dtype=dtype, device=x.device)
    block = _rows_of_a_program(rows)
    step = min(_STEP // size, 1 << (inputs - 1).bit_length())
    scales = matrix.scales.view(torch.uint8) if matrix.scales is not None else x
    _vector_kernel[(rows // block,)](
        x.contiguous(), matrix.data.view(torch.int32), scales, out, per_group, -(-inputs // _TILE),
        INPUTS=inputs, BLOCK_N=block, WORDS=step * size // 4, SIZE=size, num_warps=max(1, min(4, step * size // 512)),
        **chain(x, chained),
    )  # fmt: skip
    return out


def _rows_of_a_program(rows: int) -> int:
    """At most 8; fewer where there are few, so that four programs or more share a multiprocessor."""
    return 1 << min(3, max(rows // 512, 1).bit_length() - 1)


def launch(x: Tensor, matrix: Matrix, dtype: torch.dtype = torch.float32, *, chained: bool = False) -> Tensor:
    """The kernel. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; linear_reference is the same in plain PyTorch")
    (tokens, width), (rows, inputs) = x.shape, matrix.data.shape
    if tokens > MOST_TOKENS or inputs % _TILE or width != matrix.groups * inputs or rows % (16 * matrix.groups):
        raise ValueError(f"x {tuple(x.shape)} and weights {rows} x {inputs} in {matrix.groups} groups do not fit this kernel")
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
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

    @triton.jit
    def _code(words):
        """The e4m3 code in the upper byte of each word / 2^120: its exponent and mantissa under those of a float32."""
        return ((words >> 4) & -2014314496).to(tl.float32, bitcast=True)  # 0x87F00000; the shift repeats the sign

    @triton.jit
    def _parts(x, word, SIZE: tl.constexpr):
        """Activations of words of weights [W], each word 4 / SIZE weights: four vectors [W], of which 4 / SIZE count."""
        if SIZE == 1:
            both = tl.load(x + word[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.float32)
            low, high = tl.split(tl.reshape(both, (word.shape[0], 2, 2)))
            x0, x2 = tl.split(low)
            x1, x3 = tl.split(high)
        elif SIZE == 2:
            x0, x1 = tl.split(tl.load(x + word[:, None] * 2 + tl.arange(0, 2)[None, :]).to(tl.float32))
            x2, x3 = x0, x1
        else:
            x0 = tl.load(x + word).to(tl.float32)
            x1, x2, x3 = x0, x0, x0
        return x0, x1, x2, x3

    @triton.jit
    def _vector_kernel(
        x, words, scales, out, per_group, scale_columns,
        INPUTS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_N rows for one token. The first weights are asked for before the kernel before has ended. The activations are
        multiplied by their tile's power of two and by half of the 2^120 that codes lack, the sum by the other half, so that
        nothing leaves the range of float32 (powers of two up to 2^67)."""
        first = tl.program_id(0) * BLOCK_N
        row = first + tl.arange(0, BLOCK_N)
        line = words + row[:, None].to(tl.int64) * (INPUTS * SIZE // 4)
        word = tl.arange(0, WORDS)
        width: tl.constexpr = INPUTS * SIZE // 4
        weights = tl.load(line + word[None, :], mask=(word < width)[None, :], other=0)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        x += (first // per_group) * INPUTS
        total = tl.zeros((BLOCK_N, WORDS), tl.float32)
        for start in tl.static_range(0, width, WORDS):
            if start > 0:
                weights = tl.load(line + start + word[None, :], mask=(start + word < width)[None, :], other=0)
            at = tl.minimum(start + word, width - 1)  # words past the end are zero
            x0, x1, x2, x3 = _parts(x, at, SIZE)
            if SIZE == 1:
                scale = tl.load(scales + (first // 128) * scale_columns + at // 32).to(tl.int32)
                power = (tl.minimum(scale + 60, 254) << 23).to(tl.float32, bitcast=True)
                total += _code(weights << 24) * (x0 * power)[None, :]
                total += _code(weights << 16) * (x1 * power)[None, :]
                total += _code(weights << 8) * (x2 * power)[None, :]
                total += _code(weights) * (x3 * power)[None, :]
            elif SIZE == 2:
                total += (weights << 16).to(tl.float32, bitcast=True) * x0[None, :]
                total += (weights & -65536).to(tl.float32, bitcast=True) * x1[None, :]
            else:
                total += weights.to(tl.float32, bitcast=True) * x0[None, :]
        value = tl.sum(total, axis=1)
        if SIZE == 1:
            value = value * 1152921504606846976.0  # 2^60
        tl.store(out + row, value.to(out.dtype.element_ty))
