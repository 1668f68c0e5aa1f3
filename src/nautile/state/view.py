"""A batch of pool sequences in the shape that the network's modules expect: the portable way to run on pages.

Rings and blocks are read by index (a gather copies what one layer needs for one step) and written in place. Kernels that
walk the block tables themselves need no view. Rows that no token has written read as zero, so nothing that another
sequence left in a slot or block can reach this one, not even a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.state.formats import IndexFormat, PlainFormat, RowFormat
from nautile.state.pages import Pages, PoolError, Sequence

__all__ = ["BatchView", "LayerView"]

Format = PlainFormat | RowFormat | IndexFormat


class BatchView:
    """State of some pool sequences, in this order. ``lengths`` is the view's own: the pool learns by ``append``."""

    def __init__(self, pages: Pages, sequences: Many[Sequence]) -> None:
        if not sequences or any(sequence.slot is None or not sequence.open for sequence in sequences):
            raise PoolError("a batch is made of one or more open sequences that are not parked")
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise PoolError("a sequence may be in a batch once")
        self.pages, self.sequences = pages, tuple(sequences)
        self.lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int64)
        self.layers = tuple(LayerView(self, layer) for layer in range(len(pages.config.layer_ratios)))
        self.step = Step(pages, self.sequences, tuple(self.lengths.tolist()), (0,) * len(sequences))

    @property
    def config(self) -> ModelConfig:
        """Of the pool."""
        return self.pages.config

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    @cached_property
    def mtp(self) -> LayerView:
        """The window of the MTP block. Raises PoolError when the model has none."""
        if self.pages.mtp_layer is None:
            raise PoolError("this model has no MTP block")
        return LayerView(self, self.pages.mtp_layer)

    def begin(self, lengths: tuple[int, ...], width: int) -> None:
        """Fix where the next tokens go. Raises PoolError when ``pool.ensure`` has not made room for them."""
        starts = tuple(self.lengths.tolist())
        for sequence, start, count in zip(self.sequences, starts, lengths, strict=True):
            if start + count > len(sequence.blocks) * self.pages.options.block_tokens:
                raise PoolError(f"{start + count} tokens in {len(sequence.blocks)} blocks: call pool.ensure before the step")
        self.step = Step(self.pages, self.sequences, starts, lengths)


class LayerView:
    """One layer of a batch view."""

    def __init__(self, view: BatchView, layer: int) -> None:
        pages, ordinal = view.pages, 0
        ratio = 0 if layer == pages.mtp_layer else view.config.layer_ratios[layer]
        self.view, self.ratio = view, ratio
        self.window = RingView(view, pages.window, layer, pages.row_format)
        self.tail = self.index_tail = None
        if ratio:
            self.ordinal = ordinal = pages.ordinal[layer]
        if ratio == 4:
            self.tail = TailView(*(RingView(view, ring, ordinal) for ring in (pages.csa_kv, pages.csa_gate)))
            self.index_tail = TailView(*(RingView(view, ring, ordinal) for ring in (pages.index_kv, pages.index_gate)))
        elif ratio:
            self.tail = TailView(*(RingView(view, ring, ordinal) for ring in (pages.hca_kv, pages.hca_gate)))

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """Write new entries [B, n, c] into the blocks; returns the first ``count``, [B, count, c]."""
        pages = self.view.pages
        return self._store(pages.csa if self.ratio == 4 else pages.hca, pages.row_format, new, count)

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """The same for indexer keys [B, n, ci]."""
        return self._store(self.view.pages.index, self.view.pages.index_format, new, count)

    def _store(self, pool: Tensor, layout: Format, new: Tensor, count: int) -> Tensor:
        places = self.view.step.history(self.ratio)
        if len(places.block):
            self.view.pages.changed(set(places.block.tolist()))
            pool[places.block, self.ordinal, places.row] = layout.encode(new[places.batch, places.source])
        rows = pool.shape[2]
        table = self.view.step.table[:, : -(-count // rows)]
        found = layout.decode(pool[table, self.ordinal].flatten(1, 2)[:, :count])
        return found if places.missing is None else found.masked_fill(places.missing[:, :count, None], 0)


@dataclass(frozen=True)
class TailView:
    """The two rings of a compressor."""

    kv: RingView
    gate: RingView


class RingView:
    """One ring tensor [slots, layers, R, w] at one layer."""

    def __init__(self, view: BatchView, ring: Tensor, layer: int, layout: PlainFormat | RowFormat | None = None) -> None:
        self.view, self.ring, self.layer, self.size = view, ring, layer, ring.shape[2]
        self.layout = layout or PlainFormat(ring.dtype, ring.shape[3])

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """See ``RowBuffer.extend``; ``lengths`` are those given to ``begin``."""
        step = self.view.step
        places = step.ring(self.size)
        before = self.layout.decode(self.ring[step.slots, self.layer, places.before])
        if places.missing is not None:
            before = before.masked_fill(places.missing.unsqueeze(-1), 0)
        stored = self.layout.encode(new)
        self.ring[places.slot, self.layer, places.row] = stored[places.batch, places.source]
        return torch.cat((before, self.layout.decode(stored)), dim=1)


@dataclass(frozen=True)
class _RingPlaces:
    before: Tensor  # [B, R] rows of positions start - R .. start - 1
    missing: Tensor | None  # [B, R] bool: those positions are negative
    batch: Tensor  # [n] for each row to be written: its sequence, its token in the chunk,
    source: Tensor
    slot: Tensor  # and where it goes
    row: Tensor


@dataclass(frozen=True)
class _HistoryPlaces:
    batch: Tensor  # [n] for each entry to be written: its sequence, its number among the new ones,
    source: Tensor
    block: Tensor  # and where it goes
    row: Tensor
    missing: Tensor | None  # [B, entries] bool: not complete in this sequence; None when all have as many


class Step:
    """Where the tokens of one pass are read and written, worked out once for all layers."""

    def __init__(
        self, pages: Pages, sequences: tuple[Sequence, ...], starts: tuple[int, ...], lengths: tuple[int, ...]
    ) -> None:
        self.pages, self.sequences, self.starts, self.lengths = pages, sequences, starts, lengths
        self.slots = self._tensor([[sequence.slot or 0] for sequence in sequences])  # [B, 1]
        widest = max(len(sequence.blocks) for sequence in sequences)
        padded = [sequence.blocks + [0] * (widest - len(sequence.blocks)) for sequence in sequences]
        self.table = self._tensor(padded)  # [B, blocks]
        self._rings: dict[int, _RingPlaces] = {}
        self._histories: dict[int, _HistoryPlaces] = {}

    def ring(self, size: int) -> _RingPlaces:
        """For rings of ``size`` rows."""
        if size not in self._rings:
            self._rings[size] = self._ring(size)
        return self._rings[size]

    def history(self, ratio: int) -> _HistoryPlaces:
        """For entries of ``ratio`` tokens."""
        if ratio not in self._histories:
            self._histories[ratio] = self._history(ratio)
        return self._histories[ratio]

    def _ring(self, size: int) -> _RingPlaces:
        places = [
            (b, position - start, sequence.slot or 0, position % size)
            for b, (sequence, start, count) in enumerate(zip(self.sequences, self.starts, self.lengths, strict=True))
            for position in range(max(start, start + count - size), start + count)
        ]
        batch, source, slot, row = (self._tensor(list(column)) for column in zip(*places, strict=True))
        positions = self._tensor([[start] for start in self.starts]) - size + torch.arange(size, device=self.pages.device)
        missing = positions < 0 if min(self.starts) < size else None
        return _RingPlaces(positions % size, missing, batch, source, slot, row)

    def _history(self, ratio: int) -> _HistoryPlaces:
        rows = self.pages.options.block_tokens // ratio
        counts = [(start + count) // ratio for start, count in zip(self.starts, self.lengths, strict=True)]
        places = [
            (b, entry - start // ratio, sequence.blocks[entry // rows], entry % rows)
            for b, (sequence, start, end) in enumerate(zip(self.sequences, self.starts, counts, strict=True))
            for entry in range(start // ratio, end)
        ]
        columns = zip(*places, strict=True) if places else ((), (), (), ())
        batch, source, block, row = (self._tensor(list(column)) for column in columns)
        missing = None
        if len(set(counts)) > 1:
            missing = torch.arange(max(counts), device=self.pages.device) >= self._tensor([[count] for count in counts])
        return _HistoryPlaces(batch, source, block, row, missing)

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.pages.device)
