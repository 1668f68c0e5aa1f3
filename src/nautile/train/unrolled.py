"""The training forward as the rollout ran it: the same chunks through the same modules, with gradients through the state.

A product of another shape rounds differently, so a row that is computed all at once differs from the one that was decoded
token by token by 1e-6 or so. Here one sequence is taken in exactly as the engine did it without a prefix cache: the prompt in
chunks that end at multiples of ``snapshot_every``, then one token at a time. In float32 on one device the log-probabilities are
then those of the rollout, bit for bit (tests/train/test_unrolled.py). It costs what decoding costs: it is for checking, and for
runs in which nothing may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nautile.config import ModelConfig
from nautile.model import Transformer
from nautile.model.transformer import Trace

__all__ = ["GrowingState", "chunks", "unrolled_logits"]


class _Rows:
    """The last ``size`` rows of one sequence, [1, size, w]; every ``extend`` makes a new tensor, so gradients pass."""

    def __init__(self, size: int, width: int, like: Tensor) -> None:
        self.size, self.rows = size, like.new_zeros(1, size, width)

    def extend(self, new: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """See ``RowBuffer.extend``."""
        joined = torch.cat((self.rows, new), dim=1)
        self.rows = joined[:, -self.size :]
        return joined


@dataclass(frozen=True)
class _Tail:
    kv: _Rows
    gate: _Rows


@dataclass
class _Layer:
    """One layer; ``entries`` and ``index_keys`` grow by concatenation."""

    window: _Rows
    tail: _Tail | None
    index_tail: _Tail | None
    entries: Tensor | None = None
    index_keys: Tensor | None = None

    def store_entries(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows.store_entries``."""
        self.entries = new if self.entries is None else torch.cat((self.entries, new), dim=1)
        return self.entries[:, :count]

    def store_index_keys(self, new: Tensor, first: tuple[int, ...], count: int) -> Tensor:
        """See ``LayerRows.store_index_keys``."""
        self.index_keys = new if self.index_keys is None else torch.cat((self.index_keys, new), dim=1)
        return self.index_keys[:, :count]


@dataclass
class GrowingState:
    """A state of one sequence for the network's modules that nothing is written into: see ``BatchState``."""

    config: ModelConfig
    layers: list[_Layer]
    lengths: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @classmethod
    def of(cls, model: Transformer) -> GrowingState:
        """An empty state on the model's device."""
        like = model.embed.weight
        return cls(model.config, [_new_layer(model.config, ratio, like) for ratio in model.config.layer_ratios])

    @property
    def batch_size(self) -> int:
        """One."""
        return 1

    def begin(self, lengths: tuple[int, ...], width: int) -> None:
        """Nothing to make room for."""


def _new_layer(config: ModelConfig, ratio: int, like: Tensor) -> _Layer:
    window = _Rows(config.sliding_window, config.head_dim, like)
    if not ratio:
        return _Layer(window, None, None)
    index = _new_tail(ratio, config.index_head_dim, like) if ratio == 4 else None
    return _Layer(window, _new_tail(ratio, config.head_dim, like), index)


def _new_tail(ratio: int, dim: int, like: Tensor) -> _Tail:
    rows, width = (2 * ratio, 2 * dim) if ratio == 4 else (ratio, dim)
    return _Tail(_Rows(rows, width, like), _Rows(rows, width, like))


def chunks(prompt: int, total: int, snapshot_every: int) -> Iterator[tuple[int, int]]:
    """[start, end) of every pass of a sequence of ``total`` tokens whose first ``prompt`` came at once; the last sampled token
    is never taken in, so pass ``total`` without it."""
    start = 0
    while start < prompt:
        end = min(prompt, (start // snapshot_every + 1) * snapshot_every)
        yield start, end
        start = end
    for position in range(prompt, total):
        yield position, position + 1


def unrolled_logits(
    model: Transformer, ids: Sequence[int], prompt: int, snapshot_every: int, trace: list[Trace] | None = None
) -> Tensor:
    """Float32 logits [len(ids) - prompt, V] that chose ``ids[prompt:]``, computed as the engine computed them.

    Gradients must be enabled (the modules take another path for single tokens without them, and so does the rollout).
    ``trace`` collects what each pass decided.
    """
    if not torch.is_grad_enabled():
        raise ValueError("unrolled_logits needs gradients enabled: the rollout's passes take that path too")
    row = torch.tensor([list(ids)], dtype=torch.int64, device=model.embed.weight.device)
    state, rows = GrowingState.of(model), list[Tensor]()
    for start, end in chunks(prompt, len(ids) - 1, snapshot_every):
        part, seen = row[:, start:end], Trace() if trace is not None else None
        streams = model.streams(part, model.new_chunk(part, state, torch.tensor([end - start])), state, seen)
        state.lengths = state.lengths + (end - start)
        if trace is not None and seen is not None:
            trace.append(seen)
        if end >= prompt:
            rows.append(model.logits(model.hidden(streams[0, -1:])))
    return torch.cat(rows)
