"""What one step computes, as plain data: which sequences, which new tokens, which logits. The runner needs nothing else.

A step is ``runner.step(plan)`` and then, for the engine, ``pool.append(sequence, ids)`` for every token that stays. A runner
writes the state of all tokens of a piece, kept or not: tokens that are not appended (rejected drafts) are written over by the
next step. That is exact as long as at most one token of a piece is dropped, because every ring of the tail has at least one
row more than the next token reads (see ``Piece``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

    from nautile.state.pages import Sequence

__all__ = ["DraftingRunner", "Piece", "Plan", "Runner"]


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence, to be taken in at its present length. Written by the scheduler.

    Rings are indexed by position modulo their size R, and a token at position p reads rows p - R + 1 .. p. A draft at
    position q overwrites row q - R, which only tokens before q read: once the tokens before q are kept, dropping the draft
    costs nothing and needs no copy.
    """

    sequence: Sequence
    ids: tuple[int, ...]
    logits: Literal["none", "last", "all"] = "last"

    @property
    def rows(self) -> int:
        """How many rows of logits this piece asks for."""
        return {"none": 0, "last": 1, "all": len(self.ids)}[self.logits]


@dataclass(frozen=True)
class Plan:
    """The pieces of one step, at most one for each sequence; logits come back in their order."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """New tokens of the step."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def rows(self) -> int:
        """Rows of logits of the step."""
        return sum(piece.rows for piece in self.pieces)


class Runner(Protocol):
    """Runs plans over one pool and one model."""

    def step(self, plan: Plan) -> Tensor:
        """float32 logits [plan.rows, V] on the CPU or the device; the state of every token is in the pool afterwards.

        Reads ``piece.sequence.blocks``, ``.slot`` and ``.length``; changes none of them.
        """


@runtime_checkable
class DraftingRunner(Runner, Protocol):
    """A runner that can also guess the token after next, with the checkpoint's MTP block."""

    def draft(self, plan: Plan, following: Many[tuple[int, ...]]) -> list[int]:
        """One guess for each piece of the plan that ``step`` ran last, before anything of it is appended.

        ``following[i]`` are the tokens that follow the first tokens of piece i: with n of them, the first n tokens of the
        piece are kept, token j + 1 is ``following[i][j]``, and the guess is the token after ``following[i][-1]``.
        """
