"""One step of the engine: plan, run, sample, append. Knows no threads; whoever calls it owns everything in it.

Speculation: a draft is fed together with the token before it. It stays exactly when it equals the token that the target
chooses at that position with that position's key, so outputs are the same with and without, token for token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nautile.engine.plan import DraftingRunner, Piece, Runner
from nautile.engine.request import EngineStats, Request
from nautile.engine.sampling import Chosen, choose
from nautile.engine.scheduler import Pool, Scheduler, Work
from nautile.engine.task import Reason, Sink, Task

__all__ = ["Core", "ModelLimits"]


@dataclass(frozen=True)
class ModelLimits:
    """What the core must know of the model."""

    eos: int
    longest: int  # tokens of a sequence


@dataclass
class _Outcome:
    """What one piece led to. ``following``: the tokens after the first tokens of the piece that stay."""

    task: Task
    piece: Piece
    following: tuple[int, ...] = ()
    reason: Reason | None = None
    error: str | None = None
    row: Tensor | None = None  # logits that further choices start from
    seconds: float = 0.0  # its share of the step


class Core:
    """Tasks in, events out. ``step`` until ``idle``."""

    def __init__(self, scheduler: Scheduler, runner: Runner, limits: ModelLimits, speculate: bool = False) -> None:
        self.scheduler, self.runner, self.limits = scheduler, runner, limits
        self.drafter = runner if speculate and isinstance(runner, DraftingRunner) else None
        self.counts = EngineStats()
        self._arrivals = 0

    @property
    def pool(self) -> Pool:
        """The pool that everything lives in."""
        return self.scheduler.pool

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return self.scheduler.idle

    def submit(self, request: Request, sink: Sink) -> None:
        """Take in a request; its events go to ``sink`` from within ``step`` (and from here, if it cannot start)."""
        task = self._new_task(request, sink, 0)
        task.unborn = request.sampling.n - 1
        try:
            task.constraint = request.constraint() if request.constraint is not None else None
        except Exception as error:  # the caller's own code
            task.finished("error", f"the constraint cannot start: {error}")
            return
        self._count(prompt_tokens=len(request.prompt_ids))
        self.scheduler.add(task)

    def cancel(self, request_id: str) -> None:
        """End every choice of a request now."""
        queues = (*self.scheduler.running, *self.scheduler.waiting)
        for task in [task for task in queues if task.request.id == request_id]:
            self._end(task, "cancelled")

    def cancel_all(self) -> None:
        """End everything."""
        for task in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(task, "cancelled")

    def fail_all(self, error: str) -> None:
        """Tell every caller that the engine cannot go on; the pool is left as it is."""
        for task in [*self.scheduler.running, *self.scheduler.waiting]:
            task.finished("error", error)

    @torch.inference_mode()
    def step(self) -> int:
        """Run one step; gives the number of tokens taken in. An error of the runner ends the tasks of that step only."""
        work = self.scheduler.plan()
        for task in list(self.scheduler.full):
            self._end(task, "length", "the sequence fills the whole state pool: raise pool_bytes for longer ones")
        if not work.tasks:
            return 0
        for task in work.tasks:
            self._admitted(task)
        try:
            outcomes = self._run(work)
        except Exception as error:  # the service goes on for everybody else
            for task in work.tasks:
                self._end(task, "error", f"the step failed: {type(error).__name__}: {error}", keep=False)
            return 0
        for outcome in outcomes:
            self._settle(outcome)
        self._count(steps=1)
        return work.plan.tokens

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        queues = self.scheduler
        return replace(self.counts, running=len(queues.running), waiting=len(queues.waiting), preemptions=queues.preemptions)

    # Within a step ------------------------------------------------------------------------------------------------

    def _run(self, work: Work) -> list[_Outcome]:
        began = time.perf_counter()
        logits = self.runner.step(work.plan)
        each = (time.perf_counter() - began) / work.plan.tokens
        rows = logits.detach().to("cpu", torch.float32)
        best = rows.numpy().argmax(-1).tolist() if len(rows) else []
        outcomes, first = [], 0
        for task, piece in zip(work.tasks, work.plan.pieces, strict=True):
            last = first + piece.rows
            task.prefilled(piece.sequence.length + len(piece.ids))
            outcome = self._decide(task, piece, rows[first:last], best[first:last])
            outcome.seconds = each * len(piece.ids)
            outcomes.append(outcome)
            first = last
        if self.drafter is not None:
            self._draft(work, outcomes)
        return outcomes

    def _decide(self, task: Task, piece: Piece, rows: Tensor, best: Sequence[int]) -> _Outcome:
        """Choose the tokens that these logits give, as long as each equals the draft that was fed for it."""
        outcome = _Outcome(task, piece)
        if piece.logits == "none":
            start = piece.sequence.length + 1
            outcome.following = tuple(task.ids[start : start + len(piece.ids)])
            return outcome
        drafts = piece.ids[1:] if piece.logits == "all" else ()
        known = piece.ids[1:] if not drafts else ()
        kept: list[int] = []
        task.drafted += len(drafts)
        for row, likeliest in zip(rows, best, strict=True):
            try:
                chosen = self._choose(task, row, likeliest)
                outcome.reason = task.take(chosen, self.limits.eos)
            except Exception as error:  # a constraint's, or logits that are not numbers: this choice only
                outcome.reason, outcome.error = "error", str(error)
                break
            kept.append(chosen.token)
            if outcome.reason is not None or len(kept) > len(drafts) or chosen.token != drafts[len(kept) - 1]:
                break
            task.accepted += 1
        outcome.following = (*known, *kept)
        if task.unborn:
            outcome.row = rows[0].clone()
        self._count(completion_tokens=len(kept), drafted_tokens=len(drafts), accepted_tokens=max(0, len(kept) - 1))
        return outcome

    def _choose(self, task: Task, row: Tensor, likeliest: int) -> Chosen:
        mask = task.constraint.mask() if task.constraint is not None else None
        if mask is None and task.sampling.plain and math.isfinite(row[likeliest]):
            return Chosen(likeliest)
        return choose(
            row,
            task.sampling,
            len(task.ids),
            choice=task.choice,
            prompt=task.request.prompt_ids,
            output=task.output,
            mask=mask,
        )

    def _draft(self, work: Work, outcomes: list[_Outcome]) -> None:
        assert self.drafter is not None
        guesses = self.drafter.draft(work.plan, [outcome.following for outcome in outcomes])
        for outcome, guess in zip(outcomes, guesses, strict=True):
            outcome.task.draft = guess

    def _settle(self, outcome: _Outcome) -> None:
        """Write down what a piece led to: the tokens that stay, further choices, the end."""
        task, piece = outcome.task, outcome.piece
        if outcome.error is not None:
            self._end(task, "error", outcome.error, keep=False)
            return
        self.pool.append(piece.sequence, piece.ids[: len(outcome.following)], outcome.seconds)
        if outcome.row is not None:
            self._fork(task, outcome.row)
        if outcome.reason is not None:
            self._end(task, outcome.reason)

    def _fork(self, leader: Task, row: Tensor) -> None:
        """Start the other choices of a request from the state and the logits of the first."""
        choices, leader.unborn = range(1, leader.unborn + 1), 0
        for choice in choices:
            task = self._new_task(leader.request, leader.sink, choice, leader.sampling.seed)
            task.cached = leader.cached
            try:
                task.constraint = leader.request.constraint() if leader.request.constraint is not None else None
                chosen = self._choose(task, row, int(row.numpy().argmax()))
                reason = task.take(chosen, self.limits.eos)
            except Exception as error:  # as in _decide
                task.finished("error", str(error))
                continue
            self._count(completion_tokens=1)
            if reason is not None:
                task.finished(reason)
            elif leader.sequence is not None and self.scheduler.room_to_fork(task, leader.sequence):
                self.scheduler.start(task, self.pool.fork(leader.sequence))
            else:
                self.scheduler.add(task)

    def _admitted(self, task: Task) -> None:
        if task.cached is None:
            assert task.sequence is not None
            task.cached = task.sequence.cached
            self._count(cached_tokens=task.cached)

    def _end(self, task: Task, reason: Reason, error: str | None = None, keep: bool = True) -> None:
        self.scheduler.remove(task, keep)
        task.finished(reason, error)

    def _new_task(self, request: Request, sink: Sink, choice: int, seed: int | None = None) -> Task:
        sampling = request.sampling.seeded() if seed is None else replace(request.sampling, seed=seed)
        limit = min(len(request.prompt_ids) + sampling.max_tokens, self.limits.longest)
        self._arrivals += 1
        return Task(request, sampling, choice, self._arrivals, limit, sink, None, ids=list(request.prompt_ids))

    def _count(self, **more: int) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + amount for name, amount in more.items()})
