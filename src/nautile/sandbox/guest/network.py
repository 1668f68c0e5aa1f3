"""A guest's only way out: its agent listens where a container's proxy would, and connections come over the channel.

The proxy itself (``PolicyProxy``: list, names, cutting) is the one that containers have. Here it lives in threads of the
client's process, since the channel does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import deque

from nautile.sandbox.errors import SandboxLost
from nautile.sandbox.guest import link as wire
from nautile.sandbox.guest.link import Link, Stream
from nautile.sandbox.policy import NetworkPolicy
from nautile.sandbox.proxy import PolicyProxy

__all__ = ["GuestNetwork"]

_HEADER_LIMIT = 32 * 1024
_PATIENCE = 3600.0


class GuestNetwork:
    """Serves one guest's connections until ``close``."""

    def __init__(self, link: Link, policy: NetworkPolicy) -> None:
        self._link, self._proxy = link, PolicyProxy(policy)
        self._arrived: deque[Stream] = deque()
        link.accept = self._arrived
        self._loop = asyncio.new_event_loop()
        self._closed = threading.Event()
        for target in (self._serve, self._accept):
            threading.Thread(target=target, name="guest-network", daemon=True).start()

    @property
    def policy(self) -> NetworkPolicy:
        """The list of now."""
        return self._proxy.policy

    def change(self, policy: NetworkPolicy) -> None:
        """Another list from now on; connections that it does not allow are cut when this returns."""

        async def change() -> int:
            return self._proxy.change(policy)

        asyncio.run_coroutine_threadsafe(change(), self._loop).result(timeout=20.0)

    def close(self) -> None:
        """Cut everything."""
        self._closed.set()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _accept(self) -> None:
        """Receive whenever nobody else does, and start what serves a connection."""
        with contextlib.suppress(SandboxLost):
            while not self._closed.is_set():
                self._link.pump(time.monotonic() + 0.5)
                while self._arrived:
                    stream = self._arrived.popleft()
                    ours, theirs = socket.socketpair()
                    asyncio.run_coroutine_threadsafe(self._handle(theirs), self._loop)
                    for target in (self._inwards, self._outwards):
                        threading.Thread(target=target, args=(stream, ours), name="guest-connection", daemon=True).start()

    async def _handle(self, channel: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=channel, limit=_HEADER_LIMIT)
        await self._proxy.handle(reader, writer)

    @staticmethod
    def _outwards(stream: Stream, channel: socket.socket) -> None:
        """What the tenant sends goes to the proxy."""
        with contextlib.suppress(SandboxLost, OSError):
            deadline = time.monotonic() + _PATIENCE
            while (event := stream.next(deadline)) is None or event[0] == wire.OUT:
                if event is None and time.monotonic() > deadline:
                    break
                if event is not None and event[1]:
                    channel.sendall(event[1])
                elif event is not None:
                    channel.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _inwards(stream: Stream, channel: socket.socket) -> None:
        """What the proxy answers goes to the tenant; when the proxy has hung up, the connection ends."""
        with contextlib.suppress(SandboxLost, OSError):
            while data := channel.recv(2**16):
                stream.feed_all(data, _PATIENCE)
            stream.end_input()
        with contextlib.suppress(OSError):
            channel.close()
