"""The compressor: m tokens become one key-value entry (CSA: m = 4 with overlap; HCA: m = 128).

Every token is projected to a value kv and a score s (tech report section 2.3.1). Within a block the scores, plus a learned
bias per slot, go through a softmax per channel, and the entry is the weighted sum. With overlap there are two halves: the
"a" half of a token speaks for the NEXT block, the "b" half for its own, so a CSA entry is a sum over 8 slots. The entry is
normalised and rotated at the position of the FIRST token of its own block. Only complete blocks exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautile.config import ModelConfig
from nautile.model.chunk import Chunk
from nautile.model.layers import Linear, RMSNorm
from nautile.model.rope import rotate
from nautile.state import take_rows
from nautile.state.interface import TailRows

__all__ = ["Compressor", "block_numbers"]

_NEVER = -1e30  # a score that softmax turns into exactly zero without making a block of such scores NaN


class Compressor(nn.Module):
    """Projections and pooling of one layer; ``dim`` is head_dim for entries, index_head_dim for indexer keys."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.overlap = ratio == 4
        width = 2 * dim if self.overlap else dim
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, chunk: Chunk, tail: TailRows | None) -> tuple[Tensor, tuple[int, ...]]:
        """x [B, T, d] -> (entries [B, n, dim], index of the first of them in each sequence).

        n is the largest number of blocks that any sequence completes in this chunk; a sequence that completes fewer has
        rows without meaning at its end, which later chunks overwrite. The tail takes in the chunk.
        """
        kv, gate = self.wkv(x), self.wgate(x)
        first_block = tuple(start // self.ratio for start in chunk.starts)
        complete = tuple((start + length) // self.ratio for start, length in zip(chunk.starts, chunk.lengths, strict=True))
        count = max(end - first for end, first in zip(complete, first_block, strict=True))
        offsets = tuple(first * self.ratio for first in first_block)  # position of the first token of the first block
        if tail is not None:
            kv, gate, offsets = self._join(kv, gate, chunk, tail, offsets)
        if count == 0:
            return x.new_empty(x.shape[0], 0, self.norm.weight.shape[0]), first_block
        entries = self._pool(kv, gate, offsets, count, chunk, first_block)
        return self._finish(entries.to(x.dtype), chunk, first_block), first_block

    def _join(
        self, kv: Tensor, gate: Tensor, chunk: Chunk, tail: TailRows, offsets: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Put the tail before the chunk, keep the new tail, and say in which row each first block now begins."""
        rows = tuple(offset - start + tail.kv.size for offset, start in zip(offsets, chunk.starts, strict=True))
        return tail.kv.extend(kv, chunk.lengths), tail.gate.extend(gate, chunk.lengths), rows

    def _pool(
        self, kv: Tensor, gate: Tensor, offsets: tuple[int, ...], count: int, chunk: Chunk, first_block: tuple[int, ...]
    ) -> Tensor:
        """Softmax per channel over the slots of ``count`` blocks: -> [B, count, dim]."""
        m = self.ratio
        rows = count * m
        kv_own = take_rows(kv, offsets, rows).unflatten(1, (count, m))
        gate_own = take_rows(gate, offsets, rows).unflatten(1, (count, m)) + self.ape
        if not self.overlap:
            return _weighted_sum(kv_own, gate_own)
        kv_last, gate_last = self._previous(kv, gate, offsets, rows, chunk, first_block)
        dim = self.norm.weight.shape[0]
        values = torch.cat((kv_last[..., :dim], kv_own[..., dim:]), dim=2)
        scores = torch.cat((gate_last[..., :dim], gate_own[..., dim:]), dim=2)
        return _weighted_sum(values, scores)

    def _previous(
        self, kv: Tensor, gate: Tensor, offsets: tuple[int, ...], rows: int, chunk: Chunk, first_block: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Values and scores of the block before each block; slots before the sequence or document count for nothing."""
        m, count = self.ratio, rows // self.ratio
        before = tuple(offset - m for offset in offsets)
        if chunk.has_state:
            kv_last, gate_last = take_rows(kv, before, rows), take_rows(gate, before, rows)
        else:
            pad = (0, 0, m, 0)
            kv_last = nn.functional.pad(kv[:, : rows - m], pad)
            gate_last = nn.functional.pad(gate[:, : rows - m], pad)
        gate_last = gate_last.unflatten(1, (count, m)) + self.ape
        block = torch.arange(count, device=kv.device)
        if chunk.documents is not None:
            exists = chunk.documents[:, :rows:m] < block * m
        else:
            exists = block_numbers(first_block, count, kv.device) > 0
        return kv_last.unflatten(1, (count, m)), torch.where(exists[:, :, None, None], gate_last, _NEVER)

    def _finish(self, entries: Tensor, chunk: Chunk, first_block: tuple[int, ...]) -> Tensor:
        positions = block_numbers(first_block, entries.shape[1], entries.device) * self.ratio
        return rotate(self.norm(entries), chunk.rotation_at(positions, compressed=True))


def block_numbers(first_block: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Numbers of ``count`` consecutive blocks of each sequence, [B or 1, count] int64."""
    blocks = torch.arange(count, device=device).unsqueeze(0)
    if len(set(first_block)) == 1:
        return blocks + first_block[0]
    return blocks + torch.tensor(first_block, device=device).unsqueeze(1)


def _weighted_sum(values: Tensor, scores: Tensor) -> Tensor:
    """[B, n, slots, dim] -> [B, n, dim], softmax over slots per channel in at least float32."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide.softmax(dim=2) * values).sum(dim=2)
