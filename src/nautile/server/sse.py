"""Answers that end when their client goes: server-sent events, flushed one by one, and whole answers.

Starlette's own streaming response would do, but for two things: it has no comments for long silences, and what fails before
the first event should be a plain error with its own status.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nautile.server.errors import ApiError
from nautile.server.intake import caller, service_of

__all__ = ["EventStream", "event", "stream_events", "while_connected"]

_COMMENT = b": keep-alive\n\n"
_SEPARATORS = {ord(separator): f"\\u{ord(separator):04x}" for separator in "\x85\u2028\u2029"}
_T = TypeVar("_T")


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; ``data`` is written as JSON unless it is text.

    Separators of lines that only Unicode knows are escaped: clients that split lines as Python does would cut the JSON there.
    """
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_SEPARATORS)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


async def stream_events(
    request: Request, chunks: AsyncGenerator[bytes, None], failed: Callable[[ApiError], bytes]
) -> EventStream:
    """A response of server-sent events.

    Waits for the first one until a comment is due, so that an error of the request itself (ApiError) is raised here and gets
    its own status. Any later error ends the stream with what ``failed`` makes of it: the API's own event, and its last words.
    """

    def last(error: Exception) -> bytes:
        if not isinstance(error, ApiError):
            error = service.unexpected(error, caller(request)[1], request.url.path)
        return failed(error)

    service = service_of(request)
    keep_alive = service.options.keep_alive
    first: asyncio.Future[bytes] = asyncio.ensure_future(anext(chunks, b""))
    gone = asyncio.ensure_future(_gone(request))
    waited: set[asyncio.Future[Any]] = {first, gone}
    try:
        await asyncio.wait(waited, timeout=keep_alive, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _end(chunks, first, gone)
        raise
    if first.done() and first.exception() is None and not gone.done():
        return EventStream(chunks, first, gone, keep_alive, last)
    if first.done() or gone.done():
        error = first.exception() if first.done() and not first.cancelled() else None
        await _end(chunks, first, gone)
        raise error or ClientDisconnect
    return EventStream(chunks, first, gone, keep_alive, last)


class EventStream(Response):
    """Sends events as they come, comments while none comes, and stops when the client has gone."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        first: asyncio.Future[bytes],
        gone: asyncio.Future[None],
        keep_alive: float,
        last: Callable[[Exception], bytes],
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # proxies must not collect events
        del self.headers["content-length"]
        self._chunks, self._next, self._gone, self._keep_alive, self._last = chunks, first, gone, keep_alive, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                waited: set[asyncio.Future[Any]] = {self._next, self._gone}
                await asyncio.wait(waited, timeout=self._keep_alive, return_when=asyncio.FIRST_COMPLETED)
                if self._gone.done():
                    return
                if not self._next.done():
                    await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
                    continue
                error = self._next.exception()
                chunk = self._last(error) if isinstance(error, Exception) else self._next.result()
                if not chunk:
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._next = asyncio.ensure_future(anext(self._chunks, b""))  # b"" too after an error
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            return  # the client went while something was being sent
        finally:
            await _end(self._chunks, self._next, self._gone)


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The result of ``work``, which is cancelled when the client goes. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    waited: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancelled(task, gone)


async def _gone(request: Request) -> None:
    """Returns when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(chunks: AsyncGenerator[bytes, None], *tasks: asyncio.Future[Any]) -> None:
    await _cancelled(*tasks)
    await chunks.aclose()


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """End tasks; what they raise has been dealt with, or is of no use to anybody."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
