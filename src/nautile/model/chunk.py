"""What a forward pass knows about the tokens it was given, apart from their ids. Plain data, made once per pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.model.rope import Rotation, rotation

__all__ = ["Chunk", "take_rows"]


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

    @property
    def width(self) -> int:
        """T, padding included."""
        return self.positions.shape[1]

    @property
    def uniform(self) -> bool:
        """True when all sequences start at the same position and have T tokens."""
        return len(set(self.starts)) == 1 and all(length == self.width for length in self.lengths)

    @property
    def first_visible(self) -> Tensor | None:
        """Smallest position each query may see, [B, T]; None when that is 0 for all."""
        return self.documents

    def rotation_at(self, positions: Tensor, compressed: bool) -> Rotation:
        """The layer's rotation at other positions, such as the first token of each compressed block."""
        return rotation(positions, self.frequencies[int(compressed)])


def take_rows(buffer: Tensor, first: tuple[int, ...], count: int) -> Tensor:
    """Rows ``first[b] .. first[b] + count - 1`` of each sequence: [B, R, w] -> [B, count, w].

    Rows outside the buffer come out as copies of its edge; callers mask them by position.
    """
    if len(set(first)) == 1 and 0 <= first[0] and first[0] + count <= buffer.shape[1]:
        return buffer[:, first[0] : first[0] + count]
    offsets = torch.tensor(first, device=buffer.device).unsqueeze(1) + torch.arange(count, device=buffer.device)
    index = offsets.clamp(0, buffer.shape[1] - 1).unsqueeze(-1).expand(-1, -1, buffer.shape[2])
    return buffer.gather(1, index)
