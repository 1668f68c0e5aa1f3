"""Requests one after another on the small engine, in a thread: what ``submit`` is until the scheduler replaces it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from nautile.engine.request import EngineEvent, EngineStats, Finished, Prefilled, Request, RequestError, TokenSampled, Usage
from nautile.engine.sampling import choose

if TYPE_CHECKING:
    from nautile.engine.engine import Engine

__all__ = ["Interim"]


@dataclass
class _Job:
    request: Request
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[EngineEvent] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, event: EngineEvent) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Interim:
    """A worker thread that takes jobs from a queue; requests are served in order of arrival."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._known: dict[str, _Job] = {}
        self._stats = EngineStats()
        self._thread = threading.Thread(target=self._work, name="nautile-engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> AsyncIterator[EngineEvent]:
        """See ``AsyncEngine.submit``."""
        config, ids = self.engine.config, request.prompt_ids
        if not ids:
            raise RequestError("the prompt is empty: at least one token is needed")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise RequestError(f"token ids must lie in 0..{config.vocab_size - 1}")
        if len(ids) >= config.max_position_embeddings:
            raise RequestError(f"the prompt has {len(ids)} tokens; this model takes {config.max_position_embeddings - 1}")
        job = _Job(request, asyncio.get_running_loop())
        self._known[request.id] = job
        self._jobs.put(job)
        left = request.sampling.n
        try:
            while left:
                event = await job.events.get()
                left -= isinstance(event, Finished)
                yield event
        finally:
            job.cancelled.set()
            self._known.pop(request.id, None)

    def cancel(self, request_id: str) -> None:
        """See ``AsyncEngine.cancel``."""
        if (job := self._known.get(request_id)) is not None:
            job.cancelled.set()

    def stats(self) -> EngineStats:
        """See ``AsyncEngine.stats``."""
        return replace(self._stats, waiting=self._jobs.qsize())

    def close(self) -> None:
        """Stop the thread after the present job, which is cancelled."""
        for job in list(self._known.values()):
            job.cancelled.set()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._stats = replace(self._stats, running=1)
            for choice in range(job.request.sampling.n):
                self._run(job, choice)
            self._stats = replace(self._stats, running=0)

    @torch.inference_mode()
    def _run(self, job: _Job, choice: int) -> None:
        request, engine = job.request, self.engine
        prompt, output = list(request.prompt_ids), list[int]()
        cached = 0
        try:
            params = request.sampling.seeded()
            if job.cancelled.is_set():
                job.send(Finished("cancelled", Usage(len(prompt), 0, 0), choice))
                return
            before = engine.statistics.reused_tokens
            kept = engine._prefill(prompt)
            cached = engine.statistics.reused_tokens - before
            if choice == 0:
                job.send(Prefilled(len(prompt), len(prompt), cached))
            constraint = request.constraint() if request.constraint else None
            reason = "length"
            room = min(params.max_tokens, engine.config.max_position_embeddings - len(prompt))
            for _ in range(room):
                if job.cancelled.is_set():
                    reason = "cancelled"
                    break
                assert kept.logits is not None
                mask = constraint.mask() if constraint else None
                chosen = choose(kept.logits[0], params, len(kept.ids), choice=choice, prompt=prompt, output=output, mask=mask)
                output.append(chosen.token)
                job.send(TokenSampled(chosen.token, choice, chosen.logprob, chosen.top))
                if chosen.token == engine.config.eos_token_id and not params.ignore_eos:
                    reason = "stop"
                    break
                if constraint:
                    constraint.accept(chosen.token)
                engine._feed(kept, [chosen.token])
            job.send(Finished(reason, Usage(len(prompt), cached, len(output)), choice))  # type: ignore[arg-type]
        except Exception as error:  # one request's fault must not end the others
            job.send(Finished("error", Usage(len(prompt), cached, len(output)), choice, str(error)))
        self._count(len(prompt), cached, len(output))

    def _count(self, prompt: int, cached: int, output: int) -> None:
        now = self._stats
        self._stats = replace(
            now,
            prompt_tokens=now.prompt_tokens + prompt,
            cached_tokens=now.cached_tokens + cached,
            completion_tokens=now.completion_tokens + output,
        )
