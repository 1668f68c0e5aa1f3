"""The fallback on a CPU without a compiler: single tokens go through the NumPy decoder, everything else through the modules.

A decode of a small model through the modules is mostly the cost of calling them; the decoder does the same work in a third of
the time (see ``nautile.model.decode``). It reads and writes the pool's float32 rings and blocks in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nautile.engine.plan import Plan
from nautile.engine.runner import TorchRunner
from nautile.model import Transformer
from nautile.model.decode import Array, TokenDecoder, can_decode
from nautile.state import Pages, Sequence, StatePool

__all__ = ["NumpyRunner"]

_ALONE = 3  # decodes; from here on one batched pass costs less than as many single ones


class NumpyRunner(TorchRunner):
    """A runner for float32 models and pools on the CPU. Cannot draft."""

    def __init__(self, model: Transformer, pool: StatePool) -> None:
        if not self.applies(model, pool):
            raise ValueError("the NumPy decoder needs float32 weights and rows on the CPU, without fake quantisation")
        super().__init__(model, pool)
        self._decoder = TokenDecoder(model)

    @staticmethod
    def applies(model: Transformer, pool: StatePool) -> bool:
        """Whether this runner computes what the modules would."""
        return can_decode(model) and pool.options.rows == "float32" and pool.pages.device.type == "cpu"

    @torch.inference_mode()
    def step(self, plan: Plan) -> Tensor:
        """See ``Runner.step``."""
        single = [piece for piece in plan.pieces if len(piece.ids) == 1]
        if not 0 < len(single) <= _ALONE:
            return super().step(plan)
        rows: list[Tensor] = []
        for piece in plan.pieces:
            if len(piece.ids) > 1:
                rows.append(super().step(Plan((piece,))))
                continue
            layers = _layers(self.pool.pages, piece.sequence)
            logits = self._decoder.advance(piece.ids[0], piece.sequence.length, layers)
            rows += [logits] if piece.rows else []
        return torch.cat(rows) if rows else torch.empty(0, self.model.config.vocab_size)


class _Layer:
    """A layer of one pool sequence about to take in its next token."""

    def __init__(self, pages: Pages, sequence: Sequence, layer: int) -> None:
        slot, position, ratio = sequence.slot or 0, sequence.length, pages.config.layer_ratios[layer]
        self.window, self.position = pages.window.numpy()[slot, layer], position
        self.tail = self.index_tail = self.entries = self.index_keys = None
        if not ratio:
            return
        ordinal, blocks = pages.ordinal[layer], np.array(sequence.blocks)
        rings = (pages.csa_kv, pages.csa_gate) if ratio == 4 else (pages.hca_kv, pages.hca_gate)
        self.tail = _Tail(rings, slot, ordinal, position)
        self.entries = _Entries((pages.csa if ratio == 4 else pages.hca).numpy(), blocks, ordinal)
        if ratio == 4:
            self.index_tail = _Tail((pages.index_kv, pages.index_gate), slot, ordinal, position)
            self.index_keys = _Entries(pages.index.numpy(), blocks, ordinal)

    def push(self, kv: Array) -> Array:
        """See ``LayerArrays.push``."""
        self.window[self.position % len(self.window)] = kv
        visible: Array = self.window[: self.position + 1]
        return visible


class _Tail:
    """The two rings of a compressor, [R, w] each."""

    def __init__(self, rings: tuple[Tensor, Tensor], slot: int, ordinal: int, position: int) -> None:
        self.kv, self.gate = (ring.numpy()[slot, ordinal] for ring in rings)
        self.position = position

    def push(self, kv: Array, gate: Array) -> None:
        """See ``TailArrays.push``."""
        place = self.position % len(self.kv)
        self.kv[place], self.gate[place] = kv, gate

    def rows(self) -> tuple[Array, Array]:
        """See ``TailArrays.rows``."""
        first = -(self.position + 1) % len(self.kv)
        return np.roll(self.kv, first, axis=0), np.roll(self.gate, first, axis=0)


class _Entries:
    """The compressed rows of one layer of one sequence, scattered over blocks: pool [blocks, layers, rows, w]."""

    def __init__(self, pool: Any, blocks: Any, ordinal: int) -> None:
        self.pool, self.blocks, self.ordinal, self.rows = pool, blocks, ordinal, pool.shape[2]

    def __setitem__(self, number: int, row: Array) -> None:
        self.pool[self.blocks[number // self.rows], self.ordinal, number % self.rows] = row

    def __getitem__(self, which: Any) -> Array:
        """Rows ``[:count]`` or at an array of indices; a copy."""
        found: Array
        if isinstance(which, slice):
            blocks = self.blocks[: -(-which.stop // self.rows)]
            found = self.pool[blocks, self.ordinal].reshape(-1, self.pool.shape[3])[: which.stop]
        else:
            found = self.pool[self.blocks[which // self.rows], self.ordinal, which % self.rows]
        return found


def _layers(pages: Pages, sequence: Sequence) -> list[_Layer]:
    return [_Layer(pages, sequence, layer) for layer in range(len(pages.config.layer_ratios))]
