"""One block: two sites, attention and MoE, each read from and written back to the residual streams by mHC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.attention import Attention, AttentionTrace
from nautile.model.chunk import Chunk
from nautile.model.layers import RMSNorm
from nautile.model.mhc import collapse, distribute, mixing
from nautile.model.moe import MoE, Routing
from nautile.state.interface import LayerRows

__all__ = ["Block", "BlockTrace"]


@dataclass
class BlockTrace:
    """What a block decided. Written by the block when somebody asks for it."""

    attention: AttentionTrace
    routing: Routing | None = None
    mixing: list[tuple[Tensor, Tensor, Tensor]] | None = None  # when a list: pre, post, matrix of the two sites, detached


class Block(nn.Module):
    """A trunk layer or the MTP layer's body."""

    hc_attn_fn: Tensor
    hc_attn_base: Tensor
    hc_attn_scale: Tensor
    hc_ffn_fn: Tensor
    hc_ffn_base: Tensor
    hc_ffn_scale: Tensor

    def __init__(self, config: ModelConfig, ratio: int, hashed: bool) -> None:
        super().__init__()
        n, rows = config.hc_mult, (2 + config.hc_mult) * config.hc_mult
        self.config = config
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, ratio)
        self.ffn = MoE(config, hashed)
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", nn.Parameter(torch.empty(rows, n * config.hidden_size)))
            self.register_parameter(f"hc_{site}_base", nn.Parameter(torch.zeros(rows)))
            self.register_parameter(f"hc_{site}_scale", nn.Parameter(torch.ones(3)))

    def forward(self, streams: Tensor, chunk: Chunk, state: LayerRows | None = None, trace: BlockTrace | None = None) -> Tensor:
        """streams [B, T, n, d] -> [B, T, n, d]."""
        pre, post, matrix = mixing(streams, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.config)
        if trace is not None and trace.mixing is not None:
            trace.mixing.append((pre.detach(), post.detach(), matrix.detach()))
        y = self.attn(self.attn_norm(collapse(streams, pre)), chunk, state, trace.attention if trace else None)
        streams = distribute(streams, y, post, matrix)
        pre, post, matrix = mixing(streams, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.config)
        if trace is not None and trace.mixing is not None:
            trace.mixing.append((pre.detach(), post.detach(), matrix.detach()))
        y, routing = self.ffn(self.ffn_norm(collapse(streams, pre)), chunk.ids)
        if trace is not None:
            trace.routing = routing
        return distribute(streams, y, post, matrix)
