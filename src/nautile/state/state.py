"""The hybrid KV state of a batch of sequences, in plain tensors.

Per layer there is a *tail* of fixed size (the last W key-value rows; the projections of the last tokens that a compressor
still needs) and a *history* that grows by one row per 4 or 128 tokens. Tails are ordered: the last row always belongs to
the last token, row j of a tail of R rows to position ``length - R + j``. Rows of negative positions are never read, so a
new sequence needs no clearing and cannot see what another one left behind.

What this file does not know: the network. It allocates, grows, copies and counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nautile.config import ModelConfig

__all__ = ["CompressorTail", "LayerState", "Rows", "State", "take_rows"]

_FIRST_CAPACITY = 256  # tokens; history doubles from here


class Rows:
    """The last R rows of each sequence, in order, in a buffer with some room behind them.

    Appending one row is one small copy; when the room is used up the R rows move back to the front. ``buffer`` is
    [B, R + SPARE, width]; the rows are ``buffer[:, end - R : end]``.
    """

    SPARE = 32

    def __init__(self, buffer: Tensor, size: int, end: int) -> None:
        self.buffer, self.size, self.end = buffer, size, end

    @classmethod
    def empty(cls, batch: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> Rows:
        """R = ``size`` rows of zeros."""
        return cls(torch.zeros(batch, size + cls.SPARE, width, dtype=dtype, device=device), size, size)

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Append new [B, T, width], of which the first ``lengths[b]`` rows are real. Returns the R rows before it and it,
        [B, R + T, width], valid until the next call; row j belongs to position start - R + j."""
        count = new.shape[1]
        if count > self.SPARE or min(lengths) < count:
            joined = torch.cat((self.rows(), new.to(self.buffer.dtype)), dim=1)
            self.buffer[:, : self.size] = take_rows(joined, lengths, self.size)
            self.end = self.size
            return joined
        if self.end + count > self.buffer.shape[1]:
            self.buffer[:, : self.size] = self.rows().clone()
            self.end = self.size
        self.buffer[:, self.end : self.end + count] = new
        self.end += count
        return self.buffer[:, self.end - count - self.size : self.end]

    def rows(self) -> Tensor:
        """The last R rows, [B, R, width]."""
        return self.buffer[:, self.end - self.size : self.end]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """A copy whose buffer is ``change`` of this one."""
        return Rows(change(self.buffer), self.size, self.end)


def take_rows(buffer: Tensor, first: tuple[int, ...], count: int) -> Tensor:
    """Rows ``first[b] .. first[b] + count - 1`` of each sequence: [B, R, w] -> [B, count, w].

    Rows outside the buffer come out as copies of its edge; callers mask them by position.
    """
    if len(set(first)) == 1 and first[0] >= 0 and first[0] + count <= buffer.shape[1]:
        return buffer[:, first[0] : first[0] + count]
    offsets = torch.tensor(first, device=buffer.device).unsqueeze(1) + torch.arange(count, device=buffer.device)
    index = offsets.clamp(0, buffer.shape[1] - 1).unsqueeze(-1).expand(-1, -1, buffer.shape[2])
    return buffer.gather(1, index)


@dataclass
class CompressorTail:
    """Projections of the last R tokens, R = 2m with overlap (CSA) and m without (HCA). Written by the compressor.

    kv, gate: rows of width k c in float32, where k is 2 with overlap; ``gate`` is before the positional bias.
    """

    kv: Rows
    gate: Rows


@dataclass
class LayerState:
    """State of one layer. Written by the attention of that layer, grown by ``State.reserve``."""

    window: Rows  # rotated keys = values of the last W tokens, width c
    tail: CompressorTail | None = None
    entries: Tensor | None = None  # [B, capacity, c] compressed keys = values
    index_tail: CompressorTail | None = None
    index_keys: Tensor | None = None  # [B, capacity, index c]

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """Write new entries [B, n, c] at ``first[b]`` of each sequence; returns the first ``count`` rows."""
        assert self.entries is not None
        return _store(self.entries, new, first, count)

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """The same for indexer keys."""
        assert self.index_keys is not None
        return _store(self.index_keys, new, first, count)


class State:
    """State of ``batch_size`` sequences. ``lengths`` [B] int64 on the CPU is the number of tokens each has taken in."""

    def __init__(
        self, config: ModelConfig, batch_size: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a state holds at least one sequence, got batch_size={batch_size}")
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.capacity = 0  # tokens for which history rows are allocated
        self.layers = [self._new_layer(ratio, batch_size) for ratio in config.layer_ratios]
        self.reserve(_FIRST_CAPACITY)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of every buffer, allocated capacity included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of ``tokens`` tokens; grows by doubling, so appending costs amortised constant copies."""
        if tokens <= self.capacity:
            return
        wanted = max(tokens, 2 * self.capacity)
        self.capacity = -(-wanted // 128) * 128
        for ratio, layer in zip(self.config.layer_ratios, self.layers, strict=True):
            if ratio:
                layer.entries = _grown(layer.entries, self.capacity // ratio)
            if layer.index_keys is not None:
                layer.index_keys = _grown(layer.index_keys, self.capacity // ratio)

    def begin(self, lengths: tuple[int, ...], width: int) -> None:
        """Make room for a chunk of ``width`` tokens; rows that a short sequence leaves without meaning need room as well."""
        self.reserve(int(self.lengths.max()) + width + 128)

    def snapshot(self) -> State:
        """An independent copy of everything, to be given to ``restore`` later (any number of times)."""
        return self.fork()

    def fork(self) -> State:
        """An independent state with the same contents: the two never influence each other again."""
        other = copy.copy(self)
        other.lengths = self.lengths.clone()
        other.layers = [_map_layer(layer, Tensor.clone) for layer in self.layers]
        return other

    def restore(self, snapshot: State) -> None:
        """Become what ``snapshot`` was. Raises ValueError when it belongs to another configuration, batch size or dtype."""
        theirs = (snapshot.config, snapshot.batch_size, snapshot.dtype)
        if theirs != (self.config, self.batch_size, self.dtype):
            raise ValueError("the snapshot belongs to a state of another configuration, batch size or dtype")
        copied = snapshot.fork()
        self.lengths, self.layers, self.capacity = copied.lengths, copied.layers, copied.capacity

    def expand(self, batch_size: int) -> State:
        """A state in which each of ``batch_size`` sequences is a copy of the only one here (a shared prefix)."""
        if self.batch_size != 1:
            raise ValueError(f"expand needs a state of one sequence, this one has {self.batch_size}")
        other = copy.copy(self)
        other.lengths = self.lengths.repeat(batch_size)
        other.layers = [_map_layer(layer, lambda x: x.repeat(batch_size, 1, 1)) for layer in self.layers]
        return other

    def select(self, rows: list[int]) -> State:
        """A state holding copies of the given sequences, in that order (to drop finished ones from a batch)."""
        index = torch.tensor(rows, dtype=torch.int64)
        other = copy.copy(self)
        other.lengths = self.lengths[index]
        on_device = index.to(self.device)
        other.layers = [_map_layer(layer, lambda x: x.index_select(0, on_device)) for layer in self.layers]
        return other

    def _new_layer(self, ratio: int, batch: int) -> LayerState:
        config = self.config
        window = Rows.empty(batch, config.sliding_window, config.head_dim, self.dtype, self.device)
        if not ratio:
            return LayerState(window)
        layer = LayerState(window, self._new_tail(ratio, batch, config.head_dim), self._empty(batch, config.head_dim))
        if ratio == 4:
            layer.index_tail = self._new_tail(ratio, batch, config.index_head_dim)
            layer.index_keys = self._empty(batch, config.index_head_dim)
        return layer

    def _new_tail(self, ratio: int, batch: int, dim: int) -> CompressorTail:
        rows, width = (2 * ratio, 2 * dim) if ratio == 4 else (ratio, dim)
        kv, gate = (Rows.empty(batch, rows, width, torch.float32, self.device) for _ in range(2))
        return CompressorTail(kv, gate)

    def _empty(self, batch: int, dim: int) -> Tensor:
        return torch.zeros(batch, 0, dim, dtype=self.dtype, device=self.device)

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for value in _values(layer):
                if isinstance(value, Tensor):
                    yield value
                elif isinstance(value, Rows):
                    yield value.buffer
                elif value is not None:
                    yield from (value.kv.buffer, value.gate.buffer)


def _store(buffer: Tensor, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
    """Write rows new [B, n, w] at ``first[b]`` of each sequence of buffer [B, capacity, w]; return its first ``count`` rows."""
    rows = new.shape[1]
    if rows and len(set(first)) == 1:
        buffer[:, first[0] : first[0] + rows] = new
    elif rows:
        numbers = torch.tensor(first, device=new.device).unsqueeze(1) + torch.arange(rows, device=new.device)
        buffer.scatter_(1, numbers.unsqueeze(-1).expand(new.shape), new.to(buffer.dtype))
    return buffer[:, :count]


def _values(layer: LayerState) -> list[Rows | Tensor | CompressorTail | None]:
    return [getattr(layer, field.name) for field in fields(layer)]


def _map_layer(layer: LayerState, change: Callable[[Tensor], Tensor]) -> LayerState:
    def mapped(value: Rows | Tensor | CompressorTail | None) -> Rows | Tensor | CompressorTail | None:
        if isinstance(value, CompressorTail):
            return CompressorTail(value.kv.mapped(change), value.gate.mapped(change))
        if isinstance(value, Rows):
            return value.mapped(change)
        return None if value is None else change(value)

    return LayerState(*(mapped(value) for value in _values(layer)))  # type: ignore[arg-type]


def _grown(rows: Tensor | None, capacity: int) -> Tensor:
    assert rows is not None
    larger = rows.new_zeros(rows.shape[0], capacity, rows.shape[2])
    larger[:, : rows.shape[1]] = rows
    return larger
