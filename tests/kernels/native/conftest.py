"""Pools, sequences and runs shared by the tests of the native kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from nautile.engine.native import NativeRunner, NativeUnavailable
from nautile.engine.plan import Piece, Plan
from nautile.kernels.native import NativeModel, library_path
from nautile.model import Transformer
from nautile.state.pages import Pages, PoolOptions, Sequence


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """The library; where there is no compiler the fallback is what runs, and these tests have nothing to say."""
    try:
        library_path()
    except NativeUnavailable as error:
        pytest.skip(str(error))


@dataclass
class Bench:
    """A runner over a pool of its own, and the sequences in it."""

    runner: NativeRunner
    pages: Pages
    sequences: list[Sequence] = field(default_factory=list)

    def open(self, tokens: int) -> Sequence:
        blocks = self.pages.allocate(-(-tokens // self.pages.options.block_tokens))
        self.sequences.append(Sequence(blocks=blocks, slot=self.pages.allocate_slot()))
        return self.sequences[-1]

    def step(self, *pieces: tuple[Sequence, list[int]], logits: str = "all") -> list[torch.Tensor]:
        """One step; the sequences take the tokens in. Rows of logits by piece."""
        plan = Plan(tuple(Piece(sequence, tuple(ids), logits) for sequence, ids in pieces))
        out = self.runner.step(plan)
        for sequence, ids in pieces:
            sequence.ids += ids
        return list(out.split([piece.rows for piece in plan.pieces]))

    def feed(self, sequence: Sequence, ids: list[int], chunks: list[int]) -> torch.Tensor:
        """All logits of ids, taken in by chunks of these sizes, over and over."""
        out, at, turn = [], 0, 0
        while at < len(ids):
            size = chunks[turn % len(chunks)]
            out += self.step((sequence, ids[at : at + size]))
            at, turn = at + size, turn + 1
        return torch.cat(out)


@pytest.fixture
def bench() -> Callable[..., Bench]:
    def make(
        model: Transformer | NativeModel, *, rows: str = "float32", blocks: int = 24, block_tokens: int = 256, **options
    ) -> Bench:
        pages = Pages(
            model.config, PoolOptions(blocks=blocks, slots=8, rows=rows, block_tokens=block_tokens, snapshot_every=block_tokens)
        )
        # What no token wrote must never be read: not even a NaN may get through.
        for name in ("csa", "index", "hca", "window", "csa_kv", "csa_gate", "index_kv", "index_gate", "hca_kv", "hca_gate"):
            getattr(pages, name).fill_(float("nan"))
        return Bench(NativeRunner(model, pages, threads=options.pop("threads", 2), **options), pages)

    return make
