"""What the network needs of a state, whatever its memory looks like: the dense ``State`` and a view of a pool both have it.

The network appends a chunk of T tokens to B sequences in a fixed order: ``begin``, then per layer ``window.extend``, the
compressors' ``extend`` and the two ``store`` calls. It never looks at buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from nautile.config import ModelConfig

__all__ = ["BatchState", "LayerRows", "RowBuffer", "TailRows"]


class RowBuffer(Protocol):
    """The last ``size`` rows of each sequence."""

    @property
    def size(self) -> int: ...

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Append new [B, T, w], of which the first ``lengths[b]`` rows are real; returns the ``size`` rows before it and it
        as they are stored, [B, size + T, w]. Row j belongs to position start - size + j."""


class TailRows(Protocol):
    """Projections that a compressor still needs; ``gate`` is before the positional bias."""

    @property
    def kv(self) -> RowBuffer: ...
    @property
    def gate(self) -> RowBuffer: ...


class LayerRows(Protocol):
    """State of one layer."""

    @property
    def window(self) -> RowBuffer: ...
    @property
    def tail(self) -> TailRows | None: ...
    @property
    def index_tail(self) -> TailRows | None: ...

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """Write compressed entries new [B, n, c] from number ``first[b]`` on; returns entries 0 .. count - 1, [B, count, c],
        where rows that a sequence has not completed have no meaning."""

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """The same for indexer keys [B, n, ci]."""


class BatchState(Protocol):
    """State of B sequences."""

    lengths: Tensor  # [B] int64 on the CPU: tokens taken in; advanced by the network at the end of a pass

    @property
    def config(self) -> ModelConfig: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def layers(self) -> Sequence[LayerRows]: ...

    def begin(self, lengths: tuple[int, ...], width: int) -> None:
        """The next pass appends ``lengths[b]`` tokens to each sequence, padded to ``width``: make room."""
