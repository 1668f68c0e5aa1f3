"""Runs plans with the native CPU kernels: the same meaning as the modules over the same pool, several times faster.

Every logit is bit for bit the same however its token is reached: alone, in a chunk, beside other sequences, with any number
of threads. "float32" agrees with the modules to about 1e-6; "bfloat16" keeps weights in bfloat16, which is exact for weights
on FP8 and FP4 grids.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nautile.engine.plan import Piece, Plan
from nautile.kernels.native import Kinds, NativeModel, NativeStep, NativeUnavailable, StatePools
from nautile.model import Transformer
from nautile.state.pages import HISTORY, TAIL, Pages

__all__ = ["NativeRunner", "NativeUnavailable"]

KINDS = {
    "float32": Kinds(index="sifted"),
    "bfloat16": Kinds(main="split", output="split", experts="bfloat16", head="bfloat16", attention="bfloat16", index="int8"),
}


class NativeRunner:
    """A ``Runner`` over one model and one pool, on the CPU. Not for two threads at a time; not usable after a fork."""

    def __init__(
        self,
        model: Transformer | NativeModel,
        pages: Pages,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
        library: Path | None = None,
    ) -> None:
        """Pack the weights (a NativeModel has done so) and start the threads; ``threads`` None: one a core.

        Raises NativeUnavailable when there is no compiler, or model or pool are not made for these kernels.
        """
        if not isinstance(model, NativeModel):
            model = pack(model, dtype, library)
        if model.config != pages.config:
            raise ValueError("the pool belongs to another configuration than the model")
        self.model, self.pages, self.config = model, pages, model.config
        tensors = {name: getattr(pages, name) for name in (*HISTORY, *TAIL)}
        pools = StatePools(tensors, pages.options.block_tokens, pages.version)
        self._step = NativeStep(model, pools, threads or os.cpu_count() or 1)
        self._process = os.getpid()

    def step(self, plan: Plan) -> Tensor:
        """float32 logits [plan.rows, V]; the state of every token is in the pool afterwards.

        Raises ValueError for ids outside the vocabulary, positions past the model's or the blocks' end, parked sequences.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this runner's threads stayed behind in the parent process: make a new runner after a fork")
        if not plan.pieces:
            return torch.empty(0, self.config.vocab_size)
        pieces = [self._numbers(piece) for piece in plan.pieces]
        ids = [token for piece in plan.pieces for token in piece.ids]
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}, got {min(ids)}..{max(ids)}")
        if len({id(piece.sequence) for piece in plan.pieces}) < len(plan.pieces):
            raise ValueError("a sequence may be in a plan once")
        blocks = [self._blocks(piece) for piece in plan.pieces]
        return self._step.run(pieces, ids, blocks, plan.rows, (None, self._keep_streams(plan)))

    def parts(self) -> dict[str, float]:
        """Seconds of wall time in each part of the steps since the last call."""
        return self._step.parts()

    def _keep_streams(self, plan: Plan) -> Tensor | None:
        """Where the residual streams of this step's tokens shall go; None: nowhere."""
        return None

    def _numbers(self, piece: Piece) -> tuple[int, int, int, int]:
        """(slot, start, count, wanted) of a piece, every one of them checked."""
        sequence, count, options = piece.sequence, len(piece.ids), self.pages.options
        end = sequence.length + count
        if sequence.slot is None or not sequence.open:
            raise ValueError("a parked or closed sequence cannot take part in a step")
        if not count:
            raise ValueError("a piece needs at least one token")
        if end > self.config.max_position_embeddings:
            raise ValueError(f"position {end - 1} is past max_position_embeddings={self.config.max_position_embeddings}")
        if end > len(sequence.blocks) * options.block_tokens:
            raise ValueError(f"{end} tokens in {len(sequence.blocks)} blocks: call pool.ensure before the step")
        if not 0 <= sequence.slot < options.slots:
            raise ValueError("the sequence belongs to another pool")
        return sequence.slot, sequence.length, count, {"none": 0, "last": 1, "all": 2}[piece.logits]

    def _blocks(self, piece: Piece) -> list[int]:
        """The blocks that a piece reaches, checked. A long sequence has thousands: no loop of Python goes over them."""
        sequence, options = piece.sequence, self.pages.options
        blocks = sequence.blocks[: -(-(sequence.length + len(piece.ids)) // options.block_tokens)]
        if min(blocks) < 0 or max(blocks) >= options.blocks:
            raise ValueError("the sequence belongs to another pool")
        return blocks


def pack(model: Transformer, dtype: Literal["float32", "bfloat16"], library: Path | None = None) -> NativeModel:
    """A model's weights for the native kernels, to be shared by several runners. Raises NativeUnavailable."""
    return NativeModel(model.config, dict(_tensors(model)), KINDS[dtype], library)


def _tensors(model: Transformer) -> dict[str, Tensor]:
    frequencies = {name: getattr(model, name) for name in ("window_frequencies", "compressed_frequencies")}
    return {**model.state_dict(), **frequencies}
