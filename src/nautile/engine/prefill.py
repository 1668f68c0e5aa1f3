"""Prompts over packed weights: a whole chunk goes through a layer before it goes to the next.

Every chunk makes all missing experts pass through the card, so chunks should be large: tens of thousands of tokens. Their
streams stay on the card as a whole; what else a layer computes is done slice by slice, in order, and each slice finds in
the pages what the slices before it left there. Attention and the indexer read packed rows where they lie. On the CPU the same
code runs with the ops' plain meanings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.engine.expert_prefill import ExpertGroups
from nautile.engine.packed_weights import PackedNetwork
from nautile.engine.plan import Piece
from nautile.kernels.decode.streams import join, mix
from nautile.kernels.index_select import index_scores_reference, index_select, index_select_reference
from nautile.kernels.sparse_attention import RowPool, sparse_attention, sparse_attention_reference
from nautile.model.attention import Attention
from nautile.model.block import Block
from nautile.model.chunk import Chunk
from nautile.model.layers import unit_rms
from nautile.model.rope import Rotation, rotate
from nautile.state import StatePool
from nautile.state.formats import IndexFormat, PlainFormat, RowFormat
from nautile.state.view import BatchView

__all__ = ["Prefill"]

_SCORES = 1 << 30  # bytes that scores and candidates of the indexer may take


@dataclass(frozen=True)
class _Slice:
    """Some tokens of the chunk: their rows in it, what the modules know about them, and the state as they find it."""

    rows: slice
    chunk: Chunk
    view: BatchView

    @property
    def start(self) -> int:
        """Tokens before it."""
        return self.chunk.starts[0]

    @property
    def end(self) -> int:
        """Tokens including it."""
        return self.chunk.starts[0] + self.chunk.lengths[0]

    @property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return self.chunk.positions[0]


class Prefill:
    """One network over one pool of packed rows; ``slice_tokens`` go through a layer's attention at once."""

    def __init__(self, model: PackedNetwork, pool: StatePool, slice_tokens: int = 2048) -> None:
        """Raises ValueError for slices of no token."""
        if slice_tokens < 1:
            raise ValueError(f"a slice has at least one token, not {slice_tokens}")
        self.model, self.pool, self.slice_tokens = model, pool, slice_tokens
        self.weights, self.config, self.pages = model.packed, model.config, pool.pages
        self.dtype = torch.bfloat16 if model.packed.embed.is_cuda else torch.float32
        self.experts = ExpertGroups(model.packed.store)

    def run(self, piece: Piece) -> Tensor:
        """Take the tokens of a piece into their sequence's state: residual streams [T, n, d] after the last layer."""
        device = self.weights.embed.device
        ids = torch.tensor([piece.ids], dtype=torch.int64, device=device)
        slices = self._slices(piece, ids)
        streams: Tensor = self.model.embed(ids[0]).unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        self.experts.begin_chunk()
        for index, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            self.experts.begin_layer(index, len(streams))
            for part in slices:
                self._attend(index, block, streams, part)
            self._feed(index, block, streams, slices)
        return streams

    def _slices(self, piece: Piece, ids: Tensor) -> list[_Slice]:
        out = []
        for first in range(0, ids.shape[1], self.slice_tokens):
            some = ids[:, first : first + self.slice_tokens]
            view = self.pool.batch([piece.sequence])
            view.lengths = view.lengths + first
            out.append(_Slice(slice(first, first + some.shape[1]), self.model.new_chunk(some, view), view))
        return out

    # Experts ------------------------------------------------------------------------------------------------------

    def _feed(self, index: int, block: Block, streams: Tensor, slices: list[_Slice]) -> None:
        """The layer's experts, in place. y enters the streams linearly: the shared expert's part with the mixing, the routed
        ones' when all slices' are there."""
        site = self.weights.layers[index].feed_forward
        inputs = torch.empty(len(streams), self.config.hidden_size, dtype=self.dtype, device=streams.device)
        posts: list[Tensor] = []
        experts: list[Tensor] = []
        shares: list[Tensor] = []
        for part in slices:
            x, post, matrix = mix(streams[part.rows], site, torch.float32)
            routing = block.ffn.gate(x, part.chunk.ids.flatten())
            streams[part.rows] = join(streams[part.rows], (block.ffn.shared_experts(x),), post, matrix)
            inputs[part.rows] = x
            for kept, value in zip((posts, experts, shares), (post, routing.experts, routing.weights), strict=True):
                kept.append(value)
        routed = self.experts.run(index, inputs, torch.cat(experts), torch.cat(shares))
        for part, post in zip(slices, posts, strict=True):
            streams[part.rows].addcmul_(post.unsqueeze(-1), routed[part.rows].unsqueeze(1))

    # Attention ----------------------------------------------------------------------------------------------------

    def _attend(self, index: int, block: Block, streams: Tensor, part: _Slice) -> None:
        """The layer's attention for one slice, in place."""
        attention, config = block.attn, self.config
        x, post, matrix = mix(streams[part.rows], self.weights.layers[index].attention, torch.float32)
        x = x.unsqueeze(0)
        turn = part.chunk.rotations[int(attention.ratio != 0)]
        heads = Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))
        q_low = attention.q_norm(attention.wq_a(x))
        q = attention.wq_b(q_low).unflatten(-1, (config.num_attention_heads, config.head_dim))
        q = rotate(unit_rms(q, config.rms_norm_eps), heads)[0].to(self.dtype)
        near, near_ids = self._window(index, rotate(attention.kv_norm(attention.wkv(x)), turn)[0], part)
        far, far_ids = self._far(index, attention, x, q_low, part)
        attend = sparse_attention if q.is_cuda else sparse_attention_reference
        out = attend(q, near, near_ids, far or near, far_ids, attention.attn_sink)
        y = attention.wo_b(attention.wo_a(rotate(out.unsqueeze(0).float(), heads.inverse()).flatten(2)))
        streams[part.rows] = join(streams[part.rows], (y[0],), post, matrix)

    def _window(self, index: int, kv: Tensor, part: _Slice) -> tuple[RowPool, Tensor]:
        """kv [T, c] into the ring; the rows that the slice can see, and of them each query's last W, int32 [T, W]."""
        ring, step = part.view.layers[index].window, part.view.step
        places, size = step.ring(ring.size), ring.size
        before = ring.ring[step.slots[0], ring.layer, places.before[0]]
        stored = ring.layout.encode(kv)
        ring.ring[places.slot, ring.layer, places.row] = stored[places.source]
        row = torch.arange(len(kv), device=kv.device).unsqueeze(1) + torch.arange(1, size + 1, device=kv.device)
        ids = row.masked_fill(row < size - part.start, -1).to(torch.int32)
        return self._pool(torch.cat((before, stored)).flatten(), stored.shape[1]), ids

    def _pool(self, data: Tensor, width: int) -> RowPool:
        return RowPool(data, width, self.config.head_dim, self.config.qk_rope_head_dim)

    def _far(self, index: int, attention: Attention, x: Tensor, q_low: Tensor, part: _Slice) -> tuple[RowPool | None, Tensor]:
        """The compressed entries after this slice has added its own: their pool, and each query's rows in it int32 [T, n]."""
        none = torch.empty(x.shape[1], 0, dtype=torch.int32, device=x.device)
        if attention.compressor is None:
            return None, none
        layer, ratio = part.view.layers[index], attention.ratio
        pool = self.pages.csa if ratio == 4 else self.pages.hca
        entries, _ = attention.compressor(x, part.chunk, layer.tail)
        self._store(pool, self.pages.row_format, entries, index, part)
        if attention.indexer is not None:
            keys, _ = attention.indexer.compressor(x, part.chunk, layer.index_tail)
            self._store(self.pages.index, self.pages.index_format, attention.indexer.prepare_keys(keys), index, part)
        count = part.end // ratio
        if not count:
            return None, none
        seen = ((part.positions + 1) // ratio).to(torch.int32)
        if attention.indexer is not None and count > self.config.index_topk:
            entry = self._select(index, attention, x, q_low, seen, part)
        else:
            entry = torch.arange(count, device=x.device, dtype=torch.int32).expand(len(seen), -1)
            entry = entry.masked_fill(entry >= seen.unsqueeze(1), -1)
        per, width = pool.shape[2:]
        far = self._pool(pool.flatten()[self.pages.ordinal[index] * per * width :], width)
        return far, self._rows(pool, entry, part)

    def _rows(self, pool: Tensor, entry: Tensor, part: _Slice) -> Tensor:
        """Numbers of entries, -1 for none, as rows of the pool from the layer's first on."""
        layers, per = pool.shape[1:3]
        number = entry.clamp_min(0).long()
        rows = part.view.step.table[0][number // per] * (layers * per) + number % per
        return rows.masked_fill(entry < 0, -1).to(torch.int32)

    def _store(
        self, pool: Tensor, layout: PlainFormat | RowFormat | IndexFormat, new: Tensor, index: int, part: _Slice
    ) -> None:
        """New entries or keys [1, n, width] into their blocks."""
        ratio = self.config.layer_ratios[index]
        places = part.view.step.history(ratio)
        first, last, per = part.start // ratio, part.end // ratio, pool.shape[2]
        if last > first:
            # worked out on the host: to ask the card would wait for all that it has still to do
            self.pages.changed(set(part.view.sequences[0].blocks[first // per : (last - 1) // per + 1]))
            pool[places.block, self.pages.ordinal[index], places.row] = layout.encode(new[0, places.source])

    def _select(self, index: int, attention: Attention, x: Tensor, q_low: Tensor, seen: Tensor, part: _Slice) -> Tensor:
        """The indexer's choice for each query, int32 [T, k] numbers of entries."""
        indexer, count, k = attention.indexer, part.end // 4, self.config.index_topk
        assert indexer is not None
        turn = part.chunk.rotations[1]
        q = indexer.wq_b(q_low).unflatten(-1, (indexer.heads, indexer.dim))
        q = indexer.prepare_keys(rotate(q, Rotation(turn.cos.unsqueeze(2), turn.sin.unsqueeze(2))))[0].to(self.dtype)
        weights = (indexer.weights_proj(x)[0] * (indexer.dim**-0.5 * indexer.heads**-0.5)).float()
        per = self.pages.index.shape[2]
        table = part.view.step.table[0, : -(-count // per)]
        keys = self.pages.index[table, self.pages.ordinal[index]].flatten(0, 1)[:count].contiguous()
        together = max(1, _SCORES // (16 * count)) if x.is_cuda else len(seen)
        chosen = []
        for some in torch.arange(len(seen), device=x.device).split(together):
            if x.is_cuda:
                chosen.append(index_select(q[some], weights[some], keys, seen[some], k, kernel="many")[1])
            else:
                scores = index_scores_reference(q[some], weights[some], keys)
                chosen.append(index_select_reference(scores, seen[some], k))
        return torch.cat(chosen)
