"""Mixture of experts: score- or hash-routed, clamped SwiGLU, one shared expert.

p = sqrt(softplus(W_g x)). Score-routed layers take the top k of p + bias (the bias balances load and never enters the
weights); hash layers take the experts that a table lists for the token's id. Weights are p at the chosen experts, divided
by their sum, times ``routed_scaling_factor`` (tech report section 2.4; architecture notes 3.6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.kernels.topk import topk_indices
from nautile.model.layers import Linear
from nautile.quant import mxfp4

__all__ = ["Experts", "Gate", "MoE", "Routing", "clamped_swiglu"]


@dataclass(frozen=True)
class Routing:
    """Where N tokens went. Written by the gate; read by the experts, the balancer and traces."""

    scores: Tensor  # [N, E] p, at least float32
    experts: Tensor  # [N, k] int64
    weights: Tensor  # [N, k]


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, L)) * clip(up, -L, L), elementwise."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class Gate(nn.Module):
    """The router of one layer."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.bias: Tensor | None
        self.tid2eid: Tensor | None
        shape = (config.vocab_size, config.num_experts_per_tok)
        self.register_buffer("bias", None if hashed else torch.zeros(config.n_routed_experts))
        self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64) if hashed else None)

    def forward(self, x: Tensor, ids: Tensor) -> Routing:
        """x [N, d], ids [N] -> Routing. The product runs in float32 even under autocast: a flipped expert is a big error."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            scores = F.softplus(F.linear(wide, self.weight)).sqrt()
        if self.tid2eid is not None:
            experts = self.tid2eid[ids]
        else:
            assert self.bias is not None
            experts = _topk(scores.detach() + self.bias, self.config.num_experts_per_tok)
        weights = scores.gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling_factor
        return Routing(scores, experts, weights)


def _topk(scores: Tensor, k: int) -> Tensor:
    # A compiled sort of float scores is slow on CUDA and real-valued router scores do not tie there.
    return scores.topk(k, dim=-1, sorted=False).indices if scores.is_cuda else topk_indices(scores, k)


class Experts(nn.Module):
    """All routed experts of a layer, stacked: w1, w3 [E, I, d] (gate, up) and w2 [E, d, I] (down)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, inner, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w1 = nn.Parameter(torch.empty(experts, inner, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        self.qat = False  # pass weights through their MXFP4 grid, with a straight-through gradient
        self.dense = False  # run every expert on every token: more arithmetic, one big product (small E on a GPU)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [N, d] -> sum over the chosen experts of weight * w2(swiglu(w1 x, w3 x)), [N, d]."""
        weights = (self.w1, self.w3, self.w2)
        if self.qat:
            weights = tuple(mxfp4.fake_quant(weight) for weight in weights)  # type: ignore[assignment]
        if self.dense:
            return self._dense(x, routing, *weights)
        if x.shape[0] == 1:
            return self._one_token(x, routing, *weights)
        return self._grouped(x, routing, *weights)

    def _dense(self, x: Tensor, routing: Routing, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        spread = torch.zeros_like(routing.scores).scatter(1, routing.experts, routing.weights)
        hidden = clamped_swiglu(F.linear(x, w1.flatten(0, 1)), F.linear(x, w3.flatten(0, 1)), self.limit)
        hidden = (hidden.unflatten(1, (w1.shape[0], -1)) * spread.unsqueeze(-1)).to(hidden.dtype).flatten(1)
        return F.linear(hidden, w2.permute(1, 0, 2).flatten(1))

    def _one_token(self, x: Tensor, routing: Routing, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """One token, read only the chosen experts' weights; elementwise work is done for all of them at once."""
        row, chosen = x[0], routing.experts[0].tolist()
        gate = torch.stack([torch.mv(w1[expert], row) for expert in chosen])
        up = torch.stack([torch.mv(w3[expert], row) for expert in chosen])
        hidden = clamped_swiglu(gate, up, self.limit) * routing.weights[0].unsqueeze(1)
        out = torch.mv(w2[chosen[0]], hidden[0])
        for index, expert in enumerate(chosen[1:], start=1):
            out = torch.addmv(out, w2[expert], hidden[index])
        return out.unsqueeze(0)

    def _grouped(self, x: Tensor, routing: Routing, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        tokens_of = routing.experts.flatten().argsort(stable=True)
        counts = torch.bincount(routing.experts.flatten(), minlength=w1.shape[0]).tolist()
        for expert, slots in enumerate(tokens_of.split(counts)):
            if not len(slots):
                continue
            token, choice = slots // routing.experts.shape[1], slots % routing.experts.shape[1]
            rows = x[token]
            hidden = clamped_swiglu(F.linear(rows, w1[expert]), F.linear(rows, w3[expert]), self.limit)
            weighted = hidden * routing.weights[token, choice].unsqueeze(-1)
            out = out.index_add(0, token, F.linear(weighted.to(x.dtype), w2[expert]).to(x.dtype))
        return out


class SharedExpert(nn.Module):
    """The expert every token goes through; clamped like the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, d] -> [N, d]."""
        out: Tensor = self.w2(clamped_swiglu(self.w1(x), self.w3(x), self.limit))
        return out


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.gate = Gate(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Routing]:
        """x [B, T, d], ids [B, T] -> ([B, T, d], where the tokens went)."""
        flat = x.flatten(0, -2)
        routing = self.gate(flat, ids.flatten())
        out = self.experts(flat, routing) + self.shared_experts(flat)
        return out.view(x.shape), routing
