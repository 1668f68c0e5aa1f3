"""The router's choice for a few tokens: p = sqrt(softplus(logits)), the top k of p + bias or the experts of a table.

Weights are p at the chosen experts divided by their sum, times a factor. Ties go to the lowest expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.kernels.decode.chain import chain
from nautile.kernels.topk import topk_indices

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations have no Triton
    triton = None

__all__ = ["Router", "gated", "route", "route_reference"]


@dataclass(frozen=True)
class Router:
    """How a layer chooses: ``bias`` float32 [E], or ``table`` int64 [V, k] of experts by token id."""

    bias: Tensor | None
    table: Tensor | None
    chosen: int
    factor: float


def route_reference(logits: Tensor, ids: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """The meaning: logits float32 [T, E], ids int64 [T] -> experts int32 [T, k], weights float32 [T, k]."""
    scores = F.softplus(logits).sqrt()
    if router.table is not None:
        experts = router.table[ids]
    else:
        assert router.bias is not None
        experts = topk_indices(scores + router.bias, router.chosen)
    weights = scores.gather(-1, experts)
    return experts.to(torch.int32), weights / (weights.sum(-1, keepdim=True) + 1e-20) * router.factor


def route(logits: Tensor, ids: Tensor, router: Router, *, chained: bool = False) -> tuple[Tensor, Tensor]:
    """``route_reference``; on a GPU one Triton kernel. ``chained``: see ``chain``."""
    return launch(logits, ids, router, chained=chained) if logits.is_cuda else route_reference(logits, ids, router)


def gated(both: Tensor, limit: float, dtype: torch.dtype, *, chained: bool = False) -> Tensor:
    """both [T, 2 I] (gate, then up) -> silu(min(gate, L)) * clip(up, -L, L) in ``dtype``, [T, I]. ``chained``: ``chain``."""
    if both.is_cuda and triton is not None:
        tokens, width = both.shape
        out = torch.empty(tokens, width // 2, dtype=dtype, device=both.device)
        options = chain(both, chained)
        _gated_kernel[(triton.cdiv(width // 2, 256), tokens)](both, out, width // 2, limit, BLOCK=256, num_warps=2, **options)
        return out
    gate, up = both.chunk(2, dim=-1)
    return (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)).to(dtype)


def launch(logits: Tensor, ids: Tensor, router: Router, *, chained: bool = False) -> tuple[Tensor, Tensor]:
    """The kernel; see ``route``. Raises RuntimeError without Triton."""
    if triton is None:
        raise RuntimeError("this needs Triton; route_reference is the same in plain PyTorch")
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, router.chosen, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, router.chosen, dtype=torch.float32, device=logits.device)
    hashed = router.table is not None
    _route_kernel[(tokens,)](
        logits, ids, router.bias if router.bias is not None else logits, router.table if router.table is not None else ids,
        chosen, weights, router.factor, E=experts, BLOCK=triton.next_power_of_2(experts), TOP=router.chosen, HASHED=hashed,
        num_warps=4, **chain(logits, chained),
    )  # fmt: skip
    return chosen, weights


if triton is not None:

    @triton.jit
    def _route_kernel(
        logits, ids, bias, table, chosen, weights, factor,
        E: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, HASHED: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """One token: TOP times the best that is left."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(0).to(tl.int64)
        expert = tl.arange(0, BLOCK)
        live = expert < E
        logit = tl.load(logits + token * E + expert, mask=live, other=0.0)
        positive = tl.maximum(logit, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(logit)))
        score = tl.sqrt(tl.where(logit > 20.0, logit, positive))
        left = tl.where(live, score, float("-inf"))
        if not HASHED:
            left = tl.where(live, score + tl.load(bias + expert, mask=live, other=0.0), float("-inf"))
        own = tl.load(ids + token)
        total = 1e-20
        for choice in tl.static_range(TOP):
            if HASHED:
                best = tl.load(table + own * TOP + choice).to(tl.int32)
            else:
                top = tl.max(left, axis=0)
                best = tl.min(tl.where(left == top, expert, BLOCK), axis=0)
                left = tl.where(expert == best, float("-inf"), left)
            weight = tl.sum(tl.where(expert == best, score, 0.0), axis=0)
            total += weight
            tl.store(chosen + token * TOP + choice, best)
            tl.store(weights + token * TOP + choice, weight)
        tl.debug_barrier()
        lane = tl.arange(0, 16)
        own_weights = weights + token * TOP + lane
        value = tl.load(own_weights, mask=lane < TOP, other=0.0)
        tl.store(own_weights, value / total * factor, mask=lane < TOP)

    @triton.jit
    def _gated_kernel(both, out, inner, limit, BLOCK: tl.constexpr, PDL: tl.constexpr):
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        token = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = column < inner
        gate = tl.minimum(tl.load(both + token * 2 * inner + column, mask=live, other=0.0), limit)
        up = tl.load(both + token * 2 * inner + inner + column, mask=live, other=0.0)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = up * gate / (1.0 + tl.exp(-gate))
        tl.store(out + token * inner + column, value.to(out.dtype.element_ty), mask=live)
