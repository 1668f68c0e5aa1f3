"""The lightning indexer: which compressed entries a query of a CSA layer attends to.

I_t,i = sum_h w_t,h relu(q_t,h . k_i) over a few small heads (tech report section 2.3.2). Keys come from a compressor of
their own; queries share the low-rank query of the attention. With fake quantisation on, queries and keys go through a
normalised Hadamard transform (a no-op for their products) and FP4, as in the official code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.chunk import Chunk
from nautile.model.compressor import Compressor
from nautile.model.layers import Linear
from nautile.model.rope import rotate
from nautile.quant import hadamard, mxfp4

__all__ = ["Indexer"]


class Indexer(nn.Module):
    """Scores of every visible entry for every query."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.index_n_heads
        self.dim = config.index_head_dim
        self.fake_quant = config.fake_quant_indexer
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, 4, self.dim)

    def prepare_keys(self, keys: Tensor) -> Tensor:
        """Hadamard + FP4 on keys or queries [..., index_head_dim] when fake quantisation is on."""
        return mxfp4.fake_quant(hadamard.transform(keys)) if self.fake_quant else keys

    def scores(self, x: Tensor, q_low: Tensor, keys: Tensor, chunk: Chunk) -> Tensor:
        """x [B, T, d], q_low [B, T, q_lora_rank], keys [B, n, index_head_dim] -> I [B, T, n], at least float32."""
        q = self.wq_b(q_low).unflatten(-1, (self.heads, self.dim))
        turn = chunk.rotations[1]
        q = self.prepare_keys(rotate(q, type(turn)(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))))
        weights = self.weights_proj(x) * (self.dim**-0.5 * self.heads**-0.5)
        products = torch.matmul(q.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, (-1, self.heads))
        wide = products if products.dtype == torch.float64 else products.float()
        scores: Tensor = (wide.relu() * weights.unsqueeze(-1)).sum(2)
        return scores
