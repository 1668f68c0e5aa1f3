"""One token of each of B sequences, from packed weights, as a chain of pieces that CUDA graphs can hold.

Piece l ends where layer l's router has chosen: what is then needed of experts that are not on the card is only known there.
``enter`` of layer l + 1 begins with those experts' products. When all experts are on the card everything runs in order without
the host. Shapes depend on B and on a capacity of tokens alone; lengths, blocks and slots are read from the card.

On the CPU the same code runs with the ops' plain meanings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nautile.config import ModelConfig
from nautile.engine.packed_weights import LayerWeights, PackedWeights
from nautile.kernels.decode.linear import linear
from nautile.kernels.decode.query import index_queries, turn_heads
from nautile.kernels.decode.routing import Router, gated, route
from nautile.kernels.decode.rows import Angles, CompressorRows, compress, hadamard_signs, store_window
from nautile.kernels.decode.streams import collapse, join, mix
from nautile.kernels.fp4_experts import FewTiles
from nautile.kernels.index_select import Paging, index_scores_reference, index_select, index_select_reference
from nautile.kernels.sparse_attention import RowPool, sparse_attention, sparse_attention_reference
from nautile.model.rope import inverse_frequencies, rotation
from nautile.state.pages import Pages

__all__ = ["DecodeStep", "Inputs", "Mail", "StepOptions"]


@dataclass(frozen=True)
class Inputs:
    """What the host writes before a step: ids, positions (tokens before this one) and slots int64 [B], table int64 [B,
    blocks]."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor

    @classmethod
    def allocate(cls, batch: int, blocks: int, device: torch.device) -> Inputs:
        """Zeros."""
        one = [torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3)]
        return cls(one[0], one[1], one[2], torch.zeros(batch, blocks, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class Mail:
    """What host and card exchange between two pieces, in host memory.

    Out: x bfloat16 [B, d], experts int32 and weights float32 [B, k], and ``ahead`` int32 [B, k]: what the next router will
    probably choose. In, one run of words so that one copy brings all: staging
    slots int32 and shares float32 [B, k], 0 for pairs that are not streamed, and the host's sums float32 [B, d].
    """

    x: Tensor
    experts: Tensor
    weights: Tensor
    back: Tensor
    ahead: Tensor

    @classmethod
    def allocate(cls, batch: int, chosen: int, hidden: int, pinned: bool) -> Mail:
        """Zeros, page-locked for a card."""

        def new(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, width, dtype=dtype, pin_memory=pinned)

        back = torch.zeros(batch * (2 * chosen + hidden), dtype=torch.float32, pin_memory=pinned)
        numbers = (new(chosen, torch.int32), new(chosen, torch.float32))
        return cls(new(hidden, torch.bfloat16), *numbers, back, new(chosen, torch.int32))

    def cut(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, shares and sums of ``back`` or of a copy of it."""
        batch, chosen = self.experts.shape
        pairs = batch * chosen
        slots, shares, sums = words.split([pairs, pairs, len(words) - 2 * pairs])
        return slots.view(torch.int32).view(batch, chosen), shares.view(batch, chosen), sums.view(batch, -1)

    @cached_property
    def sums(self) -> Tensor:
        """Where the host's sums go."""
        return self.cut(self.back)[2]

    @cached_property
    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Slots and shares for NumPy, which writes a few numbers faster."""
        slots, shares, _ = self.cut(self.back)
        return slots.numpy(), shares.numpy()


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed. ``chained``: fused kernels begin while the one before them ends (``kernels/decode/chain.py``).
    ``vector``: a single token is multiplied without tensor cores (``kernels/decode/linear.py``). ``direct``: its experts are
    not sorted, and those that count nothing are not read (``FewTiles``). ``deterministic``: what a sequence gets depends bit
    for bit on itself alone, in steps of up to 32 sequences and where no expert is computed on the host, and the two before it
    do nothing; else attention is cut as suits the batch."""

    chained: bool = False
    vector: bool = False
    direct: bool = False
    deterministic: bool = False

    def tiles(self, config: ModelConfig, batch: int, device: torch.device) -> FewTiles | None:
        """Sizes of the kernels for the experts of this step; None: the default ones."""
        fits = config.hidden_size % 256 == 0 and config.moe_intermediate_size % 256 == 0 and device.type == "cuda"
        if not self.direct or self.deterministic or batch > 1 or not fits:
            return None
        return FewTiles(warps=4, words=16, down_words=16, direct=True, split=2)


@dataclass(frozen=True)
class _Geometry:
    """Where this step's tokens read and write, the same for all layers of a kind."""

    near: Tensor  # int32 [B, W] window rows of layer 0
    window: Tensor  # int64 [B] row to write, of layer 0
    hca: Tensor  # int32 [B, n] entries of the first HCA layer, -1 where incomplete
    csa: Tensor | None  # the same for CSA where all entries are attended to
    none: Tensor  # int32 [B, 0]
    row: dict[int, Tensor]  # ratio -> int64 [B] the entry that the token's block will have, of the first layer of its kind
    seen: Tensor  # int32 [B] complete CSA entries
    turn: tuple[Angles, Angles]  # at the position: without and with YaRN
    start: dict[int, Angles]  # ratio -> at the first position of the block


class _Kernels:
    """The fused operations, each launched ``chained`` or not."""

    def __init__(self, options: StepOptions) -> None:
        chained = options.chained
        self.linear = partial(linear, chained=chained, vector=options.vector and not options.deterministic)
        self.route = partial(route, chained=chained)
        self.gated = partial(gated, chained=chained)
        self.compress, self.store_window = partial(compress, chained=chained), partial(store_window, chained=chained)
        self.turn_heads, self.index_queries = partial(turn_heads, chained=chained), partial(index_queries, chained=chained)
        self.mix, self.join = partial(mix, chained=chained), partial(join, chained=chained)


class DecodeStep:
    """The pieces for B sequences of up to ``capacity`` tokens (a multiple of the pool's block)."""

    def __init__(
        self,
        weights: PackedWeights,
        pages: Pages,
        batch: int,
        capacity: int,
        mail: Mail | None,
        options: StepOptions | None = None,
    ) -> None:
        """``mail`` None: every expert is on the card, and nothing is exchanged with the host within a step."""
        self.options, device = options or StepOptions(), weights.embed.device
        self._run = _Kernels(self.options)
        self._tiles = self.options.tiles(weights.config, batch, device)
        self.weights, self.pages, self.capacity, self.mail = weights, pages, capacity, mail
        self.config = weights.config
        self.inputs = Inputs.allocate(batch, capacity // pages.options.block_tokens, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.signs = hadamard_signs(self.config.index_head_dim, device)
        self.frequencies = tuple(inverse_frequencies(self.config, compressed=c).to(device) for c in (False, True))
        self.logits: Tensor | None = None
        self._streams = self._x = torch.empty(0, device=device)
        self._entered: dict[int, Tensor] = {}
        self._parts = (self._x, self._x)
        self._mixing = (self._x, self._x)
        self._chosen = (self._x, self._x)
        self._geometry: _Geometry | None = None

    @property
    def pieces(self) -> int:
        """Number of pieces: one a layer, and the head."""
        return len(self.weights.layers) + 1

    def enter(self, index: int) -> None:
        """The streams as piece ``index`` finds them: embedded ids, or those of the last layer with its experts' parts."""
        if index == 0:
            self._geometry = self._place()
            embedded = F.embedding(self.inputs.ids, self.weights.embed).float()
            self._streams = embedded.unsqueeze(1).expand(-1, self.config.hc_mult, -1).contiguous()
        else:
            self._finish_layer()
        if self.mail is not None:
            self._entered[index] = self._streams

    def foresee(self, index: int) -> None:
        """What layer ``index``'s router would choose if its attention changed nothing, into the mail. It may run beside the
        piece: it reads the streams as they were entered, which stay where they are, and writes nothing else."""
        assert self.mail is not None
        layer = self.weights.layers[index]
        x = self._run.mix(self._entered[index], layer.feed_forward, self.dtype)[0]
        experts, _ = self._run.route(self._run.linear(x, layer.gate), self.inputs.ids, self._router(layer))
        self.mail.ahead.copy_(experts, non_blocking=True)

    def piece(self, index: int) -> None:
        """Run piece ``index``; they follow each other from 0, each after its ``enter`` and before its ``meanwhile``."""
        if index == len(self.weights.layers):
            self._head()
            return
        layer = self.weights.layers[index]
        x, post, matrix = self._run.mix(self._streams, layer.attention, self.dtype)
        self._streams = self._run.join(self._streams, (self._attend(index, layer, x),), post, matrix)
        self._x, post, matrix = self._run.mix(self._streams, layer.feed_forward, self.dtype)
        self._mixing = (post, matrix)
        self._route(index, layer)

    def meanwhile(self, index: int) -> None:
        """The shared expert of layer ``index`` and its experts on the card: they run while the host decides and copies."""
        layer = self.weights.layers[index]
        hidden = self._run.gated(self._run.linear(self._x, layer.shared_up), self.config.swiglu_limit, self.dtype)
        shared = self._run.linear(hidden, layer.shared_down)
        self._parts = (shared, self.weights.store.resident_product(index, self._x, *self._chosen, self._tiles))

    def _route(self, index: int, layer: LayerWeights) -> None:
        experts, weights = self._run.route(self._run.linear(self._x, layer.gate), self.inputs.ids, self._router(layer))
        self._chosen = (experts, weights)
        if self.mail is None:
            return
        self.mail.x.copy_(self._x, non_blocking=True)
        self.mail.experts.copy_(experts, non_blocking=True)
        self.mail.weights.copy_(weights, non_blocking=True)

    def _router(self, layer: LayerWeights) -> Router:
        return Router(layer.bias, layer.table, self.config.num_experts_per_tok, self.config.routed_scaling_factor)

    def _finish_layer(self) -> None:
        """All experts' parts, streamed ones and the host's sums among them, back into the streams."""
        parts: tuple[Tensor, ...] = self._parts
        if self.mail is not None:
            slots, shares, sums = self.mail.cut(self.mail.back.to(self._x.device, non_blocking=True))
            store = self.weights.store
            parts = (*parts, store.product(self._x, slots, shares, store.staged, self._tiles), sums)
        self._streams = self._run.join(self._streams, parts, *self._mixing)

    def _head(self) -> None:
        eps = (self.config.hc_eps, self.config.rms_norm_eps)
        hidden = collapse(self._streams, *self.weights.collapse, self.weights.norm, eps)
        self.logits = self._run.linear(hidden.to(self.dtype), self.weights.head)

    # Places -------------------------------------------------------------------------------------------------------

    def _place(self) -> _Geometry:
        pages, config, inputs = self.pages, self.config, self.inputs
        device, p = inputs.ids.device, inputs.positions
        size, layers = config.sliding_window, pages.window.shape[1]
        base = inputs.slots * (layers * size)
        back = p.unsqueeze(1) - torch.arange(size, device=device)
        near = (base.unsqueeze(1) + back % size).masked_fill(back < 0, -1)
        topk_all = self.capacity // 4 <= config.index_topk
        return _Geometry(
            near=near.to(torch.int32),
            window=base + p % size,
            hca=self._entries(pages.hca, 128),
            csa=self._entries(pages.csa, 4) if topk_all else None,
            none=torch.empty(len(p), 0, dtype=torch.int32, device=device),
            row={4: self._row(pages.csa, 4), 128: self._row(pages.hca, 128)},
            seen=((p + 1) // 4).to(torch.int32),
            turn=(self._angles(p, 0), self._angles(p, 1)),
            start={4: self._angles(p // 4 * 4, 1), 128: self._angles(p // 128 * 128, 1)},
        )

    def _angles(self, positions: Tensor, kind: int) -> Angles:
        turn = rotation(positions, self.frequencies[kind])
        return Angles(turn.cos, turn.sin)

    def _row(self, pool: Tensor, ratio: int) -> Tensor:
        layers, per = pool.shape[1:3]
        entry = self.inputs.positions // ratio
        block = self.inputs.table.gather(1, (entry // per).unsqueeze(1)).squeeze(1)
        return block * (layers * per) + entry % per

    def _entries(self, pool: Tensor, ratio: int) -> Tensor:
        """Rows of all entries of the capacity, -1 where a token may not see them."""
        layers, per = pool.shape[1:3]
        entry = torch.arange(self.capacity // ratio, device=pool.device)
        rows = self.inputs.table[:, entry // per] * (layers * per) + entry % per
        seen = ((self.inputs.positions + 1) // ratio).unsqueeze(1)
        return rows.masked_fill(entry >= seen, -1).to(torch.int32)

    # Attention ----------------------------------------------------------------------------------------------------

    def _attend(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        """x [B, d] -> float32 [B, d]; stores the token's rows."""
        config, place = self.config, self._geometry
        assert place is not None
        turn = place.turn[int(layer.ratio != 0)]
        heads, c = config.num_attention_heads, config.head_dim
        window = self.pages.window.view(-1, self.pages.window.shape[-1])[index * config.sliding_window :]
        q_low = self._run.store_window(
            self._run.linear(x, layer.down),
            (layer.q_norm, layer.kv_norm),
            turn,
            window,
            place.window,
            config.rms_norm_eps,
            self.dtype,
        )
        plain = self._compress(index, layer, x)
        both = self._run.linear(q_low, layer.up)
        q = self._run.turn_heads(both[:, : heads * c].unflatten(1, (heads, c)), turn, self.dtype, eps=config.rms_norm_eps)
        far, ids = self._far(index, layer, both[:, heads * c :], plain)
        near = RowPool(window.flatten(), window.shape[-1], c, config.qk_rope_head_dim)
        out = self._sum(q, near, far or near, ids, layer.sink)
        u = self._run.linear(self._run.turn_heads(out, turn, self.dtype, back=True).flatten(1), layer.wo_a, self.dtype)
        return self._run.linear(u, layer.wo_b)

    def _sum(self, q: Tensor, near: RowPool, far: RowPool, ids: Tensor, sink: Tensor) -> Tensor:
        assert self._geometry is not None
        if not q.is_cuda:
            return sparse_attention_reference(q, near, self._geometry.near, far, ids, sink)
        tiles = 1 if ids.shape[1] <= 1024 and (len(q) <= 8 or self.options.deterministic) else 4
        return sparse_attention(q, near, self._geometry.near, far, ids, sink, tiles_per_split=tiles)

    def _compress(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor | None:
        """Take the token into the layer's compressors; the plain projections, whose end are the index weights."""
        if layer.plain is None or layer.compressor is None:
            return None
        config, pages, place = self.config, self.pages, self._geometry
        assert place is not None
        plain, ordinal, m = self._run.linear(x, layer.plain), pages.ordinal[index], layer.ratio
        rings = (pages.csa_kv, pages.csa_gate, pages.csa) if m == 4 else (pages.hca_kv, pages.hca_gate, pages.hca)
        width = layer.compressor.ape.shape[1]
        own = (config.rms_norm_eps, config.qk_rope_head_dim)
        rows = CompressorRows(m, layer.compressor.ape, layer.compressor.norm, *rings, ordinal, *own)
        state = (self.inputs.slots, self.inputs.positions, place.row[m], place.start[m])
        self._run.compress(plain[:, :width], plain[:, width : 2 * width], rows, *state)
        if layer.indexer is not None:
            keys = (pages.index_kv, pages.index_gate, pages.index)
            rows = CompressorRows(4, layer.indexer.ape, layer.indexer.norm, *keys, ordinal, *own, self.signs)
            first, width = 2 * width, layer.indexer.ape.shape[1]
            self._run.compress(plain[:, first : first + width], plain[:, first + width : first + 2 * width], rows, *state)
        return plain

    def _far(self, index: int, layer: LayerWeights, q: Tensor, plain: Tensor | None) -> tuple[RowPool | None, Tensor]:
        """The compressed entries that each token attends to: their pool, and their rows in it."""
        place, pages, config = self._geometry, self.pages, self.config
        assert place is not None
        if layer.ratio == 0 or plain is None:
            return None, place.none
        pool = pages.csa if layer.ratio == 4 else pages.hca
        per, row = pool.shape[2:]
        far = RowPool(pool.flatten()[pages.ordinal[index] * per * row :], row, config.head_dim, config.qk_rope_head_dim)
        if layer.ratio == 128:
            return far, place.hca
        if place.csa is not None:
            return far, place.csa
        heads = config.index_n_heads
        weights = plain[:, plain.shape[1] - heads :]
        queries = self._run.index_queries(q.unflatten(1, (heads, -1)), weights, place.turn[1], self.signs, self.dtype)
        return far, self._select(pages.ordinal[index], *queries)

    def _select(self, ordinal: int, q: Tensor, weights: Tensor) -> Tensor:
        """Rows of the best entries of each sequence, int32 [B, k]."""
        pages, place = self.pages, self._geometry
        assert place is not None
        layers, per = pages.csa.shape[1:3]
        keys = pages.index[self.inputs.table, ordinal].flatten(1, 2)[:, : self.capacity // 4]
        paging = Paging(self.inputs.table, per, layers * per)
        if q.is_cuda:
            return index_select(q, weights, keys, place.seen, self.config.index_topk, paging=paging)[1]
        scores = index_scores_reference(q, weights, keys)
        return paging.rows(index_select_reference(scores, place.seen, self.config.index_topk))
