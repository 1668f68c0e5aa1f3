"""Hybrid compressed attention: one shared key-value head, a raw window, and compressed entries (CSA or HCA).

A query at position t sees the last W raw rows and, in layers with a compressor, every complete block of 4 (CSA, of which
the indexer keeps ``index_topk``) or 128 (HCA) tokens. Keys are values. A learned sink per head takes part in the softmax
with value zero. Outputs are de-rotated by -t, because values were rotated along with keys (tech report section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.kernels.attention import attend
from nautile.kernels.topk import topk_mask
from nautile.model.chunk import Chunk
from nautile.model.compressor import Compressor
from nautile.model.indexer import Indexer
from nautile.model.layers import GroupedLinear, Linear, RMSNorm, unit_rms
from nautile.model.rope import Rotation, rotate
from nautile.quant import fp8
from nautile.state.interface import LayerRows

__all__ = ["Attention", "AttentionTrace"]


@dataclass
class AttentionTrace:
    """What one CSA layer's indexer did, for people and for replay. Written by the attention."""

    selected: Tensor | None = None  # [B, T, n] bool
    indexer_loss: Tensor | None = None  # scalar: KL of the indexer to the attention it should predict


class Attention(nn.Module):
    """One layer's attention; ``ratio`` 0 (window only), 4 (CSA) or 128 (HCA)."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        c, heads = config.head_dim, config.num_attention_heads
        self.config = config
        self.ratio = ratio
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, heads * c)
        self.wkv = Linear(config.hidden_size, c)
        self.kv_norm = RMSNorm(c, config.rms_norm_eps)
        self.wo_a = GroupedLinear(config.o_groups, heads * c, config.o_groups * config.o_lora_rank)
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        self.compressor = Compressor(config, ratio, c) if ratio else None
        self.indexer = Indexer(config) if ratio == 4 else None

    def forward(self, x: Tensor, chunk: Chunk, state: LayerRows | None = None, trace: AttentionTrace | None = None) -> Tensor:
        """x [B, T, d], already normalised -> [B, T, d]. With a state, the chunk is appended to it."""
        turn = chunk.rotations[int(self.ratio != 0)]
        turn_heads = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))
        q_low = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_low).unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))
        q = rotate(unit_rms(q, self.config.rms_norm_eps), turn_heads)
        raw = self._append_window(self._quantise(rotate(self.kv_norm(self.wkv(x)), turn)), chunk, state)
        keys = self._append_index_keys(x.detach(), chunk, state)
        entries = self._append_entries(x, chunk, state)
        visible = scores = None
        if entries is not None:
            visible = self._complete(entries.shape[1], chunk)
            if keys is not None and (chunk.indexer_loss or entries.shape[1] > self.config.index_topk):
                scores = self.indexer.scores(x.detach(), q_low.detach(), keys, chunk)  # type: ignore[union-attr]
                visible = topk_mask(scores.detach().masked_fill(~visible, -torch.inf), self.config.index_topk)
        out, weights = attend(q, raw, entries, visible, self.attn_sink, self._first_row(chunk))
        if trace is not None:
            trace.selected = visible if keys is not None else None
        if trace is not None and chunk.indexer_loss and scores is not None and weights is not None and visible is not None:
            trace.indexer_loss = _indexer_divergence(weights, scores, visible)
        result: Tensor = self.wo_b(self.wo_a(rotate(out, turn_heads.inverse()).flatten(2)))
        return result

    def _first_row(self, chunk: Chunk) -> Tensor | None:
        """Smallest row of the raw buffer each query may read, [B, T or 1]: rows before it lie before its document."""
        if chunk.documents is not None:
            return chunk.documents + self.config.sliding_window
        if min(chunk.starts) >= self.config.sliding_window:
            return None
        if len(set(chunk.starts)) == 1:
            return chunk.positions.new_full((1, 1), self.config.sliding_window - chunk.starts[0])
        return self.config.sliding_window - torch.tensor(chunk.starts, device=chunk.positions.device).unsqueeze(1)

    def _quantise(self, kv: Tensor) -> Tensor:
        """FP8 in groups of 64 on the dimensions that are not rotated; the rotated ones stay as they are."""
        if not self.config.fake_quant_kv:
            return kv
        plain = self.config.head_dim - self.config.qk_rope_head_dim
        return torch.cat((fp8.fake_quant_groups(kv[..., :plain]), kv[..., plain:]), dim=-1)

    def _append_window(self, kv: Tensor, chunk: Chunk, state: LayerRows | None) -> Tensor:
        """Rows that the chunk can see: [B, W + T, c], row j at position start - W + j. Keeps the last W in the state."""
        size = self.config.sliding_window
        if state is None:
            return F.pad(kv, (0, 0, size, 0))
        return state.window.extend(kv, chunk.lengths).to(kv.dtype)

    def _append_entries(self, x: Tensor, chunk: Chunk, state: LayerRows | None) -> Tensor | None:
        """All compressed entries of the sequences so far, [B, n, c]; None when no query of the chunk can see one."""
        if self.compressor is None:
            return None
        new, first = self.compressor(x, chunk, state.tail if state else None)
        new = self._quantise(new)
        if state is not None:
            new = state.store_entries(new, first, self._entry_count(chunk)).to(x.dtype)
        return new if new.shape[1] else None

    def _entry_count(self, chunk: Chunk) -> int:
        return max((start + length) // self.ratio for start, length in zip(chunk.starts, chunk.lengths, strict=True))

    def _append_index_keys(self, x: Tensor, chunk: Chunk, state: LayerRows | None) -> Tensor | None:
        """All indexer keys so far, [B, n, index_head_dim]; None in layers without an indexer."""
        if self.indexer is None:
            return None
        new, first = self.indexer.compressor(x, chunk, state.index_tail if state else None)
        new = self.indexer.prepare_keys(new)
        if state is None:
            return new
        return state.store_index_keys(new, first, self._entry_count(chunk)).to(x.dtype)

    def _complete(self, count: int, chunk: Chunk) -> Tensor:
        """Entries a query may see at all, [B, T, n] bool: complete by then, and of its own document."""
        block = torch.arange(count, device=chunk.positions.device)
        visible = block < ((chunk.positions + 1) // self.ratio).unsqueeze(-1)
        if chunk.documents is not None:
            visible = visible & (block * self.ratio >= chunk.documents.unsqueeze(-1))
        return visible


def _indexer_divergence(weights: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
    """KL(attention || softmax(indexer scores)) over visible entries, averaged over the queries that see one.

    weights [B, T, H, n] are attention probabilities under the FULL denominator (window and sink included), summed over heads
    and L1-normalised to make the target (V3.2's indexer loss, on compressed entries).
    """
    target = weights.detach().sum(2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
    log_scores = scores.masked_fill(~visible, -1e30).log_softmax(-1)
    divergence = (target * (target.clamp_min(1e-20).log() - log_scores)).masked_fill(~visible, 0.0).sum(-1)
    seen = visible.any(-1)
    return (divergence * seen).sum() / seen.sum().clamp_min(1)
