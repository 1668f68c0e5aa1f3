"""Sinkhorn normalisation of the stream-mixing matrix (mHC).

M = softmax over the last axis + eps; columns /= (column sum + eps); then ``iterations - 1`` times rows, then columns.
The last operation is a column normalisation. Matrices are tiny (4 x 4) and there is one per token and site, so the
straight PyTorch version is launch-bound on a GPU: the Triton kernels keep a tile of matrices in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["sinkhorn", "sinkhorn_floats", "sinkhorn_reference"]


def sinkhorn_reference(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The meaning: [..., n, n] logits -> [..., n, n], nearly doubly stochastic, differentiable."""
    m = logits.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn with the fastest implementation for the device: Triton on CUDA, in-place PyTorch without autograd, else plain.

    Args: logits [..., n, n] float32 (float64 on the CPU is accepted).
    """
    n = logits.shape[-1]
    if logits.is_cuda and triton is not None and n in (2, 4, 8) and logits.dtype == torch.float32:
        result: Tensor = torch.ops.nautile.sinkhorn(logits.reshape(-1, n, n).contiguous(), iterations, eps)[0]
        return result.view(logits.shape)
    if torch.is_grad_enabled():  # whether or not these logits need it: a rollout can then compute what training will
        return sinkhorn_reference(logits, iterations, eps)
    if logits.numel() == 16 and n == 4 and logits.device.type == "cpu":
        return _sinkhorn_single(logits, iterations, eps)
    return _sinkhorn_in_place(logits, iterations, eps)


def _sinkhorn_single(logits: Tensor, iterations: int, eps: float) -> Tensor:
    rows = sinkhorn_floats((logits.softmax(-1) + eps).view(4, 4).tolist(), iterations, eps)
    return torch.tensor(rows, dtype=logits.dtype).view(logits.shape)


def sinkhorn_floats(m: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """One 4 x 4 matrix (softmax + eps already taken) in plain Python floats: for a single decoded token, 80 tensor
    operations on 16 numbers cost five times as much (310 against 66 microseconds on a Zen 3 core)."""
    columns = [1.0 / (m[0][k] + m[1][k] + m[2][k] + m[3][k] + eps) for k in range(4)]
    p, q, r, s = columns
    rows = [[a * p, b * q, c * r, d * s] for a, b, c, d in m]
    for _ in range(iterations - 1):
        (a, b, c, d), (e, f, g, h), (i, j, k, l), (w, x, y, z) = rows  # noqa: E741
        p = 1.0 / (a + b + c + d + eps)
        q = 1.0 / (e + f + g + h + eps)
        r = 1.0 / (i + j + k + l + eps)
        s = 1.0 / (w + x + y + z + eps)
        a, b, c, d, e, f, g, h = a * p, b * p, c * p, d * p, e * q, f * q, g * q, h * q
        i, j, k, l, w, x, y, z = i * r, j * r, k * r, l * r, w * s, x * s, y * s, z * s  # noqa: E741
        p = 1.0 / (a + e + i + w + eps)
        q = 1.0 / (b + f + j + x + eps)
        r = 1.0 / (c + g + k + y + eps)
        s = 1.0 / (d + h + l + z + eps)
        rows = [
            [a * p, b * q, c * r, d * s],
            [e * p, f * q, g * r, h * s],
            [i * p, j * q, k * r, l * s],
            [w * p, x * q, y * r, z * s],
        ]
    return rows


def _sinkhorn_in_place(logits: Tensor, iterations: int, eps: float) -> Tensor:
    m = logits.softmax(-1).add_(eps)
    column = torch.empty_like(m[..., :1, :])
    row = torch.empty_like(m[..., :1])
    torch.sum(m, -2, keepdim=True, out=column)
    m.div_(column.add_(eps))
    for _ in range(iterations - 1):
        torch.sum(m, -1, keepdim=True, out=row)
        m.div_(row.add_(eps))
        torch.sum(m, -2, keepdim=True, out=column)
        m.div_(column.add_(eps))
    return m


if triton is not None:

    @triton.jit
    def _forward_kernel(logits, out, divisors, count, eps, N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        """One tile of BLOCK matrices; the divisor of every step is kept for the backward pass."""
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = token < count
        line = tl.arange(0, N)
        at = token[:, None, None] * (N * N) + line[None, :, None] * N + line[None, None, :]
        m = tl.load(logits + at, mask=live[:, None, None], other=0.0)
        m = tl.exp(m - tl.max(m, axis=2)[:, :, None])
        m = m / tl.sum(m, axis=2)[:, :, None] + eps
        for step in range(STEPS):
            columns = tl.sum(m, axis=1) + eps
            rows = tl.sum(m, axis=2) + eps
            even = step % 2 == 0
            m = tl.where(even, m / columns[:, None, :], m / rows[:, :, None])
            kept = tl.where(even, columns, rows)
            tl.store(divisors + (token[:, None] * STEPS + step) * N + line[None, :], kept, mask=live[:, None])
        tl.store(out + at, m, mask=live[:, None, None])

    @triton.jit
    def _backward_kernel(out, divisors, grad, result, count, eps, N: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        """y = x / D with D = sum(x) + eps gives dx = (dy - sum(dy y)) / D, and x = y D walks back one step."""
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = token < count
        line = tl.arange(0, N)
        at = token[:, None, None] * (N * N) + line[None, :, None] * N + line[None, None, :]
        y = tl.load(out + at, mask=live[:, None, None], other=0.0)
        dy = tl.load(grad + at, mask=live[:, None, None], other=0.0)
        for back in range(STEPS):
            step = STEPS - 1 - back
            even = step % 2 == 0
            d = tl.load(divisors + (token[:, None] * STEPS + step) * N + line[None, :], mask=live[:, None], other=1.0)
            product = dy * y
            by_column = (dy - tl.sum(product, axis=1)[:, None, :]) / d[:, None, :]
            by_row = (dy - tl.sum(product, axis=2)[:, :, None]) / d[:, :, None]
            dy = tl.where(even, by_column, by_row)
            y = tl.where(even, y * d[:, None, :], y * d[:, :, None])
        p = y - eps
        dz = p * (dy - tl.sum(dy * p, axis=2)[:, :, None])
        tl.store(result + at, dz, mask=live[:, None, None])

    @torch.library.custom_op("nautile::sinkhorn", mutates_args=())
    def _sinkhorn_op(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
        """[count, n, n] -> (normalised, divisors [count, 2 iterations - 1, n])."""
        count, n, _ = logits.shape
        steps = 2 * iterations - 1
        out = torch.empty_like(logits)
        divisors = logits.new_empty(count, steps, n)
        _forward_kernel[(triton.cdiv(count, 128),)](logits, out, divisors, count, eps, n, steps, 128)
        return out, divisors

    @_sinkhorn_op.register_fake
    def _(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
        count, n, _ = logits.shape
        return torch.empty_like(logits), logits.new_empty(count, 2 * iterations - 1, n)

    @torch.library.custom_op("nautile::sinkhorn_backward", mutates_args=())
    def _sinkhorn_backward_op(out: Tensor, divisors: Tensor, grad: Tensor, eps: float) -> Tensor:
        """Gradient with respect to the logits, [count, n, n]."""
        count, steps, n = divisors.shape
        result = torch.empty_like(out)
        _backward_kernel[(triton.cdiv(count, 128),)](out, divisors, grad, result, count, eps, n, steps, 128)
        return result

    @_sinkhorn_backward_op.register_fake
    def _(out: Tensor, divisors: Tensor, grad: Tensor, eps: float) -> Tensor:
        return torch.empty_like(out)

    def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.eps = inputs[2]
        ctx.save_for_backward(*output)

    def _backward(ctx, grad, _grad_divisors):  # type: ignore[no-untyped-def]
        out, divisors = ctx.saved_tensors
        return torch.ops.nautile.sinkhorn_backward(out, divisors, grad.contiguous(), ctx.eps), None, None

    _sinkhorn_op.register_autograd(_backward, setup_context=_setup)
