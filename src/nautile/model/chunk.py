"""What a forward pass knows about the tokens it was given, apart from their ids. Plain data, made once per pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nautile.model.rope import Rotation, rotation

__all__ = ["Chunk"]


@dataclass(frozen=True)
class Chunk:
    """T new tokens of each of B sequences. Set by the transformer, read by every mechanism.

    ``starts`` and ``lengths`` live on the host: how many tokens each sequence had before, and how many of the T are real
    (the rest is padding on the right). ``documents`` is for packed training rows only: the position in the row at which
    each token's document begins, a multiple of 128, so that compressor blocks never span two documents.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    positions: Tensor  # [B, T] int64
    documents: Tensor | None  # [B, T] int64
    frequencies: tuple[Tensor, Tensor]  # window-only and compressed, each [rope_dim / 2]
    rotations: tuple[Rotation, Rotation]  # at ``positions``, broadcastable over a head axis: [B, T, rope_dim / 2]
    has_state: bool
    ids: Tensor  # [B, T] int64, for the layers that route by token
    indexer_loss: bool = False

    def rotation_at(self, positions: Tensor, compressed: bool) -> Rotation:
        """The layer's rotation at other positions, such as the first token of each compressed block."""
        return rotation(positions, self.frequencies[int(compressed)])
