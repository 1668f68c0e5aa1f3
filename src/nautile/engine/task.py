"""One choice of one request while the engine works on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nautile.engine.request import EngineEvent, Finished, Prefilled, Request, TokenConstraint, TokenSampled, Usage
from nautile.engine.sampling import Chosen, SamplingParams

if TYPE_CHECKING:
    from nautile.state.pages import Sequence

__all__ = ["Reason", "Sink", "Task"]

Reason = Literal["stop", "length", "cancelled", "error"]
Sink = Callable[[EngineEvent], None]


@dataclass(eq=False)
class Task:
    """``ids`` are all tokens known: prompt and what was chosen. The sequence has taken in the first ``length`` of them.

    A task is waiting (no sequence, or a parked one) or running (a sequence with a slot). At least one token is always still
    to be taken in: the one whose logits choose the next.
    """

    # Set at the start, never changed
    request: Request
    sampling: SamplingParams  # with a seed
    choice: int
    arrival: int
    limit: int  # length of ids at which the choice ends
    sink: Sink
    constraint: TokenConstraint | None
    # Written by the scheduler
    sequence: Sequence | None = None
    since: int = 0  # step at which it began to wait
    patience: int = 0  # priorities it earned by waiting, while it runs
    stepped: int = 0  # step in which it last ran
    # Written by the engine's core
    ids: list[int] = field(default_factory=list)
    draft: int | None = None  # a guess of the token after ids[-1]
    cached: int | None = None  # prompt tokens found at the first admission
    drafted: int = 0
    accepted: int = 0
    unborn: int = 0  # further choices that start when the prompt has been taken in

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def output(self) -> list[int]:
        """The tokens chosen so far."""
        return self.ids[self.prompt_length :]

    @property
    def length(self) -> int:
        """Tokens taken in."""
        return self.sequence.length if self.sequence is not None else 0

    @property
    def pending(self) -> int:
        """Tokens known and not taken in; 1 for a task that decodes."""
        return len(self.ids) - self.length

    @property
    def usage(self) -> Usage:
        """What it has used so far."""
        produced = len(self.ids) - self.prompt_length
        return Usage(self.prompt_length, self.cached or 0, produced, self.drafted, self.accepted)

    def take(self, chosen: Chosen, eos: int) -> Reason | None:
        """The sequence goes on with this token; tells the caller of it. Gives the reason when it is the last one."""
        self.ids.append(chosen.token)
        self.sink(TokenSampled(chosen.token, self.choice, chosen.logprob, chosen.top))
        if chosen.token == eos and not self.sampling.ignore_eos:
            return "stop"
        if len(self.ids) >= self.limit:
            return "length"
        if self.constraint is not None:
            self.constraint.accept(chosen.token)
        return None

    def prefilled(self, done: int) -> None:
        """Tell the caller how much of the prompt has been taken in (by the first choice only)."""
        if self.choice == 0 and done <= self.prompt_length:
            self.sink(Prefilled(done, self.prompt_length, self.cached or 0))

    def finished(self, reason: Reason, error: str | None = None) -> None:
        """Tell the caller that this is the end, of further choices that never started too."""
        self.sink(Finished(reason, self.usage, self.choice, error))
        for choice in range(1, self.unborn + 1):
            self.sink(Finished(reason, Usage(self.prompt_length, self.cached or 0, 0), choice, error))
        self.unborn = 0
