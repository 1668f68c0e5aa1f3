"""Who runs in the next step, with which tokens: continuous batching over one pool, as decisions and nothing else.

A step takes in one token (and a draft) of every running task that decodes, then fills the token budget with prompt chunks, the
least recently served first. So no decode waits longer than one chunk, and a short prompt waits for at most one chunk of each
other prompt. A chunk never crosses a multiple of the snapshot interval, so that the tail at each of them exists.

Memory is arithmetic: a task is admitted when the blocks that are free or evictable cover what every running task and it will
need for its prompt and a reserve of output. When the reserve of a long answer runs out, the lowest ranked tasks make room: they
keep their place in the queue and their prefix in the cache, and are taken up again later with the same tokens. Slots are
preempted by priority: the tail is parked, nothing is computed again.

What this file does not know: models, logits, sampling, threads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nautile.engine.plan import Piece, Plan
from nautile.engine.task import Task
from nautile.state.pages import PoolFull

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

    from nautile.state.pages import Sequence

__all__ = ["Limits", "Pool", "Scheduler", "Work"]


class Pool(Protocol):
    """What the scheduler and the engine's core need of ``StatePool``."""

    def open(self, ids: Many[int], partition: str = "") -> Sequence: ...
    def ensure(self, sequence: Sequence, new_tokens: int) -> None: ...
    def append(self, sequence: Sequence, ids: Many[int], seconds: float | None = None) -> None: ...
    def fork(self, sequence: Sequence) -> Sequence: ...
    def park(self, sequence: Sequence) -> None: ...
    def unpark(self, sequence: Sequence) -> None: ...
    def release(self, sequence: Sequence, keep: bool = True) -> None: ...
    def blocks_needed(self, tokens: int, sequence: Sequence | None = None) -> int: ...
    def check(self) -> None: ...
    @property
    def available_blocks(self) -> int: ...
    @property
    def free_slots(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What a step and the engine may take. ``reserve`` tokens of output are set aside at admission; a task that has waited
    ``patience`` steps ranks one priority higher for admission, so nothing waits for ever."""

    token_budget: int = 512
    running: int = 16
    snapshot_every: int = 256
    reserve: int = 256
    patience: int = 256
    drafts: int = 0  # tokens that a decode may add to its own

    def __post_init__(self) -> None:
        if self.running < 1 or self.reserve < 1 or self.patience < 1:
            raise ValueError("running, reserve and patience must be at least 1")
        if self.token_budget <= self.running * (1 + self.drafts):
            raise ValueError(
                f"token_budget must exceed what {self.running} decodes take ({self.running * (1 + self.drafts)}), "
                f"got {self.token_budget}: raise it or lower max_running"
            )


@dataclass(frozen=True)
class Work:
    """One step: the plan, and the task of each of its pieces."""

    plan: Plan
    tasks: tuple[Task, ...]


class Scheduler:
    """Queues and decisions. ``running`` have a slot; ``waiting`` have none (their state may be parked)."""

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self.pool, self.limits = pool, limits
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.full: list[Task] = []  # tasks that fill the whole pool alone: the core must end them
        self.step = 0
        self.preemptions = 0
        self._stalled = False  # the head of the queue did not fit, and nothing has been given back since

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    def add(self, task: Task) -> None:
        """Put a new task into the queue."""
        task.since = self.step
        self.waiting.append(task)
        self._stalled = False

    def start(self, task: Task, sequence: Sequence) -> None:
        """A task whose state exists already (a fork) runs from the next step on."""
        task.sequence, task.stepped = sequence, self.step
        self.running.append(task)

    def room_to_fork(self, task: Task, source: Sequence) -> bool:
        """Whether a task that continues a copy of ``source`` fits beside what runs."""
        if len(self.running) >= self.limits.running or not self.pool.free_slots:
            return False
        need = self.pool.blocks_needed(self._target(task) - source.length, source) + 1  # the last block becomes shared
        return self.pool.available_blocks >= self._outstanding() + need

    def remove(self, task: Task, keep: bool = True) -> None:
        """The task is over: give back what it holds (its prefix stays in the cache)."""
        for queue in (self.running, self.waiting, self.full):
            if task in queue:
                queue.remove(task)
        if task.sequence is not None:
            self.pool.release(task.sequence, keep)
            task.sequence = None
        self._stalled = False

    def plan(self) -> Work:
        """Admit what fits, then choose the pieces of the next step and secure their memory. Empty when nothing can run."""
        self.step += 1
        self._admit()
        budget = self.limits.token_budget
        chosen: list[tuple[Task, Piece]] = []
        for task in sorted((t for t in self.running if t.pending == 1), key=self._rank):
            if (piece := self._decode_piece(task, chosen)) is not None:
                budget -= len(piece.ids)
                chosen.append((task, piece))
        for task in sorted((t for t in self.running if t.pending > 1), key=lambda t: (t.stepped, self._rank(t))):
            if budget > 0 and (piece := self._prompt_piece(task, budget, chosen)) is not None:
                budget -= len(piece.ids)
                chosen.append((task, piece))
        for task, _ in chosen:
            task.stepped = self.step
        return Work(Plan(tuple(piece for _, piece in chosen)), tuple(task for task, _ in chosen))

    # Pieces -------------------------------------------------------------------------------------------------------

    def _decode_piece(self, task: Task, chosen: list[tuple[Task, Piece]]) -> Piece | None:
        if task not in self.running:  # it made room for a higher one of this step
            return None
        draft = (task.draft,) if task.draft is not None and self._may_draft(task) else ()
        ids = (task.ids[-1], *draft)
        if not self._secure(task, len(ids), chosen):
            return None
        assert task.sequence is not None
        return Piece(task.sequence, ids, "all" if draft else "last")

    def _may_draft(self, task: Task) -> bool:
        """A kept draft must not step over a snapshot boundary, the last token needs none, and in a state that other choices
        are to begin from it would be a word of the first choice."""
        whole = (task.length + 1) % self.limits.snapshot_every != 0
        return whole and len(task.ids) + 1 < task.limit and not task.unborn

    def _prompt_piece(self, task: Task, budget: int, chosen: list[tuple[Task, Piece]]) -> Piece | None:
        if task not in self.running:
            return None
        boundary = self.limits.snapshot_every - task.length % self.limits.snapshot_every
        count = min(task.pending, budget, boundary)
        if not self._secure(task, count, chosen):
            return None
        assert task.sequence is not None
        ids = tuple(task.ids[task.length : task.length + count])
        return Piece(task.sequence, ids, "last" if count == task.pending else "none")

    def _secure(self, task: Task, tokens: int, chosen: list[tuple[Task, Piece]]) -> bool:
        """Blocks for ``tokens`` more of this task, at the expense of lower ranked ones if need be."""
        assert task.sequence is not None
        busy = {id(other) for other, _ in chosen} | {id(task)}
        while True:
            try:
                self.pool.ensure(task.sequence, tokens)
                return True
            except PoolFull:
                victim = self._victim(busy)
                if victim is not None:
                    self._set_back(victim)
                elif len(self.running) > 1:
                    self._set_back(task)
                    return False
                else:
                    self.full.append(task)
                    return False

    def _victim(self, busy: set[int]) -> Task | None:
        """The lowest ranked task that holds memory and is not part of this step; parked ones first."""
        parked = [task for task in self.waiting if task.sequence is not None]
        running = [task for task in self.running if id(task) not in busy]
        return max(parked or running, key=self._rank, default=None)

    # Admission ----------------------------------------------------------------------------------------------------

    def _rank(self, task: Task) -> tuple[int, int]:
        """Order among running tasks: smaller goes first."""
        return (-self._priority(task), task.arrival)

    def _priority(self, task: Task) -> int:
        """What the caller gave, and what a running task has earned by waiting."""
        return task.request.priority + task.patience

    def _next(self) -> Task:
        """The waiting task to admit: by priority (raised by waiting), then the partition that runs least, then arrival."""
        shares = Counter(task.request.partition for task in self.running)

        def order(task: Task) -> tuple[int, int, int]:
            return (-task.request.priority - self._patience(task), shares[task.request.partition], task.arrival)

        return min(self.waiting, key=order)

    def _admit(self) -> None:
        while self.waiting and not self._stalled:
            if len(self.running) < self.limits.running and self.pool.free_slots:
                task = self._next()
            else:
                task = min(self.waiting, key=self._rank)
                if not self._take_slot_for(task):
                    return
            self._stalled = not self._enter(task)
            if self.full:
                return

    def _take_slot_for(self, task: Task) -> bool:
        """Park the lowest running task if its priority is lower than that of ``task``."""
        lowest = max(self.running, key=self._rank, default=None)
        if lowest is None or self._priority(lowest) >= task.request.priority:
            return False
        assert lowest.sequence is not None
        self.pool.park(lowest.sequence)
        self._to_queue(lowest)
        return True

    def _enter(self, task: Task) -> bool:
        """Open (or take up) the sequence of a waiting task, if memory allows."""
        fresh = task.sequence is None
        if fresh and not self._open(task):
            return False
        assert task.sequence is not None
        while self.pool.available_blocks < self._outstanding() + self._need(task):
            victim = self._lesser(task)
            if victim is not None:
                self._set_back(victim)
            elif self.running:
                if fresh:
                    self.pool.release(task.sequence)
                    task.sequence = None
                return False
            else:
                break  # it has the pool for itself: what fits will be seen step by step
        if not fresh:
            self.pool.unpark(task.sequence)
        self.waiting.remove(task)
        self.running.append(task)
        task.patience, task.stepped = self._patience(task), self.step - 1
        return True

    def _patience(self, task: Task) -> int:
        """Priorities that a waiting task has earned."""
        return (self.step - task.since) // self.limits.patience

    def _open(self, task: Task) -> bool:
        """A sequence with the longest cached prefix; bringing that back from a lower tier takes blocks too."""
        while True:
            try:
                task.sequence = self.pool.open(task.ids, task.request.partition)
                return True
            except PoolFull:
                victim = self._lesser(task)
                if victim is not None:
                    self._set_back(victim)
                    continue
                if not self.running:
                    self.full.append(task)
                return False

    def _lesser(self, task: Task) -> Task | None:
        """Who must give memory to ``task``: a parked task that ranks below it, or a running one of lower priority. When
        nothing runs, any parked one: somebody has to go on."""
        parked = [t for t in self.waiting if t.sequence is not None and t is not task]
        if self.running:
            parked = [t for t in parked if self._rank(t) > self._rank(task)]
        lower = [t for t in self.running if self._priority(t) < task.request.priority]
        return max(parked or lower, key=self._rank, default=None)

    def _target(self, task: Task) -> int:
        """Length for which memory is set aside."""
        return min(task.limit, len(task.ids) + self.limits.reserve)

    def _need(self, task: Task) -> int:
        """Blocks that a task with a sequence still lacks for its target."""
        assert task.sequence is not None
        return self.pool.blocks_needed(self._target(task) - task.length, task.sequence)

    def _outstanding(self) -> int:
        return sum(self._need(task) for task in self.running)

    def _set_back(self, task: Task) -> None:
        """Take the memory of a task; its prefix stays in the cache for as long as there is room."""
        assert task.sequence is not None
        self.pool.release(task.sequence)
        task.sequence = None
        self._to_queue(task)

    def _to_queue(self, task: Task) -> None:
        self.preemptions += 1
        task.draft, task.patience = None, 0
        if task in self.running:
            self.running.remove(task)
            task.since = self.step
            self.waiting.append(task)
        self._stalled = False
