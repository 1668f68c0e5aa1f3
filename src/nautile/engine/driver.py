"""The engine's thread: commands go in from any thread, events come out where they are awaited.

One thread owns the core and everything in it. Submissions and cancellations are put into an inbox that it reads before each
step, so both take effect within one step. Events of a step are handed over together, once for each event loop. When nothing is
left to do the thread checks the pool's invariants and sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

from nautile.engine.core import Core
from nautile.engine.request import EngineEvent, EngineStats, EngineStoppedError, Finished, Request, RequestError

__all__ = ["Driver", "EventStream"]

Command = Callable[[], None]
_PAUSE = 0.01  # seconds, when nothing that waits can run


class EventStream(Iterator[EngineEvent]):
    """The events of one request, for a caller that waits. ``close`` cancels what has not ended."""

    def __init__(self, request: Request, events: queue.SimpleQueue[EngineEvent], cancel: Command) -> None:
        self._events, self._cancel, self._left = events, cancel, request.sampling.n

    def __next__(self) -> EngineEvent:
        if not self._left:
            raise StopIteration
        event = self._events.get()
        self._left -= isinstance(event, Finished)
        return event

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        if self._left:
            self._left = 0
            self._cancel()


class Driver:
    """Runs a core. ``describe`` adds what the core does not know (bytes) to its statistics; called in the thread."""

    def __init__(self, core: Core, describe: Callable[[EngineStats], EngineStats]) -> None:
        self._core, self._describe = core, describe
        self._inbox: deque[Command] = deque()
        self._wake = threading.Condition()
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[EngineEvent], EngineEvent]]] = defaultdict(list)
        self._closing = False
        self._failure: BaseException | None = None
        self._stats = describe(core.stats())
        self._thread = threading.Thread(target=self._work, name="nautile-engine", daemon=True)
        self._thread.start()

    # From any thread ----------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncIterator[EngineEvent]:
        """The events of a request, awaited in the running loop. Leaving early cancels."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[EngineEvent]()
        self._tell(lambda: self._core.submit(request, lambda event: self._outbox[loop].append((events, event))))
        left = request.sampling.n
        try:
            while left:
                event = await events.get()
                left -= isinstance(event, Finished)
                yield event
        finally:
            if left:
                self.cancel(request.id)

    def stream_sync(self, request: Request) -> EventStream:
        """The same for a caller without an event loop; the request is in the queue when this returns."""
        return self.streams_sync([request])[0]

    def streams_sync(self, requests: Sequence[Request]) -> list[EventStream]:
        """Several at once. No step comes between them: an engine that was at rest batches them the same way every time."""
        queues: list[queue.SimpleQueue[EngineEvent]] = [queue.SimpleQueue() for _ in requests]
        pairs = list(zip(requests, queues, strict=True))
        self._tell(*(partial(self._core.submit, request, events.put) for request, events in pairs))
        return [EventStream(request, events, partial(self.cancel, request.id)) for request, events in pairs]

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        with contextlib.suppress(RequestError):  # a closed engine has cancelled everything
            self._tell(lambda: self._core.cancel(request_id))

    def stats(self) -> EngineStats:
        """As of the last step."""
        return self._stats

    def run(self, command: Command) -> None:
        """Run something in the thread between two steps and wait for it; its exception is raised here."""
        done, failure = threading.Event(), list[BaseException]()

        def guarded() -> None:
            try:
                command()
            except BaseException as error:  # handed to the caller
                failure.append(error)
            finally:
                done.set()

        self._tell(guarded)
        while not done.wait(0.2):
            if not self._thread.is_alive() and not done.is_set():
                raise EngineStoppedError("the engine is closed")
        if failure:
            raise failure[0]

    def close(self) -> None:
        """Cancel everything and end the thread. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _tell(self, *commands: Command) -> None:
        with self._wake:
            if self._failure is not None:
                raise EngineStoppedError(f"the engine stopped: {self._failure}")
            if self._closing:
                raise EngineStoppedError("the engine is closed: make a new one")
            self._inbox.extend(commands)
            self._wake.notify()

    # In the engine's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closing:
                self._read_inbox()
                if self._core.idle:
                    self._rest()
                else:
                    tokens = self._core.step()
                    self._hand_over()
                    if not tokens:
                        self._wait(_PAUSE)
            self._read_inbox()
            self._core.cancel_all()
        except BaseException as error:  # a fault of the engine itself: nobody may wait for ever
            with self._wake:
                self._failure = error  # from here on nothing more comes in
            with contextlib.suppress(Exception):
                self._read_inbox()
                self._core.fail_all(f"the engine stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self._hand_over()

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _rest(self) -> None:
        """Nothing to do: hand over what is left, check the pool, sleep until a command comes."""
        self._hand_over()
        self._core.pool.check()
        self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        """Until a command comes, or for this long: somebody else's sequences may hold the slots or blocks."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._closing, seconds)

    def _hand_over(self) -> None:
        self._stats = self._describe(self._core.stats())
        for loop, items in self._outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, items)
        self._outbox.clear()


def _deliver(items: list[tuple[asyncio.Queue[EngineEvent], EngineEvent]]) -> None:
    for events, event in items:
        events.put_nowait(event)
