"""Multi-token prediction: one extra block that drafts the token after next from the trunk's streams.

z_j = e_proj(enorm(e)) + h_proj(hnorm(X_j)) for every stream j, with X the trunk streams at position t (before the final
collapse) and e the embedding of token t + 1; then a window-only, score-routed block, its own collapse and norm, and the
trunk's head (tech report section 2.5; the shift is V3's).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.block import Block, BlockTrace
from nautile.model.chunk import Chunk
from nautile.model.layers import Linear, RMSNorm
from nautile.model.mhc import head_collapse
from nautile.state.interface import LayerRows

__all__ = ["MTPBlock"]


class MTPBlock(Block):
    """The draft block; a block plus the joining of two inputs and an output norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, ratio=0, hashed=False)
        d, n = config.hidden_size, config.hc_mult
        self.e_proj = Linear(d, d)
        self.h_proj = Linear(d, d)
        self.enorm = RMSNorm(d, config.rms_norm_eps)
        self.hnorm = RMSNorm(d, config.rms_norm_eps)
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * d))
        self.hc_head_base = nn.Parameter(torch.zeros(n))
        self.hc_head_scale = nn.Parameter(torch.ones(1))

    def draft(
        self, streams: Tensor, embedded: Tensor, chunk: Chunk, state: LayerRows | None = None, trace: BlockTrace | None = None
    ) -> tuple[Tensor, Tensor]:
        """streams [B, T, n, d] at t and embeddings [B, T, d] of t + 1 -> (streams of the next step, hidden [B, T, d])."""
        joined = self.e_proj(self.enorm(embedded)).unsqueeze(-2) + self.h_proj(self.hnorm(streams))
        streams = self(joined.to(streams.dtype), chunk, state, trace)
        h = head_collapse(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
        return streams, self.norm(h)
