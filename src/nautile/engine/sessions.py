"""Sessions of an engine: named states on disk go in and out between two steps; everything else is batched as usual.

``Live`` drives one sequence directly, for a command that has the engine to itself. ``EngineSessions`` works beside running
requests, from any thread: a session that is loaded becomes a cached prefix, so that a request which begins with its tokens
computes only what is new, and a session that is saved is first taken in by an ordinary request.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

from nautile.engine.engine import Engine, EngineError
from nautile.engine.plan import Piece, Plan
from nautile.engine.request import Finished, Request, RequestError
from nautile.engine.sampling import SamplingParams, sample
from nautile.state import PoolFull, Resumed, Sequence, SessionInfo, SessionStore, StatePool, fingerprint
from nautile.state.session import Captured

__all__ = ["EngineSessions", "Live", "know_model"]

_ATTEMPTS = 3  # to find the tokens of a session still in the pool that they were taken into


def know_model(engine: Engine) -> None:
    """Give the engine's pool its model's fingerprint, which every saved state carries."""
    if not engine.pool.fingerprint:
        engine.pool.fingerprint = fingerprint(engine.config, engine.model.state_dict())


class Live:
    """A sequence that is driven directly. ``logits`` [V] are of its next token; ``recomputed`` tokens were computed again."""

    def __init__(self, engine: Engine, sequence: Sequence, logits: Tensor | None = None) -> None:
        self.engine, self.pool, self.sequence, self.logits, self.recomputed = engine, engine.pool, sequence, logits, 0

    @classmethod
    def begin(cls, engine: Engine, ids: Many[int], partition: str = "") -> Live:
        """A new timeline that has taken in ``ids``."""
        live = cls(engine, engine.pool.open(ids, partition))
        live.feed(ids[live.sequence.length :])
        return live

    @classmethod
    def resume(cls, engine: Engine, resumed: Resumed) -> Live:
        """Where a session is: what is pending is computed."""
        live = cls(engine, resumed.sequence, resumed.logits)
        live.recomputed = len(resumed.pending)
        live.feed(resumed.pending)
        return live

    def feed(self, ids: Many[int]) -> None:
        """Take in tokens, in chunks that end at snapshot boundaries.

        Raises RequestError past the model's positions, PoolFull when the pool cannot hold them.
        """
        limit, k = self.engine.config.max_position_embeddings, self.pool.options.snapshot_every
        if self.sequence.length + len(ids) > limit:
            raise RequestError(f"{self.sequence.length + len(ids):,} tokens; this model takes {limit:,}")
        while ids:
            size = min(len(ids), k - self.sequence.length % k)
            step, ids = tuple(ids[:size]), ids[size:]
            self.pool.ensure(self.sequence, size)
            self.logits = self.engine.runner.step(Plan((Piece(self.sequence, step),)))[0]
            self.pool.append(self.sequence, step)

    def generate(self, params: SamplingParams) -> Iterator[int]:
        """Sample tokens until the end of sentence, which stays out of the timeline, or ``max_tokens``."""
        if self.logits is None:  # it was rewound to a snapshot, or saved without: the last tokens give them again
            ids = list(self.sequence.ids)
            self.recomputed += len(ids) - self.pool.rewind(self.sequence, len(ids) - 1)
            self.feed(ids[self.sequence.length :])
        for _ in range(params.max_tokens):
            assert self.logits is not None
            token = sample(self.logits, params, self.sequence.length)
            if token == self.engine.config.eos_token_id:
                return
            yield token
            self.feed([token])


class EngineSessions:
    """The sessions under one directory, for every caller (partition) its own. Calls block: make them from a worker thread."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        """Raises StoreUnavailable when the directory cannot be used."""
        self.engine, self.directory = engine, directory
        self.store("")
        know_model(engine)

    def store(self, partition: str) -> SessionStore:
        """A caller's sessions; those of the nameless caller are those of ``nautile session --sessions DIRECTORY``."""
        own = f"of-{blake2b(partition.encode(), digest_size=16).hexdigest()}"
        return SessionStore(self.directory / own if partition else self.directory)

    def save(
        self, name: str, ids: Many[int], partition: str = "", note: str | None = None, revision: int | None = None
    ) -> SessionInfo:
        """Take in ``ids`` and save where that leaves the model. It is safe on return.

        ``revision``: of the session that is continued; raises SessionConflict when somebody else has saved it meanwhile.
        Raises RequestError for ids that cannot run, EngineError when the engine fails at them, SessionError, StoreUnavailable,
        PoolFull when the engine is too busy.
        """
        store = self.store(partition)
        self.engine.check(Request(tuple(ids), partition=partition))
        store.check_name(name)
        for _ in range(_ATTEMPTS):
            if len(ids) > 1:
                self._take_in(tuple(ids[:-1]), partition)
            captured = self.engine.with_pool(lambda _: self._capture(store, ids, partition))
            if captured is not None:
                return store.put(name, captured, note=note, revision=revision)
        raise PoolFull(f"the {len(ids):,} tokens of session {name!r} do not stay in the pool long enough to be saved")

    def _capture(self, store: SessionStore, ids: Many[int], partition: str) -> Captured | None:
        """A copy of the state after ``ids``, between two steps; None when too much of it has been evicted: computing that here
        would hold everybody up."""
        pool = self.engine.pool
        sequence = pool.open(ids, partition)
        try:
            live = Live(self.engine, sequence)
            if pool.options.prefix_cache and len(ids) - sequence.length > self.engine.options.token_budget:
                return None
            live.feed(ids[sequence.length :])
            return store.capture(pool, sequence, live.logits)
        finally:
            pool.release(sequence)

    def load(self, name: str, partition: str = "") -> tuple[SessionInfo, tuple[int, ...]]:
        """Bring a session's state into the engine; gives its tokens, for a request that begins with them.

        Raises SessionError, StoreError, PoolFull.
        """
        store = self.store(partition)
        fetched = store.fetch(name, self.engine.pool)  # beside the engine, which goes on meanwhile

        def enter(pool: StatePool) -> tuple[SessionInfo, tuple[int, ...]]:
            resumed = store.start(fetched, pool, partition)
            ids = (*resumed.sequence.ids, *resumed.pending)
            pool.release(resumed.sequence)
            return resumed.info, ids

        return self.engine.with_pool(enter)

    def _take_in(self, ids: tuple[int, ...], partition: str) -> None:
        """Prefill through the scheduler, so that other requests go on meanwhile; the state stays as a cached prefix."""
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        for event in self.engine.submit_sync(Request(ids, params, partition=partition)):
            if isinstance(event, Finished) and event.reason == "error":
                raise EngineError(event.error or "the engine could not take in the tokens")
