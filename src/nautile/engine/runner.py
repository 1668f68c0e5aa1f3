"""The portable runner: plans over a state pool through the network's modules, on any device PyTorch knows.

Decodes, with and without a draft, go through the network together; a prompt chunk goes alone, because padding a decode to its
length would cost more than a second pass. A batch changes a logit by rounding only (1e-5 in float32).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from nautile.engine.plan import Piece, Plan
from nautile.model import Transformer
from nautile.state.pool import StatePool

__all__ = ["TorchRunner"]


@dataclass(frozen=True)
class _Streams:
    """What the last step left for drafting: residual streams [T, n, d] of each piece, in the plan's order."""

    plan: Plan
    streams: tuple[Tensor, ...]


class TorchRunner:
    """One model, one pool. With ``drafting``, keeps the streams of the last step for ``draft``."""

    def __init__(self, model: Transformer, pool: StatePool, drafting: bool = False) -> None:
        if drafting and not len(model.mtp):
            raise ValueError("this checkpoint has no MTP block: run without speculation")
        self.model, self.pool, self.drafting = model, pool, drafting
        self._last: _Streams | None = None

    @torch.inference_mode()
    def step(self, plan: Plan) -> Tensor:
        """See ``Runner.step``."""
        streams: dict[int, Tensor] = {}
        for group in _groups(plan):
            for index, rows in zip(group, self._pass([plan.pieces[index] for index in group]), strict=True):
                streams[index] = rows
        ordered = tuple(streams[index] for index in range(len(plan.pieces)))
        self._last = _Streams(plan, ordered) if self.drafting else None
        wanted = [rows[len(rows) - piece.rows :] for piece, rows in zip(plan.pieces, ordered, strict=True) if piece.rows]
        if not wanted:
            return torch.empty(0, self.model.config.vocab_size)
        return self.model.logits(self.model.hidden(torch.cat(wanted)))

    def _pass(self, pieces: list[Piece]) -> list[Tensor]:
        """Residual streams [T, n, d] of each piece."""
        device, lengths = self.model.embed.weight.device, [len(piece.ids) for piece in pieces]
        padded = [(*piece.ids, *[0] * (max(lengths) - len(piece.ids))) for piece in pieces]
        ids = torch.tensor(padded, dtype=torch.int64, device=device)
        state = self.pool.batch([piece.sequence for piece in pieces])
        streams = self.model.streams(ids, self.model.new_chunk(ids, state, torch.tensor(lengths)), state)
        return [row[:length] for row, length in zip(streams, lengths, strict=True)]

    # Drafting -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def draft(self, plan: Plan, following: Many[tuple[int, ...]]) -> list[int]:
        """See ``DraftingRunner.draft``. The MTP block's window takes in the tokens that stay; of a prompt chunk the last W are
        enough, because its rows depend on no earlier ones."""
        last, self._last = self._last, None
        if last is None or last.plan is not plan:
            raise ValueError("draft follows the step of the same plan, once")
        guesses = [-1] * len(plan.pieces)
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, after in enumerate(following):
            if after:
                by_length[min(len(after), self.model.config.sliding_window)].append(index)
        for count, group in by_length.items():
            drafted = self._draft_group(
                [plan.pieces[index] for index in group],
                torch.stack([last.streams[index][len(following[index]) - count : len(following[index])] for index in group]),
                [following[index] for index in group],
            )
            for index, guess in zip(group, drafted, strict=True):
                guesses[index] = guess
        return guesses

    def _draft_group(self, pieces: list[Piece], streams: Tensor, following: list[tuple[int, ...]]) -> list[int]:
        count = streams.shape[1]
        starts = [piece.sequence.length + len(after) - count for piece, after in zip(pieces, following, strict=True)]
        ids = torch.tensor([after[-count:] for after in following], dtype=torch.int64, device=streams.device)
        state = self.pool.batch([piece.sequence for piece in pieces])
        state.lengths = torch.tensor(starts)
        chunk = self.model.new_chunk(ids, state)
        _, hidden = self.model.mtp[0].draft(streams, self.model.embed(ids), chunk, state.mtp)  # type: ignore[operator]
        guesses: list[int] = self.model.logits(hidden[:, -1]).argmax(-1).tolist()
        return guesses


def _groups(plan: Plan) -> list[list[int]]:
    """Indices of pieces that run together: the short ones, and each longer one alone."""
    short = [index for index, piece in enumerate(plan.pieces) if len(piece.ids) <= _SHORT]
    long = [[index] for index, piece in enumerate(plan.pieces) if len(piece.ids) > _SHORT]
    return [short, *long] if short else long


_SHORT = 2  # tokens: a decode and its draft
